//! Messages that nobody with the right key has made for that queue: each is put there, and each has to be refused.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::facts::Refusal;
use super::stopped;
use super::world::{Pki, SHOUT, TEXT, Worker, World, service};
use crate::cli::error::{CliError, Exit};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Payload, Request};
use crate::security::CONTENT_TYPE;
use crate::serializer::{Audience, Codec, Json, OpenErrorKind, PlainSerializer, SealRequest, Serializer};
use crate::transport::{Destination, MemoryTransport, PublishRequest, PublishedMessage, Transport, topology};

/// How long an agent may take to refuse a message.
const PATIENCE: Duration = Duration::from_secs(5);
/// How old an old message is: older than any live message may be.
const OLD: Duration = Duration::from_secs(120);

/// A message, where it is put, and what has to become of it.
struct Attack<'a> {
    name: &'static str,
    how: &'static str,
    at: &'a Worker,
    content_type: &'static str,
    bytes: Arc<[u8]>,
    expected: OpenErrorKind,
}

/// Puts each message into a queue, as anybody who reaches the broker could, and looks at what the agent does.
pub(super) async fn play(pki: &Pki, world: &World, passed: &[PublishedMessage]) -> Result<Vec<Refusal>, CliError> {
    let outside = world.broker.connect();
    let mut refusals = Vec::new();
    for attack in attacks(pki, world, passed)? {
        refusals.push(carry_out(&outside, attack).await?);
    }
    Ok(refusals)
}

fn attacks<'a>(pki: &Pki, world: &'a World, passed: &[PublishedMessage]) -> Result<Vec<Attack<'a>>, CliError> {
    use OpenErrorKind::*;
    let (ada, bob, now) = (&world.ada, &world.bob, SystemClock.now());
    let tower = pki.serializer(&pki.tower)?;
    let stranger = pki.stranger(pki.tower.certificate().identity())?;
    let other_agent = pki.serializer(&pki.bob)?;
    let good = captured(passed, &ada.identity)?;

    let mut changed = order(tower.as_ref(), ada, now)?;
    // The ciphertext is more than half of this message, so its middle is in it.
    let middle = changed.len() / 2;
    if let Some(byte) = changed.get_mut(middle) {
        *byte ^= 1;
    }
    let forged = order(stranger.as_ref(), ada, now)?;
    let of_agent = order(other_agent.as_ref(), ada, now)?;
    let old = order(tower.as_ref(), ada, now.saturating_sub(OLD))?;
    let plain = order(&PlainSerializer::json(tower.identity().clone()), ada, now)?;
    let mut noise = vec![0; 700];
    openssl::rand::rand_bytes(&mut noise).map_err(stopped("cannot make random bytes"))?;

    let put = |name, how, at, bytes, expected| Attack { name, how, at, content_type: CONTENT_TYPE, bytes, expected };
    let mut all = vec![
        put("forged", "in the mapper's name, by a stranger's key", ada, forged.into(), UnknownSigner),
        put("changed", "a good message with one bit flipped", ada, changed.into(), BadSignature),
        put("replayed", "a good message, a second time", ada, good.clone(), Replayed),
        put("re-targeted", "a good message for ada, given to bob", bob, good, WrongDestination),
        put("wrong role", "bob's own certificate, an order to ada", ada, of_agent.into(), NotAuthorized),
        put("old", "a good message, two minutes late", ada, old.into(), NotFresh),
        put("noise", "700 random bytes", ada, noise.into(), Malformed),
        put("downgraded", "a plain request, with no signature", ada, plain.into(), Unsupported),
    ];
    if let Some(downgraded) = all.last_mut() {
        downgraded.content_type = Json.content_type();
    }
    Ok(all)
}

/// A request for `to` that this serializer seals at this moment; its payload is long.
fn order(by: &dyn Serializer, to: &Worker, at: Timestamp) -> Result<Vec<u8>, CliError> {
    let request = Request::new(service(SHOUT)?, Payload::from(TEXT.repeat(200).as_str()));
    let audience = Audience::One(to.identity.clone());
    let sealed = by.seal(&request.into(), &SealRequest::new(&audience, at));
    Ok(sealed.map_err(stopped("cannot seal a message"))?.bytes)
}

/// A request that has gone to this agent.
fn captured(passed: &[PublishedMessage], to: &Identity) -> Result<Arc<[u8]>, CliError> {
    let queue = Destination::Queue(topology::agent_inbox_name(to.as_str()));
    let message = passed.iter().find(|message| message.destination == queue);
    let none = || CliError::new(Exit::Failure, format!("no message went to {to}"));
    Ok(message.ok_or_else(none)?.body.clone())
}

/// Publishes the message into the agent's own queue and waits for what becomes of it: a refusal, or work.
async fn carry_out(outside: &MemoryTransport, attack: Attack<'_>) -> Result<Refusal, CliError> {
    let Attack { name, how, at, content_type, bytes, expected } = attack;
    let (before, ran) = (at.handle.refusals(), at.ran());
    let message = PublishRequest {
        destination: Destination::Queue(topology::agent_inbox_name(at.identity.as_str())),
        body: bytes,
        content_type: content_type.to_owned(),
        message_id: name.to_owned(),
        expires_in: None,
        persistent: false,
    };
    outside.publish(message, PATIENCE).await.map_err(stopped("cannot publish"))?;
    let until = Instant::now() + PATIENCE;
    let refused = loop {
        let now = at.handle.refusals();
        let grown = now.iter().zip(&before).find(|(now, before)| now.1 > before.1);
        if let Some(((kind, _), _)) = grown {
            break Some(*kind);
        }
        if at.ran() > ran || Instant::now() > until {
            break None;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let handler_ran = at.ran() > ran;
    Ok(Refusal { attack: name, how, at: at.identity.clone(), expected: Some(expected), refused, handler_ran })
}
