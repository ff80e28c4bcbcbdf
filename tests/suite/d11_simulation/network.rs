//! The network of a simulation: connections to a broker in memory with delays, cuts, lost confirms and refusals, in virtual time; the
//! random numbers of a seed; and the trace of what happened.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nanite::clock::{Clock, Timestamp};
use nanite::transport::{
    Consumer, Destination, MemoryBroker, MemoryTransport, PublishRequest, Queue, Transport, TransportError,
};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until, timeout};

use crate::harness::pki::T0;

/// Random numbers from a seed (SplitMix64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Less than `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Up to `longest` milliseconds, in microseconds.
    pub fn pause(&mut self, longest: u64) -> Duration {
        Duration::from_micros(self.below(longest * 1000) + 1)
    }
}

/// What all parts of one simulation share.
#[derive(Debug)]
pub struct Network {
    pub broker: MemoryBroker,
    random: Mutex<Random>,
    started_at: Instant,
    trace: Mutex<Vec<String>>,
    /// The longest delay of a message, in milliseconds.
    pub latency: u64,
    /// How many publishes in a hundred the broker refuses.
    pub refused: u64,
}

impl Network {
    pub fn new(seed: u64) -> Arc<Self> {
        let mut random = Random::new(seed);
        let latency = [1, 5, 40, 200][random.below(4) as usize];
        let refused = if random.chance(25) { 3 } else { 0 };
        Arc::new(Self {
            broker: MemoryBroker::new(),
            random: Mutex::new(random),
            started_at: Instant::now(),
            trace: Mutex::default(),
            latency,
            refused,
        })
    }

    pub fn below(&self, bound: u64) -> u64 {
        self.random.lock().below(bound)
    }

    pub fn chance(&self, percent: u64) -> bool {
        self.random.lock().chance(percent)
    }

    pub fn pause(&self, longest: u64) -> Duration {
        self.random.lock().pause(longest)
    }

    pub fn now(&self) -> Duration {
        self.started_at.elapsed()
    }

    /// Adds a line to the trace.
    pub fn note(&self, line: impl std::fmt::Display) {
        self.trace.lock().push(format!("{:>12.6} {line}", self.now().as_secs_f64()));
    }

    pub fn trace(&self) -> Vec<String> {
        self.trace.lock().clone()
    }

    /// The clock of a node, which is ahead by this many microseconds, or behind.
    pub fn clock(self: &Arc<Self>, ahead: i64) -> Arc<SimulatedClock> {
        Arc::new(SimulatedClock { network: Arc::clone(self), ahead })
    }

    /// A new connection of a node.
    pub fn connect(self: &Arc<Self>, node: &str) -> Arc<Connection> {
        Arc::new(Connection {
            node: node.to_owned(),
            inner: self.broker.connect(),
            network: Arc::clone(self),
            lanes: Mutex::default(),
        })
    }
}

/// The time of day at one node: virtual time and an error.
#[derive(Debug)]
pub struct SimulatedClock {
    network: Arc<Network>,
    ahead: i64,
}

impl Clock for SimulatedClock {
    fn now(&self) -> Timestamp {
        let micros = T0.as_micros() + self.network.now().as_micros() as u64;
        Timestamp::from_micros(micros.saturating_add_signed(self.ahead))
    }
}

/// A connection to the broker.
#[derive(Debug)]
pub struct Connection {
    node: String,
    pub inner: MemoryTransport,
    network: Arc<Network>,
    /// When the last message to each destination arrives: messages to one destination stay in order.
    lanes: Mutex<BTreeMap<String, Instant>>,
}

#[async_trait]
impl Transport for Connection {
    async fn publish(&self, message: PublishRequest, limit: Duration) -> Result<(), TransportError> {
        let network = &self.network;
        let name = match &message.destination {
            Destination::Queue(queue) => queue.clone(),
            Destination::Exchange(exchange) => format!("exchange {}", exchange.name),
            other => panic!("{other:?}"),
        };
        let arrives = {
            let mut lanes = self.lanes.lock();
            let lane = lanes.entry(name.clone()).or_insert_with(Instant::now);
            *lane = (*lane).max(Instant::now() + network.pause(network.latency));
            *lane
        };
        let confirm = network.pause(network.latency);
        let (refused, repeated) = (network.chance(network.refused), network.chance(2));
        let publish = async {
            sleep_until(arrives).await;
            if refused {
                network.note(format_args!("{} -> {name} refused by the broker", self.node));
                return Err(TransportError::Nacked);
            }
            self.inner.publish(message.clone(), limit).await.inspect_err(|error| {
                network.note(format_args!("{} -> {name} failed: {error}", self.node));
            })?;
            network.note(format_args!("{} -> {name}", self.node));
            if repeated {
                // The confirm is lost with the connection: the message is published again.
                tokio::time::sleep(confirm).await;
                network.note(format_args!("{} -> {name} again", self.node));
                self.inner.publish(message.clone(), limit).await?;
            }
            tokio::time::sleep(confirm).await;
            Ok(())
        };
        timeout(limit, publish).await.unwrap_or(Err(TransportError::TimedOut(limit)))
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        self.inner.consume(queue, prefetch).await
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
