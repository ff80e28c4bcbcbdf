//! The mapper's replica of what is in Redis: what this mapper received itself, what it read and verified, and what it still has to
//! write.
//!
//! At most one registration, heartbeat and removal per agent waits to be written, so neither a flood of heartbeats nor a long outage of
//! Redis makes it grow beyond the number of agents.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;

use super::keys::Version;
use super::verify::{Content, StoredMessage, VerifiedHeartbeat, VerifiedRegistration};
use crate::clock::Timestamp;
use crate::mapper::registry::Registry;
use crate::mapper::state::{AgentQuery, AgentRecord, Heartbeat, StateError};
use crate::packet::{Identity, Packet, Ping, Register, Status};
use crate::serializer::Proof;

/// The most removals that wait to be written. An agent whose removal is dropped stays in Redis until it times out.
const MAX_PENDING_REMOVALS: usize = 65_536;
/// The most agents that are remembered as wrongly listed, and as missing from sets, until the next round.
const MAX_INCONSISTENCIES: usize = 4_096;

/// The replica. Its lock is never held across an await.
#[derive(Debug, Default)]
pub(super) struct Replica(RwLock<Data>);

#[derive(Debug, Default)]
struct Data {
    registry: Registry,
    /// One entry for each agent in the registry.
    sync_states: HashMap<Identity, SyncState>,
    /// Registrations to write.
    pending_registrations: HashMap<Identity, Repair>,
    /// Heartbeats to write.
    pending_heartbeats: HashMap<Identity, ReceivedHeartbeat>,
    /// Removals to write.
    pending_removals: HashMap<Identity, Removal>,
    /// Agents that a lookup in Redis should have found. The next round checks them.
    missing: HashSet<Identity>,
    /// Agents that a lookup in Redis found and that do not fit. They are not read again before the next round.
    wrongly_listed: HashSet<Identity>,
}

/// Whether a registration is written even if Redis has it already, because other keys may have lost the agent.
type Repair = bool;

#[derive(Debug)]
struct SyncState {
    /// The sequence number of the newest message, received here or read from Redis.
    sequence: u64,
    /// When this mapper last received a message from the agent itself.
    last_received: Option<Timestamp>,
    /// The last heartbeat that this mapper received itself.
    last_heartbeat: Option<ReceivedHeartbeat>,
    /// Another mapper has removed the agent from Redis. It is ignored here until it sends another message.
    removed_remotely: bool,
}

/// A heartbeat that this mapper received itself.
#[derive(Clone, Debug)]
struct ReceivedHeartbeat {
    version: Version,
    status: Status,
    received_at: Timestamp,
    proof: Option<Arc<Proof>>,
}

/// A removal from Redis. It does not remove anything newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Removal {
    /// The newest registration to remove.
    pub registration: Version,
    /// The newest heartbeat to remove; any if `None`.
    pub heartbeat: Option<Version>,
}

/// A registration to write.
#[derive(Debug)]
pub(super) struct PendingRegistration {
    pub record: Arc<AgentRecord>,
    pub repair: Repair,
}

/// A heartbeat to write.
#[derive(Debug)]
pub(super) struct PendingHeartbeat {
    pub agent: Identity,
    pub version: Version,
    pub message: StoredMessage,
}

/// What has to be read about an agent that is listed in Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ToRead {
    Nothing,
    Heartbeat,
    RegistrationAndHeartbeat,
}

impl Replica {
    /// Stores a registration that this mapper received.
    pub fn register(&self, record: AgentRecord) -> Result<(), StateError> {
        let mut data = self.0.write();
        let (identity, version) = (record.identity.clone(), Version::of(&record));
        if data.registry.get(&identity).is_some_and(|known| Version::of(known) > version) {
            return Err(StateError::SupersededProcess);
        }
        data.remove(&identity);
        let sync_state = SyncState { last_received: Some(record.last_seen), ..SyncState::new(record.sequence) };
        data.registry.insert(record)?;
        data.sync_states.insert(identity.clone(), sync_state);
        data.pending_removals.remove(&identity);
        data.pending_registrations.insert(identity, false);
        Ok(())
    }

