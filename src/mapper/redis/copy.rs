//! This mapper's own copy of what is known: what it heard itself, what it read and believed, and what it has to write yet.
//!
//! Everything that waits to be written is kept once for each agent, so that neither a flood of heartbeats nor a long absence of
//! Redis makes it grow beyond the agents there are.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use super::belief::{Beat, Registration};
use super::entry::{Entry, Said};
use super::keys::Version;
use crate::clock::Timestamp;
use crate::mapper::state::{AgentQuery, AgentRecord, Heartbeat, Roster, StateError};
use crate::packet::{Identity, Packet, Ping, Register, Status};
use crate::serializer::Proof;

/// How many removals wait to be written. What is lost beyond that is gone when it has been silent for long enough.
const MAX_REMOVALS: usize = 65_536;
/// How many agents are remembered as listed without cause, and as not listed where they should be.
const MAX_ODD: usize = 4_096;

/// The copy. Its lock is held for single steps, never across an await.
#[derive(Debug, Default)]
pub(super) struct Copy(RwLock<Known>);

#[derive(Debug, Default)]
struct Known {
    roster: Roster,
    /// One for each agent of the roster.
    notes: HashMap<Identity, Note>,
    /// Registrations that have to be written; true: even if Redis has them.
    dirty: HashMap<Identity, bool>,
    /// Heartbeats that have to be written.
    beats: HashMap<Identity, Spoken>,
    removals: HashMap<Identity, Removal>,
    /// Agents that a lookup should have found: to be looked into.
    missed: HashSet<Identity>,
    /// Agents that a lookup found, of whom nothing proves that they fit: not looked into again until the next round.
    baseless: HashSet<Identity>,
}

#[derive(Debug)]
struct Note {
    /// Where what was last heard of it, here or elsewhere, stands in its process's order.
    sequence: u64,
    /// When this mapper last heard it itself, and what.
    heard: Option<Timestamp>,
    spoken: Option<Spoken>,
    /// It was removed from Redis, by another mapper: it does not count here, unless it is heard again.
    absent: bool,
}

/// A heartbeat that was heard here.
#[derive(Clone, Debug)]
struct Spoken {
    version: Version,
    status: Status,
    at: Timestamp,
    proof: Option<Arc<Proof>>,
}

/// What may be removed from Redis: nothing that is later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Removal {
    /// The latest registration.
    pub version: Version,
    /// The latest heartbeat, where that matters.
    pub beat: Option<Version>,
}

/// A registration to be written.
#[derive(Debug)]
pub(super) struct Writing {
    pub record: Arc<AgentRecord>,
    pub repair: bool,
}

/// What has to be done about an agent that is listed in Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    Nothing,
    /// Its last heartbeat is to be read.
    Beat,
    /// Its registration and its last heartbeat are to be read.
    Record,
}

impl Copy {
    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Known> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// An agent registered here.
    pub fn register(&self, record: AgentRecord) -> Result<(), StateError> {
        let mut known = self.write();
        let (identity, version) = (record.identity.clone(), Version::of(&record));
        if known.roster.get(&identity).is_some_and(|before| Version::of(before) > version) {
            return Err(StateError::SupersededProcess);
        }
        known.forget(&identity);
        let note = Note { sequence: record.sequence, heard: Some(record.last_seen), spoken: None, absent: false };
        known.roster.insert(record)?;
        known.notes.insert(identity.clone(), note);
        known.removals.remove(&identity);
        known.dirty.insert(identity, false);
        Ok(())
    }

    /// An agent was heard here; false when this instance of it is not known.
    pub fn heard(&self, ping: &Heartbeat<'_>) -> bool {
        let known = &mut *self.write();
        let (Some(record), Some(note)) = (known.roster.get(ping.identity), known.notes.get_mut(ping.identity)) else {
            return false;
        };
        if record.instance != ping.instance {
            return false;
        }
        note.heard = Some(ping.now);
        if note.absent {
            note.absent = false;
            known.dirty.insert(ping.identity.clone(), false);
        }
        // What was read from Redis meanwhile may be later than what comes from the broker.
        let status = if ping.sequence > note.sequence { ping.status } else { record.status };
        note.sequence = note.sequence.max(ping.sequence);
        let version = Version(ping.instance, ping.sequence);
        let spoken = Spoken { version, status: ping.status, at: ping.now, proof: ping.proof.cloned() };
        note.spoken = Some(spoken.clone());
        known.beats.insert(ping.identity.clone(), spoken);
        let last_seen = record.last_seen.max(ping.now);
        known.roster.heard(ping.identity, status, last_seen);
        true
    }

