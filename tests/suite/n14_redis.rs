//! Several mappers that share their state in Redis: what they share, and what they do when Redis is unavailable, hangs, or loses its
//! data.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use nanite::agent::{Actor, Agent, actor, reply};
use nanite::certs::{CertificateAuthority, KeyType, StaticCertificateStore, TrustStore};
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::{
    AgentEvent, AgentQuery, ClusterState, Mapper, MapperBuilder, MapperError, RedisError, RedisState, StateContext,
    StateError,
};
use nanite::packet::{Identity, Payload, SelectorName};
use nanite::policy::AllowVerified;
use nanite::request::RequestError;
use nanite::security::SecureSerializer;
use nanite::serializer::{PlainSerializer, Serializer, Verification};
use nanite::transport::{MemoryBroker, Transport};

use crate::harness::pki::{agent, mapper};
use crate::harness::redis::RedisServer;
use crate::harness::sharing::{
    AGENT_TIMEOUT, Stage, WithoutPresence, field, names, nothing_refused, options, sharing, version, without_presence,
};
use crate::harness::system::{System, json, start, wait_until_known};
use crate::harness::wait_until;

fn echo() -> impl Actor {
    actor("simple").expose("echo", |text: Payload| async move { reply(text) })
}

async fn start_echo(system: &System, name: &str, tags: &[&str]) -> Agent {
    let agent = system.agent(name).actor(echo());
    start(tags.iter().fold(agent, |agent, tag| agent.tag(tag.parse().unwrap()))).await
}

/// The agents that answer a request to all.
async fn answering_agents(mapper: &Mapper, tags: &[&str]) -> Result<Vec<String>, RequestError> {
    let request = mapper.request("/simple/echo", "hello").selector(SelectorName::All);
    let answers = tags.iter().fold(request, |request, tag| request.tag(tag.parse().unwrap())).await?;
    let answered = |(from, answer): (&Identity, &Result<_, _>)| {
        assert_eq!(answer, &Ok(json("\"hello\"")));
        from.name().to_owned()
    };
    Ok(answers.outcomes.iter().map(answered).collect())
}

/// Records the agent events of a mapper.
fn recording(builder: MapperBuilder) -> (MapperBuilder, Arc<Mutex<Vec<String>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let recorded = events.clone();
    let record = move |event: &AgentEvent| {
        recorded.lock().unwrap().push(match event {
            AgentEvent::Registered(record) => format!("{} came", record.identity.name()),
            AgentEvent::Unregistered(identity) => format!("{} left", identity.name()),
            AgentEvent::TimedOut(record) => format!("{} timed out", record.identity.name()),
            other => format!("{other:?}"),
        });
    };
    (builder.on_agent(record), events)
}

fn count(events: &Mutex<Vec<String>>, what: &str) -> usize {
    events.lock().unwrap().iter().filter(|event| *event == what).count()
}

#[tokio::test]
async fn n14_agent_heard_by_one_mapper_is_selected_by_another() {
    for system in [System::secure(), System::plain()] {
        let redis = RedisServer::start();
        let first = sharing(&system, &redis, "first").await.0.start().await.unwrap();
        let fred = start_echo(&system, "fred", &["eu", "gpu"]).await;
        let bob = start_echo(&system, "bob", &["eu"]).await;
        wait_until_known(&first, &["bob", "fred"]).await;

        let (builder, state) = without_presence(&system, &redis, "second").await;
        let (builder, events) = recording(builder);
        let second = builder.start().await.unwrap();
        wait_until_known(&second, &["bob", "fred"]).await;
        assert_eq!(answering_agents(&second, &[]).await.unwrap(), ["bob", "fred"]);
        assert_eq!(answering_agents(&second, &["gpu", "eu"]).await.unwrap(), ["fred"]);
        assert!(matches!(answering_agents(&second, &["gpu", "us"]).await, Err(RequestError::NoTarget(_))));
        let answers = second.request("/simple/echo", "hello").target(agent("bob")).await.unwrap();
        assert_eq!(answers.outcomes.keys().collect::<Vec<_>>(), [&agent("bob")]);

        // A request at one mapper waits for an agent that only the other mapper hears.
        let waiting = second.request("/late/echo", "hello").wait_for_agents(Duration::from_secs(60));
        let waiting = tokio::spawn(async move { waiting.await });
        let late = actor("late").expose("echo", |text: Payload| async move { reply(text) });
        let late = start(system.agent("late").actor(late)).await;
        assert_eq!(waiting.await.unwrap().unwrap().outcomes.len(), 1);

        // An agent that unregisters at one mapper is removed at the other.
        bob.stop().await.unwrap();
        wait_until_known(&second, &["fred", "late"]).await;
        assert_eq!(answering_agents(&second, &[]).await.unwrap(), ["fred"]);
        fred.stop().await.unwrap();
        late.stop().await.unwrap();
        wait_until_known(&second, &[]).await;
        assert!(matches!(answering_agents(&second, &[]).await, Err(RequestError::NoTarget(_))));
        assert!(nothing_refused(&state), "{:?}", state.refusals());
        assert!(events.lock().unwrap().is_empty(), "it receives no messages of agents: {events:?}");
    }
}

