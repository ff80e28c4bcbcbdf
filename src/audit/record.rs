//! What one line of the log says about a message.

use serde::Serialize;

use crate::clock::Timestamp;
use crate::packet::{Identity, Kind, MessageId, Service};
use crate::policy::Decision;
use crate::serializer::{Inbound, InboundQueue, OpenError};

/// What happened to a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// It was opened.
    Accepted,
    /// It was refused while being opened.
    Refused,
    /// The policy allowed it.
    Allowed,
    /// The policy denied it.
    Denied,
}

/// One event, as it is written. It contains nothing of a payload.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    at: String,
    node: Identity,
    verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<Identity>,
    /// Whether `from` was verified.
    verified: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<MessageId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    channel: Option<&'static str>,
    /// The step of opening that refused the message.
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<&'static str>,
    #[serde(rename = "why", skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<Service>,
    #[serde(skip_serializing_if = "Option::is_none")]
    on_behalf_of: Option<Identity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
}

impl Record {
    fn new(node: &Identity, now: Timestamp, verdict: Verdict) -> Self {
        Self {
            at: now.to_string(),
            node: node.clone(),
            verdict,
            kind: None,
            from: None,
            verified: false,
            id: None,
            channel: None,
            step: None,
            reason: None,
            service: None,
            on_behalf_of: None,
            rule: None,
        }
    }

    /// A message that `node` opened.
    pub fn accepted(node: &Identity, now: Timestamp, inbound: &Inbound, queue: InboundQueue) -> Self {
        Self {
            kind: Some(inbound.packet.kind().as_str()),
            from: inbound.sender().cloned(),
            verified: inbound.signer().is_some(),
            id: inbound.signer().map(|signer| signer.id()),
            channel: Some(queue.as_str()),
            ..Self::new(node, now, Verdict::Accepted)
        }
    }

    /// A message that `node` refused to open.
    pub fn refused(node: &Identity, now: Timestamp, error: &OpenError, queue: InboundQueue) -> Self {
        Self {
            from: error.claimed.clone(),
            channel: Some(queue.as_str()),
            step: Some(error.kind.as_str()),
            reason: Some(error.why.to_string()),
            ..Self::new(node, now, Verdict::Refused)
        }
    }

    /// A policy decision of `node`.
    ///
    /// ```
    /// use nanite::audit::{DecisionSubject, Record};
    /// use nanite::clock::{Clock, SystemClock};
    /// use nanite::packet::{Identity, Kind, Service};
    /// use nanite::policy::Decision;
    ///
    /// let (fred, desk) = (Identity::agent("fred")?, Identity::mapper("desk")?);
    /// let service: Service = "/work/light".parse()?;
    /// let subject = DecisionSubject::new(Kind::Request, &desk).service(&service);
    /// let record = Record::decided(&fred, SystemClock.now(), &subject, &Decision::denied());
    /// assert_eq!(serde_json::to_value(record)?["verdict"], "denied");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn decided(node: &Identity, now: Timestamp, subject: &DecisionSubject<'_>, decision: &Decision) -> Self {
        let verdict = if decision.allowed { Verdict::Allowed } else { Verdict::Denied };
        Self {
            kind: Some(subject.kind.as_str()),
            from: Some(subject.from.clone()),
            verified: subject.id.is_some(),
            id: subject.id,
            service: subject.service.cloned(),
            on_behalf_of: subject.on_behalf_of.cloned(),
            reason: (!decision.allowed).then(|| decision.reason.clone()),
            rule: decision.rule.clone(),
            ..Self::new(node, now, verdict)
        }
    }
}

/// The message that a policy decided about.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct DecisionSubject<'a> {
    /// The kind of message.
    pub kind: Kind,
    /// Its sender.
    pub from: &'a Identity,
    /// Its id; `None` if it was not signed.
    pub id: Option<MessageId>,
    /// The requested service.
    pub service: Option<&'a Service>,
    /// The node that the sender acts for.
    pub on_behalf_of: Option<&'a Identity>,
}

impl<'a> DecisionSubject<'a> {
    /// An unsigned message of this kind and sender.
    pub fn new(kind: Kind, from: &'a Identity) -> Self {
        Self { kind, from, id: None, service: None, on_behalf_of: None }
    }

    /// Sets the id of a signed message.
    #[must_use]
    pub fn id(mut self, id: impl Into<Option<MessageId>>) -> Self {
        self.id = id.into();
        self
    }

    /// Sets the requested service.
    #[must_use]
    pub fn service(mut self, service: impl Into<Option<&'a Service>>) -> Self {
        self.service = service.into();
        self
    }

    /// Sets the node that the sender acts for.
    #[must_use]
    pub fn on_behalf_of(mut self, origin: impl Into<Option<&'a Identity>>) -> Self {
        self.on_behalf_of = origin.into();
        self
    }
}
