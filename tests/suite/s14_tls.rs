//! TLS to the broker, with a RabbitMQ that requires client certificates.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nanite::clock::{Clock, SystemClock};
use nanite::transport::{AmqpOptions, AmqpTransport, Destination, PublishRequest, Tls, Transport, TransportError};
use openssl::nid::Nid;
use openssl::ssl::{SslAcceptor, SslMethod};

use crate::harness::PATIENCE;
use crate::harness::broker::Broker;
use crate::harness::forge::{Forge, Forged};
use crate::harness::program::{nanite, run};

const DAY: Duration = Duration::from_secs(86_400);

/// Valid from yesterday until tomorrow.
fn now_valid(forge: Forge) -> Forge {
    let now = SystemClock.now();
    forge.valid(now.saturating_sub(DAY), now.saturating_add(DAY))
}

/// Expired an hour ago.
fn expired(forge: Forge) -> Forge {
    let now = SystemClock.now();
    forge.valid(now.saturating_sub(DAY), now.saturating_sub(Duration::from_secs(3600)))
}

fn ca(name: &str) -> Forged {
    now_valid(Forge::ca(name)).self_signed()
}

/// A certificate with this subject name, for these hosts such as `DNS:localhost`; without hosts for a client.
fn leaf(name: &str, hosts: &str) -> Forge {
    let mut forge = now_valid(Forge::leaf()).set(Nid::SUBJECT_ALT_NAME, hosts);
    forge.subject = name.to_owned();
    forge
}

/// A directory of PEM files.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn certificate(&self, name: &str, forged: &Forged) -> PathBuf {
        let path = self.path(&format!("{name}.pem"));
        std::fs::write(&path, forged.x509.to_pem().unwrap()).unwrap();
        path
    }

    fn key(&self, name: &str, forged: &Forged) -> PathBuf {
        let path = self.path(&format!("{name}-key.pem"));
        std::fs::write(&path, forged.key.private_key_to_pem_pkcs8().unwrap()).unwrap();
        mode(&path, 0o600);
        path
    }
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A broker that requires client certificates of its CA, with its certificates.
struct TlsBroker {
    node: Broker,
    files: Files,
    ca: Forged,
    other_ca: Forged,
    user: String,
}

impl TlsBroker {
    fn new() -> Self {
        let files = Files::new();
        let (ca, other_ca) = (ca("broker CA"), self::ca("another CA"));
        let server = leaf("broker", "DNS:localhost").signed_by(&ca);
        let ca_path = files.certificate("ca", &ca);
        let (certificate, key) = (files.certificate("server", &server), files.key("server", &server));
        files.certificate("other-ca", &other_ca);
        let node = Broker::private_with(&["rabbitmq_auth_mechanism_ssl"], |port| {
            format!(
                "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\n\
                 ssl_options.keyfile = {}\nssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n\
                 auth_mechanisms.1 = EXTERNAL\nauth_mechanisms.2 = PLAIN\nssl_cert_login_from = common_name\n",
                ca_path.display(),
                certificate.display(),
                key.display()
            )
        });
        let user = node.add_user("unused");
        node.permit(&user, ".*", ".*", ".*");
        let broker = Self { node, files, ca, other_ca, user };
        broker.client("client", leaf(&broker.user, ""), &broker.ca);
        broker
    }

    /// Issues a client's certificate and writes it with its key.
    fn client(&self, name: &str, forge: Forge, ca: &Forged) -> Forged {
        let client = forge.signed_by(ca);
        self.files.certificate(name, &client);
        self.files.key(name, &client);
        client
    }

    fn url(&self, host: &str) -> String {
        format!("amqps://{host}:{}/{}", self.node.extra_port(), self.node.vhost())
    }

    /// TLS options with this CA and the certificate of this client.
    fn tls(&self, ca: &str, client: Option<&str>) -> Tls {
        let path = |name: String| self.files.path(&name);
        let tls = Tls::new(path(format!("{ca}.pem")));
        match client {
            Some(client) => tls.client_certificate(path(format!("{client}.pem")), path(format!("{client}-key.pem"))),
            None => tls,
        }
    }

    async fn connect(&self, host: &str, ca: &str, client: Option<&str>) -> Result<AmqpTransport, TransportError> {
        let options = AmqpOptions::new(&self.url(host)).unwrap().tls(self.tls(ca, client));
        AmqpTransport::connect(options.connect_timeout(PATIENCE)).await
    }

    async fn refused(&self, host: &str, ca: &str, client: Option<&str>) -> TransportError {
        let error = self.connect(host, ca, client).await.expect_err("the connection must be refused");
        assert_eq!(self.node.connections(), Vec::<String>::new(), "{error}");
        error
    }
}

