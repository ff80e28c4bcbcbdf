//! Where a serializer meets a transport: the one hot path of agents, mappers, proxies and files.
//!
//! [`Link::send`] seals and publishes; a [`Subscription`] delivers and opens. Short work of the serializer is done on the runtime's
//! threads, long work on a bounded number of worker threads ([`Cost`]); what arrives on one queue is handed on in the order of
//! arrival. What is refused is counted, logged without its content, acknowledged and gone; what another mapper may be able to open
//! goes back to it.

mod receive;
mod refusals;
mod returned;
mod send;

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, watch};

pub use self::receive::{Received, Subscription, acknowledge};
use self::refusals::Refusals;
pub use self::send::{Outbound, SealedMessage, SendError};
use crate::audit::{AuditLog, DecisionSubject, Record};
use crate::clock::{Clock, Timestamp};
use crate::packet::{Advertise, Identity};
use crate::policy::Decision;
use crate::serializer::{Audience, Cost, OpenErrorKind, Serializer, SupersededProcess};
use crate::transport::{Destination, Exchange, Transport, topology};

/// How long one waits for the other mappers once one has made itself known.
const OTHERS: Duration = Duration::from_millis(200);
/// How many nodes wait to be spoken to since a message of theirs was refused.
const MAX_UNVERIFIED_PEERS: usize = 64;

/// A node's end of the wire. Cloning it is cheap.
#[derive(Clone, Debug)]
pub struct Link(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    identity: Identity,
    instance: u64,
    serializer: Arc<dyn Serializer>,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    /// One permit for each thread that seals or opens.
    workers: Semaphore,
    refusals: Refusals,
    audit: Option<AuditLog>,
    /// Who is to be spoken to since a message of it was refused.
    unverified_peers: Option<mpsc::Sender<UnverifiedPeer>>,
    /// Whether this node is a mapper that takes requests of other nodes.
    serves: bool,
}

/// A node whose message was refused, and that can be helped.
#[derive(Clone, Debug)]
pub(crate) enum UnverifiedPeer {
    /// It claims to be this one, and is not known: nothing about it is verified.
    Unknown(Identity),
    /// A process of this node that another has taken the place of.
    SupersededProcess(Identity, SupersededProcess),
}

/// Why a link cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the certificate is {certificate}'s, not {identity}'s")]
pub struct IdentityMismatch {
    /// Who the node is to be.
    pub identity: Identity,
    /// Whom the serializer signs for.
    pub certificate: Identity,
}

