//! s18: a hostile broker against the real program, in a process of its own. Whatever the broker sends, the memory of a node stays
//! below a bound, its log says why it ended a connection, and it reconnects, with growing delays.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::harness::fake_broker::{
    BODY, CONTENT_HEADER, Client, FakeBroker, Frame, METHOD, content_header, frame, long, method, short,
};
use crate::harness::program::Running;
use crate::harness::site::{Offline, ready, wait_until};

/// The most memory that a node may ever have used, in KiB. None of these attacks sends a message that a node accepts.
const MAX_MEMORY_KIB: u64 = 96 * 1024;
/// How much an attack sends at most, in bytes.
const ATTACK_BYTES: u64 = 512 * 1024 * 1024;
/// How long one attack takes at most.
const ATTACK_TIME: Duration = Duration::from_secs(2);

/// The most memory that a process has used so far, in KiB.
fn peak_memory(process: &Running) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Sends the same bytes until the client disconnects, or much has been sent.
fn send_repeatedly(client: &mut Client, mut next: impl FnMut(&mut Client) -> Vec<u8>) -> io::Result<()> {
    let (mut sent, end) = (0, Instant::now() + ATTACK_TIME);
    while sent < ATTACK_BYTES && Instant::now() < end {
        let bytes = next(client);
        sent += bytes.len() as u64;
        client.send(&bytes)?;
    }
    client.disconnect()
}

/// Runs an agent at a broker that does this, until it has connected often enough. Then the broker behaves, and the agent recovers.
fn run_agent(
    expected: &str,
    connections: usize,
    attack: impl Fn(&mut Client, &Frame) -> io::Result<()> + Send + Sync + 'static,
) {
    run_agent_at(&FakeBroker::start(attack), expected, connections);
}

fn run_agent_at(broker: &FakeBroker, expected: &str, connections: usize) {
    let site = Offline::new(&["agent fred"]);
    let mut command = site.nanite(["agent", "--token", "fred", "--concurrency", "64", "--certs", "certs"]);
    let agent = ready(command.env("NANITE_BROKER", broker.url()));
    broker.attack();
    let connections = connections + 1;
    wait_until("the agent has connected often and said why", || {
        let peak = peak_memory(&agent);
        assert!(peak < MAX_MEMORY_KIB, "the agent has used {peak} KiB: {:?}", agent.output());
        broker.connected().len() >= connections && agent.output().1.contains(expected)
    });
    let connected = broker.connected();
    let (first, last) = (connected[1], connected[connections - 1]);
    let least = Duration::from_millis(50) * u32::try_from(connections - 2).unwrap();
    assert!(last - first >= least, "{connections} connections within {:?}", last - first);
    broker.behave();
    let reconnected = |agent: &Running| agent.output().1.matches("reconnected to the broker").count();
    let before = reconnected(&agent);
    broker.disconnect();
    wait_until("the agent reconnects", || reconnected(&agent) > before);
    let (_, log) = agent.output();
    assert!(log.lines().count() < 100, "the log is long:\n{log}");
    assert!(!log.contains("panicked"), "{log}");
    let peak = peak_memory(&agent);
    assert!(peak < MAX_MEMORY_KIB, "the agent has used {peak} KiB");
}

/// Whether the client has begun to consume: the attack begins.
fn consumes(frame: &Frame) -> bool {
    frame.method() == Some((60, 20))
}

/// Whether the client has opened a channel to publish on.
fn publishes(frame: &Frame) -> bool {
    frame.method() == Some((85, 10))
}

fn body(channel: u16) -> Vec<u8> {
    frame(BODY, channel, &[b'x'; 32 * 1024 - 8])
}

#[test]
fn s18_announced_body_of_one_tebibyte_ends_the_connection() {
    run_agent("the broker announced a message of 1099511627776 bytes", 3, |client, received| {
        if !consumes(received) {
            return Ok(());
        }
        let announced = [
            client.deliver(received.channel),
            frame(CONTENT_HEADER, received.channel, &content_header(1 << 40, 0, &[])),
        ];
        client.send(&announced.concat())?;
        let body = body(received.channel);
        send_repeatedly(client, |_| body.clone())
    });
}

#[test]
fn s18_body_over_the_limit_is_dropped_without_being_held() {
    run_agent("dropped a message that is too large", 1, |client, received| {
        if !consumes(received) {
            return Ok(());
        }
        let length: u64 = 4_096 * (32 * 1024 - 8);
        let header = frame(CONTENT_HEADER, received.channel, &content_header(length, 0, &[]));
        let start = [client.deliver(received.channel), header].concat();
        client.send(&start)?;
        let body = body(received.channel);
        for _ in 0..4_096 {
            client.send(&body)?;
        }
        client.disconnect()
    });
}

#[test]
fn s18_deliveries_beyond_the_prefetch_end_the_connection() {
    run_agent("messages before they were acknowledged", 3, |client, received| {
        if !consumes(received) {
            return Ok(());
        }
        send_repeatedly(client, |client| {
            let header = frame(CONTENT_HEADER, received.channel, &content_header(1_000, 0, &[]));
            [client.deliver(received.channel), header, frame(BODY, received.channel, &[b'x'; 1_000])].concat()
        })
    });
}

