//! Answers, on both sides: where a target sends its intermediate results and its outcome, and what the requester gets: the events of a
//! request, the answers of all targets, and why a request was not dispatched.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::link::{Link, Outbound, SendError};
use crate::packet::{
    Failure, FailureCode, Identity, Intermediate, InvalidService, MessageId, Outcome, Packet, Payload, RandomnessError,
    Request, Token,
};
use crate::serializer::{SealError, Verified};
use crate::transport::{Destination, TransportError, topology};

/// How long to retry an answer to a request without a deadline.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);

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
    },
    /// The outcome of one target: its result, or its failure. There is exactly one for every target.
    #[non_exhaustive]
    Outcome {
        /// The agent.
        from: Identity,
        /// The result.
        result: Result<Payload, Failure>,
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

/// Where the answers to a request go.
#[derive(Clone, Debug)]
pub(crate) struct ReplyTo {
    token: Token,
    to: Identity,
    queue: String,
    request_id: Option<MessageId>,
    deadline: Option<Timestamp>,
    /// The sequence number of the next intermediate result.
    next_part: u64,
}

impl ReplyTo {
    /// The answers to this request go to its signed sender and instance; in a plain format to the queue that the request names, if it
    /// belongs to the sender. None when there is no queue or no token.
    pub fn of(request: &Request, sender: &Identity, signer: Option<&Verified>) -> Option<Self> {
        let mut reply_to = Self::to(request.token?, sender, signer, request.reply_to.as_deref())?;
        reply_to.deadline = request.deadline;
        Some(reply_to)
    }

    /// As [`of`](Self::of), from the parts of a message.
    pub fn to(token: Token, sender: &Identity, signer: Option<&Verified>, plain_queue: Option<&str>) -> Option<Self> {
        let queue = match signer {
            Some(signer) => topology::process_queue_name(sender.as_str(), signer.instance()),
            None => plain_queue.filter(|queue| belongs_to(queue, sender))?.to_owned(),
        };
        let request_id = signer.map(Verified::id);
        Some(Self { token, to: sender.clone(), queue, request_id, deadline: None, next_part: 0 })
    }

    /// Sends an intermediate result. If that fails, the caller sees a gap.
    pub async fn intermediate(&mut self, link: &Link, key: String, value: Payload, origin: Option<Identity>) {
        let packet = Intermediate {
            token: self.token,
            to: self.to.clone(),
            from: link.identity().clone(),
            key,
            value,
            sequence: Some(self.next_part),
            origin,
        };
        self.next_part += 1;
        if let Err(error) = self.send(link, packet.into()).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "an intermediate result was not sent");
        }
    }

    /// Sends the answer, again until it is confirmed or the deadline has passed.
    pub async fn answer(&self, link: &Link, result: Result<Payload, Failure>) {
        let until = self.deadline.unwrap_or_else(|| link.now().saturating_add(RETRY_TIMEOUT));
        let (results, failure) = match result {
            Ok(results) => (results, None),
            Err(failure) => (Payload::default(), Some(failure)),
        };
        let (token, to, from) = (self.token, self.to.clone(), link.identity().clone());
        let mut outcome = Outcome { token, to, from, results, failure };
        loop {
            match self.send(link, outcome.clone().into()).await {
                Ok(_) => return,
                Err(SendError::Transport(error)) if error.is_retryable() && link.now() < until => {
                    tracing::debug!(%error, "the answer was not confirmed; sending it again");
                }
                Err(SendError::Transport(TransportError::Unroutable(queue))) => {
                    tracing::debug!(queue, "the requester is gone; the answer is dropped");
                    return;
                }
                Err(SendError::Seal(error @ (SealError::TooLarge(..) | SealError::Codec(_))))
                    if outcome.failure.is_none() =>
                {
                    outcome.results = Payload::default();
                    outcome.failure = Some(Failure::new(FailureCode::BadAnswer, error.to_string()));
                }
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "an answer was not sent");
                    return;
                }
            }
        }
    }

    async fn send(&self, link: &Link, packet: Packet) -> Result<MessageId, SendError> {
        let message = Outbound::new(packet, self.to.clone()).in_reply_to(self.request_id);
        link.send(message, Destination::Queue(self.queue.clone())).await
    }
}

/// Whether a queue belongs to a process of this node.
fn belongs_to(queue: &str, node: &Identity) -> bool {
    let instance =
        |rest: &str| rest.is_empty() || rest.strip_prefix('.').is_some_and(|i| i.bytes().all(|b| b.is_ascii_digit()));
    queue.strip_prefix(node.as_str()).is_some_and(instance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_request_cannot_send_its_answer_to_somebody_elses_queue() {
        let sender = Identity::mapper("a").unwrap();
        for own in ["mapper-a", "mapper-a.17"] {
            assert!(belongs_to(own, &sender), "{own}");
        }
        for foreign in ["mapper-b", "mapper-ab", "mapper-a.x", "request", "mapper-a.1.presence", ""] {
            assert!(!belongs_to(foreign, &sender), "{foreign}");
        }
    }
}
