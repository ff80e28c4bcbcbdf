//! Nodes in the background, with pid and log files, controlled by commands, and known to systemd.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};
use serde_json::{Value, json};

use crate::harness::WAIT_TIMEOUT;
use crate::harness::program::{Ended, Running, run};
use crate::harness::site::Site;

/// A node in the background, which is killed when this is dropped.
struct Daemon<'a> {
    site: &'a Site,
    role: &'static str,
    name: &'static str,
    pid: Pid,
}

impl<'a> Daemon<'a> {
    fn start(site: &'a Site, role: &'static str, name: &'static str, options: &[&str]) -> Self {
        let started = daemonize(site, role, name, options);
        assert_eq!(started.code(), 0, "{started:?}");
        assert!(started.err.contains(" is ready: "), "{}", started.err);
        let daemon = Self { site, role, name, pid: Pid::from_raw(0) };
        let pid = i32::try_from(daemon.status()["pid"].as_i64().unwrap()).unwrap();
        assert!(started.err.contains(&format!("in the background: pid {pid}")), "{}", started.err);
        Self { pid: Pid::from_raw(pid), ..daemon }
    }

    fn status(&self) -> Value {
        let ended = control(self.site, self.role, &["status", "--token", self.name, "--json"]);
        let status: Value = serde_json::from_str(&ended.out).unwrap();
        assert_eq!(ended.code() == 0, status["nodes"][0]["pid"].is_number(), "{ended:?}");
        status["nodes"][0].clone()
    }

    fn state(&self) -> String {
        self.status()["state"].as_str().unwrap().to_owned()
    }

    fn pid_file(&self) -> std::path::PathBuf {
        let prefix = if self.role == "agent" { "nanite" } else { "mapper" };
        self.site.path(&format!("run/{prefix}-{}.pid", self.name))
    }

