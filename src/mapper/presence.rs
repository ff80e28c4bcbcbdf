//! The mapper's tasks that follow agents and other mappers: registrations, heartbeats, timeouts, advertisements, and processes that
//! run under one identity at the same time.

use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::registry::{AgentEvent, RegistrationRequest, Shared};
use super::state::{AgentRecord, Heartbeat};
use crate::audit::DecisionSubject;
use crate::clock::Timestamp;
use crate::limits::nonzero;
use crate::link::{Outbound, SendError, Subscription, UnverifiedPeer};
use crate::packet::{Advertise, DuplicateInstance, Identity, Kind, Packet, Ping, Register, Role, Unregister};
use crate::policy::Caller;
use crate::serializer::{NotAddressed, Verified};
use crate::transport::{Destination, TransportError, topology};

/// The shortest time between two messages to the same node because of what it sent.
const REPLY_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest time between two messages to any nodes whose messages were refused. Any sender can cause them.
const UNVERIFIED_REPLY_INTERVAL: Duration = Duration::from_millis(50);
/// The shortest time between two messages to the same node whose messages were refused.
const UNVERIFIED_PEER_INTERVAL: Duration = Duration::from_secs(5);
/// How often a mapper advertises itself to other mappers.
const ADVERTISE_INTERVAL: Duration = Duration::from_secs(300);
/// The most requests of one node, in [`REPLY_INTERVAL`], that it is asked to send again.
const MAX_REQUEST_REPLIES: u32 = 100;
/// The most nodes that are remembered to keep the intervals above.
const MAX_RECENT_REPLIES: usize = 4096;
/// The most agents whose newest instance is remembered.
const MAX_INSTANCES: usize = 100_000;
/// The most other mapper processes of this identity that are remembered as logged.
const MAX_LOGGED_MAPPERS: usize = 256;

/// Handles registrations, heartbeats and the advertisements of nodes that start.
pub(super) async fn handle_presence(shared: Arc<Shared>, mut messages: Subscription) {
    let mut registration_requests = RecentReplies::default();
    let mut advertisement_replies = RecentReplies::default();
    let mut instances = Instances::default();
    while let Some(received) = messages.next().await {
        let inbound = received.accept().await;
        let (Some(sender), signer) = (inbound.sender().cloned(), inbound.signer()) else { continue };
        match &inbound.packet {
            Packet::Register(register) => {
                let instance = signer.map(Verified::instance).or(register.instance);
                if shared.register(register, &sender, signer).await
                    && let Some(instance) = instance
                {
                    instances.registered(&shared, &sender, instance).await;
                }
            }
            Packet::Unregister(unregister) => {
                instances.unregistered(&sender, signer.map(Verified::instance));
                shared.unregister(unregister, &sender, signer).await;
            }
            Packet::Ping(ping) => {
                let now = shared.link.now();
                if !shared.heartbeat(ping, signer, now).await
                    && registration_requests.is_due((sender.clone(), None), now, REPLY_INTERVAL)
                {
                    let instance = signer.map(Verified::instance).or(ping.instance);
                    shared.request_registration(RegistrationRequest::to(sender, instance)).await;
                }
            }
            Packet::Advertise(advertise) => {
                let Some(instance) = signer.map(Verified::instance) else { continue };
                let is_self = sender == *shared.link.identity() && instance == shared.link.instance();
                if !is_self
                    && advertisement_replies.is_due((sender.clone(), Some(instance)), shared.link.now(), REPLY_INTERVAL)
                {
                    instances.mapper_advertised(&shared, &sender, instance, advertise);
                    let duplicate = instances.other_running_process(&shared, &sender, instance).await;
                    if let Err(error) = shared.advertise_to(&sender, instance, duplicate).await {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(error, node = %sender, "failed to answer an advertisement");
                    }
                }
            }
            _ => {}
        }
    }
}

/// Passes answers to the requests that wait for them.
pub(super) async fn receive_answers(shared: Arc<Shared>, mut messages: Subscription) {
    let mut instances = Instances::default();
    while let Some(received) = messages.next().await {
        let inbound = received.accept().await;
        if let Packet::Advertise(advertise) = &inbound.packet {
            if let (Some(sender), Some(signer)) = (inbound.sender(), inbound.signer()) {
                instances.mapper_advertised(&shared, sender, signer.instance(), advertise);
            }
            shared.advertisements.send_modify(|count| *count = count.saturating_add(1));
        } else if !shared.pending.answered(&shared.link, inbound).await {
            tracing::debug!("received an answer that no request waits for");
        }
    }
}

