//! A working directory for the program, with certificates that `nanite certs` made, and a virtual host.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::WAIT_TIMEOUT;
use super::broker::Broker;
use super::program::{Ended, Running, nanite, run};

/// A directory in which the program runs. Certificates are in its `certs`; the program's state directory is its `state`.
#[derive(Debug)]
pub struct Site {
    dir: tempfile::TempDir,
    pub broker: Broker,
}

impl Site {
    /// A new site with certificates for these nodes: `agent fred`, `mapper ctl`.
    pub fn new(nodes: &[&str]) -> Self {
        Self::at(Broker::shared(), nodes)
    }

    /// A new site at this broker.
    pub fn at(broker: Broker, nodes: &[&str]) -> Self {
        let site = Self { dir: tempfile::tempdir().unwrap(), broker };
        site.ok(&["certs", "init", "--dir", "certs"]);
        for node in nodes {
            site.issue(node);
        }
        site
    }

    /// Issues a certificate: `agent fred`, optionally with options.
    pub fn issue(&self, node: &str) {
        let arguments = ["certs", "issue", "--dir", "certs"].into_iter().chain(node.split(' '));
        self.ok(&arguments.collect::<Vec<_>>());
    }

    /// A path below the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file, and creates its directories.
    pub fn write(&self, name: &str, content: &str, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        self.mode(name, mode);
        path
    }

    pub fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Writes a program into `actors`, such as `simple/echo`, from lines of sh.
    pub fn program(&self, name: &str, lines: &str) {
        self.write(&format!("actors/{name}"), &format!("#!/bin/sh\n{lines}\n"), 0o755);
    }

    /// The program in this directory, without settings for certificates and broker.
    pub fn unconfigured<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = nanite(arguments);
        command.current_dir(self.dir.path()).env("HOME", self.dir.path()).env("XDG_STATE_HOME", self.path("state"));
        command
    }

    /// The program, with certificates and broker in its environment.
    pub fn nanite<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.unconfigured(arguments);
        command.env("NANITE_CERTS", "certs").env("NANITE_BROKER", self.broker.url());
        command
    }

    /// Runs the program until it ends.
    pub fn run(&self, arguments: &[&str]) -> Ended {
        run(&mut self.nanite(arguments))
    }

    /// Runs the program, which must succeed; returns its standard output.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code(), 0, "{arguments:?}: {ended:?}");
        ended.out
    }

    /// Runs the program, which must succeed; returns its standard output as JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let out = self.ok(arguments);
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {out}"))
    }

    /// Runs the program with this standard input.
    pub fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Ended {
        let path = self.path("stdin");
        fs::write(&path, input).unwrap();
        run(self.nanite(arguments).stdin(Stdio::from(fs::File::open(path).unwrap())))
    }

    /// Starts a node, and waits until it is ready.
    pub fn start(&self, arguments: &[&str]) -> Running {
        ready(&mut self.nanite(arguments))
    }

    /// Starts an agent with the programs in `actors`.
    pub fn agent(&self, name: &str, options: &[&str]) -> Running {
        let all = ["agent", "--token", name, "--actors-dir", "actors"].into_iter().chain(options.iter().copied());
        self.start(&all.collect::<Vec<_>>())
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// A directory with certificates, for commands that need no broker.
#[derive(Debug)]
pub struct Offline(tempfile::TempDir);

impl Offline {
    /// A new directory with certificates for these nodes in `certs`: `agent fred`, `mapper ctl`.
    pub fn new(nodes: &[&str]) -> Self {
        let site = Self(tempfile::tempdir().unwrap());
        site.ok(&["certs", "init", "--dir", "certs"]);
        for node in nodes {
            site.ok(&["certs", "issue", "--dir", "certs"].into_iter().chain(node.split(' ')).collect::<Vec<_>>());
        }
        site
    }

    /// A path below the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program in this directory, without settings for certificates.
    pub fn nanite<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = nanite(arguments);
        command.current_dir(self.0.path()).env("HOME", self.0.path());
        command
    }

    /// Runs the program, which must succeed; returns its standard output.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let ended = run(&mut self.nanite(arguments));
        assert_eq!(ended.code(), 0, "{arguments:?}: {ended:?}");
        ended.out
    }
}

/// Splits the `certs` of a site into one directory for each node, with its own certificate and key and the CA's certificate.
pub fn separate_directories(site: &Site, nodes: &[&str]) {
    let certs = site.path("certs");
    for node in nodes {
        let own = site.path(node);
        fs::create_dir(&own).unwrap();
        fs::copy(certs.join("ca.pem"), own.join("ca.pem")).unwrap();
        for file in [format!("{node}.pem"), format!("{node}-key.pem")] {
            fs::rename(certs.join(&file), own.join(&file)).unwrap();
        }
    }
}

/// Starts a node from a command, and waits until it is ready.
pub fn ready(command: &mut Command) -> Running {
    let mut running = Running::start(command);
    running.wait_for(" is ready: ");
    running
}

/// Timeouts for slow machines.
const LONG_TIMEOUTS: [&str; 4] = ["--look", "60s", "--timeout", "60s"];

/// `nanite request` with these arguments and long timeouts.
pub fn request<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    ["request"].into_iter().chain(arguments.iter().copied()).chain(LONG_TIMEOUTS).collect()
}

/// The keys of an object.
pub fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The exit code is `code`, and standard error contains these parts and no panic.
pub fn assert_fails(ended: &Ended, code: i32, parts: &[&str]) {
    assert_eq!(ended.code(), code, "{ended:?}");
    for part in parts {
        assert!(ended.err.contains(part), "no {part:?} in: {}", ended.err);
    }
    assert!(!ended.err.contains("panicked"), "{}", ended.err);
}

/// The program fails with this exit code and these parts, within a second for each of these options (`--look`, `--timeout`). If it does
/// not, it gets more time: on a busy machine agents register later than that.
pub fn assert_fails_in_time(site: &Site, arguments: &[&str], options: &[&str], code: i32, parts: &[&str]) -> Ended {
    let run = |limit| {
        site.run(&[arguments, &options.iter().flat_map(|option| [*option, limit]).collect::<Vec<_>>()].concat())
    };
    let is_expected = |ended: &Ended| ended.code() == code && parts.iter().all(|part| ended.err.contains(part));
    let ended = ["1s", "5s"].into_iter().map(run).find(is_expected).unwrap_or_else(|| run("60s"));
    assert_fails(&ended, code, parts);
    ended
}

/// Waits for a condition that another process fulfils.
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {WAIT_TIMEOUT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until exactly these agents are registered.
pub fn wait_for_agents(site: &Site, names: &[&str]) {
    wait_until(&format!("agents are {names:?}"), || {
        let count = names.len().max(1).to_string();
        let agents = run(&mut site.nanite(["agents", "--json", "--look", "1s", "--at-least", &count]));
        let agents: Value = serde_json::from_str(&agents.out).unwrap();
        keys(&agents["agents"]) == names.iter().copied().collect()
    });
}
