//! A [`ClusterState`] in Redis, which several mappers share.
//!
//! Every mapper keeps a local [replica] of what it received and of what it read and [verified](verify), and continues with it while
//! Redis is unavailable. The [sync] task writes what this mapper received, reads what others wrote, and reconnects after an outage. The
//! agents for a request are looked up in Redis, as the intersection of the sets of its service and its tags.
//!
//! # What a hostile Redis can do
//!
//! Redis holds each agent's registration and last heartbeat with their proof: the agent's signature over the header, and the body. Every
//! mapper verifies signature, certificate (chain, validity, revocation) and identity whenever it reads them, and applies its own policy.
//! So an attacker who controls Redis
//!
//! * cannot invent an agent, nor change the services, tags, process or load of one;
//! * cannot replace a registration that a mapper knows by an earlier one: the order (instance, sequence) is signed. A mapper that has
//!   just started, and has not yet received a message from the agent itself, can be given an earlier registration of the same process;
//! * can keep a dead agent alive, for mappers that do not receive its messages themselves, for the lifetime of the agent's last message
//!   (60 s) plus the agent timeout: the time at which an agent was seen is not signed, but the expiry of its message is;
//! * can hide agents from mappers that do not receive their messages. An agent that a mapper received a message from within the agent
//!   timeout is found even if Redis does not list it;
//! * can read which agents offer which services, with their tags and load: registrations and heartbeats are stored unencrypted. Requests
//!   and answers are never sent to Redis;
//! * can be slow or unavailable: each reply has a time limit and a size limit, and mappers continue with their replica.
//!
//! Malformed data, keys of other types and keys of other programs are handled in the same way: they are refused, counted and logged.

mod connection;
mod keys;
mod replica;
mod sync;
mod verify;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;

pub use connection::{DangerousRedisOptions, RedisError, RedisOptions};
pub use verify::RedisRefusal;

use super::state::{AgentQuery, AgentRecord, ClusterState, Heartbeat, StateContext, StateError};
use crate::clock::Timestamp;
use crate::packet::Identity;
use connection::{Address, CommandError, Connection, array, string};
use keys::Keys;
use replica::Replica;
use sync::{Lookups, Shared};
use verify::Verifier;

/// How long the first synchronization may take when a mapper starts.
const INITIAL_SYNC_TIMEOUT: Duration = Duration::from_secs(30);

/// A [`ClusterState`] in Redis (version 6 or later, or compatible), which several mappers share. Clones are handles to the same state.
///
/// Give each mapper a state of its own, with the same URL and prefix, and the same agent timeout. The Redis user needs permission to read
/// and write keys that begin with `{PREFIX}:`, and to run scripts.
///
/// ```no_run
/// use std::sync::Arc;
/// use nanite::mapper::{Mapper, RedisOptions, RedisState};
/// # use nanite::{serializer::Serializer, transport::Transport};
/// # async fn example(serializer: Arc<dyn Serializer>, transport: Arc<dyn Transport>) -> Result<(), Box<dyn std::error::Error>> {
/// let state = RedisState::connect("redis://localhost", RedisOptions::new(serializer.clone())).await?;
/// let mapper = Mapper::builder(serializer, transport).state(state).start().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RedisState {
    shared: Arc<Shared>,
    task: Arc<SyncTask>,
}

/// The sync task; aborted on drop.
#[derive(Debug)]
struct SyncTask {
    /// The connection made by [`RedisState::connect`], until the task starts.
    first_connection: Mutex<Option<Connection>>,
    handle: Mutex<Option<AbortHandle>>,
}

impl Drop for SyncTask {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.get_mut().take() {
            handle.abort();
        }
    }
}

