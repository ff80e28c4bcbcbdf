//! `nanite inspect`: what a captured message says of itself, and whether a node would take it.
//!
//! What is shown before a node has checked the message is what the message says, and anybody can write a message that says anything;
//! it is marked so. What strangers wrote is escaped before it comes to a terminal.

mod show;
mod verdict;

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Serialize;

use super::error::{CliError, Exit};
use super::{Global, identity, output};
use crate::certs::{Certificate, Suite};
use crate::packet::{Identity, Kind, MessageId, Packet};
use crate::security::{Header, Inspection, inspect};
use crate::serializer::{Audience, InboundQueue, MessageClass, OpenErrorKind};

/// Show what a captured message says, whether this node would take it, and at which step it would not.
///
/// The message is DER, as the broker carries it. Without certificates only what it says of itself is shown, which is not verified.
/// With `--certs` it goes through the twelve steps of opening as in a running node, and its content is shown where it opens. This
/// command remembers nothing: that a running node has seen the message before is not known here. A message that is refused is
/// exit code 6.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file with the message; `-` or none: stdin.
    file: Option<PathBuf>,
    #[command(flatten)]
    who: identity::IdentityArgs,
    /// The kind of queue it was found in [default: the one where such a message belongs].
    #[arg(long, value_name = "QUEUE")]
    channel: Option<Queue>,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

/// The kinds of queue.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Queue {
    AgentInbox,
    AgentControl,
    MapperInbox,
    Presence,
    Requests,
    Offline,
}

impl From<Queue> for InboundQueue {
    fn from(queue: Queue) -> InboundQueue {
        match queue {
            Queue::AgentInbox => InboundQueue::AgentInbox,
            Queue::AgentControl => InboundQueue::AgentControl,
            Queue::MapperInbox => InboundQueue::MapperInbox,
            Queue::Presence => InboundQueue::Presence,
            Queue::Requests => InboundQueue::Requests,
            Queue::Offline => InboundQueue::Offline,
        }
    }
}

/// All that is found out about a message.
#[derive(Serialize)]
struct Report {
    bytes: usize,
    /// None when it cannot be read.
    claims: Option<Claims>,
    /// None when no node was there to judge, and it can be read.
    verdict: Option<Verdict>,
    /// What a node would have said when the message was made, where that is another thing than it says now.
    at_issue: Option<Verdict>,
    /// What is in it, where it opens.
    opened: Option<Opened>,
}

/// What a message says of itself.
#[derive(Serialize)]
struct Claims {
    /// Always false: nothing here is checked.
    verified: bool,
    from: Identity,
    to: Vec<String>,
    kind: &'static str,
    id: MessageId,
    instance: u64,
    sequence: u64,
    issued_at: String,
    expires_at: String,
    class: &'static str,
    in_reply_to: Option<MessageId>,
    codec: String,
    encrypted: bool,
    signer: Key,
    recipients: Vec<Key>,
    certificates: Vec<String>,
}

/// A key that a message names.
#[derive(Serialize)]
struct Key {
    key_id: String,
    suite: &'static str,
    /// Whose it is, by the certificates of this node.
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<Identity>,
}

/// What a node says of a message.
#[derive(Serialize)]
struct Verdict {
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<Identity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    channel: Option<&'static str>,
    at: String,
    accepted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<Refused>,
}

/// Where opening ends.
#[derive(Serialize)]
struct Refused {
    /// From 1 to 12.
    step: usize,
    kind: &'static str,
    why: String,
    remedy: &'static str,
}

/// What is in a message, and who has signed it: verified.
#[derive(Serialize)]
struct Opened {
    signer: Identity,
    /// The SHA-256 of the signer's certificate.
    certificate: String,
    packet: Packet,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let bytes = read(args.file.as_deref())?;
    let mut report = Report { bytes: bytes.len(), claims: None, verdict: None, at_issue: None, opened: None };
    let mut failure = None;
    match inspect(&bytes) {
        Err(error) => report.verdict = Some(verdict::unreadable(&error)),
        Ok(inspection) => {
            let mut claims = claims(&inspection);
            if args.who.has_certs(&global.config) {
                let channel = args.channel.map_or_else(|| usual_channel(&inspection.header), InboundQueue::from);
                match verdict::judge(global, &args.who, &inspection.header, channel, &bytes) {
                    Ok(judged) => {
                        name_keys(&mut claims, &judged.known);
                        (report.verdict, report.at_issue) = (Some(judged.verdict), judged.at_issue);
                        report.opened = judged.opened;
                    }
                    Err(error) => failure = Some(error),
                }
            }
            report.claims = Some(claims);
        }
    }
    if args.json {
        output::json(&report)?;
    } else {
        show::print(&report)?;
    }
    match (failure, &report.verdict) {
        (Some(failure), _) => Err(failure),
        (None, Some(verdict)) if !verdict.accepted => Ok(Exit::Security),
        (None, Some(_)) => Ok(Exit::Success),
        (None, None) => {
            global.note("nothing of this is verified: give `--certs DIR` to have a node check it");
            Ok(Exit::Success)
        }
    }
}