fn assert_tls(error: &TransportError, expected: &str) {
    assert!(matches!(error, TransportError::Tls(why) if why.contains(expected)), "no {expected:?} in {error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s14_connects_only_with_valid_certificates_on_both_sides() {
    let broker = TlsBroker::new();

    // The user is taken from the certificate, without a password.
    let transport = broker.connect("localhost", "ca", Some("client")).await.unwrap();
    let queue = nanite::transport::topology::agent_inbox("nanite-fred");
    let mut consumer = transport.consume(&queue, 1).await.unwrap();
    let message = PublishRequest::new(Destination::queue(&queue.name), vec![7; 200_000]).persistent(false);
    transport.publish(message, PATIENCE).await.unwrap();
    let delivery = tokio::time::timeout(PATIENCE, consumer.next()).await.unwrap().unwrap();
    assert_eq!(delivery.body.len(), 200_000);
    delivery.acker.ack().await.unwrap();
    // The broker updates its statistics with a delay.
    crate::harness::wait_until("the broker has the user from the certificate", async || {
        let connection = &broker.node.api("GET", "/api/connections", &serde_json::Value::Null).1[0];
        connection["user"] == broker.user && connection["ssl"] == true && connection["auth_mechanism"] == "EXTERNAL"
    })
    .await;
    transport.close().await;
    crate::harness::wait_until("the connection is closed", async || broker.node.connections().is_empty()).await;

    // The broker's certificate is issued by another CA, or for another host.
    assert_tls(&broker.refused("localhost", "other-ca", Some("client")).await, "certificate is refused");
    assert_tls(&broker.refused("127.0.0.1", "ca", Some("client")).await, "IP address mismatch");

    // The client's certificate is missing, issued by another CA, expired, or for an unknown user.
    let none = broker.refused("localhost", "ca", None).await;
    assert!(matches!(none, TransportError::Tls(_) | TransportError::Unreachable(_)), "{none:?}");
    broker.client("stranger", leaf(&broker.user, ""), &broker.other_ca);
    let stranger = broker.refused("localhost", "ca", Some("stranger")).await;
    assert!(matches!(stranger, TransportError::Tls(_) | TransportError::Unreachable(_)), "{stranger:?}");
    broker.client("old", expired(leaf(&broker.user, "")), &broker.ca);
    let old = broker.refused("localhost", "ca", Some("old")).await;
    assert!(matches!(old, TransportError::Tls(_) | TransportError::Unreachable(_)), "{old:?}");
    broker.client("unknown", leaf("unknown", ""), &broker.ca);
    assert_eq!(broker.refused("localhost", "ca", Some("unknown")).await, TransportError::Credentials);

    // The key is accessible to others, or belongs to another certificate.
    mode(&broker.files.path("client-key.pem"), 0o640);
    let wide = broker.refused("localhost", "ca", Some("client")).await;
    assert!(matches!(wide, TransportError::TlsKeyMode { mode: 0o640, .. }), "{wide:?}");
    std::fs::copy(broker.files.path("unknown-key.pem"), broker.files.path("client-key.pem")).unwrap();
    mode(&broker.files.path("client-key.pem"), 0o600);
    let mixed = broker.refused("localhost", "ca", Some("client")).await;
    assert!(matches!(&mixed, TransportError::TlsFile { path, .. } if path.ends_with("client-key.pem")), "{mixed:?}");

    // A renewed certificate is used without a restart.
    broker.client("client", leaf(&broker.user, ""), &broker.ca);
    let transport = broker.connect("localhost", "ca", Some("client")).await.unwrap();
    broker.client("client", leaf("unknown", ""), &broker.ca);
    broker.client("client", leaf(&broker.user, ""), &broker.ca);
    broker.node.close_connections();
    transport.depth("nanite-fred").await.unwrap();
    transport.close().await;

    check_program(&broker);
}

/// The same with the program: a user with a password over TLS, and the error messages.
fn check_program(broker: &TlsBroker) {
    let files = &broker.files;
    let dir = files.path("nodes").display().to_string();
    assert_eq!(run(&mut nanite(["certs", "init", "--dir", &dir])).code(), 0);
    assert_eq!(run(&mut nanite(["certs", "issue", "mapper", "ctl", "--dir", &dir])).code(), 0);
    let agents = |url: &str, ca: &str| {
        let file = |name: &str| files.path(name).display().to_string();
        let mut command =
            nanite(["agents", "--json", "--look", "300ms", "--certs", &dir, "--broker", url, "--log", "trace"]);
        command.args(["--broker-ca", &file(ca), "--broker-cert", &file("client.pem")]);
        command.args(["--broker-key", &file("client-key.pem")]).current_dir(files.path(""));
        command
    };
    let external = run(&mut agents(&broker.url("localhost"), "ca.pem"));
    assert_eq!(external.code(), 0, "{external:?}");
    let url = broker.url(&format!("{}@localhost", broker.user));
    let password = run(agents(&url, "ca.pem").env("NANITE_BROKER_PASSWORD", "unused"));
    assert_eq!(password.code(), 0, "{password:?}");
    let wrong = run(agents(&url, "ca.pem").env("NANITE_BROKER_PASSWORD", "wr0ng-secret"));
    assert_eq!(wrong.code(), 7, "{wrong:?}");
    assert!(wrong.err.contains("refused the user name or password"), "{wrong:?}");
    for ended in [&password, &wrong] {
        assert!(!ended.err.contains("wr0ng-secret") && !ended.err.contains(r"\0unused"), "{ended:?}");
    }

    // The system's CAs include the broker's, but another is given: the system's are not trusted.
    let mut system = agents(&broker.url("localhost"), "other-ca.pem");
    system.env("SSL_CERT_FILE", files.path("ca.pem")).env("SSL_CERT_DIR", files.path(""));
    let system = run(&mut system);
    assert_eq!(system.code(), 7, "{system:?}");
    assert!(system.err.contains("its certificate is refused") && system.err.contains("--broker-ca"), "{system:?}");

    mode(&files.path("client-key.pem"), 0o644);
    let wide = run(&mut agents(&broker.url("localhost"), "ca.pem"));
    assert_eq!(wide.code(), 6, "{wide:?}");
    assert!(wide.err.contains("has mode 0644") && wide.err.contains("chmod 600"), "{wide:?}");
}

/// Starts a server with this certificate, which accepts every TLS handshake and sends nothing; returns its port.
fn server(certificate: &Forged) -> u16 {
    let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls()).unwrap();
    acceptor.set_certificate(&certificate.x509).unwrap();
    acceptor.set_private_key(&certificate.key).unwrap();
    let acceptor = acceptor.build();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            if let Ok(mut stream) = acceptor.accept(stream) {
                let _ = stream.read(&mut [0; 64]);
            }
        }
    });
    port
}

