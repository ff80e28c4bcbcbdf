//! A running mapper: it listens to agents, takes their answers in, and forgets the silent ones.

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::duplicates::{self, DuplicateInstances};
use super::state::{AgentRecord, Heartbeat};
use super::{AgentEvent, Shared};
use crate::audit::DecisionSubject;
use crate::clock::Timestamp;
use crate::link::{Outbound, SendError, Subscription, UnverifiedPeer};
use crate::packet::{Advertise, DuplicateInstance, Identity, Kind, Packet, Ping, Register, Role, Unregister};
use crate::policy::Caller;
use crate::serializer::{Audience, Verified};
use crate::transport::{Destination, Exchange, topology};

/// How often one unknown agent is asked to register, at most.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How often somebody is asked whose message could not be verified, at most.
const ASK_UNKNOWN: Duration = Duration::from_millis(50);
/// How often the same one is asked, at most.
const ASK_UNKNOWN_AGAIN: Duration = Duration::from_secs(5);
/// How often a mapper makes itself known to others again.
const HELLO: Duration = Duration::from_secs(300);
/// How many unknown agents are remembered as asked.
const ASKED: usize = 4096;

/// Listens to registrations and heartbeats.
pub(super) async fn presence(shared: Arc<Shared>, mut messages: Subscription) {
    let mut asked = LruCache::new(NonZeroUsize::new(ASKED).unwrap_or(NonZeroUsize::MIN));
    let mut answered = LruCache::new(NonZeroUsize::new(ASKED).unwrap_or(NonZeroUsize::MIN));
    let mut duplicates = DuplicateInstances::default();
    while let Some(received) = messages.next().await {
        let inbound = received.accept().await;
        let (Some(sender), signer) = (inbound.sender().cloned(), inbound.signer()) else { continue };
        match &inbound.packet {
            Packet::Register(register) => {
                let instance = signer.map(Verified::instance).or(register.instance);
                if shared.register(register, &sender, signer).await
                    && let Some(instance) = instance
                {
                    duplicates.registered(&shared, &sender, instance).await;
                }
            }
            Packet::Unregister(unregister) => {
                duplicates.left(&sender, signer.map(Verified::instance));
                shared.unregister(unregister, &sender, signer).await;
            }
            Packet::Ping(ping) => {
                let now = shared.link.now();
                if !shared.ping(ping, signer, now).await
                    && asked.put(sender.clone(), now).is_none_or(|before| now.since(before) >= ASK_AGAIN)
                {
                    shared.ask(Some((sender, signer.map(Verified::instance).or(ping.instance)))).await;
                }
            }
            // A node makes itself known, and is told who this is.
            Packet::Advertise(advertise) => {
                let Some(instance) = signer.map(Verified::instance) else { continue };
                let own = sender == *shared.link.identity() && instance == shared.link.instance();
                let now = shared.link.now();
                let process = (sender.clone(), instance);
                if !own && answered.put(process, now).is_none_or(|before| now.since(before) >= ASK_AGAIN) {
                    duplicates.mapper(&shared, &sender, instance, advertise);
                    let duplicate = duplicates.before(&shared, &sender, instance).await;
                    shared.ask_process(&sender, instance, duplicate).await;
                }
            }
            _ => {}
        }
    }
}

/// Takes answers in.
pub(super) async fn answers(shared: Arc<Shared>, mut messages: Subscription) {
    let mut duplicates = DuplicateInstances::default();
    while let Some(received) = messages.next().await {
        let inbound = received.accept().await;
        if let Packet::Advertise(advertise) = &inbound.packet {
            if let (Some(sender), Some(signer)) = (inbound.sender(), inbound.signer()) {
                duplicates.mapper(&shared, sender, signer.instance(), advertise);
            }
            shared.advertised.send_modify(|heard| *heard = heard.saturating_add(1));
        } else if !shared.jobs.answered(inbound) {
            tracing::debug!("an answer that nobody waits for");
        }
    }
}

/// Makes this mapper known to the others, from time to time again.
pub(super) async fn hellos(shared: Arc<Shared>) {
    let mut ticks = interval(HELLO);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = shared.link.announce_to_mappers().await {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot make this mapper known to others");
        }
    }
}

