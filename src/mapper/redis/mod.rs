//! What several mappers know of agents, shared in Redis.
//!
//! Every mapper keeps its own [copy](copy) of what it heard and of what it read and [believed](belief), and goes on with it when
//! Redis is away. One task, the [keeper], writes what this mapper heard, reads what others wrote, and comes back when Redis does. A
//! request's targets are looked up in Redis, as the intersection of the sets of its service and its tags.
//!
//! # What a hostile Redis can do
//!
//! It holds each registration and each agent's last heartbeat with what proves them: the agent's signature over the header, and the
//! body. Both are verified whenever they are read: signature, certificate (chain, validity, revocation), identity, and this mapper's
//! own policy. So whoever rules Redis
//!
//! * cannot invent an agent, nor change what one offers, its tags, its process or its load;
//! * cannot bring back an earlier registration for a later one that this mapper knows: the order (instance, sequence) is signed. A
//!   mapper that has just started, and has not heard the agent itself yet, can be given one that the same process made before;
//! * can keep a dead agent alive for a mapper that does not hear agents itself, up to the lifetime of the agent's last message (60 s)
//!   and the agent timeout: when an agent was heard is not signed, but its message's expiry is;
//! * can hide agents from mappers that do not hear them: what a mapper has heard itself within the agent timeout is found even if
//!   Redis denies it;
//! * can read who offers what, under which tags and with which load: registrations and heartbeats lie there in the clear. It never
//!   sees requests or answers;
//! * can be slow, or go away: each answer has a time limit and a size limit, and mappers go on with what they know.
//!
//! The same holds for rubbish, for keys of other types and for other programs' keys: it is refused, counted and logged.

mod belief;
mod connection;
mod copy;
mod entry;
mod keeper;
mod keys;
mod options;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;

pub use belief::RedisRefusal;
pub use options::{DangerousRedis, RedisError, RedisOptions};

use super::state::{AgentQuery, AgentRecord, ClusterState, Heartbeat, StateContext, StateError};
use crate::clock::Timestamp;
use crate::packet::Identity;
use belief::{Belief, Refusals};
use connection::{Address, Connection, Trouble};
use copy::Copy;
use keys::Keys;

/// How long the first reading may take when a mapper starts.
const FIRST: Duration = Duration::from_secs(30);

/// What several mappers know of agents, shared in Redis (6 or later, or what speaks like it). It is a handle: clones are the same.
///
/// Give every mapper its own, with the same URL and prefix, and the same agent timeout. It needs to read and write keys that begin
/// with `{PREFIX}:`, and to run scripts; nothing else.
///
/// ```no_run
/// use std::sync::Arc;
/// use nanite::mapper::{Mapper, RedisOptions, RedisState};
/// # use nanite::{packet::Identity, serializer::Serializer, transport::Transport};
/// # async fn example(serializer: Arc<dyn Serializer>, transport: Arc<dyn Transport>) -> Result<(), Box<dyn std::error::Error>> {
/// let state = RedisState::connect("redis://localhost", RedisOptions::new(serializer.clone())).await?;
/// let mapper = Mapper::builder(serializer, transport).state(state).start().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RedisState {
    shared: Arc<Shared>,
    keeper: Arc<Keeper>,
}

/// What the handles and the keeper share.
#[derive(Debug)]
struct Shared {
    address: Address,
    keys: Keys,
    refresh: Duration,
    timeout: Duration,
    copy: Copy,
    belief: Belief,
    context: OnceLock<StateContext>,
    /// The connection for lookups; none while Redis is away.
    lookups: RwLock<Option<Lookups>>,
    /// What was last said of it in the log.
    said_away: AtomicBool,
    /// Told when something has to be written, or somebody waits for what others wrote.
    wake: Notify,
    /// How often somebody asked for what others wrote, and up to which of these it has been read.
    asked: AtomicU64,
    read: watch::Sender<u64>,
    /// Told when an agent was learnt of.
    news: Notify,
}

#[derive(Clone, Debug)]
struct Lookups {
    connection: Connection,
    epoch: Arc<[u8]>,
}

