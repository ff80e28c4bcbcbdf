//! Proxied requests, the policies that authorize them, and the offline queue, over the broker in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nanite::agent::{Actor, Context, actor, reply};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, FailureCode, Identity, Payload, Register, Request, SelectorName};
use nanite::policy::{AllowVerified, Caller, Decision, Policy};
use nanite::proxy::MapperProxy;
use nanite::request::{Event, RequestError};
use nanite::transport::topology;
use tokio::sync::mpsc;

use crate::harness::system::{System, json, start, wait_until_known};
use crate::harness::{on_every_format, recv, wait_until};

on_every_format!(
    n10_agents_call_other_agents_through_a_mapper,
    n10_each_request_is_handled_by_one_of_several_mappers,
    n10_program_without_a_mapper_uses_another_mapper,
    n11_policy_decides_with_the_verified_signer,
    n12_push_waits_for_an_agent,
    n12_request_waits_for_an_agent_and_is_answered,
    n12_offline_messages_keep_their_order_through_restarts,
    n12_lost_connection_neither_loses_nor_repeats_offline_messages,
    n13_persistent_messages_survive_a_restart_of_the_broker,
);

fn agent_id(name: &str) -> Identity {
    Identity::agent(name).unwrap()
}

fn echo() -> impl Actor {
    actor("simple").expose("echo", |text: Payload, context: Context| async move {
        context.emit("heard", context.caller().to_string()).await?;
        reply(text)
    })
}

/// An actor that sends requests to other agents.
fn forwarder() -> impl Actor {
    actor("ask").expose("all", |text: String, context: Context| async move {
        let request = context.proxy().request("/simple/echo", text).selector(SelectorName::All);
        let mut events = request.events().await?;
        let mut seen = Vec::new();
        while let Some(event) = events.next().await {
            seen.push(match event {
                Event::Intermediate { from, key, value, .. } => format!("{from} {key} {value}"),
                Event::Outcome { from, result, .. } => format!("{from} says {}", result?),
                Event::Failed(failure) => return Err(failure),
                other => panic!("{other:?}"),
            });
        }
        seen.sort();
        reply(seen)
    })
}

async fn n10_agents_call_other_agents_through_a_mapper(system: System) {
    let _fred = start(system.agent("fred").actor(forwarder())).await;
    let _bob = start(system.agent("bob").actor(echo())).await;
    let _eve = start(system.agent("eve").actor(echo())).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["bob", "eve", "fred"]).await;
    let answers = mapper.request("/ask/all", "hi").await.unwrap();
    // The caller is the agent, not the mapper that dispatched it.
    let seen = json(
        r#"["nanite-bob heard \"nanite-fred\"","nanite-bob says \"hi\"",
            "nanite-eve heard \"nanite-fred\"","nanite-eve says \"hi\""]"#,
    );
    assert_eq!(answers.outcomes[&agent_id("fred")], Ok(seen));
}

async fn n10_each_request_is_handled_by_one_of_several_mappers(system: System) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let count = actor("count").expose("up", move |(): ()| {
        let n = counted.fetch_add(1, Ordering::SeqCst);
        async move { reply(n) }
    });
    let _bob = start(system.agent("bob").actor(count)).await;
    let fred = start(system.agent("fred").actor(echo())).await;
    let (m1, m2) = (system.started_mapper("m1").await, system.started_mapper("m2").await);
    wait_until_known(&m1, &["bob", "fred"]).await;
    wait_until_known(&m2, &["bob", "fred"]).await;
    for _ in 0..20 {
        let answers = fred.proxy().request("/count/up", ()).await.unwrap();
        assert_eq!(answers.results().count(), 1);
    }
    fred.proxy().push("/count/up", ()).await.unwrap();
    wait_until("the push is done", async || calls.load(Ordering::SeqCst) >= 21).await;
    assert_eq!(fred.proxy().request("/count/up", ()).await.unwrap().outcomes[&agent_id("bob")], Ok(json("21")));
}

