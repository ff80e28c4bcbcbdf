//! Concurrency and prefetch of an agent; blocking handlers do not block the runtime.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc as blocking};
use std::time::Duration;

use nanite::agent::{Actor, Agent, AgentError, Context, HandlerResult, actor, reply};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, FailureCode, Identity, Packet, Payload};
use nanite::request::Event;
use nanite::serializer::{
    Inbound, InboundQueue, OpenContext, OpenError, PlainSerializer, SealError, SealRequest, Sealed, Serializer,
};
use nanite::transport::topology;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::harness::system::{System, start, wait_until_known};
use crate::harness::{WAIT_TIMEOUT, recv, wait_until};

/// Jobs of the service /gate/pass: they report their start, and end when the test adds a permit.
struct Jobs {
    started: mpsc::UnboundedReceiver<usize>,
    permits: Arc<Semaphore>,
    max_running: Arc<AtomicUsize>,
}

fn gate() -> (Jobs, impl Actor + 'static) {
    let (start, started) = mpsc::unbounded_channel();
    let (permits, max_running, running) =
        (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let jobs = Jobs { started, permits: permits.clone(), max_running: max_running.clone() };
    let actor = actor("gate").expose("pass", move |number: usize| {
        let (start, permits, max_running, running) =
            (start.clone(), permits.clone(), max_running.clone(), running.clone());
        async move {
            max_running.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            start.send(number).unwrap();
            permits.acquire().await.unwrap().forget();
            running.fetch_sub(1, Ordering::SeqCst);
            reply(number)
        }
    });
    (jobs, actor)
}

impl Jobs {
    /// Waits until this many more jobs have started.
    async fn started(&mut self, count: usize) -> Vec<usize> {
        let mut started = Vec::new();
        while started.len() < count {
            started.push(recv(&mut self.started).await);
        }
        started
    }
}

type PendingAnswer = JoinHandle<Result<Payload, Failure>>;

/// Sends requests one after the other, without waiting for the answers.
async fn send(mapper: &Mapper, service: &str, jobs: usize) -> Vec<PendingAnswer> {
    let mut pending = Vec::new();
    for number in 0..jobs {
        let events = mapper.request(service, number).events().await.unwrap();
        pending.push(tokio::spawn(async move {
            let outcomes = events.answers().await.unwrap().outcomes;
            outcomes.into_values().next().unwrap()
        }));
    }
    pending
}

/// Waits until this many requests are in the agent's queue, not delivered.
async fn wait_for_queued(system: &System, agent: &str, messages: usize) {
    let queue = topology::agent_inbox_name(Identity::agent(agent).unwrap().as_str());
    let queued = || system.broker.queued_messages(&queue).len();
    wait_until(&format!("{messages} messages are in the queue"), async || queued() == messages).await;
}

/// Waits until no job runs.
async fn wait_until_idle(agent: &Agent) {
    wait_until("no job runs", async || agent.running().is_empty()).await;
}

async fn results(pending: Vec<PendingAnswer>) -> Vec<usize> {
    let mut results = Vec::new();
    for answer in pending {
        results.push(answer.await.unwrap().unwrap().parse().unwrap());
    }
    results
}

async fn start_both(system: &System, agent: nanite::agent::AgentBuilder) -> (Agent, Mapper) {
    let agent = start(agent).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["fred"]).await;
    (agent, mapper)
}

