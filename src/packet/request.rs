//! Requests and pushes, and the answers to them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::names::{Service, Tag, Token};
use super::origin::{ForwardedProof, RequestDigest, RequestOrigin};
use super::payload::Payload;
use crate::clock::Timestamp;

/// The selector of a request: how a mapper chooses among the agents that offer its service.
///
/// It is one of these names; an unknown name is refused when it is parsed.
///
/// ```
/// use nanite::packet::SelectorName;
///
/// assert_eq!("rr".parse(), Ok(SelectorName::RoundRobin));
/// assert!("first".parse::<SelectorName>().is_err());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SelectorName {
    /// The agent with the least load, counting requests in flight.
    #[default]
    LeastLoaded,
    /// A random agent.
    Random,
    /// Each agent in turn.
    #[serde(rename = "rr")]
    RoundRobin,
    /// Every agent.
    All,
}

impl SelectorName {
    /// Every selector name.
    pub const ALL: [SelectorName; 4] =
        [SelectorName::LeastLoaded, SelectorName::Random, SelectorName::RoundRobin, SelectorName::All];

    /// The name as text.
    pub const fn as_str(self) -> &'static str {
        match self {
            SelectorName::LeastLoaded => "least_loaded",
            SelectorName::Random => "random",
            SelectorName::RoundRobin => "rr",
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

/// A text is not the name of a selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("a selector is least_loaded, random, rr or all")]
pub struct UnknownSelector;

impl fmt::Display for SelectorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A request for a service: answered as [`Packet::Request`](super::Packet::Request), not answered as
/// [`Packet::Push`](super::Packet::Push).
///
/// A mapper sends it to the agent that it selected. Other nodes send it to the mappers, which dispatch it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Request {
    /// The requested service.
    #[serde(rename = "type")]
    pub service: Service,
    /// The input of the service.
    #[serde(default)]
    pub payload: Payload,
    /// The caller.
    #[serde(default)]
    pub from: Option<Identity>,
    /// Links the answers to this request.
    #[serde(default)]
    pub token: Option<Token>,
    /// The queue for the answer, in plain formats only: a secure message is answered to its signer and its instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<String>,
    /// How the agent is selected.
    #[serde(default)]
    pub selector: SelectorName,
    /// The only agent that may handle the request.
    #[serde(default)]
    pub target: Option<Identity>,
    /// Whether the request survives a restart of the broker and waits where no agent is online.
    #[serde(default)]
    pub persistent: Option<bool>,
    /// Tags that the agent must have, all of them.
    #[serde(default)]
    pub tags: Vec<Tag>,
    /// Whether the request may wait for an agent in the offline queue; the mapper's setting decides when it is not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offline: Option<bool>,
    /// When the caller stops waiting for the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// The node that sent the request to the mapper, if it is proxied: the mapper vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_behalf_of: Option<Identity>,
    /// The token that `on_behalf_of` chose, if the request is proxied. The agent signs both with its answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin_token: Option<Token>,
}

impl Request {
    /// A request for `service` with this payload, and defaults for the rest.
    ///
    /// ```
    /// use nanite::packet::{Request, SelectorName};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let request = Request::new("/text/upper".parse()?, "hello".into()).with_selector(SelectorName::Random);
    /// assert_eq!(request.service.as_str(), "/text/upper");
    /// # Ok(())
    /// # }
    /// ```
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
            tags: Vec::new(),
            offline: None,
            deadline: None,
            on_behalf_of: None,
            origin_token: None,
        }
    }

    /// Sets the selector.
    #[must_use]
    pub fn with_selector(mut self, selector: SelectorName) -> Self {
        self.selector = selector;
        self
    }

    /// Sets the tags that the agent must have.
    #[must_use]
    pub fn with_tags(mut self, tags: impl IntoIterator<Item = Tag>) -> Self {
        self.tags = tags.into_iter().collect();
        self
    }
}