/// Speaks to nodes whose messages were refused.
///
/// Who is not known is asked who it is: an agent that was away when this mapper came. Only the one who is asked answers, with its
/// certificate. Who asks for it is anybody, so it is done seldom. A process that another has taken the place of is told so.
pub(super) async fn unverified_peers(shared: Arc<Shared>, mut unverified_peers: mpsc::Receiver<UnverifiedPeer>) {
    let mut spoken_to = LruCache::new(NonZeroUsize::new(ASKED).unwrap_or(NonZeroUsize::MIN));
    let mut ticks = interval(ASK_UNKNOWN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while let Some(peer) = unverified_peers.recv().await {
        let now = shared.link.now();
        let (identity, superseded) = match peer {
            UnverifiedPeer::Unknown(identity) => (identity, None),
            UnverifiedPeer::Superseded(identity, superseded) => (identity, Some(superseded)),
        };
        let process = (identity.clone(), superseded.map(|superseded| superseded.instance));
        let is_due = |before: Timestamp| now.since(before) >= ASK_UNKNOWN_AGAIN;
        if identity.role() != Role::Agent || !spoken_to.put(process, now).is_none_or(is_due) {
            continue;
        }
        ticks.tick().await;
        match superseded {
            None => shared.ask(Some((identity, None))).await,
            Some(superseded) => duplicates::replaced(&shared, &identity, superseded.instance, superseded.latest).await,
        }
    }
}

/// Forgets the silent ones.
pub(super) async fn reaper(shared: Arc<Shared>) {
    let mut ticks = interval((shared.agent_timeout / 4).clamp(Duration::from_millis(5), Duration::from_secs(5)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match shared.state.reap(shared.silent_since()).await {
            Ok(silent) => {
                for record in silent {
                    tracing::debug!(agent = %record.identity, "silent for too long");
                    shared.jobs.lost(&record.identity, None);
                    shared.tell(&AgentEvent::TimedOut(record));
                }
            }
            Err(error) => tracing::warn!(%error, "silent agents cannot be looked up"),
        }
    }
}

/// Tells whoever waits for an agent that one is known from elsewhere.
pub(super) async fn elsewhere(shared: Arc<Shared>) {
    loop {
        shared.state.learnt().await;
        shared.changed.notify_waiters();
    }
}

impl Shared {
    /// Agents that were last heard before this moment are gone.
    pub(super) fn silent_since(&self) -> Timestamp {
        self.link.now().saturating_sub(self.agent_timeout)
    }

    /// Asks one agent to register, or all; that it cannot be done is logged.
    pub(super) async fn ask(&self, whom: Option<(Identity, Option<u64>)>) {
        if let Err(error) = self.advertise(whom).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "agents could not be asked to register");
        }
    }

    /// Asks one agent to register, or all.
    pub(super) async fn advertise(&self, whom: Option<(Identity, Option<u64>)>) -> Result<(), SendError> {
        let (audience, destination, target) = match whom {
            // To the process that was heard, beside its work.
            Some((agent, Some(instance))) => {
                let queue = topology::process_queue_name(agent.as_str(), instance);
                (Audience::One(agent.clone()), Destination::Queue(queue), Some(agent))
            }
            Some((agent, None)) => {
                (Audience::Agents, Destination::Exchange(Exchange(topology::ADVERTISE.into())), Some(agent))
            }
            None => (Audience::Agents, Destination::Exchange(Exchange(topology::ADVERTISE.into())), None),
        };
        let advertise = Advertise { target, duplicate: None, serves: self.link.serves_requests() };
        self.link.send(Outbound::new(advertise, audience), destination).await?;
        Ok(())
    }

    /// Asks the process that was heard, and tells it of another under its identity; that it cannot be done is logged.
    async fn ask_process(&self, node: &Identity, instance: u64, duplicate: Option<DuplicateInstance>) {
        if let Err(error) = self.say(node, instance, duplicate).await {
            tracing::warn!(error = &error as &dyn std::error::Error, %node, "a node that made itself known has no answer");
        }
    }

    /// Says to one process who this is, and of another process under its identity.
    pub(super) async fn say(
        &self,
        node: &Identity,
        instance: u64,
        duplicate: Option<DuplicateInstance>,
    ) -> Result<(), SendError> {
        let queue = topology::process_queue_name(node.as_str(), instance);
        let advertise = Advertise { target: Some(node.clone()), duplicate, serves: self.link.serves_requests() };
        self.link.send(Outbound::new(advertise, node.clone()), Destination::Queue(queue)).await?;
        Ok(())
    }

    /// Takes an agent's registration; whether it is registered now.
    async fn register(&self, register: &Register, sender: &Identity, signer: Option<&Verified>) -> bool {
        if !register.within_limits() {
            tracing::warn!(agent = %sender, "more services or tags than an agent may have: not registered");
            return false;
        }
        if !self.may_register(Kind::Register, register, sender, signer).await {
            return false;
        }
        let instance = signer.map(Verified::instance).or(register.instance).unwrap_or(0);
        let proof = signer.and_then(|signer| signer.proof().cloned());
        let mut record = AgentRecord::new(register.clone(), instance, self.link.now(), proof);
        record.sequence = signer.map_or(0, Verified::sequence);
        if let Err(error) = self.state.register(record.clone()).await {
            tracing::warn!(agent = %sender, %error, "not registered");
            return false;
        }
        // What was asked of an earlier process of that name will not be answered.
        self.jobs.lost(sender, Some(instance));
        self.changed.notify_waiters();
        self.tell(&AgentEvent::Registered(Arc::new(record)));
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
        // Its running jobs go on: their answers still come.
        let instance = signer.map(Verified::instance);
        match self.state.remove(sender, instance).await {
            Ok(true) => self.tell(&AgentEvent::Unregistered(sender.clone())),
            Ok(false) => {}
            Err(error) => tracing::warn!(agent = %sender, %error, "not unregistered"),
        }
    }

    /// Notes a heartbeat; false when the agent is not known.
    async fn ping(&self, ping: &Ping, signer: Option<&Verified>, now: Timestamp) -> bool {
        let instance = signer.map(Verified::instance).or(ping.instance).unwrap_or(0);
        let mut heartbeat = Heartbeat::new(&ping.identity, instance, ping.status, now);
        heartbeat.sequence = signer.map_or(0, Verified::sequence);
        heartbeat.proof = signer.and_then(Verified::proof);
        self.state.ping(heartbeat).await.unwrap_or_else(|error| {
            tracing::warn!(agent = %ping.identity, %error, "a heartbeat was not noted");
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
        let id = signer.map(Verified::id);
        self.link
            .audit_decision(DecisionSubject { kind, from: sender, id, service: None, on_behalf_of: None }, &decision)
            .await;
        if !decision.allowed {
            tracing::warn!(agent = %sender, why = decision.why, rule = decision.rule, "registration denied");
        }
        decision.allowed
    }

    fn tell(&self, event: &AgentEvent) {
        for hook in &self.hooks {
            if catch_unwind(AssertUnwindSafe(|| hook.0(event))).is_err() {
                tracing::warn!("a callback panicked");
            }
        }
    }
}
