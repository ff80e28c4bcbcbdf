//! RabbitMQ only: failures between a client and a broker, and what happens to messages then.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use nanite::transport::{AmqpOptions, AmqpTransport, MAX_BODY_BYTES, Queue, Transport, TransportError};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::harness::broker::{Broker, free_port};
use crate::harness::program::{nanite, run};
use crate::harness::proxy::Proxy;
use crate::harness::{WAIT_TIMEOUT, wait_until};
use crate::transport::{durable, next, receive, text, to_exchange, to_queue};

/// How long each publish of the traffic may take: longer than a broker is stopped, blocked or restarted, on a busy machine too.
const TRAFFIC_TIMEOUT: Duration = Duration::from_secs(300);

/// Publishes and consumes without pause, and records the results.
#[derive(Debug)]
struct Traffic {
    record: Arc<Record>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Record {
    stop: AtomicBool,
    count: AtomicU64,
    confirmed: Mutex<BTreeSet<u64>>,
    failed: Mutex<Vec<TransportError>>,
    received: Mutex<BTreeSet<u64>>,
    redelivered: AtomicU64,
}

impl Traffic {
    async fn start(publishing: &Arc<AmqpTransport>, consuming: &Arc<AmqpTransport>) -> Self {
        let record = Arc::new(Record::default());
        let mut consumer = consuming.consume(&durable("work"), 50).await.unwrap();
        let results = Arc::clone(&record);
        let mut tasks = vec![tokio::spawn(async move {
            while let Some(delivery) = consumer.next().await {
                results.received.lock().unwrap().insert(text(&delivery).parse().unwrap());
                results.redelivered.fetch_add(delivery.redelivered.into(), Ordering::Relaxed);
                // If this fails, the message is delivered again.
                let _ = delivery.acker.ack().await;
            }
        })];
        for _ in 0..20 {
            let results = Arc::clone(&record);
            let transport = Arc::clone(publishing);
            tasks.push(tokio::spawn(async move {
                while !results.stop.load(Ordering::Relaxed) {
                    let number = results.count.fetch_add(1, Ordering::Relaxed);
                    match transport.publish(to_queue("work", number.to_string()), TRAFFIC_TIMEOUT).await {
                        Ok(()) => drop(results.confirmed.lock().unwrap().insert(number)),
                        Err(error) => results.failed.lock().unwrap().push(error),
                    }
                }
            }));
        }
        Self { record, tasks }
    }

    fn confirmed(&self) -> usize {
        self.record.confirmed.lock().unwrap().len()
    }

    /// Waits until more messages were confirmed and received.
    async fn wait_for_flow(&self) {
        let received = || self.record.received.lock().unwrap().len();
        let (confirmed, before) = (self.confirmed(), received());
        wait_until("messages flow", async || self.confirmed() > confirmed + 200 && received() > before + 200).await;
    }

