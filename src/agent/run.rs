//! A running agent: it consumes its queues, hands out work, and stops without losing any.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use super::dispatch::{Dispatcher, RunningJob, RunningJobs, Services};
use super::presence::{Order, Presence};
use super::status::SharedStatus;
use crate::clock::Timestamp;
use crate::files::{FileBox, FileRoot};
use crate::link::{Link, Subscription};
use crate::packet::{Advertise, DuplicateInstance, MessageId, Packet, Tag};
use crate::policy::Policy;
use crate::proxy::MapperProxy;
use crate::serializer::{InboundQueue, OpenErrorKind};
use crate::transport::{TransportError, topology};

/// How many control messages are unacknowledged at a time.
const CONTROL_PREFETCH: u16 = 32;
/// How long it may take to say that the agent goes.
const FAREWELL: Duration = Duration::from_secs(5);
/// How many other processes of this agent are remembered as spoken of.
const MAX_DUPLICATES: usize = 16;
/// How long the mappers may take to say whether another process of this agent runs.
const ANSWERS: Duration = Duration::from_secs(2);
/// How long one waits for the other mappers when one has answered.
const OTHERS: Duration = Duration::from_millis(200);

/// A worker. See [`Agent::builder`].
#[derive(Debug)]
pub struct Agent {
    pub(super) link: Link,
    pub(super) proxy: MapperProxy,
    pub(super) services: Services,
    pub(super) tags: Vec<Tag>,
    pub(super) status: SharedStatus,
    pub(super) policy: Arc<dyn Policy>,
    pub(super) ping_time: Duration,
    pub(super) concurrency: usize,
    pub(super) prefetch: u16,
    pub(super) drain: Duration,
    pub(super) files: Option<FileRoot>,
    pub(super) give_way: bool,
}

/// Why an agent stopped working.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// Its queues cannot be used.
    #[error("cannot use the agent's queues")]
    Transport(#[from] TransportError),
    /// The transport was closed under it.
    #[error("the transport was closed")]
    Closed,
    /// Another process of the same identity has taken its place: it has finished its work, and ended.
    #[error("another process of this agent, started {0}, has taken the place of this one")]
    Replaced(Timestamp),
    /// Another process of the same identity runs, and this one was to [give way](super::AgentBuilder::give_way).
    #[error("another process of this agent runs, started {0}")]
    RunsAlready(Timestamp),
}

/// An agent that runs in the background. Dropping it stops the agent at once; [`AgentHandle::stop`] lets it finish its work.
#[derive(Debug)]
pub struct AgentHandle {
    link: Link,
    proxy: MapperProxy,
    dispatcher: Arc<Dispatcher>,
    announcer: Announcer,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), AgentError>>,
}

/// Has an agent register anew, as after its certificate was renewed: the mappers learn the new one by that.
#[derive(Clone, Debug)]
pub struct Announcer(mpsc::Sender<Order>);

impl Announcer {
    /// Registers anew, soon: it does not wait for that. Does nothing once the agent has stopped.
    pub fn announce(&self) {
        // When the orders are full, a registration is already on its way.
        let _ = self.0.try_send(Order::Register(None));
    }
}

impl AgentHandle {
    /// Stops taking work, unregisters, and waits for the running jobs, up to the drain limit.
    ///
    /// # Errors
    /// [`AgentError`] when the agent had stopped before, by itself.
    pub async fn stop(mut self) -> Result<(), AgentError> {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        (&mut self.task).await.unwrap_or(Err(AgentError::Closed))
    }

    /// Has the agent announce itself, whenever it is told to.
    pub fn announcer(&self) -> Announcer {
        self.announcer.clone()
    }

    /// Has other agents do something, through a mapper, in this agent's name.
    pub fn proxy(&self) -> &MapperProxy {
        &self.proxy
    }

    /// Runs until `shutdown` ends, then stops as [`AgentHandle::stop`] does; returns sooner when the agent stops by itself.
    ///
    /// # Errors
    /// [`AgentError`] when the agent stopped by itself.
    pub async fn stop_after(mut self, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
        tokio::select! {
            ended = &mut self.task => return ended.unwrap_or(Err(AgentError::Closed)),
            () = shutdown => {}
        }
        self.stop().await
    }

