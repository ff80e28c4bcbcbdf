//! The sync task: writes to Redis what this mapper received, reads what others wrote, and reconnects after an outage.
//!
//! Registrations and removals are written at once, heartbeats once per round; all in batches, so that a flood of them takes few round
//! trips. Changes are read by revision: a round without changes costs one round trip.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::RwLock;
use redis::Value;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::connection::{Address, CommandError, Connection, array, number, string};
use super::keys::{HEARTBEAT_SCRIPT, Keys, REGISTER_SCRIPT, REMOVE_SCRIPT, Version, agent};
use super::replica::{Replica, ToRead, stale_after};
use super::verify::{RedisRefusal, VerifiedHeartbeat, VerifiedRegistration, Verifier};
use crate::clock::Timestamp;
use crate::mapper::state::{AgentRecord, StateContext};
use crate::packet::{Identity, Token};

/// How many changes are read at a time.
const PAGE_SIZE: usize = 512;
/// The most pages that are read in one round.
const MAX_PAGES: usize = 4_096;
/// How many registrations are read at a time. They can be large.
const REGISTRATION_PAGE_SIZE: usize = 64;
/// How many registrations are written at a time.
const REGISTRATION_BATCH_SIZE: usize = 16;
/// How many removals are written at a time.
const REMOVAL_BATCH_SIZE: usize = 128;
/// How many heartbeats are written at a time.
const HEARTBEAT_BATCH_SIZE: usize = 128;
/// The delay before the first attempt to reconnect. It doubles with each attempt.
const MIN_RECONNECT_DELAY: Duration = Duration::from_millis(100);
/// The longest delay between attempts to reconnect.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(5);

/// What the handles of the state and the sync task share.
#[derive(Debug)]
pub(super) struct Shared {
    pub address: Address,
    pub keys: Keys,
    pub refresh_interval: Duration,
    pub timeout: Duration,
    pub replica: Replica,
    pub verifier: Verifier,
    pub context: OnceLock<StateContext>,
    /// The connection for lookups; `None` while Redis is unavailable.
    pub lookups: RwLock<Option<Lookups>>,
    /// Whether the log's last word is that Redis is unavailable.
    pub reported_unavailable: AtomicBool,
    /// Wakes the sync task: there is something to write, or a caller waits for a read.
    pub wake: Notify,
    /// Counts the requests to read the changes of others.
    pub reads_requested: AtomicU64,
    /// The number of requests that have been answered.
    pub reads_done: watch::Sender<u64>,
    /// Notified when an agent is read that was not known.
    pub agent_discovered: Notify,
}

/// A connection for lookups, and the epoch of the data in Redis.
#[derive(Clone, Debug)]
pub(super) struct Lookups {
    pub connection: Connection,
    pub epoch: Arc<[u8]>,
}

impl Shared {
    pub fn now(&self) -> Timestamp {
        self.context.get().map_or(Timestamp::from_micros(0), |context| context.clock.now())
    }

    /// Agents that were last seen before this time have timed out.
    pub fn alive_since(&self) -> Timestamp {
        let timeout = self.context.get().map_or(Duration::ZERO, |context| context.agent_timeout);
        self.now().saturating_sub(timeout)
    }

    /// Counts and logs that something in Redis was refused.
    pub fn refuse(&self, refusal: RedisRefusal, subject: &str, why: &str) {
        self.verifier.refusals.record(refusal, subject, why, self.now());
    }
}

/// What is known about the data in Redis from earlier connections.
#[derive(Debug, Default)]
struct History {
    epoch: Option<Arc<[u8]>>,
    revision: u64,
}

