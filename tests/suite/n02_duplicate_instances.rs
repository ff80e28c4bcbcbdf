//! Two processes of one name at the same time: the newest agent process wins; mapper processes work side by side.

use nanite::agent::{AgentError, actor, reply};
use nix::sys::signal::Signal;

use crate::harness::on_every_format;
use crate::harness::program::Running;
use crate::harness::site::Site;
use crate::harness::system::{System, json, start, wait_until_known};
use crate::harness::wait_until;

on_every_format!(n02_newest_process_replaces_the_older_one);

/// A site with an agent and a mapper. The programs in the directories `first` and `second` print the name of their directory.
fn site() -> Site {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    for which in ["first", "second"] {
        site.write(&format!("{which}/who/am"), &format!("#!/bin/sh\necho {which}\n"), 0o755);
    }
    site
}

fn fred(site: &Site, which: &str, options: &[&str]) -> Running {
    let all = ["agent", "--token", "fred", "--actors-dir", which, "--ping-time", "200ms"];
    site.start(&[&all[..], options].concat())
}

/// The process that answers: the same one for five requests.
fn answering_process(site: &Site) -> String {
    let request = || site.ok(&["request", "/who/am", "--look", "60s", "--timeout", "60s"]);
    let first = request();
    for _ in 0..4 {
        assert_eq!(request(), first, "one process answers everything");
    }
    first.trim_end().to_owned()
}

#[test]
fn n02_newest_agent_process_wins_and_both_are_told() {
    let site = site();
    let mut mapper = site.start(&["mapper"]);
    let first = fred(&site, "first", &[]);
    mapper.wait_for("nanite-fred registered");
    assert_eq!(answering_process(&site), "first");
    let mut second = fred(&site, "second", &[]);
    let ended = first.wait();
    assert_eq!(ended.code(), 8, "{ended:?}");
    assert!(ended.err.contains("replaced by a newer process of this agent, started "), "{}", ended.err);
    assert!(ended.err.contains("help: give each agent its own name and certificate"), "{}", ended.err);
    second.wait_for("this process has replaced an older process of nanite-fred that still runs");
    mapper.wait_for("two processes of nanite-fred were running");
    assert_eq!(answering_process(&site), "second");

    // A restart, even after SIGKILL, is not a duplicate.
    second.signal(Signal::SIGKILL);
    drop(second);
    let third = fred(&site, "first", &[]);
    assert_eq!(answering_process(&site), "first");
    let (_, said) = third.output();
    assert!(!said.contains("another"), "{said}");
    let (_, said) = mapper.output();
    assert_eq!(said.matches("two processes of").count(), 1, "{said}");
}

#[test]
fn n02_first_mapper_tells_agent_processes_that_already_run() {
    let site = site();
    let first = fred(&site, "first", &[]);
    let mut second = fred(&site, "second", &[]);
    let _mapper = site.start(&["mapper"]);
    let ended = first.wait();
    assert_eq!(ended.code(), 8, "{ended:?}");
    second.wait_for("this process has replaced an older process of nanite-fred that still runs");
    assert_eq!(answering_process(&site), "second");
}

#[test]
fn n02_give_way_exits_if_another_process_runs() {
    let site = site();
    let mut mapper = site.start(&["mapper"]);
    let mut first = fred(&site, "first", &["--give-way"]);
    mapper.wait_for("nanite-fred registered");
    let arguments = ["agent", "--token", "fred", "--actors-dir", "second", "--give-way"];
    let ended = site.run(&arguments);
    assert_eq!(ended.code(), 8, "{ended:?}");
    assert!(ended.err.contains("error: another process of this agent already runs, started "), "{}", ended.err);
    first.wait_for("a newer process of nanite-fred runs, started ");
    assert_eq!(answering_process(&site), "first");
    // After the first one has stopped, the second can start.
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait().code(), 0);
    let _second = site.start(&arguments);
    assert_eq!(answering_process(&site), "second");
}

async fn n02_newest_process_replaces_the_older_one(system: System) {
    let named = |name: &'static str| actor("who").expose("am", move |(): ()| async move { reply(name) });
    let mapper = system.started_mapper("m1").await;
    let first = start(system.agent("fred").actor(named("first"))).await;
    wait_until_known(&mapper, &["fred"]).await;
    let second = start(system.agent("fred").actor(named("second"))).await;
    let replaced = first.run_until(std::future::pending()).await;
    assert!(matches!(replaced, Err(AgentError::Replaced(_))), "{replaced:?}");
    wait_until("the second has registered", async || {
        let answers = mapper.request("/who/am", ()).await;
        answers.is_ok_and(|answers| answers.outcomes.values().all(|outcome| *outcome == Ok(json("\"second\""))))
    })
    .await;
    // It unregisters when it stops.
    second.stop().await.unwrap();
    wait_until_known(&mapper, &[]).await;
}

#[test]
fn n02_mappers_of_one_name_both_work_and_log_each_other() {
    let site = site();
    let mut first = site.start(&["mapper"]);
    let _fred = fred(&site, "first", &[]);
    first.wait_for("nanite-fred registered");
    let mut second = site.start(&["mapper"]);
    second.wait_for("nanite-fred registered");
    for mapper in [&mut first, &mut second] {
        mapper.wait_for("another process of mapper-ctl also takes requests");
    }
    // Short-lived mappers of commands use the same name and are not reported.
    for _ in 0..3 {
        assert_eq!(site.ok(&["request", "/who/am", "--via-mapper", "--timeout", "60s"]), "first\n");
    }
    first.signal(Signal::SIGKILL);
    drop(first);
    for _ in 0..3 {
        assert_eq!(site.ok(&["request", "/who/am", "--via-mapper", "--timeout", "60s"]), "first\n");
    }
    let (_, said) = second.output();
    assert_eq!(said.matches("also takes requests").count(), 1, "{said}");
}