impl RedisState {
    /// Connects to Redis. The URL is `redis://USER:PASSWORD@HOST:PORT/DATABASE`, `rediss://` for TLS, or `unix:///PATH`.
    ///
    /// # Errors
    /// [`RedisError`] if Redis cannot be used now. Once a mapper has started, it keeps working through outages.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self, RedisError> {
        let address = Address::new(url, &options)?;
        let keys = Keys::new(&options.prefix).ok_or(RedisError::InvalidPrefix)?;
        if options.serializer.verification().is_none() && !options.accept_unsigned {
            return Err(RedisError::NotSigned);
        }
        if options.accept_unsigned {
            tracing::warn!("unsigned registrations are accepted: anyone who can write to Redis can invent agents");
        }
        let connection = address.connect().await?;
        sync::ensure_epoch(&connection, &keys)
            .await
            .map_err(|error| RedisError::Unreachable { address: address.to_string(), why: error.to_string() })?;
        let shared = Shared {
            address,
            keys,
            refresh_interval: options.refresh_interval.max(Duration::from_millis(1)),
            timeout: options.timeout,
            replica: Replica::default(),
            verifier: Verifier::new(options.serializer, options.accept_unsigned),
            context: OnceLock::new(),
            lookups: RwLock::default(),
            reported_unavailable: AtomicBool::new(false),
            wake: Notify::new(),
            reads_requested: AtomicU64::new(0),
            reads_done: watch::Sender::new(0),
            agent_discovered: Notify::new(),
        };
        let task = SyncTask { first_connection: Mutex::new(Some(connection)), handle: Mutex::default() };
        Ok(Self { shared: Arc::new(shared), task: Arc::new(task) })
    }

    /// Whether a started mapper is connected to Redis. While it is not, it continues with its local replica.
    pub fn is_connected(&self) -> bool {
        self.shared.lookups.read().is_some()
    }

    /// How often data from Redis was refused, by reason.
    pub fn refusals(&self) -> Vec<(RedisRefusal, u64)> {
        self.shared.verifier.refusals.counts()
    }
}

#[async_trait]
impl ClusterState for RedisState {
    async fn start(&self, context: StateContext) -> Result<(), StateError> {
        self.shared.context.set(context).map_err(|_| StateError::InUse)?;
        let connection = self.task.first_connection.lock().take();
        let (ready, started) = oneshot::channel();
        let task = tokio::spawn(sync::run(self.shared.clone(), connection, ready));
        *self.task.handle.lock() = Some(task.abort_handle());
        match tokio::time::timeout(INITIAL_SYNC_TIMEOUT, started).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(StateError::Unavailable(error.to_string())),
            Ok(Err(_)) | Err(_) => {
                Err(StateError::Unavailable(format!("not synchronized within {INITIAL_SYNC_TIMEOUT:?}")))
            }
        }
    }

    async fn agent_discovered(&self) {
        self.shared.agent_discovered.notified().await;
    }

    async fn register(&self, mut agent: AgentRecord) -> Result<(), StateError> {
        if agent.proof.is_none() {
            agent.sequence = agent.last_seen.as_micros();
        }
        self.shared.replica.register(agent)?;
        self.shared.wake.notify_one();
        Ok(())
    }

    async fn heartbeat(&self, mut heartbeat: Heartbeat<'_>) -> Result<bool, StateError> {
        if heartbeat.proof.is_none() {
            heartbeat.sequence = heartbeat.now.as_micros();
        }
        Ok(self.shared.replica.heartbeat(&heartbeat))
    }

    async fn remove(&self, identity: &Identity, instance: Option<u64>) -> Result<bool, StateError> {
        let removed = self.shared.replica.remove(identity, instance);
        self.shared.wake.notify_one();
        Ok(removed)
    }

    async fn find(&self, query: &AgentQuery) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        let local = self.shared.replica.find(query);
        let Some(lookups) = self.lookups() else { return Ok(local) };
        if query.target.is_some() {
            if !local.is_empty() {
                return Ok(local);
            }
            self.read_latest().await;
            return Ok(self.shared.replica.find(query));
        }
        Ok(match self.look_up(&lookups, query).await {
            Ok(Some(found)) => self.merge(query, local, &found).await,
            // Redis has lost its data. The sync task handles it.
            Ok(None) => {
                self.shared.wake.notify_one();
                local
            }
            Err(error) => {
                self.lookup_failed(&error);
                local
            }
        })
    }

    async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        self.read_latest().await;
        Ok(self.shared.replica.all())
    }

    async fn reap(&self, silent_since: Timestamp) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        let silent = self.shared.replica.silent(silent_since);
        if silent.is_empty() {
            return Ok(Vec::new());
        }
        // Other mappers may have received heartbeats.
        if let Some(lookups) = self.lookups()
            && let Err(error) = sync::read_heartbeats(&self.shared, &lookups.connection, &silent).await
        {
            self.lookup_failed(&error);
        }
        let removed = self.shared.replica.reap(silent, silent_since);
        self.shared.wake.notify_one();
        Ok(removed)
    }
}