/// Advertises this mapper to other mappers, now and every [`ADVERTISE_INTERVAL`].
pub(super) async fn advertise_regularly(shared: Arc<Shared>) {
    let mut ticks = interval(ADVERTISE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = shared.link.announce_to_mappers().await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "failed to advertise this mapper to other mappers");
        }
    }
}

/// Answers agents whose messages were refused.
///
/// An agent whose certificate is unknown is asked to register: it may have been disconnected when this mapper started. Only that
/// agent can answer, with its certificate. Any sender can use an agent's name, so the rate is limited. A process that was
/// replaced by a newer one is told so. The sender of a message that does not name this new process learns of it, and sends the message
/// again.
pub(super) async fn answer_unverified_peers(shared: Arc<Shared>, mut peers: mpsc::Receiver<UnverifiedPeer>) {
    let mut answered = RecentReplies::default();
    let mut not_addressed = NotAddressedReplies::default();
    let mut ticks = interval(UNVERIFIED_REPLY_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while let Some(peer) = peers.recv().await {
        let (identity, superseded) = match peer {
            UnverifiedPeer::Unknown(identity) => (identity, None),
            UnverifiedPeer::Superseded(identity, superseded) => (identity, Some(superseded)),
            UnverifiedPeer::NotAddressed(identity, message) => {
                if not_addressed.is_due(&identity, &message, shared.link.now()) {
                    introduce(&shared, &identity, message).await;
                }
                continue;
            }
        };
        let process = (identity.clone(), superseded.map(|superseded| superseded.instance));
        if identity.role() != Role::Agent || !answered.is_due(process, shared.link.now(), UNVERIFIED_PEER_INTERVAL) {
            continue;
        }
        ticks.tick().await;
        match superseded {
            None => shared.request_registration(RegistrationRequest::Agent(identity)).await,
            Some(superseded) => notify_replaced(&shared, &identity, superseded.instance, superseded.latest).await,
        }
    }
}

/// Tells the sender of a message that does not name this process about it: an agent registers again, and requests are sent again.
async fn introduce(shared: &Shared, sender: &Identity, message: NotAddressed) {
    let queue = topology::process_queue_name(sender.as_str(), message.instance);
    let advertise =
        Advertise { target: Some(sender.clone()), duplicate: None, serves_requests: shared.link.serves_requests() };
    let advertise =
        Outbound::new(advertise, sender.clone()).instances([message.instance]).in_reply_to(Some(message.id));
    match shared.link.send(advertise, Destination::Queue(queue)).await {
        Ok(_) | Err(SendError::Transport(TransportError::Unroutable(_))) => {}
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, node = %sender, "failed to ask for a message again");
        }
    }
}

/// Removes agents that were silent for longer than the agent timeout.
pub(super) async fn remove_silent_agents(shared: Arc<Shared>) {
    let period = (shared.agent_timeout / 4).clamp(Duration::from_millis(5), Duration::from_secs(5));
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut waited) = (shared.link.now(), false);
    loop {
        ticks.tick().await;
        // After a pause of this process, or when its clock has jumped, the agents' heartbeats are read first.
        let now = shared.link.now();
        waited = !waited && now.since(last) > period * 2;
        last = now;
        if waited {
            continue;
        }
        match shared.state.reap(shared.silent_since()).await {
            Ok(silent) => {
                for record in silent {
                    tracing::debug!(agent = %record.identity, "agent timed out");
                    shared.pending.lost(&record.identity, None);
                    shared.emit(&AgentEvent::TimedOut(record));
                }
            }
            Err(error) => tracing::warn!(%error, "failed to look for silent agents"),
        }
    }
}

/// Wakes requests that wait for an agent when the state has discovered one.
pub(super) async fn watch_state(shared: Arc<Shared>) {
    loop {
        shared.state.agent_discovered().await;
        shared.agents_changed.notify_waiters();
    }
}

