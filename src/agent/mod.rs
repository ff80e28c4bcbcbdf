//! Agents: long-running workers whose actors expose services.
//!
//! [`Agent::builder`] takes actors, made by [`actor`] from closures or by [`ProgramActors`] from programs, and starts the agent.
//! This file holds the builder.

mod actor;
mod dispatch;
mod exec;
mod presence;
mod proxied_jobs;
mod run;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use dispatch::Services;
use presence::SharedStatus;
use run::Settings;

use crate::audit::AuditLog;
use crate::clock::{Clock, SystemClock};
use crate::files::FileRoot;
use crate::link::Link;
use crate::packet::{Register, Role, Tag};
use crate::policy::{AllowVerified, Policy};
use crate::proxy::MapperProxy;
use crate::serializer::Serializer;
use crate::transport::Transport;

pub use actor::{Actor, BlockingHandler, Context, ExposeError, Handler, HandlerResult, Handlers, actor, reply};
pub use dispatch::{RunningJob, RunningJobs};
pub use exec::{ProgramActors, ProgramError, ProgramLimits, SkipReason, Skipped};
pub use presence::{LoadAverage, StatusSource};
pub use run::{Agent, AgentError, Announcer};

/// How often an agent sends a heartbeat, by default.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// How long running jobs may take to finish when the agent stops, by default.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How many jobs run at a time, by default.
const CONCURRENCY: usize = 16;

/// Configures an [`Agent`] and starts it; see [`Agent::builder`].
///
/// ```
/// # use nanite::agent::{Agent, actor};
/// # use nanite::packet::Identity;
/// # use nanite::serializer::PlainSerializer;
/// # use nanite::transport::MemoryBroker;
/// use std::time::Duration;
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let serializer = PlainSerializer::json(Identity::agent("fred")?);
/// # let transport = MemoryBroker::new().connect();
/// # let policy = nanite::policy::AllowVerified;
/// let agent = Agent::builder(serializer, transport)
///     .tag("eu".parse()?)
///     .status(|| 0.5)
///     .policy(policy)
///     .concurrency(4)
///     .drain(Duration::from_secs(10))
///     .start()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "nothing runs until it is started"]
pub struct AgentBuilder {
    serializer: Arc<dyn Serializer>,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    actors: Vec<Arc<dyn Actor>>,
    tags: Vec<Tag>,
    status: SharedStatus,
    policy: Arc<dyn Policy>,
    ping_time: Duration,
    concurrency: usize,
    prefetch: Option<u16>,
    drain: Duration,
    files: Option<FileRoot>,
    audit: Option<AuditLog>,
    give_way: bool,
}

impl Agent {
    /// An agent with the identity of `serializer`, connected through `transport`.
    ///
    /// [`Node::agent`](crate::Node::agent) is the shorter way when certificates are in files.
    ///
    /// ```
    /// use nanite::agent::{Agent, actor, reply};
    /// use nanite::packet::Identity;
    /// use nanite::serializer::PlainSerializer;
    /// use nanite::transport::MemoryBroker;
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let broker = MemoryBroker::new();
    /// let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
    /// let serializer = PlainSerializer::json(Identity::agent("fred")?);
    /// let agent = Agent::builder(serializer, broker.connect()).actor(text).start().await?;
    /// agent.stop().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(serializer: impl Serializer + 'static, transport: impl Transport + 'static) -> AgentBuilder {
        AgentBuilder {
            serializer: Arc::new(serializer),
            transport: Arc::new(transport),
            clock: Arc::new(SystemClock),
            actors: Vec::new(),
            tags: Vec::new(),
            status: SharedStatus(Arc::new(LoadAverage)),
            policy: Arc::new(AllowVerified),
            ping_time: PING_INTERVAL,
            concurrency: CONCURRENCY,
            prefetch: None,
            drain: DRAIN_TIMEOUT,
            files: None,
            audit: None,
            give_way: false,
        }
    }
}

impl AgentBuilder {
    /// Adds an actor.
    pub fn actor(mut self, actor: impl Actor + 'static) -> Self {
        self.actors.push(Arc::new(actor));
        self
    }

