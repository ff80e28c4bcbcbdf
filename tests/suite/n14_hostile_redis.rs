//! A Redis that is hostile, or holds malformed data or data of other programs: only what an agent signed is accepted.

use std::sync::Arc;
use std::time::Duration;

use nanite::certs::KeyType;
use nanite::clock::Timestamp;
use nanite::mapper::{AgentQuery, AgentRecord, ClusterState, RedisOptions, RedisRefusal, RedisState, StateContext};
use nanite::packet::{Identity, Register, Request};
use nanite::policy::{AllowVerified, Caller, Decision, Policy};
use nanite::serializer::{PlainSerializer, Serializer};

use crate::harness::pki::{Pki, agent, at, mapper};
use crate::harness::redis::RedisServer;
use crate::harness::sharing::{AGENT_TIMEOUT, Stage, field, names, nothing_refused, options, refused, value, version};
use crate::harness::wait_until;

/// Writes a registration where mappers read it, listed as the newest change and under a service.
fn plant(redis: &RedisServer, name: &str, version: &str, record: &[u8], beat: Option<&[u8]>, service: &str) {
    let mut to = redis.connect();
    let field = field(name);
    redis::cmd("HSET").arg("{nanite}:v").arg(&field).arg(version).exec(&mut to).unwrap();
    redis::cmd("HSET").arg("{nanite}:r").arg(&field).arg(record).exec(&mut to).unwrap();
    redis::cmd("HDEL").arg("{nanite}:b").arg(&field).exec(&mut to).unwrap();
    if let Some(beat) = beat {
        redis::cmd("HSET").arg("{nanite}:b").arg(&field).arg(beat).exec(&mut to).unwrap();
    }
    redis::cmd("SADD").arg(format!("{{nanite}}:s:{service}")).arg(&field).exec(&mut to).unwrap();
    let revision: i64 = redis::cmd("INCR").arg("{nanite}:n").query(&mut to).unwrap();
    redis::cmd("ZADD").arg("{nanite}:l").arg(revision).arg(&field).exec(&mut to).unwrap();
}

async fn found(state: &RedisState, service: &str, tags: &[&str]) -> Vec<String> {
    let query = AgentQuery::new(service.parse().unwrap(), tags.iter().map(|tag| tag.parse().unwrap()).collect());
    state.find(&query).await.unwrap().iter().map(|record| record.identity.name().to_owned()).collect()
}

/// Two mappers and an agent `honest` that both know. Only the first mapper receives messages from agents.
async fn with_honest_agent(stage: &Stage) -> (RedisState, RedisState, AgentRecord) {
    let (first, second) = (stage.state("first").await, stage.state("second").await);
    let record = stage.registration(&stage.speaker("honest", 0), &["/a/b"], &["eu"]);
    first.register(record.clone()).await.unwrap();
    wait_until("the other mapper knows it", async || names(&second).await == ["honest"]).await;
    (first, second, record)
}

async fn refuses(state: &RedisState, refusal: RedisRefusal, what: &str) {
    wait_until(what, async || {
        let _ = state.agents().await.unwrap();
        refused(state, refusal) > 0
    })
    .await;
    assert_eq!(names(state).await, ["honest"], "{what}");
    assert_eq!(found(state, "/a/b", &["eu"]).await, ["honest"], "{what}");
}