impl Shared {
    /// Stores an agent's registration; returns whether it was accepted.
    async fn register(&self, register: &Register, sender: &Identity, signer: Option<&Verified>) -> bool {
        if !register.within_limits() {
            tracing::warn!(agent = %sender, "registration refused: too many services or tags");
            return false;
        }
        if !self.may_register(Kind::Register, register, sender, signer).await {
            return false;
        }
        let instance = signer.map(Verified::instance).or(register.instance).unwrap_or(0);
        let proof = signer.and_then(|signer| signer.proof().cloned());
        let record = AgentRecord::new(register.clone(), instance, self.link.now(), proof)
            .with_sequence(signer.map_or(0, Verified::sequence));
        if let Err(error) = self.state.register(record.clone()).await {
            tracing::warn!(agent = %sender, %error, "failed to store a registration");
            return false;
        }
        // Earlier processes of the agent will not answer any more.
        self.pending.lost(sender, Some(instance));
        self.agents_changed.notify_waiters();
        self.emit(&AgentEvent::Registered(Arc::new(record)));
        true
    }

    async fn unregister(&self, unregister: &Unregister, sender: &Identity, signer: Option<&Verified>) {
        let register = Register {
            identity: unregister.identity.clone(),
            services: Vec::new(),
            status: Default::default(),
            tags: Vec::new(),
            files: Vec::new(),
            instance: None,
        };
        if !self.may_register(Kind::Unregister, &register, sender, signer).await {
            return;
        }
        // Pending requests stay: an agent that stops still answers them.
        match self.state.remove(sender, signer.map(Verified::instance)).await {
            Ok(true) => self.emit(&AgentEvent::Unregistered(sender.clone())),
            Ok(false) => {}
            Err(error) => tracing::warn!(agent = %sender, %error, "failed to remove an agent"),
        }
    }

    /// Stores a heartbeat; returns false if the agent has to register first.
    async fn heartbeat(&self, ping: &Ping, signer: Option<&Verified>, now: Timestamp) -> bool {
        let instance = signer.map(Verified::instance).or(ping.instance).unwrap_or(0);
        let mut heartbeat = Heartbeat::new(&ping.identity, instance, ping.status, now);
        heartbeat.sequence = signer.map_or(0, Verified::sequence);
        heartbeat.proof = signer.and_then(Verified::proof);
        self.state.heartbeat(heartbeat).await.unwrap_or_else(|error| {
            tracing::warn!(agent = %ping.identity, %error, "failed to store a heartbeat");
            true
        })
    }

    async fn may_register(
        &self,
        kind: Kind,
        register: &Register,
        sender: &Identity,
        signer: Option<&Verified>,
    ) -> bool {
        let decision = self.policy.authorize_registration(&Caller::new(sender, signer), register);
        let subject = DecisionSubject::new(kind, sender).id(signer.map(Verified::id));
        self.link.audit_decision(subject, &decision).await;
        if !decision.allowed {
            tracing::warn!(agent = %sender, reason = decision.reason, rule = decision.rule, "registration denied");
        }
        decision.allowed
    }
}

/// When nodes were last sent a message, to limit the rate.
#[derive(Debug)]
struct RecentReplies(LruCache<(Identity, Option<u64>), Timestamp>);

impl Default for RecentReplies {
    fn default() -> Self {
        Self(LruCache::new(nonzero(MAX_RECENT_REPLIES)))
    }
}

impl RecentReplies {
    /// Whether `interval` has passed since the last call for this process. Starts the interval again in any case.
    fn is_due(&mut self, process: (Identity, Option<u64>), now: Timestamp, interval: Duration) -> bool {
        self.0.put(process, now).is_none_or(|last| now.since(last) >= interval)
    }
}

/// Limits the answers to messages that do not name this process. A replayed registration is answered as seldom as any; each request has an
/// answer of its own, because its sender repeats that one.
#[derive(Debug)]
struct NotAddressedReplies {
    registrations: RecentReplies,
    requests: LruCache<Identity, (Timestamp, u32)>,
}

impl Default for NotAddressedReplies {
    fn default() -> Self {
        Self { registrations: RecentReplies::default(), requests: LruCache::new(nonzero(MAX_RECENT_REPLIES)) }
    }
}

impl NotAddressedReplies {
    fn is_due(&mut self, sender: &Identity, message: &NotAddressed, now: Timestamp) -> bool {
        if !matches!(message.kind, Kind::Request | Kind::Push) {
            let process = (sender.clone(), Some(message.instance));
            return self.registrations.is_due(process, now, REPLY_INTERVAL);
        }
        let (since, count) = self.requests.get_or_insert_mut(sender.clone(), || (now, 0));
        if now.since(*since) >= REPLY_INTERVAL {
            (*since, *count) = (now, 0);
        }
        *count = count.saturating_add(1);
        *count <= MAX_REQUEST_REPLIES
    }
}