    /// Stops, and checks that every confirmed message has been received.
    async fn finish(mut self) {
        self.record.stop.store(true, Ordering::Relaxed);
        for publisher in self.tasks.drain(1..) {
            publisher.await.unwrap();
        }
        let failed = self.record.failed.lock().unwrap().clone();
        assert!(failed.is_empty(), "every publish had enough time to succeed: {failed:?}");
        let confirmed = self.record.confirmed.lock().unwrap().clone();
        let received = || self.record.received.lock().unwrap();
        wait_until("every confirmed message is received", async || confirmed.is_subset(&received())).await;
        self.tasks[0].abort();
    }
}

async fn connect(broker: &Broker) -> Arc<AmqpTransport> {
    Arc::new(broker.connect().await)
}

#[tokio::test]
async fn reports_wrong_credentials_and_virtual_host_without_the_password() {
    let broker = Broker::shared();
    let user = broker.add_user("right-secret");
    let connect_to = |url: String| async move { AmqpTransport::connect(AmqpOptions::new(&url).unwrap()).await };
    let error = connect_to(broker.url_for(&user, "wrong-secret")).await.unwrap_err();
    assert_eq!(error, TransportError::Credentials);
    assert!(!error.is_retryable());
    let error = connect_to(broker.url_for(&user, "right-secret")).await.unwrap_err();
    assert_eq!(error, TransportError::VirtualHost(broker.vhost().into()), "no permission for this virtual host yet");
    broker.permit(&user, "", "", "");
    let transport = connect_to(broker.url_for(&user, "right-secret")).await.unwrap();
    assert!(!format!("{transport:?} {transport:#?}").contains("secret"));
    let error = connect_to(format!("amqp://{user}:right-secret@127.0.0.1:{}/none", broker.port())).await.unwrap_err();
    assert_eq!(error, TransportError::VirtualHost("none".into()));
    assert!(!error.is_retryable());
}

#[test]
fn password_is_never_logged() {
    let broker = Broker::shared();
    let user = broker.add_user("Zq8-secret");
    broker.permit(&user, ".*", ".*", ".*");
    for filter in ["trace", "lapin=trace", "lapin::io_loop=trace,trace"] {
        let mut agents = nanite(["agents", "--insecure-plaintext", "--token", "desk", "--log", filter]);
        let ended = run(agents.env("NANITE_BROKER", broker.url_for(&user, "Zq8-secret")));
        let as_numbers = "Zq8-secret".bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
        assert_eq!(ended.code(), 0, "{ended:?}");
        for output in [&ended.out, &ended.err] {
            assert!(!output.contains("Zq8") && !output.contains(&as_numbers), "{filter}: {output}");
        }
        assert_eq!(ended.err.contains("TRACE"), filter.ends_with(",trace") || filter == "trace", "{filter}");
    }
}

#[tokio::test]
async fn unreachable_broker_is_an_error() {
    for host in [&format!("127.0.0.1:{}", free_port()), "no-such-host.invalid"] {
        let options = AmqpOptions::new(&format!("amqp://user:secret@{host}")).unwrap();
        let error = AmqpTransport::connect(options).await.unwrap_err();
        assert!(matches!(error, TransportError::Unreachable(_)), "{error:?}");
        assert!(error.is_retryable() && !format!("{error} {error:?}").contains("secret"));
    }
}

#[tokio::test]
async fn connect_times_out_on_a_server_that_is_not_a_broker() {
    for answer in [&b""[..], b"HTTP/1.0 200 OK\r\n\r\n", b"AMQP\0\x01\0\0"] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, answer).await.unwrap();
            // Until the client disconnects.
            let mut read = Vec::new();
            let _ = stream.read_to_end(&mut read).await;
            read
        });
        let options = AmqpOptions::new(&format!("amqp://user:secret@127.0.0.1:{port}")).unwrap();
        let error = AmqpTransport::connect(options.connect_timeout(Duration::from_secs(1))).await.unwrap_err();
        assert!(matches!(error, TransportError::Unreachable(_)), "{error:?}");
        let read = tokio::time::timeout(WAIT_TIMEOUT, server).await.expect("the client disconnects").unwrap();
        assert!(
            !read.windows(6).any(|window| window == b"secret"),
            "the password is not sent before the server asks for it"
        );
    }
}

