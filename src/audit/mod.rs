//! The audit log: one line for every message that was accepted or refused, and for every decision about it, in a chain of hashes.
//!
//! A line is a JSON object with its number (`seq`) and the SHA-256 of the line before it (`prev`), so that a line that was
//! changed, taken out or moved is found by [`verify`]. Beside the log stands `FILE.head`, which names the last line, so that a log
//! that was cut off at its end is found as well. Whoever can write both files can write a new history: keep them where the node
//! can only append, or copy the head elsewhere.

mod log;
mod verify;

use serde::Serialize;

use crate::clock::Timestamp;
use crate::packet::{Identity, Kind, MessageId, Service};
use crate::policy::Decision;
use crate::serializer::{Inbound, InboundQueue, OpenError};

pub use log::{AuditError, AuditLog, AuditOptions, Overflow};
pub use verify::{Problem, Report, verify};

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// It was opened.
    Accepted,
    /// It was refused while it was opened.
    Refused,
    /// What it asks for was allowed.
    Allowed,
    /// What it asks for was denied.
    Denied,
}

/// One event, as it is written. It holds nothing of a payload.
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
    /// The step of opening at which it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
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
            why: None,
            service: None,
            on_behalf_of: None,
            rule: None,
        }
    }

    /// A message that `node` opened.
    pub fn accepted(node: &Identity, now: Timestamp, inbound: &Inbound, channel: InboundQueue) -> Self {
        Self {
            kind: Some(inbound.packet.kind().as_str()),
            from: inbound.sender().cloned(),
            verified: inbound.signer().is_some(),
            id: inbound.signer().map(|signer| signer.id()),
            channel: Some(channel.as_str()),
            ..Self::new(node, now, Verdict::Accepted)
        }
    }

    /// A message that `node` refused to open.
    pub fn refused(node: &Identity, now: Timestamp, error: &OpenError, channel: InboundQueue) -> Self {
        Self {
            from: error.claimed.clone(),
            channel: Some(channel.as_str()),
            step: Some(error.kind.as_str()),
            why: Some(error.why.to_string()),
            ..Self::new(node, now, Verdict::Refused)
        }
    }

    /// What `node` decided about what a message asks for.
    pub fn decided(node: &Identity, now: Timestamp, about: &DecisionSubject<'_>, decision: &Decision) -> Self {
        let verdict = if decision.allowed { Verdict::Allowed } else { Verdict::Denied };
        Self {
            kind: Some(about.kind.as_str()),
            from: Some(about.from.clone()),
            verified: about.id.is_some(),
            id: about.id,
            service: about.service.cloned(),
            on_behalf_of: about.on_behalf_of.cloned(),
            why: (!decision.allowed).then(|| decision.why.clone()),
            rule: decision.rule.clone(),
            ..Self::new(node, now, verdict)
        }
    }
}

/// What was decided about.
#[derive(Clone, Copy, Debug)]
pub struct DecisionSubject<'a> {
    /// The kind of message.
    pub kind: Kind,
    /// Who sent it.
    pub from: &'a Identity,
    /// Its id; none when it was not signed.
    pub id: Option<MessageId>,
    /// The service that it asks for.
    pub service: Option<&'a Service>,
    /// For whom it asks.
    pub on_behalf_of: Option<&'a Identity>,
}