#[tokio::test]
async fn n14_forged_agents_are_rejected() {
    let stage = Stage::new();
    let (_first, second, record) = with_honest_agent(&stage).await;
    let ours = record.proof.clone().unwrap();
    let forgeries = {
        // Signed with a certificate of another CA.
        let theirs = Stage::new();
        let foreign = theirs.registration(&theirs.speaker("eve", 0), &["/a/b"], &["eu"]);
        // A real registration, under another name.
        let renamed = value(&ours, stage.now());
        // A real registration, with another body.
        let mut changed = (*ours).clone();
        changed.body = changed.body.iter().map(|byte| if *byte == b'b' { b'c' } else { *byte }).collect();
        // Not signed.
        let mut unsigned = vec![2];
        unsigned.extend(stage.now().as_micros().to_be_bytes());
        unsigned.extend(br#"{"json_class":"Nanite::Register","data":{"identity":"nanite-eve","services":["/a/b"],"status":0,"tags":["eu"]}}"#);
        [value(foreign.proof.as_ref().unwrap(), stage.now()), renamed, value(&changed, stage.now()), unsigned]
    };
    for (n, forgery) in forgeries.iter().enumerate() {
        let before = refused(&second, RedisRefusal::NotProven);
        plant(&stage.redis, "eve", &"f".repeat(32), forgery, None, "/a/b");
        stage.redis.run::<i64>(&["SADD", "{nanite}:t:eu", "nanite-eve"]);
        wait_until("it is refused", async || {
            let _ = second.agents().await.unwrap();
            refused(&second, RedisRefusal::NotProven) > before
        })
        .await;
        assert_eq!(names(&second).await, ["honest"], "forgery {n}");
        assert_eq!(found(&second, "/a/b", &["eu"]).await, ["honest"], "forgery {n}");
    }
    // A mapper that starts now refuses it too.
    assert_eq!(names(&stage.state("third").await).await, ["honest"]);
}

#[tokio::test]
async fn n14_agents_are_not_found_for_services_they_did_not_register() {
    let stage = Stage::new();
    let (first, second, _) = with_honest_agent(&stage).await;
    for set in ["{nanite}:s:/root/shell", "{nanite}:t:admin"] {
        stage.redis.run::<i64>(&["SADD", set, "nanite-honest", "nanite-unknown", "mapper-one", "malformed", ""]);
    }
    for state in [&first, &second] {
        assert!(found(state, "/root/shell", &[]).await.is_empty());
        assert!(found(state, "/root/shell", &["admin"]).await.is_empty());
        assert!(found(state, "/a/b", &["admin"]).await.is_empty());
        assert!(refused(state, RedisRefusal::Listing) > 0);
        assert_eq!(found(state, "/a/b", &["eu"]).await, ["honest"]);
    }
}

#[tokio::test]
async fn n14_agents_that_a_mapper_hears_cannot_be_hidden() {
    let stage = Stage::new();
    let (first, second, _) = with_honest_agent(&stage).await;
    let mut to = stage.redis.connect();
    for _ in 0..20 {
        stage.redis.run::<i64>(&["SREM", "{nanite}:s:/a/b", "nanite-honest"]);
        assert_eq!(found(&first, "/a/b", &["eu"]).await, ["honest"]);
    }
    // Data that is lost by accident is repaired: the other mapper finds the agent again.
    redis::cmd("DEL").arg("{nanite}:s:/a/b").exec(&mut to).unwrap();
    wait_until("the other mapper finds it", async || found(&second, "/a/b", &["eu"]).await == ["honest"]).await;
}

#[tokio::test]
async fn n14_replaced_registration_cannot_be_restored() {
    let stage = Stage::new();
    let (first, second, old) = with_honest_agent(&stage).await;
    let later = stage.registration(&stage.speaker("honest", 1), &["/c/d"], &[]);
    first.register(later.clone()).await.unwrap();
    wait_until("the other mapper knows the newer one", async || found(&second, "/c/d", &[]).await == ["honest"]).await;
    plant(&stage.redis, "honest", &"f".repeat(32), &value(old.proof.as_ref().unwrap(), stage.now()), None, "/a/b");
    stage.redis.run::<i64>(&["SADD", "{nanite}:t:eu", "nanite-honest"]);
    for state in [&first, &second] {
        for _ in 0..5 {
            assert!(found(state, "/a/b", &["eu"]).await.is_empty());
            assert_eq!(state.agents().await.unwrap()[0].services, later.services);
        }
    }
}

#[tokio::test]
async fn n14_dead_agent_is_kept_alive_no_longer_than_its_last_message() {
    let stage = Stage::new();
    let (first, second, record) = with_honest_agent(&stage).await;
    let fred = stage.speaker("fred", 0);
    let registered = stage.registration(&fred, &["/a/b"], &[]);
    first.register(registered.clone()).await.unwrap();
    let last = stage.heartbeat(&fred, 7.0);
    assert!(last.give(&first).await);
    let never = Timestamp::from_micros(u64::MAX);
    let proof = record.proof.clone().unwrap();
    let lie = || plant(&stage.redis, "honest", &version(&record), &value(&proof, never), None, "/a/b");
    let reaped = async |state: &RedisState| {
        let gone = state.reap(stage.now().saturating_sub(AGENT_TIMEOUT)).await.unwrap();
        gone.iter().map(|record| record.identity.name().to_owned()).collect::<Vec<_>>()
    };
    // Redis claims that both have just been seen, at any time.
    stage.clock.set(at(59));
    plant_heartbeat(&stage, "fred", &last.value(never));
    lie();
    let third = stage.state("third").await;
    assert!(!names(&third).await.is_empty(), "a message is valid for a minute: until then it may have been received");
    stage.clock.set(at(61).saturating_add(AGENT_TIMEOUT));
    for state in [&first, &second, &third] {
        plant_heartbeat(&stage, "fred", &last.value(never));
        lie();
        let _ = reaped(state).await;
        assert!(names(state).await.is_empty());
    }
    // They are removed from Redis. Redis restores them, and gives them to a mapper that knows no agent.
    wait_until("they are removed", async || stage.redis.run::<i64>(&["HLEN", "{nanite}:r"]) == 0).await;
    let fred = value(registered.proof.as_ref().unwrap(), never);
    plant(&stage.redis, "fred", &version(&registered), &fred, Some(&last.value(never)), "/a/b");
    lie();
    let fourth = stage.state("fourth").await;
    assert!(names(&fourth).await.is_empty() && found(&fourth, "/a/b", &[]).await.is_empty());
    for state in [&first, &second, &third] {
        assert!(names(state).await.is_empty() && found(state, "/a/b", &[]).await.is_empty());
    }
    assert_eq!(stage.redis.run::<i64>(&["HLEN", "{nanite}:r"]), 2, "they were in Redis");
}

fn plant_heartbeat(stage: &Stage, name: &str, beat: &[u8]) {
    redis::cmd("HSET").arg("{nanite}:b").arg(field(name)).arg(beat).exec(&mut stage.redis.connect()).unwrap();
}

#[tokio::test]
async fn n14_heartbeats_of_other_agents_are_rejected() {
    let stage = Stage::new();
    let (first, second, _) = with_honest_agent(&stage).await;
    let fred = stage.speaker("fred", 0);
    first.register(stage.registration(&fred, &["/a/b"], &[])).await.unwrap();
    wait_until("the other mapper knows fred", async || names(&second).await == ["fred", "honest"]).await;
    stage.clock.set(at(20));
    let others = stage.heartbeat(&stage.speaker("bob", 0), -1.0);
    let earlier = stage.heartbeat(&stage.speaker("fred", 0), -1.0);
    assert!(earlier.version() <= stage.heartbeat(&fred, 0.0).version());
    for beat in [others.value(stage.now()), b"short".to_vec(), [&b"f".repeat(32)[..], b"malformed"].concat()] {
        plant_heartbeat(&stage, "fred", &beat);
        let revision: i64 = stage.redis.run(&["INCR", "{nanite}:n"]);
        stage.redis.run::<i64>(&["ZADD", "{nanite}:l", &revision.to_string(), "nanite-fred"]);
        let _ = second.agents().await.unwrap();
        let fred = second.agents().await.unwrap().into_iter().find(|record| record.identity == agent("fred")).unwrap();
        assert_eq!(fred.status.load(), Some(1.0), "from its own registration");
        assert_eq!(fred.last_seen, at(0));
    }
    assert!(refused(&second, RedisRefusal::NotProven) > 0 && refused(&second, RedisRefusal::Malformed) > 0);
}

#[tokio::test]
async fn n14_malformed_data_is_refused_and_counted() {
    let stage = Stage::new();
    let (_first, second, record) = with_honest_agent(&stage).await;
    let good = value(record.proof.as_ref().unwrap(), stage.now());
    let long = vec![1; 300 * 1024];
    for (what, bytes, refusal) in [
        ("empty", &[][..], RedisRefusal::Malformed),
        ("truncated", &good[..good.len() - 1], RedisRefusal::Malformed),
        ("another format", b"\x03 malformed", RedisRefusal::Malformed),
        ("data of another program", b"{\"some\": \"json\"}", RedisRefusal::Malformed),
        ("too large", &long, RedisRefusal::TooLarge),
    ] {
        plant(&stage.redis, "eve", &"0".repeat(32), bytes, None, "/a/b");
        refuses(&second, refusal, what).await;
    }
    // Names among the agents that are not agents.
    for name in ["", "malformed", "mapper-one", "nanite-a/b", "nanite-\n"] {
        let revision: i64 = stage.redis.run(&["INCR", "{nanite}:n"]);
        stage.redis.run::<i64>(&["ZADD", "{nanite}:l", &revision.to_string(), name]);
    }
    refuses(&second, RedisRefusal::Malformed, "names that are not agents").await;
    // Invalid versions: they are repaired by a mapper that knows the registration.
    stage.redis.run::<i64>(&["HSET", "{nanite}:v", "nanite-honest", "zzzz"]);
    assert_eq!(found(&second, "/a/b", &["eu"]).await, ["honest"]);
}

#[tokio::test]
async fn n14_keys_of_another_type_are_not_changed() {
    let stage = Stage::new();
    let (first, second, _) = with_honest_agent(&stage).await;
    let mut to = stage.redis.connect();
    // The key of a service is a string: mappers continue with the agents that they know.
    redis::cmd("SET").arg("{nanite}:s:/a/b").arg("other program").exec(&mut to).unwrap();
    for state in [&first, &second] {
        assert_eq!(found(state, "/a/b", &["eu"]).await, ["honest"]);
        assert!(refused(state, RedisRefusal::WrongType) > 0);
        assert!(state.is_connected());
    }
    let fred = stage.registration(&stage.speaker("fred", 0), &["/a/b", "/c/d"], &[]);
    first.register(fred).await.unwrap();
    wait_until("it is listed under its other service", async || found(&second, "/c/d", &[]).await == ["fred"]).await;
    assert_eq!(stage.redis.run::<String>(&["GET", "{nanite}:s:/a/b"]), "other program");
    // The key of the list of agents is a string: Redis cannot be used.
    redis::cmd("SET").arg("{nanite}:l").arg("other program").exec(&mut to).unwrap();
    wait_until("both mappers disconnect", async || !first.is_connected() && !second.is_connected()).await;
    assert_eq!(found(&first, "/c/d", &[]).await, ["fred"]);
    assert_eq!(stage.redis.run::<String>(&["GET", "{nanite}:l"]), "other program");
    redis::cmd("DEL").arg("{nanite}:l").exec(&mut to).unwrap();
    wait_until("both mappers reconnect", async || first.is_connected() && second.is_connected()).await;
    for state in [&first, &second] {
        wait_until("the lost data is written again", async || found(state, "/c/d", &[]).await == ["fred"]).await;
    }
}

#[tokio::test]
async fn n14_endless_reply_ends_the_connection() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = sent.clone();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 1024]).await.unwrap();
        stream.write_all(b"$4000000000\r\n").await.unwrap();
        let part = vec![b'x'; 64 * 1024];
        while stream.write_all(&part).await.is_ok() {
            count.fetch_add(part.len(), std::sync::atomic::Ordering::SeqCst);
        }
    });
    let pki = Pki::new(KeyType::P256);
    let serializer: Arc<dyn Serializer> = Arc::new(pki.serializer(&mapper("first")));
    let options = RedisOptions::new(serializer).timeout(Duration::from_secs(60));
    let error = RedisState::connect(&format!("unix://{}", path.display()), options).await.unwrap_err();
    assert!(error.to_string().contains("reply too large"), "{error}");
    assert!(sent.load(std::sync::atomic::Ordering::SeqCst) < 80 * 1024 * 1024);
}

