//! The life of one job at an agent: from a request to its handler and back.

use std::collections::{BTreeMap, HashSet};
use std::num::NonZeroUsize;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::actor::{Actor, Context, ExposeError, HandlerResult, IntermediateResult, RequestContext};
use super::proxied_jobs::{Claim, Job, JobDelivery, ProxiedJobs};
use crate::audit::DecisionSubject;
use crate::clock::Timestamp;
use crate::limits::nonzero;
use crate::link::{Link, Received, acknowledge};
use crate::packet::{Failure, FailureCode, Identity, Kind, Packet, Payload, Request, RequestOrigin, Service, Token};
use crate::policy::Policy;
use crate::proxy::MapperProxy;
use crate::request::ReplyTo;
use crate::serializer::Verified;

/// The most intermediate results of one job that wait to be sent; a handler that emits faster waits.
const MAX_QUEUED_INTERMEDIATES: usize = 16;
/// The most request ids remembered to run redelivered requests only once, for plain formats. Secure serializers detect replays
/// themselves.
const MAX_REQUEST_IDS: NonZeroUsize = nonzero(8192);

/// How long a delivery is held while its job runs. RabbitMQ closes the channel of one that is held for 30 minutes.
const HOLD_LIMIT: Duration = Duration::from_secs(15 * 60);

/// The services of all actors of an agent.
#[derive(Clone, Debug)]
pub(super) struct Services {
    actors: Arc<[Arc<dyn Actor>]>,
}