/// The nodes have only their own certificate and the CA's: the data in Redis must contain the agent's certificate.
#[tokio::test]
async fn n14_mapper_learns_certificates_from_redis() {
    let (redis, broker, now) = (RedisServer::start(), MemoryBroker::new(), SystemClock.now());
    let valid_for = CertificateAuthority::VALID_FOR;
    let ca = CertificateAuthority::create("example.org", KeyType::P256, valid_for, now).unwrap();
    let node = |identity: &Identity| -> Arc<dyn Serializer> {
        let credentials = ca.issue(identity, KeyType::P256, Duration::from_secs(3600), now).unwrap();
        let trust = Arc::new(ca.trust().unwrap());
        let own = StaticCertificateStore::new([credentials.certificate().clone()]);
        let store = Arc::new(TrustStore::new(trust.clone()).with_store(Arc::new(own)));
        Arc::new(SecureSerializer::builder(credentials, store, trust).build().unwrap())
    };
    let start = async |name: &str, transport: Arc<dyn Transport>| {
        let serializer = node(&mapper(name));
        let state = RedisState::connect(&redis.url(), options(serializer.clone())).await.unwrap();
        Mapper::builder(serializer, transport).state(state).start().await.unwrap()
    };
    let connect = || Arc::new(broker.connect());
    let first = start("first", connect()).await;
    let fred = Agent::builder(node(&agent("fred")), connect()).actor(echo());
    let fred = fred.ping_time(Duration::from_millis(50)).start().await.unwrap();
    wait_until_known(&first, &["fred"]).await;
    let second = start("second", Arc::new(WithoutPresence(connect()))).await;
    wait_until_known(&second, &["fred"]).await;
    assert_eq!(answering_agents(&second, &[]).await.unwrap(), ["fred"]);
    drop(fred);
}

#[tokio::test]
async fn n14_all_mappers_dispatch_and_report_each_agent_once() {
    let (system, redis) = (System::secure(), RedisServer::start());
    let (first, first_events) = recording(sharing(&system, &redis, "first").await.0);
    let (second, second_events) = recording(sharing(&system, &redis, "second").await.0);
    let (first, second) = (first.start().await.unwrap(), second.start().await.unwrap());
    let fred = start_echo(&system, "fred", &[]).await;
    for mapper in [&first, &second] {
        wait_until_known(mapper, &["fred"]).await;
        assert_eq!(answering_agents(mapper, &[]).await.unwrap(), ["fred"]);
    }
    fred.stop().await.unwrap();
    for (mapper, events) in [(&first, &first_events), (&second, &second_events)] {
        wait_until_known(mapper, &[]).await;
        wait_until("it reports that fred left", async || count(events, "fred left") == 1).await;
        assert_eq!(count(events, "fred timed out"), 0);
    }
}