#[tokio::test]
async fn broker_shows_the_connection_name() {
    let broker = Broker::shared();
    let _transport = AmqpTransport::connect(broker.options().connection_name("nanite-fred")).await.unwrap();
    wait_until("the broker shows the name", async || {
        let connections = broker.api("GET", &format!("/api/vhosts/{}/connections", broker.vhost()), &json!(null)).1;
        connections[0]["client_properties"]["connection_name"] == "nanite-fred"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_reconnects_after_connections_are_closed() {
    let broker = Broker::shared();
    let (one, two) = (connect(&broker).await, connect(&broker).await);
    let mut own = two.consume(&Queue::exclusive("own").bind("news"), 1).await.unwrap();
    one.declare(&Queue::exclusive("waiting")).await.unwrap();
    let traffic = Traffic::start(&one, &two).await;
    for _ in 0..3 {
        traffic.wait_for_flow().await;
        // Its list may be behind.
        wait_until("both connections are closed", async || broker.close_connections() == 2).await;
    }
    traffic.wait_for_flow().await;
    // Exclusive queues were deleted with their connection, and are declared and bound again, consumed or not.
    wait_until("the exclusive queue receives messages", async || {
        one.publish(to_exchange("news", "x"), WAIT_TIMEOUT).await.unwrap();
        tokio::time::timeout(Duration::from_millis(100), own.next()).await.is_ok_and(|delivery| delivery.is_some())
    })
    .await;
    wait_until("the unconsumed queue is declared", async || one.depth("waiting").await == Ok(Some(0))).await;
    traffic.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_reconnects_after_a_broken_or_silent_network() {
    let broker = Broker::shared();
    let proxy = Proxy::to(broker.port()).await;
    let url = broker.url().replace(&format!(":{}/", broker.port()), &format!(":{}/", proxy.port()));
    let options = AmqpOptions::new(&url).unwrap().heartbeat(Duration::from_secs(1));
    let transport = Arc::new(AmqpTransport::connect(options.connect_timeout(Duration::from_secs(10))).await.unwrap());
    let traffic = Traffic::start(&transport, &transport).await;
    traffic.wait_for_flow().await;
    let connections = proxy.accepted();
    proxy.disconnect();
    let timeout = Duration::from_millis(300);
    let late = transport.publish(to_queue("work", "0"), timeout).await;
    assert_eq!(
        late,
        Err(TransportError::TimedOut(timeout)),
        "without a connection, publishes wait up to their timeout"
    );
    wait_until("it retries to connect", async || proxy.accepted() > connections + 2).await;
    proxy.restore();
    traffic.wait_for_flow().await;
    let connections = proxy.accepted();
    // Nothing passes and no connection is closed: only the heartbeat detects it.
    proxy.silence();
    wait_until("it replaces the silent connection", async || proxy.accepted() > connections).await;
    proxy.restore();
    traffic.wait_for_flow().await;
    traffic.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_confirmed_messages_survive_broker_restart_and_kill() {
    let mut broker = Broker::private();
    let (one, two) = (connect(&broker).await, connect(&broker).await);
    one.declare(&durable("kept")).await.unwrap();
    for n in 0..100 {
        one.publish(to_queue("kept", n.to_string()), WAIT_TIMEOUT).await.unwrap();
    }
    one.publish(to_queue("kept", "not persistent").persistent(false), WAIT_TIMEOUT).await.unwrap();
    let traffic = Traffic::start(&one, &two).await;
    traffic.wait_for_flow().await;
    tokio::task::block_in_place(|| {
        broker.stop();
        broker.start();
    });
    traffic.wait_for_flow().await;
    tokio::task::block_in_place(|| {
        broker.kill();
        broker.start();
    });
    traffic.wait_for_flow().await;
    traffic.finish().await;
    assert_eq!(one.depth("kept").await, Ok(Some(100)));
    let mut consumer = two.consume(&durable("kept"), 10).await.unwrap();
    assert!(receive(&mut consumer, 100).await.into_iter().eq((0..100).map(|n| n.to_string())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_d07_publishes_time_out_while_the_broker_is_blocked() {
    let broker = Broker::private();
    let transport = connect(&broker).await;
    let traffic = Traffic::start(&transport, &transport).await;
    traffic.wait_for_flow().await;
    tokio::task::block_in_place(|| broker.ctl(&["set_vm_memory_high_watermark", "0.000001"]));
    let timeout = Duration::from_millis(300);
    wait_until("publishes time out", async || {
        transport.publish(to_queue("work", "0"), timeout).await == Err(TransportError::TimedOut(timeout))
    })
    .await;
    // Far more than may be in flight: publishes that timed out are dropped, not buffered.
    for _ in 0..3 {
        let timed_out = (0..3_000).map(|_| transport.publish(to_queue("work", vec![b'0'; 10_000]), timeout));
        assert!(join_all(timed_out).await.into_iter().all(|result| result == Err(TransportError::TimedOut(timeout))));
    }
    tokio::task::block_in_place(|| broker.ctl(&["set_vm_memory_high_watermark", "absolute", "1GB"]));
    traffic.wait_for_flow().await;
    traffic.finish().await;
    transport.close().await;
    let other = connect(&broker).await;
    other.declare(&durable("work")).await.unwrap();
    assert!(other.depth("work").await.unwrap().unwrap() < 100, "messages that timed out have not been published");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_redeclares_and_consumes_a_deleted_queue() {
    let broker = Broker::shared();
    let transport = connect(&broker).await;
    let mut consumer = transport.consume(&durable("q").bind("news"), 10).await.unwrap();
    transport.publish(to_queue("q", "1"), WAIT_TIMEOUT).await.unwrap();
    let held = next(&mut consumer).await;
    broker.delete_queue("q");
    wait_until("the queue is declared again", async || transport.depth("q").await == Ok(Some(0))).await;
    wait_until("the queue is consumed", async || broker.queue("q")["consumers"] == 1).await;
    assert_eq!(held.acker.ack().await, Err(TransportError::Disconnected), "its message was deleted with the queue");
    transport.publish(to_exchange("news", "2"), WAIT_TIMEOUT).await.unwrap();
    assert_eq!(receive(&mut consumer, 1).await, ["2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deliveries_of_a_lost_connection_cannot_be_settled() {
    let broker = Broker::shared();
    let transport = connect(&broker).await;
    let mut consumer = transport.consume(&durable("q"), 10).await.unwrap();
    for body in ["1", "2", "3"] {
        transport.publish(to_queue("q", body), WAIT_TIMEOUT).await.unwrap();
    }
    let old = [next(&mut consumer).await, next(&mut consumer).await];
    // The third has been delivered and is still buffered.
    wait_until("all messages are delivered", async || transport.depth("q").await == Ok(Some(0))).await;
    wait_until("the broker lists the connection", async || broker.connections().len() == 1).await;
    let before = broker.connections();
    broker.close_connections();
    wait_until("there is a new connection", async || {
        let now = broker.connections();
        now.len() == 1 && now != before
    })
    .await;
    let mut again = Vec::new();
    for _ in 0..3 {
        again.push(next(&mut consumer).await);
    }
    let [first, second] = old;
    assert_eq!(first.acker.ack().await, Err(TransportError::Disconnected));
    assert_eq!(second.acker.requeue().await, Err(TransportError::Disconnected));
    let seen: Vec<_> = again.iter().map(|delivery| (text(delivery), delivery.redelivered)).collect();
    assert_eq!(seen, [("1".into(), true), ("2".into(), true), ("3".into(), true)]);
    for delivery in again {
        delivery.acker.ack().await.unwrap();
    }
    drop(consumer);
    wait_until("the queue is empty", async || transport.depth("q").await == Ok(Some(0))).await;
}

#[tokio::test]
async fn d01_publish_to_a_full_queue_is_nacked() {
    let broker = Broker::shared();
    broker.set_policy(json!({"max-length": 2, "overflow": "reject-publish"}));
    let transport = broker.connect().await;
    transport.declare(&durable("q")).await.unwrap();
    wait_until("the queue is full", async || {
        transport.publish(to_queue("q", "x"), WAIT_TIMEOUT).await == Err(TransportError::Nacked)
    })
    .await;
    assert_eq!(transport.depth("q").await, Ok(Some(2)));
    let mut consumer = transport.consume(&durable("q"), 1).await.unwrap();
    receive(&mut consumer, 2).await;
    wait_until("the queue has capacity again", async || {
        transport.publish(to_queue("q", "x"), WAIT_TIMEOUT).await == Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forbidden_publish_does_not_affect_others() {
    let broker = Broker::shared();
    let owner = broker.connect().await;
    owner.declare(&durable("mine").bind("open").bind("shut")).await.unwrap();
    let user = broker.add_user("secret");
    // The user may publish to queues and to one exchange, and declare nothing.
    broker.permit(&user, "^$", "^(amq.default|open)$", "");
    let options = AmqpOptions::new(&broker.url_for(&user, "secret")).unwrap();
    let transport = AmqpTransport::connect(options).await.unwrap();
    transport.publish(to_exchange("open", "known"), WAIT_TIMEOUT).await.unwrap();
    let publishes = (0..200).map(|n| {
        let message = match n % 50 {
            17 => to_exchange("shut", "x"),
            n if n % 2 == 0 => to_exchange("open", "x"),
            _ => to_queue("mine", "x"),
        };
        transport.publish(message, WAIT_TIMEOUT)
    });
    for (n, result) in join_all(publishes).await.into_iter().enumerate() {
        match n % 50 {
            17 => assert!(matches!(result, Err(TransportError::Forbidden(_))), "{n}: {result:?}"),
            _ => assert_eq!(result, Ok(()), "{n}"),
        }
    }
    let forbidden = transport.declare(&durable("other")).await.unwrap_err();
    assert!(matches!(forbidden, TransportError::Forbidden(_)) && !forbidden.is_retryable(), "{forbidden:?}");
    let forbidden = transport.consume(&durable("mine"), 1).await.unwrap_err();
    assert!(matches!(forbidden, TransportError::Forbidden(_)), "{forbidden:?}");
    let depth = owner.depth("mine").await.unwrap().unwrap();
    assert!((197..400).contains(&depth), "publishes in flight with a forbidden one may be duplicated: {depth}");
}

#[tokio::test]
async fn redeclares_a_deleted_exchange() {
    let broker = Broker::shared();
    let transport = broker.connect().await;
    transport.publish(to_exchange("news", "1"), WAIT_TIMEOUT).await.unwrap();
    let (status, _) = broker.api("DELETE", &format!("/api/exchanges/{}/news", broker.vhost()), &json!(null));
    assert_eq!(status, 204);
    transport.publish(to_exchange("news", "2"), WAIT_TIMEOUT).await.unwrap();
    let mut consumer = transport.consume(&durable("q").bind("news"), 1).await.unwrap();
    transport.publish(to_exchange("news", "3"), WAIT_TIMEOUT).await.unwrap();
    assert_eq!(receive(&mut consumer, 1).await, ["3"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drops_oversized_message_and_continues() {
    let broker = Broker::shared();
    let transport = broker.connect().await;
    let mut consumer = transport.consume(&durable("q"), 1).await.unwrap();
    // Another client, which has no limit.
    let other = lapin::Connection::connect(&broker.url(), lapin::ConnectionProperties::default()).await.unwrap();
    let channel = other.create_channel().await.unwrap();
    channel.confirm_select(Default::default()).await.unwrap();
    let body = vec![1; MAX_BODY_BYTES + 1];
    let properties = lapin::BasicProperties::default();
    channel.basic_publish("".into(), "q".into(), Default::default(), &body, properties).await.unwrap().await.unwrap();
    transport.publish(to_queue("q", "small"), WAIT_TIMEOUT).await.unwrap();
    assert_eq!(receive(&mut consumer, 1).await, ["small"]);
    drop(consumer);
    wait_until("the queue is empty", async || transport.depth("q").await == Ok(Some(0))).await;
}
