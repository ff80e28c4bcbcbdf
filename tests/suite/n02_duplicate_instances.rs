//! Two processes under one name at the same time: agents, of which one has the place, and mappers, which work beside each other.

use nanite::agent::{AgentError, actor, reply};
use nix::sys::signal::Signal;

use crate::harness::on_every_format;
use crate::harness::program::Running;
use crate::harness::site::Site;
use crate::harness::system::{System, json, knows, start};
use crate::harness::wait_until;

on_every_format!(n02_the_later_process_of_an_agent_has_the_place_of_the_earlier);

/// A site with an agent and a mapper, and programs that say in which directory they are.
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

/// Which of them answers; all of five requests have to be answered by the same.
fn who(site: &Site) -> String {
    let ask = || site.ok(&["request", "/who/am", "--look", "60s", "--timeout", "60s"]);
    let first = ask();
    for _ in 0..4 {
        assert_eq!(ask(), first, "one process has the place");
    }
    first.trim_end().to_owned()
}

#[test]
fn n02_of_two_agents_of_one_name_the_later_works_and_both_are_told() {
    let site = site();
    let mut mapper = site.start(&["mapper"]);
    let first = fred(&site, "first", &[]);
    mapper.wait_for("nanite-fred registered");
    assert_eq!(who(&site), "first");
    let mut second = fred(&site, "second", &[]);
    let ended = first.wait();
    assert_eq!(ended.code(), 8, "{ended:?}");
    assert!(ended.err.contains("replaced by a newer process of this agent, started "), "{}", ended.err);
    assert!(ended.err.contains("help: each agent has a name and a certificate of its own"), "{}", ended.err);
    second.wait_for("this process has replaced an older process of nanite-fred that still runs");
    mapper.wait_for("two processes run as nanite-fred");
    assert_eq!(who(&site), "second");

    // A process that is gone has no twin: a restart, however abrupt, is nothing to speak of.
    second.signal(Signal::SIGKILL);
    drop(second);
    let third = fred(&site, "first", &[]);
    assert_eq!(who(&site), "first");
    let (_, said) = third.said();
    assert!(!said.contains("another"), "{said}");
    let (_, said) = mapper.said();
    assert_eq!(said.matches("two processes run").count(), 1, "{said}");
}

#[test]
fn n02_two_agents_that_no_mapper_has_heard_are_told_by_the_first_that_comes() {
    let site = site();
    let first = fred(&site, "first", &[]);
    let mut second = fred(&site, "second", &[]);
    let _mapper = site.start(&["mapper"]);
    let ended = first.wait();
    assert_eq!(ended.code(), 8, "{ended:?}");
    second.wait_for("this process has replaced an older process of nanite-fred that still runs");
    assert_eq!(who(&site), "second");
}

#[test]
fn n02_an_agent_that_gives_way_ends_and_both_are_told() {
    let site = site();
    let mut mapper = site.start(&["mapper"]);
    let mut first = fred(&site, "first", &["--give-way"]);
    mapper.wait_for("nanite-fred registered");
    let arguments = ["agent", "--token", "fred", "--actors-dir", "second", "--give-way"];
    let ended = site.run(&arguments);
    assert_eq!(ended.code(), 8, "{ended:?}");
    assert!(ended.err.contains("error: another process of this agent already runs, started "), "{}", ended.err);
    first.wait_for("a newer process of nanite-fred runs, started ");
    assert_eq!(who(&site), "first");
    // When the first has gone there is nobody to give way to.
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait().code(), 0);
    let _second = site.start(&arguments);
    assert_eq!(who(&site), "second");
}

async fn n02_the_later_process_of_an_agent_has_the_place_of_the_earlier(system: System) {
    let named = |name: &'static str| actor("who").expose("am", move |(): ()| async move { reply(name) });
    let mapper = system.started_mapper("m1").await;
    let first = start(system.agent("fred").actor(named("first"))).await;
    knows(&mapper, &["fred"]).await;
    let second = start(system.agent("fred").actor(named("second"))).await;
    let replaced = first.run_until(std::future::pending()).await;
    assert!(matches!(replaced, Err(AgentError::Replaced(_))), "{replaced:?}");
    wait_until("the second has registered", async || {
        let answers = mapper.request("/who/am", ()).await;
        answers.is_ok_and(|answers| answers.outcomes.values().all(|outcome| *outcome == Ok(json("\"second\""))))
    })
    .await;
    // It goes in order, and nobody else with it.
    second.stop().await.unwrap();
    knows(&mapper, &[]).await;
}

#[test]
fn n02_mappers_of_one_name_work_beside_each_other_and_both_say_so() {
    let site = site();
    let mut first = site.start(&["mapper"]);
    let _fred = fred(&site, "first", &[]);
    first.wait_for("nanite-fred registered");
    let mut second = site.start(&["mapper"]);
    second.wait_for("nanite-fred registered");
    for mapper in [&mut first, &mut second] {
        mapper.wait_for("another process takes requests as mapper-ctl, too");
    }
    // Commands that are a mapper for a moment use the same name, and are no matter.
    for _ in 0..3 {
        assert_eq!(site.ok(&["request", "/who/am", "--via-mapper", "--timeout", "60s"]), "first\n");
    }
    first.signal(Signal::SIGKILL);
    drop(first);
    for _ in 0..3 {
        assert_eq!(site.ok(&["request", "/who/am", "--via-mapper", "--timeout", "60s"]), "first\n");
    }
    let (_, said) = second.said();
    assert_eq!(said.matches("another process takes requests").count(), 1, "{said}");
}
