//! How many jobs an agent runs at a time, how many it holds, and that those which block keep nobody from working.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc as blocking};
use std::time::Duration;

use nanite::agent::{Actor, Agent, AgentError, Context, HandlerResult, actor, reply};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, FailureCode, Identity, Payload};
use nanite::request::Event;
use nanite::transport::topology;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::harness::system::{System, knows, start};

/// PendingRequests that begin when they are given to a worker, and end when the test lets them.
struct Gate {
    begun: mpsc::UnboundedReceiver<usize>,
    leave: Arc<Semaphore>,
    most: Arc<AtomicUsize>,
}

fn gate() -> (Gate, impl Actor + 'static) {
    let (begins, begun) = mpsc::unbounded_channel();
    let (leave, most, now) =
        (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let gate = Gate { begun, leave: leave.clone(), most: most.clone() };
    let gated = actor("gate").expose("pass", move |number: usize| {
        let (begins, leave, most, now) = (begins.clone(), leave.clone(), most.clone(), now.clone());
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            begins.send(number).unwrap();
            leave.acquire().await.unwrap().forget();
            now.fetch_sub(1, Ordering::SeqCst);
            reply(number)
        }
    });
    (gate, gated)
}

impl Gate {
    async fn begun(&mut self, jobs: usize) -> Vec<usize> {
        let mut begun = Vec::new();
        while begun.len() < jobs {
            begun.push(self.begun.recv().await.unwrap());
        }
        begun
    }
}

type Asked = JoinHandle<Result<Payload, Failure>>;

/// Sends requests, one after the other, to be answered later.
async fn send(mapper: &Mapper, service: &str, jobs: usize) -> Vec<Asked> {
    let mut asked = Vec::new();
    for number in 0..jobs {
        let events = mapper.request(service, number).events().await.unwrap();
        asked.push(tokio::spawn(async move {
            let outcomes = events.answers().await.unwrap().outcomes;
            outcomes.into_values().next().unwrap()
        }));
    }
    asked
}

