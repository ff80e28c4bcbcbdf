//! Several mappers with shared state in Redis: what they share, and what they do when Redis is away, hangs, or has lost all.

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
    AGENT_TIMEOUT, Deaf, Stage, deaf, field, names, nothing_refused, options, sharing, version,
};
use crate::harness::system::{System, json, knows, start};
use crate::harness::wait_until;

fn echo() -> impl Actor {
    actor("simple").expose("echo", |text: Payload| async move { reply(text) })
}

async fn echoing(system: &System, name: &str, tags: &[&str]) -> Agent {
    let agent = system.agent(name).actor(echo());
    start(tags.iter().fold(agent, |agent, tag| agent.tag(tag.parse().unwrap()))).await
}

/// Who answers a request to all.
async fn answering(mapper: &Mapper, tags: &[&str]) -> Result<Vec<String>, RequestError> {
    let request = mapper.request("/simple/echo", "hello").selector(SelectorName::All);
    let answers = tags.iter().fold(request, |request, tag| request.tag(tag.parse().unwrap())).await?;
    let answered = |(from, answer): (&Identity, &Result<_, _>)| {
        assert_eq!(answer, &Ok(json("\"hello\"")));
        from.name().to_owned()
    };
    Ok(answers.outcomes.iter().map(answered).collect())
}

/// Notes what a mapper says of agents.
fn noting(builder: MapperBuilder) -> (MapperBuilder, Arc<Mutex<Vec<String>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let noted = events.clone();
    let note = move |event: &AgentEvent| {
        noted.lock().unwrap().push(match event {
            AgentEvent::Registered(record) => format!("{} came", record.identity.name()),
            AgentEvent::Unregistered(identity) => format!("{} left", identity.name()),
            AgentEvent::TimedOut(record) => format!("{} timed out", record.identity.name()),
            other => format!("{other:?}"),
        });
    };
    (builder.on_agent(note), events)
}

fn count(events: &Mutex<Vec<String>>, what: &str) -> usize {
    events.lock().unwrap().iter().filter(|event| *event == what).count()
}

#[tokio::test]
async fn n14_an_agent_that_one_mapper_hears_is_selected_by_another() {
    for system in [System::secure(), System::plain()] {
        let redis = RedisServer::start();
        let one = sharing(&system, &redis, "one").await.0.start().await.unwrap();
        let fred = echoing(&system, "fred", &["eu", "gpu"]).await;
        let bob = echoing(&system, "bob", &["eu"]).await;
        knows(&one, &["bob", "fred"]).await;

        let (builder, state) = deaf(&system, &redis, "other").await;
        let (builder, events) = noting(builder);
        let other = builder.start().await.unwrap();
        knows(&other, &["bob", "fred"]).await;
        assert_eq!(answering(&other, &[]).await.unwrap(), ["bob", "fred"]);
        assert_eq!(answering(&other, &["gpu", "eu"]).await.unwrap(), ["fred"]);
        assert!(matches!(answering(&other, &["gpu", "us"]).await, Err(RequestError::NoTarget(_))));
        let answers = other.request("/simple/echo", "hello").target(agent("bob")).await.unwrap();
        assert_eq!(answers.outcomes.keys().collect::<Vec<_>>(), [&agent("bob")]);

        // Somebody waits at the one mapper for an agent that only the other one hears.
        let waiting = other.request("/late/echo", "hello").wait_for_agents(Duration::from_secs(60));
        let waiting = tokio::spawn(async move { waiting.await });
        let late = actor("late").expose("echo", |text: Payload| async move { reply(text) });
        let late = start(system.agent("late").actor(late)).await;
        assert_eq!(waiting.await.unwrap().unwrap().outcomes.len(), 1);

        // What has left the one has left the other.
        bob.stop().await.unwrap();
        knows(&other, &["fred", "late"]).await;
        assert_eq!(answering(&other, &[]).await.unwrap(), ["fred"]);
        fred.stop().await.unwrap();
        late.stop().await.unwrap();
        knows(&other, &[]).await;
        assert!(matches!(answering(&other, &[]).await, Err(RequestError::NoTarget(_))));
        assert!(nothing_refused(&state), "{:?}", state.refusals());
        assert!(events.lock().unwrap().is_empty(), "it heard nobody: {events:?}");
    }
}