impl RequestOrigin {
    /// The origin of a request that a mapper makes on behalf of another node; none for other requests.
    ///
    /// ```
    /// use nanite::packet::{Identity, Request, RequestOrigin, Token};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let request = Request::new("/text/upper".parse()?, "hello".into());
    /// assert_eq!(RequestOrigin::of(&request), None);
    /// let (fred, token) = (Identity::agent("fred")?, Token::random()?);
    /// let proxied = request.with_on_behalf_of(fred.clone()).with_origin_token(token);
    /// assert_eq!(RequestOrigin::of(&proxied).map(|origin| (origin.asker, origin.token)), Some((fred, token)));
    /// # Ok(())
    /// # }
    /// ```
    pub fn of(request: &Request) -> Option<Self> {
        let digest = RequestDigest::of(&request.service, &request.payload);
        Some(Self::new(request.on_behalf_of.clone()?, request.origin_token?, digest))
    }
}

optional_setters!(Request {
    /// Names the caller.
    with_from(from: Identity),
    /// Sets the token that links the answers to this request.
    with_token(token: Token),
    /// Names the queue for the answer, in plain formats only.
    with_reply_to(reply_to: impl Into<String>),
    /// Allows only this agent to handle the request.
    with_target(target: Identity),
    /// Sets whether the request survives a restart of the broker.
    with_persistent(persistent: bool),
    /// Sets whether the request may wait in the offline queue.
    with_offline(offline: bool),
    /// Sets when the caller stops waiting for the answer.
    with_deadline(deadline: Timestamp),
    /// Names the node that a mapper sends the request for.
    with_on_behalf_of(on_behalf_of: Identity),
    /// Sets the token that this node chose.
    with_origin_token(origin_token: Token),
});

/// Why a request failed, as a word that programs can match.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureCode {
    /// The handler returned an error.
    Failed,
    /// The handler panicked.
    Panicked,
    /// The agent does not offer the service.
    NoSuchService,
    /// The payload has the wrong shape for the handler.
    BadPayload,
    /// The agent or the mapper refused the caller.
    Denied,
    /// No agent offers the service with these tags, or the target does not.
    NoTarget,
    /// The agent stopped before it answered.
    Lost,
    /// The deadline passed.
    TimedOut,
    /// The node has reached a limit, or the caller has its share of it. Trying again later may help.
    Overloaded,
    /// The answer cannot be sent; for example, it is too large.
    BadAnswer,
    /// A code that the handler defines.
    #[serde(untagged)]
    Other(String),
}

impl FailureCode {
    /// The code as text.
    ///
    /// ```
    /// assert_eq!(nanite::packet::FailureCode::TimedOut.as_str(), "timed_out");
    /// ```
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
            FailureCode::Overloaded => "overloaded",
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

/// Why a request failed: a code for programs and a message for people; never a backtrace.
///
/// It does not implement [`std::error::Error`], so that `?` in a handler converts any error into a failure.
///
/// ```
/// use nanite::packet::{Failure, FailureCode};
///
/// fn half(text: &str) -> Result<u32, Failure> {
///     let number: u32 = text.parse()?;
///     if number % 2 == 1 { Err(Failure::other("odd", "the number is odd")) } else { Ok(number / 2) }
/// }
///
/// assert_eq!(half("seven").map_err(|failure| failure.code), Err(FailureCode::Failed));
/// assert_eq!(half("7").map_err(|failure| failure.to_string()), Err("odd: the number is odd".into()));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Failure {
    /// The kind of failure.
    pub code: FailureCode,
    /// The reason, in a sentence.
    pub message: String,
    /// The mapper that reports the failure, if the agent has not signed it. Set where it is received; it does not travel.
    #[serde(skip)]
    pub reported_by: Option<Identity>,
}

impl Failure {
    /// The longest message, in bytes; [`Failure::new`] cuts a longer one.
    pub const MAX_MESSAGE_BYTES: usize = 4096;

