//! What a mapper's handles and tasks share, and the messages that a mapper sends to tell nodes about itself.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, OnceCell, watch};
use tokio::task::AbortHandle;

use super::selector::Selectors;
use super::state::{AgentRecord, ClusterState};
use crate::clock::Timestamp;
use crate::link::{Link, Outbound, SendError};
use crate::packet::{Advertise, DuplicateInstance, Identity};
use crate::policy::Policy;
use crate::request::PendingRequests;
use crate::serializer::Audience;
use crate::transport::{Destination, topology};

/// A change in the agents that a mapper knows. See [`MapperBuilder::on_agent`](super::MapperBuilder::on_agent).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum AgentEvent {
    /// An agent registered, for the first time or again.
    Registered(Arc<AgentRecord>),
    /// An agent unregistered.
    Unregistered(Identity),
    /// An agent was silent for longer than the agent timeout.
    TimedOut(Arc<AgentRecord>),
}

/// A callback for [`AgentEvent`]s.
pub(super) struct AgentHook(pub Box<dyn Fn(&AgentEvent) + Send + Sync>);

impl fmt::Debug for AgentHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentHook")
    }
}

/// The state of a running mapper.
#[derive(Debug)]
pub(super) struct Shared {
    pub link: Link,
    pub state: Arc<dyn ClusterState>,
    pub policy: Arc<dyn Policy>,
    pub pending: Arc<PendingRequests>,
    pub selectors: Selectors,
    pub agent_timeout: Duration,
    pub request_timeout: Duration,
    pub offline_failsafe: bool,
    pub offline_redelivery: Duration,
    pub persistent: bool,
    pub hooks: Vec<AgentHook>,
    /// Notified when an agent registers here or is discovered by the state.
    pub agents_changed: Notify,
    /// Counts the advertisements received from other mappers.
    pub advertisements: watch::Sender<u64>,
    /// Set once other mappers have had time to advertise themselves.
    pub mappers_discovered: OnceCell<()>,
}

/// A mapper's tasks; aborted on drop.
#[derive(Debug, Default)]
pub(super) struct Tasks(Vec<AbortHandle>);

impl Tasks {
    pub fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.push(tokio::spawn(task).abort_handle());
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// Which agents are asked to register.
#[derive(Clone, Debug)]
pub(super) enum RegistrationRequest {
    All,
    /// Every process of one agent, through the exchange.
    Agent(Identity),
    /// One process, through its own queue, which it reads even while it is busy.
    Process(Identity, u64),
}

impl RegistrationRequest {
    /// A request to the process of an agent, or to the agent if the process is not known.
    pub fn to(agent: Identity, instance: Option<u64>) -> Self {
        match instance {
            Some(instance) => Self::Process(agent, instance),
            None => Self::Agent(agent),
        }
    }
}

impl Shared {
    /// Agents that were last seen before this time have timed out.
    pub fn silent_since(&self) -> Timestamp {
        self.link.now().saturating_sub(self.agent_timeout)
    }

    /// Asks agents to register; a failure is logged.
    pub async fn request_registration(&self, request: RegistrationRequest) {
        if let Err(error) = self.try_request_registration(request).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "failed to ask agents to register");
        }
    }

    /// Asks agents to register.
    pub async fn try_request_registration(&self, request: RegistrationRequest) -> Result<(), SendError> {
        let exchange = || Destination::exchange(topology::ADVERTISE);
        let (audience, destination, target) = match request {
            RegistrationRequest::Process(agent, instance) => {
                let queue = topology::process_queue_name(agent.as_str(), instance);
                (Audience::One(agent.clone()), Destination::Queue(queue), Some(agent))
            }
            RegistrationRequest::Agent(agent) => (Audience::Agents, exchange(), Some(agent)),
            RegistrationRequest::All => (Audience::Agents, exchange(), None),
        };
        let advertise = Advertise { target, duplicate: None, serves_requests: self.link.serves_requests() };
        self.link.send(Outbound::new(advertise, audience), destination).await?;
        Ok(())
    }

    /// Sends an advertisement to one process, with a duplicate instance of it, if there is one.
    pub async fn advertise_to(
        &self,
        node: &Identity,
        instance: u64,
        duplicate: Option<DuplicateInstance>,
    ) -> Result<(), SendError> {
        let queue = topology::process_queue_name(node.as_str(), instance);
        let advertise =
            Advertise { target: Some(node.clone()), duplicate, serves_requests: self.link.serves_requests() };
        self.link.send(Outbound::new(advertise, node.clone()), Destination::Queue(queue)).await?;
        Ok(())
    }

    /// Calls the hooks.
    pub fn emit(&self, event: &AgentEvent) {
        for hook in &self.hooks {
            if catch_unwind(AssertUnwindSafe(|| hook.0(event))).is_err() {
                tracing::warn!("an agent callback panicked");
            }
        }
    }
}