/// Keeps the replica and Redis in sync. Returns only if the first connection fails, after sending the error to `ready`.
pub(super) async fn run(
    shared: Arc<Shared>,
    first: Option<Connection>,
    ready: oneshot::Sender<Result<(), CommandError>>,
) {
    let (mut connection, mut ready) = (first, Some(ready));
    let mut history = History::default();
    let mut delay = MIN_RECONNECT_DELAY;
    loop {
        let started = Instant::now();
        let connected = match connection.take() {
            Some(connection) => Ok(connection),
            None => connect(&shared).await,
        };
        let error = match connected {
            Ok(connection) => run_session(&shared, connection, &mut history, &mut ready).await,
            Err(error) => error,
        };
        *shared.lookups.write() = None;
        shared.reads_done.send_replace(shared.reads_requested.load(Ordering::SeqCst));
        if let Some(ready) = ready.take() {
            let _ = ready.send(Err(error));
            return;
        }
        if error.is_wrong_type() {
            shared.refuse(RedisRefusal::WrongType, shared.keys.base(), &error.to_string());
        }
        if !shared.reported_unavailable.swap(true, Ordering::Relaxed) {
            tracing::warn!(redis = %shared.address, why = %error, "Redis is unavailable; continuing with the local replica");
        }
        if started.elapsed() > MAX_RECONNECT_DELAY * 2 {
            delay = MIN_RECONNECT_DELAY;
        }
        sleep(delay).await;
        delay = (delay * 2).min(MAX_RECONNECT_DELAY);
    }
}

async fn connect(shared: &Shared) -> Result<Connection, CommandError> {
    shared.address.connect().await.map_err(|error| CommandError::Connection(error.to_string()))
}

/// Uses one connection until it fails.
async fn run_session(
    shared: &Arc<Shared>,
    connection: Connection,
    history: &mut History,
    ready: &mut Option<oneshot::Sender<Result<(), CommandError>>>,
) -> CommandError {
    let opened = async {
        let session = Session::open(shared, connection, history).await?;
        session.write(true).await?;
        let lookups = Lookups { connection: connect(shared).await?, epoch: session.epoch.clone() };
        *shared.lookups.write() = Some(lookups);
        Ok::<_, CommandError>(session)
    };
    let mut session = match opened.await {
        Ok(session) => session,
        Err(error) => return error,
    };
    if shared.reported_unavailable.swap(false, Ordering::Relaxed) {
        tracing::info!(redis = %shared.address, "Redis is available again");
    }
    if let Some(ready) = ready.take() {
        let _ = ready.send(Ok(()));
    }
    let error = session.run().await;
    history.revision = session.changes_read.max(session.removals_read);
    error
}

struct Session<'a> {
    shared: &'a Arc<Shared>,
    connection: Connection,
    epoch: Arc<[u8]>,
    /// The revision up to which changes were read.
    changes_read: u64,
    /// The revision up to which removals were read.
    removals_read: u64,
}

impl<'a> Session<'a> {
    /// Reads all data, and brings the replica up to date.
    async fn open(
        shared: &'a Arc<Shared>,
        connection: Connection,
        history: &mut History,
    ) -> Result<Self, CommandError> {
        let epoch: Arc<[u8]> = ensure_epoch(&connection, &shared.keys).await?.into();
        let revision = parse_revision(connection.execute(redis::cmd("GET").arg(shared.keys.key('n'))).await?)?;
        let is_other_epoch = history.epoch.as_ref().is_some_and(|known| *known != epoch);
        let has_lost_data = is_other_epoch || revision < history.revision;
        if has_lost_data {
            tracing::info!(redis = %shared.address, "Redis has lost its data; writing the local replica again");
        }
        *history = History { epoch: Some(epoch.clone()), revision };
        let mut session = Session { shared, connection, epoch, changes_read: 0, removals_read: revision };
        let mut listed = HashSet::new();
        session.read_changes(Some(&mut listed)).await?;
        // An agent that is not listed was removed while this mapper was disconnected, unless Redis has lost it.
        let not_listed = shared.replica.not_listed(&listed);
        if has_lost_data {
            not_listed.iter().for_each(|agent| shared.replica.queue_again(agent, false));
        } else {
            session.check_missing(&not_listed).await?;
        }
        Ok(session)
    }

