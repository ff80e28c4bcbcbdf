//! The exit codes of the program, and the remedies that its errors name, as users see them.

use std::collections::BTreeSet;
use std::sync::Arc;

use nanite::agent::{Agent, actor};
use nanite::certs::{CertificateDirectory, DirectoryCertificateStore};
use nanite::clock::{Clock, SystemClock};
use nanite::packet::{Failure, Identity, Payload};
use nanite::security::SecureSerializer;
use serde_json::{Value, json};

use crate::harness::broker::free_port;
use crate::harness::program::run;
use crate::harness::site::{
    Site, assert_fails, assert_fails_in_time, keys, ready, request, wait_for_agents, wait_until,
};
use crate::harness::system::DenyAll;

#[test]
fn u02_invalid_arguments_are_exit_code_2() {
    let site = Site::new(&["mapper ctl"]);
    for (arguments, part) in [
        (&["request"][..], "<SERVICE>"),
        (&["request", "no-service"], "a service is /PREFIX/METHOD"),
        (&["request", "/a/b", "--selector", "system"], "possible values: least_loaded, random, rr, all"),
        (&["request", "/a/b", "--timeout", "5"], "is not a duration"),
        (&["request", "/a/b", "--target", "a b"], "a name is"),
        (&["request", "/a/b", "--tag", ""], "a tag is"),
        (&["request", "/a/b", "--token", "a/b"], "'a/b' cannot be the name of a mapper"),
        (&["request", "/a/b", "--broker", "http://x"], "it must begin with amqp://"),
        (&["request", "/a/b", "--format", "yaml"], "--insecure-plaintext"),
        (&["agent", "--actors", "a"], "--actors-dir"),
        (&["agent", "--log", "=,="], "is not a log filter"),
        (&["ping", "all", "--count", "0"], "0 is not in 1..=1000000"),
        (&["frobnicate"], "unrecognized subcommand"),
    ] {
        assert_fails(&site.run(arguments), 2, &[part]);
    }
    let bytes = site.run_with_input(&["request", "/a/b", "-"], b"\xff\xfe");
    assert_fails(&bytes, 2, &["neither JSON nor text", "base64"]);
    let mut certs = site.unconfigured(["request", "/a/b"]);
    assert_fails(&run(&mut certs), 2, &["each node needs its own", "--certs DIR", "nanite certs issue mapper NAME"]);
}

#[test]
fn u02_not_offered_is_exit_code_3() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    site.program("simple/echo", "cat");
    let fred = site.agent("fred", &["--tag", "small"]);
    wait_for_agents(&site, &["nanite-fred"]);
    let refused = |arguments: &[&'static str], parts: &[&str]| {
        let all = [&["request"], arguments].concat();
        assert_fails_in_time(&site, &all, &["--look", "--timeout"], 3, parts)
    };
    refused(&["/simple/none"], &["error: no agent offers /simple/none\n", "available services: /simple/echo"]);
    refused(&["/simple/echo", "--tag", "big"], &["no agent offers /simple/echo with the tag big"]);
    refused(&["/simple/echo", "--target", "bob"], &["nanite-bob is not registered"]);
    refused(&["/simple/echo", "--at-least", "2"], &["1 agent offers it, not 2"]);
    let json = refused(&["/simple/none", "--json"], &["no agent offers"]);
    assert_eq!(serde_json::from_str::<Value>(&json.out).unwrap(), json!({"results": {}, "failures": {}}));
    drop(fred);
    wait_for_agents(&site, &[]);
    refused(&["/simple/echo"], &["no agent is registered"]);
}