/// The keeper's task; it ends with this.
#[derive(Debug)]
struct Keeper {
    /// The connection that was opened first, until there is a keeper.
    first: Mutex<Option<Connection>>,
    task: Mutex<Option<AbortHandle>>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(task) = self.task.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

impl RedisState {
    /// Connects to Redis. The URL is `redis://USER:PASSWORD@HOST:PORT/DATABASE`, `rediss://` for TLS, or `unix:///PATH`.
    ///
    /// # Errors
    /// [`RedisError`] when it cannot be used: a mapper does not start on a wrong URL. Once it runs, it goes on without Redis.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self, RedisError> {
        let address = Address::new(url, &options)?;
        let keys = Keys::new(&options.prefix).ok_or(RedisError::Prefix)?;
        if options.serializer.verification().is_none() && !options.unsigned {
            return Err(RedisError::NotSigned);
        }
        if options.unsigned {
            tracing::warn!("registrations that nothing proves are shared: whoever reaches Redis can invent agents");
        }
        let connection = address.connect().await?;
        keeper::epoch(&connection, &keys)
            .await
            .map_err(|trouble| RedisError::Unreachable { address: address.to_string(), why: trouble.to_string() })?;
        let belief =
            Belief { serializer: options.serializer, unsigned: options.unsigned, refusals: Refusals::default() };
        let shared = Shared {
            address,
            keys,
            refresh: options.refresh.max(Duration::from_millis(1)),
            timeout: options.timeout,
            copy: Copy::default(),
            belief,
            context: OnceLock::new(),
            lookups: RwLock::default(),
            said_away: AtomicBool::new(false),
            wake: Notify::new(),
            asked: AtomicU64::new(0),
            read: watch::Sender::new(0),
            news: Notify::new(),
        };
        let keeper = Keeper { first: Mutex::new(Some(connection)), task: Mutex::default() };
        Ok(Self { shared: Arc::new(shared), keeper: Arc::new(keeper) })
    }

    /// Whether Redis is there now. While it is not, mappers go on with what they know.
    pub fn is_present(&self) -> bool {
        self.shared.lookups().is_some()
    }

    /// How often something that stands in Redis was not believed.
    pub fn refusals(&self) -> Vec<(RedisRefusal, u64)> {
        self.shared.belief.refusals.counts()
    }
}

#[async_trait]
impl ClusterState for RedisState {
    async fn start(&self, context: StateContext) -> Result<(), StateError> {
        self.shared.context.set(context).map_err(|_| StateError::InUse)?;
        let first = self.keeper.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (ready, started) = oneshot::channel();
        let task = tokio::spawn(keeper::keep(self.shared.clone(), first, ready));
        *self.keeper.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task.abort_handle());
        match tokio::time::timeout(FIRST, started).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(trouble))) => Err(StateError::Unavailable(trouble.to_string())),
            Ok(Err(_)) | Err(_) => Err(StateError::Unavailable(format!("not read within {FIRST:?}"))),
        }
    }

    async fn learnt(&self) {
        self.shared.news.notified().await;
    }

    async fn register(&self, mut agent: AgentRecord) -> Result<(), StateError> {
        if agent.proof.is_none() {
            agent.sequence = agent.last_seen.as_micros();
        }
        self.shared.copy.register(agent)?;
        self.shared.wake.notify_one();
        Ok(())
    }

    async fn ping(&self, mut ping: Heartbeat<'_>) -> Result<bool, StateError> {
        if ping.proof.is_none() {
            ping.sequence = ping.now.as_micros();
        }
        Ok(self.shared.copy.heard(&ping))
    }

    async fn remove(&self, identity: &Identity, instance: Option<u64>) -> Result<bool, StateError> {
        let removed = self.shared.copy.remove(identity, instance);
        self.shared.wake.notify_one();
        Ok(removed)
    }

    async fn find(&self, query: &AgentQuery) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        Ok(self.shared.find(query).await)
    }

    async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        self.shared.read_now().await;
        Ok(self.shared.copy.all())
    }

    async fn reap(&self, silent_since: Timestamp) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        let silent = self.shared.copy.silent(silent_since);
        if silent.is_empty() {
            return Ok(Vec::new());
        }
        // Another mapper may have heard them.
        if let Some(lookups) = self.shared.lookups()
            && let Err(trouble) = keeper::read_beats(&self.shared, &lookups.connection, &silent).await
        {
            self.shared.lookups_failed(&trouble);
        }
        let gone = self.shared.copy.reap(silent, silent_since);
        self.shared.wake.notify_one();
        Ok(gone)
    }
}

