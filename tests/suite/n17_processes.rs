//! The processes of programs: within their limits, and ended with everything they started.

use std::fs;
use std::time::Duration;

use nanite::agent::ProgramLimits;
use nanite::packet::FailureCode;

use crate::harness::WAIT_TIMEOUT;
use crate::harness::programs::{Programs, TestSystem, failure, outcome, pid, wait_until_ended};
use crate::harness::system::System;

#[tokio::test]
async fn n17_output_beyond_the_limits_stops_the_program() {
    let programs = Programs::new(&[
        ("flood/stdout", "#!/bin/sh\necho \"{\\\"value\\\":$$}\" >&3\nexec yes\n"),
        ("flood/line", "#!/bin/sh\necho \"{\\\"value\\\":$$}\" >&3\nexec yes | tr -d '\\n' >&3\n"),
        ("flood/parts", "#!/bin/sh\necho \"{\\\"value\\\":$$}\" >&3\nexec yes '{\"value\":1}' >&3\n"),
        ("flood/rubbish", "#!/bin/sh\necho \"{\\\"value\\\":$$}\" >&3\nexec yes >&3\n"),
        ("flood/stderr", "#!/bin/sh\nyes | head -c 100000000 >&2\necho fine\n"),
    ]);
    let system = TestSystem::with(&programs).await;
    for (service, message) in [
        ("/flood/stdout", "the program wrote more than 8388608 bytes on its standard output"),
        ("/flood/line", "the program wrote a line of more than 1048576 bytes on descriptor 3"),
        (
            "/flood/rubbish",
            "the program wrote a line on descriptor 3 that is not {\"key\":..,\"value\":..}: \
             expected value at line 1 column 1",
        ),
    ] {
        let mut events = system.events(service, (), WAIT_TIMEOUT).await;
        let pid = pid(&mut events).await;
        assert_eq!(outcome(&mut events).await, failure(FailureCode::BadAnswer, message));
        wait_until_ended(pid).await;
    }
    let mut events = system.events("/flood/parts", (), Duration::from_secs(3)).await;
    let pid = pid(&mut events).await;
    assert_eq!(outcome(&mut events).await.unwrap_err().code, FailureCode::TimedOut);
    wait_until_ended(pid).await;
    assert_eq!(system.request("/flood/stderr", ()).await, Ok("fine".into()));
}

/// A shell, a child that ignores SIGTERM, and a grandchild; their process ids are intermediate results.
const PROCESS_TREE: &str = "#!/bin/sh
echo \"{\\\"value\\\":$$}\" >&3
sh -c 'trap \"\" TERM
    sleep 1000 & echo \"{\\\"value\\\":$!}\" >&3
    echo \"{\\\"value\\\":$$}\" >&3
    while :; do wait; sleep 1000; done' &
wait
";

#[tokio::test]
async fn n17_deadline_kills_the_program_and_its_descendants() {
    let programs = Programs::new(&[("hang/tree", PROCESS_TREE)]);
    let system = TestSystem::with(&programs).await;
    let mut events = system.events("/hang/tree", (), Duration::from_secs(5)).await;
    let pids = [pid(&mut events).await, pid(&mut events).await, pid(&mut events).await];
    assert_eq!(outcome(&mut events).await.unwrap_err().code, FailureCode::TimedOut);
    for pid in pids {
        wait_until_ended(pid).await;
    }
    assert_eq!(system.request("/test/alive", ()).await, Ok("yes".into()));
}

#[tokio::test]
async fn n17_timeout_kills_a_program_without_deadline() {
    let programs = Programs::new(&[
        ("hang/tree", PROCESS_TREE),
        ("hang/push", "#!/bin/sh\necho $$ > .pid.new\nmv .pid.new .pid\nsleep 1000\n"),
    ]);
    let limits = ProgramLimits::new().timeout(Duration::from_secs(2)).grace_period(Duration::ZERO);
    let system = TestSystem::new(System::plain(), programs.actors().limits(limits)).await;
    let mut events = system.events("/hang/tree", (), WAIT_TIMEOUT).await;
    let pids = [pid(&mut events).await, pid(&mut events).await, pid(&mut events).await];
    let ended = outcome(&mut events).await;
    assert_eq!(ended, failure(FailureCode::TimedOut, "the program exceeded its time limit"));
    for pid in pids {
        wait_until_ended(pid).await;
    }
    system.mapper.push("/hang/push", ()).await.unwrap();
    let written = async {
        loop {
            match fs::read_to_string(programs.path("hang/.pid")) {
                Ok(pid) => break pid.trim().parse().unwrap(),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    wait_until_ended(tokio::time::timeout(WAIT_TIMEOUT, written).await.unwrap()).await;
}

#[tokio::test]
async fn n17_stopped_agent_leaves_no_process_behind() {
    let programs = Programs::new(&[("hang/tree", PROCESS_TREE)]);
    let system = TestSystem::with(&programs).await;
    let mut events = system.events("/hang/tree", (), WAIT_TIMEOUT).await;
    let pids = [pid(&mut events).await, pid(&mut events).await, pid(&mut events).await];
    system.agent.stop().await.unwrap();
    for pid in pids {
        wait_until_ended(pid).await;
    }
}

#[tokio::test]
async fn n17_remaining_child_processes_are_killed() {
    let programs = Programs::new(&[
        ("left/child", "#!/bin/sh\nsleep 1000 &\necho $!\n"),
        // It leaves the group and keeps the pipes open: the result does not wait for it.
        ("left/session", "#!/bin/sh\nsetsid sleep 1000 &\necho $!\n"),
    ]);
    let system = TestSystem::with(&programs).await;
    wait_until_ended(system.request("/left/child", ()).await.unwrap().parse().unwrap()).await;
    let pid: i32 = system.request("/left/session", ()).await.unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}
