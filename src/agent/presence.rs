//! The presence of an agent: registration, heartbeats with its status, and unregistration.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::dispatch::Services;
use crate::link::{Link, Outbound, SendError};
use crate::packet::{Kind, MessageId, Packet, Ping, Register, Status, Tag, Unregister};
use crate::serializer::{Audience, SealError};
use crate::transport::{Destination, TransportError, topology};

/// The most commands that wait; further ones are dropped, since they would only repeat a registration.
const COMMAND_CAPACITY: usize = 64;

/// How often an agent that learns its mappers advertises itself to all of them: it may have missed one that started.
const ADVERTISE_INTERVAL: Duration = Duration::from_secs(300);

/// How loaded an agent is: any number comparable with that of other agents; lower is less loaded.
///
/// It is called for every registration and heartbeat, on a thread that may block. A panic, or a number that is not finite, counts as
/// 'no status'; the selector `least_loaded` chooses such an agent last. A closure is a source, too.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU32, Ordering};
/// use nanite::agent::StatusSource;
///
/// #[derive(Default)]
/// struct QueueLength(AtomicU32);
///
/// impl StatusSource for QueueLength {
///     fn status(&self) -> f64 {
///         self.0.load(Ordering::Relaxed).into()
///     }
/// }
///
/// let queue = Arc::new(QueueLength::default()); // AgentBuilder::status(queue.clone())
/// queue.0.fetch_add(2, Ordering::Relaxed);
/// assert_eq!(queue.status(), 2.0);
/// ```
pub trait StatusSource: Send + Sync + 'static {
    /// The current load.
    fn status(&self) -> f64;

    /// Whether [`status`](Self::status) may block: then it is called on a worker thread. True by default.
    fn may_block(&self) -> bool {
        true
    }
}

impl<F: Fn() -> f64 + Send + Sync + 'static> StatusSource for F {
    fn status(&self) -> f64 {
        self()
    }
}

impl<T: StatusSource + ?Sized> StatusSource for Arc<T> {
    fn status(&self) -> f64 {
        (**self).status()
    }

    fn may_block(&self) -> bool {
        (**self).may_block()
    }
}

/// The system's load average over one minute; not a number where it is not available.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadAverage;

impl StatusSource for LoadAverage {
    fn status(&self) -> f64 {
        std::fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|text| text.split_whitespace().next()?.parse().ok())
            .unwrap_or(f64::NAN)
    }

    /// It is a file in memory.
    fn may_block(&self) -> bool {
        false
    }
}

/// A [`StatusSource`], read on a worker thread if it may block.
#[derive(Clone)]
pub(super) struct SharedStatus(pub Arc<dyn StatusSource>);

impl SharedStatus {
    pub async fn read(&self) -> Status {
        let source = self.0.clone();
        let read = move || catch_unwind(AssertUnwindSafe(|| source.status())).unwrap_or(f64::NAN);
        let status = if self.0.may_block() { tokio::task::spawn_blocking(read).await.ok() } else { Some(read()) };
        Status::new(status.unwrap_or(f64::NAN))
    }
}

impl fmt::Debug for SharedStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StatusSource")
    }
}

/// A command for the presence task.
#[derive(Debug)]
pub(super) enum PresenceCommand {
    /// Register, in reply to this message if there is one.
    Register(Option<MessageId>),
    /// Unregister, and stop.
    Unregister(oneshot::Sender<()>),
    /// Stop without unregistering: a newer process is registered for this agent.
    Stop,
}

/// What an agent registers, and how often it sends a heartbeat.
#[derive(Debug)]
pub(super) struct Presence {
    pub link: Link,
    pub services: Services,
    pub tags: Vec<Tag>,
    pub files: Vec<Tag>,
    pub status: SharedStatus,
    pub ping_time: Duration,
}

impl Presence {
    /// Registers at once, then sends heartbeats until it is told to stop. It runs in a task of its own, so that a slow broker does not
    /// delay jobs, and sends one message after the other, so that their sequence numbers grow in the order of sending.
    pub fn start(self) -> mpsc::Sender<PresenceCommand> {
        let (commands, mut received) = mpsc::channel(COMMAND_CAPACITY);
        tokio::spawn(async move {
            let mut ping_due = ticks(self.ping_time).await;
            let mut advertise_due = ticks(ADVERTISE_INTERVAL).await;
            // First the advertisement: a mapper that does not know this agent yet then asks for its registration.
            self.advertise().await;
            self.register(None).await;
            loop {
                tokio::select! {
                    biased;
                    command = received.recv() => match command {
                        Some(PresenceCommand::Register(in_reply_to)) => self.register(in_reply_to).await,
                        Some(PresenceCommand::Unregister(done)) => {
                            self.unregister().await;
                            let _ = done.send(());
                            return;
                        }
                        Some(PresenceCommand::Stop) | None => return,
                    },
                    _ = ping_due.tick() => self.ping().await,
                    _ = advertise_due.tick() => self.advertise().await,
                }
            }
        });
        commands
    }

    async fn register(&self, in_reply_to: Option<MessageId>) {
        let register = Register {
            identity: self.link.identity().clone(),
            services: self.services.names(),
            status: self.status.read().await,
            tags: self.tags.clone(),
            files: self.files.clone(),
            instance: self.plain_instance(),
        };
        self.send(register.into(), topology::REGISTRATION, in_reply_to).await;
    }

    async fn ping(&self) {
        let identity = self.link.identity().clone();
        let ping = Ping { identity, status: self.status.read().await, instance: self.plain_instance() };
        self.send(ping.into(), topology::HEARTBEAT, None).await;
    }

    /// Advertises this agent to the mappers, if nodes learn each other that way.
    async fn advertise(&self) {
        match self.link.announce_to_mappers().await {
            Ok(()) => {}
            Err(SendError::Transport(TransportError::Unroutable(_))) => tracing::debug!("no mapper runs"),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot advertise to the mappers");
            }
        }
    }

    fn plain_instance(&self) -> Option<u64> {
        (!self.link.is_secure()).then(|| self.link.instance())
    }

    async fn unregister(&self) {
        let unregister = Unregister { identity: self.link.identity().clone() };
        self.send(unregister.into(), topology::REGISTRATION, None).await;
    }

    async fn send(&self, packet: Packet, exchange: &str, in_reply_to: Option<MessageId>) {
        let kind = packet.kind().as_str();
        let message = Outbound::new(packet, Audience::Mappers).in_reply_to(in_reply_to);
        match self.link.send(message, Destination::exchange(exchange)).await {
            Ok(_) => tracing::debug!(kind, "sent to the mappers"),
            Err(SendError::Seal(SealError::NoRecipient(_))) => {
                tracing::info!(kind, "no mapper known yet; waiting for one to ask");
                // A registration follows an advertisement anyway.
                if kind == Kind::Ping.as_str() {
                    self.advertise().await;
                }
            }
            Err(error) => {
                tracing::warn!(kind, error = &error as &dyn std::error::Error, "cannot send to the mappers")
            }
        }
    }
}

/// An interval whose first tick has passed.
async fn ticks(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    ticks
}
