//! What the requester gets: the events of a request, the answers of all targets, and why a request was not dispatched.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::link::SendError;
use crate::packet::{Failure, FailureCode, Identity, InvalidService, Payload, RandomnessError};
use crate::serializer::{Proof, SealError};
use crate::transport::TransportError;

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// An intermediate result.
    #[non_exhaustive]
    Intermediate {
        /// The agent.
        from: Identity,
        /// The key, which the handler chose.
        key: String,
        /// The value.
        value: Payload,
        /// How many intermediate results of this agent are missing before this one.
        missed: u64,
        /// The agent's signature over it, if the request is proxied.
        proof: Option<Arc<Proof>>,
    },
    /// The outcome of one target: its result, or its failure. There is exactly one for every target.
    #[non_exhaustive]
    Outcome {
        /// The agent.
        from: Identity,
        /// The result.
        result: Result<Payload, Failure>,
        /// The agent's signature over it, if the request is proxied and the agent answered.
        proof: Option<Arc<Proof>>,
    },
    /// The request failed as a whole: a mapper could not dispatch it, or none answered. No event follows.
    Failed(Failure),
}

/// The outcomes of a request, by agent.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Answers {
    /// The result or failure of each target.
    pub outcomes: BTreeMap<Identity, Result<Payload, Failure>>,
}

impl Answers {
    /// The results.
    pub fn results(&self) -> impl Iterator<Item = (&Identity, &Payload)> {
        self.outcomes.iter().filter_map(|(from, result)| Some((from, result.as_ref().ok()?)))
    }

    /// The failures.
    pub fn failures(&self) -> impl Iterator<Item = (&Identity, &Failure)> {
        self.outcomes.iter().filter_map(|(from, result)| Some((from, result.as_ref().err()?)))
    }
}

/// The serialized form: `{"results": {"nanite-fred": ..}, "failures": {"nanite-bob": {"code": .., "message": ..}}}`.
#[derive(Serialize, Deserialize)]
struct SerializedAnswers {
    results: BTreeMap<Identity, Payload>,
    failures: BTreeMap<Identity, Failure>,
}

impl Serialize for Answers {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        SerializedAnswers {
            results: self.results().map(|(from, value)| (from.clone(), value.clone())).collect(),
            failures: self.failures().map(|(from, failure)| (from.clone(), failure.clone())).collect(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Answers {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let SerializedAnswers { results, failures } = SerializedAnswers::deserialize(deserializer)?;
        let results = results.into_iter().map(|(from, value)| (from, Ok(value)));
        let failures = failures.into_iter().map(|(from, failure)| (from, Err(failure)));
        Ok(Self { outcomes: results.chain(failures).collect() })
    }
}

/// Why a request was not dispatched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The name of the service is invalid.
    #[error(transparent)]
    Service(#[from] InvalidService),
    /// The payload cannot be serialized.
    #[error("the payload cannot be serialized")]
    Payload(#[source] serde_json::Error),
    /// No agent offers the service with these tags, or the target does not.
    #[error("no agent offers {0}")]
    NoTarget(String),
    /// The mapper refused the caller.
    #[error("denied: {0}")]
    Denied(String),
    /// The mapper is working on as many requests of this node as it accepts at a time.
    #[error("overloaded: {0}")]
    Overloaded(String),
    /// No mapper runs that could dispatch it.
    #[error("no mapper runs")]
    NoMapper,
    /// The mapper could not dispatch it.
    #[error("the mapper could not dispatch it: {0}")]
    Refused(Failure),
    /// It could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The mapper's state of the agents cannot be read.
    #[error("the mapper's state cannot be read")]
    State(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<Failure> for RequestError {
    /// The failure that a mapper reports for a request as a whole.
    fn from(failure: Failure) -> Self {
        match failure.code {
            FailureCode::NoTarget => RequestError::NoTarget(failure.message),
            FailureCode::Denied => RequestError::Denied(failure.message),
            FailureCode::Overloaded => RequestError::Overloaded(failure.message),
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