    async fn run(&mut self) -> CommandError {
        let mut rounds = interval(self.shared.refresh_interval);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let is_round = tokio::select! {
                _ = rounds.tick() => true,
                () = self.shared.wake.notified() => false,
            };
            if self.shared.lookups.read().is_none() {
                return CommandError::Connection("a lookup failed".into());
            }
            if let Err(error) = self.sync(is_round).await {
                return error;
            }
        }
    }

    /// Writes what is pending. Reads the changes of others if this is a round or a caller waits for them.
    async fn sync(&mut self, is_round: bool) -> Result<(), CommandError> {
        let reads_requested = self.shared.reads_requested.load(Ordering::SeqCst);
        self.write(is_round).await?;
        if is_round || reads_requested > *self.shared.reads_done.borrow() {
            self.read_changes(None).await?;
            self.shared.reads_done.send_replace(reads_requested);
        }
        if is_round {
            self.check_missing(&self.shared.replica.start_round()).await?;
            self.write(false).await?;
        }
        Ok(())
    }

    /// Reads what has changed, and stores what can be verified. Adds the agents that changed to `listed`.
    async fn read_changes(&mut self, mut listed: Option<&mut HashSet<Identity>>) -> Result<(), CommandError> {
        let keys = &self.shared.keys;
        for _ in 0..MAX_PAGES {
            let mut commands = redis::pipe();
            commands.cmd("GET").arg(keys.key('e')).cmd("GET").arg(keys.key('n'));
            for (letter, from) in [('d', self.removals_read), ('l', self.changes_read)] {
                let range = commands.cmd("ZRANGEBYSCORE").arg(keys.key(letter)).arg(format!("({from}")).arg("+inf");
                range.arg("WITHSCORES").arg("LIMIT").arg(0).arg(PAGE_SIZE);
            }
            let mut replies = self.connection.execute_all(&commands).await?.into_iter();
            let mut next = || replies.next().unwrap_or_else(|| Err(CommandError::unexpected_reply()));
            let (epoch, revision, removals, changes) = (next()?, next()?, next()?, next()?);
            let revision = parse_revision(revision)?;
            let is_same_epoch = string(epoch)?.as_deref() == Some(&self.epoch);
            if !is_same_epoch || revision < self.changes_read.max(self.removals_read) {
                return Err(CommandError::Connection("Redis has lost its data".into()));
            }
            let removals = parse_changes(removals, &mut self.removals_read)?;
            let changes = parse_changes(changes, &mut self.changes_read)?;
            let is_last_page = removals.len() < PAGE_SIZE && changes.len() < PAGE_SIZE;
            for removed in removals.iter().filter_map(|member| self.parse_agent(member)) {
                self.shared.replica.mark_removed_remotely(&removed);
            }
            let changed: Vec<Identity> = changes.iter().filter_map(|member| self.parse_agent(member)).collect();
            self.read_agents(&changed).await?;
            if let Some(listed) = &mut listed {
                listed.extend(changed);
            }
            if is_last_page {
                return Ok(());
            }
        }
        Ok(())
    }

    fn parse_agent(&self, member: &[u8]) -> Option<Identity> {
        let agent = agent(member);
        if agent.is_none() {
            self.shared.refuse(RedisRefusal::Malformed, "l", "not the identity of an agent");
        }
        agent
    }

    /// Reads what is new about these agents.
    async fn read_agents(&self, agents: &[Identity]) -> Result<(), CommandError> {
        if agents.is_empty() {
            return Ok(());
        }
        let Some(context) = self.shared.context.get() else { return Ok(()) };
        let (keys, replica) = (&self.shared.keys, &self.shared.replica);
        let fresh_since = context.clock.now().saturating_sub(stale_after(context.agent_timeout));
        let versions = self.connection.hash_fields(keys.key('v'), agents).await?;
        let (mut registrations, mut heartbeats) = (Vec::new(), Vec::new());
        for (agent, version) in agents.iter().zip(versions) {
            match replica.to_read(agent, version.as_deref().and_then(Version::parse), fresh_since) {
                ToRead::Nothing => {}
                ToRead::Heartbeat => heartbeats.extend(replica.get(agent)),
                ToRead::RegistrationAndHeartbeat => registrations.push(agent.clone()),
            }
        }
        for agents in registrations.chunks(REGISTRATION_PAGE_SIZE) {
            let registrations = self.connection.hash_fields(keys.key('r'), agents).await?;
            let heartbeats = self.connection.hash_fields(keys.key('b'), agents).await?;
            let stored = agents.iter().cloned().zip(registrations).zip(heartbeats);
            let stored =
                stored.filter_map(|((agent, registration), heartbeat)| Some((agent, registration?, heartbeat)));
            self.apply_registrations(stored.collect()).await;
        }
        read_heartbeats(self.shared, &self.connection, &heartbeats).await
    }

    /// Verifies registrations with their heartbeats, and stores the valid ones.
    async fn apply_registrations(&self, stored: Vec<(Identity, Vec<u8>, Option<Vec<u8>>)>) {
        let verified = verify(self.shared, move |shared| {
            let Some(context) = shared.context.get() else { return Vec::new() };
            let (verifier, now) = (&shared.verifier, context.clock.now());
            let verify = |(agent, registration, heartbeat): (Identity, Vec<u8>, Option<Vec<u8>>)| {
                let registration = verifier.registration(&agent, &registration, context, now)?;
                let heartbeat = heartbeat.and_then(|beat| verifier.heartbeat(&registration.record, &beat, now));
                Some((registration, heartbeat))
            };
            stored.into_iter().filter_map(verify).collect::<Vec<(VerifiedRegistration, Option<VerifiedHeartbeat>)>>()
        });
        let alive_since = self.shared.alive_since();
        for (registration, heartbeat) in verified.await {
            if self.shared.replica.apply_registration(registration, heartbeat, alive_since) {
                self.shared.agent_discovered.notify_one();
            }
        }
    }

    /// Checks agents that are missing where they should be listed: either other mappers removed them, or Redis has lost a part of their
    /// data, which is then written again.
    async fn check_missing(&self, agents: &[Identity]) -> Result<(), CommandError> {
        let replica = &self.shared.replica;
        for agents in agents.chunks(PAGE_SIZE) {
            let versions = self.connection.hash_fields(self.shared.keys.key('v'), agents).await?;
            for (agent, version) in agents.iter().zip(versions) {
                let version = version.as_deref().and_then(Version::parse);
                if replica.get(agent).is_some_and(|record| Some(Version::of(&record)) == version) {
                    replica.queue_again(agent, true);
                } else if version.is_none() {
                    replica.mark_removed_remotely(agent);
                }
            }
        }
        Ok(())
    }

    /// Writes what is pending.
    async fn write(&self, with_heartbeats: bool) -> Result<(), CommandError> {
        self.write_removals().await?;
        self.write_registrations().await?;
        if with_heartbeats && self.write_heartbeats().await? {
            self.write_registrations().await?;
        }
        Ok(())
    }

    async fn write_removals(&self) -> Result<(), CommandError> {
        let replica = &self.shared.replica;
        for removals in replica.pending_removals().chunks(REMOVAL_BATCH_SIZE) {
            let mut commands = redis::pipe();
            for (agent, removal) in removals {
                let heartbeat = removal.heartbeat.map(Version::text).unwrap_or_default();
                let command = commands.cmd("EVAL").arg(REMOVE_SCRIPT).arg(1).arg(self.shared.keys.base());
                command.arg(agent.as_str()).arg(removal.registration.text()).arg(heartbeat);
            }
            for (reply, (agent, removal)) in self.connection.execute_all(&commands).await?.into_iter().zip(removals) {
                reply?;
                replica.removal_written(agent, *removal);
            }
        }
        Ok(())
    }

    async fn write_registrations(&self) -> Result<(), CommandError> {
        let replica = &self.shared.replica;
        for pending in replica.pending_registrations().chunks(REGISTRATION_BATCH_SIZE) {
            let (mut commands, mut written) = (redis::pipe(), Vec::new());
            for registration in pending {
                let record = &registration.record;
                let Some(message) = registration.message().encode() else {
                    // Too large: no mapper would read it.
                    replica.registration_written(record);
                    continue;
                };
                let command = commands.cmd("EVAL").arg(REGISTER_SCRIPT).arg(1).arg(self.shared.keys.base());
                command.arg(record.identity.as_str()).arg(Version::of(record).text()).arg(message);
                command.arg(Keys::memberships(record)).arg(u8::from(registration.repair));
                written.push(record);
            }
            if written.is_empty() {
                continue;
            }
            for (reply, record) in self.connection.execute_all(&commands).await?.into_iter().zip(written) {
                let Value::Int(outcome) = reply? else { return Err(CommandError::unexpected_reply()) };
                if outcome > 2 {
                    let why = "keys of services or tags are not sets";
                    self.shared.refuse(RedisRefusal::WrongType, record.identity.as_str(), why);
                }
                replica.registration_written(record);
            }
        }
        Ok(())
    }

    /// Writes heartbeats. Returns whether registrations have to be written again.
    async fn write_heartbeats(&self) -> Result<bool, CommandError> {
        let replica = &self.shared.replica;
        let mut registrations_missing = false;
        let mut heartbeats = replica.take_pending_heartbeats();
        while !heartbeats.is_empty() {
            let rest = heartbeats.split_off(heartbeats.len().min(HEARTBEAT_BATCH_SIZE));
            let mut command = redis::cmd("EVAL");
            command.arg(HEARTBEAT_SCRIPT).arg(1).arg(self.shared.keys.base());
            for heartbeat in &heartbeats {
                let message = heartbeat.message.encode().unwrap_or_default();
                command.arg(heartbeat.agent.as_str()).arg(heartbeat.version.text()).arg(message);
            }
            match self.connection.execute(&command).await.and_then(array) {
                Ok(not_registered) => {
                    for agent in not_registered.into_iter().flatten().filter_map(|member| agent(&member)) {
                        replica.queue_again(&agent, false);
                        registrations_missing = true;
                    }
                }
                Err(error) => {
                    replica.requeue_heartbeats(heartbeats);
                    replica.requeue_heartbeats(rest);
                    return Err(error);
                }
            }
            heartbeats = rest;
        }
        Ok(registrations_missing)
    }
}

