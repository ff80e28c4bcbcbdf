//! The connection to the broker by TLS, against a RabbitMQ that takes clients with certificates only.

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

/// A certificate with this name in its subject, for these hosts: `DNS:localhost`; none: a client's.
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

/// A broker that takes clients with certificates of its CA only, and what belongs to it.
struct World {
    broker: Broker,
    files: Files,
    ca: Forged,
    other_ca: Forged,
    user: String,
}

impl World {
    fn new() -> Self {
        let files = Files::new();
        let (ca, other_ca) = (ca("broker CA"), self::ca("another CA"));
        let server = leaf("broker", "DNS:localhost").signed_by(&ca);
        let ca_path = files.certificate("ca", &ca);
        let (certificate, key) = (files.certificate("server", &server), files.key("server", &server));
        files.certificate("other-ca", &other_ca);
        let broker = Broker::private_with(&["rabbitmq_auth_mechanism_ssl"], |port| {
            format!(
                "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\n\
                 ssl_options.keyfile = {}\nssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n\
                 auth_mechanisms.1 = EXTERNAL\nauth_mechanisms.2 = PLAIN\nssl_cert_login_from = common_name\n",
                ca_path.display(),
                certificate.display(),
                key.display()
            )
        });
        let user = broker.add_user("unused");
        broker.permit(&user, ".*", ".*", ".*");
        let world = Self { broker, files, ca, other_ca, user };
        world.client("client", leaf(&world.user, ""), &world.ca);
        world
    }

    /// Writes a client's certificate and key.
    fn client(&self, name: &str, forge: Forge, ca: &Forged) -> Forged {
        let client = forge.signed_by(ca);
        self.files.certificate(name, &client);
        self.files.key(name, &client);
        client
    }

    fn url(&self, host: &str) -> String {
        format!("amqps://{host}:{}/{}", self.broker.other_port(), self.broker.vhost())
    }

    /// TLS by this CA and the certificate of this client.
    fn tls(&self, ca: &str, client: Option<&str>) -> Tls {
        let path = |name: String| self.files.path(&name);
        let tls = Tls::new(path(format!("{ca}.pem")));
        match client {
            Some(client) => tls.client(path(format!("{client}.pem")), path(format!("{client}-key.pem"))),
            None => tls,
        }
    }

    async fn connect(&self, host: &str, ca: &str, client: Option<&str>) -> Result<AmqpTransport, TransportError> {
        let options = AmqpOptions::new(&self.url(host)).unwrap().tls(self.tls(ca, client));
        AmqpTransport::connect(options.connect_timeout(PATIENCE)).await
    }

    async fn refused(&self, host: &str, ca: &str, client: Option<&str>) -> TransportError {
        let error = self.connect(host, ca, client).await.expect_err("it must be refused");
        assert_eq!(self.broker.connections(), Vec::<String>::new(), "{error}");
        error
    }
}

