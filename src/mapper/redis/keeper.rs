//! The one task that writes to Redis what this mapper heard, reads from it what others wrote, and comes back when it does.
//!
//! Registrations and removals are written at once, heartbeats once in a round; all in batches, so that a flood of them is a few round
//! trips. What changed is read by its revision: a round costs one question when nothing did.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use redis::Value;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::belief::{Beat, RedisRefusal, Registration};
use super::connection::{Connection, Trouble};
use super::copy::{Need, stale_after};
use super::keys::{BEATS, Keys, REGISTER, REMOVE, Version};
use super::{Lookups, Shared};
use crate::mapper::state::AgentRecord;
use crate::packet::{Identity, Role, Token};

/// How many changes are read at a time.
const PAGE: usize = 512;
/// How many pages are read in one round.
const PAGES: usize = 4_096;
/// How many registrations with their proofs are read at a time: they may be long.
const LONG: usize = 64;
/// How many registrations, removals and heartbeats are written at a time.
const REGISTRATIONS: usize = 16;
const REMOVALS: usize = 128;
const HEARTBEATS: usize = 128;
/// How long to wait before Redis is tried again: from this, doubled each time, up to that.
const SOON: Duration = Duration::from_millis(100);
const LATE: Duration = Duration::from_secs(5);

/// What is remembered of Redis from one connection to the next.
#[derive(Debug, Default)]
struct Before {
    epoch: Option<Arc<[u8]>>,
    revision: u64,
}

/// Keeps the copy and Redis together, for ever; except when the first connection fails, which `ready` is told.
pub(super) async fn keep(shared: Arc<Shared>, first: Option<Connection>, ready: oneshot::Sender<Result<(), Trouble>>) {
    let (mut connection, mut ready) = (first, Some(ready));
    let mut before = Before::default();
    let mut wait = SOON;
    loop {
        let began = Instant::now();
        let opened = match connection.take() {
            Some(connection) => Ok(connection),
            None => shared.address.connect().await.map_err(|error| Trouble::Lost(error.to_string())),
        };
        let trouble = match opened {
            Ok(connection) => session(&shared, connection, &mut before, &mut ready).await,
            Err(trouble) => trouble,
        };
        shared.set_lookups(None);
        shared.read.send_replace(shared.asked.load(Ordering::SeqCst));
        if let Some(ready) = ready.take() {
            let _ = ready.send(Err(trouble));
            return;
        }
        if trouble.is_wrong_type() {
            shared.belief.refusals.note(RedisRefusal::WrongType, shared.keys.base(), &trouble.to_string());
        }
        if !shared.said_away.swap(true, Ordering::Relaxed) {
            tracing::warn!(redis = %shared.address, why = %trouble, "Redis is away: going on with what is known");
        }
        wait = if began.elapsed() > LATE * 2 { SOON } else { wait };
        sleep(wait).await;
        wait = (wait * 2).min(LATE);
    }
}

/// Works over one connection until there is trouble.
async fn session(
    shared: &Arc<Shared>,
    connection: Connection,
    before: &mut Before,
    ready: &mut Option<oneshot::Sender<Result<(), Trouble>>>,
) -> Trouble {
    let opened = async {
        let session = Session::open(shared, connection, before).await?;
        session.write(true).await?;
        let lookups = shared.address.connect().await.map_err(|error| Trouble::Lost(error.to_string()))?;
        shared.set_lookups(Some(Lookups { connection: lookups, epoch: session.epoch.clone() }));
        Ok::<_, Trouble>(session)
    };
    let mut session = match opened.await {
        Ok(session) => session,
        Err(trouble) => return trouble,
    };
    if shared.said_away.swap(false, Ordering::Relaxed) {
        tracing::info!(redis = %shared.address, "Redis is back");
    }
    if let Some(ready) = ready.take() {
        let _ = ready.send(Ok(()));
    }
    let trouble = session.run().await;
    before.revision = session.listed.max(session.removed);
    trouble
}

struct Session<'a> {
    shared: &'a Arc<Shared>,
    connection: Connection,
    epoch: Arc<[u8]>,
    /// Up to which revision changes and removals have been read.
    listed: u64,
    removed: u64,
}