    /// Stores a heartbeat that this mapper received. Returns false if this instance of the agent is not registered.
    pub fn heartbeat(&self, heartbeat: &Heartbeat<'_>) -> bool {
        let data = &mut *self.0.write();
        let identity = heartbeat.identity;
        let Some((record, sync_state)) = data.agent_mut(identity) else { return false };
        if record.instance != heartbeat.instance {
            return false;
        }
        sync_state.last_received = Some(heartbeat.now);
        let was_removed = std::mem::take(&mut sync_state.removed_remotely);
        // A heartbeat read from Redis may be newer than this one from the broker.
        let status = if heartbeat.sequence > sync_state.sequence { heartbeat.status } else { record.status };
        sync_state.sequence = sync_state.sequence.max(heartbeat.sequence);
        let received = ReceivedHeartbeat {
            version: Version::new(heartbeat.instance, heartbeat.sequence),
            status: heartbeat.status,
            received_at: heartbeat.now,
            proof: heartbeat.proof.cloned(),
        };
        sync_state.last_heartbeat = Some(received.clone());
        let last_seen = record.last_seen.max(heartbeat.now);
        if was_removed {
            data.pending_registrations.insert(identity.clone(), false);
        }
        data.pending_heartbeats.insert(identity.clone(), received);
        data.registry.update(identity, status, last_seen);
        true
    }

    /// Removes an agent, here and in Redis.
    pub fn remove(&self, identity: &Identity, instance: Option<u64>) -> bool {
        let mut data = self.0.write();
        if !data.registry.get(identity).is_some_and(|record| record.is_of(instance)) {
            return false;
        }
        if let Some(record) = data.remove(identity) {
            let removal = Removal { registration: Version::new(record.instance, u64::MAX), heartbeat: None };
            data.queue_removal(identity.clone(), removal);
        }
        true
    }

    /// The agents that fit the query, ordered by identity.
    pub fn find(&self, query: &AgentQuery) -> Vec<Arc<AgentRecord>> {
        let data = self.0.read();
        data.registry.find(query).filter(|record| data.is_present(&record.identity)).cloned().collect()
    }

    /// All agents, ordered by identity.
    pub fn all(&self) -> Vec<Arc<AgentRecord>> {
        let data = self.0.read();
        data.registry.all().filter(|record| data.is_present(&record.identity)).cloned().collect()
    }

    /// Drops agents that a lookup in Redis did not find, except those that this mapper has received a message from since
    /// `alive_since` and those that are still to be written. The next round checks the missing ones.
    pub fn retain_confirmed(
        &self,
        mut agents: Vec<Arc<AgentRecord>>,
        found: &HashSet<&[u8]>,
        alive_since: Timestamp,
    ) -> Vec<Arc<AgentRecord>> {
        if agents.iter().all(|record| found.contains(record.identity.as_str().as_bytes())) {
            return agents;
        }
        let mut data = self.0.write();
        agents.retain(|record| {
            let identity = &record.identity;
            if found.contains(identity.as_str().as_bytes()) || data.pending_registrations.contains_key(identity) {
                return true;
            }
            if data.missing.len() < MAX_INCONSISTENCIES {
                data.missing.insert(identity.clone());
            }
            let sync_state = data.sync_states.get(identity);
            sync_state.and_then(|sync_state| sync_state.last_received).is_some_and(|at| at >= alive_since)
        });
        agents
    }

    /// Drops agents that need not be read: those that were wrongly listed already, and those that are about to be removed.
    pub fn retain_worth_reading(&self, mut agents: Vec<Identity>) -> Vec<Identity> {
        let data = self.0.read();
        agents.retain(|agent| !data.wrongly_listed.contains(agent) && !data.pending_removals.contains_key(agent));
        agents
    }

    /// Marks agents as wrongly listed: they were read and do not fit. Returns how many were not marked before.
    pub fn mark_wrongly_listed(&self, agents: Vec<Identity>) -> usize {
        let mut data = self.0.write();
        let mut new = 0;
        for agent in agents {
            if data.wrongly_listed.len() < MAX_INCONSISTENCIES && data.wrongly_listed.insert(agent) {
                new += 1;
            }
        }
        new
    }

    /// Starts a new round: wrongly listed agents may be read again. Returns the agents that lookups should have found.
    pub fn start_round(&self) -> Vec<Identity> {
        let mut data = self.0.write();
        data.wrongly_listed.clear();
        data.missing.drain().collect()
    }

    /// What to read about an agent whose registration in Redis has this version. The heartbeat of an agent that was seen since
    /// `fresh_since` is not read.
    pub fn to_read(&self, identity: &Identity, stored: Option<Version>, fresh_since: Timestamp) -> ToRead {
        let data = &mut *self.0.write();
        let Some((record, sync_state)) = data.agent_mut(identity) else { return ToRead::RegistrationAndHeartbeat };
        let known = Version::of(record);
        match stored {
            Some(stored) if stored > known => ToRead::RegistrationAndHeartbeat,
            Some(stored) if stored == known => {
                sync_state.removed_remotely = false;
                if record.last_seen < fresh_since { ToRead::Heartbeat } else { ToRead::Nothing }
            }
            // Redis has an older registration, or an invalid version.
            _ => {
                data.pending_registrations.insert(identity.clone(), true);
                ToRead::Nothing
            }
        }
    }

