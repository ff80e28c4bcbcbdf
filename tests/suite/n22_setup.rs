//! `nanite broker setup`: nodes can do their work in the virtual host that it creates, and nothing else.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use nanite::clock::{Clock, SystemClock};
use openssl::nid::Nid;
use openssl::ssl::{SslAcceptor, SslMethod};
use serde_json::Value;

use crate::harness::forge::{Forge, Forged};
use crate::harness::program::{Ended, nanite, run};
use crate::harness::site::{Site, ready};

/// A site with unique node names, because all tests share the users of the broker.
pub struct SetupTest {
    pub site: Site,
    pub vhost: String,
    pub agents: [String; 2],
    pub mapper: String,
}

impl SetupTest {
    pub fn new() -> Self {
        let site = Site::new(&[]);
        let unique = site.broker.vhost().trim_start_matches("test-").to_owned();
        let agents = [format!("a{unique}"), format!("b{unique}")];
        let mapper = format!("m{unique}");
        for node in [format!("agent {}", agents[0]), format!("agent {}", agents[1]), format!("mapper {mapper}")] {
            site.issue(&node);
        }
        Self { site, vhost: format!("set-{unique}"), agents, mapper }
    }

    pub fn setup(&self, options: &[&str]) -> Ended {
        let management = format!("http://localhost:{}", self.site.broker.management());
        let all = ["broker", "setup", "--management", &management, "--vhost", &self.vhost];
        let nodes = ["--agent", &self.agents[0], "--agent", &self.agents[1], "--mapper", &self.mapper];
        run(&mut self.site.bare([&all[..], &nodes, options].concat()))
    }