/// Nodes that hold their own certificate and the CA's alone: what is read from Redis has to bring the agent's certificate.
#[tokio::test]
async fn n14_a_mapper_learns_certificates_from_what_it_reads() {
    let (redis, broker, now) = (RedisServer::start(), MemoryBroker::new(), SystemClock.now());
    let valid_for = CertificateAuthority::VALID_FOR;
    let ca = CertificateAuthority::create("example.org", KeyType::P256, valid_for, now).unwrap();
    let node = |identity: &Identity| -> Arc<dyn Serializer> {
        let credentials = ca.issue(identity, KeyType::P256, Duration::from_secs(3600), now).unwrap();
        let trust = Arc::new(ca.trust().unwrap());
        let own = StaticCertificateStore::new([credentials.certificate().clone()]);
        let store = Arc::new(TrustStore::new(trust.clone()).with_known(Arc::new(own)));
        Arc::new(SecureSerializer::builder(credentials, store, trust).build().unwrap())
    };
    let start = async |name: &str, transport: Arc<dyn Transport>| {
        let serializer = node(&mapper(name));
        let state = RedisState::connect(&redis.url(), options(serializer.clone())).await.unwrap();
        Mapper::builder(serializer, transport).state(state).start().await.unwrap()
    };
    let connect = || Arc::new(broker.connect());
    let one = start("one", connect()).await;
    let fred = Agent::builder(node(&agent("fred")), connect()).actor(echo());
    let fred = fred.ping_time(Duration::from_millis(50)).start().await.unwrap();
    knows(&one, &["fred"]).await;
    let other = start("other", Arc::new(Deaf(connect()))).await;
    knows(&other, &["fred"]).await;
    assert_eq!(answering(&other, &[]).await.unwrap(), ["fred"]);
    drop(fred);
}

#[tokio::test]
async fn n14_all_mappers_take_requests_and_tell_of_each_agent_once() {
    let (system, redis) = (System::secure(), RedisServer::start());
    let (one, of_one) = noting(sharing(&system, &redis, "one").await.0);
    let (two, of_two) = noting(sharing(&system, &redis, "two").await.0);
    let (one, two) = (one.start().await.unwrap(), two.start().await.unwrap());
    let fred = echoing(&system, "fred", &[]).await;
    for mapper in [&one, &two] {
        knows(mapper, &["fred"]).await;
        assert_eq!(answering(mapper, &[]).await.unwrap(), ["fred"]);
    }
    fred.stop().await.unwrap();
    for (mapper, events) in [(&one, &of_one), (&two, &of_two)] {
        knows(mapper, &[]).await;
        wait_until("it is told that fred left", async || count(events, "fred left") == 1).await;
        assert_eq!(count(events, "fred timed out"), 0);
    }
}

#[tokio::test]
async fn n14_a_silent_agent_is_gone_at_all_mappers_and_told_once_at_each() {
    let (system, redis) = (System::secure(), RedisServer::start());
    let timeout = Duration::from_millis(1500);
    let (one, of_one) = noting(sharing(&system, &redis, "one").await.0.agent_timeout(timeout));
    let (other, of_other) = noting(deaf(&system, &redis, "other").await.0.agent_timeout(timeout));
    let (one, other) = (one.start().await.unwrap(), other.start().await.unwrap());
    let fred = echoing(&system, "fred", &[]).await;
    knows(&other, &["fred"]).await;
    let first = other.agents().await.unwrap()[0].last_seen;
    // What the one hears keeps it alive at the other.
    wait_until("it is heard for longer than the timeout", async || {
        other.agents().await.unwrap().first().is_some_and(|record| record.last_seen.since(first) > timeout)
    })
    .await;
    // Killed: it says nothing more.
    drop(fred);
    for (mapper, events) in [(&one, &of_one), (&other, &of_other)] {
        knows(mapper, &[]).await;
        wait_until("it is told that fred is gone", async || count(events, "fred timed out") > 0).await;
    }
    let again = echoing(&system, "fred", &[]).await;
    knows(&other, &["fred"]).await;
    drop(again);
    for events in [&of_one, &of_other] {
        wait_until("it is told a second time", async || count(events, "fred timed out") == 2).await;
    }
    knows(&one, &[]).await;
    wait_until("nothing is left in Redis", async || redis.run::<i64>(&["HLEN", "{nanite}:r"]) == 0).await;
    for key in ["{nanite}:v", "{nanite}:b", "{nanite}:m", "{nanite}:l", "{nanite}:s:/simple/echo"] {
        assert_eq!(redis.run::<i64>(&["EXISTS", key]), 0, "{key}");
    }
}