    /// Forgets an agent, and has it removed from Redis.
    pub fn remove(&self, identity: &Identity, instance: Option<u64>) -> bool {
        let mut known = self.write();
        if !known.roster.get(identity).is_some_and(|record| record.is_of(instance)) {
            return false;
        }
        if let Some(record) = known.forget(identity) {
            let removal = Removal { version: Version(record.instance, u64::MAX), beat: None };
            known.have_removed(identity.clone(), removal);
        }
        true
    }

    /// The agents that fit, in the order of their identities.
    pub fn find(&self, query: &AgentQuery) -> Vec<Arc<AgentRecord>> {
        let known = self.read();
        known.roster.find(query).filter(|record| known.is_present(&record.identity)).cloned().collect()
    }

    /// Everybody, in the order of their identities.
    pub fn all(&self) -> Vec<Arc<AgentRecord>> {
        let known = self.read();
        known.roster.all().filter(|record| known.is_present(&record.identity)).cloned().collect()
    }

    /// Of the agents that this mapper knows to fit, those that are found in Redis too, or that it has heard itself since `since`, or
    /// that are still to be written. The others have to be looked into.
    pub fn confirmed(
        &self,
        known_here: Vec<Arc<AgentRecord>>,
        found: &HashSet<&[u8]>,
        since: Timestamp,
    ) -> Vec<Arc<AgentRecord>> {
        let missing: Vec<Identity> = known_here
            .iter()
            .filter(|record| !found.contains(record.identity.as_str().as_bytes()))
            .map(|record| record.identity.clone())
            .collect();
        if missing.is_empty() {
            return known_here;
        }
        let mut known = self.write();
        let mut dropped = HashSet::new();
        for identity in missing {
            let heard = known.notes.get(&identity).and_then(|note| note.heard).is_some_and(|heard| heard >= since);
            if known.dirty.contains_key(&identity) {
                continue;
            }
            if !heard {
                dropped.insert(identity.clone());
            }
            if known.missed.len() < MAX_ODD {
                known.missed.insert(identity);
            }
        }
        known_here.into_iter().filter(|record| !dropped.contains(&record.identity)).collect()
    }

    /// Of agents that a lookup found and that are not known here to fit, those that are worth reading about.
    pub fn unknown(&self, found: Vec<Identity>) -> Vec<Identity> {
        let known = self.read();
        let worth = |identity: &Identity| !known.baseless.contains(identity) && !known.removals.contains_key(identity);
        found.into_iter().filter(worth).collect()
    }

    /// These were read about, and still nothing proves that they fit. Gives how many are new among them.
    pub fn baseless(&self, identities: Vec<Identity>) -> usize {
        let mut known = self.write();
        let mut new = 0;
        for identity in identities {
            if known.baseless.len() < MAX_ODD && known.baseless.insert(identity) {
                new += 1;
            }
        }
        new
    }

    /// A new round: what was baseless is looked into again. Gives those that lookups should have found.
    pub fn next_round(&self) -> Vec<Identity> {
        let mut known = self.write();
        known.baseless.clear();
        known.missed.drain().collect()
    }

    /// What has to be done about an agent, of whom Redis says that this is the version of its registration. Agents that were heard
    /// here since `since` need not be read about.
    pub fn need(&self, identity: &Identity, listed: Option<Version>, since: Timestamp) -> Need {
        let known = &mut *self.write();
        let (Some(record), Some(note)) = (known.roster.get(identity), known.notes.get_mut(identity)) else {
            return Need::Record;
        };
        match listed {
            Some(listed) if listed > Version::of(record) => Need::Record,
            Some(listed) if listed == Version::of(record) => {
                note.absent = false;
                if record.last_seen < since { Need::Beat } else { Need::Nothing }
            }
            // Older there than here, or not readable.
            _ => {
                known.dirty.insert(identity.clone(), true);
                Need::Nothing
            }
        }
    }

