//! From a request to its handler and back: the life of one job at an agent.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use lru::LruCache;
use tokio::sync::mpsc;

use super::context::{Context, Emitted, Inner};
use super::{Actor, ExposeError, HandlerResult};
use crate::audit::DecisionSubject;
use crate::clock::Timestamp;
use crate::link::{Link, Received, acknowledge};
use crate::packet::{Failure, FailureCode, Identity, Kind, Packet, Payload, Request, Service, Token};
use crate::policy::Policy;
use crate::proxy::MapperProxy;
use crate::request::ReplyTo;
use crate::serializer::Verified;

/// How many intermediate results of one job wait to be sent; a handler that emits faster waits.
const EMITTED: usize = 16;
/// How many requests of a plain format are remembered, to run a redelivered one once. Secure ones are remembered by the serializer.
const REMEMBERED: usize = 8192;

/// The services of all actors of an agent.
#[derive(Clone, Debug)]
pub(super) struct Services {
    actors: Arc<[Arc<dyn Actor>]>,
}

impl Services {
    /// Joins actors; a service that two of them offer is an error.
    pub fn new(actors: Vec<Arc<dyn Actor>>) -> Result<Self, ExposeError> {
        let mut seen = HashMap::new();
        for actor in &actors {
            actor.check()?;
            for service in actor.services() {
                if seen.insert(service.clone(), ()).is_some() {
                    return Err(ExposeError::Twice(service));
                }
            }
        }
        Ok(Self { actors: actors.into() })
    }

    pub fn actors(&self) -> &[Arc<dyn Actor>] {
        &self.actors
    }

    /// The names of all services, sorted.
    pub fn names(&self) -> Vec<Service> {
        let mut names: Vec<Service> = self.actors.iter().flat_map(|actor| actor.services()).collect();
        names.sort();
        names.dedup();
        names
    }

    fn find(&self, service: &Service) -> Option<&Arc<dyn Actor>> {
        self.actors.iter().find(|actor| actor.services().contains(service))
    }
}

/// A job that runs now.
#[derive(Clone, Debug)]
pub struct RunningJob {
    /// The service.
    pub service: Service,
    /// Who wants it done.
    pub caller: Identity,
    /// Since when.
    pub since: Timestamp,
}

/// The jobs of an agent, seen from outside.
#[derive(Clone, Debug)]
pub struct RunningJobs(Arc<Dispatcher>);

impl RunningJobs {
    pub(super) fn of(dispatcher: Arc<Dispatcher>) -> Self {
        Self(dispatcher)
    }

    /// The jobs that run now.
    pub fn list(&self) -> Vec<RunningJob> {
        self.0.running()
    }
}

/// Takes requests to their handlers.
#[derive(Debug)]
pub(super) struct Dispatcher {
    link: Link,
    proxy: MapperProxy,
    services: Services,
    policy: Arc<dyn Policy>,
    running: Mutex<BTreeMap<u64, RunningJob>>,
    /// Requests of a plain format that were taken already.
    taken: Mutex<LruCache<(Identity, Token), ()>>,
}

impl Dispatcher {
    pub fn new(link: Link, proxy: MapperProxy, services: Services, policy: Arc<dyn Policy>) -> Self {
        let remembered = NonZeroUsize::new(REMEMBERED).unwrap_or(NonZeroUsize::MIN);
        let taken = Mutex::new(LruCache::new(remembered));
        Self { link, proxy, services, policy, running: Mutex::default(), taken }
    }

    /// The jobs that run now.
    pub fn running(&self) -> Vec<RunningJob> {
        lock(&self.running).values().cloned().collect()
    }

