//! A hostile broker: between real nodes and a memory broker, it drops, delays, repeats, misroutes and changes their messages. A ledger
//! records what each node has sealed and opened, so that forged messages are noticed.

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

/// The most captured messages that are kept; a newer one replaces a random one.
const MAX_CAPTURED: usize = 4096;
/// The most messages that are queued: the attack is as fast as the nodes.
const MAX_QUEUED: usize = 1000;
/// The number of attacks for each message that the nodes send.
const ATTACKS_PER_MESSAGE: u64 = 40;
/// After this many attacks a connection is lost.
const ATTACKS_PER_DISCONNECT: u64 = 4000;

/// Pseudo-random numbers from a seed (splitmix64).
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

    fn choose<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        if from.is_empty() { None } else { from.get(self.below(from.len())) }
    }
}

/// What the broker does to a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Delivered.
    Deliver,
    /// Not delivered.
    Drop,
    /// Delivered later, after messages that were sent after it.
    Delay,
    /// Delivered twice.
    Duplicate,
    /// Delivered again, any time later.
    Replay,
    /// Delivered to another queue.
    Misroute,
    /// Delivered with one bit changed.
    FlipBit,
    /// Delivered to another queue, with one bit changed.
    FlipBitAndMisroute,
    /// Delivered without its end.
    Truncate,
}

/// The hostile broker.
pub struct HostileBroker {
    broker: MemoryBroker,
    /// The connection over which it attacks.
    attacker: MemoryTransport,
    state: Mutex<State>,
    captured: Notify,
}

struct State {
    random: Random,
    is_hostile: bool,
    captured: Vec<PublishRequest>,
    delayed: Vec<PublishRequest>,
    /// The consumed queues, with the exchanges that they are bound to.
    queues: BTreeMap<String, Vec<Exchange>>,
    transports: Vec<Arc<HostileTransport>>,
    /// How many attacks may still be made.
    credit: u64,
    actions: BTreeMap<Action, u64>,
    disconnects: u64,
}

impl fmt::Debug for HostileBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("HostileBroker")
            .field("actions", &state.actions)
            .field("disconnects", &state.disconnects)
            .finish_non_exhaustive()
    }
}

impl HostileBroker {
    /// A broker that is honest until [`set_hostile`](Self::set_hostile).
    pub fn new(seed: u64) -> Arc<Self> {
        let broker = MemoryBroker::new();
        let state = State {
            random: Random::new(seed),
            is_hostile: false,
            captured: Vec::new(),
            delayed: Vec::new(),
            queues: BTreeMap::new(),
            transports: Vec::new(),
            credit: 0,
            actions: BTreeMap::new(),
            disconnects: 0,
        };
        Arc::new(Self { attacker: broker.connect(), broker, state: Mutex::new(state), captured: Notify::new() })
    }

    /// A connection for one process.
    pub fn connect(self: &Arc<Self>) -> Arc<HostileTransport> {
        let inner = self.broker.connect();
        let (broker, delivered, queues) = (self.clone(), AtomicU64::new(0).into(), Mutex::default());
        let transport = Arc::new(HostileTransport { inner, broker, delivered, queues });
        self.state().transports.push(transport.clone());
        transport
    }

    /// Makes it hostile, or honest. Delayed messages are dropped.
    pub fn set_hostile(&self, hostile: bool) {
        let mut state = self.state();
        state.is_hostile = hostile;
        let delayed = state.delayed.drain(..).count() as u64;
        *state.actions.entry(Action::Drop).or_default() += delayed;
    }

    /// How many messages were delivered to the processes.
    pub fn delivered(&self) -> u64 {
        self.state().transports.iter().map(|transport| transport.delivered()).sum()
    }

    /// How often it took each action, and how many connections it has interrupted.
    pub fn actions(&self) -> (BTreeMap<Action, u64>, u64) {
        let state = self.state();
        (state.actions.clone(), state.disconnects)
    }