    fn is_alive(&self) -> bool {
        // Without a parent that waits for it, an ended process stays as a zombie.
        fs::read_to_string(format!("/proc/{}/stat", self.pid)).is_ok_and(|stat| !stat.contains(") Z "))
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if self.pid.as_raw() > 0 && self.is_alive() {
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }
}

fn daemonize(site: &Site, role: &str, name: &str, options: &[&str]) -> Ended {
    let all = [role, "--token", name, "--daemonize", "--pid-dir", "run"].into_iter().chain(options.iter().copied());
    site.run(&all.collect::<Vec<_>>())
}

fn control(site: &Site, role: &str, arguments: &[&str]) -> Ended {
    site.run(&[&[role], arguments, &["--pid-dir", "run"]].concat())
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {WAIT_TIMEOUT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn request<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [&["request"], arguments, &["--look", "60s", "--timeout", "60s"]].concat()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A program that creates the file `began`, and ends when the file `go` exists.
fn slow_program(site: &Site) {
    let (began, go) = (site.path("began"), site.path("go"));
    let wait = format!("until [ -e {} ]; do sleep 0.02; done", go.display());
    site.program("slow/job", &format!("touch {}; {wait}; echo done", began.display()));
}

fn begin_slow_job(site: &Site) -> Running {
    let running = Running::start(&mut site.nanite(request(&["/slow/job"])));
    wait_until("the job runs", || site.path("began").exists());
    running
}

#[test]
fn n18_background_agent_is_ready_logs_and_stops() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    slow_program(&site);
    let options = ["--actors-dir", "actors", "--log-dir", "log"];
    let fred = Daemon::start(&site, "agent", "fred", &options);
    assert_eq!(getsid(Some(fred.pid)).unwrap(), fred.pid, "it has a session of its own");
    for stream in 0..3 {
        let target = fs::read_link(format!("/proc/{}/fd/{stream}", fred.pid)).unwrap();
        let expected = if stream == 2 { site.path("log/nanite-fred.log") } else { "/dev/null".into() };
        assert_eq!(target, expected.canonicalize().unwrap(), "{stream}");
    }
    let content = read(&fred.pid_file());
    assert_eq!(content.lines().next().unwrap(), fred.pid.to_string());
    assert_eq!(fred.status()["state"], "running");
    let table = control(&site, "agent", &["status"]).out;
    assert!(table.contains("NODE") && table.contains(&format!("nanite-fred  running  {}", fred.pid)), "{table}");

    let request = begin_slow_job(&site);
    kill(fred.pid, Signal::SIGUSR1).unwrap();
    let log = site.path("log/nanite-fred.log");
    wait_until("the running job is in the log", || read(&log).contains("running: /slow/job for mapper-ctl, since 20"));
    assert!(read(&log).contains("1 job running") && read(&log).contains("nanite-fred is ready"), "{}", read(&log));
    assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!read(&log).contains('\u{1b}'), "no colours in a file");

    let early = control(&site, "agent", &["stop", "--timeout", "100ms"]);
    assert_eq!(early.code(), 4, "{early:?}");
    assert!(early.err.contains("has not ended yet") && early.err.contains("--now"), "{}", early.err);
    assert_eq!(fred.state(), "stopping");
    let again = control(&site, "agent", &["stop", "--timeout", "100ms"]);
    assert_eq!(again.code(), 4, "a repeated stop is not the second signal, which stops at once");
    fs::write(site.path("go"), "").unwrap();
    let stopped = control(&site, "agent", &["stop"]);
    assert!(matches!(stopped.code(), 0 | 3), "{stopped:?}");
    let answer = request.wait();
    assert_eq!((answer.code(), answer.out.as_str()), (0, "done\n"), "the running job was finished");
    wait_until("it has ended", || !fred.is_alive());
    assert!(!fred.pid_file().exists());
    assert_eq!(control(&site, "agent", &["stop"]).code(), 3);
    assert_eq!(fred.state(), "stopped");
}

#[test]
fn n18_daemonize_reports_startup_errors() {
    let site = Site::new(&["agent fred"]);
    let refused = |name: &str, options: &[&str], code: i32, parts: &[&str]| {
        let ended = daemonize(&site, "agent", name, options);
        assert_eq!(ended.code(), code, "{ended:?}");
        for part in parts {
            assert!(ended.err.contains(part), "no {part:?} in {}", ended.err);
        }
    };
    refused("fred", &["--broker", "amqp://127.0.0.1:1"], 7, &["error: ", "is RabbitMQ running there?"]);
    refused("bob", &[], 6, &["nanite certs issue agent bob"]);
    refused("fred", &["--actors-dir", "none"], 2, &["error: "]);
    fs::write(site.path("file"), "").unwrap();
    refused("fred", &["--log-dir", "file"], 2, &["cannot log into file/nanite-fred.log"]);
    assert!(fs::read_dir(site.path("run")).unwrap().next().is_none(), "nothing is left");

    let fred = Daemon::start(&site, "agent", "fred", &[]);
    let runs = format!("nanite-fred is already running (pid {})", fred.pid);
    refused("fred", &[], 1, &[&runs, "nanite agent stop --token fred --pid-dir run"]);
    let foreground = run(&mut site.nanite(["agent", "--token", "fred", "--pid-dir", "run"]));
    assert_eq!(foreground.code(), 1);
    assert!(foreground.err.contains(&runs), "{}", foreground.err);
    assert_eq!(fred.state(), "running", "the first one is not disturbed");
    assert_eq!(control(&site, "agent", &["stop"]).code(), 0);
}

#[test]
fn n18_stale_pid_file_signals_no_other_process() {
    let site = Site::new(&["agent fred", "agent bob", "mapper ctl"]);
    let killed = Daemon::start(&site, "agent", "fred", &[]);
    kill(killed.pid, Signal::SIGKILL).unwrap();
    wait_until("it is dead", || !killed.is_alive());
    assert!(killed.pid_file().exists());
    assert_eq!(killed.status(), json!({"identity": "nanite-fred", "state": "stale", "pid": null, "since": null}));
    assert_eq!(control(&site, "agent", &["status"]).code(), 3);

    // As if its pid now belonged to another program.
    let bystander = Running::start(std::process::Command::new("sleep").arg("600"));
    let content = read(&killed.pid_file()).replacen(&killed.pid.to_string(), &bystander.id().to_string(), 1);
    fs::write(killed.pid_file(), &content).unwrap();
    let stopped = control(&site, "agent", &["stop"]);
    assert_eq!(stopped.code(), 3, "{stopped:?}");
    assert!(stopped.err.contains("ended without removing its pid file"), "{}", stopped.err);
    assert!(!killed.pid_file().exists());
    fs::write(killed.pid_file(), &content).unwrap();
    let fred = Daemon::start(&site, "agent", "fred", &[]);
    assert_ne!(fred.pid, killed.pid, "it takes a stale file over");

    let bob = Daemon::start(&site, "agent", "bob", &[]);
    let which = control(&site, "agent", &["stop"]);
    assert_eq!(which.code(), 2);
    assert!(which.err.contains("which agent? There are several: bob, fred"), "{}", which.err);
    assert_eq!(control(&site, "agent", &["stop", "--token", "bob"]).code(), 0);
    assert!(!bob.is_alive() && fred.is_alive());
    let at_once = control(&site, "agent", &["stop", "--now"]);
    assert_eq!(at_once.code(), 0, "{at_once:?}");
    assert!(!fred.pid_file().exists());
    assert!(!fs::read_to_string(format!("/proc/{}/stat", bystander.id())).unwrap().contains(") Z "), "it is alive");
    assert_eq!(control(&site, "mapper", &["status"]).code(), 3, "a mapper has files of its own");
}

#[test]
fn n18_second_signal_stops_at_once() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    slow_program(&site);
    let fred = Daemon::start(&site, "agent", "fred", &["--actors-dir", "actors", "--log-dir", "log"]);
    let _request = begin_slow_job(&site);
    kill(fred.pid, Signal::SIGTERM).unwrap();
    wait_until("it stops", || fred.state() == "stopping");
    kill(fred.pid, Signal::SIGUSR1).unwrap();
    let log = site.path("log/nanite-fred.log");
    wait_until("it still logs its jobs", || read(&log).contains("running: /slow/job"));
    kill(fred.pid, Signal::SIGTERM).unwrap();
    wait_until("it has ended", || !fred.is_alive());
    assert!(!fred.pid_file().exists());
    assert!(read(&log).contains("stopped at once: running jobs are lost"), "{}", read(&log));
}

