//! n24: the examples do what their documentation says, as real processes with RabbitMQ.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use nix::sys::signal::Signal;

use crate::harness::broker::Broker;
use crate::harness::program::{Running, nanite, run};
use crate::harness::site::Site;

/// An example, built as these tests are.
fn example(name: &str) -> Command {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let built = Path::new(env!("CARGO_BIN_EXE_nanite")).parent().unwrap();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--locked", "--quiet", "--examples"]);
        // With the same features the library is built already.
        if cfg!(feature = "admin") {
            build.arg("--all-features");
        }
        build.current_dir(env!("CARGO_MANIFEST_DIR")).arg("--target-dir").arg(built.parent().unwrap());
        if built.ends_with("release") {
            build.arg("--release");
        }
        let output = build.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        built.join("examples")
    });
    let mut command = Command::new(folder.join(name));
    command.env("NO_COLOR", "1").env_remove("NANITE_BROKER");
    command
}

/// A directory of certificates for these nodes, made with the program.
fn certificates(nodes: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let certs = |arguments: &[&str]| {
        let ended = run(nanite(["certs"]).args(arguments).arg("--dir").arg(dir.path()));
        assert_eq!(ended.code(), 0, "{ended:?}");
    };
    certs(&["init", "--domain", "example.org"]);
    for (role, name) in nodes {
        certs(&["issue", role, name]);
    }
    dir
}

#[test]
fn n24_simple_runs_in_memory_and_with_rabbitmq() {
    let expected = "/simple/echo: nanite-fred says \"hello\"\n/simple/sum: nanite-fred says 42\n\
                    /simple/sum: nanite-fred fails: bad_payload\n\
                    /simple/count: nanite-fred counted 1\n/simple/count: nanite-fred counted 2\n\
                    /simple/count: nanite-fred counted 3\n/simple/count: nanite-fred says \"done\"\n";
    let in_memory = run(&mut example("simple"));
    assert_eq!((in_memory.code(), in_memory.out.as_str()), (0, expected), "{}", in_memory.err);
    let broker = Broker::shared();
    let through_rabbitmq = run(example("simple").env("NANITE_BROKER", broker.url()));
    assert_eq!((through_rabbitmq.code(), through_rabbitmq.out.as_str()), (0, expected), "{}", through_rabbitmq.err);
}

/// The Rust programs in the README.
fn readme_programs() -> Vec<String> {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let blocks = readme.split("```rust").skip(1).filter_map(|rest| rest.split_once('\n')?.1.split_once("```"));
    blocks.map(|(program, _)| program.to_owned()).filter(|program| program.contains("fn main()")).collect()
}

#[test]
fn u09_readme_programs_run_as_printed() {
    let programs = readme_programs();
    for file in ["agent", "mapper"] {
        let path = format!("{}/examples/front_door/{file}.rs", env!("CARGO_MANIFEST_DIR"));
        let source = std::fs::read_to_string(path).unwrap();
        let program = source.split_once("\n\n").unwrap().1.split("\n// Beyond the README").next().unwrap();
        let printed = program.replace("&broker()", "\"amqp://localhost\"");
        assert!(programs.contains(&printed), "the README does not print this program:\n{printed}");
        assert!(printed.lines().count() <= 10, "at most ten lines");
    }
    let broker = Broker::shared();
    let dir = tempfile::tempdir().unwrap();
    let certs = certificates(&[("agent", "fred"), ("mapper", "desk")]);
    std::os::unix::fs::symlink(certs.path(), dir.path().join("certs")).unwrap();
    let program = |name: &str| {
        let mut program = example(name);
        program.current_dir(dir.path()).env("NANITE_BROKER", broker.url());
        program
    };
    let agent = Running::start(&mut program("front_door_agent"));
    let mapper = run(&mut program("front_door_mapper"));
    assert_eq!(mapper.code(), 0, "{mapper:?}");
    assert_eq!(mapper.out, "{\"results\":{\"nanite-fred\":\"HELLO\"},\"failures\":{}}\n");
    agent.signal(Signal::SIGINT);
    let agent = agent.wait();
    assert_eq!(agent.code(), 0, "{agent:?}");
}

#[test]
fn n24_secure_agents_and_mapper_run_as_processes() {
    let broker = Broker::shared();
    let dir = certificates(&[("agent", "fred"), ("agent", "bob"), ("mapper", "desk")]);
    // Of the same domain and on the same broker, but of another CA: its messages are refused.
    let others = certificates(&[("agent", "eve")]);
    let start = |dir: &tempfile::TempDir, name| {
        let mut agent =
            Running::start(example("secure_agent").arg(dir.path()).arg(name).env("NANITE_BROKER", broker.url()));
        agent.wait_for("is ready");
        agent
    };
    let (mut eve, fred, bob) = (start(&others, "eve"), start(&dir, "fred"), start(&dir, "bob"));
    let mapper = run(example("secure_mapper").arg(dir.path()).arg("desk").env("NANITE_BROKER", broker.url()));
    assert_eq!(mapper.code(), 0, "{mapper:?}");
    for agent in ["nanite-bob", "nanite-fred"] {
        let said: Vec<&str> = mapper.out.lines().filter_map(|line| line.strip_prefix(agent)).collect();
        assert_eq!(said, [" added \"bolts\"", " added \"a hammer\"", " answers {\"cents\":2479}"], "{mapper:?}");
    }
    assert!(!mapper.out.contains("eve"), "{mapper:?}");
    // The mapper's certificate is not issued by the CA that it trusts.
    eve.wait_for("BadCertificate");
    for agent in [&fred, &bob, &eve] {
        agent.signal(Signal::SIGINT);
    }
    for (agent, orders) in [(fred, 1), (bob, 1), (eve, 0)] {
        let ended = agent.wait();
        assert_eq!(ended.code(), 0, "{ended:?}");
        assert_eq!(ended.out.matches("an order of 2 lines from mapper-desk").count(), orders, "{ended:?}");
    }
}

