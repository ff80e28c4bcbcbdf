//! How an agent is known: it registers, pings, registers again when asked, and unregisters.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};

use super::dispatch::Services;
use super::status::SharedStatus;
use crate::link::{Link, Outbound, SendError};
use crate::packet::{Kind, MessageId, Packet, Ping, Register, Tag, Unregister};
use crate::serializer::{Audience, SealError};
use crate::transport::{Destination, TransportError, topology};

/// How many orders wait; more are dropped, since each would say the same again.
const ORDERS: usize = 64;

/// How often an agent that learns its mappers makes itself known to all of them: it may have missed one that started.
pub(crate) const HELLO: Duration = Duration::from_secs(300);

/// What the agent has its presence say.
#[derive(Debug)]
pub(super) enum Order {
    /// Register, in answer to a question where there was one.
    Register(Option<MessageId>),
    /// Unregister, and end.
    Unregister(oneshot::Sender<()>),
    /// End without a word: another process speaks for this agent.
    End,
}

/// What an agent says of itself.
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
    /// Registers at once, then pings until it is told to unregister. It has a task of its own, so that a slow broker does not
    /// keep the agent from its work; one message after the other, so that their sequence grows in the order of sending.
    pub fn start(self) -> mpsc::Sender<Order> {
        let (orders, mut received) = mpsc::channel(ORDERS);
        tokio::spawn(async move {
            let mut ticks = interval(self.ping_time);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks.tick().await;
            let mut hellos = interval(HELLO);
            hellos.set_missed_tick_behavior(MissedTickBehavior::Delay);
            hellos.tick().await;
            // Asks in answer to it, so nothing is lost when no mapper is known yet.
            self.hello().await;
            self.register(None).await;
            loop {
                tokio::select! {
                    order = received.recv() => match order {
                        Some(Order::Register(asked)) => self.register(asked).await,
                        Some(Order::Unregister(done)) => {
                            self.unregister().await;
                            let _ = done.send(());
                            return;
                        }
                        Some(Order::End) | None => return,
                    },
                    _ = ticks.tick() => self.ping().await,
                    _ = hellos.tick() => self.hello().await,
                }
            }
        });
        orders
    }

    async fn register(&self, asked: Option<MessageId>) {
        let register = Register {
            identity: self.link.identity().clone(),
            services: self.services.names(),
            status: self.status.read().await,
            tags: self.tags.clone(),
            files: self.files.clone(),
            instance: self.plain_instance(),
        };
        self.say(register.into(), topology::REGISTRATION, asked).await;
    }

    async fn ping(&self) {
        let identity = self.link.identity().clone();
        let ping = Ping { identity, status: self.status.read().await, instance: self.plain_instance() };
        self.say(ping.into(), topology::HEARTBEAT, None).await;
    }

    /// Makes the agent known, where the mappers are not known by other means.
    async fn hello(&self) {
        match self.link.announce_to_mappers().await {
            Ok(()) => {}
            Err(SendError::Transport(TransportError::Unroutable(_))) => tracing::debug!("no mapper runs"),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot make this agent known to the mappers");
            }
        }
    }

    fn plain_instance(&self) -> Option<u64> {
        (!self.link.is_secure()).then(|| self.link.instance())
    }

    async fn unregister(&self) {
        let unregister = Unregister { identity: self.link.identity().clone() };
        self.say(unregister.into(), topology::REGISTRATION, None).await;
    }

    async fn say(&self, packet: Packet, exchange: &str, asked: Option<MessageId>) {
        let kind = packet.kind().as_str();
        let message = Outbound::new(packet, Audience::Mappers).in_reply_to(asked);
        match self.link.send(message, Destination::exchange(exchange)).await {
            Ok(_) => tracing::debug!(kind, "said to the mappers"),
            Err(SendError::Seal(SealError::NoRecipient(_))) => {
                tracing::info!(kind, "no mapper is known yet: waiting for one to ask");
                // At its start it has just said so.
                if kind == Kind::Ping.as_str() {
                    self.hello().await;
                }
            }
            Err(error) => {
                tracing::warn!(kind, error = &error as &dyn std::error::Error, "cannot say it to the mappers")
            }
        }
    }
}
