//! The program as users run it, as real processes with a real broker, with certificates that it made itself.

use std::collections::BTreeSet;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::program::{Running, run};
use crate::harness::site::{
    Site, assert_fails, assert_fails_in_time, keys, ready, request, wait_for_agents, wait_until,
};

/// Two agents: fred, and bob with the tags big and fast.
fn two_agents(site: &Site) -> (Running, Running) {
    site.program("simple/echo", "cat");
    site.program("simple/who", "echo $NANITE_CALLER");
    let agents = (site.agent("fred", &[]), site.agent("bob", &["--tag", "big", "--tag", "fast"]));
    wait_for_agents(site, &["nanite-fred", "nanite-bob"]);
    agents
}

#[test]
fn u02_requests_with_targets_selectors_tags_and_payloads() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    let _agents = two_agents(&site);

    let answer = site.run(&request(&["/simple/echo", r#"{"a":[1,"x"]}"#, "--target", "fred"]));
    assert_eq!((answer.code(), answer.out.as_str()), (0, "{\"a\":[1,\"x\"]}\n"));
    assert!(answer.err.contains("1 answered, 0 missing (nanite-fred, "), "{}", answer.err);
    let answer = site.ok(&request(&["/simple/echo", "just text", "--target", "nanite-bob"]));
    assert_eq!(answer, "just text\n");
    assert_eq!(site.ok(&request(&["/simple/who"])), "mapper-ctl\n");
    assert_eq!(site.ok(&request(&["/simple/echo"])), "null\n", "no payload");

    let all = site.run(&request(&["/simple/echo", "[1]", "--selector", "all", "--at-least", "2"]));
    assert_eq!((all.code(), all.out.as_str()), (0, "nanite-bob: [1]\nnanite-fred: [1]\n"));
    assert!(all.err.contains("2 answered, 0 missing"), "{}", all.err);
    let turn = || site.json(&request(&["/simple/echo", "--selector", "rr", "--at-least", "2", "--json"]));
    let turns: Vec<String> =
        (0..4).map(|_| turn()["results"].as_object().unwrap().keys().next().unwrap().clone()).collect();
    assert_eq!(
        turns,
        ["nanite-bob", "nanite-fred", "nanite-bob", "nanite-fred"],
        "round robin goes on from run to run"
    );
    for selector in ["least_loaded", "random"] {
        let one = site.json(&request(&["/simple/echo", "--selector", selector, "--json"]));
        assert_eq!(one["results"].as_object().unwrap().len(), 1);
    }
    let tagged = request(&["/simple/echo", "--selector", "all", "--tag", "big", "--tag", "fast", "--json"]);
    assert_eq!(site.json(&tagged), json!({"results": {"nanite-bob": null}, "failures": {}}));

    let piped =
        site.run_with_input(&request(&["/simple/echo", "-", "--json", "--target", "fred"]), b"{\"from\": \"stdin\"}\n");
    let answer: Value = serde_json::from_str(&piped.out).unwrap();
    assert_eq!(answer, json!({"results": {"nanite-fred": {"from": "stdin"}}, "failures": {}}));
    let broken = site.run(&request(&["/simple/echo", "{broken", "--target", "fred"]));
    assert_eq!((broken.code(), broken.out.as_str()), (0, "{broken\n"));
    assert!(broken.err.contains("the payload is not JSON"), "{}", broken.err);
    assert_eq!(site.run(&request(&["/simple/echo", "x", "--target", "fred", "-q"])).err, "", "-q: no notes");
}

#[test]
fn u02_killed_agent_gets_no_further_requests() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    let (fred, _bob) = two_agents(&site);
    fred.signal(Signal::SIGKILL);
    drop(fred.wait());
    for selector in ["all", "least_loaded", "rr", "random"] {
        let answers = site.json(&request(&["/simple/echo", "again", "--selector", selector, "--json"]));
        assert_eq!(answers, json!({"results": {"nanite-bob": "again"}, "failures": {}}), "{selector}");
    }
}

#[test]
fn u02_push_is_delivered_and_executed() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    site.program("file/keep", "cat > \"$1kept.$$\"");
    let _agents = (site.agent("fred", &[]), site.agent("bob", &[]));
    wait_for_agents(&site, &["nanite-fred", "nanite-bob"]);
    let pushed = site.run(&["push", "/file/keep", "work", "--selector", "all", "--at-least", "2", "--look", "60s"]);
    assert_eq!((pushed.code(), pushed.out.as_str()), (0, ""));
    assert!(pushed.err.contains("sent to nanite-bob, nanite-fred"), "{}", pushed.err);
    let kept = || {
        std::fs::read_dir(site.path("actors/file"))
            .unwrap()
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with("kept"))
            .count()
    };
    wait_until("both have run it", || kept() == 2);
    let sent = site.json(&["push", "/file/keep", "--target", "bob", "--json", "--look", "60s"]);
    assert_eq!(sent, json!({"sent": ["nanite-bob"]}));
    wait_until("bob has run it", || kept() == 3);
    let parts = ["no agent offers /file/lose", "available services: /file/keep"];
    let missing = assert_fails_in_time(&site, &["push", "/file/lose", "--json"], &["--look"], 3, &parts);
    assert_eq!(serde_json::from_str::<Value>(&missing.out).unwrap(), json!({"sent": []}));
}

