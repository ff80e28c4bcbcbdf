//! A running agent: it consumes its queues, runs jobs, and stops without losing one.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use super::actor::ExposeError;
use super::dispatch::{Dispatcher, RunningJob, RunningJobs, Services};
use super::presence::{Presence, PresenceCommand, SharedStatus};
use crate::clock::Timestamp;
use crate::files::{FileReceiver, FileRoot};
use crate::link::{Link, Subscription};
use crate::packet::{Advertise, DuplicateInstance, Identity, MessageId, Packet, Tag};
use crate::policy::Policy;
use crate::proxy::MapperProxy;
use crate::serializer::{InboundQueue, OpenErrorKind};
use crate::transport::{TransportError, topology};

/// How many control messages are unacknowledged at a time.
const CONTROL_PREFETCH: u16 = 32;
/// How long to wait for the unregistration to be sent.
const UNREGISTER_TIMEOUT: Duration = Duration::from_secs(5);
/// How many other processes of this agent are remembered, to handle each only once.
const MAX_DUPLICATES: usize = 16;
/// How long to wait for the mappers to report another process of this agent.
const DUPLICATE_CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for further mappers after one has answered.
const FURTHER_MAPPERS_TIMEOUT: Duration = Duration::from_millis(200);

/// What an agent is built from.
#[derive(Debug)]
pub(super) struct Settings {
    pub link: Link,
    pub proxy: MapperProxy,
    pub services: Services,
    pub tags: Vec<Tag>,
    pub status: SharedStatus,
    pub policy: Arc<dyn Policy>,
    pub ping_time: Duration,
    pub concurrency: usize,
    pub prefetch: u16,
    pub drain: Duration,
    pub files: Option<FileRoot>,
    pub give_way: bool,
}

