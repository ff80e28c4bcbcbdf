//! Requests from a mapper to agents and back, over the broker in memory.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nanite::agent::{AgentError, Context, ExposeError, actor, reply};
use nanite::clock::{Clock, ManualClock, SystemClock};
use nanite::mapper::AgentEvent;
use nanite::packet::{Failure, FailureCode, Identity, Payload, SelectorName, Status};
use nanite::request::{Event, RequestError};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc};

use crate::harness::system::{System, json, start, wait_until_known};
use crate::harness::{on_every_format, recv, wait_until};

fn agent_id(name: &str) -> Identity {
    Identity::agent(name).unwrap()
}

fn echo() -> impl nanite::agent::Actor {
    actor("simple").expose("echo", |text: Payload| async move { reply(text) })
}

fn ok(value: &str) -> Result<Payload, Failure> {
    Ok(json(value))
}

on_every_format!(
    n01_typed_handlers_with_and_without_context,
    n01_only_exposed_services_can_be_called,
    n02_starting_mapper_finds_running_agents_and_new_ones,
    n02_heartbeat_of_an_unknown_agent_makes_it_register_again,
    n03_status_is_read_for_every_heartbeat,
    n04_silent_agent_times_out_and_returns,
    n05_selectors_and_target,
    n05_custom_selector,
    n06_tags_must_all_match,
    n07_answers_of_all_targets_are_collected_and_push_has_none,
    n08_intermediate_results_arrive_in_order,
    n09_handler_errors_and_panics_become_failures,
    d01_agent_without_a_queue_is_replaced_by_another,
    d02_every_target_gets_an_outcome,
);