#[test]
fn u02_agents_services_and_ping_list_running_agents() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    let _agents = two_agents(&site);
    let agents = site.json(&["agents", "--json", "--at-least", "2", "--look", "60s"]);
    assert_eq!(keys(&agents["agents"]), BTreeSet::from(["nanite-bob", "nanite-fred"]));
    let bob = &agents["agents"]["nanite-bob"];
    assert_eq!((&bob["services"], &bob["tags"]), (&json!(["/simple/echo", "/simple/who"]), &json!(["big", "fast"])));
    assert!(bob["status"].is_number());
    let services = site.json(&["services", "--json", "--at-least", "2", "--look", "60s"]);
    let both = json!(["nanite-bob", "nanite-fred"]);
    assert_eq!(services, json!({"services": {"/simple/echo": both, "/simple/who": both}}));

    let plain = site.ok(&["agents", "--at-least", "2", "--look", "60s"]);
    let lines: Vec<Vec<&str>> = plain.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["AGENT", "LOAD", "SERVICES", "TAGS"]);
    assert_eq!((lines[1][0], lines[1].last().unwrap()), ("nanite-bob", &"fast"));
    assert!(
        site.ok(&["services", "--at-least", "2", "--look", "60s"]).contains("/simple/who   nanite-bob, nanite-fred\n")
    );

    let pinged = site.json(&["ping", "all", "--at-least", "2", "--count", "2", "--json", "--timeout", "60s"]);
    assert_eq!(keys(&pinged["results"]), BTreeSet::from(["nanite-bob", "nanite-fred"]));
    assert_eq!(pinged["results"]["nanite-fred"]["ms"].as_array().unwrap().len(), 2);
    assert_eq!(pinged["failures"], json!({}));
    let one = site.ok(&["ping", "fred", "--timeout", "60s"]);
    assert!(one.starts_with("nanite-fred: ") && one.ends_with(" ms\n"), "{one}");
    assert_fails_in_time(&site, &["ping", "all", "--at-least", "3"], &["--timeout"], 4, &["2 answered, 0 missing"]);
    assert_eq!(site.run(&["agents", "--at-least", "3", "--look", "1s"]).code(), 4);
    assert_fails(&site.run(&["ping", "nobody", "--timeout", "1s"]), 3, &["nanite-nobody is not registered"]);

    let empty = Site::new(&["mapper ctl"]);
    let none = empty.run(&["agents", "--look", "1s"]);
    assert_eq!((none.code(), none.out.as_str(), none.err.as_str()), (0, "", "no agents\n"));
    assert_eq!(empty.json(&["agents", "--json", "--look", "1s"]), json!({"agents": {}}));
    assert_eq!(empty.json(&["services", "--json", "--look", "1s"]), json!({"services": {}}));
    assert_fails(&empty.run(&["ping", "all", "--timeout", "1s"]), 3, &["no agent is registered"]);
}