#[tokio::test]
async fn n15_concurrency_of_one_runs_jobs_strictly_in_order() {
    let system = System::plain();
    let (mut jobs, actor) = gate();
    let (agent, mapper) = start_both(&system, system.agent("fred").actor(actor).concurrency(1)).await;
    let pending = send(&mapper, "/gate/pass", 6).await;
    for number in 0..6 {
        // In the order of sending; no other one starts while it runs.
        assert_eq!(jobs.started(1).await, [number]);
        assert_eq!(agent.running().len(), 1);
        assert!(jobs.started.try_recv().is_err());
        jobs.permits.add_permits(1);
    }
    assert_eq!(results(pending).await, [0, 1, 2, 3, 4, 5]);
    assert_eq!(jobs.max_running.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn n15_concurrency_limits_running_jobs() {
    let system = System::plain();
    let (mut jobs, actor) = gate();
    let (agent, mapper) = start_both(&system, system.agent("fred").actor(actor).concurrency(3).prefetch(8)).await;
    let pending = send(&mapper, "/gate/pass", 8).await;
    let first: BTreeSet<usize> = jobs.started(3).await.into_iter().collect();
    assert_eq!(first, BTreeSet::from([0, 1, 2]));
    // All are delivered to the agent, but no other one has started.
    wait_for_queued(&system, "fred", 0).await;
    assert_eq!(agent.running().len(), 3);
    assert!(jobs.started.try_recv().is_err());
    jobs.permits.add_permits(8);
    assert_eq!(results(pending).await, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(jobs.max_running.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn n15_prefetch_limits_delivered_requests() {
    for (prefetch, delivered) in [(Some(3), 3), (Some(1), 1), (None, 2)] {
        let system = System::plain();
        let (mut jobs, actor) = gate();
        let agent = system.agent("fred").actor(actor).concurrency(1);
        let agent = match prefetch {
            Some(messages) => agent.prefetch(messages),
            None => agent,
        };
        let (_agent, mapper) = start_both(&system, agent).await;
        let pending = send(&mapper, "/gate/pass", 8).await;
        jobs.started(1).await;
        wait_for_queued(&system, "fred", 8 - delivered).await;
        jobs.permits.add_permits(8);
        assert_eq!(results(pending).await.len(), 8);
        wait_for_queued(&system, "fred", 0).await;
    }
}

#[tokio::test]
async fn n15_failed_job_frees_its_worker() {
    let system = System::plain();
    let bad = actor("bad")
        .expose("error", |_: usize| async { Err::<(), _>(Failure::failed("no")) })
        .expose("panic", |_: usize| async { if true { panic!("no") } else { reply(()) } })
        .expose_blocking("panic_blocking", |_: usize| if true { panic!("no") } else { reply(()) })
        .expose("payload", |(): ()| async { reply(()) })
        .expose("hang", |_: usize| std::future::pending::<HandlerResult<()>>());
    let (agent, mapper) = start_both(&system, system.agent("fred").actor(bad).concurrency(1)).await;
    for (service, code) in [
        ("/bad/error", FailureCode::Failed),
        ("/bad/panic", FailureCode::Panicked),
        ("/bad/panic_blocking", FailureCode::Panicked),
        ("/bad/payload", FailureCode::BadPayload),
        ("/bad/hang", FailureCode::TimedOut),
    ] {
        let request =
            mapper.request(service, 1).timeout(Duration::from_secs(if service == "/bad/hang" { 1 } else { 30 }));
        let (_, failure) = request.await.unwrap().outcomes.pop_first().unwrap();
        assert_eq!(failure.unwrap_err().code, code, "{service}");
    }
    wait_until_idle(&agent).await;
}

/// The runtime of the test has one thread: a handler that blocked it would stop everything.
#[tokio::test]
async fn n15_blocking_handlers_do_not_block_the_runtime() {
    let system = System::plain();
    let (release, released) = blocking::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let (start, mut started) = mpsc::unbounded_channel();
    let mixed = actor("mixed")
        .expose_blocking("block", move |_: usize| {
            start.send(()).unwrap();
            released.lock().unwrap().recv().unwrap();
            reply("unblocked")
        })
        .expose("release", move |_: usize| {
            let release = release.clone();
            async move {
                release.send(()).unwrap();
                reply(())
            }
        });
    let (_agent, mapper) = start_both(&system, system.agent("fred").actor(mixed)).await;
    let blocked = send(&mapper, "/mixed/block", 1).await;
    recv(&mut started).await;
    assert!(send(&mapper, "/mixed/release", 1).await.pop().unwrap().await.unwrap().is_ok());
    for answer in blocked {
        assert_eq!(answer.await.unwrap(), Ok("unblocked".into()));
    }
}

#[tokio::test]
async fn n15_deadline_stops_a_blocking_handler_that_emits_endlessly() {
    // Sealing takes time: there is always an intermediate result that waits to be sent.
    let system = System::secure();
    let (ended, mut refused) = mpsc::unbounded_channel();
    let endless = actor("endless").expose_blocking("emit", move |_: usize, context: Context| {
        let failure = (0..).find_map(|number: u64| context.emit_blocking("n", number).err());
        ended.send(failure.unwrap().code).unwrap();
        reply(())
    });
    let (agent, mapper) = start_both(&system, system.agent("fred").actor(endless).concurrency(1)).await;
    let mut events = mapper.request("/endless/emit", 1).timeout(Duration::from_secs(1)).events().await.unwrap();
    let result = loop {
        match events.next().await.unwrap() {
            Event::Outcome { result, .. } => break result,
            Event::Intermediate { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(result.unwrap_err().code, FailureCode::TimedOut);
    // The next intermediate result is refused; the job ends, and its thread with it.
    let refusal = tokio::time::timeout(WAIT_TIMEOUT, refused.recv()).await;
    assert_eq!(refusal.expect("no refusal"), Some(FailureCode::TimedOut));
    wait_until_idle(&agent).await;
}

#[tokio::test]
async fn n15_rejects_zero_concurrency_and_zero_prefetch() {
    let system = System::plain();
    for agent in [system.agent("fred").concurrency(0), system.agent("fred").prefetch(0)] {
        assert!(matches!(agent.start().await, Err(AgentError::Option(_))));
    }
}

/// Opens as plain JSON, on worker threads. A presence message waits for a moment while it is opened, and reports it if another one is
/// opened meanwhile.
#[derive(Debug)]
struct Overlaps {
    inner: PlainSerializer,
    opening: (std::sync::Mutex<usize>, std::sync::Condvar),
    seen: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

impl Serializer for Overlaps {
    fn content_type(&self) -> &str {
        self.inner.content_type()
    }

    fn identity(&self) -> &Identity {
        self.inner.identity()
    }

    fn seal(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Sealed, SealError> {
        self.inner.seal(packet, request)
    }

    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError> {
        let inbound = self.inner.open(bytes, context)?;
        if context.queue == InboundQueue::Presence && matches!(inbound.packet, Packet::Register(_)) {
            let (count, changed) = &self.opening;
            let mut opening = count.lock().unwrap();
            *opening += 1;
            changed.notify_all();
            opening =
                changed.wait_timeout_while(opening, Duration::from_millis(300), |opening| *opening < 2).unwrap().0;
            self.most.fetch_max(*opening, Ordering::SeqCst);
            *opening -= 1;
            self.seen.fetch_add(1, Ordering::SeqCst);
        }
        Ok(inbound)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n02_presence_messages_are_opened_one_after_the_other() {
    let system = System::plain();
    let (seen, most) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let serializer = Overlaps {
        inner: PlainSerializer::json(Identity::mapper("m1").unwrap()),
        opening: Default::default(),
        seen: seen.clone(),
        most: most.clone(),
    };
    let _mapper = Mapper::builder(serializer, system.connect()).start().await.unwrap();
    for name in ["a", "b", "c", "d"] {
        system.register_without_agent(name, &["/a/b"]).await;
    }
    crate::harness::wait_until("all are opened", async || seen.load(Ordering::SeqCst) == 4).await;
    assert_eq!(most.load(Ordering::SeqCst), 1, "their order is part of the check of their sequence numbers");
}
