//! `nanite seal` and `nanite open`: one message made and read by hand, without a broker.

use std::io::{IsTerminal, Read};
use std::time::Duration;

use serde::Serialize;

use super::args::agent;
use super::error::{CliError, Exit};
use super::{Global, args, identity, output, remedy};
use crate::clock::{Clock, SystemClock};
use crate::packet::{Identity, MessageId, Packet, Request, Role, Service, Token};
use crate::serializer::{
    Audience, InboundQueue, MessageClass, OpenContext, SealError, SealRequest, Serializer, Verified,
};

/// How long before this process a message may have been made: live ones are refused by processes that started later, since these
/// cannot know whether they have been opened before. One that is given by hand is meant to be opened; its lifetime still counts.
const BEFORE_START: Duration = Duration::from_secs(3600);

/// Seal one request for an agent, as a mapper would: CMS in DER on stdout.
///
/// The message is valid for 60 seconds. `nanite open` reads it, and so does any CMS tool.
#[derive(Debug, clap::Args)]
pub(super) struct Seal {
    /// The service, such as /simple/echo.
    service: Service,
    /// What it works on: JSON where it parses, else text; `-` reads it from stdin; null when there is none.
    #[arg(allow_hyphen_values = true)]
    payload: Option<String>,
    /// The agent that can open it: its name, or nanite-NAME.
    #[arg(long, value_name = "AGENT", value_parser = agent)]
    to: Identity,
    #[command(flatten)]
    who: identity::IdentityArgs,
}

/// Open one message that was sealed for an agent: DER on stdin; the packet and its signer as JSON on stdout.
///
/// It is refused for the same reasons as by a running agent, except that this command remembers nothing: it opens a message
/// again and again while it is valid. A refused one is exit code 6, with `refused: KIND: why` on stderr.
#[derive(Debug, clap::Args)]
pub(super) struct Open {
    #[command(flatten)]
    who: identity::IdentityArgs,
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

/// Makes a message.
pub(super) fn seal(global: &Global, args: &Seal) -> Result<Exit, CliError> {
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
    let how = SealRequest::new(&audience, SystemClock.now());
    let sealed = secure.serializer.seal(&Packet::Request(request), &how).map_err(|error| remedy::seal(&error))?;
    output::write(&sealed.bytes)?;
    global.note(&format!("sealed for {}, valid until {}", args.to, sealed.expires_at));
    Ok(Exit::Success)
}

/// Reads a message.
pub(super) fn open(global: &Global, args: &Open) -> Result<Exit, CliError> {
    let stdin = std::io::stdin().lock();
    if stdin.is_terminal() {
        return Err(CliError::new(Exit::Usage, "a sealed message is binary, and stdin is a terminal")
            .help("give it on stdin: `nanite open ... < message.der`"));
    }
    let now = SystemClock.now();
    let secure = args.who.secure(&global.config, Role::Agent, Some(now.saturating_sub(BEFORE_START)))?;
    let mut bytes = Vec::new();
    // One byte more than is accepted: a message that is too long is refused as such.
    let limit = InboundQueue::AgentInbox.max_bytes() as u64 + 1;
    stdin
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(|error| CliError::of(Exit::Failure, &error).context("cannot read stdin"))?;
    let inbound = match secure.serializer.open(&bytes, &OpenContext::new(InboundQueue::AgentInbox, SystemClock.now())) {
        Ok(inbound) => inbound,
        Err(error) => {
            output::note(&format!("refused: {error}"));
            return Ok(Exit::Security);
        }
    };
    let signer = inbound.signer().map(signer).ok_or_else(|| CliError::new(Exit::Security, "nobody has signed it"))?;
    output::json(&Opened { packet: &inbound.packet, signer })?;
    Ok(Exit::Success)
}

fn signer(verified: &Verified) -> Signer<'_> {
    Signer {
        identity: verified.signer(),
        certificate: verified.certificate().iter().map(|byte| format!("{byte:02x}")).collect(),
        instance: verified.instance(),
        sequence: verified.sequence(),
        id: verified.id(),
        issued_at: verified.issued_at().to_string(),
        expires_at: verified.expires_at().to_string(),
        class: match verified.class() {
            MessageClass::Live => "live",
            MessageClass::Stored => "stored",
        },
        in_reply_to: verified.in_reply_to(),
    }
}
