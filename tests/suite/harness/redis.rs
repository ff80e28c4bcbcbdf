//! Redis servers for tests: each test has its own, on a socket in a temporary directory, and may kill, pause and restart it.
//!
//! A server ends with its test, even if the test is killed: a shell runs the server as long as the shell's standard input is open.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a server may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Starts a server, and kills it at a line or the end of standard input.
const WATCHDOG: &str = r#""$@" & server=$!; echo $server >"$DIR/pid"; read -r _; kill -KILL $server 2>/dev/null; wait"#;

#[derive(Debug)]
pub struct RedisServer {
    dir: tempfile::TempDir,
    options: Vec<String>,
    running: Option<(Child, ChildStdin)>,
}

impl RedisServer {
    /// A server that stores nothing on disk.
    pub fn start() -> Self {
        Self::with(&["--save", "", "--appendonly", "no"])
    }

    /// A server that writes every change to disk at once.
    pub fn durable() -> Self {
        Self::with(&["--save", "", "--appendonly", "yes", "--appendfsync", "always"])
    }

    /// A server with these options.
    pub fn with(options: &[&str]) -> Self {
        assert!(
            Command::new("redis-server").arg("--version").output().is_ok_and(|ran| ran.status.success()),
            "these tests need redis-server: `make test` installs it"
        );
        // Not under Cargo's directory: the path of a socket must be short.
        let dir = tempfile::Builder::new().prefix("redis-").tempdir().unwrap();
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut server = Self { dir, options, running: None };
        server.restart();
        server
    }

    /// The server's directory.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Kills the server at once, as by `kill -9`.
    pub fn kill(&mut self) {
        let (mut watchdog, input) = self.running.take().expect("the server runs");
        drop(input);
        watchdog.wait().unwrap();
        let _ = std::fs::remove_file(self.socket());
    }

    /// Starts the server, with the data that it has on disk.
    pub fn restart(&mut self) {
        assert!(self.running.is_none(), "the server runs already");
        let mut command = Command::new("setsid");
        command.args(["bash", "-c", WATCHDOG, "watchdog", "redis-server"]).arg("--unixsocket").arg(self.socket());
        if !self.options.iter().any(|option| option == "--port") {
            command.args(["--port", "0"]);
        }
        command.arg("--dir").arg(self.dir.path()).args(&self.options).env("DIR", self.dir.path());
        let log = std::fs::File::create(self.dir.path().join("log")).unwrap();
        command.stdin(Stdio::piped()).stderr(log.try_clone().unwrap()).stdout(log);
        let mut watchdog = command.spawn().unwrap();
        let input = watchdog.stdin.take().unwrap();
        self.running = Some((watchdog, input));
        let deadline = Instant::now() + START_TIMEOUT;
        while !self.answers() {
            let log = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "Redis was not ready within {START_TIMEOUT:?}:\n{}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether the server answers, even if only that a password is needed.
    fn answers(&self) -> bool {
        let ping = |mut to| redis::cmd("PING").exec(&mut to);
        self.try_connect().is_some_and(|to| ping(to).map_or_else(|error| error.code() == Some("NOAUTH"), |()| true))
    }

    /// Stops the server from answering until it is [resumed](Self::resume).
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = std::fs::read_to_string(self.dir.path().join("pid")).unwrap();
        kill(Pid::from_raw(pid.trim().parse().unwrap()), signal).unwrap();
    }

    fn try_connect(&self) -> Option<redis::Connection> {
        redis::Client::open(self.url()).unwrap().get_connection().ok()
    }

    /// A new connection.
    pub fn connect(&self) -> redis::Connection {
        self.try_connect().unwrap()
    }

    /// Runs one command.
    pub fn run<T: redis::FromRedisValue>(&self, command: &[&str]) -> T {
        let (name, arguments) = command.split_first().unwrap();
        redis::cmd(name).arg(arguments).query(&mut self.connect()).unwrap()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if let Some((mut watchdog, mut input)) = self.running.take() {
            let _ = input.flush();
            drop(input);
            let _ = watchdog.wait();
        }
    }
}