async fn n01_typed_handlers_with_and_without_context(system: System) {
    #[derive(Deserialize)]
    struct Sum {
        a: i64,
        b: i64,
    }
    #[derive(Serialize)]
    struct Total {
        total: i64,
    }
    let _agent = start(
        system.agent("fred").actor(
            actor("math")
                .expose("sum", |sum: Sum| async move { Ok::<_, Infallible>(Total { total: sum.a + sum.b }) })
                .expose("who", |(): (), context: Context| async move {
                    reply((context.caller().to_string(), context.service().to_string()))
                })
                .expose_blocking("slow", |n: u64| reply(n * 2))
                .expose("index", |(): ()| async { reply("index") }),
        ),
    )
    .await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["fred"]).await;
    let ask = async |service: &str, payload: Payload| {
        let mut answers = mapper.request(service, payload).await.unwrap();
        answers.outcomes.remove(&agent_id("fred")).unwrap()
    };
    assert_eq!(ask("/math/sum", json(r#"{"a":2,"b":40}"#)).await, ok(r#"{"total":42}"#));
    assert_eq!(ask("/math/who", Payload::default()).await, ok(r#"["mapper-m1","/math/who"]"#));
    assert_eq!(ask("/math/slow", json("21")).await, ok("42"));
    assert_eq!(ask("/math", Payload::default()).await, ok(r#""index""#), "the prefix alone means index");
    let bad = ask("/math/sum", json(r#"{"a":"two"}"#)).await.unwrap_err();
    assert_eq!(bad.code, FailureCode::BadPayload);
}

async fn n01_only_exposed_services_can_be_called(system: System) {
    let twice = actor("simple").expose("echo", |(): ()| async { reply(()) });
    let built = system.agent("fred").actor(twice.expose("echo", |(): ()| async { reply(()) })).start().await;
    assert!(matches!(built, Err(AgentError::Expose(ExposeError::Duplicate(_)))));
    let built = system.agent("fred").actor(echo()).actor(echo()).start().await;
    assert!(matches!(built, Err(AgentError::Expose(ExposeError::Duplicate(_)))));
    let built = system.agent("fred").actor(actor("a b").expose("c", |(): ()| async { reply(()) })).start().await;
    assert!(matches!(built, Err(AgentError::Expose(ExposeError::InvalidName(_)))));

    let _agent = start(system.agent("fred").actor(echo())).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["fred"]).await;
    assert_eq!(mapper.agents().await.unwrap()[0].services, ["/simple/echo".parse().unwrap()]);
    for service in ["/simple/drop", "/simple/to_string", "/simple"] {
        let refused = mapper.request(service, ()).await.unwrap_err();
        assert!(matches!(refused, RequestError::NoTarget(_)), "{service}");
    }
    assert!(matches!(mapper.request("simple/echo", ()).await, Err(RequestError::Service(_))));
}

async fn n02_starting_mapper_finds_running_agents_and_new_ones(system: System) {
    // No heartbeat is due while the test runs: the agents register only because the mapper asks them to.
    let quiet = |name| system.agent(name).ping_time(Duration::from_secs(3600)).actor(echo());
    let (_a, b) = (start(quiet("a")).await, start(quiet("b").tag("eu".parse().unwrap())).await);
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a", "b"]).await;
    assert_eq!(mapper.agents().await.unwrap()[1].tags, ["eu".parse().unwrap()]);
    let _c = start(quiet("c")).await;
    wait_until_known(&mapper, &["a", "b", "c"]).await;
    b.stop().await.unwrap();
    wait_until_known(&mapper, &["a", "c"]).await;
}

async fn n02_heartbeat_of_an_unknown_agent_makes_it_register_again(system: System) {
    let _agent = start(system.agent("fred").actor(echo())).await;
    let (events, mut seen) = mpsc::unbounded_channel();
    let mapper = system
        .mapper("m1")
        .agent_timeout(Duration::from_secs(60))
        .on_agent(move |event| drop(events.send(event.clone())))
        .start()
        .await
        .unwrap();
    wait_until_known(&mapper, &["fred"]).await;
    assert!(matches!(recv(&mut seen).await, AgentEvent::Registered(_)));
    // The mapper loses its record, as if it were deleted from a shared state. The next heartbeat restores it.
    mapper.forget(&agent_id("fred")).await.unwrap();
    assert!(matches!(recv(&mut seen).await, AgentEvent::Registered(_)));
    wait_until_known(&mapper, &["fred"]).await;
}

async fn n03_status_is_read_for_every_heartbeat(system: System) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let status = move || match counted.fetch_add(1, Ordering::SeqCst) {
        2 => f64::NAN,
        3 => panic!("a broken status"),
        n => n as f64,
    };
    let _agent = start(system.agent("fred").status(status).ping_time(Duration::from_millis(5)).actor(echo())).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["fred"]).await;
    wait_until("a later load is known", async || {
        mapper.agents().await.unwrap()[0].status.load().is_some_and(|load| load >= 5.0)
    })
    .await;
    let answers = mapper.request("/simple/echo", "hi").await.unwrap();
    assert_eq!(answers.outcomes[&agent_id("fred")], ok(r#""hi""#));
    assert!(calls.load(Ordering::SeqCst) > 5);
    assert_eq!(Status::new(f64::NAN).load(), None);
}

async fn n04_silent_agent_times_out_and_returns(system: System) {
    let transport = system.connect();
    let identity = agent_id("fred");
    let agent = nanite::agent::Agent::builder(system.serializer(&identity), transport.clone())
        .ping_time(Duration::from_millis(20))
        .actor(echo());
    let _agent = start(agent).await;
    let (events, mut seen) = mpsc::unbounded_channel();
    let mapper = system
        .mapper("m1")
        .agent_timeout(Duration::from_secs(1))
        .on_agent(move |event| drop(events.send(event.clone())))
        .start()
        .await
        .unwrap();
    wait_until_known(&mapper, &["fred"]).await;
    transport.disconnect();
    loop {
        if let AgentEvent::TimedOut(record) = recv(&mut seen).await {
            assert_eq!(record.identity, identity);
            break;
        }
    }
    assert!(matches!(mapper.request("/simple/echo", "hi").await, Err(RequestError::NoTarget(_))));
    transport.reconnect();
    wait_until_known(&mapper, &["fred"]).await;
    let answers = mapper.request("/simple/echo", "hi").await.unwrap();
    assert_eq!(answers.outcomes[&identity], ok(r#""hi""#));
}

/// As if the mapper's process or its machine had been suspended for an hour. The clock of the runtime is paused, and jumps to the next
/// timer when everything is idle.
#[tokio::test(start_paused = true)]
async fn n04_agents_stay_registered_when_the_mapper_was_suspended() {
    let (system, clock) = (System::plain(), Arc::new(ManualClock::new(SystemClock.now())));
    let (events, mut seen) = mpsc::unbounded_channel();
    // It looks for silent agents every 5 seconds.
    let mapper = system.mapper("m1").agent_timeout(Duration::from_secs(20)).clock(clock.clone());
    let mapper = mapper.on_agent(move |event| drop(events.send(event.clone()))).start().await.unwrap();
    let agent = start(system.agent("fred").ping_time(Duration::from_secs(7)).actor(echo())).await;
    wait_until_known(&mapper, &["fred"]).await;
    assert!(matches!(recv(&mut seen).await, AgentEvent::Registered(_)));
    clock.advance(Duration::from_secs(3600));
    wait_until("a heartbeat after the pause is read", async || {
        mapper.agents().await.unwrap().first().is_some_and(|record| record.last_seen == clock.now())
    })
    .await;
    let answers = mapper.request("/simple/echo", "hi").await.unwrap();
    assert_eq!(answers.outcomes[&agent_id("fred")], ok(r#""hi""#));
    assert!(seen.try_recv().is_err(), "it was neither lost nor registered again");
    // An agent that is silent after the pause is noticed.
    drop(agent);
    clock.advance(Duration::from_secs(21));
    assert!(matches!(recv(&mut seen).await, AgentEvent::TimedOut(record) if record.identity == agent_id("fred")));
}

async fn n05_selectors_and_target(system: System) {
    let mut agents = Vec::new();
    for (name, load) in [("a", 3.0), ("b", 1.0), ("c", 2.0)] {
        agents.push(start(system.agent(name).status(move || load).actor(echo())).await);
    }
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a", "b", "c"]).await;
    let ask = async |selector| {
        let answers = mapper.request("/simple/echo", 1).selector(selector).await.unwrap();
        answers.outcomes.into_keys().map(|id| id.name().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ask(SelectorName::LeastLoaded).await, ["b"]);
    assert_eq!(ask(SelectorName::All).await, ["a", "b", "c"]);
    assert_eq!(
        [ask(SelectorName::RoundRobin).await, ask(SelectorName::RoundRobin).await, ask(SelectorName::RoundRobin).await]
            .concat(),
        ["a", "b", "c"]
    );
    let mut random = BTreeSet::new();
    wait_until("each is chosen at random", async || {
        random.extend(ask(SelectorName::Random).await);
        random.len() == 3
    })
    .await;
    let answers = mapper.request("/simple/echo", 1).target(agent_id("c")).await.unwrap();
    assert_eq!(answers.outcomes.keys().collect::<Vec<_>>(), [&agent_id("c")]);
    let no_target = mapper.request("/simple/echo", 1).target(agent_id("d")).await.unwrap_err();
    assert_eq!(no_target.to_string(), "no agent offers /simple/echo at nanite-d");
}

async fn n05_custom_selector(system: System) {
    #[derive(Debug)]
    struct Last;
    impl nanite::mapper::Selector for Last {
        fn select(&self, _: &nanite::packet::Service, agents: &[nanite::mapper::Candidate]) -> Vec<usize> {
            vec![agents.len() - 1, 1000]
        }
    }
    let _a = start(system.agent("a").actor(echo())).await;
    let _b = start(system.agent("b").actor(echo())).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a", "b"]).await;
    let answers = mapper.request("/simple/echo", 1).custom_selector(Last).await.unwrap();
    assert_eq!(answers.outcomes.keys().collect::<Vec<_>>(), [&agent_id("b")]);
}

async fn n06_tags_must_all_match(system: System) {
    let tagged = |name, tags: &[&str]| {
        tags.iter().fold(system.agent(name).actor(echo()), |agent, tag| agent.tag(tag.parse().unwrap()))
    };
    let _a = start(tagged("a", &["eu"])).await;
    let _b = start(tagged("b", &["eu", "gpu"])).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a", "b"]).await;
    let all = |tags: &[&str]| {
        let request = mapper.request("/simple/echo", 1).selector(SelectorName::All);
        tags.iter().fold(request, |request, tag| request.tag(tag.parse().unwrap()))
    };
    assert_eq!(all(&["eu"]).await.unwrap().outcomes.len(), 2);
    assert_eq!(all(&["eu", "gpu"]).await.unwrap().outcomes.keys().collect::<Vec<_>>(), [&agent_id("b")]);
    let no_target = all(&["eu", "us"]).await.unwrap_err();
    assert_eq!(no_target.to_string(), "no agent offers /simple/echo with tags eu, us");
}

async fn n07_answers_of_all_targets_are_collected_and_push_has_none(system: System) {
    let (pushed, mut got) = mpsc::unbounded_channel();
    let mut agents = Vec::new();
    for name in ["a", "b"] {
        let pushed = pushed.clone();
        let log = actor("log").expose("write", move |line: String, context: Context| {
            pushed.send((line, context.wants_answer())).unwrap();
            async move { reply(name) }
        });
        agents.push(start(system.agent(name).actor(log)).await);
    }
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a", "b"]).await;
    let answers = mapper.request("/log/write", "x").selector(SelectorName::All).await.unwrap();
    let expected = [(agent_id("a"), ok(r#""a""#)), (agent_id("b"), ok(r#""b""#))];
    assert_eq!(answers.outcomes, expected.into());
    let mut calls = [recv(&mut got).await, recv(&mut got).await];
    assert_eq!(calls, [("x".to_owned(), true), ("x".to_owned(), true)]);

    let sent = mapper.request("/log/write", "y").selector(SelectorName::All).push().await.unwrap();
    assert_eq!(sent, [agent_id("a"), agent_id("b")]);
    calls = [recv(&mut got).await, recv(&mut got).await];
    assert_eq!(calls, [("y".to_owned(), false), ("y".to_owned(), false)]);

    let mut events = mapper.request("/log/write", "z").selector(SelectorName::All).events().await.unwrap();
    let mut from = BTreeSet::new();
    while let Some(Event::Outcome { from: agent, .. }) = events.next().await {
        from.insert(agent);
    }
    assert_eq!(from.len(), 2);
}

async fn n08_intermediate_results_arrive_in_order(system: System) {
    let count = actor("count").expose("to", |n: u64, context: Context| async move {
        for i in 0..n {
            context.emit(if i % 2 == 0 { "even" } else { "odd" }, i).await?;
        }
        context.emit_value("done").await?;
        reply(n)
    });
    let _agent = start(system.agent("fred").actor(count)).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["fred"]).await;
    let mut events = mapper.request("/count/to", 5).events().await.unwrap();
    let mut seen = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Intermediate { from, key, value, missed, .. } => {
                assert_eq!((&from, missed), (&agent_id("fred"), 0));
                seen.push(format!("{key}={value}"));
            }
            Event::Outcome { result, .. } => seen.push(format!("{}", result.unwrap())),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, ["even=0", "odd=1", "even=2", "odd=3", "even=4", r#"defaultkey="done""#, "5"]);
}

async fn n09_handler_errors_and_panics_become_failures(system: System) {
    let (hooked, mut failures) = mpsc::unbounded_channel();
    let bad = actor("bad")
        .expose("error", |(): ()| async { Err::<(), _>(std::io::Error::other("disk on fire")) })
        .expose("own", |(): ()| async { Err::<(), _>(Failure::other("quota", "no more")) })
        .expose("panic", |(): ()| async { if true { panic!("secret in a panic") } else { reply(()) } })
        .expose_blocking("panic_blocking", |(): ()| if true { panic!("secret") } else { reply(()) })
        .on_exception(move |service, failure| drop(hooked.send(format!("{service} {}", failure.code))));
    let _agent = start(system.agent("fred").actor(bad).actor(echo())).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["fred"]).await;
    for (service, code, message) in [
        ("/bad/error", FailureCode::Failed, "disk on fire"),
        ("/bad/own", FailureCode::Other("quota".into()), "no more"),
        ("/bad/panic", FailureCode::Panicked, "the handler panicked"),
        ("/bad/panic_blocking", FailureCode::Panicked, "the handler panicked"),
    ] {
        let answers = mapper.request(service, ()).await.unwrap();
        assert_eq!(answers.outcomes[&agent_id("fred")], Err(Failure::new(code.clone(), message)), "{service}");
        assert_eq!(recv(&mut failures).await, format!("{service} {code}"));
    }
    let answers = mapper.request("/simple/echo", "alive").await.unwrap();
    assert_eq!(answers.results().count(), 1);
}

async fn d01_agent_without_a_queue_is_replaced_by_another(system: System) {
    let _a = start(system.agent("a").status(|| 0.0).ping_time(Duration::from_secs(3600)).actor(echo())).await;
    let _b = start(system.agent("b").status(|| 9.0).actor(echo())).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a", "b"]).await;
    // An agent whose queue does not exist: it only registered.
    system.register_without_agent("c", &["/simple/echo", "/only/ghost"]).await;
    wait_until_known(&mapper, &["a", "b", "c"]).await;
    let answers = mapper.request("/simple/echo", 1).await.unwrap();
    assert_eq!(answers.outcomes.keys().collect::<Vec<_>>(), [&agent_id("a")], "the ghost's queue does not exist");
    assert!(matches!(mapper.request("/only/ghost", 1).await, Err(RequestError::NoTarget(_))));
    // Among several targets, the unreachable one gets an outcome too.
    system.register_without_agent("c", &["/simple/echo"]).await;
    wait_until_known(&mapper, &["a", "b", "c"]).await;
    let answers = mapper.request("/simple/echo", 1).selector(SelectorName::All).await.unwrap();
    assert_eq!(answers.results().count(), 2);
    assert_eq!(answers.outcomes[&agent_id("c")].clone().unwrap_err().code, FailureCode::Lost);
}

async fn d02_every_target_gets_an_outcome(system: System) {
    let never = Arc::new(Semaphore::new(0));
    let wait = never.clone();
    let slow = actor("slow").expose("never", move |(): ()| {
        let wait = wait.clone();
        async move {
            let _ = wait.acquire().await;
            reply(())
        }
    });
    let _a = start(system.agent("a").actor(slow)).await;
    let quick = actor("slow").expose("never", |(): ()| async { reply("quick") });
    let _b = start(system.agent("b").actor(quick)).await;
    let mapper = system.mapper("m1").agent_timeout(Duration::from_secs(2)).start().await.unwrap();
    wait_until_known(&mapper, &["a", "b"]).await;
    let request = || mapper.request("/slow/never", ()).selector(SelectorName::All);
    let answers = request().timeout(Duration::from_secs(2)).await.unwrap();
    assert_eq!(answers.outcomes[&agent_id("b")], ok(r#""quick""#));
    let failure = answers.outcomes[&agent_id("a")].clone().unwrap_err();
    assert_eq!(failure.code, FailureCode::TimedOut);
    // The agent dies while it works: its outcome is lost, long before the deadline.
    let lost = request().timeout(Duration::from_secs(600)).events().await.unwrap();
    drop(_a);
    let answers = lost.answers().await.unwrap();
    assert_eq!(answers.outcomes[&agent_id("a")].clone().unwrap_err().code, FailureCode::Lost);
}
