//! A broker that is hostile: it stands between real nodes and the broker in memory, and does to their messages what it likes. Beside
//! it, what each node has sealed and opened, so that nothing forged goes unnoticed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use nanite::packet::{Identity, Packet};
use nanite::security::SecureSerializer;
use nanite::serializer::{
    Inbound, InboundQueue, OpenContext, OpenError, OpenErrorKind, SealError, SealRequest, Sealed, Serializer,
    Verification,
};
use nanite::transport::{
    Consumer, Destination, Exchange, MemoryBroker, MemoryTransport, PublishRequest, Queue, Transport, TransportError,
};
use openssl::sha::sha256;
use tokio::sync::Notify;

/// How many captured messages are held; a newer one takes the place of any.
const CAPTURED: usize = 4096;
/// How many messages wait in all queues at most: the attack is as fast as the nodes are.
const WAITING: usize = 1000;
/// How many attacks there are on each message that the nodes send.
const EACH: u64 = 40;
/// After how many attacks a connection is cut.
const CUT_AFTER: u64 = 4000;

/// Numbers that look random, from a seed (splitmix64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        if of.is_empty() { None } else { of.get(self.below(of.len())) }
    }
}

/// What is done to a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deed {
    /// Handed on.
    Kept,
    /// Given to nobody.
    Dropped,
    /// Held back until others have overtaken it.
    Late,
    /// Given twice.
    Twice,
    /// Given again, any time later.
    Again,
    /// Given to another queue than it was sent to.
    Elsewhere,
    /// With one bit changed.
    Bit,
    /// With one bit changed, and to another queue.
    BitElsewhere,
    /// Without its end.
    Cut,
}

/// The broker.
pub struct HostileBroker {
    broker: MemoryBroker,
    own: MemoryTransport,
    state: Mutex<State>,
    more: Notify,
}

struct State {
    random: Random,
    is_hostile: bool,
    captured: Vec<PublishRequest>,
    late: Vec<PublishRequest>,
    /// Queues that somebody reads, with the exchanges they are bound to.
    queues: BTreeMap<String, Vec<Exchange>>,
    wires: Vec<Arc<Wire>>,
    /// How many attacks may still be made.
    credit: u64,
    deeds: BTreeMap<Deed, u64>,
    cuts: u64,
}

impl fmt::Debug for HostileBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("HostileBroker").field("deeds", &state.deeds).field("cuts", &state.cuts).finish_non_exhaustive()
    }
}

impl HostileBroker {
    /// One that is honest until it is let loose.
    pub fn new(seed: u64) -> Arc<Self> {
        let broker = MemoryBroker::new();
        let state = State {
            random: Random::new(seed),
            is_hostile: false,
            captured: Vec::new(),
            late: Vec::new(),
            queues: BTreeMap::new(),
            wires: Vec::new(),
            credit: 0,
            deeds: BTreeMap::new(),
            cuts: 0,
        };
        Arc::new(Self { own: broker.connect(), broker, state: Mutex::new(state), more: Notify::new() })
    }

    /// A connection for one process.
    pub fn connect(self: &Arc<Self>) -> Arc<Wire> {
        let inner = self.broker.connect();
        let wire = Arc::new(Wire { inner, broker: self.clone(), delivered: Arc::default(), queues: Mutex::default() });
        self.state().wires.push(wire.clone());
        wire
    }

    /// From now on it is hostile, or honest. What was held back is gone then.
    pub fn let_loose(&self, hostile: bool) {
        let mut state = self.state();
        state.is_hostile = hostile;
        let late = state.late.drain(..).count() as u64;
        *state.deeds.entry(Deed::Dropped).or_default() += late;
    }

    /// How many messages were handed to the processes.
    pub fn delivered(&self) -> u64 {
        self.state().wires.iter().map(|wire| wire.delivered()).sum()
    }

    /// How often it has done what.
    pub fn deeds(&self) -> (BTreeMap<Deed, u64>, u64) {
        let state = self.state();
        (state.deeds.clone(), state.cuts)
    }

