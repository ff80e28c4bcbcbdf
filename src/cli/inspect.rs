//! `nanite inspect`: what a captured message claims, and whether a node would accept it, as JSON and for people.
//!
//! Until a node has verified the message, its contents are only claims that anyone can make; they are marked as such, and escaped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use data_encoding::HEXLOWER;
use serde::Serialize;

use super::error::{CliError, Exit, Result};
use super::output::{counted, printable};
use super::runtime::Global;
use super::seal::{addressed_start, class_name, read_message};
use super::{node, output};
use crate::certs::{Certificate, KeyId, Suite};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Kind, MessageId, Packet, Role};
use crate::security::{Header, Inspection, inspect};
use crate::serializer::{
    Audience, Inbound, InboundQueue, MessageClass, OpenContext, OpenError, OpenErrorKind, Serializer,
};

/// How long before a message a process must have started to accept it without being named in it.
const START_MARGIN: Duration = Duration::from_secs(30);

#[derive(Default, Serialize)]
pub(super) struct Report {
    pub bytes: usize,
    /// None if the message cannot be parsed.
    pub claims: Option<Claims>,
    /// None if it can be parsed and there are no certificates to check it with.
    pub verdict: Option<Verdict>,
    /// The verdict at the time of issue, if it differs.
    pub at_issue: Option<Verdict>,
    pub opened: Option<Opened>,
}

/// What a message says about itself.
#[derive(Serialize)]
pub(super) struct Claims {
    /// Always false.
    verified: bool,
    from: Identity,
    to: Vec<String>,
    kind: &'static str,
    /// The processes that it is for, as far as its sender knew them.
    instances: Vec<u64>,
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

#[derive(Serialize)]
struct Key {
    key_id: String,
    suite: &'static str,
    /// Its owner, by the certificates of this node.
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<Identity>,
}

/// The decision of a node, or of any node if the message cannot be parsed.
#[derive(Serialize)]
pub(super) struct Verdict {
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<Identity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    channel: Option<&'static str>,
    at: String,
    pub accepted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<Refusal>,
}

#[derive(Serialize)]
struct Refusal {
    /// From 1 to 12.
    step: usize,
    kind: &'static str,
    why: String,
    remedy: &'static str,
}

/// The verified content.
#[derive(Serialize)]
pub(super) struct Opened {
    signer: Identity,
    /// The SHA-256 of the signer's certificate.
    certificate: String,
    packet: Packet,
}

impl Claims {
    pub(super) fn new(inspection: &Inspection) -> Self {
        let header = &inspection.header;
        Self {
            verified: false,
            from: header.from.clone(),
            to: match &header.to {
                Audience::One(identity) => vec![identity.to_string()],
                Audience::Many(identities) => identities.iter().map(Identity::to_string).collect(),
                Audience::Mappers => vec!["all mappers".to_owned()],
                Audience::Agents => vec!["all agents".to_owned()],
            },
            kind: header.kind.as_str(),
            instances: header.instances.clone(),
            id: header.id,
            instance: header.instance,
            sequence: header.sequence,
            issued_at: header.issued_at.to_string(),
            expires_at: header.expires_at.to_string(),
            class: class_name(header.class),
            in_reply_to: header.in_reply_to,
            codec: header.codec.clone(),
            encrypted: !inspection.recipients.is_empty(),
            signer: Key::new(&inspection.signer, inspection.suite),
            recipients: inspection.recipients.iter().map(|(key_id, suite)| Key::new(key_id, *suite)).collect(),
            certificates: inspection.certificates.iter().map(|der| describe_certificate(der)).collect(),
        }
    }

    /// Adds the owners of the keys with these certificates.
    pub(super) fn name_keys(&mut self, certificates: &[Arc<Certificate>]) {
        for key in std::iter::once(&mut self.signer).chain(&mut self.recipients) {
            let certificate = certificates.iter().find(|certificate| certificate.key_id().to_string() == key.key_id);
            key.of = certificate.map(|certificate| certificate.identity().clone());
        }
    }

    fn processes(&self) -> String {
        if self.instances.is_empty() {
            return "not named".to_owned();
        }
        self.instances.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
    }

    fn print(&self) -> Result<()> {
        let protection = if self.encrypted { "signed and encrypted" } else { "signed, not encrypted" };
        let mut fields = vec![
            ("from", self.from.to_string()),
            ("signed by", self.signer.describe()),
            ("to", self.to.join(", ")),
            ("processes", self.processes()),
            ("protection", protection.to_owned()),
            ("issued", self.issued_at.clone()),
            ("expires", format!("{} ({})", self.expires_at, self.class)),
            ("id", self.id.to_string()),
            ("answers", self.in_reply_to.map_or_else(|| "none".to_owned(), |id| id.to_string())),
            ("sender", format!("process {}, message {}", self.instance, self.sequence)),
            ("codec", self.codec.clone()),
        ];
        fields.extend(self.recipients.iter().map(|recipient| ("for the", recipient.describe())));
        fields.extend(self.certificates.iter().map(|certificate| ("carries", certificate.clone())));
        fields
            .iter()
            .try_for_each(|(label, value)| output::line(&format!("  {label:<10}  {}", printable(value, false))))
    }
}

impl Key {
    fn new(key_id: &KeyId, suite: Suite) -> Self {
        let suite = match suite {
            Suite::P256 => "P-256",
            Suite::Rsa => "RSA",
        };
        Self { key_id: key_id.to_string(), suite, of: None }
    }

