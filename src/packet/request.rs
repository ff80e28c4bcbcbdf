//! Work: requests, pushes, and what comes back.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Identity, Payload, Service, Tag, Token};
use crate::clock::Timestamp;

/// How a request chooses among the agents that offer its service.
///
/// A name only: unknown names are refused when read, and no name is ever looked up as code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectorName {
    /// The one with the least load, work in flight included.
    #[default]
    LeastLoaded,
    /// Any one.
    Random,
    /// Each in turn.
    Rr,
    /// All of them.
    All,
}

impl SelectorName {
    /// Every selector's name.
    pub const ALL: [SelectorName; 4] =
        [SelectorName::LeastLoaded, SelectorName::Random, SelectorName::Rr, SelectorName::All];

    /// The name as text.
    pub const fn as_str(self) -> &'static str {
        match self {
            SelectorName::LeastLoaded => "least_loaded",
            SelectorName::Random => "random",
            SelectorName::Rr => "rr",
            SelectorName::All => "all",
        }
    }
}

impl std::str::FromStr for SelectorName {
    type Err = UnknownSelector;

    fn from_str(text: &str) -> Result<Self, UnknownSelector> {
        Self::ALL.into_iter().find(|name| name.as_str() == text).ok_or(UnknownSelector)
    }
}

/// There is no selector of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a selector is least_loaded, random, rr or all")]
pub struct UnknownSelector;

impl fmt::Display for SelectorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Work to do: with an answer as [`Packet::Request`](super::Packet::Request), without one as
/// [`Packet::Push`](super::Packet::Push).
///
/// A mapper sends it to the agent it chose; an agent sends it to the mappers, to have it dispatched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The service that is asked for.
    #[serde(rename = "type")]
    pub service: Service,
    /// What it works on.
    #[serde(default)]
    pub payload: Payload,
    /// Who asks.
    #[serde(default)]
    pub from: Option<Identity>,
    /// What the answers will carry.
    #[serde(default)]
    pub token: Option<Token>,
    /// Where the answer goes, in plain formats only: a secure message says it by its signed sender and instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<String>,
    /// How the agent is chosen.
    #[serde(default)]
    pub selector: SelectorName,
    /// The one agent that is meant.
    #[serde(default)]
    pub target: Option<Identity>,
    /// Whether it outlives a restart of the broker, and waits where no agent is online.
    #[serde(default)]
    pub persistent: Option<bool>,
    /// Tags that the agent must carry, all of them.
    #[serde(default)]
    pub tags: Vec<Tag>,
    /// Whether it may wait for an agent in the offline queue; as the mapper is set, when it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offline: Option<bool>,
    /// When the answer is no longer wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// Who asked the mapper for it, when that was another node: the mapper vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_behalf_of: Option<Identity>,
}

/// Why work failed, as a word that programs can match.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureCode {
    /// The handler returned an error.
    Failed,
    /// The handler panicked.
    Panicked,
    /// The agent offers no such service.
    NoSuchService,
    /// The payload does not fit the handler.
    BadPayload,
    /// The agent or the mapper refused the caller.
    Denied,
    /// Nobody offers the service (with these tags, or at this target).
    NoTarget,
    /// The agent went away before it answered.
    Lost,
    /// The deadline passed.
    TimedOut,
    /// The node is full.
    Busy,
    /// The answer cannot be sent (too large, say).
    BadAnswer,
    /// A code of the handler's own.
    #[serde(untagged)]
    Other(String),
}

impl FailureCode {
    /// The code as text.
    pub fn as_str(&self) -> &str {
        match self {
            FailureCode::Failed => "failed",
            FailureCode::Panicked => "panicked",
            FailureCode::NoSuchService => "no_such_service",
            FailureCode::BadPayload => "bad_payload",
            FailureCode::Denied => "denied",
            FailureCode::NoTarget => "no_target",
            FailureCode::Lost => "lost",
            FailureCode::TimedOut => "timed_out",
            FailureCode::Busy => "busy",
            FailureCode::BadAnswer => "bad_answer",
            FailureCode::Other(code) => code,
        }
    }
}

impl fmt::Display for FailureCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why work failed: a code for programs and a message for people; never a backtrace.
///
/// It is no [`std::error::Error`] itself, so that `?` turns any error into one inside a handler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure.
    pub code: FailureCode,
    /// What happened, in a sentence.
    pub message: String,
}

impl Failure {
    /// The longest message that is kept, in bytes; a longer one is cut.
    pub const MAX_MESSAGE: usize = 4096;

    /// A failure with this code and message.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > Self::MAX_MESSAGE {
            let cut = (0..=Self::MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(cut);
        }
        Self { code, message }
    }

    /// A failure of a handler, with a code of its own.
    pub fn other(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(FailureCode::Other(code.into()), message)
    }

    /// A failure of a handler.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(FailureCode::Failed, message)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::failed(error.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

/// The answer to a request: a value, or why there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The token of the request.
    pub token: Token,
    /// Who asked.
    pub to: Identity,
    /// Who answers.
    pub from: Identity,
    /// The value; null when there is a failure.
    #[serde(default)]
    pub results: Payload,
    /// Why there is no value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

impl Outcome {
    /// The value or the failure.
    pub fn into_result(self) -> Result<Payload, Failure> {
        match self.failure {
            None => Ok(self.results),
            Some(failure) => Err(failure),
        }
    }
}

impl Request {
    /// A request for `service` with this payload, and nothing else asked.
    pub fn new(service: Service, payload: Payload) -> Self {
        Self {
            service,
            payload,
            from: None,
            token: None,
            reply_to: None,
            selector: SelectorName::default(),
            target: None,
            persistent: None,
            offline: None,
            tags: Vec::new(),
            deadline: None,
            on_behalf_of: None,
        }
    }
}

/// A part of an answer, sent while the handler still works.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Intermediate {
    /// The token of the request.
    pub token: Token,
    /// Who asked.
    pub to: Identity,
    /// Who answers.
    pub from: Identity,
    /// What the value is about; `defaultkey` when the handler gave none.
    #[serde(rename = "messagekey")]
    pub key: String,
    /// The value.
    #[serde(rename = "message", default)]
    pub value: Payload,
    /// Counts the parts of one answer from 0, so that a gap is seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// The agent that said it, when a mapper hands it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Identity>,
}

impl Intermediate {
    /// The key of a value that was given without one.
    pub const DEFAULT_KEY: &'static str = "defaultkey";
}