fn assert_tls(error: &TransportError, says: &str) {
    assert!(matches!(error, TransportError::Tls(why) if why.contains(says)), "no {says:?} in {error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s14_only_the_right_certificates_of_both_sides_make_a_connection() {
    let world = World::new();

    // By name of the certificate, without a password: there and back.
    let transport = world.connect("localhost", "ca", Some("client")).await.unwrap();
    let queue = nanite::transport::topology::agent_inbox("nanite-fred");
    let mut consumer = transport.consume(&queue, 1).await.unwrap();
    let message = PublishRequest {
        destination: Destination::Queue(queue.name.clone()),
        body: vec![7; 200_000].into(),
        content_type: "application/octet-stream".into(),
        message_id: "1".into(),
        expires_in: None,
        persistent: false,
    };
    transport.publish(message, PATIENCE).await.unwrap();
    let delivery = tokio::time::timeout(PATIENCE, consumer.next()).await.unwrap().unwrap();
    assert_eq!(delivery.body.len(), 200_000);
    delivery.acker.ack().await.unwrap();
    // The broker's statistics come late.
    crate::harness::wait_until("the broker knows the user by the certificate", async || {
        let connection = &world.broker.api("GET", "/api/connections", &serde_json::Value::Null).1[0];
        connection["user"] == world.user && connection["ssl"] == true && connection["auth_mechanism"] == "EXTERNAL"
    })
    .await;
    transport.close().await;
    crate::harness::wait_until("the connection is gone", async || world.broker.connections().is_empty()).await;

    // The broker's certificate: of another CA, for another host.
    assert_tls(&world.refused("localhost", "other-ca", Some("client")).await, "certificate is refused here");
    assert_tls(&world.refused("127.0.0.1", "ca", Some("client")).await, "IP address mismatch");

    // The client's certificate: none, of another CA, expired, of nobody that the broker knows.
    let none = world.refused("localhost", "ca", None).await;
    assert!(matches!(none, TransportError::Tls(_) | TransportError::Unreachable(_)), "{none:?}");
    world.client("stranger", leaf(&world.user, ""), &world.other_ca);
    let stranger = world.refused("localhost", "ca", Some("stranger")).await;
    assert!(matches!(stranger, TransportError::Tls(_) | TransportError::Unreachable(_)), "{stranger:?}");
    world.client("old", expired(leaf(&world.user, "")), &world.ca);
    let old = world.refused("localhost", "ca", Some("old")).await;
    assert!(matches!(old, TransportError::Tls(_) | TransportError::Unreachable(_)), "{old:?}");
    world.client("nobody", leaf("nobody", ""), &world.ca);
    assert_eq!(world.refused("localhost", "ca", Some("nobody")).await, TransportError::Credentials);

    // A key that others can read, or of another certificate.
    mode(&world.files.path("client-key.pem"), 0o640);
    let wide = world.refused("localhost", "ca", Some("client")).await;
    assert!(matches!(wide, TransportError::TlsKeyMode { mode: 0o640, .. }), "{wide:?}");
    std::fs::copy(world.files.path("nobody-key.pem"), world.files.path("client-key.pem")).unwrap();
    mode(&world.files.path("client-key.pem"), 0o600);
    let mixed = world.refused("localhost", "ca", Some("client")).await;
    assert!(matches!(&mixed, TransportError::TlsFile { path, .. } if path.ends_with("client-key.pem")), "{mixed:?}");

    // A renewed certificate is used without a restart.
    world.client("client", leaf(&world.user, ""), &world.ca);
    let transport = world.connect("localhost", "ca", Some("client")).await.unwrap();
    world.client("client", leaf("nobody", ""), &world.ca);
    world.client("client", leaf(&world.user, ""), &world.ca);
    world.broker.close_connections();
    transport.depth("nanite-fred").await.unwrap();
    transport.close().await;

    in_the_program(&world);
}

/// The same by the program: a user with a password over TLS, and what it says when it fails.
fn in_the_program(world: &World) {
    let files = &world.files;
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
    let external = run(&mut agents(&world.url("localhost"), "ca.pem"));
    assert_eq!(external.code(), 0, "{external:?}");
    let url = world.url(&format!("{}@localhost", world.user));
    let password = run(agents(&url, "ca.pem").env("NANITE_BROKER_PASSWORD", "unused"));
    assert_eq!(password.code(), 0, "{password:?}");
    let wrong = run(agents(&url, "ca.pem").env("NANITE_BROKER_PASSWORD", "wr0ng-secret"));
    assert_eq!(wrong.code(), 7, "{wrong:?}");
    assert!(wrong.err.contains("refused the user name or password"), "{wrong:?}");
    for ended in [&password, &wrong] {
        assert!(!ended.err.contains("wr0ng-secret") && !ended.err.contains(r"\0unused"), "{ended:?}");
    }

    // The system knows the broker's CA, but another is asked for: the system's does not count.
    let mut system = agents(&world.url("localhost"), "other-ca.pem");
    system.env("SSL_CERT_FILE", files.path("ca.pem")).env("SSL_CERT_DIR", files.path(""));
    let system = run(&mut system);
    assert_eq!(system.code(), 7, "{system:?}");
    assert!(system.err.contains("its certificate is refused here") && system.err.contains("--broker-ca"), "{system:?}");

    mode(&files.path("client-key.pem"), 0o644);
    let wide = run(&mut agents(&world.url("localhost"), "ca.pem"));
    assert_eq!(wide.code(), 6, "{wide:?}");
    assert!(wide.err.contains("has mode 0644") && wide.err.contains("chmod 600"), "{wide:?}");
}

/// A server with this certificate, which shakes hands with everybody and says nothing more; its port.
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

async fn to(port: u16, ca: &Path) -> TransportError {
    let options = AmqpOptions::new(&format!("amqps://127.0.0.1:{port}")).unwrap().tls(Tls::new(ca));
    AmqpTransport::connect(options.connect_timeout(PATIENCE)).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn s14_a_brokers_bad_certificate_is_refused_whatever_the_rest() {
    let files = Files::new();
    let ca = ca("broker CA");
    let path = files.certificate("ca", &ca);
    let good = || leaf("broker", "IP:127.0.0.1");
    // Told apart from a refusal: the handshake is good, and then there is no AMQP.
    let answer = to(server(&good().signed_by(&ca)), &path).await;
    assert!(matches!(answer, TransportError::Unreachable(_)), "{answer:?}");
    assert_tls(&to(server(&expired(good()).signed_by(&ca)), &path).await, "certificate has expired");
    assert_tls(&to(server(&good().self_signed()), &path).await, "certificate is refused here");
    let client_only = good().set(Nid::EXT_KEY_USAGE, "clientAuth").signed_by(&ca);
    assert_tls(&to(server(&client_only), &path).await, "certificate is refused here");
    let impostor = self::ca("broker CA");
    assert_tls(&to(server(&good().signed_by(&impostor)), &path).await, "certificate is refused here");
    let other_host = leaf("127.0.0.1", "DNS:example.org").signed_by(&ca);
    assert_tls(&to(server(&other_host), &path).await, "mismatch");
}

#[tokio::test(flavor = "multi_thread")]
async fn s14_without_tls_at_the_other_end_there_is_no_connection() {
    let files = Files::new();
    let path = files.certificate("ca", &ca("broker CA"));
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut start = [0; 4];
        stream.read_exact(&mut start).unwrap();
        // As a broker answers who does not speak AMQP to it.
        stream.write_all(b"AMQP\x00\x00\x09\x01").unwrap();
        start
    });
    let error = to(port, &path).await;
    assert_tls(&error, "handshake failed");
    assert_eq!(heard.join().unwrap()[0], 0x16, "a handshake, and no word of AMQP");
    let none = to(port, &files.path("none.pem")).await;
    assert!(matches!(&none, TransportError::TlsFile { path, .. } if path.ends_with("none.pem")), "{none:?}");
    std::fs::write(files.path("empty.pem"), "").unwrap();
    let empty = to(port, &files.path("empty.pem")).await;
    assert!(matches!(&empty, TransportError::TlsFile { .. }), "{empty:?}");
    let unset = AmqpTransport::connect(AmqpOptions::new("amqps://127.0.0.1:1").unwrap()).await.unwrap_err();
    assert!(matches!(unset, TransportError::Address(_)), "{unset:?}");
}
