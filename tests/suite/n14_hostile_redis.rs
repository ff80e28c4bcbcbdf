//! A Redis that is hostile, or holds rubbish or what is another's: nothing in it is believed that an agent did not sign.

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

/// Puts a registration where mappers look for it, listed as the newest, under a service.
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

/// Two mappers, the second of which hears nobody, and an honest agent that both know.
async fn honest(stage: &Stage) -> (RedisState, RedisState, AgentRecord) {
    let (one, other) = (stage.state("one").await, stage.state("other").await);
    let record = stage.registration(&stage.speaker("honest", 0), &["/a/b"], &["eu"]);
    one.register(record.clone()).await.unwrap();
    wait_until("the other knows it", async || names(&other).await == ["honest"]).await;
    (one, other, record)
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
async fn n14_nobody_can_be_invented() {
    let stage = Stage::new();
    let (_one, other, record) = honest(&stage).await;
    let ours = record.proof.clone().unwrap();
    let forgeries = {
        // Signed by a certificate of another CA.
        let theirs = Stage::new();
        let foreign = theirs.registration(&theirs.speaker("eve", 0), &["/a/b"], &["eu"]);
        // Of an agent that lives, under another name.
        let renamed = value(&ours, stage.now());
        // Of an agent that lives, with another body.
        let mut changed = (*ours).clone();
        changed.body = changed.body.iter().map(|byte| if *byte == b'b' { b'c' } else { *byte }).collect();
        // By nobody at all.
        let mut unsigned = vec![2];
        unsigned.extend(stage.now().as_micros().to_be_bytes());
        unsigned.extend(br#"{"json_class":"Nanite::Register","data":{"identity":"nanite-eve","services":["/a/b"],"status":0,"tags":["eu"]}}"#);
        [value(foreign.proof.as_ref().unwrap(), stage.now()), renamed, value(&changed, stage.now()), unsigned]
    };
    for (n, forgery) in forgeries.iter().enumerate() {
        let before = refused(&other, RedisRefusal::NotProven);
        plant(&stage.redis, "eve", &"f".repeat(32), forgery, None, "/a/b");
        stage.redis.run::<i64>(&["SADD", "{nanite}:t:eu", "nanite-eve"]);
        wait_until("it is refused", async || {
            let _ = other.agents().await.unwrap();
            refused(&other, RedisRefusal::NotProven) > before
        })
        .await;
        assert_eq!(names(&other).await, ["honest"], "forgery {n}");
        assert_eq!(found(&other, "/a/b", &["eu"]).await, ["honest"], "forgery {n}");
    }
    // A mapper that starts now does not believe it either.
    assert_eq!(names(&stage.state("third").await).await, ["honest"]);
}

#[tokio::test]
async fn n14_nobody_is_found_for_what_he_did_not_register() {
    let stage = Stage::new();
    let (one, other, _) = honest(&stage).await;
    for set in ["{nanite}:s:/root/shell", "{nanite}:t:admin"] {
        stage.redis.run::<i64>(&["SADD", set, "nanite-honest", "nanite-nobody", "mapper-one", "rubbish", ""]);
    }
    for state in [&one, &other] {
        assert!(found(state, "/root/shell", &[]).await.is_empty());
        assert!(found(state, "/root/shell", &["admin"]).await.is_empty());
        assert!(found(state, "/a/b", &["admin"]).await.is_empty());
        assert!(refused(state, RedisRefusal::Listing) > 0);
        assert_eq!(found(state, "/a/b", &["eu"]).await, ["honest"]);
    }
}

#[tokio::test]
async fn n14_who_was_heard_is_not_hidden() {
    let stage = Stage::new();
    let (one, other, _) = honest(&stage).await;
    let mut to = stage.redis.connect();
    for _ in 0..20 {
        stage.redis.run::<i64>(&["SREM", "{nanite}:s:/a/b", "nanite-honest"]);
        assert_eq!(found(&one, "/a/b", &["eu"]).await, ["honest"]);
    }
    // Honest loss is repaired: the other, which heard nobody, finds it again.
    redis::cmd("DEL").arg("{nanite}:s:/a/b").exec(&mut to).unwrap();
    wait_until("the other finds it", async || found(&other, "/a/b", &["eu"]).await == ["honest"]).await;
}

#[tokio::test]
async fn n14_a_registration_that_was_replaced_is_not_brought_back() {
    let stage = Stage::new();
    let (one, other, old) = honest(&stage).await;
    let later = stage.registration(&stage.speaker("honest", 1), &["/c/d"], &[]);
    one.register(later.clone()).await.unwrap();
    wait_until("the other knows the later one", async || found(&other, "/c/d", &[]).await == ["honest"]).await;
    plant(&stage.redis, "honest", &"f".repeat(32), &value(old.proof.as_ref().unwrap(), stage.now()), None, "/a/b");
    stage.redis.run::<i64>(&["SADD", "{nanite}:t:eu", "nanite-honest"]);
    for state in [&one, &other] {
        for _ in 0..5 {
            assert!(found(state, "/a/b", &["eu"]).await.is_empty());
            assert_eq!(state.agents().await.unwrap()[0].services, later.services);
        }
    }
}

#[tokio::test]
async fn n14_a_dead_agent_is_kept_alive_for_the_lifetime_of_its_last_message_at_most() {
    let stage = Stage::new();
    let (one, other, record) = honest(&stage).await;
    let fred = stage.speaker("fred", 0);
    let registered = stage.registration(&fred, &["/a/b"], &[]);
    one.register(registered.clone()).await.unwrap();
    let last = stage.heartbeat(&fred, 7.0);
    assert!(last.give(&one).await);
    let never = Timestamp::from_micros(u64::MAX);
    let proof = record.proof.clone().unwrap();
    let lie = || plant(&stage.redis, "honest", &version(&record), &value(&proof, never), None, "/a/b");
    let reaped = async |state: &RedisState| {
        let gone = state.reap(stage.now().saturating_sub(AGENT_TIMEOUT)).await.unwrap();
        gone.iter().map(|record| record.identity.name().to_owned()).collect::<Vec<_>>()
    };
    // Redis says that both were heard just now, at any time.
    stage.clock.set(at(59));
    plant_beat(&stage, "fred", &last.value(never));
    lie();
    let third = stage.state("third").await;
    assert!(!names(&third).await.is_empty(), "a message is valid for a minute: until then it may have been heard");
    stage.clock.set(at(61).saturating_add(AGENT_TIMEOUT));
    for state in [&one, &other, &third] {
        plant_beat(&stage, "fred", &last.value(never));
        lie();
        let _ = reaped(state).await;
        assert!(names(state).await.is_empty());
    }
    // They are gone from Redis; it brings them back, and gives them to a mapper that knows nobody.
    wait_until("they are removed", async || stage.redis.run::<i64>(&["HLEN", "{nanite}:r"]) == 0).await;
    let fred = value(registered.proof.as_ref().unwrap(), never);
    plant(&stage.redis, "fred", &version(&registered), &fred, Some(&last.value(never)), "/a/b");
    lie();
    let fourth = stage.state("fourth").await;
    assert!(names(&fourth).await.is_empty() && found(&fourth, "/a/b", &[]).await.is_empty());
    for state in [&one, &other, &third] {
        assert!(names(state).await.is_empty() && found(state, "/a/b", &[]).await.is_empty());
    }
    assert_eq!(stage.redis.run::<i64>(&["HLEN", "{nanite}:r"]), 2, "they were there to be read");
}

fn plant_beat(stage: &Stage, name: &str, beat: &[u8]) {
    redis::cmd("HSET").arg("{nanite}:b").arg(field(name)).arg(beat).exec(&mut stage.redis.connect()).unwrap();
}

#[tokio::test]
async fn n14_a_heartbeat_counts_for_whose_it_is_only() {
    let stage = Stage::new();
    let (one, other, _) = honest(&stage).await;
    let fred = stage.speaker("fred", 0);
    one.register(stage.registration(&fred, &["/a/b"], &[])).await.unwrap();
    wait_until("the other knows fred", async || names(&other).await == ["fred", "honest"]).await;
    stage.clock.set(at(20));
    let others = stage.heartbeat(&stage.speaker("bob", 0), -1.0);
    let earlier = stage.heartbeat(&stage.speaker("fred", 0), -1.0);
    assert!(earlier.version() <= stage.heartbeat(&fred, 0.0).version());
    for beat in [others.value(stage.now()), b"short".to_vec(), [&b"f".repeat(32)[..], b"rubbish"].concat()] {
        plant_beat(&stage, "fred", &beat);
        let revision: i64 = stage.redis.run(&["INCR", "{nanite}:n"]);
        stage.redis.run::<i64>(&["ZADD", "{nanite}:l", &revision.to_string(), "nanite-fred"]);
        let _ = other.agents().await.unwrap();
        let fred = other.agents().await.unwrap().into_iter().find(|record| record.identity == agent("fred")).unwrap();
        assert_eq!(fred.status.load(), Some(1.0), "its own words");
        assert_eq!(fred.last_seen, at(0));
    }
    assert!(refused(&other, RedisRefusal::NotProven) > 0 && refused(&other, RedisRefusal::Malformed) > 0);
}

#[tokio::test]
async fn n14_rubbish_is_refused_counted_and_harms_nobody() {
    let stage = Stage::new();
    let (_one, other, record) = honest(&stage).await;
    let good = value(record.proof.as_ref().unwrap(), stage.now());
    let long = vec![1; 300 * 1024];
    for (what, bytes, refusal) in [
        ("nothing", &[][..], RedisRefusal::Malformed),
        ("cut", &good[..good.len() - 1], RedisRefusal::Malformed),
        ("another form", b"\x03 rubbish", RedisRefusal::Malformed),
        ("another program's", b"{\"some\": \"json\"}", RedisRefusal::Malformed),
        ("too long", &long, RedisRefusal::TooLarge),
    ] {
        plant(&stage.redis, "eve", &"0".repeat(32), bytes, None, "/a/b");
        refuses(&other, refusal, what).await;
    }
    // Names that are no agents', among the agents.
    for name in ["", "rubbish", "mapper-one", "nanite-a/b", "nanite-\n"] {
        let revision: i64 = stage.redis.run(&["INCR", "{nanite}:n"]);
        stage.redis.run::<i64>(&["ZADD", "{nanite}:l", &revision.to_string(), name]);
    }
    refuses(&other, RedisRefusal::Malformed, "names that are no agents'").await;
    // Versions that are none: they are repaired by those who know better.
    stage.redis.run::<i64>(&["HSET", "{nanite}:v", "nanite-honest", "zzzz"]);
    assert_eq!(found(&other, "/a/b", &["eu"]).await, ["honest"]);
}

#[tokio::test]
async fn n14_keys_of_another_type_are_left_alone() {
    let stage = Stage::new();
    let (one, other, _) = honest(&stage).await;
    let mut to = stage.redis.connect();
    // The set of a service is a text: whoever knows somebody goes on with what it knows.
    redis::cmd("SET").arg("{nanite}:s:/a/b").arg("somebody's").exec(&mut to).unwrap();
    for state in [&one, &other] {
        assert_eq!(found(state, "/a/b", &["eu"]).await, ["honest"]);
        assert!(refused(state, RedisRefusal::WrongType) > 0);
        assert!(state.is_present());
    }
    let fred = stage.registration(&stage.speaker("fred", 0), &["/a/b", "/c/d"], &[]);
    one.register(fred).await.unwrap();
    wait_until("what can be listed is", async || found(&other, "/c/d", &[]).await == ["fred"]).await;
    assert_eq!(stage.redis.run::<String>(&["GET", "{nanite}:s:/a/b"]), "somebody's");
    // The list of agents is a text: Redis is of no use then, and both say so.
    redis::cmd("SET").arg("{nanite}:l").arg("somebody's").exec(&mut to).unwrap();
    wait_until("both go on alone", async || !one.is_present() && !other.is_present()).await;
    assert_eq!(found(&one, "/c/d", &[]).await, ["fred"]);
    assert_eq!(stage.redis.run::<String>(&["GET", "{nanite}:l"]), "somebody's");
    redis::cmd("DEL").arg("{nanite}:l").exec(&mut to).unwrap();
    wait_until("it is of use again", async || one.is_present() && other.is_present()).await;
    for state in [&one, &other] {
        wait_until("what was lost with it is written again", async || found(state, "/c/d", &[]).await == ["fred"])
            .await;
    }
}

#[tokio::test]
async fn n14_an_answer_without_end_ends_the_connection() {
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
    let serializer: Arc<dyn Serializer> = Arc::new(pki.serializer(&mapper("one")));
    let options = RedisOptions::new(serializer).timeout(Duration::from_secs(60));
    let error = RedisState::connect(&format!("unix://{}", path.display()), options).await.unwrap_err();
    assert!(error.to_string().contains("longer than accepted"), "{error}");
    assert!(sent.load(std::sync::atomic::Ordering::SeqCst) < 80 * 1024 * 1024);
}

/// Lets nobody offer this service.
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
async fn n14_a_mapper_reads_no_one_whom_its_own_policy_denies() {
    let stage = Stage::new();
    let one = stage.state("one").await;
    one.register(stage.registration(&stage.speaker("fred", 0), &["/a/b", "/root/shell"], &[])).await.unwrap();
    one.register(stage.registration(&stage.speaker("bob", 0), &["/a/b"], &[])).await.unwrap();
    let serializer: Arc<dyn Serializer> = Arc::new(stage.pki.serializer(&mapper("strict")));
    let strict = RedisState::connect(&stage.redis.url(), options(serializer)).await.unwrap();
    let context = StateContext::new(Arc::new(Forbid("/root/shell")), stage.clock.clone(), AGENT_TIMEOUT);
    strict.start(context).await.unwrap();
    wait_until("it knows whom it may", async || names(&strict).await == ["bob"]).await;
    assert!(found(&strict, "/root/shell", &[]).await.is_empty());
    assert_eq!(found(&strict, "/a/b", &[]).await, ["bob"]);
    assert!(refused(&strict, RedisRefusal::Denied) > 0);
}

#[tokio::test]
async fn n14_no_name_reaches_another_key_and_no_prefix_another_prefix() {
    let stage = Stage::new();
    stage.redis.run::<redis::Value>(&["SET", "nanite", "another's"]);
    stage.redis.run::<redis::Value>(&["SET", "{a}:s:/x/y", "another's"]);
    let one = stage.state("one").await;
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
    one.register(stage.registration(&stage.speaker("fred", 0), &services, &tags)).await.unwrap();
    one.register(stage.registration(&stage.speaker("l", 0), &["/a/b"], &["eu"])).await.unwrap();
    let other = stage.state("other").await;
    wait_until("the other knows both", async || names(&other).await == ["fred", "l"]).await;
    assert_eq!(found(&other, "/a/b", &tags).await, ["fred"]);
    for tag in &tags {
        assert_eq!(found(&other, "/a/b", &[tag]).await, ["fred"], "{tag:?}");
    }
    assert_eq!(found(&other, "/a/b", &["eu"]).await, ["l"]);
    let mut keys: Vec<String> = stage.redis.run(&["KEYS", "*"]);
    keys.retain(|key| key != "nanite" && key != "{a}:s:/x/y");
    let expected: std::collections::BTreeSet<String> = (["e", "n", "l", "v", "r", "m"].map(str::to_owned).into_iter())
        .chain(services.map(|service| format!("s:{service}")))
        .chain(tags.iter().chain(&["eu"]).map(|tag| format!("t:{tag}")))
        .map(|name| format!("{{nanite}}:{name}"))
        .collect();
    assert_eq!(keys.into_iter().collect::<std::collections::BTreeSet<_>>(), expected);
    assert!(nothing_refused(&one) && nothing_refused(&other));

    // Mappers of other prefixes share nothing, whatever their prefixes are.
    for prefix in ["a", "nanit", "nanite-", "nanite2"] {
        let serializer: Arc<dyn Serializer> = Arc::new(stage.pki.serializer(&mapper("apart")));
        let apart = RedisState::connect(&stage.redis.url(), options(serializer).prefix(prefix)).await.unwrap();
        apart.start(stage.context()).await.unwrap();
        assert!(names(&apart).await.is_empty(), "{prefix}");
        assert!(found(&apart, "/a/b", &[]).await.is_empty());
    }
    one.remove(&agent("fred"), None).await.unwrap();
    wait_until("what is fred's is gone", async || {
        stage.redis.run::<Vec<String>>(&["KEYS", "{nanite}:t:*"]) == ["{nanite}:t:eu"]
    })
    .await;
    assert_eq!(stage.redis.run::<String>(&["GET", "nanite"]), "another's");
    assert_eq!(stage.redis.run::<String>(&["GET", "{a}:s:/x/y"]), "another's");
}

#[tokio::test]
async fn n14_what_nothing_proves_is_believed_only_by_those_who_asked_for_it() {
    let redis = RedisServer::start();
    let stage = Stage { redis, ..Stage::new() };
    let plain: Arc<dyn Serializer> = Arc::new(PlainSerializer::json(Identity::mapper("m1").unwrap()));
    let careless = options(plain).dangerous().accept_unsigned();
    let careless = RedisState::connect(&stage.redis.url(), careless).await.unwrap();
    careless.start(StateContext::new(Arc::new(AllowVerified), stage.clock.clone(), AGENT_TIMEOUT)).await.unwrap();
    let mut record = stage.registration(&stage.speaker("fred", 0), &["/a/b"], &[]);
    record.proof = None;
    careless.register(record).await.unwrap();
    wait_until("it is written", async || stage.redis.run::<i64>(&["HLEN", "{nanite}:r"]) == 1).await;
    let careful = stage.state("careful").await;
    wait_until("it is refused", async || refused(&careful, RedisRefusal::NotProven) > 0).await;
    assert!(names(&careful).await.is_empty() && found(&careful, "/a/b", &[]).await.is_empty());
}
