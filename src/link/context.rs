//! What a link is made of: who the node is, how it seals, where its bytes go, and how refused messages are counted and logged.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};

use crate::audit::{AuditLog, DecisionSubject, Record};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::limits::{LogDecision, LogLimit};
use crate::packet::Identity;
use crate::policy::Decision;
use crate::serializer::{
    Audience, Cost, InboundQueue, NotAddressed, OpenError, OpenErrorKind, Serializer, SupersededProcess,
};
use crate::transport::Transport;

/// How many unverified peers wait for an answer. More are skipped; they are heard again.
const MAX_UNVERIFIED_PEERS: usize = 64;
/// How many processes of mappers are remembered.
const MAX_MAPPER_INSTANCES: usize = Audience::MAX;
/// How many of one mapper: a short command of it runs again and again.
const MAX_INSTANCES_PER_MAPPER: usize = 8;
/// How long a mapper's process is named in messages to the mappers. More than twice the skew of clocks.
const MAPPER_LIFETIME: Duration = Duration::from_secs(120);
/// How many refusals are logged per second; all are counted.
const MAX_LOGGED_PER_SECOND: u64 = 20;

/// A node's sending and receiving end. Cloning it is cheap.
#[derive(Clone, Debug)]
pub struct Link(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    instance: u64,
    pub serializer: Arc<dyn Serializer>,
    pub transport: Arc<dyn Transport>,
    pub clock: Arc<dyn Clock>,
    /// One permit for each thread that seals or opens.
    pub workers: Semaphore,
    pub refusals: Refusals,
    pub mappers: MapperInstances,
    pub audit: Option<AuditLog>,
    /// Receives the peers whose messages were refused and that an answer can help.
    pub unverified_peers: Option<mpsc::Sender<UnverifiedPeer>>,
    serves_requests: bool,
}

/// A peer whose message was refused, and that an answer can help.
#[derive(Clone, Debug)]
pub(crate) enum UnverifiedPeer {
    /// Its certificate is unknown here. Its identity is a claim: nothing about it is verified.
    Unknown(Identity),
    /// A process that a newer process of the same identity has replaced.
    Superseded(Identity, SupersededProcess),
    /// The verified sender of a message that does not name this process, which has just started.
    NotAddressed(Identity, NotAddressed),
}

/// Builds a [`Link`].
#[derive(Debug)]
pub struct LinkBuilder {
    serializer: Arc<dyn Serializer>,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    audit: Option<AuditLog>,
    unverified_peers: Option<mpsc::Sender<UnverifiedPeer>>,
    serves_requests: bool,
}

impl LinkBuilder {
    /// The clock; the system clock by default.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Records every accepted and refused message, and every decision, in this log; none by default.
    #[must_use]
    pub fn audit(mut self, log: impl Into<Option<AuditLog>>) -> Self {
        self.audit = log.into();
        self
    }

    /// Whether this node is a mapper that dispatches requests of other nodes; false by default.
    #[must_use]
    pub(crate) fn serves_requests(mut self, serves: bool) -> Self {
        self.serves_requests = serves;
        self
    }

    /// Reports unverified peers to the returned channel.
    pub(crate) fn unverified_peers(mut self) -> (Self, mpsc::Receiver<UnverifiedPeer>) {
        let (sender, receiver) = mpsc::channel(MAX_UNVERIFIED_PEERS);
        self.unverified_peers = Some(sender);
        (self, receiver)
    }

    /// Builds the link. Logs a warning when messages will be neither signed nor encrypted.
    pub fn build(self) -> Link {
        let verification = self.serializer.verification();
        if verification.is_none() {
            let (identity, format) = (self.serializer.identity(), self.serializer.content_type());
            tracing::warn!(%identity, format, "messages are neither signed nor encrypted");
        }
        let instance =
            verification.map_or_else(|| self.clock.now().as_micros(), |verification| verification.instance());
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        Link(Arc::new(Inner {
            instance,
            serializer: self.serializer,
            transport: self.transport,
            clock: self.clock,
            workers: Semaphore::new(threads),
            refusals: Refusals::default(),
            mappers: MapperInstances::default(),
            audit: self.audit,
            unverified_peers: self.unverified_peers,
            serves_requests: self.serves_requests,
        }))
    }
}

impl Link {
    /// Joins a serializer and a transport. The node is the one that the serializer seals for.
    ///
    /// ```
    /// use nanite::link::Link;
    /// use nanite::packet::Identity;
    /// use nanite::serializer::PlainSerializer;
    /// use nanite::transport::MemoryBroker;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let serializer = PlainSerializer::json(Identity::agent("fred")?);
    /// let link = Link::builder(serializer, MemoryBroker::new().connect()).build();
    /// assert_eq!(link.identity().as_str(), "nanite-fred");
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(serializer: impl Serializer + 'static, transport: impl Transport + 'static) -> LinkBuilder {
        LinkBuilder {
            serializer: Arc::new(serializer),
            transport: Arc::new(transport),
            clock: Arc::new(SystemClock),
            audit: None,
            unverified_peers: None,
            serves_requests: false,
        }
    }

    /// Whether this node is a mapper that dispatches requests of other nodes.
    pub(crate) fn serves_requests(&self) -> bool {
        self.0.serves_requests
    }

    /// Records a decision about a message that this node opened.
    pub async fn audit_decision(&self, subject: DecisionSubject<'_>, decision: &Decision) {
        if let Some(audit) = &self.0.audit {
            audit.record(Record::decided(self.identity(), self.now(), &subject, decision)).await;
        }
    }