/// Waits until so many requests stand in the agent's queue, given to nobody.
async fn waiting(system: &System, agent: &str, messages: usize) {
    let queue = topology::agent_inbox_name(Identity::agent(agent).unwrap().as_str());
    let all = async {
        while system.broker.waiting(&queue).len() != messages {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let found = format!("{messages} are not waiting, but {}", system.broker.waiting(&queue).len());
    tokio::time::timeout(Duration::from_secs(30), all).await.expect(&found);
}

async fn answered(asked: Vec<Asked>) -> Vec<usize> {
    let mut answers = Vec::new();
    for one in asked {
        answers.push(one.await.unwrap().unwrap().parse().unwrap());
    }
    answers
}

async fn rig(system: &System, agent: nanite::agent::AgentBuilder) -> (Agent, Mapper) {
    let agent = start(agent).await;
    let mapper = system.started_mapper("m1").await;
    knows(&mapper, &["fred"]).await;
    (agent, mapper)
}

#[tokio::test]
async fn n15_with_a_concurrency_of_one_jobs_run_strictly_one_after_the_other() {
    let system = System::plain();
    let (mut gate, actor) = gate();
    let (agent, mapper) = rig(&system, system.agent("fred").actor(actor).concurrency(1)).await;
    let asked = send(&mapper, "/gate/pass", 6).await;
    for number in 0..6 {
        // In the order in which they were sent; while one runs, none of the others, which the agent holds or could get, begins.
        assert_eq!(gate.begun(1).await, [number]);
        assert_eq!(agent.running().len(), 1);
        assert!(gate.begun.try_recv().is_err());
        gate.leave.add_permits(1);
    }
    assert_eq!(answered(asked).await, [0, 1, 2, 3, 4, 5]);
    assert_eq!(gate.most.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn n15_as_many_jobs_run_as_the_concurrency_says_and_no_more() {
    let system = System::plain();
    let (mut gate, actor) = gate();
    let (agent, mapper) = rig(&system, system.agent("fred").actor(actor).concurrency(3).prefetch(8)).await;
    let asked = send(&mapper, "/gate/pass", 8).await;
    let first: BTreeSet<usize> = gate.begun(3).await.into_iter().collect();
    assert_eq!(first, BTreeSet::from([0, 1, 2]));
    // The agent holds all of them, and still begins no other.
    waiting(&system, "fred", 0).await;
    assert_eq!(agent.running().len(), 3);
    assert!(gate.begun.try_recv().is_err());
    gate.leave.add_permits(8);
    assert_eq!(answered(asked).await, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(gate.most.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn n15_an_agent_holds_no_more_than_its_prefetch() {
    for (prefetch, held) in [(Some(3), 3), (Some(1), 1), (None, 2)] {
        let system = System::plain();
        let (mut gate, actor) = gate();
        let agent = system.agent("fred").actor(actor).concurrency(1);
        let agent = match prefetch {
            Some(messages) => agent.prefetch(messages),
            None => agent,
        };
        let (_agent, mapper) = rig(&system, agent).await;
        let asked = send(&mapper, "/gate/pass", 8).await;
        gate.begun(1).await;
        waiting(&system, "fred", 8 - held).await;
        gate.leave.add_permits(8);
        assert_eq!(answered(asked).await.len(), 8);
        waiting(&system, "fred", 0).await;
    }
}

#[tokio::test]
async fn n15_a_job_that_fails_frees_its_worker() {
    let system = System::plain();
    let bad = actor("bad")
        .expose("error", |_: usize| async { Err::<(), _>(Failure::failed("no")) })
        .expose("panic", |_: usize| async { if true { panic!("no") } else { reply(()) } })
        .expose_blocking("panic_blocking", |_: usize| if true { panic!("no") } else { reply(()) })
        .expose("payload", |(): ()| async { reply(()) })
        .expose("hang", |_: usize| std::future::pending::<HandlerResult<()>>());
    let (agent, mapper) = rig(&system, system.agent("fred").actor(bad).concurrency(1)).await;
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
    while !agent.running().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The test's runtime has one thread: a handler that blocks it would keep the whole system from working.
#[tokio::test]
async fn n15_handlers_that_block_run_off_the_reactor() {
    let system = System::plain();
    let (release, released) = blocking::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let (began, mut begun) = mpsc::unbounded_channel();
    let mixed = actor("mixed")
        .expose_blocking("block", move |_: usize| {
            began.send(()).unwrap();
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
    let (_agent, mapper) = rig(&system, system.agent("fred").actor(mixed)).await;
    let blocked = send(&mapper, "/mixed/block", 1).await;
    begun.recv().await.unwrap();
    assert!(send(&mapper, "/mixed/release", 1).await.pop().unwrap().await.unwrap().is_ok());
    for answer in blocked {
        assert_eq!(answer.await.unwrap(), Ok("unblocked".into()));
    }
}

#[tokio::test]
async fn n15_the_deadline_reaches_a_handler_that_emits_without_end_on_its_own_thread() {
    // Sealing takes time: there is always a part that waits to be sent.
    let system = System::secure();
    let (ended, mut refused) = mpsc::unbounded_channel();
    let endless = actor("endless").expose_blocking("parts", move |_: usize, context: Context| {
        let failure = (0..).find_map(|number: u64| context.emit_blocking("n", number).err());
        ended.send(failure.unwrap().code).unwrap();
        reply(())
    });
    let (agent, mapper) = rig(&system, system.agent("fred").actor(endless).concurrency(1)).await;
    let mut events = mapper.request("/endless/parts", 1).timeout(Duration::from_secs(1)).events().await.unwrap();
    let result = loop {
        match events.next().await.unwrap() {
            Event::Outcome { result, .. } => break result,
            Event::Intermediate { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(result.unwrap_err().code, FailureCode::TimedOut);
    // It is told with the next part that nobody wants it any more; the job ends, and its thread with it.
    let told = tokio::time::timeout(Duration::from_secs(30), refused.recv()).await;
    assert_eq!(told.expect("it is never told"), Some(FailureCode::TimedOut));
    while !agent.running().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn n15_no_worker_and_no_message_at_all_are_refused_when_the_agent_is_built() {
    let system = System::plain();
    for agent in [system.agent("fred").concurrency(0), system.agent("fred").prefetch(0)] {
        assert!(matches!(agent.start().await, Err(AgentError::Option(_))));
    }
}