/// Why an agent could not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The identity is a mapper's.
    #[error("{0} is not an agent")]
    Role(Identity),
    /// A handler cannot be exposed.
    #[error(transparent)]
    Expose(#[from] ExposeError),
    /// An option is out of its range.
    #[error("{0}")]
    Option(&'static str),
    /// Its queues cannot be used.
    #[error("cannot use the agent's queues")]
    Transport(#[from] TransportError),
    /// The transport was closed.
    #[error("the transport was closed")]
    Closed,
    /// Replaced by a newer process of the same identity. It has finished its running jobs.
    #[error("replaced by a newer process of this agent, started {0}")]
    Replaced(Timestamp),
    /// Another process of the same identity runs, and this one was told to [give way](super::AgentBuilder::give_way).
    #[error("another process of this agent already runs, started {0}")]
    RunsAlready(Timestamp),
}

/// A running agent. Dropping it stops the agent at once; [`Agent::stop`] lets it finish its running jobs.
#[derive(Debug)]
pub struct Agent {
    link: Link,
    proxy: MapperProxy,
    dispatcher: Arc<Dispatcher>,
    announcer: Announcer,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), AgentError>>,
}

/// Makes an agent register again, as after a renewal of its certificate: the mappers learn the new certificate that way.
///
/// ```
/// # fn example(agent: &nanite::agent::Agent) {
/// let announcer = agent.announcer();
/// // after SecureSerializer::replace_credentials:
/// announcer.announce();
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Announcer(mpsc::Sender<PresenceCommand>);

impl Announcer {
    /// Makes the agent register soon; does not wait for it. Does nothing once the agent has stopped.
    pub fn announce(&self) {
        // When the queue is full, a registration is already on its way.
        let _ = self.0.try_send(PresenceCommand::Register(None));
    }
}

impl Agent {
    /// The identity of the agent.
    pub fn identity(&self) -> &Identity {
        self.link.identity()
    }

    /// Takes no new requests, unregisters, and waits for the running jobs, up to the drain limit. Requests that were not begun go back
    /// to the agent's queue.
    ///
    /// ```
    /// # async fn example(agent: nanite::agent::Agent) -> Result<(), nanite::agent::AgentError> {
    /// agent.stop().await
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`AgentError`] when the agent had stopped by itself before.
    pub async fn stop(mut self) -> Result<(), AgentError> {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        (&mut self.task).await.unwrap_or(Err(AgentError::Closed))
    }

    /// Runs until `shutdown` completes, then stops as [`stop`](Self::stop) does; returns earlier when the agent stops by itself.
    ///
    /// ```
    /// # async fn example(agent: nanite::agent::Agent) -> Result<(), nanite::agent::AgentError> {
    /// let (shutdown, stopped) = tokio::sync::oneshot::channel::<()>();
    /// # drop(shutdown);
    /// agent.run_until(async move { drop(stopped.await) }).await
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`AgentError`] when the agent stopped by itself.
    pub async fn run_until(mut self, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
        tokio::select! {
            biased;
            ended = &mut self.task => return ended.unwrap_or(Err(AgentError::Closed)),
            () = shutdown => {}
        }
        self.stop().await
    }

    /// Runs until Ctrl-C, then stops as [`stop`](Self::stop) does; returns earlier when the agent stops by itself.
    ///
    /// # Errors
    /// [`AgentError`] when the agent stopped by itself.
    pub async fn run(self) -> Result<(), AgentError> {
        self.run_until(async {
            if tokio::signal::ctrl_c().await.is_err() {
                // Without a handler the signal ends the process.
                std::future::pending().await
            }
        })
        .await
    }

    /// A handle that makes the agent register again.
    pub fn announcer(&self) -> Announcer {
        self.announcer.clone()
    }

    /// Sends requests to other agents, through a mapper, in this agent's name.
    ///
    /// ```
    /// # async fn example(agent: nanite::agent::Agent) -> Result<(), nanite::request::RequestError> {
    /// let answers = agent.proxy().request("/text/upper", "hello").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn proxy(&self) -> &MapperProxy {
        &self.proxy
    }

    /// The running jobs.
    ///
    /// ```
    /// # fn example(agent: &nanite::agent::Agent) {
    /// for job in agent.running() {
    ///     println!("{} for {}, since {}", job.service, job.caller, job.since);
    /// }
    /// # }
    /// ```
    pub fn running(&self) -> Vec<RunningJob> {
        self.dispatcher.running()
    }

    /// A view of the running jobs, which also works while the agent stops.
    pub fn jobs(&self) -> RunningJobs {
        RunningJobs::new(self.dispatcher.clone())
    }

    /// How many messages were refused at each step.
    pub fn refusals(&self) -> Vec<(OpenErrorKind, u64)> {
        self.link.refusals()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Settings {
    /// Starts an agent with these settings.
    pub async fn start(self) -> Result<Agent, AgentError> {
        let running = self.open().await?;
        let (stop, stopped) = oneshot::channel::<()>();
        let (link, proxy) = (running.settings.link.clone(), running.settings.proxy.clone());
        let dispatcher = running.dispatcher.clone();
        let announcer = Announcer(running.presence.clone());
        let task = tokio::spawn(running.run(async move {
            let _ = stopped.await;
        }));
        Ok(Agent { link, proxy, dispatcher, announcer, stop: Some(stop), task })
    }

    async fn open(self) -> Result<Running, AgentError> {
        let (link, name) = (&self.link, self.link.identity().as_str());
        let control = topology::agent_control(name, link.instance());
        let mut control = link.subscribe(&control, InboundQueue::AgentControl, CONTROL_PREFETCH).await?;
        if self.give_way {
            self.check_for_duplicate(&mut control).await?;
        }
        let inbox = link.subscribe(&topology::agent_inbox(name), InboundQueue::AgentInbox, self.prefetch).await?;
        let presence = Presence {
            link: link.clone(),
            services: self.services.clone(),
            tags: self.tags.clone(),
            files: self.files.as_ref().map(|files| files.domains().to_vec()).unwrap_or_default(),
            status: self.status.clone(),
            ping_time: self.ping_time,
        };
        let presence = presence.start();
        let files = self.files.clone();
        let files = files.map(|root| FileReceiver::start(link.clone(), root, self.policy.clone()));
        let mut watchers = JoinSet::new();
        for mut changes in self.services.actors().iter().filter_map(|actor| actor.changes()) {
            let presence = presence.clone();
            watchers.spawn(async move {
                while changes.changed().await.is_ok() && presence.send(PresenceCommand::Register(None)).await.is_ok() {}
            });
        }
        let dispatcher =
            Arc::new(Dispatcher::new(link.clone(), self.proxy.clone(), self.services.clone(), self.policy.clone()));
        Ok(Running { files, presence, dispatcher, control, inbox, _watchers: watchers, settings: self })
    }

    /// Asks the mappers whether another process of this identity runs.
    async fn check_for_duplicate(&self, control: &mut Subscription) -> Result<(), AgentError> {
        if let Err(error) = self.link.advertise_to_mappers().await {
            tracing::info!(
                error = &error as &dyn std::error::Error,
                "no mapper answers whether this agent already runs"
            );
            return Ok(());
        }
        let mut until = tokio::time::Instant::now() + DUPLICATE_CHECK_TIMEOUT;
        while let Ok(received) = tokio::time::timeout_at(until, control.next()).await {
            let inbound = received.ok_or(AgentError::Closed)?.accept().await;
            let Packet::Advertise(advertise) = &inbound.packet else { continue };
            if let Some(duplicate) = advertise.duplicate.filter(|duplicate| duplicate.instance != self.link.instance())
            {
                return Err(AgentError::RunsAlready(Timestamp::from_micros(duplicate.instance)));
            }
            if advertise.target.as_ref() == Some(self.link.identity()) {
                until = until.min(tokio::time::Instant::now() + FURTHER_MAPPERS_TIMEOUT);
            }
        }
        Ok(())
    }
}

/// An agent that consumes its queues.
struct Running {
    settings: Settings,
    dispatcher: Arc<Dispatcher>,
    presence: mpsc::Sender<PresenceCommand>,
    files: Option<FileReceiver>,
    control: Subscription,
    inbox: Subscription,
    /// Register again when an actor's services change; aborted on drop.
    _watchers: JoinSet<()>,
}

impl Running {
    async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
        let permits = Arc::new(Semaphore::new(self.settings.concurrency));
        let mut jobs = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        let mut reported = VecDeque::new();
        let mut work_first = false;
        loop {
            // A permit first: without a free worker, requests stay unacknowledged, up to the prefetch.
            let work = async {
                let permit = permits.clone().acquire_owned().await;
                (permit, self.inbox.next().await)
            };
            // In turn, so that neither queue waits for the other to be empty.
            work_first = !work_first;
            let next = in_order(work_first, work, self.control.next());
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(_) = jobs.join_next() => {}
                next = next => match next {
                Either::Left((permit, received)) => {
                    let (Ok(permit), Some(received)) = (permit, received) else { return Err(AgentError::Closed) };
                    let dispatcher = self.dispatcher.clone();
                    jobs.spawn(async move {
                        dispatcher.handle(received).await;
                        drop(permit);
                    });
                }
                Either::Right(received) => {
                    let Some(received) = received else { return Err(AgentError::Closed) };
                    if let (Packet::FileStart(_) | Packet::FileChunk(_) | Packet::FileEnd(_), Some(files)) =
                        (&received.inbound.packet, &self.files)
                    {
                        files.handle(received).await;
                        continue;
                    }
                    let inbound = received.accept().await;
                    let id = inbound.signer().map(|signer| signer.id());
                    match &inbound.packet {
                        Packet::Advertise(_) if self.settings.proxy.send_again(&inbound) => {}
                        Packet::Advertise(Advertise { target: Some(target), .. }) if target != self.settings.link.identity() => {}
                        Packet::Advertise(Advertise { duplicate: Some(duplicate), .. }) => {
                            // Each mapper reports it.
                            let is_news = !reported.contains(duplicate);
                            if is_news && let Some(replaced) = self.handle_duplicate(*duplicate, id) {
                                self.finish(jobs, false).await;
                                return Err(replaced);
                            }
                            if is_news {
                                reported.push_front(*duplicate);
                                reported.truncate(MAX_DUPLICATES);
                            }
                        }
                        Packet::Advertise(_) => self.register(id),
                        _ => drop(self.settings.proxy.answered(inbound).await),
                    }
                }
                }
            }
        }
        self.finish(jobs, true).await;
        Ok(())
    }

    /// A mapper reported another process of this identity. The newest process wins: returns the error to stop with if the other
    /// one is newer and has replaced this one.
    fn handle_duplicate(&self, duplicate: DuplicateInstance, in_reply_to: Option<MessageId>) -> Option<AgentError> {
        let (own, other) = (self.settings.link.instance(), Timestamp::from_micros(duplicate.instance));
        let agent = self.settings.link.identity();
        match (duplicate.instance > own, duplicate.replaced) {
            (true, true) => {
                tracing::warn!("replaced by a newer process of {agent}, started {other}; shutting down");
                return Some(AgentError::Replaced(other));
            }
            (true, false) => tracing::warn!("a newer process of {agent} runs, started {other}"),
            (false, true) => {
                tracing::warn!(
                    "this process has replaced an older process of {agent} that still runs, started {other}"
                );
            }
            (false, false) => {
                tracing::warn!("an older process of {agent} runs, started {other}; this process replaces it");
                self.register(in_reply_to);
            }
        }
        None
    }

    fn register(&self, in_reply_to: Option<MessageId>) {
        // When the queue is full, a registration is already on its way.
        let _ = self.presence.try_send(PresenceCommand::Register(in_reply_to));
    }

    /// Takes no new requests and finishes the running jobs; unregisters, unless the mappers know a newer process of this identity.
    async fn finish(self, mut jobs: JoinSet<()>, unregisters: bool) {
        let (done, unregistered) = oneshot::channel();
        let unregister = async {
            let command = if unregisters { PresenceCommand::Unregister(done) } else { PresenceCommand::Stop };
            if self.presence.send(command).await.is_ok() && unregisters {
                let _ = unregistered.await;
            }
        };
        if tokio::time::timeout(UNREGISTER_TIMEOUT, unregister).await.is_err() {
            tracing::warn!("failed to unregister in time");
        }
        // Requests that were delivered and not begun go back to the queue.
        drop(self.inbox);
        let drained = async { while jobs.join_next().await.is_some() {} };
        if tokio::time::timeout(self.settings.drain, drained).await.is_err() {
            tracing::warn!(jobs = jobs.len(), "jobs aborted: not finished within the drain limit");
            jobs.shutdown().await;
        }
    }
}

/// Whichever ends first; if both are ready, `left` if it goes first. Cancel safe if both are.
async fn in_order<L, R>(
    left_first: bool,
    left: impl Future<Output = L>,
    right: impl Future<Output = R>,
) -> Either<L, R> {
    let (left, right) = (pin!(left), pin!(right));
    if left_first {
        match select(left, right).await {
            Either::Left((left, _)) => Either::Left(left),
            Either::Right((right, _)) => Either::Right(right),
        }
    } else {
        match select(right, left).await {
            Either::Left((right, _)) => Either::Right(right),
            Either::Right((left, _)) => Either::Left(left),
        }
    }
}
