//! Connections to Redis: TLS with a private CA, and the options of the `nanite mapper` command.

use std::sync::Arc;
use std::time::Duration;

use nanite::clock::{Clock, SystemClock};
use nanite::mapper::{RedisError, RedisOptions, RedisState};
use nanite::serializer::Serializer;
use openssl::nid::Nid;

use crate::harness::broker::free_port;
use crate::harness::forge::{Forge, Forged};
use crate::harness::pki::mapper;
use crate::harness::program::{Running, run};
use crate::harness::redis::RedisServer;
use crate::harness::sharing::options;
use crate::harness::site::Site;
use crate::harness::system::System;

const DAY: Duration = Duration::from_secs(86_400);

fn now_valid(forge: Forge) -> Forge {
    let now = SystemClock.now();
    forge.valid(now.saturating_sub(DAY), now.saturating_add(DAY))
}

fn ca(name: &str) -> Forged {
    now_valid(Forge::ca(name)).self_signed()
}

/// A Redis server with a certificate from this CA for this name, and its port.
fn with_tls(ca: &Forged, name: &str) -> (RedisServer, u16) {
    let leaf = now_valid(Forge::leaf()).set(Nid::SUBJECT_ALT_NAME, name).signed_by(ca);
    let dir = tempfile::tempdir().unwrap();
    let write = |file: &str, pem: Vec<u8>| {
        let path = dir.path().join(file);
        std::fs::write(&path, pem).unwrap();
        path.display().to_string()
    };
    let cert = write("cert.pem", leaf.x509.to_pem().unwrap());
    let key = write("key.pem", leaf.key.private_key_to_pem_pkcs8().unwrap());
    let authority = write("ca.pem", ca.x509.to_pem().unwrap());
    let port = free_port();
    let tls_port = port.to_string();
    let server = RedisServer::with(&[
        "--port",
        "0",
        "--bind",
        "127.0.0.1",
        "--tls-port",
        &tls_port,
        "--tls-cert-file",
        &cert,
        "--tls-key-file",
        &key,
        "--tls-ca-cert-file",
        &authority,
        "--tls-auth-clients",
        "no",
    ]);
    (server, port)
}

#[tokio::test]
async fn n14_tls_requires_the_given_ca_and_the_right_name() {
    let system = System::secure();
    let serializer = system.serializer(&mapper("first"));
    let (own, second) = (ca("own"), ca("second"));
    let (_server, port) = with_tls(&own, "IP:127.0.0.1");
    let pem = |ca: &Forged| ca.x509.to_pem().unwrap();
    let connect = async |url: String, options: RedisOptions| RedisState::connect(&url, options).await;
    let url = format!("rediss://127.0.0.1:{port}");
    assert!(connect(url.clone(), options(serializer.clone()).ca_certificates(pem(&own))).await.is_ok());
    let refused = [
        connect(url.clone(), options(serializer.clone()).ca_certificates(pem(&second))).await,
        connect(format!("rediss://localhost:{port}"), options(serializer.clone()).ca_certificates(pem(&own))).await,
        connect(format!("redis://127.0.0.1:{port}"), options(serializer.clone())).await,
    ];
    for refused in refused {
        assert!(matches!(refused, Err(RedisError::Unreachable { .. })), "{refused:?}");
    }
    assert_eq!(connect(url.clone(), options(serializer.clone())).await.unwrap_err(), RedisError::MissingCa);
    let invalid = options(serializer).ca_certificates("no certificate");
    assert_eq!(connect(url, invalid).await.unwrap_err(), RedisError::InvalidCa);
}

#[test]
fn n14_mapper_command_shares_agents_in_redis() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let redis = RedisServer::with(&["--requirepass", "open sesame"]);
    let url = redis.url();
    let mut command = site.nanite(["mapper", "--token", "ctl", "--redis", &url, "--redis-prefix", "ours"]);
    let mut mapper = Running::start(command.env("NANITE_REDIS_PASSWORD", "open sesame"));
    mapper.wait_for("is ready");
    site.program("simple/echo", "cat");
    let mut agent = Running::start(&mut site.nanite(["agent", "--token", "fred", "--actors-dir", "actors"]));
    agent.wait_for("is ready");
    mapper.wait_for("registered");
    let mut to = redis::Client::open(url.as_str()).unwrap().get_connection_info().clone();
    to = to.clone().set_redis_settings(to.redis_settings().clone().set_password("open sesame"));
    let mut to = redis::Client::open(to).unwrap().get_connection().unwrap();
    let deadline = std::time::Instant::now() + crate::harness::WAIT_TIMEOUT;
    let listed = |to: &mut redis::Connection| -> Vec<String> {
        redis::cmd("SMEMBERS").arg("{ours}:s:/simple/echo").query(to).unwrap()
    };
    while listed(&mut to) != ["nanite-fred"] {
        assert!(std::time::Instant::now() < deadline, "fred is not listed");
        std::thread::sleep(Duration::from_millis(10));
    }
    let (out, err) = mapper.output();
    assert!(!format!("{out}{err}").contains("sesame"));
    drop((agent, mapper));

    // Errors at the start come with help, and without the password.
    let fails = |arguments: &[&str], code: i32, says: &str| {
        let ended = run(site
            .nanite(["mapper", "--token", "ctl"].iter().chain(arguments))
            .env("NANITE_REDIS_PASSWORD", "open barley"));
        assert_eq!(ended.code(), code, "{ended:?}");
        assert!(ended.err.contains(says) && ended.err.contains("help:"), "{says:?}: {}", ended.err);
        assert!(!ended.err.contains("barley"), "{}", ended.err);
    };
    fails(&["--redis", &url], 7, "assword");
    fails(&["--redis", "unix:///nowhere/at/all"], 7, "cannot use the Redis at unix:///nowhere/at/all");
    fails(&["--redis", "redis://user:secret@localhost"], 2, "command line");
    fails(&["--redis", "rediss://localhost"], 2, "CA");
}

#[tokio::test]
async fn n14_clones_share_one_state() {
    let (system, redis) = (System::secure(), RedisServer::start());
    let serializer: Arc<dyn Serializer> = system.serializer(&mapper("first"));
    let state = RedisState::connect(&redis.url(), options(serializer)).await.unwrap();
    assert!(!state.is_connected(), "the mapper has not started");
    let _mapper = system.mapper("first").state(state.clone()).start().await.unwrap();
    assert!(state.is_connected());
}
