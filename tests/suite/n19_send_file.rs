//! File broadcast by the program, as real processes with a real broker.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::WAIT_TIMEOUT;
use crate::harness::program::{Running, run};
use crate::harness::site::{Site, assert_fails_in_time, wait_until};

/// The peak memory of a process, in KiB: less than the file that it sends or receives.
const MAX_PEAK_MEMORY_KIB: u64 = 64 * 1024;

/// A file of random bytes.
fn random_file(path: &Path, mebibytes: usize) {
    let mut file = File::create(path).unwrap();
    let mut bytes = vec![0; 1 << 20];
    for _ in 0..mebibytes {
        openssl::rand::rand_bytes(&mut bytes).unwrap();
        file.write_all(&bytes).unwrap();
    }
}

/// An agent that receives files of `photos` in the directory of its name.
fn receiver(site: &Site, name: &str, options: &[&str]) -> Running {
    fs::create_dir_all(site.path(name)).unwrap();
    let all = ["agent", "--token", name, "--files-dir", name, "--files-domain", "photos"].into_iter();
    site.start(&all.chain(options.iter().copied()).collect::<Vec<_>>())
}

fn send<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    ["send-file", "--domain", "photos", "--look", "60s"].into_iter().chain(arguments.iter().copied()).collect()
}