    /// Takes in what was read and believed, and is alive at `alive_since`; whether it is news. What is not alive, as its writer says
    /// as well, is removed from Redis.
    pub fn admit(&self, registration: Registration, beat: Option<Beat>, alive_since: Timestamp) -> bool {
        let mut known = self.write();
        let Registration { mut record, claimed } = registration;
        let (identity, version) = (record.identity.clone(), Version::of(&record));
        if known.removals.get(&identity).is_some_and(|removal| removal.version >= version) {
            return false;
        }
        let before = known.roster.get(&identity).cloned();
        if before.as_ref().is_some_and(|before| Version::of(before) >= version) {
            return false;
        }
        let mut note = Note { sequence: record.sequence, heard: None, spoken: None, absent: false };
        if let Some(beat) = beat {
            (note.sequence, record.status) = (beat.version.1, beat.status);
            record.last_seen = record.last_seen.max(beat.last_seen);
        }
        if before.is_none() && record.last_seen < alive_since {
            if claimed < alive_since {
                let removal = Removal { version, beat: Some(Version(version.0, note.sequence)) };
                known.have_removed(identity, removal);
            }
            return false;
        }
        // What was heard of the same process meanwhile stays.
        if let (Some(before), Some(earlier)) = (before, known.notes.remove(&identity))
            && before.instance == record.instance
        {
            (note.heard, note.spoken) = (earlier.heard, earlier.spoken);
            record.last_seen = record.last_seen.max(before.last_seen);
            if earlier.sequence > note.sequence {
                (note.sequence, record.status) = (earlier.sequence, before.status);
            }
        }
        known.forget(&identity);
        if known.roster.insert(record).is_err() {
            return false;
        }
        known.notes.insert(identity, note);
        true
    }

    /// Takes in a heartbeat that was read and believed.
    pub fn admit_beat(&self, identity: &Identity, beat: Beat) {
        let known = &mut *self.write();
        let (Some(record), Some(note)) = (known.roster.get(identity), known.notes.get_mut(identity)) else { return };
        if record.instance != beat.version.0 || beat.version.1 <= note.sequence {
            return;
        }
        note.sequence = beat.version.1;
        let last_seen = record.last_seen.max(beat.last_seen);
        known.roster.heard(identity, beat.status, last_seen);
    }

    /// The record of an agent, if it is known.
    pub fn get(&self, identity: &Identity) -> Option<Arc<AgentRecord>> {
        self.read().roster.get(identity).cloned()
    }

    /// Another mapper removed this agent from Redis. What is still to be written was heard later, or will be.
    pub fn removed_elsewhere(&self, identity: &Identity) {
        let mut known = self.write();
        if !known.dirty.contains_key(identity)
            && let Some(note) = known.notes.get_mut(identity)
        {
            note.absent = true;
        }
    }

    /// Redis does not hold this agent, of whom a heartbeat was heard here.
    pub fn write_again(&self, identity: &Identity, repair: bool) {
        let known = &mut *self.write();
        if let Some(note) = known.notes.get_mut(identity) {
            note.absent = false;
            if let Some(spoken) = &note.spoken {
                known.beats.insert(identity.clone(), spoken.clone());
            }
            known.dirty.insert(identity.clone(), repair);
        }
    }

    /// Who is known here and is none of these.
    pub fn others(&self, listed: &HashSet<Identity>) -> Vec<Identity> {
        self.read().notes.keys().filter(|identity| !listed.contains(*identity)).cloned().collect()
    }

    /// Registrations to be written.
    pub fn registrations(&self) -> Vec<Writing> {
        let known = self.read();
        let writing = |(identity, repair): (&Identity, &bool)| {
            Some(Writing { record: known.roster.get(identity)?.clone(), repair: *repair })
        };
        known.dirty.iter().filter_map(writing).collect()
    }

    /// This registration has been written, or a later one is there.
    pub fn written(&self, record: &AgentRecord) {
        let mut known = self.write();
        if known.roster.get(&record.identity).is_none_or(|now| Version::of(now) == Version::of(record)) {
            known.dirty.remove(&record.identity);
        }
    }