    /// A failure with this code and message.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > Self::MAX_MESSAGE_BYTES {
            let cut = (0..=Self::MAX_MESSAGE_BYTES).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(cut);
        }
        Self { code, message, reported_by: None }
    }

    /// A failure with a code that the handler defines.
    pub fn other(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(FailureCode::Other(code.into()), message)
    }

    /// A failure with the code [`FailureCode::Failed`].
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
        write!(f, "{}: {}", self.code, self.message)?;
        match &self.reported_by {
            Some(mapper) => write!(f, " (reported by {mapper})"),
            None => Ok(()),
        }
    }
}

/// The final answer to a request: a value or a failure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Outcome {
    /// The token of the request.
    pub token: Token,
    /// The caller.
    pub to: Identity,
    /// The node that answers.
    pub from: Identity,
    /// The value; null when there is a failure.
    #[serde(default)]
    pub results: Payload,
    /// The failure, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// The origin of the proxied request that an agent answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_origin: Option<Box<RequestOrigin>>,
    /// The outcomes of the agents with their signatures, in the answer of a mapper to a proxied request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub proofs: Vec<ForwardedProof>,
}

impl Outcome {
    /// The answer of `from` to the request of `to` with this token.
    ///
    /// ```
    /// use nanite::packet::{Identity, Outcome, Token};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (desk, fred) = (Identity::mapper("desk")?, Identity::agent("fred")?);
    /// let outcome = Outcome::new(Token::random()?, desk, fred, Ok("HELLO".into()));
    /// assert_eq!(outcome.into_result(), Ok("HELLO".into()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(token: Token, to: Identity, from: Identity, result: Result<Payload, Failure>) -> Self {
        let (results, failure) = match result {
            Ok(results) => (results, None),
            Err(failure) => (Payload::default(), Some(failure)),
        };
        Self { token, to, from, results, failure, request_origin: None, proofs: Vec::new() }
    }

    /// The value, or the failure.
    pub fn into_result(self) -> Result<Payload, Failure> {
        match self.failure {
            None => Ok(self.results),
            Some(failure) => Err(failure),
        }
    }
}

/// A partial answer, sent while the handler still runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Intermediate {
    /// The token of the request.
    pub token: Token,
    /// The caller.
    pub to: Identity,
    /// The node that answers.
    pub from: Identity,
    /// The key of the value; [`Intermediate::DEFAULT_KEY`] when the handler gives none.
    #[serde(rename = "messagekey")]
    pub key: String,
    /// The value.
    #[serde(rename = "message", default)]
    pub value: Payload,
    /// The number of the part within the answer, counted from 0, so that the caller notices a gap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// The agent that sent the part, when a mapper forwards it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Identity>,
    /// The origin of the proxied request that an agent answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_origin: Option<Box<RequestOrigin>>,
    /// The part with the agent's signature, when a mapper forwards it. Key, value and sequence number are then in the signed body only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Box<ForwardedProof>>,
}

impl Intermediate {
    /// The key of a value that the handler gives without a key.
    pub const DEFAULT_KEY: &'static str = "defaultkey";

    /// A partial answer of `from` to the request of `to` with this token.
    ///
    /// ```
    /// use nanite::packet::{Identity, Intermediate, Token};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (desk, fred) = (Identity::mapper("desk")?, Identity::agent("fred")?);
    /// let part = Intermediate::new(Token::random()?, desk, fred, "progress", "40%".into()).with_sequence(0);
    /// assert_eq!(part.key, "progress");
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(token: Token, to: Identity, from: Identity, key: impl Into<String>, value: Payload) -> Self {
        let key = key.into();
        Self { token, to, from, key, value, sequence: None, origin: None, request_origin: None, proof: None }
    }
}

optional_setters!(Intermediate {
    /// Sets the number of the part within the answer, counted from 0.
    with_sequence(sequence: u64),
    /// Names the agent that sent the part, when a mapper forwards it.
    with_origin(origin: Identity),
    /// Names the proxied request that the part answers.
    with_request_origin(request_origin: RequestOrigin),
    /// Adds the agent's signature, when a mapper forwards the part.
    with_proof(proof: ForwardedProof),
});