    /// The jobs that run now.
    pub fn running(&self) -> Vec<RunningJob> {
        self.dispatcher.running()
    }

    /// The same, to be looked at again and again: also while the agent stops.
    pub fn jobs(&self) -> RunningJobs {
        RunningJobs::of(self.dispatcher.clone())
    }

    /// How many messages were refused at each step.
    pub fn refusals(&self) -> Vec<(OpenErrorKind, u64)> {
        self.link.refusals()
    }
}

impl Drop for AgentHandle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    /// Runs the agent until `shutdown` ends; then it takes no new work, unregisters, and finishes the running jobs, up to the
    /// drain limit. What was not begun goes back to its queue.
    ///
    /// # Errors
    /// [`AgentError`] when its queues cannot be used.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
        self.open().await?.run(shutdown).await
    }

    /// Starts the agent in the background; returns when it consumes its queues and has begun to register.
    ///
    /// # Errors
    /// [`AgentError`] when its queues cannot be used.
    pub async fn start(self) -> Result<AgentHandle, AgentError> {
        let running = self.open().await?;
        let (stop, stopped) = oneshot::channel::<()>();
        let (link, proxy) = (running.agent.link.clone(), running.agent.proxy.clone());
        let dispatcher = running.dispatcher.clone();
        let announcer = Announcer(running.presence.clone());
        let task = tokio::spawn(running.run(async move {
            let _ = stopped.await;
        }));
        Ok(AgentHandle { link, proxy, dispatcher, announcer, stop: Some(stop), task })
    }

    async fn open(self) -> Result<Open, AgentError> {
        let (link, name) = (&self.link, self.link.identity().as_str());
        let control = topology::agent_control(name, link.instance());
        let mut control = link.subscribe(&control, InboundQueue::AgentControl, CONTROL_PREFETCH).await?;
        if self.give_way {
            self.look_for_another(&mut control).await?;
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
        let files = self.files.clone().map(|root| FileBox::start(link.clone(), root));
        let mut watchers = JoinSet::new();
        for mut changes in self.services.actors().iter().filter_map(|actor| actor.changes()) {
            let presence = presence.clone();
            watchers.spawn(async move {
                while changes.changed().await.is_ok() && presence.send(Order::Register(None)).await.is_ok() {}
            });
        }
        let dispatcher =
            Arc::new(Dispatcher::new(link.clone(), self.proxy.clone(), self.services.clone(), self.policy.clone()));
        Ok(Open { files, presence, dispatcher, control, inbox, _watchers: watchers, agent: self })
    }
}

impl Agent {
    /// Asks the mappers whether they know of another process of this identity that lives.
    async fn look_for_another(&self, control: &mut Subscription) -> Result<(), AgentError> {
        if let Err(error) = self.link.advertise_to_mappers().await {
            tracing::info!(
                error = &error as &dyn std::error::Error,
                "no mapper can say whether this agent runs already"
            );
            return Ok(());
        }
        let mut until = tokio::time::Instant::now() + ANSWERS;
        while let Ok(said) = tokio::time::timeout_at(until, control.next()).await {
            let said = said.ok_or(AgentError::Closed)?.accept().await;
            let Packet::Advertise(advertise) = &said.packet else { continue };
            if let Some(duplicate) = advertise.duplicate.filter(|duplicate| duplicate.instance != self.link.instance())
            {
                return Err(AgentError::RunsAlready(Timestamp::from_micros(duplicate.instance)));
            }
            if advertise.target.as_ref() == Some(self.link.identity()) {
                until = until.min(tokio::time::Instant::now() + OTHERS);
            }
        }
        Ok(())
    }
}

/// An agent whose queues are open.
struct Open {
    agent: Agent,
    dispatcher: Arc<Dispatcher>,
    presence: mpsc::Sender<Order>,
    files: Option<FileBox>,
    control: Subscription,
    inbox: Subscription,
    /// They register again when an actor's services change; they end with this.
    _watchers: JoinSet<()>,
}