    /// Attacks until this many messages have been delivered to the processes.
    pub async fn attack_until_delivered(&self, messages: u64) {
        let mut attacks = 0_u64;
        while self.delivered() < messages {
            if attacks.is_multiple_of(100) {
                while self.queued() > MAX_QUEUED {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            match self.attack() {
                Some(message) => {
                    // The queue may just have been deleted with its process.
                    let _ = self.attacker.publish(message, Duration::from_secs(10)).await;
                    attacks += 1;
                    if attacks.is_multiple_of(ATTACKS_PER_DISCONNECT) {
                        self.disconnect_one();
                    }
                }
                None => self.captured.notified().await,
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn queued(&self) -> usize {
        let queues: Vec<String> = self.state().queues.keys().cloned().collect();
        queues.iter().map(|queue| self.broker.queued_messages(queue).len()).sum()
    }

    /// Interrupts a random connection.
    fn disconnect_one(&self) {
        let mut state = self.state();
        state.disconnects += 1;
        let used: Vec<_> = state.transports.iter().filter(|transport| transport.is_used()).cloned().collect();
        let transport = state.random.choose(&used).cloned();
        drop(state);
        if let Some(transport) = transport {
            transport.inner.disconnect();
            transport.inner.reconnect();
        }
    }

    /// A captured message, attacked; `None` if there is nothing to do.
    fn attack(&self) -> Option<PublishRequest> {
        let mut state = self.state();
        state.credit = state.credit.checked_sub(1)?;
        if state.random.below(20) == 0 && !state.delayed.is_empty() {
            let State { random, delayed, .. } = &mut *state;
            return Some(delayed.swap_remove(random.below(delayed.len())));
        }
        let mut message = {
            let State { random, captured, .. } = &mut *state;
            random.choose(captured)?.clone()
        };
        let action = match state.random.below(100) {
            0..25 => Action::Replay,
            25..40 => Action::Misroute,
            40..75 => Action::FlipBit,
            75..85 => Action::FlipBitAndMisroute,
            _ => Action::Truncate,
        };
        state.alter(action, &mut message);
        let queue = match action {
            Action::Misroute | Action::FlipBitAndMisroute => state.other_queue(&message.destination),
            _ => state.right_queue(&message.destination),
        };
        message.destination = Destination::Queue(queue?);
        state.count(action);
        Some(message)
    }

    /// What is delivered in place of a message that a node publishes.
    fn intercept(&self, message: &PublishRequest) -> Vec<PublishRequest> {
        let mut state = self.state();
        if !state.is_hostile {
            return vec![message.clone()];
        }
        state.credit += ATTACKS_PER_MESSAGE;
        self.captured.notify_one();
        if state.captured.len() < MAX_CAPTURED {
            state.captured.push(message.clone());
        } else {
            let at = state.random.below(MAX_CAPTURED);
            state.captured[at] = message.clone();
        }
        let action = match state.random.below(100) {
            0..2 => Action::Drop,
            2..6 => Action::Delay,
            6..12 => Action::Duplicate,
            12..13 => Action::FlipBit,
            13..14 => Action::Truncate,
            14..15 => Action::Misroute,
            _ => Action::Deliver,
        };
        state.count(action);
        let mut changed = message.clone();
        state.alter(action, &mut changed);
        match action {
            Action::Drop => Vec::new(),
            Action::Delay => {
                state.delayed.push(changed);
                Vec::new()
            }
            Action::Duplicate => vec![changed.clone(), changed],
            Action::Misroute => match state.other_queue(&message.destination) {
                Some(queue) => {
                    changed.destination = Destination::Queue(queue);
                    vec![changed]
                }
                None => Vec::new(),
            },
            _ => vec![changed],
        }
    }
}

impl State {
    fn count(&mut self, action: Action) {
        *self.actions.entry(action).or_default() += 1;
    }

    fn alter(&mut self, action: Action, message: &mut PublishRequest) {
        let mut body = message.body.to_vec();
        match action {
            Action::FlipBit | Action::FlipBitAndMisroute => {
                let bit = self.random.below(body.len() * 8);
                body[bit / 8] ^= 1 << (bit % 8);
            }
            Action::Truncate => body.truncate(self.random.below(body.len())),
            _ => return,
        }
        message.body = body.into();
    }

    fn is_routed_to(destination: &Destination, queue: &str, bindings: &[Exchange]) -> bool {
        match destination {
            Destination::Queue(name) => name == queue,
            Destination::Exchange(exchange) => bindings.contains(exchange),
            _ => false,
        }
    }

    /// A random consumed queue that the message was sent to.
    fn right_queue(&mut self, destination: &Destination) -> Option<String> {
        let right = self.queues.iter().filter(|(queue, bindings)| Self::is_routed_to(destination, queue, bindings));
        let right: Vec<String> = right.map(|(queue, _)| queue.clone()).collect();
        self.random.choose(&right).cloned()
    }

    /// A random consumed queue that the message was not sent to.
    fn other_queue(&mut self, destination: &Destination) -> Option<String> {
        let other = self.queues.iter().filter(|(queue, bindings)| !Self::is_routed_to(destination, queue, bindings));
        let other: Vec<String> = other.map(|(queue, _)| queue.clone()).collect();
        self.random.choose(&other).cloned()
    }
}

/// The connection of one process. It counts deliveries.
#[derive(Debug)]
pub struct HostileTransport {
    inner: MemoryTransport,
    broker: Arc<HostileBroker>,
    delivered: Arc<AtomicU64>,
    queues: Mutex<BTreeSet<String>>,
}

impl HostileTransport {
    /// How many messages were delivered.
    pub fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::SeqCst)
    }

    fn is_used(&self) -> bool {
        !self.queues.lock().unwrap().is_empty()
    }

    /// Stops attacks on the queues of this process, which has ended.
    pub fn end(&self) {
        let queues = std::mem::take(&mut *self.queues.lock().unwrap());
        self.broker.state().queues.retain(|queue, _| !queues.contains(queue));
    }
}

#[async_trait]
impl Transport for HostileTransport {
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

/// The identity and instance of a process, and the digest of a message that it has opened.
type Opening = (Identity, u64, [u8; 32]);

/// The messages that all nodes have sealed and opened.
#[derive(Debug, Default)]
pub struct Ledger {
    sealed: Mutex<HashSet<[u8; 32]>>,
    opened: Mutex<HashSet<Opening>>,
    violations: Mutex<Vec<String>>,
}

impl Ledger {
    /// The number of different messages that were sealed.
    pub fn sealed(&self) -> usize {
        self.sealed.lock().unwrap().len()
    }

    /// The messages that should not have been opened.
    pub fn violations(&self) -> Vec<String> {
        self.violations.lock().unwrap().clone()
    }

    fn opened(&self, by: &SecureSerializer, bytes: &[u8], inbound: &Inbound, queue: InboundQueue) {
        let digest = sha256(bytes);
        let description =
            || format!("{} of {:?} by {:?}", inbound.packet.kind().as_str(), inbound.sender(), by.identity());
        if !self.sealed.lock().unwrap().contains(&digest) {
            self.violations.lock().unwrap().push(format!("opened but never sealed: {}", description()));
        }
        let process = (by.identity().clone(), by.instance(), digest);
        // A message of the offline queue may be opened again until it has been completed.
        if !self.opened.lock().unwrap().insert(process) && queue != InboundQueue::Offline {
            self.violations.lock().unwrap().push(format!("opened twice: {}", description()));
        }
    }
}

/// A node's serializer that records what it does in a ledger.
#[derive(Debug)]
pub struct RecordingSerializer {
    pub inner: Arc<SecureSerializer>,
    pub ledger: Arc<Ledger>,
}

impl Serializer for RecordingSerializer {
    fn content_type(&self) -> &str {
        self.inner.content_type()
    }

    fn identity(&self) -> &Identity {
        self.inner.identity()
    }

    fn seal(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Sealed, SealError> {
        let sealed = self.inner.seal(packet, request)?;
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

/// A process of a node, with what it has received.
#[derive(Debug)]
pub struct Process {
    pub name: String,
    pub transport: Arc<HostileTransport>,
    pub serializer: Arc<SecureSerializer>,
}

impl Process {
    /// How many messages it has opened or refused.
    pub fn opened_or_refused(&self) -> u64 {
        let counters = self.serializer.counters();
        counters.opened() + counters.refused_in_all()
    }

    /// How many messages it has refused, by kind.
    pub fn refused(&self) -> Vec<(OpenErrorKind, u64)> {
        OpenErrorKind::ALL.into_iter().map(|kind| (kind, self.serializer.counters().refused(kind))).collect()
    }
}
