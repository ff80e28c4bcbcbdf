//! RabbitMQ nodes for tests: one that all tests share, and private ones that a test may stop, kill and restart.
//!
//! A node has its own ports, data, cookie and port mapper, all in a directory below Cargo's directory for tests. `broker.sh` runs and
//! stops it: a private node when its test ends in any way, the shared one when no test has used it for half a minute.
//!
//! The calls here block, for seconds while a node starts. In a test on one thread nothing else runs meanwhile.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use nanite::transport::{AmqpOptions, AmqpTransport};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::http;

/// How long a node may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// A virtual host on a node, for one test.
#[derive(Debug)]
pub struct Broker {
    node: Node,
    vhost: String,
    private: Option<Private>,
}

/// The directory and the ports of a node.
#[derive(Clone, Debug)]
struct Node {
    dir: PathBuf,
    amqp: u16,
    management: u16,
    distribution: u16,
    port_mapper: u16,
    /// A free port for additional settings of a test.
    extra: u16,
}

/// A node that belongs to one test.
#[derive(Debug)]
struct Private {
    _dir: tempfile::TempDir,
    running: Option<(Child, ChildStdin)>,
}

impl Broker {
    /// A virtual host on the shared node, which is started if it does not run.
    pub fn shared() -> Self {
        static SHARED: OnceLock<(Node, File)> = OnceLock::new();
        let (node, _lease) = SHARED.get_or_init(shared_node);
        Self::on(node.clone(), None)
    }

    /// A private node.
    pub fn private() -> Self {
        let dir = tempfile::Builder::new().prefix("broker-").tempdir_in(target()).unwrap();
        let (node, child) = start_new(dir.path(), launch_private);
        Self::on(node, Some(Private { _dir: dir, running: Some(child) }))
    }

    /// A private node with additional plugins and settings; the settings are given a free port.
    pub fn private_with(plugins: &[&str], settings: impl Fn(u16) -> String) -> Self {
        let dir = tempfile::Builder::new().prefix("broker-").tempdir_in(target()).unwrap();
        let (node, child) = start_with(dir.path(), plugins, &settings, launch_private);
        Self::on(node, Some(Private { _dir: dir, running: Some(child) }))
    }

    /// Another virtual host on the same node.
    pub fn new_vhost(&self) -> Self {
        Self::on(self.node.clone(), None)
    }

    fn on(node: Node, private: Option<Private>) -> Self {
        let vhost = format!("test-{}", random());
        let broker = Self { node, vhost, private };
        broker.api_ok("PUT", &format!("/api/vhosts/{}", broker.vhost), Value::Null);
        broker.permit("guest", ".*", ".*", ".*");
        broker
    }

    /// The URL of this virtual host, for a user.
    pub fn url_for(&self, user: &str, password: &str) -> String {
        format!("amqp://{user}:{password}@127.0.0.1:{}/{}", self.node.amqp, self.vhost)
    }

    /// The URL of this virtual host.
    pub fn url(&self) -> String {
        self.url_for("guest", "guest")
    }

    pub fn port(&self) -> u16 {
        self.node.amqp
    }

    /// The port of the management API.
    pub fn management(&self) -> u16 {
        self.node.management
    }

    /// The port that was given to the settings of [`private_with`](Self::private_with).
    pub fn extra_port(&self) -> u16 {
        self.node.extra
    }

    pub fn vhost(&self) -> &str {
        &self.vhost
    }

    pub fn options(&self) -> AmqpOptions {
        AmqpOptions::new(&self.url()).unwrap()
    }

    pub async fn connect(&self) -> AmqpTransport {
        AmqpTransport::connect(self.options()).await.unwrap()
    }