impl<'a> Session<'a> {
    /// Reads all that is there, and brings the copy together with it.
    async fn open(shared: &'a Arc<Shared>, connection: Connection, before: &mut Before) -> Result<Self, Trouble> {
        let epoch: Arc<[u8]> = epoch(&connection, &shared.keys).await?.into();
        let revision = connection.ask(redis::cmd("GET").arg(shared.keys.of('n'))).await?;
        let revision = text(revision)?.map_or(Some(0), |text| number(&text)).ok_or_else(Trouble::strange)?;
        let other = before.epoch.as_ref().is_some_and(|before| *before != epoch);
        let lost = other || revision < before.revision;
        if lost {
            tracing::info!(redis = %shared.address, "Redis has lost what it held: what is known is written again");
        }
        *before = Before { epoch: Some(epoch.clone()), revision };
        let mut session = Session { shared, connection, epoch, listed: 0, removed: revision };
        let mut all = HashSet::new();
        session.read(Some(&mut all)).await?;
        // Whoever is not listed was removed while this mapper was not looking; unless Redis has lost him.
        let others = shared.copy.others(&all);
        if lost {
            others.iter().for_each(|agent| shared.copy.write_again(agent, false));
        } else {
            session.look_into(&others).await?;
        }
        Ok(session)
    }

