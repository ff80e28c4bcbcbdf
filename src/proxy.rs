//! Requests through a mapper: for agents, and for programs without a mapper of their own.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::clock::SystemClock;
use crate::link::{IdentityMismatch, Link, Outbound, Received, SendError, Subscription, mappers_known};
use crate::packet::{Identity, Packet, Request, Role, Token};
use crate::request::{Dispatch, Events, PendingRequests, RequestBuilder, RequestError, RequestSpec};
use crate::serializer::{Audience, Inbound, InboundQueue, Serializer};
use crate::transport::{Destination, Queue, QueueKind, Transport, TransportError, topology};

/// The longest lifetime of a message that asks for work; the work itself may take longer.
const LIFETIME: Duration = Duration::from_secs(60);
/// How long the mappers may take to make themselves known to a proxy that starts.
const MAPPERS_KNOWN: Duration = Duration::from_secs(2);
/// How often a proxy that is used makes itself known to the mappers again, which may be others by then.
const HELLO_AGAIN: Duration = Duration::from_secs(10);
/// How many answers are unacknowledged at a time.
const PREFETCH: u16 = 256;

/// Has requests dispatched by a mapper: it goes to the queue that all mappers share, and one of them takes it.
///
/// An agent has one in its [`Context`](crate::agent::Context::proxy) and its
/// [`AgentHandle`](crate::agent::AgentHandle::proxy); a program that is no agent starts one of its own. Cloning it is cheap.
#[derive(Clone, Debug)]
pub struct MapperProxy {
    link: Link,
    jobs: Arc<PendingRequests>,
    /// What listens for answers, where this proxy has to do it itself.
    listener: Option<Arc<Listener>>,
}

#[derive(Debug)]
struct Listener {
    task: AbortHandle,
    /// Counts how often mappers have made themselves known.
    advertised: watch::Receiver<u64>,
    /// When this proxy made itself known to them.
    said_hello: Mutex<Option<Instant>>,
}