#[tokio::test]
async fn n14_silent_agent_times_out_once_at_every_mapper() {
    let (system, redis) = (System::secure(), RedisServer::start());
    let timeout = Duration::from_millis(1500);
    let (first, first_events) = recording(sharing(&system, &redis, "first").await.0.agent_timeout(timeout));
    let (second, second_events) = recording(without_presence(&system, &redis, "second").await.0.agent_timeout(timeout));
    let (first, second) = (first.start().await.unwrap(), second.start().await.unwrap());
    let fred = start_echo(&system, "fred", &[]).await;
    wait_until_known(&second, &["fred"]).await;
    let registered_at = second.agents().await.unwrap()[0].last_seen;
    // Heartbeats at one mapper keep the agent alive at the other.
    wait_until("it stays registered for longer than the timeout", async || {
        second.agents().await.unwrap().first().is_some_and(|record| record.last_seen.since(registered_at) > timeout)
    })
    .await;
    // The agent is killed, and does not unregister.
    drop(fred);
    for (mapper, events) in [(&first, &first_events), (&second, &second_events)] {
        wait_until_known(mapper, &[]).await;
        wait_until("it reports that fred timed out", async || count(events, "fred timed out") > 0).await;
    }
    let again = start_echo(&system, "fred", &[]).await;
    wait_until_known(&second, &["fred"]).await;
    drop(again);
    for events in [&first_events, &second_events] {
        wait_until("it reports it a second time", async || count(events, "fred timed out") == 2).await;
    }
    wait_until_known(&first, &[]).await;
    wait_until("Redis is empty", async || redis.run::<i64>(&["HLEN", "{nanite}:r"]) == 0).await;
    for key in ["{nanite}:v", "{nanite}:b", "{nanite}:m", "{nanite}:l", "{nanite}:s:/simple/echo"] {
        assert_eq!(redis.run::<i64>(&["EXISTS", key]), 0, "{key}");
    }
}

#[tokio::test]
async fn n14_mappers_work_through_a_redis_outage_and_resynchronize() {
    let (system, mut redis) = (System::secure(), RedisServer::start());
    let (first, first_state) = sharing(&system, &redis, "first").await;
    let (second, second_state) = without_presence(&system, &redis, "second").await;
    let (first, second) = (first.start().await.unwrap(), second.start().await.unwrap());
    let fred = start_echo(&system, "fred", &["eu"]).await;
    let bob = start_echo(&system, "bob", &[]).await;
    wait_until_known(&second, &["bob", "fred"]).await;

    redis.kill();
    assert_eq!(answering_agents(&first, &["eu"]).await.unwrap(), ["fred"]);
    assert_eq!(answering_agents(&second, &["eu"]).await.unwrap(), ["fred"]);
    wait_until("both mappers notice", async || !first_state.is_connected() && !second_state.is_connected()).await;
    // One agent starts and another stops, which only one mapper hears.
    let late = start_echo(&system, "late", &["eu"]).await;
    wait_until_known(&first, &["bob", "fred", "late"]).await;
    bob.stop().await.unwrap();
    wait_until_known(&first, &["fred", "late"]).await;
    assert_eq!(answering_agents(&first, &["eu"]).await.unwrap(), ["fred", "late"]);
    assert_eq!(answering_agents(&second, &["eu"]).await.unwrap(), ["fred"], "the agents it knew");

    // Redis restarts without its data.
    redis.restart();
    wait_until("both mappers reconnect", async || first_state.is_connected() && second_state.is_connected()).await;
    wait_until("the other mapper knows the new agent", async || {
        answering_agents(&second, &["eu"]).await.is_ok_and(|names| names == ["fred", "late"])
    })
    .await;
    assert_eq!(redis.run::<Vec<String>>(&["SINTER", "{nanite}:s:/simple/echo", "{nanite}:t:eu"]).len(), 2);
    drop((fred, late));
}

#[tokio::test]
async fn n14_agent_that_left_during_an_outage_stays_removed() {
    let (system, mut redis) = (System::secure(), RedisServer::durable());
    let first = sharing(&system, &redis, "first").await.0.start().await.unwrap();
    let (fred, bob) = (start_echo(&system, "fred", &[]).await, start_echo(&system, "bob", &[]).await);
    let (second, second_state) = without_presence(&system, &redis, "second").await;
    let second = second.start().await.unwrap();
    wait_until_known(&second, &["bob", "fred"]).await;
    redis.kill();
    bob.stop().await.unwrap();
    wait_until_known(&first, &["fred"]).await;
    redis.restart();
    assert_eq!(redis.run::<i64>(&["HEXISTS", "{nanite}:r", &field("fred")]), 1, "Redis kept its data");
    wait_until("the other mapper reconnects", async || second_state.is_connected()).await;
    wait_until_known(&second, &["fred"]).await;
    assert_eq!(answering_agents(&second, &[]).await.unwrap(), ["fred"]);
    wait_until("bob is removed", async || redis.run::<i64>(&["HEXISTS", "{nanite}:r", &field("bob")]) == 0).await;
    drop(fred);
}