#[tokio::test]
async fn n14_mappers_go_on_without_redis_and_bring_it_up_to_date_when_it_is_back() {
    let (system, mut redis) = (System::secure(), RedisServer::start());
    let (one, of_one) = sharing(&system, &redis, "one").await;
    let (other, of_other) = deaf(&system, &redis, "other").await;
    let (one, other) = (one.start().await.unwrap(), other.start().await.unwrap());
    let fred = echoing(&system, "fred", &["eu"]).await;
    let bob = echoing(&system, "bob", &[]).await;
    knows(&other, &["bob", "fred"]).await;

    redis.kill();
    assert_eq!(answering(&one, &["eu"]).await.unwrap(), ["fred"]);
    assert_eq!(answering(&other, &["eu"]).await.unwrap(), ["fred"]);
    wait_until("both notice", async || !of_one.is_present() && !of_other.is_present()).await;
    // Somebody comes and somebody goes, which only the one hears.
    let late = echoing(&system, "late", &["eu"]).await;
    knows(&one, &["bob", "fred", "late"]).await;
    bob.stop().await.unwrap();
    knows(&one, &["fred", "late"]).await;
    assert_eq!(answering(&one, &["eu"]).await.unwrap(), ["fred", "late"]);
    assert_eq!(answering(&other, &["eu"]).await.unwrap(), ["fred"], "what it knew");

    // It comes back and has forgotten everything.
    redis.restart();
    wait_until("both have it again", async || of_one.is_present() && of_other.is_present()).await;
    wait_until("the other knows who came", async || {
        answering(&other, &["eu"]).await.is_ok_and(|names| names == ["fred", "late"])
    })
    .await;
    assert_eq!(redis.run::<Vec<String>>(&["SINTER", "{nanite}:s:/simple/echo", "{nanite}:t:eu"]).len(), 2);
    drop((fred, late));
}

#[tokio::test]
async fn n14_who_left_while_redis_was_away_does_not_come_back_with_it() {
    let (system, mut redis) = (System::secure(), RedisServer::durable());
    let one = sharing(&system, &redis, "one").await.0.start().await.unwrap();
    let (fred, bob) = (echoing(&system, "fred", &[]).await, echoing(&system, "bob", &[]).await);
    let (other, of_other) = deaf(&system, &redis, "other").await;
    let other = other.start().await.unwrap();
    knows(&other, &["bob", "fred"]).await;
    redis.kill();
    bob.stop().await.unwrap();
    knows(&one, &["fred"]).await;
    redis.restart();
    assert_eq!(redis.run::<i64>(&["HEXISTS", "{nanite}:r", &field("fred")]), 1, "it kept what it held");
    wait_until("the other has it again", async || of_other.is_present()).await;
    knows(&other, &["fred"]).await;
    assert_eq!(answering(&other, &[]).await.unwrap(), ["fred"]);
    wait_until("bob is gone", async || redis.run::<i64>(&["HEXISTS", "{nanite}:r", &field("bob")]) == 0).await;
    drop(fred);
}

#[tokio::test]
async fn n14_a_redis_that_hangs_is_taken_for_away() {
    let (system, redis) = (System::secure(), RedisServer::start());
    let serializer = system.serializer(&mapper("one"));
    let options = options(serializer.clone()).timeout(Duration::from_millis(300));
    let state = RedisState::connect(&redis.url(), options).await.unwrap();
    let one = Mapper::builder(serializer, system.connect()).state(state.clone()).start().await.unwrap();
    let fred = echoing(&system, "fred", &[]).await;
    knows(&one, &["fred"]).await;
    redis.pause();
    assert_eq!(answering(&one, &[]).await.unwrap(), ["fred"]);
    wait_until("it is taken for away", async || !state.is_present()).await;
    assert_eq!(answering(&one, &[]).await.unwrap(), ["fred"]);
    redis.resume();
    wait_until("it is there again", async || state.is_present()).await;
    assert_eq!(answering(&one, &[]).await.unwrap(), ["fred"]);
    drop(fred);
}