    /// Removals to be written.
    pub fn removals(&self) -> Vec<(Identity, Removal)> {
        self.read().removals.iter().map(|(identity, removal)| (identity.clone(), *removal)).collect()
    }

    /// This removal has been written.
    pub fn has_removed(&self, identity: &Identity, removal: Removal) {
        let mut known = self.write();
        if known.removals.get(identity) == Some(&removal) {
            known.removals.remove(identity);
        }
    }

    /// Heartbeats to be written: the agent, the version, and the value.
    pub fn take_beats(&self) -> Vec<(Identity, Version, Entry)> {
        let beats = std::mem::take(&mut self.write().beats);
        beats.into_iter().map(|(identity, spoken)| (identity.clone(), spoken.version, spoken.entry(identity))).collect()
    }

    /// These could not be written: they wait again, unless the agent was heard since.
    pub fn give_back(&self, beats: Vec<(Identity, Version, Entry)>) {
        let known = &mut *self.write();
        for (identity, version, _) in beats {
            let spoken = known.notes.get(&identity).and_then(|note| note.spoken.clone());
            if let Some(spoken) = spoken.filter(|spoken| spoken.version == version) {
                known.beats.entry(identity).or_insert(spoken);
            }
        }
    }

    /// The agents that were last heard before this moment.
    pub fn silent(&self, since: Timestamp) -> Vec<Arc<AgentRecord>> {
        self.read().roster.silent(since).cloned().collect()
    }

    /// Forgets these, if they still were last heard before this moment, and has them removed from Redis.
    pub fn reap(&self, silent: Vec<Arc<AgentRecord>>, since: Timestamp) -> Vec<Arc<AgentRecord>> {
        let mut known = self.write();
        let mut gone = Vec::new();
        for identity in silent.iter().map(|record| &record.identity) {
            let still = known.roster.get(identity).is_some_and(|record| record.last_seen < since);
            let (true, Some(sequence)) = (still, known.notes.get(identity).map(|note| note.sequence)) else { continue };
            if let Some(record) = known.forget(identity) {
                let beat = Some(Version(record.instance, sequence));
                known.have_removed(identity.clone(), Removal { version: Version::of(&record), beat });
                gone.push(record);
            }
        }
        gone
    }
}

impl Known {
    fn is_present(&self, identity: &Identity) -> bool {
        self.notes.get(identity).is_some_and(|note| !note.absent)
    }

    fn forget(&mut self, identity: &Identity) -> Option<Arc<AgentRecord>> {
        self.notes.remove(identity);
        self.dirty.remove(identity);
        self.beats.remove(identity);
        self.missed.remove(identity);
        self.roster.forget(identity)
    }

    fn have_removed(&mut self, identity: Identity, removal: Removal) {
        if self.removals.len() < MAX_REMOVALS || self.removals.contains_key(&identity) {
            self.removals.insert(identity, removal);
        }
    }
}

impl Spoken {
    fn entry(self, identity: Identity) -> Entry {
        let instance = Some(self.version.0).filter(|instance| *instance != 0);
        let said = match self.proof {
            Some(proof) => Said::Proven(proof),
            None => Said::Unsigned(Box::new(Ping { identity, status: self.status, instance }.into())),
        };
        Entry { heard: self.at, said }
    }
}

impl Writing {
    /// The value that is written.
    pub fn entry(&self) -> Entry {
        let record = &self.record;
        let said = match &record.proof {
            Some(proof) => Said::Proven(proof.clone()),
            None => Said::Unsigned(Box::new(Packet::Register(Register {
                identity: record.identity.clone(),
                services: record.services.clone(),
                status: record.status,
                tags: record.tags.clone(),
                files: record.files.clone(),
                instance: Some(record.instance).filter(|instance| *instance != 0),
            }))),
        };
        Entry { heard: record.last_seen, said }
    }
}

/// How old what was heard may be before what others heard is read: a few rounds, and well within the timeout.
pub(super) fn stale_after(agent_timeout: Duration) -> Duration {
    (agent_timeout / 4).min(Duration::from_secs(5))
}