/// No agent may offer this service.
#[derive(Debug)]
struct Forbid(&'static str);

impl Policy for Forbid {
    fn authorize_registration(&self, _: &Caller<'_>, register: &Register) -> Decision {
        let offers = register.services.iter().any(|service| service.as_str() == self.0);
        if offers { Decision::denied() } else { Decision::allow() }
    }

    fn authorize_request(&self, _: &Caller<'_>, _: &Request) -> Decision {
        Decision::allow()
    }
}

#[tokio::test]
async fn n14_agents_that_the_readers_policy_denies_are_refused() {
    let stage = Stage::new();
    let first = stage.state("first").await;
    first.register(stage.registration(&stage.speaker("fred", 0), &["/a/b", "/root/shell"], &[])).await.unwrap();
    first.register(stage.registration(&stage.speaker("bob", 0), &["/a/b"], &[])).await.unwrap();
    let serializer: Arc<dyn Serializer> = Arc::new(stage.pki.serializer(&mapper("strict")));
    let strict = RedisState::connect(&stage.redis.url(), options(serializer)).await.unwrap();
    let context = StateContext::new(Forbid("/root/shell"), stage.clock.clone(), AGENT_TIMEOUT);
    strict.start(context).await.unwrap();
    wait_until("it knows the permitted agent", async || names(&strict).await == ["bob"]).await;
    assert!(found(&strict, "/root/shell", &[]).await.is_empty());
    assert_eq!(found(&strict, "/a/b", &[]).await, ["bob"]);
    assert!(refused(&strict, RedisRefusal::Denied) > 0);
}

#[tokio::test]
async fn n14_hostile_names_and_prefixes_cannot_reach_other_keys() {
    let stage = Stage::new();
    stage.redis.run::<redis::Value>(&["SET", "nanite", "other program"]);
    stage.redis.run::<redis::Value>(&["SET", "{a}:s:/x/y", "other program"]);
    let first = stage.state("first").await;
    let hostile = [
        "s:/a/b",
        "t:eu",
        "r",
        "v",
        "l",
        "}:l",
        "{nanite}:l",
        "nanite-fred",
        "*",
        "?",
        "[a-z]",
        "a b",
        "\u{2028}",
        "%s",
        "\\n",
        "'; return 1 --",
        "/a/b",
    ];
    let longest = "ä".repeat(64);
    let tags: Vec<&str> = hostile.iter().copied().chain([longest.as_str()]).collect();
    let services = ["/a/b", "/s/t", "/.../-", "/_/_._"];
    first.register(stage.registration(&stage.speaker("fred", 0), &services, &tags)).await.unwrap();
    first.register(stage.registration(&stage.speaker("l", 0), &["/a/b"], &["eu"])).await.unwrap();
    let second = stage.state("second").await;
    wait_until("the other mapper knows both", async || names(&second).await == ["fred", "l"]).await;
    assert_eq!(found(&second, "/a/b", &tags).await, ["fred"]);
    for tag in &tags {
        assert_eq!(found(&second, "/a/b", &[tag]).await, ["fred"], "{tag:?}");
    }
    assert_eq!(found(&second, "/a/b", &["eu"]).await, ["l"]);
    let mut keys: Vec<String> = stage.redis.run(&["KEYS", "*"]);
    keys.retain(|key| key != "nanite" && key != "{a}:s:/x/y");
    let expected: std::collections::BTreeSet<String> = (["e", "n", "l", "v", "r", "m"].map(str::to_owned).into_iter())
        .chain(services.map(|service| format!("s:{service}")))
        .chain(tags.iter().chain(&["eu"]).map(|tag| format!("t:{tag}")))
        .map(|name| format!("{{nanite}}:{name}"))
        .collect();
    assert_eq!(keys.into_iter().collect::<std::collections::BTreeSet<_>>(), expected);
    assert!(nothing_refused(&first) && nothing_refused(&second));

    // Mappers with other prefixes share nothing.
    for prefix in ["a", "nanit", "nanite-", "nanite2"] {
        let serializer: Arc<dyn Serializer> = Arc::new(stage.pki.serializer(&mapper("apart")));
        let apart = RedisState::connect(&stage.redis.url(), options(serializer).prefix(prefix)).await.unwrap();
        apart.start(stage.context()).await.unwrap();
        assert!(names(&apart).await.is_empty(), "{prefix}");
        assert!(found(&apart, "/a/b", &[]).await.is_empty());
    }
    first.remove(&agent("fred"), None).await.unwrap();
    wait_until("fred's tags are removed", async || {
        stage.redis.run::<Vec<String>>(&["KEYS", "{nanite}:t:*"]) == ["{nanite}:t:eu"]
    })
    .await;
    assert_eq!(stage.redis.run::<String>(&["GET", "nanite"]), "other program");
    assert_eq!(stage.redis.run::<String>(&["GET", "{a}:s:/x/y"]), "other program");
}

#[tokio::test]
async fn n14_unsigned_registrations_require_accept_unsigned() {
    let redis = RedisServer::start();
    let stage = Stage { redis, ..Stage::new() };
    let plain: Arc<dyn Serializer> = Arc::new(PlainSerializer::json(Identity::mapper("m1").unwrap()));
    let careless = options(plain).dangerous().accept_unsigned();
    let careless = RedisState::connect(&stage.redis.url(), careless).await.unwrap();
    careless.start(StateContext::new(AllowVerified, stage.clock.clone(), AGENT_TIMEOUT)).await.unwrap();
    let mut record = stage.registration(&stage.speaker("fred", 0), &["/a/b"], &[]);
    record.proof = None;
    careless.register(record).await.unwrap();
    wait_until("it is written", async || stage.redis.run::<i64>(&["HLEN", "{nanite}:r"]) == 1).await;
    let careful = stage.state("careful").await;
    wait_until("it is refused", async || refused(&careful, RedisRefusal::NotProven) > 0).await;
    assert!(names(&careful).await.is_empty() && found(&careful, "/a/b", &[]).await.is_empty());
}
