//! Asking for work: what mappers and proxies share. How a request is put together, what comes back, and the requests under way.

mod builder;
mod pending;
mod reply;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::link::SendError;
use crate::packet::{Failure, FailureCode, Identity, InvalidService, Payload, RandomnessError};
use crate::serializer::SealError;
use crate::transport::TransportError;

pub(crate) use builder::after;
pub use builder::{Dispatch, Events, RequestBuilder, RequestSpec};
pub use pending::AgentWorkload;
pub(crate) use pending::PendingRequests;
pub(crate) use reply::ReplyTo;

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A part of an answer.
    Intermediate {
        /// Who said it.
        from: Identity,
        /// What it is about.
        key: String,
        /// The value.
        value: Payload,
        /// How many parts of this agent are missing before this one.
        missed: u64,
    },
    /// The answer of one agent, or why there is none. Exactly one comes for every target.
    Outcome {
        /// Who answered.
        from: Identity,
        /// The answer.
        result: Result<Payload, Failure>,
    },
    /// The request failed as a whole: a mapper that was to dispatch it could not, or none answered. Nothing comes after it.
    Failed(Failure),
}

/// The answers to a request, by agent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answers {
    /// What each agent answered, or why it did not.
    pub outcomes: BTreeMap<Identity, Result<Payload, Failure>>,
}

impl Answers {
    /// The answers that are values.
    pub fn results(&self) -> impl Iterator<Item = (&Identity, &Payload)> {
        self.outcomes.iter().filter_map(|(from, result)| Some((from, result.as_ref().ok()?)))
    }

    /// The failures.
    pub fn failures(&self) -> impl Iterator<Item = (&Identity, &Failure)> {
        self.outcomes.iter().filter_map(|(from, result)| Some((from, result.as_ref().err()?)))
    }
}

/// Answers as they are written: `{"results": {"nanite-fred": ..}, "failures": {"nanite-bob": {"code": .., "message": ..}}}`.
#[derive(Serialize, Deserialize)]
struct Written {
    results: BTreeMap<Identity, Payload>,
    failures: BTreeMap<Identity, Failure>,
}

impl Serialize for Answers {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Written {
            results: self.results().map(|(from, value)| (from.clone(), value.clone())).collect(),
            failures: self.failures().map(|(from, failure)| (from.clone(), failure.clone())).collect(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Answers {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Written { results, failures } = Written::deserialize(deserializer)?;
        let results = results.into_iter().map(|(from, value)| (from, Ok(value)));
        let failures = failures.into_iter().map(|(from, failure)| (from, Err(failure)));
        Ok(Self { outcomes: results.chain(failures).collect() })
    }
}

/// Why a request could not be given to anybody.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The service has no proper name.
    #[error(transparent)]
    Service(#[from] InvalidService),
    /// The payload cannot be expressed.
    #[error("the payload cannot be expressed")]
    Payload(#[source] serde_json::Error),
    /// No living agent offers it, with these tags, or at this target.
    #[error("no agent offers {0}")]
    NoTarget(String),
    /// The mapper refused the caller.
    #[error("denied: {0}")]
    Denied(String),
    /// No mapper is there to dispatch it.
    #[error("no mapper is there to dispatch it")]
    NoMapper,
    /// The mapper could not dispatch it.
    #[error("the mapper could not dispatch it: {0}")]
    Refused(Failure),
    /// It could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// What is known of agents cannot be read.
    #[error("what is known of agents cannot be read")]
    State(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<Failure> for RequestError {
    /// What a mapper says of a request as a whole.
    fn from(failure: Failure) -> Self {
        match failure.code {
            FailureCode::NoTarget => RequestError::NoTarget(failure.message),
            FailureCode::Denied => RequestError::Denied(failure.message),
            _ => RequestError::Refused(failure),
        }
    }
}

impl From<TransportError> for RequestError {
    fn from(error: TransportError) -> Self {
        RequestError::Send(error.into())
    }
}

impl From<RandomnessError> for RequestError {
    fn from(error: RandomnessError) -> Self {
        RequestError::Send(SealError::from(error).into())
    }
}