    pub fn password(&self, identity: &str) -> String {
        let path = self.site.path(&format!("broker-passwords/{identity}.password"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::read_to_string(path).unwrap().trim_end().to_owned()
    }

    pub fn url(&self, identity: &str) -> String {
        format!("amqp://{identity}@127.0.0.1:{}/{}", self.site.broker.port(), self.vhost)
    }

    /// The program as a node, with its own broker user.
    pub fn node(&self, role: &str, name: &str, arguments: &[&str]) -> std::process::Command {
        let identity = if role == "agent" { format!("nanite-{name}") } else { format!("mapper-{name}") };
        let mut command = self.site.bare(arguments.iter().copied().chain(["--token", name, "--certs", "certs"]));
        command.args(["--broker", &self.url(&identity)]);
        command.args(["--broker-password-file", &format!("broker-passwords/{identity}.password")]);
        command
    }

    pub fn api(&self, path: &str) -> (u16, Value) {
        self.site.broker.api("GET", path, &Value::Null)
    }
}

impl Drop for SetupTest {
    fn drop(&mut self) {
        self.site.broker.api("DELETE", &format!("/api/vhosts/{}", self.vhost), &Value::Null);
        for user in [
            format!("nanite-{}", self.agents[0]),
            format!("nanite-{}", self.agents[1]),
            format!("mapper-{}", self.mapper),
        ] {
            self.site.broker.api("DELETE", &format!("/api/users/{user}"), &Value::Null);
        }
    }
}

#[test]
fn n22_nodes_work_with_their_own_users() {
    let test = SetupTest::new();
    let made = test.setup(&[]);
    assert_eq!(made.code(), 0, "{made:?}");
    let (a, b) = (format!("nanite-{}", test.agents[0]), format!("nanite-{}", test.agents[1]));
    let again = test.setup(&[]);
    assert_eq!(again.code(), 0, "{again:?}");
    assert!(again.out.lines().all(|line| line.starts_with("exists ")), "the second run changes nothing: {}", again.out);
    assert!(!made.out.contains(&test.password(&a)) && !made.err.contains(&test.password(&a)));
    let (_, permissions) = test.api(&format!("/api/vhosts/{}/permissions", test.vhost));
    assert_eq!(permissions.as_array().unwrap().len(), 3, "the administrator has none: {permissions}");

    // Secure nodes work, each with its own user.
    let _mapper = ready(&mut test.node("mapper", &test.mapper, &["mapper"]));
    let _agents: Vec<_> = test.agents.iter().map(|name| ready(&mut test.node("agent", name, &["agent"]))).collect();
    let request = "request /agent/echo hello --selector all --at-least 2 --look 60s --timeout 60s";
    let request: Vec<&str> = request.split(' ').collect();
    let answers = run(&mut test.node("mapper", &test.mapper, &request));
    assert_eq!(
        (answers.code(), answers.out.as_str()),
        (0, format!("{a}: hello\n{b}: hello\n").as_str()),
        "{answers:?}"
    );
}

#[test]
fn n22_errors_are_reported_and_a_dry_run_changes_nothing() {
    let test = SetupTest::new();
    let dry = test.setup(&["--dry-run"]);
    assert_eq!(dry.code(), 0, "{dry:?}");
    assert!(dry.out.contains(&format!("would create  user nanite-{}", test.agents[0])), "{}", dry.out);
    assert_eq!(test.api(&format!("/api/vhosts/{}", test.vhost)).0, 404);
    assert!(!test.site.path("broker-passwords").exists());

    let fails = |ended: Ended, code: i32, part: &str| {
        assert_eq!(ended.code(), code, "{ended:?}");
        assert!(ended.err.contains(part), "no {part:?} in {}", ended.err);
    };
    test.site.write("wrong", "nothing\n", 0o600);
    fails(test.setup(&["--password-file", "wrong"]), 7, "refuses the user guest or its password");
    fails(test.setup(&["--user", "nobody"]), 2, "no password for nobody");
    test.site.write("secret", "hunter2\n", 0o600);
    let worker = test.site.broker.add_user("hunter2");
    fails(test.setup(&["--user", &worker, "--password-file", "secret"]), 5, "is not an administrator");
    fails(test.setup(&["--agent", "a b"]), 2, "'a b' cannot be the name of an agent");
    let other = |url: &str| run(&mut test.site.bare(["broker", "setup", "--agent", "x", "--management", url]));
    fails(other("http://127.0.0.1:1"), 7, "rabbitmq-plugins enable rabbitmq_management");
    fails(other("http://192.0.2.1:15672"), 2, "without TLS, the password would be sent to another machine");
    fails(other("http://guest:guest@localhost:1"), 2, "--password-file");
    fails(other("https://localhost:1"), 2, "--ca FILE");
    fails(run(&mut test.site.bare(["broker", "setup"])), 2, "no node is named");
    assert_eq!(test.api(&format!("/api/vhosts/{}", test.vhost)).0, 404, "nothing was created");

    assert_eq!(test.setup(&[]).code(), 0);
    let before = test.password(&format!("nanite-{}", test.agents[0]));
    assert_eq!(test.setup(&["--renew-passwords"]).code(), 0);
    assert_ne!(test.password(&format!("nanite-{}", test.agents[0])), before);
}

/// An https server with this certificate that refuses every password; its port.
fn https_server(certificate: &Forged) -> u16 {
    let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls()).unwrap();
    acceptor.set_certificate(&certificate.x509).unwrap();
    acceptor.set_private_key(&certificate.key).unwrap();
    let (acceptor, listener) = (acceptor.build(), TcpListener::bind("127.0.0.1:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            if let Ok(mut stream) = acceptor.accept(stream) {
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n");
            }
        }
    });
    port
}

#[test]
fn n22_management_over_tls_trusts_only_the_given_ca_and_checks_the_host() {
    let now = SystemClock.now();
    let (from, to) = (now.saturating_sub(Duration::from_secs(3600)), now.saturating_add(Duration::from_secs(3600)));
    let (ca, other_ca) = (Forge::ca("a").valid(from, to).self_signed(), Forge::ca("b").valid(from, to).self_signed());
    let server = |host: &str| Forge::leaf().valid(from, to).set(Nid::SUBJECT_ALT_NAME, host);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    fs::write(&path, ca.x509.to_pem().unwrap()).unwrap();
    for (certificate, message) in [
        (server("DNS:localhost").signed_by(&ca), "refuses the user guest or its password"),
        (server("DNS:localhost").signed_by(&other_ca), "TLS failed"),
        (server("DNS:localhost").self_signed(), "TLS failed"),
        (server("DNS:example.org").signed_by(&ca), "TLS failed"),
        (server("DNS:localhost").valid(from, from).signed_by(&ca), "TLS failed"),
    ] {
        let url = format!("https://localhost:{}", https_server(&certificate));
        let setup = ["broker", "setup", "--agent", "x", "--management", &url, "--ca", path.to_str().unwrap()];
        let ended = run(&mut nanite(setup));
        assert!(ended.code() == 7 && ended.err.contains(message), "{message}: {ended:?}");
    }
}
