//! Where a target sends its intermediate results and its outcome.

use std::time::Duration;

use tokio::time::Instant;

use super::builder::after;
use super::forwarded::forwarded;
use crate::clock::Timestamp;
use crate::link::{Link, Outbound, SealedMessage, SendError};
use crate::packet::{
    Failure, FailureCode, ForwardedProof, Identity, Intermediate, MessageId, Outcome, Packet, Payload, Request,
    RequestOrigin, Token,
};
use crate::serializer::{Proof, SealError, Verified};
use crate::transport::{Destination, TransportError, topology};

/// How long to retry an answer to a request without a deadline.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long to wait before an answer is published again, at first; twice as long each time.
const FIRST_RETRY_DELAY: Duration = Duration::from_millis(100);
/// The longest time between two attempts to publish an answer.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Where the answers to a request go.
#[derive(Clone, Debug)]
pub(crate) struct ReplyTo {
    token: Token,
    to: Identity,
    queue: String,
    request_id: Option<MessageId>,
    /// The process that made the request.
    instance: Option<u64>,
    deadline: Option<Timestamp>,
    /// Signed with the answers to a proxied request.
    origin: Option<Box<RequestOrigin>>,
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
        let (request_id, instance) = (signer.map(Verified::id), signer.map(Verified::instance));
        let to = sender.clone();
        Some(Self { token, to, queue, request_id, instance, deadline: None, origin: None, next_part: 0 })
    }

    /// The answers are signed as those to this proxied request.
    pub fn with_origin(self, origin: Option<RequestOrigin>) -> Self {
        Self { origin: origin.map(Box::new), ..self }
    }

    /// Sends the intermediate result with this number. If that fails, the caller sees a gap.
    pub async fn part(mut self, link: &Link, number: u64, key: String, value: Payload) {
        self.next_part = number;
        self.intermediate(link, key, value, None).await;
    }

    /// Sends the next intermediate result. If that fails, the caller sees a gap.
    pub async fn intermediate(&mut self, link: &Link, key: String, value: Payload, agent: Option<Identity>) {
        let part = Intermediate::new(self.token, self.to.clone(), link.identity().clone(), key, value);
        self.send_part(link, Intermediate { origin: agent, ..part }).await;
    }

    /// Forwards an intermediate result of an agent with its proof.
    pub async fn forward(&mut self, link: &Link, agent: Identity, proof: &Proof) {
        let from = link.identity().clone();
        let part = Intermediate::new(self.token, self.to.clone(), from, String::new(), Payload::default());
        self.send_part(link, part.with_origin(agent).with_proof(forwarded(proof))).await;
    }

    async fn send_part(&mut self, link: &Link, part: Intermediate) {
        let request_origin = self.origin.clone();
        let part = Intermediate { sequence: Some(self.next_part), request_origin, ..part };
        self.next_part += 1;
        let sent = link.send(self.outbound(part), Destination::Queue(self.queue.clone())).await;
        if let Err(error) = sent {
            tracing::warn!(error = &error as &dyn std::error::Error, "an intermediate result was not sent");
        }
    }

    /// Sends the answer. It is published again, less and less often, until it is confirmed or the deadline has passed.
    pub async fn answer(&self, link: &Link, result: Result<Payload, Failure>) {
        self.answer_with_proofs(link, result, Vec::new()).await;
    }

    /// As [`answer`](Self::answer), with the answers of agents that it forwards.
    pub async fn answer_with_proofs(&self, link: &Link, result: Result<Payload, Failure>, proofs: Vec<ForwardedProof>) {
        let timeout = self.deadline.map_or(RETRY_TIMEOUT, |deadline| deadline.since(link.now()));
        let (until, mut delay) = (after(timeout), FIRST_RETRY_DELAY);
        let mut outcome = Outcome::new(self.token, self.to.clone(), link.identity().clone(), result);
        outcome.request_origin = self.origin.clone();
        outcome.proofs = proofs;
        let Some(mut sealed) = self.seal(link, &mut outcome).await else { return };
        loop {
            match link.publish(&sealed, Destination::Queue(self.queue.clone())).await {
                Ok(()) => return,
                Err(TransportError::Unroutable(queue)) => {
                    tracing::debug!(queue, "the requester is gone; the answer is dropped");
                    return;
                }
                Err(error) if error.is_retryable() && Instant::now() + delay < until => {
                    tracing::debug!(%error, ?delay, "the answer was not confirmed; it will be published again");
                }
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "an answer was not sent");
                    return;
                }
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(MAX_RETRY_DELAY);
            if sealed.expires_at() <= link.now() {
                let Some(again) = self.seal(link, &mut outcome).await else { return };
                sealed = again;
            }
        }
    }

    /// Seals an outcome; one that cannot be sealed is replaced by a failure.
    async fn seal(&self, link: &Link, outcome: &mut Outcome) -> Option<SealedMessage> {
        loop {
            match link.seal(self.outbound(outcome.clone())).await {
                Ok(sealed) => return Some(sealed),
                Err(SendError::Seal(error @ (SealError::TooLarge(..) | SealError::Codec(_))))
                    if outcome.failure.is_none() =>
                {
                    outcome.results = Payload::default();
                    outcome.proofs = Vec::new();
                    outcome.failure = Some(Failure::new(FailureCode::BadAnswer, error.to_string()));
                }
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "an answer was not sealed");
                    return None;
                }
            }
        }
    }

    fn outbound(&self, packet: impl Into<Packet>) -> Outbound {
        Outbound::new(packet, self.to.clone()).in_reply_to(self.request_id).instances(self.instance)
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