impl RedisState {
    fn lookups(&self) -> Option<Lookups> {
        self.shared.lookups.read().clone()
    }

    /// Handles a failed lookup. If the connection failed, lookups use the replica until the sync task has reconnected.
    fn lookup_failed(&self, error: &CommandError) {
        match error {
            CommandError::Connection(_) => {
                *self.shared.lookups.write() = None;
                self.shared.wake.notify_one();
            }
            CommandError::Rejected(why) if error.is_wrong_type() => {
                self.shared.refuse(RedisRefusal::WrongType, self.shared.keys.base(), why);
            }
            CommandError::Rejected(why) => tracing::warn!(why, "Redis rejected a lookup"),
        }
    }

    /// The agents that Redis lists for a query. `None` if Redis has lost its data.
    async fn look_up(&self, lookups: &Lookups, query: &AgentQuery) -> Result<Option<Vec<Vec<u8>>>, CommandError> {
        let keys = &self.shared.keys;
        let mut commands = redis::pipe();
        commands.cmd("GET").arg(keys.key('e'));
        commands.cmd("SINTER").arg(keys.sets(query));
        let mut replies = lookups.connection.execute_all(&commands).await?.into_iter();
        let (Some(epoch), Some(found)) = (replies.next(), replies.next()) else {
            return Err(CommandError::unexpected_reply());
        };
        if string(epoch?)?.as_deref() != Some(&lookups.epoch) {
            return Ok(None);
        }
        Ok(Some(array(found?)?.into_iter().flatten().collect()))
    }

    /// Merges the agents in the replica with those that Redis lists. Listed agents that are not in the replica are read first.
    async fn merge(
        &self,
        query: &AgentQuery,
        mut local: Vec<Arc<AgentRecord>>,
        found: &[Vec<u8>],
    ) -> Vec<Arc<AgentRecord>> {
        let replica = &self.shared.replica;
        let found: HashSet<&[u8]> = found.iter().map(Vec::as_slice).collect();
        if !self.unknown(&local, &found).is_empty() {
            self.read_latest().await;
            local = replica.find(query);
            let wrongly_listed = replica.mark_wrongly_listed(self.unknown(&local, &found));
            if wrongly_listed > 0 {
                let why =
                    format!("{wrongly_listed} agents are listed for a service or tags that they did not register");
                self.shared.refuse(RedisRefusal::Listing, query.service.as_str(), &why);
            }
        }
        replica.retain_confirmed(local, &found, self.shared.alive_since())
    }

    /// The agents that Redis lists, that are not among the local ones, and that are worth reading.
    fn unknown(&self, local: &[Arc<AgentRecord>], found: &HashSet<&[u8]>) -> Vec<Identity> {
        let known: HashSet<&[u8]> = local.iter().map(|record| record.identity.as_str().as_bytes()).collect();
        let unknown = found.iter().filter(|member| !known.contains(*member));
        self.shared.replica.retain_worth_reading(unknown.filter_map(|member| keys::agent(member)).collect())
    }

    /// Waits until everything that other mappers wrote before this call has been read, or until Redis is unavailable.
    async fn read_latest(&self) {
        let shared = &self.shared;
        if !self.is_connected() {
            return;
        }
        let request = shared.reads_requested.fetch_add(1, Ordering::SeqCst).saturating_add(1);
        shared.wake.notify_one();
        let mut done = shared.reads_done.subscribe();
        let _ = tokio::time::timeout(shared.timeout, done.wait_for(|done| *done >= request)).await;
    }
}