impl Shared {
    fn lookups(&self) -> Option<Lookups> {
        self.lookups.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_lookups(&self, lookups: Option<Lookups>) {
        *self.lookups.write().unwrap_or_else(PoisonError::into_inner) = lookups;
    }

    /// A lookup had no answer. When that is the connection's fault, lookups are answered from the copy until the keeper has a new one.
    fn lookups_failed(&self, trouble: &Trouble) {
        match trouble {
            Trouble::Lost(_) => {
                self.set_lookups(None);
                self.wake.notify_one();
            }
            Trouble::Refused(why) if trouble.is_wrong_type() => {
                self.belief.refusals.note(RedisRefusal::WrongType, self.keys.base(), why);
            }
            Trouble::Refused(why) => tracing::warn!(why, "Redis refuses a lookup"),
        }
    }

    async fn find(&self, query: &AgentQuery) -> Vec<Arc<AgentRecord>> {
        let here = self.copy.find(query);
        let Some(lookups) = self.lookups() else { return here };
        if query.target.is_some() {
            if !here.is_empty() {
                return here;
            }
            self.read_now().await;
            return self.copy.find(query);
        }
        match self.look_up(&lookups, query).await {
            Ok(Some(found)) => self.merge(query, here, &found).await,
            // It is not the Redis that it was: the keeper finds out.
            Ok(None) => {
                self.wake.notify_one();
                here
            }
            Err(trouble) => {
                self.lookups_failed(&trouble);
                here
            }
        }
    }

    /// Whom Redis lists; none when it has lost what it held.
    async fn look_up(&self, lookups: &Lookups, query: &AgentQuery) -> Result<Option<Vec<Vec<u8>>>, Trouble> {
        let mut questions = redis::pipe();
        questions.cmd("GET").arg(self.keys.of('e'));
        questions.cmd("SINTER").arg(self.keys.sets(query));
        let mut answers = lookups.connection.ask_all(&questions).await?.into_iter();
        let (Some(epoch), Some(found)) = (answers.next(), answers.next()) else { return Err(Trouble::strange()) };
        if keeper::text(epoch?)?.as_deref() != Some(&lookups.epoch) {
            return Ok(None);
        }
        Ok(Some(keeper::texts(found?)?.into_iter().flatten().collect()))
    }

    /// Joins what is known here with what Redis lists. Whom it lists and who is not known here is read about first.
    async fn merge(
        &self,
        query: &AgentQuery,
        mut here: Vec<Arc<AgentRecord>>,
        found: &[Vec<u8>],
    ) -> Vec<Arc<AgentRecord>> {
        let found: HashSet<&[u8]> = found.iter().map(Vec::as_slice).collect();
        let unknown = self.unknown(&here, &found);
        if !unknown.is_empty() {
            self.read_now().await;
            here = self.copy.find(query);
            let baseless = self.copy.baseless(self.unknown(&here, &found));
            if baseless > 0 {
                let why = format!("{baseless} agents are listed that have not registered so");
                self.belief.refusals.note(RedisRefusal::Listing, query.service.as_str(), &why);
            }
        }
        self.copy.confirmed(here, &found, self.alive_since())
    }

    /// Of those that Redis lists, the ones that are not known here to fit and are worth reading about.
    fn unknown(&self, here: &[Arc<AgentRecord>], found: &HashSet<&[u8]>) -> Vec<Identity> {
        let known: HashSet<&[u8]> = here.iter().map(|record| record.identity.as_str().as_bytes()).collect();
        let others = found.iter().filter(|identity| !known.contains(*identity));
        self.copy.unknown(others.filter_map(|identity| keeper::identity(identity)).collect())
    }

    /// Waits until what others wrote before this has been read, or Redis turns out to be away.
    async fn read_now(&self) {
        if self.lookups().is_none() {
            return;
        }
        let ticket = self.asked.fetch_add(1, Ordering::SeqCst).saturating_add(1);
        self.wake.notify_one();
        let mut read = self.read.subscribe();
        let _ = tokio::time::timeout(self.timeout, read.wait_for(|read| *read >= ticket)).await;
    }

    fn now(&self) -> Timestamp {
        self.context.get().map_or(Timestamp::from_micros(0), |context| context.clock.now())
    }

    /// Agents that were last heard before this moment are gone.
    fn alive_since(&self) -> Timestamp {
        let timeout = self.context.get().map_or(Duration::ZERO, |context| context.agent_timeout);
        self.now().saturating_sub(timeout)
    }
}
