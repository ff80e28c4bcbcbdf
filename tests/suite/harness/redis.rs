//! Redis servers for tests: private ones, on a socket in a directory of their own, that a test may kill, stop and start again.
//!
//! A server ends with the test, in whatever way that ends: a shell holds it as long as its own standard input is open.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a server may take until it answers.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Starts a server and kills it when it is told to, or nobody can tell it any more.
const KEEPER: &str = r#""$@" & server=$!; echo $server >"$DIR/pid"; read -r _; kill -KILL $server 2>/dev/null; wait"#;

#[derive(Debug)]
pub struct RedisServer {
    dir: tempfile::TempDir,
    options: Vec<String>,
    running: Option<(Child, ChildStdin)>,
}

impl RedisServer {
    /// A server that keeps nothing on disk.
    pub fn start() -> Self {
        Self::with(&["--save", "", "--appendonly", "no"])
    }

    /// A server that keeps everything on disk at once.
    pub fn durable() -> Self {
        Self::with(&["--save", "", "--appendonly", "yes", "--appendfsync", "always"])
    }

    /// A server with these options.
    pub fn with(options: &[&str]) -> Self {
        assert!(
            Command::new("redis-server").arg("--version").output().is_ok_and(|ran| ran.status.success()),
            "these tests need redis-server: `make test` installs it"
        );
        // Not under Cargo's directory: the path of a socket has to be short.
        let dir = tempfile::Builder::new().prefix("redis-").tempdir().unwrap();
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut server = Self { dir, options, running: None };
        server.restart();
        server
    }

    /// A directory of this server's own.
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
        let (mut keeper, input) = self.running.take().expect("the server runs");
        drop(input);
        keeper.wait().unwrap();
        let _ = std::fs::remove_file(self.socket());
    }

    /// Starts the server again, with what it has on disk.
    pub fn restart(&mut self) {
        assert!(self.running.is_none(), "the server runs already");
        let mut command = Command::new("setsid");
        command.args(["bash", "-c", KEEPER, "keeper", "redis-server"]).arg("--unixsocket").arg(self.socket());
        if !self.options.iter().any(|option| option == "--port") {
            command.args(["--port", "0"]);
        }
        command.arg("--dir").arg(self.dir.path()).args(&self.options).env("DIR", self.dir.path());
        let log = std::fs::File::create(self.dir.path().join("log")).unwrap();
        command.stdin(Stdio::piped()).stderr(log.try_clone().unwrap()).stdout(log);
        let mut keeper = command.spawn().unwrap();
        let input = keeper.stdin.take().unwrap();
        self.running = Some((keeper, input));
        let deadline = Instant::now() + READY_WITHIN;
        while !self.answers() {
            let log = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "Redis was not ready within {READY_WITHIN:?}:\n{}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether it answers, if only that a password is needed.
    fn answers(&self) -> bool {
        let ping = |mut to| redis::cmd("PING").exec(&mut to);
        self.try_connect().is_some_and(|to| ping(to).map_or_else(|error| error.code() == Some("NOAUTH"), |()| true))
    }

    /// Lets the server answer nothing, until it is [resumed](Self::resume).
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

    /// A connection of the test's own.
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
        if let Some((mut keeper, mut input)) = self.running.take() {
            let _ = input.flush();
            drop(input);
            let _ = keeper.wait();
        }
    }
}