impl Link {
    /// Joins a serializer and a transport, for the node `identity`.
    ///
    /// # Errors
    /// [`IdentityMismatch`] when the serializer signs for somebody else.
    pub fn new(
        identity: Identity,
        serializer: Arc<dyn Serializer>,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, IdentityMismatch> {
        if let Some(certificate) = serializer.identity()
            && *certificate != identity
        {
            return Err(IdentityMismatch { identity, certificate: certificate.clone() });
        }
        if !serializer.is_secure() {
            tracing::warn!(%identity, format = serializer.content_type(), "messages are neither signed nor encrypted");
        }
        let instance = serializer.instance().unwrap_or_else(|| clock.now().as_micros());
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let workers = Semaphore::new(threads);
        Ok(Self(Arc::new(Inner {
            identity,
            instance,
            serializer,
            transport,
            clock,
            workers,
            refusals: Refusals::default(),
            audit: None,
            unverified_peers: None,
            serves: false,
        })))
    }

    /// The same link, and the nodes that are to be spoken to since presence messages of theirs were refused. To be asked for before
    /// the link is cloned.
    #[must_use]
    pub(crate) fn with_unverified_peers(mut self) -> (Self, Option<mpsc::Receiver<UnverifiedPeer>>) {
        match Arc::get_mut(&mut self.0) {
            Some(inner) => {
                let (sender, receiver) = mpsc::channel(MAX_UNVERIFIED_PEERS);
                inner.unverified_peers = Some(sender);
                (self, Some(receiver))
            }
            None => (self, None),
        }
    }

    /// The same link, for a mapper that takes requests of other nodes, or does not. To be given before the link is cloned.
    #[must_use]
    pub(crate) fn serving(mut self, serves: bool) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.serves = serves;
        }
        self
    }

    /// Whether this node is a mapper that takes requests of other nodes.
    pub(crate) fn serves(&self) -> bool {
        self.0.serves
    }

    /// The same link, with an audit log of what it opens and refuses. To be given before the link is cloned.
    #[must_use]
    pub fn with_audit(mut self, audit: Option<AuditLog>) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.audit = audit;
        }
        self
    }

    /// Records what was decided about a message that this node opened.
    pub async fn decided(&self, asked: DecisionSubject<'_>, decision: &Decision) {
        if let Some(audit) = &self.0.audit {
            audit.record(Record::decided(&self.0.identity, self.now(), &asked, decision)).await;
        }
    }

    /// Who this node is.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// The instance of this process.
    pub fn instance(&self) -> u64 {
        self.0.instance
    }

    /// The clock.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.clock
    }

    /// The moment it is now.
    pub fn now(&self) -> Timestamp {
        self.0.clock.now()
    }

    /// Whether messages are signed and encrypted.
    pub fn is_secure(&self) -> bool {
        self.0.serializer.is_secure()
    }

    /// Whether this node comes to know others by what they send.
    pub fn learns_peers(&self) -> bool {
        self.0.serializer.learns_peers()
    }

    /// Makes this node known to the mappers, which answer with an advertise of theirs. It holds no secret, and needs to know nobody.
    /// Does nothing when this node learns nobody from messages.
    ///
    /// # Errors
    /// [`SendError`] when it could not be sent: [`Unroutable`](crate::transport::TransportError::Unroutable) when no mapper runs.
    pub async fn announce_to_mappers(&self) -> Result<(), SendError> {
        if self.learns_peers() { self.advertise_to_mappers().await } else { Ok(()) }
    }

    /// The same, also when this node learns nobody from messages: the mappers answer in any case.
    ///
    /// # Errors
    /// As [`announce_to_mappers`](Self::announce_to_mappers).
    pub(crate) async fn advertise_to_mappers(&self) -> Result<(), SendError> {
        let hello = Advertise { serves_requests: self.0.serves, ..Advertise::default() };
        let hello = Outbound::new(hello, Audience::Mappers);
        self.send(hello, Destination::Exchange(Exchange(topology::REGISTRATION.into()))).await?;
        Ok(())
    }

    /// The transport.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.0.transport
    }

    /// How many messages were refused at each step since the start.
    pub fn refusals(&self) -> Vec<(OpenErrorKind, u64)> {
        self.0.refusals.counts()
    }

    /// Runs work of the serializer: here, or on one of the workers. None when the runtime stops.
    async fn work<T: Send + 'static>(&self, cost: Cost, work: impl FnOnce(&Inner) -> T + Send + 'static) -> Option<T> {
        let here = match cost {
            Cost::Trivial => true,
            Cost::Short => Handle::try_current().is_ok_and(|runtime| runtime.metrics().num_workers() > 1),
            Cost::Long => false,
        };
        if here {
            return Some(work(&self.0));
        }
        let _permit = self.0.workers.acquire().await.ok()?;
        let inner = self.0.clone();
        tokio::task::spawn_blocking(move || work(&inner)).await.ok()
    }
}

/// Waits until a mapper has made itself known and a moment has passed in which others could, or until `limit` has passed: what is
/// sealed for the mappers is for those that are known. `advertised` counts them.
pub(crate) async fn mappers_known(mut advertised: watch::Receiver<u64>, limit: Duration) {
    let heard = async {
        if advertised.wait_for(|heard| *heard > 0).await.is_ok() {
            while matches!(tokio::time::timeout(OTHERS, advertised.changed()).await, Ok(Ok(()))) {}
        }
    };
    if tokio::time::timeout(limit, heard).await.is_err() {
        tracing::debug!("no mapper has made itself known");
    }
}