    /// The identity of this node.
    pub fn identity(&self) -> &Identity {
        self.0.serializer.identity()
    }

    /// The instance of this process: its start, in microseconds since the epoch.
    pub fn instance(&self) -> u64 {
        self.0.instance
    }

    /// The clock.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.clock
    }

    /// The current time.
    pub fn now(&self) -> Timestamp {
        self.0.clock.now()
    }

    /// Whether messages are signed and encrypted.
    pub fn is_secure(&self) -> bool {
        self.0.serializer.verification().is_some()
    }

    /// Whether this node learns the certificates of its peers from their messages.
    pub fn learns_peers(&self) -> bool {
        self.0.serializer.verification().is_some_and(|verification| verification.learns_peers())
    }

    /// The transport.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.0.transport
    }

    /// How many messages were refused at each step since the start.
    pub fn refusals(&self) -> Vec<(OpenErrorKind, u64)> {
        self.0.refusals.counts()
    }

    /// Calls the serializer: on this thread, or on a worker thread. None when the runtime shuts down.
    pub(super) async fn work<T: Send + 'static>(
        &self,
        cost: Cost,
        work: impl FnOnce(&Inner) -> T + Send + 'static,
    ) -> Option<T> {
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

/// The processes of mappers that have advertised themselves lately. Messages to the mappers name them.
///
/// A mapper needs to be named only while it is new: [`MAPPER_LIFETIME`] after it was heard, it accepts messages that do not name it. One
/// that is missing here asks for the message again.
#[derive(Debug, Default)]
pub(super) struct MapperInstances(Mutex<VecDeque<(Identity, u64, Timestamp)>>);

impl MapperInstances {
    /// A mapper's process has been heard. It replaces the one that was heard first of the same mapper, or of all, when there are too many.
    pub fn heard(&self, mapper: &Identity, instance: u64, now: Timestamp) {
        let mut heard = self.0.lock();
        heard.retain(|(_, known, at)| *known != instance && now.since(*at) <= MAPPER_LIFETIME);
        let same = || heard.iter().enumerate().filter(|(_, (known, _, _))| known == mapper);
        let excess =
            if same().count() >= MAX_INSTANCES_PER_MAPPER { same().map(|(index, _)| index).next() } else { None };
        if let Some(excess) = excess {
            heard.remove(excess);
        } else if heard.len() >= MAX_MAPPER_INSTANCES {
            heard.pop_front();
        }
        heard.push_back((mapper.clone(), instance, now));
    }

    /// The instances to name.
    pub fn recent(&self, now: Timestamp) -> Vec<u64> {
        let heard = self.0.lock();
        heard.iter().filter(|(_, _, at)| now.since(*at) <= MAPPER_LIFETIME).map(|(_, instance, _)| *instance).collect()
    }
}

/// Counts and logs refused messages: always counted, logged up to a limit, never with their content.
#[derive(Debug)]
pub(super) struct Refusals {
    by_kind: [AtomicU64; OpenErrorKind::ALL.len()],
    log_limit: LogLimit,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { by_kind: Default::default(), log_limit: LogLimit::new(MAX_LOGGED_PER_SECOND) }
    }
}

impl Refusals {
    pub(super) fn count(&self, kind: OpenErrorKind) {
        if let Some(count) = self.by_kind.get(kind as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn log(
        &self,
        identity: &Identity,
        error: &OpenError,
        channel: InboundQueue,
        redelivered: bool,
        now: Timestamp,
    ) {
        if redelivered && error.kind == OpenErrorKind::Replayed {
            tracing::debug!(%identity, "refused a redelivered message that was opened before");
            return;
        }
        match self.log_limit.next(now) {
            LogDecision::Suppressing => {
                tracing::warn!(%identity, "more messages refused in this second; they are counted but not logged")
            }
            LogDecision::Log => tracing::warn!(
                %identity,
                kind = %error.kind,
                why = %error.why,
                claimed = error.claimed.as_ref().map(tracing::field::display),
                ?channel,
                "message refused"
            ),
            LogDecision::Skip => {}
        }
    }

    pub(super) fn counts(&self) -> Vec<(OpenErrorKind, u64)> {
        OpenErrorKind::ALL.into_iter().zip(&self.by_kind).map(|(kind, n)| (kind, n.load(Ordering::Relaxed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapper(number: usize) -> Identity {
        Identity::mapper(&format!("m{number}")).unwrap()
    }

    #[test]
    fn s06_processes_of_mappers_are_named_for_a_while_and_up_to_a_number() {
        let at = Timestamp::from_secs;
        let heard = MapperInstances::default();
        heard.heard(&mapper(1), 7, at(100));
        heard.heard(&mapper(1), 8, at(101));
        assert_eq!(heard.recent(at(220)), [7, 8]);
        assert_eq!(heard.recent(at(221)), [8]);
        heard.heard(&mapper(1), 8, at(200));
        assert_eq!(heard.recent(at(320)), [8], "heard again");

        // Many processes of one mapper do not displace the others.
        heard.heard(&mapper(2), 9, at(320));
        (100..200).for_each(|instance| heard.heard(&mapper(1), instance, at(320)));
        assert_eq!(heard.recent(at(320)), [9, 192, 193, 194, 195, 196, 197, 198, 199]);
        (1_000..2_000).for_each(|instance| heard.heard(&mapper(instance), instance as u64, at(320)));
        let recent = heard.recent(at(320));
        assert_eq!((recent.len(), recent.first(), recent.last()), (64, Some(&1_936), Some(&1_999)));
    }
}