#[tokio::test]
async fn n14_hanging_redis_counts_as_unavailable() {
    let (system, redis) = (System::secure(), RedisServer::start());
    let serializer = system.serializer(&mapper("first"));
    let options = options(serializer.clone()).timeout(Duration::from_secs(2));
    let state = RedisState::connect(&redis.url(), options).await.unwrap();
    let first = Mapper::builder(serializer, system.connect()).state(state.clone()).start().await.unwrap();
    let fred = start_echo(&system, "fred", &[]).await;
    wait_until_known(&first, &["fred"]).await;
    redis.pause();
    assert_eq!(answering_agents(&first, &[]).await.unwrap(), ["fred"]);
    wait_until("Redis counts as unavailable", async || !state.is_connected()).await;
    assert_eq!(answering_agents(&first, &[]).await.unwrap(), ["fred"]);
    redis.resume();
    wait_until("the mapper reconnects", async || state.is_connected()).await;
    assert_eq!(answering_agents(&first, &[]).await.unwrap(), ["fred"]);
    drop(fred);
}

#[tokio::test]
async fn n14_data_lost_by_redis_is_written_again() {
    let (system, redis) = (System::secure(), RedisServer::start());
    let first = sharing(&system, &redis, "first").await.0.start().await.unwrap();
    let (second, _) = without_presence(&system, &redis, "second").await;
    let second = second.start().await.unwrap();
    let fred = start_echo(&system, "fred", &["eu"]).await;
    wait_until_known(&second, &["fred"]).await;
    for loss in
        [&["FLUSHALL"][..], &["DEL", "{nanite}:t:eu"], &["DEL", "{nanite}:r"], &["HDEL", "{nanite}:v", "nanite-fred"]]
    {
        redis.run::<redis::Value>(loss);
        // A set that lost a member is repaired by a mapper whose lookup misses it, once that mapper has reconnected.
        wait_until("the data is restored", async || {
            assert_eq!(
                answering_agents(&first, &["eu"]).await.unwrap(),
                ["fred"],
                "after {loss:?}: it has received messages from fred"
            );
            redis.run::<i64>(&["SISMEMBER", "{nanite}:t:eu", "nanite-fred"]) == 1
                && redis.run::<i64>(&["HEXISTS", "{nanite}:r", "nanite-fred"]) == 1
                && redis.run::<i64>(&["HEXISTS", "{nanite}:v", "nanite-fred"]) == 1
        })
        .await;
        wait_until("the other mapper finds fred", async || {
            answering_agents(&second, &["eu"]).await.is_ok_and(|names| names == ["fred"])
        })
        .await;
    }
    drop(fred);
}

#[tokio::test]
async fn n14_heartbeat_flood_takes_few_round_trips() {
    let stage = Stage::new();
    let first = stage.state("first").await;
    let agents: Vec<_> = (0..20).map(|n| stage.speaker(&format!("agent-{n}"), 0)).collect();
    for agent in &agents {
        first.register(stage.registration(agent, &["/a/b"], &[])).await.unwrap();
    }
    wait_until("all registrations are written", async || redis_len(&stage, "r") == 20).await;
    let scripts = || {
        let stats: String = stage.redis.run(&["INFO", "commandstats"]);
        let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_eval:calls=")).unwrap().to_owned();
        line.split(',').next().unwrap().parse::<u64>().unwrap()
    };
    let before = scripts();
    let flood: Vec<_> = (0..100).flat_map(|load| agents.iter().map(move |agent| (agent, f64::from(load)))).collect();
    let flood: Vec<_> = flood.into_iter().map(|(agent, load)| stage.heartbeat(agent, load)).collect();
    for heartbeat in &flood {
        assert!(heartbeat.give(&first).await);
    }
    let last = |agent: &str| {
        let value: Vec<u8> = stage.redis.run(&["HGET", "{nanite}:b", agent]);
        let heartbeat = flood.iter().rev().find(|heartbeat| heartbeat.identity.as_str() == agent).unwrap();
        value.starts_with(heartbeat.version().as_bytes())
    };
    wait_until("the last heartbeat of each is written", async || {
        redis_len(&stage, "b") == 20 && agents.iter().all(|agent| last(agent.identity().as_str()))
    })
    .await;
    let scripts_run = scripts() - before;
    assert!(scripts_run < 200, "{scripts_run} scripts for 2000 heartbeats");
}