/// The bytes of a message, and at most one more than any message has.
fn read(file: Option<&Path>) -> Result<Vec<u8>, CliError> {
    let limit = Kind::ALL.into_iter().map(Kind::max_bytes).max().unwrap_or(0) as u64 + 1;
    let mut bytes = Vec::new();
    let (read, place) = match file.filter(|path| *path != Path::new("-")) {
        Some(path) => {
            let read = File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
            (read, path.display().to_string())
        }
        None => {
            let stdin = std::io::stdin().lock();
            if stdin.is_terminal() {
                return Err(CliError::new(Exit::Usage, "a sealed message is binary, and stdin is a terminal")
                    .help("name its file: `nanite inspect FILE`, or give it on stdin"));
            }
            (stdin.take(limit).read_to_end(&mut bytes), "stdin".to_owned())
        }
    };
    read.map_err(|error| CliError::of(Exit::Usage, &error).context(format!("cannot read {place}")))?;
    Ok(bytes)
}

fn claims(inspection: &Inspection) -> Claims {
    let header = &inspection.header;
    let to = match &header.to {
        Audience::One(identity) => vec![identity.to_string()],
        Audience::Many(identities) => identities.iter().map(Identity::to_string).collect(),
        Audience::Mappers => vec!["all mappers".to_owned()],
        Audience::Agents => vec!["all agents".to_owned()],
    };
    let key = |(key_id, suite): (&crate::certs::KeyId, Suite)| Key {
        key_id: key_id.to_string(),
        suite: suite_name(suite),
        of: None,
    };
    Claims {
        verified: false,
        from: header.from.clone(),
        to,
        kind: header.kind.as_str(),
        id: header.id,
        instance: header.instance,
        sequence: header.sequence,
        issued_at: header.issued_at.to_string(),
        expires_at: header.expires_at.to_string(),
        class: match header.class {
            MessageClass::Live => "live",
            MessageClass::Stored => "stored",
        },
        in_reply_to: header.in_reply_to,
        codec: header.codec.clone(),
        encrypted: !inspection.recipients.is_empty(),
        signer: key((&inspection.signer, inspection.suite)),
        recipients: inspection.recipients.iter().map(|(key_id, suite)| key((key_id, *suite))).collect(),
        certificates: inspection.certificates.iter().map(|der| certificate(der)).collect(),
    }
}

fn suite_name(suite: Suite) -> &'static str {
    match suite {
        Suite::P256 => "P-256",
        Suite::Rsa => "RSA",
    }
}

/// A certificate that came along, in a few words. It says what it says: nobody has checked it.
fn certificate(der: &[u8]) -> String {
    match Certificate::from_der(der) {
        Ok(certificate) => format!(
            "{} of {}, {} to {}",
            certificate.identity(),
            certificate.domain(),
            certificate.not_before(),
            certificate.not_after()
        ),
        Err(error) => format!("{} bytes, not of an agent or mapper: {error}", der.len()),
    }
}

/// Says whose the keys are, where the node's directory knows.
fn name_keys(claims: &mut Claims, known: &[(String, Identity)]) {
    for key in std::iter::once(&mut claims.signer).chain(&mut claims.recipients) {
        key.of = known.iter().find(|(key_id, _)| *key_id == key.key_id).map(|(_, identity)| identity.clone());
    }
}

/// The kind of queue where a message of this header belongs.
fn usual_channel(header: &Header) -> InboundQueue {
    let to_agent = match &header.to {
        Audience::One(identity) => identity.role() == crate::packet::Role::Agent,
        Audience::Many(identities) => identities.first().is_none_or(|first| first.role() == crate::packet::Role::Agent),
        Audience::Mappers => false,
        Audience::Agents => true,
    };
    match (header.kind, to_agent) {
        (Kind::Register | Kind::Unregister | Kind::Ping, _) => InboundQueue::Presence,
        (Kind::Request | Kind::Push, true) => InboundQueue::AgentInbox,
        (Kind::Request | Kind::Push, false) if header.class == MessageClass::Stored => InboundQueue::Offline,
        (Kind::Request | Kind::Push, false) => InboundQueue::Requests,
        (Kind::Outcome | Kind::Intermediate, false) => InboundQueue::MapperInbox,
        _ => InboundQueue::AgentControl,
    }
}

/// The number of a step, from 1 to 12.
fn step(kind: OpenErrorKind) -> usize {
    OpenErrorKind::ALL.iter().position(|other| *other == kind).map_or(0, |at| at + 1)
}