    /// Stores a registration that was read and verified. Returns whether it is new. An agent that was not seen since `alive_since`,
    /// even as its writer claims, is removed from Redis.
    pub fn apply_registration(
        &self,
        registration: VerifiedRegistration,
        heartbeat: Option<VerifiedHeartbeat>,
        alive_since: Timestamp,
    ) -> bool {
        let mut data = self.0.write();
        let VerifiedRegistration { mut record, claimed_last_seen } = registration;
        let (identity, version) = (record.identity.clone(), Version::of(&record));
        if data.pending_removals.get(&identity).is_some_and(|removal| removal.registration >= version) {
            return false;
        }
        let known = data.registry.get(&identity).cloned();
        if known.as_ref().is_some_and(|known| Version::of(known) >= version) {
            return false;
        }
        let mut sync_state = SyncState::new(record.sequence);
        if let Some(heartbeat) = heartbeat {
            (sync_state.sequence, record.status) = (heartbeat.version.sequence, heartbeat.status);
            record.last_seen = record.last_seen.max(heartbeat.last_seen);
        }
        if known.is_none() && record.last_seen < alive_since {
            if claimed_last_seen < alive_since {
                let heartbeat = Some(Version::new(version.instance, sync_state.sequence));
                data.queue_removal(identity, Removal { registration: version, heartbeat });
            }
            return false;
        }
        // Keep what this mapper has received from the same process.
        if let (Some(known), Some(earlier)) = (known, data.sync_states.remove(&identity))
            && known.instance == record.instance
        {
            record.last_seen = record.last_seen.max(known.last_seen);
            if earlier.sequence > sync_state.sequence {
                (sync_state.sequence, record.status) = (earlier.sequence, known.status);
            }
            (sync_state.last_received, sync_state.last_heartbeat) = (earlier.last_received, earlier.last_heartbeat);
        }
        data.remove(&identity);
        if data.registry.insert(record).is_err() {
            return false;
        }
        data.sync_states.insert(identity, sync_state);
        true
    }

    /// Stores a heartbeat that was read and verified.
    pub fn apply_heartbeat(&self, identity: &Identity, heartbeat: VerifiedHeartbeat) {
        let data = &mut *self.0.write();
        let Some((record, sync_state)) = data.agent_mut(identity) else { return };
        if record.instance != heartbeat.version.instance || heartbeat.version.sequence <= sync_state.sequence {
            return;
        }
        sync_state.sequence = heartbeat.version.sequence;
        let last_seen = record.last_seen.max(heartbeat.last_seen);
        data.registry.update(identity, heartbeat.status, last_seen);
    }

    pub fn get(&self, identity: &Identity) -> Option<Arc<AgentRecord>> {
        self.0.read().registry.get(identity).cloned()
    }

    /// Marks an agent as removed from Redis by another mapper, unless this mapper is about to write its registration.
    pub fn mark_removed_remotely(&self, identity: &Identity) {
        let mut data = self.0.write();
        if !data.pending_registrations.contains_key(identity)
            && let Some(sync_state) = data.sync_states.get_mut(identity)
        {
            sync_state.removed_remotely = true;
        }
    }

    /// Queues an agent that Redis has lost to be written again.
    pub fn queue_again(&self, identity: &Identity, repair: Repair) {
        let data = &mut *self.0.write();
        if let Some(sync_state) = data.sync_states.get_mut(identity) {
            sync_state.removed_remotely = false;
            if let Some(heartbeat) = &sync_state.last_heartbeat {
                data.pending_heartbeats.insert(identity.clone(), heartbeat.clone());
            }
            data.pending_registrations.insert(identity.clone(), repair);
        }
    }

    /// The agents that are not listed.
    pub fn not_listed(&self, listed: &HashSet<Identity>) -> Vec<Identity> {
        self.0.read().sync_states.keys().filter(|identity| !listed.contains(*identity)).cloned().collect()
    }

    /// The registrations to write.
    pub fn pending_registrations(&self) -> Vec<PendingRegistration> {
        let data = self.0.read();
        let pending = |(identity, repair): (&Identity, &Repair)| {
            Some(PendingRegistration { record: data.registry.get(identity)?.clone(), repair: *repair })
        };
        data.pending_registrations.iter().filter_map(pending).collect()
    }

    /// The registration was written, or Redis has a newer one.
    pub fn registration_written(&self, written: &AgentRecord) {
        let mut data = self.0.write();
        let known = data.registry.get(&written.identity);
        if known.is_none_or(|known| Version::of(known) == Version::of(written)) {
            data.pending_registrations.remove(&written.identity);
        }
    }

    /// The removals to write.
    pub fn pending_removals(&self) -> Vec<(Identity, Removal)> {
        self.0.read().pending_removals.iter().map(|(identity, removal)| (identity.clone(), *removal)).collect()
    }