impl Listener {
    /// Whether it is time to say hello, which is noted as done.
    fn is_hello_due(&self) -> bool {
        let mut said = self.said_hello.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = said.is_none_or(|at| at.elapsed() >= HELLO_AGAIN);
        if is_due {
            *said = Some(Instant::now());
        }
        is_due
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why a proxy cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// The serializer signs for somebody else.
    #[error(transparent)]
    Identity(#[from] IdentityMismatch),
    /// Its queue cannot be used.
    #[error("cannot use the proxy's queue")]
    Transport(#[from] TransportError),
}

impl MapperProxy {
    /// Starts a proxy for a program that speaks as `identity`, an agent's or a mapper's. Where its serializer learns other nodes from
    /// what they send, it first waits for the mappers to make themselves known: 2 s at most.
    ///
    /// # Errors
    /// [`ProxyError`] says why it cannot start.
    pub async fn start(
        identity: Identity,
        serializer: Arc<dyn Serializer>,
        transport: Arc<dyn Transport>,
    ) -> Result<Self, ProxyError> {
        let link = Link::new(identity, serializer, transport, Arc::new(SystemClock))?;
        let (name, instance) = (link.identity().as_str(), link.instance());
        let (queue, channel) = match link.identity().role() {
            Role::Agent => (topology::agent_control(name, instance), InboundQueue::AgentControl),
            // As with an agent, nothing of it stays at the broker when its connection is gone.
            Role::Mapper => {
                let inbox = Queue { kind: QueueKind::Exclusive, ..topology::mapper_inbox(name, instance) };
                (inbox, InboundQueue::MapperInbox)
            }
        };
        let answers = link.subscribe(&queue, channel, PREFETCH).await?;
        let jobs = Arc::default();
        let (advertises, advertised) = watch::channel(0);
        let task = tokio::spawn(listen(answers, Arc::clone(&jobs), advertises)).abort_handle();
        let proxy =
            Self { link, jobs, listener: Some(Arc::new(Listener { task, advertised, said_hello: Mutex::default() })) };
        proxy.know_mappers(MAPPERS_KNOWN).await;
        Ok(proxy)
    }

    /// The proxy of an agent, which hands it the answers that come.
    pub(crate) fn of(link: Link) -> Self {
        Self { link, jobs: Arc::default(), listener: None }
    }

    /// Takes an answer in. False when it is none, or nobody waits for it.
    pub(crate) fn answered(&self, inbound: Inbound) -> bool {
        self.jobs.answered(inbound)
    }

    /// A request for `service`. It is sent when it is awaited, and gives the answers of all its targets.
    pub fn request(&self, service: &str, payload: impl Serialize) -> RequestBuilder<MapperProxy> {
        RequestBuilder::new(self.clone(), service, payload)
    }

    /// A push to `service`, to the least loaded agent: work without an answer. It is confirmed when a mapper can take it.
    ///
    /// # Errors
    /// [`RequestError`] when it could not be given to the mappers.
    pub async fn push(&self, service: &str, payload: impl Serialize) -> Result<(), RequestError> {
        self.request(service, payload).push().await.map(drop)
    }

    /// Waits for the mappers to make themselves known, where they are not known by other means. False when none did.
    async fn know_mappers(&self, limit: Duration) -> bool {
        let Some(listener) = self.listener.as_ref().filter(|_| self.link.learns_peers()) else { return true };
        let is_due = listener.is_hello_due();
        if *listener.advertised.borrow() > 0 {
            if is_due {
                let link = self.link.clone();
                tokio::spawn(async move { link.announce_to_mappers().await });
            }
            return true;
        }
        match self.link.announce_to_mappers().await {
            Ok(()) => mappers_known(listener.advertised.clone(), limit).await,
            Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "no mapper could be asked"),
        }
        *listener.advertised.borrow() > 0
    }

    async fn send(&self, ask: &RequestSpec, events: Option<&Events>) -> Result<(), RequestError> {
        // What is sealed for the mappers is for those that are known: without one, nobody could open it.
        if !self.know_mappers(MAPPERS_KNOWN.min(ask.timeout)).await {
            return Err(RequestError::NoMapper);
        }
        let mut request = Request { from: Some(self.link.identity().clone()), ..ask.request.clone() };
        request.offline = ask.offline;
        let mut lifetime = LIFETIME;
        let packet = match events {
            Some(events) => {
                lifetime = lifetime.min(ask.timeout);
                request.token = Some(events.job().token);
                request.deadline = Some(self.link.now().saturating_add(ask.timeout));
                if !self.link.is_secure() {
                    let queue = topology::process_queue_name(self.link.identity().as_str(), self.link.instance());
                    request.reply_to = Some(queue);
                }
                Packet::Request(request)
            }
            None => {
                request.token = Some(Token::random()?);
                Packet::Push(request)
            }
        };
        let mut message = Outbound::new(packet, Audience::Mappers);
        message.lifetime = lifetime;
        message.persistent = ask.request.persistent.unwrap_or(false);
        let ready = self.link.seal(message).await?;
        // Before it is sent: the answer may be faster than the broker's confirmation.
        if let Some(events) = events {
            events.jobs().hand_over(events.job(), ready.id());
        }
        match self.link.publish(&ready, Destination::Queue(topology::REQUEST.into())).await {
            Err(TransportError::Unroutable(_)) => Err(RequestError::NoMapper),
            other => Ok(other.map_err(SendError::from)?),
        }
    }
}

#[async_trait]
impl Dispatch for MapperProxy {
    async fn request(self, ask: RequestSpec) -> Result<Events, RequestError> {
        let events = Events::begin(&self.jobs, Token::random()?, ask.timeout, self.clone());
        self.send(&ask, Some(&events)).await?;
        Ok(events)
    }

    async fn push(self, ask: RequestSpec) -> Result<Vec<Identity>, RequestError> {
        self.send(&ask, None).await?;
        Ok(Vec::new())
    }
}

/// Takes answers in, for a proxy of its own.
async fn listen(mut answers: Subscription, jobs: Arc<PendingRequests>, advertises: watch::Sender<u64>) {
    while let Some(received) = answers.next().await {
        let inbound = Received::accept(received).await;
        if let Packet::Advertise(advertise) = &inbound.packet {
            // One that takes no requests of others is of no use here.
            if !advertise.serves_requests {
                continue;
            }
            advertises.send_modify(|heard| *heard = heard.saturating_add(1));
        } else if !jobs.answered(inbound) {
            tracing::debug!("an answer that nobody waits for");
        }
    }
}