#[test]
fn u02_agent_without_programs_offers_echo_and_info() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let mut fred = site.start(&["agent"]);
    fred.wait_for("nanite-fred is ready: 2 services, broker amqp://guest@127.0.0.1:");
    fred.wait_for("certificate valid until 20");
    let info = site.json(&request(&["/agent/info", "--json"]));
    assert_eq!(info["results"]["nanite-fred"]["identity"], "nanite-fred");
    assert_eq!(info["results"]["nanite-fred"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(site.ok(&request(&["/agent/echo", "hello"])), "hello\n");
}

#[test]
fn u02_sealed_message_opens_only_for_its_recipient() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    let seal = ["seal", "/simple/echo", r#"{"x":1}"#, "--to", "fred"];
    let sealed = site.nanite(seal).stderr(Stdio::null()).output().unwrap();
    assert!(sealed.status.success());
    let message = sealed.stdout;
    assert_eq!(message[0], 0x30, "DER");

    let opened = site.run_with_input(&["open", "--token", "fred"], &message);
    assert_eq!(opened.code(), 0, "{opened:?}");
    let opened: Value = serde_json::from_str(&opened.out).unwrap();
    assert_eq!(opened["packet"]["json_class"], "Nanite::Request");
    let data = &opened["packet"]["data"];
    assert_eq!(
        (&data["type"], &data["payload"], &data["from"]),
        (&json!("/simple/echo"), &json!({"x": 1}), &json!("mapper-ctl"))
    );
    assert_eq!(opened["signer"]["identity"], "mapper-ctl");
    assert_eq!(opened["signer"]["class"], "live");

    let refused = |token: &str, bytes: &[u8], kind: &str| {
        let ended = site.run_with_input(&["open", "--token", token], bytes);
        assert_fails(&ended, 6, &[]);
        assert!(
            ended.err.starts_with(&format!("refused: {kind}: ")) && ended.err.lines().count() == 1,
            "{}",
            ended.err
        );
        assert_eq!(ended.out, "");
    };
    refused("bob", &message, "WrongDestination");
    refused("fred", &message[..message.len() - 1], "Malformed");
    refused("fred", &[&message[..], &[0]].concat(), "Malformed");
    refused("fred", b"", "Malformed");
    let mut forged = message.clone();
    *forged.last_mut().unwrap() ^= 1;
    refused("fred", &forged, "BadSignature");
    refused("fred", &vec![0x30; 17 * 1024 * 1024], "TooLarge");

    std::fs::remove_file(site.path("certs/mapper-ctl.pem")).unwrap();
    refused("fred", &message, "UnknownSigner");
    site.issue("mapper ctl --force");
    refused("fred", &message, "UnknownSigner");
    let unknown = site.run(&["seal", "/simple/echo", "--to", "nobody"]);
    assert_fails(&unknown, 6, &["no valid certificate for nanite-nobody", "directory of certificates"]);
    assert_eq!(unknown.out, "");
}

#[test]
fn u02_plaintext_needs_option_and_prints_warning() {
    for format in ["json", "msgpack", "yaml"] {
        let site = Site::new(&[]);
        let plain = ["--insecure-plaintext", "--format", format];
        let with = |arguments: &[&'static str]| {
            let mut command = site.unconfigured(arguments.iter().copied().chain(plain));
            command.env("NANITE_BROKER", site.broker.url());
            command
        };
        let mut agent = ready(&mut with(&["agent", "--token", "fred"]));
        agent.wait_for("WARNING: --insecure-plaintext: messages are neither signed nor encrypted");
        agent.wait_for("NOT SECURE");
        let answer = run(&mut with(&["request", "/agent/echo", "hi", "--look", "60s", "--timeout", "60s"]));
        assert_eq!((answer.code(), answer.out.as_str()), (0, "hi\n"), "{answer:?}");
        assert!(answer.err.contains("WARNING: --insecure-plaintext"), "{}", answer.err);
    }
}

#[test]
fn u02_mapper_logs_registrations() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    let mut mapper = site.start(&["mapper", "--agent-timeout", "1s"]);
    mapper.wait_for("mapper-ctl is ready: broker amqp://guest@127.0.0.1:");
    let fred = site.start(&["agent", "--token", "fred", "--tag", "big", "--ping-time", "100ms"]);
    mapper.wait_for("nanite-fred registered: 2 services, tags big");
    fred.signal(Signal::SIGTERM);
    let fred = fred.wait();
    assert_eq!(fred.code(), 0, "{fred:?}");
    assert!(fred.err.contains("nanite-fred has stopped"), "{}", fred.err);
    mapper.wait_for("nanite-fred unregistered");
    let bob = site.start(&["agent", "--token", "bob", "--ping-time", "100ms"]);
    mapper.wait_for("nanite-bob registered: 2 services");
    bob.signal(Signal::SIGKILL);
    drop(bob.wait());
    mapper.wait_for("nanite-bob timed out");
    mapper.signal(Signal::SIGINT);
    let mapper = mapper.wait();
    assert_eq!(mapper.code(), 0, "{mapper:?}");
    assert!(!mapper.err.contains("ERROR") && !mapper.err.contains("WARN"), "{}", mapper.err);
}