fn redis_len(stage: &Stage, letter: &str) -> i64 {
    stage.redis.run(&["HLEN", &format!("{{nanite}}:{letter}")])
}

#[tokio::test]
async fn n14_newer_registration_is_never_replaced_by_an_older_one() {
    let stage = Stage::new();
    let (older, newer) = (stage.speaker("fred", 1), stage.speaker("fred", 2));
    stage.clock.set(crate::harness::pki::at(3));
    let (old, older_again) =
        (stage.registration(&older, &["/old/one"], &[]), stage.registration(&older, &["/old/two"], &[]));
    let new = stage.registration(&newer, &["/new/one"], &[]);
    let (first, second) = (stage.state("first").await, stage.state("second").await);
    first.register(new.clone()).await.unwrap();
    wait_until("the other mapper knows the newer one", async || {
        second.agents().await.unwrap().first().is_some_and(|record| record.services == new.services)
    })
    .await;
    // The other mapper receives the two older messages late.
    for late in [old, older_again] {
        assert!(matches!(second.register(late).await, Err(StateError::SupersededProcess)));
    }
    // The older process unregisters: the newer one stays.
    assert!(!second.remove(&agent("fred"), Some(older.instance())).await.unwrap());
    for state in [&first, &second] {
        assert_eq!(names(state).await, ["fred"]);
        let find = async |service: &str| state.find(&AgentQuery::new(service.parse().unwrap(), vec![])).await.unwrap();
        assert_eq!(find("/new/one").await.len(), 1);
        assert!(find("/old/one").await.is_empty() && find("/old/two").await.is_empty());
    }
    wait_until("the services of the older one are not listed", async || {
        stage.redis.run::<i64>(&["EXISTS", "{nanite}:s:/old/one", "{nanite}:s:/old/two"]) == 0
    })
    .await;
    assert_eq!(stage.redis.run::<i64>(&["SCARD", "{nanite}:s:/new/one"]), 1);
}

#[tokio::test]
async fn n14_lagging_mapper_does_not_overwrite_a_newer_registration() {
    let stage = Stage::new();
    let (older, newer) = (stage.speaker("fred", 1), stage.speaker("fred", 2));
    stage.clock.set(crate::harness::pki::at(3));
    let (old, new) = (stage.registration(&older, &["/old/one"], &[]), stage.registration(&newer, &["/new/one"], &[]));
    // It reads what others wrote only when a caller asks for it.
    let serializer: Arc<dyn Serializer> = Arc::new(stage.pki.serializer(&mapper("lagging")));
    let rare_refresh = options(serializer).refresh_interval(Duration::from_secs(3600));
    let lagging = RedisState::connect(&stage.redis.url(), rare_refresh).await.unwrap();
    lagging.start(stage.context()).await.unwrap();
    // Its first round has ended.
    assert!(lagging.agents().await.unwrap().is_empty());
    let first = stage.state("first").await;
    first.register(new.clone()).await.unwrap();
    let stored = || stage.redis.run::<Option<String>>(&["HGET", "{nanite}:v", "nanite-fred"]);
    wait_until("the newer one is written", async || stored().is_some()).await;
    lagging.register(old).await.unwrap();
    // Pending registrations are written before anything is read.
    assert_eq!(lagging.agents().await.unwrap()[0].services, new.services);
    assert_eq!(stored().unwrap(), version(&new));
    assert_eq!(stage.redis.run::<i64>(&["EXISTS", "{nanite}:s:/old/one"]), 0);
    assert_eq!(first.agents().await.unwrap()[0].services, new.services);
}