#[test]
fn n24_custom_certificate_store() {
    let ended = run(&mut example("custom_store"));
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.out.ends_with("opened: the same packet, signed by mapper-control\n"), "{ended:?}");
}

#[test]
fn n24_examples_report_missing_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let ended = run(example("secure_agent").arg(dir.path()).arg("fred"));
    assert_eq!(ended.code(), 1);
    assert!(ended.err.contains("nanite-fred"), "{ended:?}");
    let ended = run(&mut example("secure_mapper"));
    assert!(ended.err.contains("DIRECTORY NAME"), "{ended:?}");
}

#[test]
fn n24_client_agent_sends_requests_with_own_identity() {
    let broker = Broker::shared();
    let ended = run(example("client_agent").env("NANITE_BROKER", broker.url()));
    assert_eq!(ended.code(), 0, "{ended:?}");
    let mut lines: Vec<&str> = ended.out.lines().collect();
    lines.sort_unstable();
    let asked = ["cellar: nanite-cook asks for onions", "fridge: nanite-cook asks for onions"];
    assert_eq!(lines, [asked[0], asked[1], "nanite-cook: \"soup of 12 onions\""]);
}

#[test]
fn n24_custom_selector_and_status() {
    let ended = run(&mut example("selector_status"));
    assert_eq!((ended.code(), ended.out.as_str()), (0, "nanite-b: \"backup.tar is stored\"\n"), "{ended:?}");
}

#[test]
fn n24_file_broadcast() {
    let ended = run(example("file_broadcast").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")));
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!(ended.out.lines().last(), Some("2 have it, 0 do not"), "{ended:?}");
    assert_eq!(ended.out.matches("has come from mapper-m").count(), 2, "{ended:?}");
}

#[test]
fn n24_crew_distributes_requests() {
    let broker = Broker::shared();
    let ended = run(example("crew").args(["8", "40"]).env("NANITE_BROKER", broker.url()));
    assert_eq!(ended.code(), 0, "{ended:?}");
    let rr = ended.out.lines().find(|line| line.starts_with("rr:")).unwrap();
    assert!(rr.starts_with("rr: 40 answers from 8 agents, 5 to 5 each"), "{rr}");
}

#[cfg(feature = "admin")]
#[test]
fn n24_http_front_forwards_requests_to_agents() {
    use std::io::{Read, Write};
    let mut front = Running::start(&mut example("http_front"));
    front.wait_for("http://127.0.0.1:");
    let (out, _) = front.output();
    let address = out.trim().strip_prefix("http://").unwrap().to_owned();
    let ask = |path: &str, body: &str| {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(crate::harness::WAIT_TIMEOUT)).unwrap();
        let length = body.len();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().to_owned(), body.to_owned())
    };
    assert_eq!(ask("/text/upper", "\"hello\""), ("200".into(), "\"HELLO\"".into()));
    assert_eq!(ask("/text/upper", "7").0, "422");
    assert_eq!(ask("/no/such", "null").0, "404");
    front.signal(Signal::SIGINT);
    assert_eq!(front.wait().code(), 0);
}

#[test]
fn n24_rabbitmqctl_service_lists_queues() {
    let site = Site::new(&["agent keeper", "mapper desk"]);
    let program = include_str!("../../examples/rabbitmqctl/rabbitmq/queues");
    site.write("actors/rabbitmq/queues", program, 0o755);
    site.write("actors/rabbitmq/rabbitmq.env", &site.broker.ctl_environment(), 0o600);
    let _keeper = site.agent("keeper", &[]);
    let ask = |vhost: &str| {
        site.run(&["request", "/rabbitmq/queues", vhost, "--token", "desk", "--look", "60s", "--timeout", "60s"])
    };
    let answered = ask(site.broker.vhost());
    assert_eq!(answered.code(), 0, "{answered:?}");
    let queues: serde_json::Value = serde_json::from_str(&answered.out).unwrap();
    let names: Vec<&str> = queues.as_array().unwrap().iter().map(|queue| queue["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"nanite-keeper"), "{names:?}");
    let refused = ask("--formatter=erlang; id");
    assert!(refused.err.contains("no name of a virtual host"), "{refused:?}");
}