    async fn run(&mut self) -> Trouble {
        let mut rounds = interval(self.shared.refresh);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let round = tokio::select! {
                _ = rounds.tick() => true,
                () = self.shared.wake.notified() => false,
            };
            if self.shared.lookups().is_none() {
                return Trouble::Lost("a lookup had no answer".into());
            }
            if let Err(trouble) = self.step(round).await {
                return trouble;
            }
        }
    }

    async fn step(&mut self, round: bool) -> Result<(), Trouble> {
        let asked = self.shared.asked.load(Ordering::SeqCst);
        self.write(round).await?;
        if round || asked > *self.shared.read.borrow() {
            self.read(None).await?;
            self.shared.read.send_replace(asked);
        }
        if round {
            self.look_into(&self.shared.copy.next_round()).await?;
            self.write(false).await?;
        }
        Ok(())
    }

    /// Reads what has changed, and believes of it what can be believed. Collects who is listed, if asked to.
    async fn read(&mut self, mut all: Option<&mut HashSet<Identity>>) -> Result<(), Trouble> {
        let keys = &self.shared.keys;
        for _ in 0..PAGES {
            let mut questions = redis::pipe();
            questions.cmd("GET").arg(keys.of('e')).cmd("GET").arg(keys.of('n'));
            for (message, from) in [('d', self.removed), ('l', self.listed)] {
                let question = questions.cmd("ZRANGEBYSCORE").arg(keys.of(message)).arg(format!("({from}")).arg("+inf");
                question.arg("WITHSCORES").arg("LIMIT").arg(0).arg(PAGE);
            }
            let mut answers = self.connection.ask_all(&questions).await?.into_iter();
            let mut next = || answers.next().unwrap_or_else(|| Err(Trouble::strange()));
            let (epoch, revision, removed, listed) = (next()?, next()?, next()?, next()?);
            let revision = text(revision)?.map_or(Some(0), |text| number(&text)).ok_or_else(Trouble::strange)?;
            if text(epoch)?.as_deref() != Some(&self.epoch) || revision < self.listed.max(self.removed) {
                return Err(Trouble::Lost("it has lost what it held".into()));
            }
            let (removed, listed) = (changes(removed, &mut self.removed)?, changes(listed, &mut self.listed)?);
            let last = removed.len() < PAGE && listed.len() < PAGE;
            for gone in removed.iter().filter_map(|gone| self.agent(gone)) {
                self.shared.copy.removed_elsewhere(&gone);
            }
            let listed: Vec<Identity> = listed.iter().filter_map(|listed| self.agent(listed)).collect();
            self.read_about(&listed).await?;
            if let Some(all) = &mut all {
                all.extend(listed);
            }
            if last {
                return Ok(());
            }
        }
        Ok(())
    }

    fn agent(&self, text: &[u8]) -> Option<Identity> {
        let agent = identity(text);
        if agent.is_none() {
            self.shared.belief.refusals.note(RedisRefusal::Malformed, "l", "what is listed is no agent");
        }
        agent
    }

    /// Reads what is new of these agents.
    async fn read_about(&self, listed: &[Identity]) -> Result<(), Trouble> {
        if listed.is_empty() {
            return Ok(());
        }
        let Some(context) = self.shared.context.get() else { return Ok(()) };
        let since = context.clock.now().saturating_sub(stale_after(context.agent_timeout));
        let versions = fields(&self.connection, &self.shared.keys, 'v', listed).await?;
        let (mut records, mut beats) = (Vec::new(), Vec::new());
        for (agent, version) in listed.iter().zip(versions) {
            let version = version.as_deref().and_then(Version::parse);
            match self.shared.copy.need(agent, version, since) {
                Need::Nothing => {}
                Need::Beat => beats.extend(self.shared.copy.get(agent)),
                Need::Record => records.push(agent.clone()),
            }
        }
        for records in records.chunks(LONG) {
            let registrations = fields(&self.connection, &self.shared.keys, 'r', records).await?;
            let beats = fields(&self.connection, &self.shared.keys, 'b', records).await?;
            let read = records.iter().cloned().zip(registrations).zip(beats);
            let read: Vec<_> = read.filter_map(|((agent, record), beat)| Some((agent, record?, beat))).collect();
            self.believe(read).await;
        }
        read_beats(self.shared, &self.connection, &beats).await
    }

    async fn believe(&self, read: Vec<(Identity, Vec<u8>, Option<Vec<u8>>)>) {
        let believed = verify(self.shared, move |shared| {
            let Some(context) = shared.context.get() else { return Vec::new() };
            let now = context.clock.now();
            let believe = |(agent, record, beat): (Identity, Vec<u8>, Option<Vec<u8>>)| {
                let registration = shared.belief.registration(&agent, &record, context, now)?;
                let beat = beat.and_then(|beat| shared.belief.heartbeat(&registration.record, &beat, now));
                Some((registration, beat))
            };
            read.into_iter().filter_map(believe).collect::<Vec<(Registration, Option<Beat>)>>()
        });
        let alive_since = self.shared.alive_since();
        for (registration, beat) in believed.await {
            if self.shared.copy.admit(registration, beat, alive_since) {
                self.shared.news.notify_one();
            }
        }
    }

    /// Agents that are not where they should be: what lists them has lost them, or they were removed.
    async fn look_into(&self, missed: &[Identity]) -> Result<(), Trouble> {
        for missed in missed.chunks(PAGE) {
            let versions = fields(&self.connection, &self.shared.keys, 'v', missed).await?;
            for (agent, version) in missed.iter().zip(versions) {
                let version = version.as_deref().and_then(Version::parse);
                let same = self.shared.copy.get(agent).is_some_and(|record| Some(Version::of(&record)) == version);
                if same {
                    self.shared.copy.write_again(agent, true);
                } else if version.is_none() {
                    self.shared.copy.removed_elsewhere(agent);
                }
            }
        }
        Ok(())
    }

    /// Writes what waits to be written.
    async fn write(&self, with_heartbeats: bool) -> Result<(), Trouble> {
        self.write_removals().await?;
        self.write_registrations().await?;
        if with_heartbeats && self.write_heartbeats().await? {
            self.write_registrations().await?;
        }
        Ok(())
    }

    async fn write_removals(&self) -> Result<(), Trouble> {
        let copy = &self.shared.copy;
        for removals in copy.removals().chunks(REMOVALS) {
            let mut orders = redis::pipe();
            for (agent, removal) in removals {
                let beat = removal.beat.map(Version::text).unwrap_or_default();
                let order = orders.cmd("EVAL").arg(REMOVE).arg(1).arg(self.shared.keys.base());
                order.arg(agent.as_str()).arg(removal.version.text()).arg(beat);
            }
            for (answer, (agent, removal)) in self.connection.ask_all(&orders).await?.into_iter().zip(removals) {
                answer?;
                copy.has_removed(agent, *removal);
            }
        }
        Ok(())
    }

    async fn write_registrations(&self) -> Result<(), Trouble> {
        let copy = &self.shared.copy;
        for registrations in copy.registrations().chunks(REGISTRATIONS) {
            let (mut orders, mut written) = (redis::pipe(), Vec::new());
            for writing in registrations {
                let record = &writing.record;
                let Some(value) = writing.entry().encode() else {
                    // It is larger than mappers read.
                    copy.written(record);
                    continue;
                };
                let order = orders.cmd("EVAL").arg(REGISTER).arg(1).arg(self.shared.keys.base());
                order.arg(record.identity.as_str()).arg(Version::of(record).text()).arg(value);
                order.arg(Keys::memberships(record)).arg(u8::from(writing.repair));
                written.push(record);
            }
            if written.is_empty() {
                continue;
            }
            for (answer, record) in self.connection.ask_all(&orders).await?.into_iter().zip(written) {
                let Value::Int(outcome) = answer? else { return Err(Trouble::strange()) };
                if outcome > 2 {
                    let why = "sets of services or tags are of another type";
                    self.shared.belief.refusals.note(RedisRefusal::WrongType, record.identity.as_str(), why);
                }
                copy.written(record);
            }
        }
        Ok(())
    }

    /// Writes heartbeats; whether registrations have to be written again.
    async fn write_heartbeats(&self) -> Result<bool, Trouble> {
        let copy = &self.shared.copy;
        let mut again = false;
        let mut beats = copy.take_beats();
        while !beats.is_empty() {
            let rest = beats.split_off(beats.len().min(HEARTBEATS));
            let mut order = redis::cmd("EVAL");
            order.arg(BEATS).arg(1).arg(self.shared.keys.base());
            for (agent, version, entry) in &beats {
                let value = entry.encode().unwrap_or_default();
                order.arg(agent.as_str()).arg(version.text()).arg(value);
            }
            match self.connection.ask(&order).await.and_then(texts) {
                Ok(missing) => {
                    for agent in missing.into_iter().flatten().filter_map(|agent| identity(&agent)) {
                        copy.write_again(&agent, false);
                        again = true;
                    }
                }
                Err(trouble) => {
                    copy.give_back(beats);
                    copy.give_back(rest);
                    return Err(trouble);
                }
            }
            beats = rest;
        }
        Ok(again)
    }
}

