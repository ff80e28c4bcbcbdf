//! The offline queue at a real broker, when the broker and the mappers are killed.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::harness::broker::Broker;
use crate::harness::program::Running;
use crate::harness::site::{Site, ready, separate_directories};
use crate::harness::wait_until;

/// An agent that appends its payloads to a file, one at a time.
fn writer(site: &Site, certs: &str) -> (Running, PathBuf) {
    let path = site.path("written");
    site.program("log/write", &format!("cat >> {0}; echo noted", path.display()));
    let arguments = ["agent", "--token", "fred", "--actors-dir", "actors", "--concurrency", "1"];
    let mut command = site.nanite(arguments);
    (ready(command.env("NANITE_CERTS", certs)), path)
}

fn written(path: &PathBuf) -> Vec<String> {
    fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// Pushes numbers to an agent that does not run, all from one process.
fn push(site: &Site, certs: &str, numbers: std::ops::Range<usize>) {
    let lines: String = numbers.map(|n| format!("push /log/write {n} --offline --look 10ms\n")).collect();
    fs::write(site.path("lines"), lines).unwrap();
    let mut command = site.nanite(["console", "--token", "caller"]);
    let lines = fs::File::open(site.path("lines")).unwrap();
    let ended = crate::harness::program::run(command.env("NANITE_CERTS", certs).stdin(lines));
    assert_eq!(ended.code(), 0, "{ended:?}");
}

/// The number of messages in the offline queue: ready, and held unacknowledged by a mapper.
fn offline(site: &Site) -> (u64, u64) {
    let queue = site.broker.queue("mapper-offline");
    let count = |name: &str| queue[name].as_u64().unwrap_or(0);
    (count("messages_ready"), count("messages_unacknowledged"))
}

#[tokio::test(flavor = "multi_thread")]
async fn n12_offline_messages_survive_kill_9_of_mapper_and_broker() {
    let mut site = Site::at(Broker::private(), &["agent fred", "mapper m1", "mapper m2", "mapper caller"]);
    let mapper = |site: &Site, name: &str| {
        site.start(&["mapper", "--token", name, "--offline-failsafe", "--offline-redelivery-frequency", "500ms"])
    };
    let first = mapper(&site, "m1");
    push(&site, "certs", 0..10);
    wait_until("a mapper holds all messages", async || offline(&site) == (0, 10)).await;
    let second = mapper(&site, "m2");
    first.signal(Signal::SIGKILL);
    drop(first);
    wait_until("the other mapper holds them", async || offline(&site) == (0, 10)).await;
    push(&site, "certs", 10..20);
    let arguments =
        ["request", "/log/write", "20", "--offline", "--look", "10ms", "--timeout", "600s", "--token", "caller"];
    let request = Running::start(&mut site.nanite(arguments));
    wait_until("it also holds the request", async || offline(&site) == (0, 21)).await;

    second.signal(Signal::SIGKILL);
    drop(second);
    wait_until("all messages are ready", async || offline(&site) == (21, 0)).await;
    site.broker.kill();
    site.broker.start();
    wait_until("all messages are ready at the new broker process", async || offline(&site) == (21, 0)).await;

    // Start both mappers again, then the agent.
    let _mappers = (mapper(&site, "m1"), mapper(&site, "m2"));
    wait_until("a mapper holds all messages", async || offline(&site) == (0, 21)).await;
    let (_fred, path) = writer(&site, "certs");
    let answer = request.wait();
    assert_eq!((answer.code(), answer.out.as_str()), (0, "noted\n"), "{answer:?}");
    wait_until("the queue is empty", async || offline(&site) == (0, 0)).await;
    let numbers: Vec<String> = (0..21).map(|n| n.to_string()).collect();
    assert_eq!(written(&path), numbers, "each once, in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn n12_offline_messages_sealed_to_another_mapper_are_left_to_it() {
    let site = Site::new(&["agent fred", "mapper m1", "mapper m2", "mapper caller"]);
    separate_directories(&site, &["agent-fred", "mapper-m1", "mapper-m2", "mapper-caller"]);
    let mapper = |name: &str| {
        let mut command = site.nanite(["mapper", "--offline-redelivery-frequency", "500ms"]);
        ready(command.env("NANITE_CERTS", format!("mapper-{name}")))
    };
    let first = mapper("m1");
    push(&site, "mapper-caller", 0..5);
    wait_until("the mapper holds them", async || offline(&site) == (0, 5)).await;
    first.signal(Signal::SIGKILL);
    drop(first);
    // This mapper cannot decrypt them, and does not know the sender.
    let mut second = mapper("m2");
    wait_until("the other mapper holds them", async || offline(&site) == (0, 5)).await;
    second.wait_for("returning offline messages that are sealed for other mappers");
    let (_fred, path) = writer(&site, "agent-fred");
    second.wait_for("nanite-fred registered");
    assert_eq!(written(&path), [""; 0]);
    let _first = mapper("m1");
    wait_until("they are delivered", async || written(&path).len() == 5 && offline(&site) == (0, 0)).await;
    assert_eq!(written(&path), ["0", "1", "2", "3", "4"]);
}