    /// Calls the management API: the status and the answer, null if it is not JSON.
    pub fn api(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer) = http::request(self.node.management, method, path, &body).unwrap();
        (status, serde_json::from_str(&answer).unwrap_or(Value::Null))
    }

    fn api_ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.api(method, path, &body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// Adds a user without permissions, and returns its name.
    pub fn add_user(&self, password: &str) -> String {
        let user = format!("user-{}", random());
        self.api_ok("PUT", &format!("/api/users/{user}"), json!({"password": password, "tags": ""}));
        user
    }

    /// Gives a user permissions here: patterns for names of queues and exchanges.
    pub fn permit(&self, user: &str, configure: &str, write: &str, read: &str) {
        let permissions = json!({"configure": configure, "write": write, "read": read});
        self.api_ok("PUT", &format!("/api/permissions/{}/{user}", self.vhost), permissions);
    }

    /// Sets a policy for all queues here, such as `max-length`.
    pub fn set_policy(&self, definition: Value) {
        let policy = json!({"pattern": ".*", "definition": definition, "apply-to": "queues"});
        self.api_ok("PUT", &format!("/api/policies/{}/test", self.vhost), policy);
    }

    pub fn delete_queue(&self, queue: &str) {
        self.api_ok("DELETE", &format!("/api/queues/{}/{queue}", self.vhost), Value::Null);
    }

    /// The properties of a queue; null if there is no such queue.
    pub fn queue(&self, queue: &str) -> Value {
        self.api("GET", &format!("/api/queues/{}/{queue}", self.vhost), &Value::Null).1
    }

    /// The names of the connections to this virtual host.
    pub fn connections(&self) -> Vec<String> {
        let connections = self.api_ok("GET", &format!("/api/vhosts/{}/connections", self.vhost), Value::Null);
        connections
            .as_array()
            .unwrap()
            .iter()
            .map(|connection| connection["name"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Closes all connections to this virtual host, as an operator would, and returns their number.
    pub fn close_connections(&self) -> usize {
        let connections = self.connections();
        for name in &connections {
            // It may have been closed meanwhile.
            self.api(
                "DELETE",
                &format!("/api/connections/{}", name.replace(' ', "%20").replace('>', "%3E")),
                &Value::Null,
            );
        }
        connections.len()
    }

    /// Runs `rabbitmqctl` on the node. Takes seconds.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(programs().join("rabbitmqctl"));
        let output = environment(&mut command, &self.node).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "rabbitmqctl {arguments:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    /// The environment that `rabbitmqctl` needs for this node, as lines of sh.
    pub fn ctl_environment(&self) -> String {
        let mut command = Command::new("rabbitmqctl");
        let set = environment(&mut command, &self.node).env("RABBITMQCTL", programs().join("rabbitmqctl")).get_envs();
        set.filter_map(|(key, value)| Some(format!("export {}='{}'\n", key.to_str()?, value?.to_str()?))).collect()
    }

    /// Stops a private node gracefully.
    pub fn stop(&mut self) {
        self.send("stop");
    }

    /// Kills a private node, as `kill -9` does.
    pub fn kill(&mut self) {
        self.send("kill");
    }

    fn send(&mut self, command: &str) {
        let private = self.private.as_mut().expect("only a private node can be stopped");
        let (mut child, mut input) = private.running.take().expect("the node runs");
        writeln!(input, "{command}").unwrap();
        child.wait().unwrap();
    }

    /// Starts a private node again, with its data and its ports.
    pub fn start(&mut self) {
        let private = self.private.as_mut().expect("only a private node can be started");
        assert!(private.running.is_none(), "the node runs already");
        let mut child = launch_private(&self.node);
        wait_ready(&self.node, &mut child.0).unwrap_or_else(|error| panic!("{error}"));
        private.running = Some(child);
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        match &mut self.private {
            // The end of input makes the supervisor stop the node and remove its data.
            Some(private) => {
                if let Some((mut child, input)) = private.running.take() {
                    drop(input);
                    let _ = child.wait();
                }
            }
            None => {
                let _ = http::request(self.node.management, "DELETE", &format!("/api/vhosts/{}", self.vhost), "");
            }
        }
    }
}

/// The shared node, with the lease that keeps it running while this process runs.
fn shared_node() -> (Node, File) {
    let base = target().join("shared-broker");
    fs::create_dir_all(&base).unwrap();
    let open =
        |name: &str| File::options().create(true).truncate(false).read(true).write(true).open(base.join(name)).unwrap();
    let mut lease = open("lease");
    lease.lock_shared().unwrap();
    // Updates the time of last use.
    writeln!(lease, "{}", std::process::id()).unwrap();
    let starting = open("starting");
    starting.lock().unwrap();
    let ready = base.join("lease.ready");
    // A node whose supervisor was killed would never stop: the next supervisor kills it.
    let is_supervised = open("lease.supervised").try_lock().is_err();
    let existing = fs::read_to_string(&ready).ok().and_then(|text| Node::read(&text));
    if let Some(node) = existing.filter(|node| is_supervised && node.answers()) {
        return (node, lease);
    }
    let dir = base.join(format!("node-{}", random()));
    fs::create_dir(&dir).unwrap();
    let (node, _supervisor) = start_new(&dir, |node| {
        let mut command = supervisor(node, "shared");
        // It outlives this process, and must not hold its output open.
        (command.arg(base.join("lease")).stdin(Stdio::null()).spawn().unwrap(), ())
    });
    fs::write(&ready, node.write()).unwrap();
    (node, lease)
}

fn launch_private(node: &Node) -> (Child, ChildStdin) {
    let mut child = supervisor(node, "private").stdin(Stdio::piped()).spawn().unwrap();
    let input = child.stdin.take().unwrap();
    (child, input)
}

/// Creates a node in a directory and starts it. If another process takes its free ports first, other ports are tried.
fn start_new<T>(dir: &Path, launch: impl Fn(&Node) -> (Child, T)) -> (Node, (Child, T)) {
    start_with(dir, &[], &|_| String::new(), launch)
}

fn start_with<T>(
    dir: &Path,
    plugins: &[&str],
    settings: &dyn Fn(u16) -> String,
    launch: impl Fn(&Node) -> (Child, T),
) -> (Node, (Child, T)) {
    let mut last_error = String::new();
    for _ in 0..3 {
        let node = Node::create(dir, plugins, settings);
        let mut child = launch(&node);
        match wait_ready(&node, &mut child.0) {
            Ok(()) => return (node, child),
            Err(error) => last_error = error,
        }
    }
    panic!("{last_error}");
}

fn wait_ready(node: &Node, child: &mut Child) -> Result<(), String> {
    let deadline = Instant::now() + START_TIMEOUT;
    while !node.answers() {
        if let Some(status) = child.try_wait().unwrap() {
            return Err(format!("RabbitMQ failed to start ({status}):\n{}", node.logs()));
        }
        if Instant::now() > deadline {
            // The supervisor kills the node before it ends.
            let supervisor = Pid::from_raw(child.id().try_into().unwrap());
            let _ = kill(supervisor, Signal::SIGTERM);
            return Err(format!("RabbitMQ was not ready within {START_TIMEOUT:?}:\n{}", node.logs()));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn supervisor(node: &Node, mode: &str) -> Command {
    let mut command = Command::new("setsid");
    let log = || File::options().create(true).append(true).open(node.dir.join("supervisor.log")).unwrap();
    environment(&mut command, node).stdout(log()).stderr(log());
    command.arg("bash").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/suite/harness/broker.sh"));
    command.arg(mode).arg(&node.dir);
    command
}

/// The complete environment of a node and its tools.
fn environment<'a>(command: &'a mut Command, node: &Node) -> &'a mut Command {
    let dir = |name: &str| node.dir.join(name).display().to_string();
    let path = std::env::var("PATH").unwrap_or_default();
    command.env_clear().envs([
        ("PATH", format!("{path}:/usr/sbin:/sbin")),
        ("LC_ALL", "C.UTF-8".into()),
        ("HOME", node.dir.display().to_string()),
        ("SERVER", programs().join("rabbitmq-server").display().to_string()),
        ("ERL_EPMD_ADDRESS", "127.0.0.1".into()),
        ("ERL_EPMD_PORT", node.port_mapper.to_string()),
        ("RABBITMQ_NODENAME", "nanite@localhost".into()),
        ("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1".into()),
        ("RABBITMQ_NODE_PORT", node.amqp.to_string()),
        ("RABBITMQ_DIST_PORT", node.distribution.to_string()),
        ("RABBITMQ_MNESIA_BASE", dir("data")),
        ("RABBITMQ_LOG_BASE", dir("log")),
        ("RABBITMQ_PID_FILE", dir("pid")),
        ("RABBITMQ_ENABLED_PLUGINS_FILE", dir("plugins")),
        ("RABBITMQ_CONFIG_FILE", dir("rabbitmq.conf")),
        ("RABBITMQ_CONF_ENV_FILE", "/dev/null".into()),
        ("RABBITMQ_GENERATED_CONFIG_DIR", dir("generated")),
        ("RABBITMQ_FEATURE_FLAGS_FILE", dir("feature-flags")),
        ("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none".into()),
    ])
}

impl Node {
    /// Chooses free ports and writes the configuration.
    fn create(dir: &Path, plugins: &[&str], settings: &dyn Fn(u16) -> String) -> Self {
        // They stay free while a test restarts the node.
        let mut ports = BTreeSet::new();
        while ports.len() < 5 {
            ports.insert(free_port());
        }
        let ports = Vec::from_iter(ports);
        let port = |n: usize| ports[n];
        let node = Self {
            dir: dir.to_owned(),
            amqp: port(0),
            management: port(1),
            distribution: port(2),
            port_mapper: port(3),
            extra: port(4),
        };
        let config = format!(
            "management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {}\n\
             disk_free_limit.absolute = 1MB\ncollect_statistics_interval = 500\nvm_memory_high_watermark.absolute = 1GB\n{}",
            node.management,
            settings(node.extra)
        );
        fs::write(dir.join("rabbitmq.conf"), config).unwrap();
        let plugins: Vec<&str> = std::iter::once("rabbitmq_management").chain(plugins.iter().copied()).collect();
        fs::write(dir.join("plugins"), format!("[{}].\n", plugins.join(","))).unwrap();
        let cookie = dir.join(".erlang.cookie");
        if !cookie.exists() {
            let mut file = File::options().create_new(true).write(true).mode(0o600).open(&cookie).unwrap();
            file.write_all(random().as_bytes()).unwrap();
            fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400)).unwrap();
        }
        node
    }

    /// Whether it accepts connections and answers.
    fn answers(&self) -> bool {
        TcpStream::connect(("127.0.0.1", self.amqp)).is_ok()
            && http::request(self.management, "GET", "/api/overview", "").is_ok_and(|(status, _)| status == 200)
    }

    fn write(&self) -> String {
        let ports = [self.amqp, self.management, self.distribution, self.port_mapper, self.extra];
        json!({"dir": self.dir, "ports": ports}).to_string()
    }

    fn read(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let port = |n: usize| u16::try_from(value["ports"][n].as_u64()?).ok();
        Some(Self {
            dir: value["dir"].as_str()?.into(),
            amqp: port(0)?,
            management: port(1)?,
            distribution: port(2)?,
            port_mapper: port(3)?,
            extra: port(4)?,
        })
    }

    fn logs(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        format!("{}{}", read("supervisor.log"), read("console.log"))
    }
}

/// The folder of RabbitMQ's programs.
fn programs() -> PathBuf {
    let dir = std::env::var_os("NANITE_TEST_RABBITMQ").map_or_else(|| "/usr/lib/rabbitmq/bin".into(), PathBuf::from);
    let server = dir.join("rabbitmq-server");
    assert!(
        server.exists(),
        "these tests need RabbitMQ, and {} does not exist: `make test` installs it; NANITE_TEST_RABBITMQ can name another folder",
        server.display()
    );
    dir
}

fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// A port of this machine that no process listens on. It stays free: it is not of those that the system gives to clients, and to servers
/// that ask for any port (from 32768 on, unless configured otherwise).
pub fn free_port() -> u16 {
    let random = || {
        let mut bytes = [0; 2];
        openssl::rand::rand_bytes(&mut bytes).unwrap();
        20_000 + u16::from_be_bytes(bytes) % 12_000
    };
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (0..1000).map(|_| random()).find(is_free).expect("a free port")
}

/// A unique name.
fn random() -> String {
    let mut bytes = [0; 8];
    openssl::rand::rand_bytes(&mut bytes).unwrap();
    HEXLOWER.encode(&bytes)
}