/// Reads the last heartbeats of agents that are known here.
pub(super) async fn read_beats(
    shared: &Arc<Shared>,
    connection: &Connection,
    agents: &[Arc<AgentRecord>],
) -> Result<(), Trouble> {
    for agents in agents.chunks(PAGE) {
        let identities: Vec<Identity> = agents.iter().map(|record| record.identity.clone()).collect();
        let beats = fields(connection, &shared.keys, 'b', &identities).await?;
        let read = agents.iter().cloned().zip(beats).filter_map(|(record, beat)| Some((record, beat?)));
        let read: Vec<(Arc<AgentRecord>, Vec<u8>)> = read.collect();
        let believed = verify(shared, move |shared| {
            let now = shared.now();
            let believe = |(record, beat): (Arc<AgentRecord>, Vec<u8>)| {
                Some((record.identity.clone(), shared.belief.heartbeat(&record, &beat, now)?))
            };
            read.into_iter().filter_map(believe).collect::<Vec<_>>()
        });
        for (agent, beat) in believed.await {
            shared.copy.admit_beat(&agent, beat);
        }
    }
    Ok(())
}

/// Verifying takes the CPU for a good part of a millisecond for each: it is done off the reactor.
async fn verify<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared) -> Vec<T> + Send + 'static,
) -> Vec<T> {
    let shared = shared.clone();
    tokio::task::spawn_blocking(move || work(&shared)).await.unwrap_or_default()
}

/// The epoch of what Redis holds; it is made when there is none.
pub(super) async fn epoch(connection: &Connection, keys: &Keys) -> Result<Vec<u8>, Trouble> {
    let new = Token::random().map_err(|error| Trouble::Lost(error.to_string()))?;
    connection.ask(redis::cmd("SET").arg(keys.of('e')).arg(new.to_string()).arg("NX")).await?;
    let epoch = text(connection.ask(redis::cmd("GET").arg(keys.of('e'))).await?)?;
    epoch.ok_or_else(Trouble::strange)
}

/// The fields of these agents in one of the hashes: as many as there are agents.
async fn fields(
    connection: &Connection,
    keys: &Keys,
    message: char,
    agents: &[Identity],
) -> Result<Vec<Option<Vec<u8>>>, Trouble> {
    if agents.is_empty() {
        return Ok(Vec::new());
    }
    let mut question = redis::cmd("HMGET");
    question.arg(keys.of(message));
    agents.iter().for_each(|agent| {
        question.arg(agent.as_str());
    });
    let found = texts(connection.ask(&question).await?)?;
    if found.len() == agents.len() { Ok(found) } else { Err(Trouble::strange()) }
}

/// The members of a part of a sorted set; moves the revision up to the last of them.
fn changes(answer: Value, revision: &mut u64) -> Result<Vec<Vec<u8>>, Trouble> {
    let mut members = Vec::new();
    let mut answer = texts(answer)?.into_iter().flatten();
    while let (Some(member), Some(score)) = (answer.next(), answer.next()) {
        let score = number(&score).filter(|score| *score > *revision).ok_or_else(Trouble::strange)?;
        *revision = score;
        members.push(member);
    }
    Ok(members)
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The agent of this name.
pub(super) fn identity(text: &[u8]) -> Option<Identity> {
    let identity: Identity = std::str::from_utf8(text).ok()?.parse().ok()?;
    (identity.role() == Role::Agent).then_some(identity)
}

/// A text, or none.
pub(super) fn text(answer: Value) -> Result<Option<Vec<u8>>, Trouble> {
    match answer {
        Value::BulkString(text) => Ok(Some(text)),
        Value::Nil => Ok(None),
        _ => Err(Trouble::strange()),
    }
}

/// A list of texts.
pub(super) fn texts(answer: Value) -> Result<Vec<Option<Vec<u8>>>, Trouble> {
    match answer {
        Value::Array(texts) => texts.into_iter().map(text).collect(),
        _ => Err(Trouble::strange()),
    }
}
