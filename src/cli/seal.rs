//! `nanite seal` and `nanite open`: create and read single messages without a broker.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::Path;
use std::time::Duration;

use data_encoding::HEXLOWER;
use serde::Serialize;

use super::args::agent;
use super::error::{CliError, Exit, Result};
use super::runtime::Global;
use super::{args, node, output, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, MessageId, Packet, Request, Role, Service, Token};
use crate::security::{Header, inspect};
use crate::serializer::{
    Audience, InboundQueue, MessageClass, OpenContext, SealError, SealRequest, Serializer, Verified,
};

/// How long before the start of this process a message may have been issued. A running node refuses live messages from before its
/// start, because it cannot know whether they were opened before; here the message's own lifetime is enough.
const MAX_AGE_AT_START: Duration = Duration::from_secs(3600);

/// Seal one request to an agent, as a mapper would: CMS in DER on stdout.
///
/// The message is valid for 60 seconds. `nanite open` reads it, and so does any CMS tool.
#[derive(Debug, clap::Args)]
pub(super) struct Seal {
    /// The service, such as /simple/echo.
    service: Service,
    /// The payload: JSON if it parses, else text; `-` reads it from stdin [default: null].
    #[arg(allow_hyphen_values = true)]
    payload: Option<String>,
    /// The recipient: an agent's name, or nanite-NAME.
    #[arg(long, value_name = "AGENT", value_parser = agent)]
    to: Identity,
    #[command(flatten)]
    who: node::IdentityArgs,
}

/// Open one message that was sealed to an agent: DER on stdin; the packet and its signer as JSON on stdout.
///
/// It is refused for the same reasons as by a running agent, except that this command remembers nothing: it opens a message
/// repeatedly while it is valid. A refused message is exit code 6, with `refused: KIND: why` on stderr.
#[derive(Debug, clap::Args)]
pub(super) struct Open {
    #[command(flatten)]
    who: node::IdentityArgs,
}

#[derive(Serialize)]
struct Opened<'a> {
    packet: &'a Packet,
    signer: Signer<'a>,
}

#[derive(Serialize)]
struct Signer<'a> {
    identity: &'a Identity,
    /// The SHA-256 of the certificate.
    certificate: String,
    instance: u64,
    sequence: u64,
    id: MessageId,
    issued_at: String,
    expires_at: String,
    class: &'static str,
    in_reply_to: Option<MessageId>,
}

pub(super) fn seal(global: &Global, args: &Seal) -> Result<Exit> {
    if std::io::stdout().is_terminal() {
        return Err(CliError::new(Exit::Usage, "a sealed message is binary, and stdout is a terminal")
            .help("write it to a file: `nanite seal ... > message.der`, or pipe it to `nanite open`"));
    }
    let secure = args.who.secure(&global.config, Role::Mapper, None)?;
    let mut request =
        Request::new(args.service.resolved(), args::payload(args.payload.as_deref(), |text| global.note(text))?);
    request.from = Some(secure.identity);
    request.token = Some(Token::random().map_err(|error| remedy::seal(&SealError::Random(error)))?);
    let audience = Audience::One(args.to.clone());
    let context = SealRequest::new(&audience, SystemClock.now());
    let sealed = secure.serializer.seal(&Packet::Request(request), &context).map_err(|error| remedy::seal(&error))?;
    output::write(&sealed.bytes)?;
    global.note(&format!("sealed to {}, valid until {}", args.to, sealed.expires_at));
    Ok(Exit::Success)
}

pub(super) fn open(global: &Global, args: &Open) -> Result<Exit> {
    let limit = InboundQueue::AgentInbox.max_bytes();
    let bytes = read_message(None, limit, Exit::Failure, "redirect it to stdin: `nanite open ... < message.der`")?;
    // As the process that the message names, if it names one.
    let named = inspect(&bytes).ok().and_then(|inspection| addressed_start(&inspection.header));
    let started_at = named.unwrap_or_else(|| SystemClock.now().saturating_sub(MAX_AGE_AT_START));
    let secure = args.who.secure(&global.config, Role::Agent, Some(started_at))?;
    match secure.serializer.open(&bytes, &OpenContext::new(InboundQueue::AgentInbox, SystemClock.now())) {
        Ok(inbound) => {
            let unsigned = || CliError::new(Exit::Security, "the message is not signed");
            let signer = inbound.signer().map(Signer::new).ok_or_else(unsigned)?;
            output::json(&Opened { packet: &inbound.packet, signer })?;
            Ok(Exit::Success)
        }
        Err(error) => {
            output::note(&format!("refused: {error}"));
            Ok(Exit::Security)
        }
    }
}

impl<'a> Signer<'a> {
    fn new(verified: &'a Verified) -> Self {
        Self {
            identity: verified.signer(),
            certificate: HEXLOWER.encode(verified.certificate()),
            instance: verified.instance(),
            sequence: verified.sequence(),
            id: verified.id(),
            issued_at: verified.issued_at().to_string(),
            expires_at: verified.expires_at().to_string(),
            class: class_name(verified.class()),
            in_reply_to: verified.in_reply_to(),
        }
    }
}

/// When a process that the message names started.
pub(super) fn addressed_start(header: &Header) -> Option<Timestamp> {
    header.instances.first().copied().map(Timestamp::from_micros)
}

/// The class of a message as JSON output names it.
pub(super) fn class_name(class: MessageClass) -> &'static str {
    match class {
        MessageClass::Live => "live",
        MessageClass::Stored => "stored",
    }
}

/// Reads a message from a file or stdin: at most one byte more than `limit`, so that a longer message is refused as such.
pub(super) fn read_message(file: Option<&Path>, limit: usize, failure: Exit, help: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = limit as u64 + 1;
    let (read, source) = match file {
        Some(path) => {
            let read = File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
            (read, path.display().to_string())
        }
        None => {
            let stdin = std::io::stdin().lock();
            if stdin.is_terminal() {
                let message = "a sealed message is binary, and stdin is a terminal";
                return Err(CliError::new(Exit::Usage, message).help(help));
            }
            (stdin.take(limit).read_to_end(&mut bytes), "stdin".to_owned())
        }
    };
    read.map_err(|error| CliError::of(failure, &error).context(format!("cannot read {source}")))?;
    Ok(bytes)
}