/// Reads and verifies the last heartbeats of agents.
pub(super) async fn read_heartbeats(
    shared: &Arc<Shared>,
    connection: &Connection,
    agents: &[Arc<AgentRecord>],
) -> Result<(), CommandError> {
    for agents in agents.chunks(PAGE_SIZE) {
        let identities: Vec<Identity> = agents.iter().map(|record| record.identity.clone()).collect();
        let heartbeats = connection.hash_fields(shared.keys.key('b'), &identities).await?;
        let stored = agents.iter().cloned().zip(heartbeats).filter_map(|(record, beat)| Some((record, beat?)));
        let stored: Vec<(Arc<AgentRecord>, Vec<u8>)> = stored.collect();
        let verified = verify(shared, move |shared| {
            let now = shared.now();
            let verify = |(record, beat): (Arc<AgentRecord>, Vec<u8>)| {
                Some((record.identity.clone(), shared.verifier.heartbeat(&record, &beat, now)?))
            };
            stored.into_iter().filter_map(verify).collect::<Vec<_>>()
        });
        for (agent, heartbeat) in verified.await {
            shared.replica.apply_heartbeat(&agent, heartbeat);
        }
    }
    Ok(())
}

/// Runs verifications on a worker thread: each takes a good part of a millisecond, and several under name constraints.
async fn verify<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared) -> Vec<T> + Send + 'static,
) -> Vec<T> {
    let shared = shared.clone();
    tokio::task::spawn_blocking(move || work(&shared)).await.unwrap_or_default()
}