#[test]
fn n18_background_mapper() {
    let site = Site::new(&["agent fred", "mapper ctl", "mapper m1"]);
    slow_program(&site);
    let _fred = site.agent("fred", &[]);
    site.write("nanite.toml", "pid-dir = \"run\"\nlog-dir = \"log\"\n[mapper]\ntoken = \"m1\"\n", 0o600);
    let started = site.run(&["mapper", "--daemonize"]);
    assert_eq!(started.code(), 0, "{started:?}");
    let status = site.json(&["mapper", "status", "--json"]);
    let pid = Pid::from_raw(i32::try_from(status["nodes"][0]["pid"].as_i64().unwrap()).unwrap());
    let m1 = Daemon { site: &site, role: "mapper", name: "m1", pid };
    let via = ["request", "/slow/job", "--token", "ctl", "--via-mapper", "--timeout", "60s"];
    let request = Running::start(&mut site.nanite(via));
    wait_until("the job runs", || site.path("began").exists());
    kill(m1.pid, Signal::SIGUSR1).unwrap();
    let log = site.path("log/mapper-m1.log");
    wait_until("the requests in flight are in the log", || read(&log).contains("in flight: 1 request at nanite-fred"));
    assert!(read(&log).contains("1 agent, 1 request in flight"), "{}", read(&log));
    fs::write(site.path("go"), "").unwrap();
    assert_eq!(request.wait().out, "done\n");
    assert_eq!(site.run(&["mapper", "stop"]).code(), 0);
    assert!(!m1.is_alive() && !m1.pid_file().exists());
}

#[test]
fn n18_notifies_systemd_when_ready_and_stopping() {
    let site = Site::new(&["agent fred"]);
    let name = format!("nanite-{}", site.broker.vhost());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    socket.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    let notification = || {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut command = site.nanite(["agent", "--token", "fred"]);
    let fred = Running::start(command.env("NOTIFY_SOCKET", format!("@{name}")));
    let ready = notification();
    assert!(ready.starts_with(&format!("READY=1\nMAINPID={}\nSTATUS=nanite-fred is ready: ", fred.id())), "{ready}");
    fred.signal(Signal::SIGTERM);
    assert_eq!(notification(), "STOPPING=1");
    assert_eq!(fred.wait().code(), 0);
}