#[tokio::test]
async fn n14_removed_agent_stays_removed_until_it_is_heard_again() {
    let stage = Stage::new();
    let (first, second) = (stage.state("first").await, stage.state("second").await);
    let fred = stage.speaker("fred", 0);
    for state in [&first, &second] {
        state.register(stage.registration(&fred, &["/a/b"], &[])).await.unwrap();
    }
    wait_until("it is written", async || redis_len(&stage, "r") == 1).await;
    assert!(first.remove(&agent("fred"), None).await.unwrap());
    assert!(!first.remove(&agent("fred"), None).await.unwrap());
    wait_until("the other mapper removes it", async || names(&second).await.is_empty()).await;
    assert!(!stage.ping(&first, &fred, 1.0).await, "it must register there");
    assert!(stage.ping(&second, &fred, 1.0).await, "this mapper still has it");
    wait_until("both mappers have it", async || names(&first).await == ["fred"] && names(&second).await == ["fred"])
        .await;
}

#[tokio::test]
async fn n14_mapper_does_not_start_with_an_unusable_redis() {
    let (system, mut redis) = (System::secure(), RedisServer::with(&["--requirepass", "open sesame"]));
    let serializer = system.serializer(&mapper("first"));
    let connect = async |url: &str| RedisState::connect(url, options(serializer.clone())).await;
    for url in
        ["", "localhost", "amqp://localhost", "redis://", "redis://0.0.0.0", "redis://h/#insecure", "redis://h/x"]
    {
        assert_eq!(connect(url).await.unwrap_err(), RedisError::InvalidUrl, "{url}");
    }
    let prefix = options(serializer.clone()).prefix("a:b");
    assert_eq!(RedisState::connect(&redis.url(), prefix).await.unwrap_err(), RedisError::InvalidPrefix);
    let RedisError::Unreachable { why, .. } = connect(&redis.url()).await.unwrap_err() else { panic!() };
    assert!(why.contains("NOAUTH"), "{why}");
    let wrong = options(serializer.clone()).password("open barley");
    let error = RedisState::connect(&redis.url(), wrong).await.unwrap_err();
    assert!(matches!(&error, RedisError::Unreachable { why, .. } if why.contains("assword")), "{error:?}");
    assert!(!format!("{error} {error:?}").contains("barley"));
    let in_url = format!("{}?pass=open%20barley", redis.url());
    assert!(!format!("{:?}", connect(&in_url).await.unwrap_err()).contains("barley"));
    let right = options(serializer.clone()).password("open sesame");
    assert!(!format!("{right:?}").contains("sesame"));
    let state = RedisState::connect(&redis.url(), right).await.unwrap();
    assert!(!format!("{state:?}").contains("sesame"));

    // Redis stops after the state has connected and before the mapper starts.
    redis.kill();
    assert!(matches!(connect(&redis.url()).await.unwrap_err(), RedisError::Unreachable { .. }));
    let builder = Mapper::builder(serializer.clone(), system.connect()).state(state.clone());
    assert!(matches!(builder.start().await.unwrap_err(), MapperError::State(StateError::Unavailable(_))));
    let context = StateContext::new(AllowVerified, SystemClock, AGENT_TIMEOUT);
    assert!(matches!(state.start(context).await, Err(StateError::InUse)), "a state can be used by one mapper only");
}

#[tokio::test]
async fn n14_unsigned_registrations_are_not_shared_by_default() {
    let redis = RedisServer::start();
    let plain: Arc<dyn Serializer> = Arc::new(PlainSerializer::json(Identity::mapper("m1").unwrap()));
    assert_eq!(RedisState::connect(&redis.url(), options(plain.clone())).await.unwrap_err(), RedisError::NotSigned);
    assert_eq!(redis.run::<i64>(&["DBSIZE"]), 0, "nothing is written");
    let dangerous = options(plain).dangerous().accept_unsigned();
    assert!(RedisState::connect(&redis.url(), dangerous).await.is_ok());
}