/// The peak memory of a process so far, in KiB; none when it has ended.
fn peak_memory(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// The sums that `sha256sum` prints for files.
fn sha256sum(files: &[PathBuf]) -> Vec<String> {
    let output = Command::new("sha256sum").args(files).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn n19_sends_100_mib_to_two_agents_in_constant_memory() {
    let site = Site::new(&["agent a", "agent b", "agent c", "mapper ctl"]);
    let (mut a, b) = (receiver(&site, "a", &[]), receiver(&site, "b", &[]));
    let _without = site.start(&["agent", "--token", "c"]);
    random_file(&site.path("big.bin"), 100);
    let sender = Running::start(&mut site.nanite(send(&["big.bin", "--at-least", "2"])));
    let mut senders_most = 0;
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while let Some(most) = peak_memory(sender.id()) {
        assert!(Instant::now() < deadline, "it did not end: {:?}", sender.output());
        senders_most = most;
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = sender.wait();
    assert_eq!((sent.code(), sent.out.as_str()), (0, "nanite-a\nnanite-b\n"), "{}", sent.err);
    assert!(sent.err.contains("2 agents have it, 0 without it (100.0 MiB, "), "{}", sent.err);
    let sums = sha256sum(&[site.path("big.bin"), site.path("a/big.bin"), site.path("b/big.bin")]);
    assert!(sums[0] == sums[1] && sums[0] == sums[2], "{sums:?}");
    for (who, most) in
        [("sender", senders_most), ("agent a", peak_memory(a.id()).unwrap()), ("agent b", peak_memory(b.id()).unwrap())]
    {
        assert!(0 < most && most < MAX_PEAK_MEMORY_KIB, "{who}: {most} KiB");
        println!("{who}: at most {most} KiB");
    }
    a.wait_for("big.bin from mapper-ctl (100.0 MiB)");
    assert_eq!((names(&site.path("a")), names(&site.path("b"))), (vec!["big.bin".into()], vec!["big.bin".into()]));
}

#[test]
fn n19_receiver_that_dies_is_lost_and_keeps_no_partial_file() {
    let site = Site::new(&["agent a", "agent b", "mapper ctl"]);
    let (_a, b) = (receiver(&site, "a", &[]), receiver(&site, "b", &[]));
    random_file(&site.path("big.bin"), 40);
    let sender = Running::start(&mut site.nanite(send(&["big.bin", "--at-least", "2", "--json"])));
    let deadline = Instant::now() + WAIT_TIMEOUT;
    let part = loop {
        let part = fs::read_dir(site.path("b")).unwrap().flatten().find(|e| e.metadata().unwrap().len() > 1 << 20);
        if let Some(part) = part {
            break part.file_name().into_string().unwrap();
        }
        assert!(Instant::now() < deadline, "no part of it came: {:?}", sender.output());
        std::thread::sleep(Duration::from_millis(1));
    };
    // While it is stopped it receives nothing, so the sender waits for it; then it dies while nothing is sent to it.
    b.signal(Signal::SIGSTOP);
    wait_until("b is stopped", || {
        let status = fs::read_to_string(format!("/proc/{}/status", b.id())).unwrap();
        status.lines().any(|line| line.starts_with("State:\tT"))
    });
    // It has confirmed all chunks but the last four at least; the sender sends 16 more, and then waits.
    let chunks = |path: PathBuf| fs::metadata(path).map_or(0, |data| data.len() / (256 << 10));
    let sent = (chunks(site.path("b").join(&part)) / 4 * 4 + 12).min(160);
    wait_until("the sender waits for b", || {
        names(&site.path("a")).first().is_some_and(|name| chunks(site.path("a").join(name)) >= sent)
    });
    b.signal(Signal::SIGKILL);
    drop(b.wait());
    assert!(part.starts_with(".nanite-"), "{part}: it has its name only when it is whole");
    let sent = sender.wait();
    assert_eq!(sent.code(), 4, "{sent:?}");
    let answers: Value = serde_json::from_str(&sent.out).unwrap();
    assert_eq!(answers["results"], json!({"nanite-a": {"size": 40 << 20}}));
    assert_eq!(answers["failures"]["nanite-b"]["code"], "lost");
    assert!(sent.err.contains("nanite-b: ") && sent.err.contains("1 agent has it, 1 without it"), "{}", sent.err);
    assert_eq!(names(&site.path("a")), ["big.bin"]);
    let _b = receiver(&site, "b", &[]);
    assert!(names(&site.path("b")).is_empty(), "its next start removes what was left");
}

#[test]
fn n19_send_file_errors_and_exit_codes() {
    let site = Site::new(&["agent a", "mapper ctl"]);
    let a = receiver(&site, "a", &["--files-max", "1KiB"]);
    fs::write(site.path("small"), "hello").unwrap();
    fs::write(site.path("large"), vec![b'x'; 1025]).unwrap();
    let check = |arguments: &[&str], code: i32, parts: &[&str]| {
        let ended = site.run(&send(arguments));
        assert_eq!(ended.code(), code, "{ended:?}");
        for part in parts {
            assert!(ended.err.contains(part), "no {part:?} in {}", ended.err);
        }
        ended.out
    };
    check(&["small"], 0, &["1 agent has it, 0 without it (5 B, "]);
    check(&["small", "--dest", "other name"], 0, &[]);
    assert_eq!(fs::read(site.path("a/other name")).unwrap(), b"hello");
    check(&["large"], 5, &["nanite-a: denied: the file is larger than this agent allows"]);
    check(&["none"], 2, &["there is no file none"]);
    check(&["a"], 2, &["a is not a regular file", "tar"]);
    for name in ["../x", "/etc/x", "", ".hidden", "a/b"] {
        check(&["small", "--dest", name], 2, &["is not a plain file name", "--dest NAME"]);
    }
    assert_eq!(names(&site.path("a")), ["other name", "small"]);

    let other = |arguments: &[&str]| run(&mut site.nanite(arguments));
    let parts = ["no agent receives files of music", "available domains: photos"];
    let missing = ["send-file", "small", "--domain", "music", "--json"];
    let missing = assert_fails_in_time(&site, &missing, &["--look"], 3, &parts);
    assert_eq!(serde_json::from_str::<Value>(&missing.out).unwrap(), json!({"results": {}, "failures": {}}));
    let few = ["send-file", "small", "--domain", "photos", "--at-least", "2"];
    assert_fails_in_time(&site, &few, &["--look"], 3, &["files of photos are received by 1 agent, not 2"]);
    drop(a);
    for (arguments, parts) in [
        (&["--files-dir", "a"][..], ["`--files-dir` requires `--files-domain`", "--files-domain D"]),
        (
            &["--files-domain", "photos"],
            ["`--files-domain` requires `--files-dir`", "--files-dir DIR --files-domain photos"],
        ),
        (&["--files-dir", "none", "--files-domain", "x"], ["cannot receive files in none", "mkdir -p none"]),
        (&["--files-max", "1GB"], ["'1GB' is not a size", "100MiB"]),
    ] {
        let refused = other(&[&["agent", "--token", "a"], arguments].concat());
        assert_eq!(refused.code(), 2, "{refused:?}");
        assert!(parts.iter().all(|part| refused.err.contains(part)), "{}", refused.err);
    }
}

#[test]
fn n19_agent_without_permission_or_with_never_replace_keeps_its_file() {
    let site = Site::new(&["agent a", "agent b", "mapper ctl"]);
    site.write("deny.toml", "", 0o600);
    let mut a = receiver(&site, "a", &["--policy", "deny.toml", "--audit", "a.audit", "--log", "info"]);
    let _b = receiver(&site, "b", &["--files-never-replace"]);
    for name in ["a", "b"] {
        fs::write(site.path(name).join("report"), "old").unwrap();
    }
    fs::write(site.path("report"), "new").unwrap();
    fs::write(site.path("other"), "new").unwrap();
    let denied = site.run(&send(&["report", "--at-least", "2"]));
    assert_eq!((denied.code(), denied.out.as_str()), (5, ""), "{denied:?}");
    assert!(denied.err.contains("nanite-a: denied\n"), "{}", denied.err);
    assert!(denied.err.contains("nanite-b: denied: a file of this name exists"), "{}", denied.err);
    let other = site.run(&send(&["other", "--at-least", "2"]));
    assert_eq!(other.out, "nanite-b\n", "{other:?}");
    for name in ["a", "b"] {
        assert_eq!(fs::read_to_string(site.path(name).join("report")).unwrap(), "old");
    }
    assert_eq!(
        (names(&site.path("a")), names(&site.path("b"))),
        (vec!["report".into()], vec!["other".into(), "report".into()])
    );
    a.wait_for("file denied");
    let file = r#""file":{"domain":"photos","name":"report","size":3,"replaces":true}"#;
    wait_until("the denial is in the audit log", || {
        let log = fs::read_to_string(site.path("a.audit")).unwrap();
        log.lines().any(|line| line.contains(r#""verdict":"denied""#) && line.contains(file))
    });
}