#[test]
fn u02_timeout_and_partial_answers_are_exit_code_4() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    site.program("simple/hang", "sleep 1000");
    site.program("simple/fail", "echo it broke >&2; exit 3");
    // One of two fails: the one that makes the directory.
    site.program("simple/once", "mkdir first 2>/dev/null && exit 7; echo fine");
    let _agents = (site.agent("fred", &[]), site.agent("bob", &[]));
    wait_for_agents(&site, &["nanite-fred", "nanite-bob"]);

    let late = site.run(&["request", "/simple/hang", "--target", "fred", "--timeout", "2s", "--json"]);
    assert_fails(&late, 4, &["nanite-fred: timed_out: ", "0 answered, 1 missing", "--timeout"]);
    let json: Value = serde_json::from_str(&late.out).unwrap();
    assert_eq!(json["failures"]["nanite-fred"]["code"], "timed_out");
    assert_eq!(json["results"], json!({}));

    let failed = site.run(&request(&["/simple/fail", "--target", "bob"]));
    assert_fails(&failed, 1, &["nanite-bob: failed: ", "it broke", "0 answered, 1 failed, 0 missing"]);
    assert_eq!(failed.out, "");

    let half = site.run(&request(&["/simple/once", "--selector", "all", "--at-least", "2", "--json"]));
    assert_fails(&half, 4, &["1 answered, 1 failed, 0 missing"]);
    let half: Value = serde_json::from_str(&half.out).unwrap();
    assert_eq!((half["results"].as_object().unwrap().len(), half["failures"].as_object().unwrap().len()), (1, 1));
    assert_eq!(half["results"].as_object().unwrap().values().next().unwrap(), "fine");
    let failure = half["failures"].as_object().unwrap().values().next().unwrap();
    assert_eq!(keys(failure), BTreeSet::from(["code", "message"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn u02_denied_is_exit_code_5() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let now = SystemClock.now();
    let fred = Identity::agent("fred").unwrap();
    let directory = CertificateDirectory::new(site.path("certs"));
    let store = DirectoryCertificateStore::open(directory.path(), now).unwrap();
    let trust = store.trust().unwrap();
    let credentials = directory.credentials(&fred, None, now).unwrap();
    let serializer = SecureSerializer::builder(credentials, Arc::new(store), trust).build().unwrap();
    let transport = Arc::new(site.broker.connect().await);
    let echo = actor("simple").expose("echo", async |payload: Payload| Ok::<_, Failure>(payload));
    let _agent = Agent::builder(serializer, transport).actor(echo).policy(DenyAll).start().await.unwrap();
    let denied = tokio::task::block_in_place(|| site.run(&request(&["/simple/echo", "--json"])));
    assert_fails(&denied, 5, &["nanite-fred: denied\n", "0 answered, 1 failed, 0 missing"]);
    let json: Value = serde_json::from_str(&denied.out).unwrap();
    assert_eq!(json, json!({"results": {}, "failures": {"nanite-fred": {"code": "denied", "message": "Denied"}}}));
}

#[test]
fn u02_unusable_certificates_are_exit_code_6_with_remedy() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let expect = |parts: &[&str]| assert_fails(&site.run(&["request", "/simple/echo", "--look", "1s"]), 6, parts);

    let mut nowhere = site.nanite(["request", "/simple/echo", "--certs", "nowhere"]);
    assert_fails(&run(&mut nowhere), 6, &["there is no directory nowhere", "nanite certs init --dir nowhere"]);
    let unknown = site.run(&["agent", "--token", "bob"]);
    assert_fails(&unknown, 6, &["no certificate for nanite-bob", "nanite certs issue agent bob --dir certs"]);

    site.mode("certs/mapper-ctl-key.pem", 0o640);
    expect(&["mode 0640: users other than its owner can access it", "chmod 600 certs/mapper-ctl-key.pem"]);
    site.mode("certs/mapper-ctl-key.pem", 0o600);

    let keep = |name: &str| std::fs::read(site.path(name)).unwrap();
    let (certificate, key, ca) = (keep("certs/mapper-ctl.pem"), keep("certs/mapper-ctl-key.pem"), keep("certs/ca.pem"));
    std::fs::copy(site.path("certs/agent-fred-key.pem"), site.path("certs/mapper-ctl-key.pem")).unwrap();
    expect(&["is not the key of", "nanite certs issue mapper ctl"]);
    std::fs::write(site.path("certs/mapper-ctl-key.pem"), &key).unwrap();

    std::fs::write(site.path("certs/mapper-ctl.pem"), "rubbish").unwrap();
    expect(&["mapper-ctl.pem cannot be used", "nanite certs issue mapper ctl"]);
    std::fs::write(site.path("certs/mapper-ctl.pem"), &certificate).unwrap();

    site.ok(&["certs", "init", "--dir", "other"]);
    std::fs::copy(site.path("other/ca.pem"), site.path("certs/ca.pem")).unwrap();
    expect(&["it was not issued by a known CA", "add its CA to ca.pem"]);
    std::fs::remove_file(site.path("certs/ca.pem")).unwrap();
    expect(&["there is no CA certificate", "copy ca.pem"]);
    std::fs::write(site.path("certs/ca.pem"), &ca).unwrap();

    site.issue("mapper brief --valid-for 1s");
    let brief = || site.run(&["request", "/simple/echo", "--token", "brief", "--look", "1s"]);
    wait_until("the certificate has expired", || brief().err.contains("expired at"));
    assert_fails(&brief(), 6, &["certs/mapper-brief.pem expired at", "nanite certs issue mapper brief"]);

    // All were refused before a connection was made.
    assert_eq!(site.broker.connections(), Vec::<String>::new());
}

#[test]
fn u02_agent_of_other_ca_is_missing_and_refusals_are_reported() {
    let site = Site::new(&["mapper ctl"]);
    for command in ["init --dir other", "issue agent eve --dir other", "issue mapper ctl --dir other"] {
        let arguments: Vec<&str> = ["certs"].into_iter().chain(command.split(' ')).collect();
        site.ok(&arguments);
    }
    let mut eve = site.nanite(["agent", "--ping-time", "50ms", "--certs", "other"]);
    let _eve = ready(&mut eve);
    let request = ["request", "/agent/echo", "--target", "eve"];
    let parts = ["nanite-eve is not registered", "refused (UnknownSigner "];
    assert_fails_in_time(&site, &request, &["--timeout"], 3, &parts);
    assert_fails_in_time(&site, &["agents"], &["--look"], 0, &["no agents; ", "refused (UnknownSigner "]);
}

#[test]
fn u02_unreachable_broker_is_exit_code_7_without_password() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let port = free_port();
    let unreachable = format!("amqp://user:hidden-1@127.0.0.1:{port}/v");
    let user = site.broker.add_user("hidden-2");
    let right = site.broker.url_for(&user, "hidden-2");
    let wrong = site.broker.url_for(&user, "hidden-3");
    let (base, _) = right.rsplit_once('/').unwrap();
    let vhost = format!("{base}/no-such-vhost");
    for command in [&["request", "/a/b"][..], &["agent"], &["mapper"], &["agents"], &["ping", "all"], &["push", "/a/b"]]
    {
        for (url, parts) in [
            (
                &unreachable,
                &[&format!("amqp://user@127.0.0.1:{port}/v: "), "unreachable", "is RabbitMQ running there"][..],
            ),
            (&wrong, &["refused the user name or password", "NANITE_BROKER_PASSWORD"]),
            (&vhost, &["no-such-vhost", "rabbitmqctl add_vhost"]),
            (&right, &["rabbitmqctl set_permissions"]),
        ] {
            let ended = run(site.nanite(command).env("NANITE_BROKER", url));
            assert_fails(&ended, 7, parts);
            assert!(!format!("{ended:?}").contains("hidden"), "{ended:?}");
        }
    }
}