async fn n10_program_without_a_mapper_uses_another_mapper(system: System) {
    let _bob = start(system.agent("bob").actor(echo())).await;
    let tool = Identity::mapper("tool").unwrap();
    let proxy = MapperProxy::builder(system.serializer(&tool), system.connect()).start().await.unwrap();
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["bob"]).await;
    let answers = proxy.request("/simple/echo", 7).await.unwrap();
    assert_eq!(answers.outcomes[&agent_id("bob")], Ok(json("7")));
    let no_target = proxy.request("/no/thing", ()).await.unwrap_err();
    assert!(matches!(no_target, RequestError::NoTarget(ref what) if what == "/no/thing"), "{no_target:?}");
    drop(mapper);
    let unanswered = proxy.request("/simple/echo", 7).timeout(Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(unanswered, RequestError::Refused(Failure { code: FailureCode::TimedOut, .. })), "{unanswered:?}");
}

/// Only `nanite-boss` may call /secret, and no agent may register a service under /root.
#[derive(Debug)]
struct Rules {
    secure: bool,
}

impl Policy for Rules {
    fn authorize_registration(&self, caller: &Caller<'_>, register: &Register) -> Decision {
        assert_eq!(caller.signer.map(|signer| signer.signer()), self.secure.then_some(caller.identity));
        let root = register.services.iter().any(|service| service.as_str().starts_with("/root/"));
        if root { Decision::denied() } else { Decision::allow() }
    }

    fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision {
        assert_eq!(caller.signer.map(|signer| signer.signer()), self.secure.then_some(caller.identity));
        let secret = request.service.as_str().starts_with("/secret/");
        if secret && caller.origin().name() != "boss" { Decision::denied() } else { Decision::allow() }
    }
}

async fn n11_policy_decides_with_the_verified_signer(system: System) {
    let secure = system.is_secure();
    let secret = || actor("secret").expose("read", |(): ()| async { reply("42") });
    let root = actor("root").expose("do", |(): ()| async { reply(()) });
    let _vault = start(system.agent("vault").actor(secret())).await;
    let _evil = start(system.agent("evil").actor(root)).await;
    let (boss, fred) = (start(system.agent("boss")).await, start(system.agent("fred")).await);
    let mapper = system.mapper("m1").policy(Rules { secure }).start().await.unwrap();
    wait_until_known(&mapper, &["boss", "fred", "vault"]).await;
    let read = |by: &MapperProxy| by.request("/secret/read", ());
    assert_eq!(read(boss.proxy()).await.unwrap().results().count(), 1);
    let denied = read(fred.proxy()).await.unwrap_err();
    assert!(matches!(denied, RequestError::Denied(ref why) if why == "Denied"), "{denied:?}");

    // The agent applies its own policy: the mapper m1 is not `boss`.
    let _guarded = start(system.agent("guarded").policy(Rules { secure }).actor(secret())).await;
    wait_until_known(&mapper, &["boss", "fred", "guarded", "vault"]).await;
    let answers = mapper.request("/secret/read", ()).target(agent_id("guarded")).await.unwrap();
    let failure = answers.outcomes[&agent_id("guarded")].clone().unwrap_err();
    assert_eq!(failure, Failure::new(FailureCode::Denied, "Denied"));
    assert_eq!(AllowVerified.authorize_request(&Caller::new(&agent_id("x"), None), &any_request()), Decision::allow());
}

fn any_request() -> Request {
    Request::new("/a/b".parse().unwrap(), Payload::default())
}

/// An actor that sends its payloads to a channel.
fn recorder() -> (impl Actor, mpsc::UnboundedReceiver<String>) {
    let (sender, received) = mpsc::unbounded_channel();
    let log = actor("log").expose("write", move |line: String| {
        sender.send(line.clone()).unwrap();
        async move { reply(line) }
    });
    (log, received)
}

async fn offline_mapper(system: &System, name: &str) -> Mapper {
    let mapper = system.mapper(name).offline_failsafe(true);
    mapper.offline_redelivery_frequency(Duration::from_millis(50)).start().await.unwrap()
}

async fn n12_push_waits_for_an_agent(system: System) {
    let mapper = offline_mapper(&system, "m1").await;
    let refused = mapper.request("/log/write", "x").offline_failsafe(false).push().await.unwrap_err();
    assert!(matches!(refused, RequestError::NoTarget(_)));
    assert_eq!(mapper.push("/log/write", "hush-hush").await.unwrap(), [], "no agent has it yet");
    let (log, mut received) = recorder();
    let _fred = start(system.agent("fred").actor(log)).await;
    assert_eq!(recv(&mut received).await, "hush-hush");
    wait_until("the queue is empty", async || system.broker.queued_messages(topology::OFFLINE).is_empty()).await;
}