    /// The removal was written.
    pub fn removal_written(&self, identity: &Identity, removal: Removal) {
        let mut data = self.0.write();
        if data.pending_removals.get(identity) == Some(&removal) {
            data.pending_removals.remove(identity);
        }
    }

    /// Takes the heartbeats to write.
    pub fn take_pending_heartbeats(&self) -> Vec<PendingHeartbeat> {
        let heartbeats = std::mem::take(&mut self.0.write().pending_heartbeats);
        heartbeats.into_iter().map(|(agent, heartbeat)| heartbeat.into_pending(agent)).collect()
    }

    /// Queues heartbeats again that could not be written. A newer one that was received meanwhile stays queued.
    pub fn requeue_heartbeats(&self, heartbeats: Vec<PendingHeartbeat>) {
        let data = &mut *self.0.write();
        for PendingHeartbeat { agent, version, .. } in heartbeats {
            let last = data.sync_states.get(&agent).and_then(|sync_state| sync_state.last_heartbeat.clone());
            if let Some(last) = last.filter(|last| last.version == version) {
                data.pending_heartbeats.entry(agent).or_insert(last);
            }
        }
    }

    /// The agents that were last seen before `silent_since`.
    pub fn silent(&self, silent_since: Timestamp) -> Vec<Arc<AgentRecord>> {
        self.0.read().registry.silent(silent_since).cloned().collect()
    }

    /// Removes those of these agents that were still last seen before `silent_since`, here and in Redis.
    pub fn reap(&self, agents: Vec<Arc<AgentRecord>>, silent_since: Timestamp) -> Vec<Arc<AgentRecord>> {
        let mut data = self.0.write();
        let mut removed = Vec::new();
        for identity in agents.iter().map(|record| &record.identity) {
            let is_silent = data.registry.get(identity).is_some_and(|record| record.last_seen < silent_since);
            let sequence = data.sync_states.get(identity).map(|sync_state| sync_state.sequence);
            let (true, Some(sequence)) = (is_silent, sequence) else { continue };
            if let Some(record) = data.remove(identity) {
                let heartbeat = Some(Version::new(record.instance, sequence));
                data.queue_removal(identity.clone(), Removal { registration: Version::of(&record), heartbeat });
                removed.push(record);
            }
        }
        removed
    }
}

impl Data {
    fn agent_mut(&mut self, identity: &Identity) -> Option<(&Arc<AgentRecord>, &mut SyncState)> {
        Some((self.registry.get(identity)?, self.sync_states.get_mut(identity)?))
    }

    fn is_present(&self, identity: &Identity) -> bool {
        self.sync_states.get(identity).is_some_and(|sync_state| !sync_state.removed_remotely)
    }

    fn remove(&mut self, identity: &Identity) -> Option<Arc<AgentRecord>> {
        self.sync_states.remove(identity);
        self.pending_registrations.remove(identity);
        self.pending_heartbeats.remove(identity);
        self.missing.remove(identity);
        self.registry.remove(identity)
    }

    fn queue_removal(&mut self, identity: Identity, removal: Removal) {
        if self.pending_removals.len() < MAX_PENDING_REMOVALS || self.pending_removals.contains_key(&identity) {
            self.pending_removals.insert(identity, removal);
        }
    }
}

impl SyncState {
    fn new(sequence: u64) -> Self {
        Self { sequence, last_received: None, last_heartbeat: None, removed_remotely: false }
    }
}

impl ReceivedHeartbeat {
    fn into_pending(self, agent: Identity) -> PendingHeartbeat {
        let version = self.version;
        let content = match self.proof {
            Some(proof) => Content::Signed(proof),
            None => {
                let instance = Some(version.instance).filter(|instance| *instance != 0);
                Content::Unsigned(Box::new(Ping { identity: agent.clone(), status: self.status, instance }.into()))
            }
        };
        PendingHeartbeat { agent, version, message: StoredMessage { received_at: self.received_at, content } }
    }
}

impl PendingRegistration {
    pub fn message(&self) -> StoredMessage {
        let record = &self.record;
        let content = match &record.proof {
            Some(proof) => Content::Signed(proof.clone()),
            None => Content::Unsigned(Box::new(Packet::Register(Register {
                identity: record.identity.clone(),
                services: record.services.clone(),
                status: record.status,
                tags: record.tags.clone(),
                files: record.files.clone(),
                instance: Some(record.instance).filter(|instance| *instance != 0),
            }))),
        };
        StoredMessage { received_at: record.last_seen, content }
    }
}

/// How old an agent's last message may be before its heartbeat is read from Redis: well below the agent timeout.
pub(super) fn stale_after(agent_timeout: Duration) -> Duration {
    (agent_timeout / 4).min(Duration::from_secs(5))
}