/// The newest process of each agent, to detect two that run at the same time.
///
/// The newest process of an agent wins. The mappers tell both processes, and the older one exits. Whether a process still runs is
/// seen by its control queue, which is deleted with it: an agent that was restarted has no duplicate. Several mapper processes of one
/// identity work side by side; each logs the others.
#[derive(Debug)]
struct Instances {
    newest: LruCache<Identity, u64>,
    logged_mappers: LruCache<u64, ()>,
}

impl Default for Instances {
    fn default() -> Self {
        // `newest` is bounded by hand: an LruCache with a capacity allocates all of it at once.
        Self { newest: LruCache::unbounded(), logged_mappers: LruCache::new(nonzero(MAX_LOGGED_MAPPERS)) }
    }
}

impl Instances {
    /// A process of an agent has registered.
    async fn registered(&mut self, shared: &Shared, agent: &Identity, instance: u64) {
        let previous = self.newest.put(agent.clone(), instance);
        if self.newest.len() > MAX_INSTANCES {
            self.newest.pop_lru();
        }
        match previous {
            Some(previous) if previous < instance => notify_replaced(shared, agent, previous, instance).await,
            // Only with plain formats: a signed message of an older process is refused.
            Some(previous)
                if previous > instance
                    && notify_process(shared, agent, previous, DuplicateInstance { instance, replaced: false })
                        .await =>
            {
                self.newest.put(agent.clone(), previous);
                notify_replaced(shared, agent, instance, previous).await;
            }
            _ => {}
        }
    }

    /// A process of an agent has unregistered.
    fn unregistered(&mut self, agent: &Identity, instance: Option<u64>) {
        if self.newest.peek(agent).is_some_and(|newest| instance.is_none_or(|instance| *newest <= instance)) {
            self.newest.pop(agent);
        }
    }

    /// The registered process of an agent, if it still runs while another one, `instance`, starts. It is told about the new one.
    async fn other_running_process(
        &mut self,
        shared: &Shared,
        agent: &Identity,
        instance: u64,
    ) -> Option<DuplicateInstance> {
        let other = self.newest.peek(agent).copied().filter(|newest| *newest != instance)?;
        // Neither is replaced yet: the registration of the new process, or a message of the other, decides it.
        let runs = notify_process(shared, agent, other, DuplicateInstance { instance, replaced: false }).await;
        runs.then_some(DuplicateInstance { instance: other, replaced: false })
    }

    /// A mapper has advertised itself. Another process of this mapper is logged, once.
    fn mapper_advertised(&mut self, shared: &Shared, sender: &Identity, instance: u64, advertise: &Advertise) {
        let link = &shared.link;
        let is_duplicate = sender == link.identity()
            && instance != link.instance()
            && advertise.serves_requests
            && link.serves_requests();
        if is_duplicate && self.logged_mappers.put(instance, ()).is_none() {
            tracing::warn!(
                "another process of {sender} also takes requests, started {}: both work, but logs and policies cannot tell them \
                 apart; give each mapper its own name",
                started_at(instance)
            );
        }
    }
}

/// A newer process of an agent has replaced an older one. If the older one still runs, tells both.
async fn notify_replaced(shared: &Shared, agent: &Identity, older: u64, newer: u64) {
    if notify_process(shared, agent, older, DuplicateInstance { instance: newer, replaced: true }).await {
        tracing::warn!(
            "two processes of {agent} were running: the one started {} replaces the one started {}",
            started_at(newer),
            started_at(older)
        );
        notify_process(shared, agent, newer, DuplicateInstance { instance: older, replaced: true }).await;
    }
}

/// Tells a process of an agent about another one; returns whether the process runs.
async fn notify_process(shared: &Shared, agent: &Identity, instance: u64, duplicate: DuplicateInstance) -> bool {
    // Short-lived mappers leave this to the others.
    if agent.role() != Role::Agent || !shared.link.serves_requests() {
        return false;
    }
    match shared.advertise_to(agent, instance, Some(duplicate)).await {
        Ok(()) => true,
        Err(SendError::Transport(TransportError::Unroutable(_))) => false,
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, %agent, "failed to tell a process about a duplicate");
            false
        }
    }
}

/// An instance number is the start time of the process in microseconds.
fn started_at(instance: u64) -> Timestamp {
    Timestamp::from_micros(instance)
}