    /// Adds a tag that requests can select agents by.
    pub fn tag(mut self, tag: Tag) -> Self {
        self.tags.push(tag);
        self
    }

    /// How loaded the agent is; the system's load average by default.
    pub fn status(mut self, source: impl StatusSource) -> Self {
        self.status = SharedStatus(Arc::new(source));
        self
    }

    /// Authorizes requests and files; by default every node with a valid certificate may request everything, and every mapper may send
    /// files.
    pub fn policy(mut self, policy: impl Policy + 'static) -> Self {
        self.policy = Arc::new(policy);
        self
    }

    /// The interval of heartbeats; 15 s by default, at least 1 ms.
    pub fn ping_time(mut self, interval: Duration) -> Self {
        self.ping_time = interval;
        self
    }

    /// How many jobs run at a time; 16 by default. With 1 they run strictly in order.
    pub fn concurrency(mut self, jobs: usize) -> Self {
        self.concurrency = jobs;
        self
    }

    /// How many requests the broker delivers ahead; twice the concurrency by default.
    pub fn prefetch(mut self, messages: u16) -> Self {
        self.prefetch = Some(messages);
        self
    }

    /// How long running jobs may take to finish when the agent stops; 30 s by default.
    pub fn drain(mut self, limit: Duration) -> Self {
        self.drain = limit;
        self
    }

    /// Records every accepted and refused message, and every decision, in this log; none by default.
    pub fn audit(mut self, log: AuditLog) -> Self {
        self.audit = Some(log);
        self
    }

    /// Accepts files that mappers broadcast; none by default.
    pub fn files(mut self, root: FileRoot) -> Self {
        self.files = Some(root);
        self
    }

    /// What to do when another process of this identity already runs. By default the newest process wins: it works, and the other one
    /// stops with [`AgentError::Replaced`]. With `true` this process stops at its start, with [`AgentError::RunsAlready`]. The process
    /// that already runs logs a warning in any case.
    pub fn give_way(mut self, give_way: bool) -> Self {
        self.give_way = give_way;
        self
    }

    /// The clock; the system clock by default.
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Starts the agent in the background. Returns when it consumes its queues and has begun to register.
    ///
    /// # Errors
    /// [`AgentError`] names the option that is wrong, or why its queues cannot be used.
    pub async fn start(self) -> Result<Agent, AgentError> {
        self.settings()?.start().await
    }

    fn settings(self) -> Result<Settings, AgentError> {
        let identity = self.serializer.identity();
        if identity.role() != Role::Agent {
            return Err(AgentError::Role(identity.clone()));
        }
        if self.files.as_ref().is_some_and(|files| files.domains().len() > Register::MAX_TAGS) {
            return Err(AgentError::Option("an agent accepts files of at most 64 domains"));
        }
        if self.tags.len() > Register::MAX_TAGS {
            return Err(AgentError::Option("an agent has at most 64 tags"));
        }
        if self.ping_time < Duration::from_millis(1) {
            return Err(AgentError::Option("the ping time must be at least 1 ms"));
        }
        if self.concurrency == 0 || self.concurrency > Semaphore::MAX_PERMITS {
            return Err(AgentError::Option("the concurrency must be at least 1"));
        }
        if self.prefetch == Some(0) {
            return Err(AgentError::Option("the prefetch must be at least 1"));
        }
        let services = Services::new(self.actors)?;
        if services.names().len() > Register::MAX_SERVICES {
            return Err(AgentError::Option("an agent exposes at most 1024 services"));
        }
        let prefetch =
            self.prefetch.unwrap_or_else(|| u16::try_from(self.concurrency.saturating_mul(2)).unwrap_or(u16::MAX));
        let link = Link::builder(self.serializer, self.transport).clock(self.clock).audit(self.audit).build();
        Ok(Settings {
            proxy: MapperProxy::of_agent(link.clone()),
            link,
            services,
            tags: self.tags,
            status: self.status,
            policy: self.policy,
            ping_time: self.ping_time,
            concurrency: self.concurrency,
            prefetch,
            drain: self.drain,
            files: self.files,
            give_way: self.give_way,
        })
    }
}