    /// Attacks until so many messages have been handed to the processes.
    pub async fn storm(&self, messages: u64) {
        let mut attacks = 0_u64;
        while self.delivered() < messages {
            if attacks.is_multiple_of(100) {
                while self.waiting() > WAITING {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            match self.attack() {
                Some(message) => {
                    // The queue may just have gone with its process.
                    let _ = self.own.publish(message, Duration::from_secs(10)).await;
                    attacks += 1;
                    if attacks.is_multiple_of(CUT_AFTER) {
                        self.cut_one();
                    }
                }
                None => self.more.notified().await,
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn waiting(&self) -> usize {
        let queues: Vec<String> = self.state().queues.keys().cloned().collect();
        queues.iter().map(|queue| self.broker.waiting(queue).len()).sum()
    }

    fn cut_one(&self) {
        let mut state = self.state();
        state.cuts += 1;
        let wires: Vec<Arc<Wire>> = state.wires.iter().filter(|wire| wire.is_used()).cloned().collect();
        let wire = state.random.one(&wires).cloned();
        drop(state);
        if let Some(wire) = wire {
            wire.inner.cut();
            wire.inner.restore();
        }
    }

    /// One attack with a message that was captured; none when there is nothing to do.
    fn attack(&self) -> Option<PublishRequest> {
        let mut state = self.state();
        state.credit = state.credit.checked_sub(1)?;
        if state.random.below(20) == 0 && !state.late.is_empty() {
            let State { random, late, .. } = &mut *state;
            return Some(late.swap_remove(random.below(late.len())));
        }
        let mut message = {
            let State { random, captured, .. } = &mut *state;
            random.one(captured)?.clone()
        };
        let deed = match state.random.below(100) {
            0..25 => Deed::Again,
            25..40 => Deed::Elsewhere,
            40..75 => Deed::Bit,
            75..85 => Deed::BitElsewhere,
            _ => Deed::Cut,
        };
        state.alter(deed, &mut message);
        let queue = match deed {
            Deed::Elsewhere | Deed::BitElsewhere => state.other_queue(&message.destination),
            _ => state.right_queue(&message.destination),
        };
        message.destination = Destination::Queue(queue?);
        state.note(deed);
        Some(message)
    }

    /// What becomes of a message that a node sends.
    fn intercept(&self, message: &PublishRequest) -> Vec<PublishRequest> {
        let mut state = self.state();
        if !state.is_hostile {
            return vec![message.clone()];
        }
        state.credit += EACH;
        self.more.notify_one();
        if state.captured.len() < CAPTURED {
            state.captured.push(message.clone());
        } else {
            let at = state.random.below(CAPTURED);
            state.captured[at] = message.clone();
        }
        let deed = match state.random.below(100) {
            0..2 => Deed::Dropped,
            2..6 => Deed::Late,
            6..12 => Deed::Twice,
            12..13 => Deed::Bit,
            13..14 => Deed::Cut,
            14..15 => Deed::Elsewhere,
            _ => Deed::Kept,
        };
        state.note(deed);
        let mut changed = message.clone();
        state.alter(deed, &mut changed);
        match deed {
            Deed::Dropped => Vec::new(),
            Deed::Late => {
                state.late.push(changed);
                Vec::new()
            }
            Deed::Twice => vec![changed.clone(), changed],
            Deed::Elsewhere => match state.other_queue(&message.destination) {
                Some(queue) => vec![PublishRequest { destination: Destination::Queue(queue), ..changed }],
                None => Vec::new(),
            },
            _ => vec![changed],
        }
    }
}

impl State {
    fn note(&mut self, deed: Deed) {
        *self.deeds.entry(deed).or_default() += 1;
    }

    fn alter(&mut self, deed: Deed, message: &mut PublishRequest) {
        let mut body = message.body.to_vec();
        match deed {
            Deed::Bit | Deed::BitElsewhere => {
                let bit = self.random.below(body.len() * 8);
                body[bit / 8] ^= 1 << (bit % 8);
            }
            Deed::Cut => body.truncate(self.random.below(body.len())),
            _ => return,
        }
        message.body = body.into();
    }

    fn is_right(destination: &Destination, queue: &str, bindings: &[Exchange]) -> bool {
        match destination {
            Destination::Queue(name) => name == queue,
            Destination::Exchange(exchange) => bindings.contains(exchange),
        }
    }

    /// A queue that is read, and that the message was sent to.
    fn right_queue(&mut self, destination: &Destination) -> Option<String> {
        let right = self.queues.iter().filter(|(queue, bindings)| Self::is_right(destination, queue, bindings));
        let right: Vec<String> = right.map(|(queue, _)| queue.clone()).collect();
        self.random.one(&right).cloned()
    }

    /// A queue that is read, and that the message was not sent to.
    fn other_queue(&mut self, destination: &Destination) -> Option<String> {
        let other = self.queues.iter().filter(|(queue, bindings)| !Self::is_right(destination, queue, bindings));
        let other: Vec<String> = other.map(|(queue, _)| queue.clone()).collect();
        self.random.one(&other).cloned()
    }
}

/// The connection of one process. It counts what is handed over.
#[derive(Debug)]
pub struct Wire {
    inner: MemoryTransport,
    broker: Arc<HostileBroker>,
    delivered: Arc<AtomicU64>,
    queues: Mutex<BTreeSet<String>>,
}

impl Wire {
    /// How many messages were handed over.
    pub fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::SeqCst)
    }

    fn is_used(&self) -> bool {
        !self.queues.lock().unwrap().is_empty()
    }

    /// The process has ended: its own queues are attacked no more.
    pub fn end(&self) {
        let queues = std::mem::take(&mut *self.queues.lock().unwrap());
        self.broker.state().queues.retain(|queue, _| !queues.contains(queue));
    }
}

#[async_trait]
impl Transport for Wire {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        for message in self.broker.intercept(&message) {
            self.inner.publish(message, timeout).await?;
        }
        Ok(())
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        let consumer = self.inner.consume(queue, prefetch).await?;
        self.queues.lock().unwrap().insert(queue.name.clone());
        self.broker.state().queues.insert(queue.name.clone(), queue.bindings.clone());
        let delivered = self.delivered.clone();
        let deliveries =
            stream::unfold(consumer, |mut consumer| async move { Some((consumer.next().await?, consumer)) });
        Ok(Consumer::new(deliveries.inspect(move |_| {
            delivered.fetch_add(1, Ordering::SeqCst);
        })))
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        self.inner.declare(queue).await
    }

    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
        self.inner.depth(queue).await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

/// A process, by its identity and instance, and the digest of what it has opened.
type Opening = (Identity, u64, [u8; 32]);

/// What all nodes have sealed and opened.
#[derive(Debug, Default)]
pub struct Ledger {
    sealed: Mutex<HashSet<[u8; 32]>>,
    opened: Mutex<HashSet<Opening>>,
    faults: Mutex<Vec<String>>,
}

impl Ledger {
    /// How many different messages were sealed.
    pub fn sealed(&self) -> usize {
        self.sealed.lock().unwrap().len()
    }

    /// What was opened that should not have been.
    pub fn faults(&self) -> Vec<String> {
        self.faults.lock().unwrap().clone()
    }

    fn opened(&self, by: &SecureSerializer, bytes: &[u8], inbound: &Inbound, channel: InboundQueue) {
        let digest = sha256(bytes);
        let what = || format!("{} of {:?} by {:?}", inbound.packet.kind().as_str(), inbound.sender(), by.identity());
        if !self.sealed.lock().unwrap().contains(&digest) {
            self.faults.lock().unwrap().push(format!("nobody has sealed this: {}", what()));
        }
        let process = (by.identity().clone(), by.instance(), digest);
        // What waits for an agent may come again until it has been carried out.
        if !self.opened.lock().unwrap().insert(process) && channel != InboundQueue::Offline {
            self.faults.lock().unwrap().push(format!("opened twice: {}", what()));
        }
    }
}

/// A node's serializer, with what it does written down.
#[derive(Debug)]
pub struct Watched {
    pub inner: Arc<SecureSerializer>,
    pub ledger: Arc<Ledger>,
}

impl Serializer for Watched {
    fn content_type(&self) -> &str {
        self.inner.content_type()
    }

    fn identity(&self) -> &Identity {
        self.inner.identity()
    }

    fn seal(&self, packet: &Packet, how: &SealRequest<'_>) -> Result<Sealed, SealError> {
        let sealed = self.inner.seal(packet, how)?;
        self.ledger.sealed.lock().unwrap().insert(sha256(&sealed.bytes));
        Ok(sealed)
    }

    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError> {
        let inbound = self.inner.open(bytes, context)?;
        self.ledger.opened(&self.inner, bytes, &inbound, context.queue);
        Ok(inbound)
    }

    fn cost(&self, bytes: usize, now: nanite::clock::Timestamp) -> nanite::serializer::Cost {
        self.inner.cost(bytes, now)
    }

    fn verification(&self) -> Option<&dyn Verification> {
        self.inner.verification()
    }
}

/// What one process has been given and has done with it.
#[derive(Debug)]
pub struct Process {
    pub name: String,
    pub wire: Arc<Wire>,
    pub serializer: Arc<SecureSerializer>,
}

impl Process {
    /// How many messages it has opened or refused.
    pub fn accounted(&self) -> u64 {
        let counters = self.serializer.counters();
        counters.opened() + counters.refused_in_all()
    }

    /// How many it has refused, by kind.
    pub fn refused(&self) -> Vec<(OpenErrorKind, u64)> {
        OpenErrorKind::ALL.into_iter().map(|kind| (kind, self.serializer.counters().refused(kind))).collect()
    }
}