impl Services {
    /// Combines actors.
    ///
    /// # Errors
    /// [`ExposeError`] if an actor is invalid, or two actors offer the same service.
    pub fn new(actors: Vec<Arc<dyn Actor>>) -> Result<Self, ExposeError> {
        let mut seen = HashSet::new();
        for actor in &actors {
            actor.check()?;
            for service in actor.services() {
                if !seen.insert(service.clone()) {
                    return Err(ExposeError::Duplicate(service));
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

/// A running job.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RunningJob {
    /// The requested service.
    pub service: Service,
    /// The node that made the request.
    pub caller: Identity,
    /// When the job started.
    pub since: Timestamp,
}

/// A view of an agent's running jobs. Cloning it is cheap.
#[derive(Clone, Debug)]
pub struct RunningJobs(Arc<Dispatcher>);

impl RunningJobs {
    pub(super) fn new(dispatcher: Arc<Dispatcher>) -> Self {
        Self(dispatcher)
    }

    /// The running jobs.
    pub fn list(&self) -> Vec<RunningJob> {
        self.0.running()
    }
}

/// Passes requests to their handlers.
#[derive(Debug)]
pub(super) struct Dispatcher {
    link: Link,
    proxy: MapperProxy,
    services: Services,
    policy: Arc<dyn Policy>,
    running: Mutex<BTreeMap<u64, RunningJob>>,
    /// Requests in plain formats that were already handled.
    request_ids: Mutex<LruCache<(Identity, Token), ()>>,
    proxied: ProxiedJobs,
}

impl Dispatcher {
    pub fn new(link: Link, proxy: MapperProxy, services: Services, policy: Arc<dyn Policy>) -> Self {
        let request_ids = Mutex::new(LruCache::new(MAX_REQUEST_IDS));
        let (running, proxied) = (Mutex::default(), ProxiedJobs::default());
        Self { link, proxy, services, policy, running, request_ids, proxied }
    }

    pub fn running(&self) -> Vec<RunningJob> {
        self.running.lock().values().cloned().collect()
    }

    /// Handles a request or push. It is acknowledged only after the answer was sent, unless that takes longer than [`HOLD_LIMIT`].
    pub async fn handle(&self, received: Received) {
        let Received { inbound, acker, .. } = received;
        let (Some(sender), signer) = (inbound.sender().cloned(), inbound.signer().cloned()) else {
            return acknowledge(acker).await;
        };
        let (request, reply_to) = match inbound.packet {
            Packet::Request(request) => {
                let Some(reply_to) = ReplyTo::of(&request, &sender, signer.as_ref()) else {
                    tracing::warn!(%sender, "request refused: no reply queue");
                    return acknowledge(acker).await;
                };
                (request, Some(reply_to))
            }
            Packet::Push(request) => (request, None),
            _ => return acknowledge(acker).await,
        };
        if signer.is_none() && self.is_duplicate(&sender, &request) {
            return acknowledge(acker).await;
        }
        let origin = RequestOrigin::of(&request);
        let (intermediates, queued) = mpsc::channel(MAX_QUEUED_INTERMEDIATES);
        let context = Context::new(RequestContext {
            service: request.service.resolved(),
            token: request.token,
            tags: request.tags.clone(),
            sender,
            signer,
            on_behalf_of: request.on_behalf_of.clone(),
            deadline: request.deadline,
            started_at: self.link.now(),
            proxy: self.proxy.clone(),
            intermediates: reply_to.as_ref().map(|_| intermediates),
        });
        let signed_origin = origin.clone().filter(|_| context.signer().is_some());
        let delivery =
            JobDelivery { reply_to: reply_to.map(|reply_to| reply_to.with_origin(signed_origin)), acker: Some(acker) };
        if let Err(denied) = self.authorize(&request, &context).await {
            return delivery.answer(&self.link, Err(denied)).await;
        }
        let mut job = match self.proxied.claim(origin, delivery) {
            Claim::Run(job) => job,
            Claim::Attached => return tracing::debug!("a proxied request that already runs came again"),
            Claim::Done(delivery, result) => return delivery.answer(&self.link, result).await,
        };
        let guard = self.track(&context);
        let deliveries = job.deliveries();
        let result = {
            let mut run = std::pin::pin!(self.run(request, context, queued, &mut job));
            loop {
                tokio::select! {
                    biased;
                    result = &mut run => break result,
                    () = tokio::time::sleep(HOLD_LIMIT) => deliveries.acknowledge().await,
                }
            }
        };
        drop(guard);
        job.finish(&self.link, result).await;
    }

    /// Asks the policy.
    async fn authorize(&self, request: &Request, context: &Context) -> Result<(), Failure> {
        let service = context.service();
        let decision = self.policy.authorize_request(&context.policy_caller(), request);
        let kind = if context.wants_answer() { Kind::Request } else { Kind::Push };
        let subject = DecisionSubject::new(kind, context.sender())
            .id(context.signer().map(Verified::id))
            .service(service)
            .on_behalf_of(request.on_behalf_of.as_ref());
        self.link.audit_decision(subject, &decision).await;
        if !decision.allowed {
            tracing::info!(%service, caller = %context.caller(), rule = decision.rule, "request denied");
            return Err(Failure::new(FailureCode::Denied, decision.reason));
        }
        Ok(())
    }

    /// Runs the handler, and sends its intermediate results in order.
    async fn run(
        &self,
        request: Request,
        context: Context,
        mut queued: mpsc::Receiver<IntermediateResult>,
        job: &mut Job<'_>,
    ) -> HandlerResult<Payload> {
        let service = context.service().clone();
        let Some(actor) = self.services.find(&service) else {
            return Err(Failure::new(FailureCode::NoSuchService, format!("no service {service} here")));
        };
        let timeout = context.time_allowed().unwrap_or(Duration::MAX);
        let call = async {
            // The inner block also catches a panic in a closure before it returns its future.
            let call = async { actor.call(&service, request.payload, context).await };
            match tokio::time::timeout(timeout, AssertUnwindSafe(call).catch_unwind()).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(Failure::new(FailureCode::Panicked, "the handler panicked")),
                Err(_) => Err(Failure::new(FailureCode::TimedOut, "the handler did not finish before the deadline")),
            }
        };
        let mut call = std::pin::pin!(call);
        let result = loop {
            tokio::select! {
                biased;
                result = &mut call => break result,
                Some(intermediate) = queued.recv() => job.emit(&self.link, intermediate).await,
            }
        };
        // A clone of the context may outlive the handler: it can emit nothing from now on.
        queued.close();
        while let Some(intermediate) = queued.recv().await {
            job.emit(&self.link, intermediate).await;
        }
        if let Err(failure) = &result {
            tracing::info!(%service, code = %failure.code, "handler failed");
            if std::panic::catch_unwind(AssertUnwindSafe(|| actor.on_exception(&service, failure))).is_err() {
                tracing::error!(%service, "the on_exception hook panicked");
            }
        }
        result
    }

    fn is_duplicate(&self, sender: &Identity, request: &Request) -> bool {
        match request.token {
            Some(token) => self.request_ids.lock().put((sender.clone(), token), ()).is_some(),
            None => false,
        }
    }

    /// Lists a job as running until the guard is dropped.
    fn track(&self, context: &Context) -> RunningGuard<'_> {
        let job = RunningJob {
            service: context.service().clone(),
            caller: context.caller().clone(),
            since: context.started_at(),
        };
        let mut running = self.running.lock();
        let id = running.last_key_value().map_or(0, |(id, _)| id.wrapping_add(1));
        running.insert(id, job);
        RunningGuard { dispatcher: self, id }
    }
}

/// Removes a job from the running ones, also when its task is aborted.
struct RunningGuard<'a> {
    dispatcher: &'a Dispatcher,
    id: u64,
}

impl Drop for RunningGuard<'_> {
    fn drop(&mut self) {
        self.dispatcher.running.lock().remove(&self.id);
    }
}