#[test]
fn s18_deliveries_without_content_end_the_connection() {
    run_agent("the broker sent a frame out of order", 3, |client, received| {
        if !consumes(received) {
            return Ok(());
        }
        send_repeatedly(client, |client| client.deliver(received.channel))
    });
}

#[test]
fn s18_returned_messages_that_were_not_published_end_the_connection() {
    run_agent("the broker returned more messages than were published", 3, |client, received| {
        if !publishes(received) {
            return Ok(());
        }
        let fields = [vec![1, 56], short("NO_ROUTE"), short(""), short("key")].concat();
        let channel = received.channel;
        let returned = [
            frame(METHOD, channel, &method(60, 50, &fields)),
            frame(CONTENT_HEADER, channel, &content_header(32 * 1024 - 8, 0, &[])),
            body(channel),
        ]
        .concat();
        send_repeatedly(client, |_| returned.clone())
    });
}

#[test]
fn s18_requests_of_the_broker_without_end_end_the_connection() {
    run_agent("requests without reading the answers", 3, |client, received| {
        if !publishes(received) {
            return Ok(());
        }
        // channel.flow, whose answers are not read.
        let flow = frame(METHOD, received.channel, &method(20, 20, &[1])).repeat(1_000);
        send_repeatedly(client, |_| flow.clone())
    });
}

#[test]
fn s18_notifications_without_end_are_not_held() {
    run_agent("connection to the broker lost", 2, |client, received| {
        if !publishes(received) {
            return Ok(());
        }
        let reason = short(&"x".repeat(255));
        let blocked = frame(METHOD, 0, &method(10, 60, &reason));
        let notices = [blocked.clone(), blocked, frame(METHOD, 0, &method(10, 61, &[])), frame(8, 0, &[])];
        let notices = notices.concat().repeat(100);
        send_repeatedly(client, |_| notices.clone())
    });
}

#[test]
fn s18_cancelled_consumers_start_again_with_growing_delays() {
    let site = Offline::new(&["agent fred"]);
    let broker = FakeBroker::start(|client, received| {
        if !consumes(received) {
            return Ok(());
        }
        let fields = [short("consumer"), vec![1]].concat();
        client.send_method(received.channel, 60, 30, &fields)
    });
    let mut agent =
        ready(site.nanite(["agent", "--token", "fred", "--certs", "certs"]).env("NANITE_BROKER", broker.url()));
    broker.attack();
    agent.wait_for("consuming ended; starting again");
    wait_until("it has consumed often", || agent.output().1.matches("consuming again").count() >= 8);
    let started = Instant::now();
    wait_until("more time has passed", || started.elapsed() > Duration::from_secs(3));
    let count = agent.output().1.matches("consuming again").count();
    assert!(count < 60, "consumed again {count} times in some seconds");
    broker.behave();
    assert_eq!(broker.connected().len(), 2, "the connection stays up");
}

#[test]
fn s18_frames_over_the_negotiated_limit_end_the_connection() {
    run_agent("the broker sent a frame of 2147483656 bytes; the limit is 32768", 3, |client, received| {
        if !consumes(received) {
            return Ok(());
        }
        client.send(&[&[METHOD][..], &received.channel.to_be_bytes(), &(1_u32 << 31).to_be_bytes()].concat())?;
        send_repeatedly(client, |_| vec![b'x'; 64 * 1024])
    });
}

#[test]
fn s18_tables_of_any_depth_and_length_are_not_read() {
    let nested = |levels: usize| {
        let mut table = Vec::new();
        for _ in 0..levels {
            table = [&[b'A'][..], &long(&table)].concat();
        }
        [short("a"), table].concat()
    };
    // Before the login, and in the properties of a message.
    let start = [vec![0, 9], long(&nested(6_000)), long(b"PLAIN"), long(b"en_US")].concat();
    let deep = [long(&nested(25_000)), short("id")].concat();
    let broker = FakeBroker::start_with(&start, move |client, received| {
        if !consumes(received) {
            return Ok(());
        }
        let channel = received.channel;
        let header = frame(CONTENT_HEADER, channel, &content_header(0, 1 << 13 | 1 << 10, &deep));
        let deep = [client.deliver(channel), header].concat();
        client.send(&deep)?;
        // A table of 150 MB.
        let length: u32 = 150_000_000;
        let head = content_header(0, 1 << 13, &length.to_be_bytes());
        let whole = u32::try_from(head.len()).unwrap() + length;
        let start = [
            client.deliver(channel),
            vec![CONTENT_HEADER],
            channel.to_be_bytes().to_vec(),
            whole.to_be_bytes().to_vec(),
            head,
        ];
        client.send(&start.concat())?;
        for _ in 0..150 {
            client.send(&vec![b'x'; 1_000_000])?;
        }
        client.send(&[0xCE])?;
        client.disconnect()
    });
    run_agent_at(&broker, "connection to the broker lost", 2);
}

#[test]
fn s18_a_server_without_amqp_is_named_so() {
    let site = Offline::new(&["agent fred"]);
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("amqp://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        let _ = io::Read::read_to_end(&mut stream, &mut Vec::new());
    });
    let ended = Running::start(site.nanite(["agent", "--token", "fred", "--certs", "certs"]).env("NANITE_BROKER", url));
    let ended = ended.wait();
    assert!(ended.err.contains("the broker does not speak AMQP 0-9-1"), "{ended:?}");
    server.join().unwrap();
}