async fn n12_request_waits_for_an_agent_and_is_answered(system: System) {
    let mapper = offline_mapper(&system, "m1").await;
    let waiting = mapper.request("/simple/echo", "late").events().await.unwrap();
    let expired = mapper.request("/simple/echo", "too late").timeout(Duration::from_millis(30)).await.unwrap_err();
    assert!(matches!(expired, RequestError::Refused(Failure { code: FailureCode::TimedOut, .. })), "{expired:?}");
    let _fred = start(system.agent("fred").actor(echo())).await;
    let answers = waiting.answers().await.unwrap();
    assert_eq!(answers.outcomes[&agent_id("fred")], Ok(json(r#""late""#)));
}

async fn n12_offline_messages_keep_their_order_through_restarts(system: System) {
    let mapper = offline_mapper(&system, "m1").await;
    for i in 0..20 {
        mapper.push("/log/write", format!("plaintext-{i:02}")).await.unwrap();
    }
    drop(mapper);
    system.broker.restart();
    let waiting = system.waiting(topology::OFFLINE, 20).await;
    for message in &waiting {
        let readable = message.body.windows(9).any(|bytes| bytes == b"plaintext" || bytes == b"log/write");
        assert_eq!(readable, !system.is_secure(), "only a plain format is readable at rest");
    }
    let (m1, m2) = (offline_mapper(&system, "m1").await, offline_mapper(&system, "m2").await);
    let (log, mut received) = recorder();
    let _fred = start(system.agent("fred").concurrency(1).actor(log)).await;
    for i in 0..20 {
        assert_eq!(recv(&mut received).await, format!("plaintext-{i:02}"));
    }
    wait_until_known(&m2, &["fred"]).await;
    let last = m1.request("/log/write", "last").await.unwrap();
    assert_eq!(last.results().count(), 1);
    assert_eq!(recv(&mut received).await, "last", "nothing is delivered twice");
}

async fn n12_lost_connection_neither_loses_nor_repeats_offline_messages(system: System) {
    let transport = system.connect();
    let identity = Identity::mapper("m1").unwrap();
    let mapper =
        Mapper::builder(system.serializer(&identity), transport.clone()).offline_failsafe(true).start().await.unwrap();
    for i in 0..5 {
        mapper.push("/log/write", format!("{i}")).await.unwrap();
    }
    wait_until("the mapper holds them", async || system.broker.queued_messages(topology::OFFLINE).is_empty()).await;
    transport.disconnect();
    system.waiting(topology::OFFLINE, 5).await;
    transport.reconnect();
    wait_until("the mapper holds them again", async || system.broker.queued_messages(topology::OFFLINE).is_empty())
        .await;
    let (log, mut received) = recorder();
    let _fred = start(system.agent("fred").concurrency(1).actor(log)).await;
    for i in 0..5 {
        assert_eq!(recv(&mut received).await, format!("{i}"));
    }
    // All are acknowledged: nothing is redelivered when the mapper stops.
    mapper.request("/log/write", "last").await.unwrap();
    assert_eq!(recv(&mut received).await, "last");
    drop(mapper);
    assert!(system.broker.queued_messages(topology::OFFLINE).is_empty());
}

async fn n13_persistent_messages_survive_a_restart_of_the_broker(system: System) {
    let (log, mut received) = recorder();
    let transport = system.connect();
    let identity = agent_id("fred");
    let agent = nanite::agent::Agent::builder(system.serializer(&identity), transport.clone());
    let _fred = start(agent.actor(log)).await;
    let mapper = system.mapper("m1").persistent(true).start().await.unwrap();
    wait_until_known(&mapper, &["fred"]).await;
    transport.disconnect();
    mapper.request("/log/write", "lost").persistent(false).push().await.unwrap();
    mapper.push("/log/write", "kept").await.unwrap();
    system.broker.restart();
    transport.reconnect();
    assert_eq!(recv(&mut received).await, "kept");
}