#[tokio::test]
async fn n14_what_redis_loses_while_it_runs_is_written_again() {
    let (system, redis) = (System::secure(), RedisServer::start());
    let one = sharing(&system, &redis, "one").await.0.start().await.unwrap();
    let (other, _) = deaf(&system, &redis, "other").await;
    let other = other.start().await.unwrap();
    let fred = echoing(&system, "fred", &["eu"]).await;
    knows(&other, &["fred"]).await;
    for loss in
        [&["FLUSHALL"][..], &["DEL", "{nanite}:t:eu"], &["DEL", "{nanite}:r"], &["HDEL", "{nanite}:v", "nanite-fred"]]
    {
        redis.run::<redis::Value>(loss);
        // A set that lost a member is mended by who misses it there: whoever asks for it, once it is connected again.
        wait_until("it is whole again", async || {
            assert_eq!(answering(&one, &["eu"]).await.unwrap(), ["fred"], "after {loss:?}: it has heard fred itself");
            redis.run::<i64>(&["SISMEMBER", "{nanite}:t:eu", "nanite-fred"]) == 1
                && redis.run::<i64>(&["HEXISTS", "{nanite}:r", "nanite-fred"]) == 1
                && redis.run::<i64>(&["HEXISTS", "{nanite}:v", "nanite-fred"]) == 1
        })
        .await;
        wait_until("the other finds fred", async || {
            answering(&other, &["eu"]).await.is_ok_and(|names| names == ["fred"])
        })
        .await;
    }
    drop(fred);
}

