//! Requests through a mapper: for agents, and for programs without a mapper of their own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::audit::AuditLog;
use crate::clock::Clock;
use crate::link::{
    Link, LinkBuilder, Outbound, Received, RecentMessage, RecentMessages, SendError, Subscription, wait_for_mappers,
};
use crate::packet::{Identity, Packet, Request, RequestDigest, RequestOrigin, Role, Token};
use crate::request::{
    Dispatch, Events, HandedOver, PendingRequests, RequestBuilder, RequestError, RequestSpec, sealed,
};
use crate::serializer::{Audience, Inbound, InboundQueue, Serializer};
use crate::transport::{Destination, Queue, QueueKind, Transport, TransportError, topology};

/// The longest lifetime of a message that asks for work; the work itself may take longer.
const MAX_REQUEST_LIFETIME: Duration = Duration::from_secs(60);
/// How long to wait for the mappers to advertise themselves.
const FIND_MAPPERS_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a proxy in use advertises itself again: other mappers may run by then.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(10);
/// How many answers are unacknowledged at a time.
const PREFETCH: u16 = 256;

/// Has requests dispatched by a mapper: it goes to the queue that all mappers share, and one of them takes it.
///
/// An agent has one in its [`Context`](crate::agent::Context::proxy) and its
/// [`Agent`](crate::agent::Agent::proxy); a program that is no agent starts one of its own. Cloning it is cheap.
#[derive(Clone, Debug)]
pub struct MapperProxy {
    link: Link,
    pending: Arc<PendingRequests>,
    recent: Arc<RecentMessages>,
    /// Receives the answers, unless an agent does.
    listener: Option<Arc<Listener>>,
}

#[derive(Debug)]
struct Listener {
    task: AbortHandle,
    /// Counts the advertises of mappers.
    advertised: watch::Receiver<u64>,
    /// When this proxy last advertised itself.
    announced_at: Mutex<Option<Instant>>,
}

impl Listener {
    /// Whether an announcement is due; if so it is recorded as made.
    fn is_announcement_due(&self) -> bool {
        let mut announced_at = self.announced_at.lock();
        let is_due = announced_at.is_none_or(|at| at.elapsed() >= ANNOUNCE_INTERVAL);
        if is_due {
            *announced_at = Some(Instant::now());
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
    /// Its queue cannot be used.
    #[error("cannot use the proxy's queue")]
    Transport(#[from] TransportError),
}

/// Configures a [`MapperProxy`] and starts it; see [`MapperProxy::builder`].
#[derive(Debug)]
#[must_use = "nothing runs until it is started"]
pub struct MapperProxyBuilder {
    link: LinkBuilder,
}

impl MapperProxyBuilder {
    /// The clock; the system clock by default.
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.link = self.link.clock(clock);
        self
    }

    /// Records every accepted and refused message in this log; none by default.
    pub fn audit(mut self, log: AuditLog) -> Self {
        self.link = self.link.audit(log);
        self
    }

    /// Starts the proxy. If its messages are sealed, it first waits for the mappers to advertise themselves: 2 s at most.
    ///
    /// # Errors
    /// [`ProxyError`] when its queue cannot be used.
    pub async fn start(self) -> Result<MapperProxy, ProxyError> {
        let link = self.link.build();
        let (name, instance) = (link.identity().as_str(), link.instance());
        let (queue, inbound_queue) = match link.identity().role() {
            Role::Agent => (topology::agent_control(name, instance), InboundQueue::AgentControl),
            // As with an agent, the queue disappears with the connection.
            Role::Mapper => {
                let inbox = Queue { kind: QueueKind::Exclusive, ..topology::mapper_inbox(name, instance) };
                (inbox, InboundQueue::MapperInbox)
            }
        };
        let answers = link.subscribe(&queue, inbound_queue, PREFETCH).await?;
        let pending = Arc::default();
        let (advertises, advertised) = watch::channel(0);
        let mut proxy = MapperProxy { link, pending, recent: Arc::default(), listener: None };
        let task = tokio::spawn(listen(answers, proxy.clone(), advertises)).abort_handle();
        let listener = Listener { task, advertised, announced_at: Mutex::default() };
        proxy.listener = Some(Arc::new(listener));
        proxy.find_mappers(FIND_MAPPERS_TIMEOUT).await;
        Ok(proxy)
    }
}

impl MapperProxy {
    /// A proxy for a program that is not an agent, with the identity of `serializer`: an agent's or a mapper's.
    ///
    /// [`Node::proxy`](crate::Node::proxy) is the shorter way when certificates are in files.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let node = nanite::Node::from_dir("certs", "desk")?.connect("amqp://localhost").await?;
    /// let proxy = node.proxy().start().await?;
    /// let answers = proxy.request("/text/upper", "hello").await?;
    /// # drop(answers);
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(serializer: impl Serializer + 'static, transport: impl Transport + 'static) -> MapperProxyBuilder {
        MapperProxyBuilder { link: Link::builder(serializer, transport) }
    }

    /// The proxy of an agent, which passes the answers on to it.
    pub(crate) fn of_agent(link: Link) -> Self {
        Self { link, pending: Arc::default(), recent: Arc::default(), listener: None }
    }

    /// Accepts an answer. False for another packet, or when no request waits for it.
    pub(crate) async fn answered(&self, inbound: Inbound) -> bool {
        self.pending.answered(&self.link, inbound).await
    }

    /// A mapper has introduced itself. If it did so because a message did not name it, as it has just started, that message is sent again.
    /// False if there is none.
    pub(crate) fn send_again(&self, advertise: &Inbound) -> bool {
        let Some(signer) = advertise.signer().filter(|signer| signer.signer().role() == Role::Mapper) else {
            return false;
        };
        let Some(recent) = signer.in_reply_to().and_then(|id| self.recent.take(id)) else { return false };
        let proxy = self.clone();
        tokio::spawn(async move { proxy.repeat(recent).await });
        true
    }

    async fn repeat(&self, RecentMessage { id, message, sent_at }: RecentMessage) {
        let sent = async {
            let ready = self.link.seal(message.clone()).await?;
            if let Packet::Request(request) = &message.packet
                && !request.token.is_some_and(|token| self.pending.hand_over_again(token, id, ready.id()))
            {
                return Ok(());
            }
            self.recent.keep(RecentMessage { id: ready.id(), message, sent_at });
            self.link.publish(&ready, Destination::Queue(topology::REQUEST.into())).await.map_err(SendError::from)
        };
        match sent.await {
            Ok(()) => tracing::debug!(%id, "sent a message again, for a mapper that has just started"),
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "failed to send a message again"),
        }
    }

    /// A request for `service`. It is sent when it is awaited, and returns the answers of all its targets.
    pub fn request(&self, service: &str, payload: impl Serialize) -> RequestBuilder<MapperProxy> {
        RequestBuilder::new(self.clone(), service, payload)
    }

    /// A push to `service`: a request without an answer, for the least loaded agent. It completes when the message is in the queue of the
    /// mappers.
    ///
    /// # Errors
    /// [`RequestError`] when it was not sent to the mappers.
    pub async fn push(&self, service: &str, payload: impl Serialize) -> Result<(), RequestError> {
        self.request(service, payload).push().await.map(drop)
    }

    /// Waits for the mappers to advertise themselves: messages name the processes of the mappers, and are encrypted for them. False when
    /// none did, unless their certificates are known by other means.
    async fn find_mappers(&self, limit: Duration) -> bool {
        let Some(listener) = self.listener.as_ref().filter(|_| self.link.is_secure()) else { return true };
        let is_due = listener.is_announcement_due();
        if *listener.advertised.borrow() > 0 {
            if is_due {
                let link = self.link.clone();
                tokio::spawn(async move { link.advertise_to_mappers().await });
            }
            return true;
        }
        match self.link.advertise_to_mappers().await {
            Ok(()) => wait_for_mappers(listener.advertised.clone(), limit).await,
            Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "no mapper received the advertise"),
        }
        *listener.advertised.borrow() > 0 || !self.link.learns_peers()
    }

