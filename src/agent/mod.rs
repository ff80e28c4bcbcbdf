//! Agents: workers whose actors offer services.

mod actor;
mod context;
mod dispatch;
mod exec;
mod presence;
mod run;
mod status;

use std::sync::Arc;
use std::time::Duration;

pub use actor::{Actor, BlockingHandler, ExposeError, Handler, Handlers, Reply, actor};
pub use context::Context;
pub use dispatch::{RunningJob, RunningJobs};
pub use exec::{ProgramActors, ProgramError, ProgramLimits, SkipReason, Skipped};
pub use run::{Agent, AgentError, AgentHandle, Announcer};
pub use status::{LoadAverage, StatusSource};

use crate::audit::AuditLog;
use crate::clock::{Clock, SystemClock};
use crate::files::FileRoot;
use crate::link::{IdentityMismatch, Link};
use crate::packet::{Identity, Register, Tag};
use crate::policy::{AllowVerified, Policy};
use crate::proxy::MapperProxy;
use crate::serializer::Serializer;
use crate::transport::Transport;
use dispatch::Services;
use status::SharedStatus;

/// Builds an [`Agent`]: who it is and how it talks are given first, everything else has a default.
#[derive(Debug)]
pub struct AgentBuilder {
    identity: Identity,
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

/// Why an agent cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The serializer signs for somebody else.
    #[error(transparent)]
    Identity(#[from] IdentityMismatch),
    /// A node of this role cannot have this identity.
    #[error("{0} is of another role")]
    Role(Identity),
    /// A handler cannot be exposed.
    #[error(transparent)]
    Expose(#[from] ExposeError),
    /// An option is out of its range.
    #[error("{0}")]
    Option(&'static str),
}

impl Agent {
    /// An agent of this identity, that speaks through `serializer` and `transport`.
    pub fn builder(identity: Identity, serializer: Arc<dyn Serializer>, transport: Arc<dyn Transport>) -> AgentBuilder {
        AgentBuilder {
            identity,
            serializer,
            transport,
            clock: Arc::new(SystemClock),
            actors: Vec::new(),
            tags: Vec::new(),
            status: SharedStatus(Arc::new(LoadAverage)),
            policy: Arc::new(AllowVerified),
            ping_time: Duration::from_secs(15),
            concurrency: 16,
            prefetch: None,
            drain: Duration::from_secs(30),
            files: None,
            audit: None,
            give_way: false,
        }
    }
}

impl AgentBuilder {
    /// Adds an actor.
    #[must_use]
    pub fn actor(mut self, actor: impl Actor + 'static) -> Self {
        self.actors.push(Arc::new(actor));
        self
    }

    /// Adds a tag that requests can ask for.
    #[must_use]
    pub fn tag(mut self, tag: Tag) -> Self {
        self.tags.push(tag);
        self
    }

    /// How loaded the agent is; the system's load average by default.
    #[must_use]
    pub fn status(mut self, source: impl StatusSource) -> Self {
        self.status = SharedStatus(Arc::new(source));
        self
    }

    /// Who may have what done; everybody with a valid certificate by default.
    #[must_use]
    pub fn policy(mut self, policy: impl Policy + 'static) -> Self {
        self.policy = Arc::new(policy);
        self
    }

    /// How often it pings; 15 s by default, 1 ms at least.
    #[must_use]
    pub fn ping_time(mut self, every: Duration) -> Self {
        self.ping_time = every;
        self
    }

    /// How many jobs run at a time; 16 by default; 1: strictly one after the other.
    #[must_use]
    pub fn concurrency(mut self, jobs: usize) -> Self {
        self.concurrency = jobs;
        self
    }

    /// How many requests the broker hands out ahead; twice the concurrency by default.
    #[must_use]
    pub fn prefetch(mut self, messages: u16) -> Self {
        self.prefetch = Some(messages);
        self
    }

    /// How long running jobs may take when the agent is stopped; 30 s by default.
    #[must_use]
    pub fn drain(mut self, limit: Duration) -> Self {
        self.drain = limit;
        self
    }

    /// Writes every message that is accepted or refused, and every decision, to this log; none by default.
    #[must_use]
    pub fn audit(mut self, log: AuditLog) -> Self {
        self.audit = Some(log);
        self
    }

    /// Takes files that mappers broadcast; none by default.
    #[must_use]
    pub fn files(mut self, root: FileRoot) -> Self {
        self.files = Some(root);
        self
    }

    /// What happens when another process of this identity runs already, as the mappers know: this one ends at its start, with
    /// [`AgentError::RunsAlready`], instead of taking the other's place. It does not give way by default: the process that was started
    /// last has the place, and the earlier one ends with [`AgentError::Replaced`]. Both are told in any case.
    #[must_use]
    pub fn give_way(mut self, give_way: bool) -> Self {
        self.give_way = give_way;
        self
    }

    /// The clock; the system's by default.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Makes the agent. It does nothing until it is [run](Agent::run) or [started](Agent::start).
    ///
    /// # Errors
    /// [`BuildError`] says what does not fit together.
    pub fn build(self) -> Result<Agent, BuildError> {
        if self.identity.role() != crate::packet::Role::Agent {
            return Err(BuildError::Role(self.identity));
        }
        if self.files.as_ref().is_some_and(|files| files.domains().len() > Register::MAX_TAGS) {
            return Err(BuildError::Option("an agent takes files of at most 64 domains"));
        }
        if self.tags.len() > Register::MAX_TAGS {
            return Err(BuildError::Option("an agent carries at most 64 tags"));
        }
        if self.ping_time < Duration::from_millis(1) {
            return Err(BuildError::Option("the ping time is at least 1 ms"));
        }
        if self.concurrency == 0 || self.concurrency > tokio::sync::Semaphore::MAX_PERMITS {
            return Err(BuildError::Option("the concurrency is at least 1"));
        }
        if self.prefetch == Some(0) {
            return Err(BuildError::Option("the prefetch is at least 1"));
        }
        let services = Services::new(self.actors)?;
        if services.names().len() > Register::MAX_SERVICES {
            return Err(BuildError::Option("an agent offers at most 1024 services"));
        }
        let prefetch =
            self.prefetch.unwrap_or_else(|| u16::try_from(self.concurrency.saturating_mul(2)).unwrap_or(u16::MAX));
        let link = Link::new(self.identity, self.serializer, self.transport, self.clock)?.with_audit(self.audit);
        Ok(Agent {
            proxy: MapperProxy::of(link.clone()),
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