#[test]
fn u02_first_signal_drains_second_stops_at_once() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    site.program("job/wait", "echo $$ > pid; cat gate; echo done");
    site.program("job/hang", "echo $$ > pid; exec sleep 1000");
    let pid = site.path("actors/job/pid");
    let alive =
        || std::fs::read_to_string(&pid).ok().filter(|pid| pid.ends_with('\n')).map(|pid| pid.trim().to_owned());
    let gate = site.path("actors/job/gate");
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(std::fs::metadata(&gate).unwrap().file_type().is_fifo());

    let mut fred = site.agent("fred", &[]);
    wait_for_agents(&site, &["nanite-fred"]);
    let mut request_process = Running::start(&mut site.nanite(request(&["/job/wait"])));
    wait_until("the job runs", || alive().is_some());
    fred.signal(Signal::SIGTERM);
    fred.wait_for("stopping: running jobs are finished");
    wait_for_agents(&site, &[]);
    std::fs::write(&gate, "").unwrap();
    request_process.wait_for("done");
    let ended = request_process.wait();
    assert_eq!((ended.code(), ended.out.as_str()), (0, "done\n"), "{ended:?}");
    assert_eq!(fred.wait().code(), 0);

    std::fs::remove_file(&pid).unwrap();
    let mut fred = site.agent("fred", &[]);
    wait_for_agents(&site, &["nanite-fred"]);
    let _request = Running::start(&mut site.nanite(request(&["/job/hang"])));
    wait_until("the job runs", || alive().is_some());
    let job = alive().unwrap();
    fred.signal(Signal::SIGINT);
    fred.wait_for("a second signal stops at once");
    fred.signal(Signal::SIGTERM);
    let ended = fred.wait();
    assert_fails(&ended, 1, &["stopped at once"]);
    wait_until("its program is gone", || !Path::new("/proc").join(&job).exists());
}