    fn describe(&self) -> String {
        let owner = self.of.as_ref().map(|identity| format!(", known here as {identity}'s")).unwrap_or_default();
        format!("{} key {}{owner}", self.suite, self.key_id)
    }
}

/// A certificate that came with the message. It is not verified either.
fn describe_certificate(der: &[u8]) -> String {
    match Certificate::from_der(der) {
        Ok(certificate) => {
            let (identity, domain) = (certificate.identity(), certificate.domain());
            format!("{identity} of {domain}, {} to {}", certificate.not_before(), certificate.not_after())
        }
        Err(error) => format!("{} bytes, not the certificate of an agent or mapper: {error}", der.len()),
    }
}

impl Verdict {
    pub(super) fn new(reader: Option<(Identity, InboundQueue)>, at: Timestamp, error: Option<&OpenError>) -> Self {
        let (node, queue) = reader.unzip();
        Self {
            node,
            channel: queue.map(InboundQueue::as_str),
            at: at.to_string(),
            accepted: error.is_none(),
            refused: error.map(Refusal::new),
        }
    }

    fn print(&self) -> Result<()> {
        let paint = output::stdout_paint();
        let node = self.node.as_ref().map_or("every node", Identity::as_str);
        let queue = self.channel.map(|queue| format!(" in {queue}")).unwrap_or_default();
        let decision = if self.accepted { paint.green("ACCEPTED") } else { paint.red("REFUSED") };
        output::line(&format!("{decision} by {node}{queue}, at {}", self.at))?;
        for (step, kind) in (1..).zip(OpenErrorKind::ALL) {
            let state = match &self.refused {
                Some(refusal) if step == refusal.step => {
                    paint.red(&format!("REFUSED: {}", printable(&refusal.why, false)))
                }
                Some(refusal) if step > refusal.step => paint.dim("not reached"),
                _ => paint.green("passed"),
            };
            output::line(&format!("  {step:>2} {:<16}  {state}", kind.as_str()))?;
        }
        match &self.refused {
            Some(refusal) => output::line(&format!("  {} {}", paint.cyan("help:"), refusal.remedy)),
            None => Ok(()),
        }
    }
}

impl Refusal {
    fn new(error: &OpenError) -> Self {
        let step = OpenErrorKind::ALL.iter().position(|kind| *kind == error.kind).map_or(0, |index| index + 1);
        Self { step, kind: error.kind.as_str(), why: error.why.to_string(), remedy: remedy(error.kind) }
    }
}

fn remedy(kind: OpenErrorKind) -> &'static str {
    use OpenErrorKind as K;
    match kind {
        K::TooLarge => "send less: store large data elsewhere, and send a reference to it",
        K::Malformed => {
            "it was truncated or changed, or is not a secure message: capture it again, as raw bytes (not base64)"
        }
        K::Unsupported => "its sender runs another version, or is not nanite: there are two suites and one version",
        K::WrongDestination => {
            "check it as its recipient (`--token NAME`), or in its original queue (`--channel QUEUE`); on a running system, \
             someone has moved it"
        }
        K::NotFresh => {
            "compare the clocks of both machines; a late message waited too long in a queue: its sender must send it again"
        }
        K::UnknownSigner => {
            "put its sender's certificate into the certificate directory; after a renewal, the new one as well"
        }
        K::BadCertificate => "see what is wrong with `nanite certs verify`, and issue its sender a new certificate",
        K::BadSignature => "it was changed, or not created by its sender: do not trust the route it came by",
        K::Replayed => "it was opened before: the copy is harmless, and can be dropped",
        K::NotAuthorized => "its sender's role or the rules do not permit this: see `nanite policy explain`",
        K::CannotOpen => {
            "it was sealed to another key: its sender may know an older certificate of this node; give it the current one"
        }
        K::BadBody => "its sender is faulty, or runs another version: the signed body does not match its header",
    }
}

impl Opened {
    /// None if the message is not signed.
    pub(super) fn new(inbound: Inbound) -> Option<Self> {
        let verified = inbound.signer()?;
        let (signer, certificate) = (verified.signer().clone(), HEXLOWER.encode(verified.certificate()));
        Some(Self { signer, certificate, packet: inbound.packet })
    }

    fn print(&self) -> Result<()> {
        let signer = output::stdout_paint().bold(&format!("signed by {}, VERIFIED", self.signer));
        output::line(&format!("{signer} (certificate {})", self.certificate))?;
        let packet = serde_json::to_string_pretty(&self.packet).map_err(|error| CliError::of(Exit::Failure, &error))?;
        output::line(&printable(&packet, true))
    }
}

impl Report {
    pub(super) fn print(&self) -> Result<()> {
        let paint = output::stdout_paint();
        let length = counted(self.bytes, "byte");
        match &self.claims {
            Some(claims) => {
                let title = paint.bold(&format!("{}, {length}", claims.kind));
                output::line(&format!("{title}: {}", paint.yellow("what it claims, NOT VERIFIED:")))?;
                claims.print()?;
            }
            None => output::line(&paint.bold(&format!("{length}, cannot be parsed")))?,
        }
        for verdict in self.verdict.iter().chain(&self.at_issue) {
            output::line("")?;
            verdict.print()?;
        }
        if let Some(opened) = &self.opened {
            output::line("")?;
            opened.print()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u04_every_step_has_its_number_and_remedy() {
        for (step, kind) in (1..).zip(OpenErrorKind::ALL) {
            let refusal = Refusal::new(&OpenError::new(kind, "why"));
            assert_eq!((refusal.step, refusal.kind), (step, kind.as_str()));
            assert!(refusal.remedy.len() > 20, "{kind}");
        }
    }
}

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
    who: node::IdentityArgs,
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
    // As the process that the message names, or one that has run long enough: one that has just started refuses live messages.
    let started_at = addressed_start(header).unwrap_or_else(|| now.min(header.issued_at).saturating_sub(START_MARGIN));
    let node = args.who.secure(&global.config, queue.reader(), Some(started_at))?;
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