impl Open {
    async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
        let permits = Arc::new(Semaphore::new(self.agent.concurrency));
        let mut jobs = JoinSet::new();
        let mut shutdown = std::pin::pin!(shutdown);
        let mut told = VecDeque::new();
        loop {
            // A permit first: what no worker is free for stays with the broker, up to the prefetch.
            let work = async {
                let permit = permits.clone().acquire_owned().await;
                (permit, self.inbox.next().await)
            };
            tokio::select! {
                () = &mut shutdown => break,
                (permit, received) = work => {
                    let (Ok(permit), Some(received)) = (permit, received) else { return Err(AgentError::Closed) };
                    let dispatcher = self.dispatcher.clone();
                    jobs.spawn(async move {
                        dispatcher.handle(received).await;
                        drop(permit);
                    });
                }
                said = self.control.next() => {
                    let Some(said) = said else { return Err(AgentError::Closed) };
                    if let (Packet::FileStart(_) | Packet::FileChunk(_) | Packet::FileEnd(_), Some(files)) =
                        (&said.inbound.packet, &self.files)
                    {
                        files.put(said).await;
                        continue;
                    }
                    let said = said.accept().await;
                    let id = said.signer().map(|signer| signer.id());
                    match &said.packet {
                        Packet::Advertise(Advertise { target: Some(target), .. }) if target != self.agent.link.identity() => {}
                        Packet::Advertise(Advertise { duplicate: Some(duplicate), .. }) => {
                            // Each mapper says it.
                            let is_news = !told.contains(duplicate);
                            if is_news && let Some(replaced) = self.told_of(*duplicate, id) {
                                self.finish(jobs, false).await;
                                return Err(replaced);
                            }
                            if is_news {
                                told.push_front(*duplicate);
                                told.truncate(MAX_DUPLICATES);
                            }
                        }
                        Packet::Advertise(_) => self.register(id),
                        _ => drop(self.agent.proxy.answered(said)),
                    }
                }
                Some(_) = jobs.join_next() => {}
            }
        }
        self.finish(jobs, true).await;
        Ok(())
    }

    /// A mapper knows of another process of this identity. The later one has the place; what this one is to end with, if it is not it.
    fn told_of(&self, duplicate: DuplicateInstance, asked: Option<MessageId>) -> Option<AgentError> {
        let (own, other) = (self.agent.link.instance(), Timestamp::from_micros(duplicate.instance));
        let agent = self.agent.link.identity();
        match (duplicate.instance > own, duplicate.replaced) {
            (true, true) => {
                tracing::warn!("another process of {agent}, started {other}, has taken the place of this one: it ends");
                return Some(AgentError::Replaced(other));
            }
            (true, false) => tracing::warn!("another process of {agent} was started {other}"),
            (false, true) => {
                tracing::warn!(
                    "this process has taken the place of another of {agent} that still runs, started {other}"
                );
            }
            (false, false) => {
                tracing::warn!("another process of {agent} runs, started {other}: this one takes its place");
                self.register(asked);
            }
        }
        None
    }

    fn register(&self, asked: Option<MessageId>) {
        // When the orders are full, a registration is already on its way.
        let _ = self.presence.try_send(Order::Register(asked));
    }

    /// Takes no new work, and finishes what runs; says goodbye to the mappers, unless another process of this identity is known there.
    async fn finish(self, mut jobs: JoinSet<()>, farewell: bool) {
        let (done, unregistered) = oneshot::channel();
        let unregister = async {
            let order = if farewell { Order::Unregister(done) } else { Order::End };
            if self.presence.send(order).await.is_ok() && farewell {
                let _ = unregistered.await;
            }
        };
        if tokio::time::timeout(FAREWELL, unregister).await.is_err() {
            tracing::warn!("the mappers could not be told that this agent goes");
        }
        // Nothing new from here on: what was delivered and not begun goes back to its queue.
        drop(self.inbox);
        let drained = async { while jobs.join_next().await.is_some() {} };
        if tokio::time::timeout(self.agent.drain, drained).await.is_err() {
            tracing::warn!(jobs = jobs.len(), "not done within the drain limit: aborted");
            jobs.shutdown().await;
        }
    }
}