    /// Does what a message asks for, answers, and only then acknowledges it.
    pub async fn handle(&self, received: Received) {
        let Received { inbound, acker, .. } = received;
        let (Some(sender), signer) = (inbound.sender().cloned(), inbound.signer().cloned()) else {
            return acknowledge(acker).await;
        };
        let (request, mut reply_to) = match inbound.packet {
            Packet::Request(request) => {
                let Some(reply_to) = ReplyTo::of(&request, &sender, signer.as_ref()) else {
                    tracing::warn!(%sender, "a request that does not say where its answer goes: refused");
                    return acknowledge(acker).await;
                };
                (request, Some(reply_to))
            }
            Packet::Push(request) => (request, None),
            _ => return acknowledge(acker).await,
        };
        if signer.is_none() && self.already_taken(&sender, &request) {
            return acknowledge(acker).await;
        }
        let (emitter, emitted) = mpsc::channel(EMITTED);
        let now = self.link.now();
        let context = Context::new(Inner {
            service: request.service.resolved(),
            token: request.token,
            tags: request.tags.clone(),
            sender,
            signer,
            on_behalf_of: request.on_behalf_of.clone(),
            deadline: request.deadline,
            now,
            proxy: self.proxy.clone(),
            emitter: reply_to.as_ref().map(|_| emitter),
        });
        let guard = self.note_running(&context, now);
        let result = self.run(request, context, emitted, reply_to.as_mut()).await;
        drop(guard);
        if let Some(reply_to) = reply_to {
            reply_to.answer(&self.link, result).await;
        }
        acknowledge(acker).await;
    }

    /// Runs the handler, and sends what it emits meanwhile, in order.
    async fn run(
        &self,
        request: Request,
        context: Context,
        mut emitted: mpsc::Receiver<Emitted>,
        mut reply_to: Option<&mut ReplyTo>,
    ) -> HandlerResult<Payload> {
        let service = context.service().clone();
        let decision = self.policy.authorize_request(&context.as_caller(), &request);
        let asked = DecisionSubject {
            kind: if context.wants_answer() { Kind::Request } else { Kind::Push },
            from: context.sender(),
            id: context.signer().map(Verified::id),
            service: Some(&service),
            on_behalf_of: request.on_behalf_of.as_ref(),
        };
        self.link.audit_decision(asked, &decision).await;
        if !decision.allowed {
            tracing::info!(%service, caller = %context.caller(), rule = decision.rule, "denied");
            return Err(Failure::new(FailureCode::Denied, decision.why));
        }
        let Some(actor) = self.services.find(&service) else {
            return Err(Failure::new(FailureCode::NoSuchService, format!("no service {service} here")));
        };
        let allowed = context.time_allowed().unwrap_or(Duration::MAX);
        let call = async {
            // A closure that panics before its future exists is caught as well.
            let call = async { actor.call(&service, request.payload, context).await };
            match tokio::time::timeout(allowed, AssertUnwindSafe(call).catch_unwind()).await {
                Ok(Ok(reply)) => reply,
                Ok(Err(_)) => Err(Failure::new(FailureCode::Panicked, "the handler panicked")),
                Err(_) => Err(Failure::new(FailureCode::TimedOut, "the handler did not end before the deadline")),
            }
        };
        let mut call = std::pin::pin!(call);
        let result = loop {
            tokio::select! {
                Some(part) = emitted.recv() => self.hand_on(part, reply_to.as_deref_mut()).await,
                result = &mut call => break result,
            }
        };
        // A clone of the context may outlive the handler: what it emits from now on is refused.
        emitted.close();
        while let Some(part) = emitted.recv().await {
            self.hand_on(part, reply_to.as_deref_mut()).await;
        }
        if let Err(failure) = &result {
            tracing::info!(%service, code = %failure.code, "a handler failed");
            if std::panic::catch_unwind(AssertUnwindSafe(|| actor.on_exception(&service, failure))).is_err() {
                tracing::error!(%service, "the hook on_exception panicked");
            }
        }
        result
    }

    async fn hand_on(&self, part: Emitted, reply_to: Option<&mut ReplyTo>) {
        if let Some(reply_to) = reply_to {
            reply_to.intermediate(&self.link, part.key, part.value, None).await;
        }
    }

    fn already_taken(&self, sender: &Identity, request: &Request) -> bool {
        match request.token {
            Some(token) => lock(&self.taken).put((sender.clone(), token), ()).is_some(),
            None => false,
        }
    }

    fn note_running(&self, context: &Context, since: Timestamp) -> Running<'_> {
        let mut running = lock(&self.running);
        let id = running.last_key_value().map_or(0, |(id, _)| id.wrapping_add(1));
        running.insert(id, RunningJob { service: context.service().clone(), caller: context.caller().clone(), since });
        Running { dispatcher: self, id }
    }
}

/// Takes a job off the list of running ones, also when its task is aborted.
struct Running<'a> {
    dispatcher: &'a Dispatcher,
    id: u64,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        lock(&self.dispatcher.running).remove(&self.id);
    }
}

/// No code panics while it holds one of these locks; should it, what they guard is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