#[test]
fn n08_follow_prints_intermediate_results() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    site.program("job/count", "for n in 1 2; do echo '{\"key\":\"k\",\"value\":'$n'}' >&3; done; cat gate; echo done");
    nix::unistd::mkfifo(&site.path("actors/job/gate"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _fred = site.agent("fred", &[]);
    wait_for_agents(&site, &["nanite-fred"]);
    let mut following = Running::start(&mut site.nanite(request(&["/job/count", "--follow"])));
    following.wait_for("nanite-fred k: 1\nnanite-fred k: 2\n");
    std::fs::write(site.path("actors/job/gate"), "").unwrap();
    let ended = following.wait();
    assert_eq!((ended.code(), ended.out.as_str()), (0, "nanite-fred k: 1\nnanite-fred k: 2\ndone\n"));

    let mut following = Running::start(&mut site.nanite(request(&["/job/count", "--follow", "--json"])));
    following.wait_for("\"value\":2");
    std::fs::write(site.path("actors/job/gate"), "").unwrap();
    let lines: Vec<Value> = following.wait().out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let part = |value: u8| json!({"from": "nanite-fred", "key": "k", "value": value});
    assert_eq!(lines, [part(1), part(2), json!({"results": {"nanite-fred": "done"}, "failures": {}})]);
}

#[test]
fn n10_request_via_mapper() {
    let site = Site::new(&["agent fred", "mapper ctl", "mapper prog"]);
    site.program("simple/who", "echo $NANITE_CALLER");
    site.program("simple/fail", "exit 1");
    let ask = |arguments: &[&str]| {
        let all = ["request", "--via-mapper", "--token", "prog", "--timeout", "60s"]
            .into_iter()
            .chain(arguments.iter().copied());
        site.run(&all.collect::<Vec<_>>())
    };
    assert_fails(&ask(&["/simple/who"]), 3, &["no mapper runs", "nanite mapper"]);
    let mut mapper = site.start(&["mapper", "--token", "ctl"]);
    let _fred = site.agent("fred", &[]);
    mapper.wait_for("nanite-fred registered");
    let answer = ask(&["/simple/who"]);
    assert_eq!((answer.code(), answer.out.as_str()), (0, "mapper-prog\n"), "{answer:?}");
    assert_fails(&ask(&["/simple/fail"]), 1, &["nanite-fred: failed"]);
    assert_fails(&ask(&["/simple/none"]), 3, &["no agent offers /simple/none"]);
    assert_fails(&ask(&["/simple/who", "--target", "bob"]), 3, &["nanite-bob"]);
}

#[test]
fn n12_offline_push_waits_for_agent() {
    let site = Site::new(&["agent fred", "mapper ctl", "mapper prog"]);
    site.program("file/keep", "cat > kept");
    let offer = |offline: &[&str]| {
        let all = ["push", "/file/keep", "later", "--token", "prog", "--look", "1s"].iter().chain(offline).copied();
        site.run(&all.collect::<Vec<_>>())
    };
    assert_fails(&offer(&[]), 3, &["no agent offers /file/keep"]);
    let waits = offer(&["--offline"]);
    assert_eq!(waits.code(), 0, "{waits:?}");
    assert!(waits.err.contains("it waits in the offline queue"), "{}", waits.err);
    let late = site.run(&["request", "/file/keep", "--token", "prog", "--offline", "--look", "1s", "--timeout", "2s"]);
    assert_fails(&late, 4, &["no answer", "--timeout"]);
    let _mapper = site.start(&["mapper", "--token", "ctl"]);
    let _fred = site.agent("fred", &[]);
    wait_until("fred has run what waited", || {
        std::fs::read_to_string(site.path("actors/file/kept"))
            .is_ok_and(|kept| kept == "\"later\"\n" || kept == "\"later\"")
    });
}

#[test]
fn u02_commands_leave_no_queues_behind() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let _fred = site.start(&["agent"]);
    site.ok(&request(&["/agent/echo"]));
    site.ok(&["agents"]);
    site.ok(&["ping", "fred", "--timeout", "60s"]);
    assert_eq!(site.run(&["request", "/agent/echo", "--via-mapper", "--timeout", "1s"]).code(), 3);
    let queues = || site.broker.api("GET", &format!("/api/queues/{}", site.broker.vhost()), &Value::Null).1;
    wait_until("no queue of a mapper is left", || {
        !queues().as_array().unwrap().iter().any(|queue| queue["name"].as_str().unwrap().starts_with("mapper-ctl"))
    });
}

#[test]
fn u02_manual_and_completions_cover_every_command() {
    let site = Site::new(&[]);
    site.ok(&["man", "man1"]);
    let page = |name: &str| std::fs::read_to_string(site.path("man1").join(name)).unwrap();
    assert!(page("nanite.1").contains("nanite\\-request(1)"));
    assert!(page("nanite-request.1").contains("\\-\\-selector"));
    assert!(page("nanite-certs-issue.1").contains("\\-\\-valid\\-for"));
    assert!(site.ok(&["man"]).starts_with(".ie"));
    for shell in ["bash", "zsh", "fish"] {
        let script = site.ok(&["completions", shell]);
        assert!(["insecure-plaintext", "least_loaded", "services"].iter().all(|word| script.contains(word)), "{shell}");
    }
    // A closed pipe is an error, without a panic.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let unread = site.unconfigured(["completions", "bash"]).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!((unread.status.code(), String::from_utf8(unread.stderr).unwrap().as_str()), (Some(1), ""));
}
