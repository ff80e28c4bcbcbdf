//! `nanite inspect`: what a captured message claims, and whether a node would accept it.
//!
//! Until a node has verified the message, its contents are only claims that anyone can make; they are marked as such, and escaped
//! before they are printed on a terminal.

mod report;

use std::path::{Path, PathBuf};

use super::error::{Exit, Result};
use super::runtime::Global;
use super::seal::read_message;
use super::{identity, output};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Kind, Role};
use crate::security::{Header, inspect};
use crate::serializer::{Audience, InboundQueue, MessageClass, OpenContext, OpenErrorKind, Serializer};
use report::{Claims, Opened, Report, Verdict};

/// Show what a captured message claims, whether this node would accept it, and at which step it would refuse it.
///
/// The message is DER, as the broker carries it. Without certificates only its unverified claims are shown. With `--certs` it goes
/// through the twelve steps of a running node, and its content is shown if it can be opened. This command has no memory of earlier
/// messages, so it cannot tell whether a running node has already received this one. A refused message is exit code 6.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file with the message; `-` or none: stdin.
    file: Option<PathBuf>,
    #[command(flatten)]
    who: identity::IdentityArgs,
    /// The kind of queue it was found in [default: the one where such a message belongs].
    #[arg(long, value_name = "QUEUE")]
    channel: Option<InboundQueue>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit> {
    let limit = Kind::ALL.into_iter().map(Kind::max_bytes).max().unwrap_or(0);
    let file = args.file.as_deref().filter(|path| *path != Path::new("-"));
    let help = "name its file: `nanite inspect FILE`, or pipe it to stdin";
    let bytes = read_message(file, limit, Exit::Usage, help)?;
    let mut report = Report { bytes: bytes.len(), ..Report::default() };
    let mut failure = None;
    match inspect(&bytes) {
        Err(error) => report.verdict = Some(Verdict::new(None, SystemClock.now(), Some(&error))),
        Ok(inspection) => {
            report.claims = Some(Claims::new(&inspection));
            if args.who.has_certs(&global.config) {
                let queue = args.channel.unwrap_or_else(|| expected_queue(&inspection.header));
                failure = open(global, args, &inspection.header, queue, &bytes, &mut report).err();
            }
        }
    }
    output::json_or(args.json, &report, Report::print)?;
    match (failure, &report.verdict) {
        (Some(failure), _) => Err(failure),
        (None, Some(verdict)) if !verdict.accepted => Ok(Exit::Security),
        (None, Some(_)) => Ok(Exit::Success),
        (None, None) => {
            global.note("nothing of this is verified: use `--certs DIR` to have it checked as a node would");
            Ok(Exit::Success)
        }
    }
}

/// Opens the message with the serializer of the node that reads from `queue`: now, and if only time is against it, at its issue time.
fn open(
    global: &Global,
    args: &Args,
    header: &Header,
    queue: InboundQueue,
    bytes: &[u8],
    report: &mut Report,
) -> Result<()> {
    let now = SystemClock.now();
    // As a node that was already running when the message was issued: one that started later refuses live messages.
    let node = args.who.secure(&global.config, queue.reader(), Some(now.min(header.issued_at)))?;
    if let Some(claims) = &mut report.claims {
        claims.name_keys(&node.store.certificates());
    }
    let open_at = |at: Timestamp| node.serializer.open(bytes, &OpenContext::new(queue, at));
    let verdict = |at, error| Verdict::new(Some((node.identity.clone(), queue)), at, error);
    let mut result = open_at(now);
    report.verdict = Some(verdict(now, result.as_ref().err()));
    if let Err(error) = &result
        && matches!(error.kind, OpenErrorKind::NotFresh | OpenErrorKind::UnknownSigner | OpenErrorKind::BadCertificate)
    {
        let earlier = open_at(header.issued_at);
        if earlier.as_ref().err() != Some(error) {
            report.at_issue = Some(verdict(header.issued_at, earlier.as_ref().err()));
            result = earlier;
        }
    }
    report.opened = result.ok().and_then(Opened::new);
    Ok(())
}

/// The kind of queue where a message with this header belongs.
fn expected_queue(header: &Header) -> InboundQueue {
    let to_agent = match &header.to {
        Audience::One(identity) => identity.role() == Role::Agent,
        Audience::Many(identities) => identities.first().is_none_or(|first| first.role() == Role::Agent),
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
