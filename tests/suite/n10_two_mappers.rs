//! Proxied requests with two mappers: the mapper that takes a request may be unable to open it.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nanite::agent::{actor, reply};
use nanite::certs::{KeyType, StaticCertificateStore};
use nanite::clock::Clock;
use nanite::clock::SystemClock;
use nanite::mapper::Mapper;
use nanite::packet::{Failure, FailureCode};
use nanite::proxy::MapperProxy;
use nanite::request::RequestError;
use nanite::security::SecureSerializer;
use nanite::serializer::OpenErrorKind;
use nanite::transport::{MemoryBroker, topology};

use crate::harness::pki::{Pki, agent, mapper};
use crate::harness::program::run;
use crate::harness::site::{Site, ready, separate_directories};
use crate::harness::system::wait_until_known;
use crate::harness::wait_until;

/// How many requests each test makes.
const REQUESTS: usize = 20;

#[tokio::test]
async fn n10_request_sealed_to_another_mapper_is_left_to_it() {
    let (pki, broker) = (Pki::starting(KeyType::P256, SystemClock.now()), MemoryBroker::new());
    let serializer = |name: &nanite::packet::Identity| {
        let trust = pki.ca.trust().unwrap();
        Arc::new(SecureSerializer::builder(pki.credentials(name), pki.peers.clone(), trust).build().unwrap())
    };
    let (m1, fred, caller) = (mapper("m1"), agent("fred"), mapper("caller"));
    let start =
        async |name| Mapper::builder(serializer(&mapper(name)), Arc::new(broker.connect())).start().await.unwrap();
    let second = start("m2").await;
    let first = start("m1").await;
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let count = actor("count").expose("up", move |(): ()| {
        let n = counted.fetch_add(1, Ordering::SeqCst);
        async move { reply(n) }
    });
    let worker = nanite::agent::Agent::builder(serializer(&fred), Arc::new(broker.connect())).actor(count);
    let _worker = worker.start().await.unwrap();
    wait_until_known(&first, &["fred"]).await;
    wait_until_known(&second, &["fred"]).await;

    // The caller knows the agent and only one mapper. Both mappers take its requests from the same queue.
    let certificate = |name| pki.credentials(name).certificate().clone();
    let known = StaticCertificateStore::new([certificate(&m1), certificate(&caller), certificate(&fred)]);
    let trust = pki.ca.trust().unwrap();
    let own = SecureSerializer::builder(pki.credentials(&caller), Arc::new(known), trust).build().unwrap();
    let proxy = MapperProxy::builder(Arc::new(own), Arc::new(broker.connect())).start().await.unwrap();
    for n in 0..REQUESTS {
        let answers = proxy.request("/count/up", ()).await.unwrap();
        let outcome = answers.outcomes[&fred].clone().unwrap();
        assert_eq!(outcome.as_u64(), Some(n as u64), "each is handled once");
    }
    assert_eq!(calls.load(Ordering::SeqCst), REQUESTS);
    for (kind, count) in second.refusals() {
        assert!(count == 0 || kind == OpenErrorKind::CannotOpen, "{kind} {count}");
    }

    // A request that no mapper can open times out.
    drop(first);
    let unanswered = proxy.request("/count/up", ()).timeout(Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(unanswered, RequestError::Refused(Failure { code: FailureCode::TimedOut, .. })), "{unanswered:?}");
    wait_until("the queue is empty", async || broker.queued_messages(topology::REQUEST).is_empty()).await;
    assert_eq!(calls.load(Ordering::SeqCst), REQUESTS);
}

#[test]
fn n10_with_two_mappers_every_proxied_request_is_answered_once() {
    let site = Site::new(&["agent fred", "mapper m1", "mapper m2", "mapper caller"]);
    separate_directories(&site, &["agent-fred", "mapper-m1", "mapper-m2", "mapper-caller"]);
    let with_certs = |certs: &str, arguments: &[&str]| {
        let mut command = site.nanite(arguments);
        command.env("NANITE_CERTS", certs);
        command
    };
    site.program("count/up", &format!("echo up >> {}; cat", site.path("counted").display()));
    let _fred = ready(&mut with_certs("agent-fred", &["agent", "--actors-dir", "actors"]));
    let mut mappers =
        [ready(&mut with_certs("mapper-m1", &["mapper"])), ready(&mut with_certs("mapper-m2", &["mapper"]))];
    for mapper in &mut mappers {
        mapper.wait_for("nanite-fred registered");
    }
    for n in 0..REQUESTS {
        let payload = n.to_string();
        let ended = run(&mut with_certs(
            "mapper-caller",
            &["request", "/count/up", &payload, "--via-mapper", "--timeout", "60s"],
        ));
        assert_eq!((ended.code(), ended.out.as_str()), (0, format!("{n}\n").as_str()), "{ended:?} {mappers:?}");
    }
    assert_eq!(fs::read_to_string(site.path("counted")).unwrap().lines().count(), REQUESTS);
}