    async fn send(&self, spec: &RequestSpec, events: Option<&Events>) -> Result<(), RequestError> {
        // The message is encrypted for the known mappers: without one, it cannot be sealed.
        if !self.find_mappers(FIND_MAPPERS_TIMEOUT.min(spec.timeout)).await {
            return Err(RequestError::NoMapper);
        }
        let mut request = Request { from: Some(self.link.identity().clone()), ..spec.request.clone() };
        request.offline = spec.offline;
        let mut lifetime = MAX_REQUEST_LIFETIME;
        let packet = match events {
            Some(events) => {
                lifetime = lifetime.min(spec.timeout);
                request.token = Some(events.request().token);
                request.deadline = Some(self.link.now().saturating_add(spec.timeout));
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
        message.persistent = spec.request.persistent.unwrap_or(false);
        let ready = self.link.seal(message.clone()).await?;
        if self.link.is_secure() {
            self.recent.keep(RecentMessage { id: ready.id(), message, sent_at: Instant::now() });
        }
        // Before it is published: the answer may arrive before the broker's confirm.
        if let Some(events) = events {
            let digest = RequestDigest::of(&spec.request.service, &spec.request.payload);
            let origin = RequestOrigin::new(self.link.identity().clone(), events.request().token, digest);
            let to = HandedOver::new(ready.id(), origin, spec.request.target.clone());
            events.pending().hand_over(events.request(), to);
        }
        match self.link.publish(&ready, Destination::Queue(topology::REQUEST.into())).await {
            Err(TransportError::Unroutable(_)) => Err(RequestError::NoMapper),
            other => Ok(other.map_err(SendError::from)?),
        }
    }
}

impl sealed::Sealed for MapperProxy {}

#[async_trait]
impl Dispatch for MapperProxy {
    async fn request(self, spec: RequestSpec) -> Result<Events, RequestError> {
        let events = Events::begin(&self.pending, Token::random()?, spec.timeout, self.clone());
        self.send(&spec, Some(&events)).await?;
        Ok(events)
    }

    async fn push(self, spec: RequestSpec) -> Result<Vec<Identity>, RequestError> {
        self.send(&spec, None).await?;
        Ok(Vec::new())
    }
}

/// Receives the answers of a proxy that is not an agent's.
async fn listen(mut answers: Subscription, proxy: MapperProxy, advertises: watch::Sender<u64>) {
    while let Some(received) = answers.next().await {
        let inbound = Received::accept(received).await;
        if matches!(inbound.packet, Packet::Advertise(_)) {
            proxy.send_again(&inbound);
        }
        if let Packet::Advertise(advertise) = &inbound.packet {
            // A mapper that does not dispatch requests of other nodes cannot help.
            if !advertise.serves_requests {
                continue;
            }
            advertises.send_modify(|heard| *heard = heard.saturating_add(1));
        } else if !proxy.answered(inbound).await {
            tracing::debug!("dropped an answer that no request waits for");
        }
    }
}