async fn connect_error(port: u16, ca: &Path) -> TransportError {
    let options = AmqpOptions::new(&format!("amqps://127.0.0.1:{port}")).unwrap().tls(Tls::new(ca));
    AmqpTransport::connect(options.connect_timeout(PATIENCE)).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn s14_rejects_invalid_broker_certificates() {
    let files = Files::new();
    let ca = ca("broker CA");
    let path = files.certificate("ca", &ca);
    let good = || leaf("broker", "IP:127.0.0.1");
    // A valid certificate is told apart from a refused one: the handshake succeeds, and then there is no AMQP.
    let answer = connect_error(server(&good().signed_by(&ca)), &path).await;
    assert!(matches!(answer, TransportError::Unreachable(_)), "{answer:?}");
    assert_tls(&connect_error(server(&expired(good()).signed_by(&ca)), &path).await, "certificate has expired");
    assert_tls(&connect_error(server(&good().self_signed()), &path).await, "certificate is refused");
    let client_only = good().set(Nid::EXT_KEY_USAGE, "clientAuth").signed_by(&ca);
    assert_tls(&connect_error(server(&client_only), &path).await, "certificate is refused");
    let impostor = self::ca("broker CA");
    assert_tls(&connect_error(server(&good().signed_by(&impostor)), &path).await, "certificate is refused");
    let other_host = leaf("127.0.0.1", "DNS:example.org").signed_by(&ca);
    assert_tls(&connect_error(server(&other_host), &path).await, "mismatch");
}

#[tokio::test(flavor = "multi_thread")]
async fn s14_never_falls_back_to_plaintext() {
    let files = Files::new();
    let path = files.certificate("ca", &ca("broker CA"));
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut start = [0; 4];
        stream.read_exact(&mut start).unwrap();
        // A broker's answer to a client that does not speak AMQP.
        stream.write_all(b"AMQP\x00\x00\x09\x01").unwrap();
        start
    });
    let error = connect_error(port, &path).await;
    assert_tls(&error, "handshake failed");
    assert_eq!(heard.join().unwrap()[0], 0x16, "a TLS handshake, not AMQP");
    let none = connect_error(port, &files.path("none.pem")).await;
    assert!(matches!(&none, TransportError::TlsFile { path, .. } if path.ends_with("none.pem")), "{none:?}");
    std::fs::write(files.path("empty.pem"), "").unwrap();
    let empty = connect_error(port, &files.path("empty.pem")).await;
    assert!(matches!(&empty, TransportError::TlsFile { .. }), "{empty:?}");
    let unset = AmqpTransport::connect(AmqpOptions::new("amqps://127.0.0.1:1").unwrap()).await.unwrap_err();
    assert!(matches!(unset, TransportError::Address(_)), "{unset:?}");
}