#[tokio::test]
async fn n14_a_flood_of_heartbeats_is_a_few_round_trips() {
    let stage = Stage::new();
    let one = stage.state("one").await;
    let agents: Vec<_> = (0..20).map(|n| stage.speaker(&format!("agent-{n}"), 0)).collect();
    for agent in &agents {
        one.register(stage.registration(agent, &["/a/b"], &[])).await.unwrap();
    }
    wait_until("all are written", async || redis_len(&stage, "r") == 20).await;
    let scripts = || {
        let stats: String = stage.redis.run(&["INFO", "commandstats"]);
        let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_eval:calls=")).unwrap().to_owned();
        line.split(',').next().unwrap().parse::<u64>().unwrap()
    };
    let before = scripts();
    let flood: Vec<_> = (0..100).flat_map(|load| agents.iter().map(move |agent| (agent, f64::from(load)))).collect();
    let flood: Vec<_> = flood.into_iter().map(|(agent, load)| stage.heartbeat(agent, load)).collect();
    for heartbeat in &flood {
        assert!(heartbeat.give(&one).await);
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
    let asked = scripts() - before;
    assert!(asked < 200, "{asked} scripts for 2000 heartbeats");
}

fn redis_len(stage: &Stage, message: &str) -> i64 {
    stage.redis.run(&["HLEN", &format!("{{nanite}}:{message}")])
}

#[tokio::test]
async fn n14_a_later_registration_is_never_replaced_by_an_earlier_one() {
    let stage = Stage::new();
    let (earlier, later) = (stage.speaker("fred", 1), stage.speaker("fred", 2));
    stage.clock.set(crate::harness::pki::at(3));
    let (old, older_again) =
        (stage.registration(&earlier, &["/old/one"], &[]), stage.registration(&earlier, &["/old/two"], &[]));
    let new = stage.registration(&later, &["/new/one"], &[]);
    let (one, two) = (stage.state("one").await, stage.state("two").await);
    one.register(new.clone()).await.unwrap();
    // The broker brings the two messages to the other mapper late.
    two.register(old)
        .await
        .or_else(|error| matches!(error, StateError::SupersededProcess).then_some(()).ok_or(error))
        .unwrap();
    wait_until("the other knows the later one", async || {
        two.agents().await.unwrap().first().is_some_and(|record| record.services == new.services)
    })
    .await;
    assert!(matches!(two.register(older_again).await, Err(StateError::SupersededProcess)));
    // What the earlier process says when it goes does not concern the later one.
    assert!(!two.remove(&agent("fred"), Some(earlier.instance())).await.unwrap());
    for state in [&one, &two] {
        assert_eq!(names(state).await, ["fred"]);
        let find = async |service: &str| state.find(&AgentQuery::new(service.parse().unwrap(), vec![])).await.unwrap();
        assert_eq!(find("/new/one").await.len(), 1);
        assert!(find("/old/one").await.is_empty() && find("/old/two").await.is_empty());
    }
    wait_until("nothing of the earlier one is listed", async || {
        stage.redis.run::<i64>(&["EXISTS", "{nanite}:s:/old/one", "{nanite}:s:/old/two"]) == 0
    })
    .await;
    assert_eq!(stage.redis.run::<i64>(&["SCARD", "{nanite}:s:/new/one"]), 1);
}

#[tokio::test]
async fn n14_a_mapper_that_lags_behind_writes_nothing_over_a_later_registration() {
    let stage = Stage::new();
    let (earlier, later) = (stage.speaker("fred", 1), stage.speaker("fred", 2));
    stage.clock.set(crate::harness::pki::at(3));
    let (old, new) = (stage.registration(&earlier, &["/old/one"], &[]), stage.registration(&later, &["/new/one"], &[]));
    // It reads what others wrote only when it is asked.
    let serializer: Arc<dyn Serializer> = Arc::new(stage.pki.serializer(&mapper("lagging")));
    let seldom = options(serializer).refresh(Duration::from_secs(3600));
    let lagging = RedisState::connect(&stage.redis.url(), seldom).await.unwrap();
    lagging.start(stage.context()).await.unwrap();
    // Its first round is over.
    assert!(lagging.agents().await.unwrap().is_empty());
    let one = stage.state("one").await;
    one.register(new.clone()).await.unwrap();
    let stored = || stage.redis.run::<Option<String>>(&["HGET", "{nanite}:v", "nanite-fred"]);
    wait_until("the later one is written", async || stored().is_some()).await;
    lagging.register(old).await.unwrap();
    // What waits is written before anything is read.
    assert_eq!(lagging.agents().await.unwrap()[0].services, new.services);
    assert_eq!(stored().unwrap(), version(&new));
    assert_eq!(stage.redis.run::<i64>(&["EXISTS", "{nanite}:s:/old/one"]), 0);
    assert_eq!(one.agents().await.unwrap()[0].services, new.services);
}

#[tokio::test]
async fn n14_what_one_mapper_forgets_all_forget_until_it_is_heard_again() {
    let stage = Stage::new();
    let (one, two) = (stage.state("one").await, stage.state("two").await);
    let fred = stage.speaker("fred", 0);
    for state in [&one, &two] {
        state.register(stage.registration(&fred, &["/a/b"], &[])).await.unwrap();
    }
    wait_until("it is written", async || redis_len(&stage, "r") == 1).await;
    assert!(one.remove(&agent("fred"), None).await.unwrap());
    assert!(!one.remove(&agent("fred"), None).await.unwrap());
    wait_until("the other does without", async || names(&two).await.is_empty()).await;
    assert!(!stage.ping(&one, &fred, 1.0).await, "it has to register there");
    assert!(stage.ping(&two, &fred, 1.0).await, "it lives, as this mapper hears");
    wait_until("all have it", async || names(&one).await == ["fred"] && names(&two).await == ["fred"]).await;
}

#[tokio::test]
async fn n14_a_mapper_does_not_start_with_a_redis_that_cannot_be_used() {
    let (system, mut redis) = (System::secure(), RedisServer::with(&["--requirepass", "open sesame"]));
    let serializer = system.serializer(&mapper("one"));
    let connect = async |url: &str| RedisState::connect(url, options(serializer.clone())).await;
    for url in
        ["", "localhost", "amqp://localhost", "redis://", "redis://0.0.0.0", "redis://h/#insecure", "redis://h/x"]
    {
        assert_eq!(connect(url).await.unwrap_err(), RedisError::Url, "{url}");
    }
    let prefix = options(serializer.clone()).prefix("a:b");
    assert_eq!(RedisState::connect(&redis.url(), prefix).await.unwrap_err(), RedisError::Prefix);
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

    // It was there when the mapper was made, and is gone when it starts.
    redis.kill();
    assert!(matches!(connect(&redis.url()).await.unwrap_err(), RedisError::Unreachable { .. }));
    let builder = Mapper::builder(serializer.clone(), system.connect()).state(state.clone());
    assert!(matches!(builder.start().await.unwrap_err(), MapperError::State(StateError::Unavailable(_))));
    let context = StateContext::new(Arc::new(AllowVerified), Arc::new(SystemClock), AGENT_TIMEOUT);
    assert!(matches!(state.start(context).await, Err(StateError::InUse)), "it serves one mapper");
}

#[tokio::test]
async fn n14_plain_registrations_are_not_shared_unless_asked_for() {
    let redis = RedisServer::start();
    let plain: Arc<dyn Serializer> = Arc::new(PlainSerializer::json(Identity::mapper("m1").unwrap()));
    assert_eq!(RedisState::connect(&redis.url(), options(plain.clone())).await.unwrap_err(), RedisError::NotSigned);
    assert_eq!(redis.run::<i64>(&["DBSIZE"]), 0, "nothing was written");
    let dangerous = options(plain).dangerous().accept_unsigned();
    assert!(RedisState::connect(&redis.url(), dangerous).await.is_ok());
}