/// Reads the epoch of the data in Redis, or creates one.
pub(super) async fn ensure_epoch(connection: &Connection, keys: &Keys) -> Result<Vec<u8>, CommandError> {
    let new = Token::random().map_err(|error| CommandError::Connection(error.to_string()))?;
    connection.execute(redis::cmd("SET").arg(keys.key('e')).arg(new.to_string()).arg("NX")).await?;
    let epoch = string(connection.execute(redis::cmd("GET").arg(keys.key('e'))).await?)?;
    epoch.ok_or_else(CommandError::unexpected_reply)
}

/// Parses the revision; 0 if there is none.
fn parse_revision(reply: Value) -> Result<u64, CommandError> {
    string(reply)?.map_or(Some(0), |text| number(&text)).ok_or_else(CommandError::unexpected_reply)
}

/// Parses members of a sorted set with their revisions. Sets `revision` to the last one.
fn parse_changes(reply: Value, revision: &mut u64) -> Result<Vec<Vec<u8>>, CommandError> {
    let mut members = Vec::new();
    let mut items = array(reply)?.into_iter().flatten();
    while let (Some(member), Some(score)) = (items.next(), items.next()) {
        let score = number(&score).filter(|score| *score > *revision).ok_or_else(CommandError::unexpected_reply)?;
        *revision = score;
        members.push(member);
    }
    Ok(members)
}
