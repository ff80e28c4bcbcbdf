//! RabbitMQ only: what goes wrong between a client and a broker, and what becomes of messages then.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use nanite::transport::{AmqpOptions, AmqpTransport, MAX_BODY, PublishRequest, Transport, TransportError};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::harness::broker::Broker;
use crate::harness::program::{nanite, run};
use crate::harness::proxy::Proxy;
use crate::harness::{PATIENCE, wait_until};
use crate::transport::{bound, durable, exclusive, next, take, text, to_exchange, to_queue};

/// Publishes and consumes without pause, and keeps account.
#[derive(Debug)]
struct Traffic {
    shared: Arc<Account>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Account {
    stop: AtomicBool,
    count: AtomicU64,
    confirmed: Mutex<BTreeSet<u64>>,
    refused: Mutex<Vec<TransportError>>,
    received: Mutex<BTreeSet<u64>>,
    redelivered: AtomicU64,
}

impl Traffic {
    async fn start(publishing: &Arc<AmqpTransport>, consuming: &Arc<AmqpTransport>) -> Self {
        let shared = Arc::new(Account::default());
        let mut consumer = consuming.consume(&durable("work"), 50).await.unwrap();
        let account = Arc::clone(&shared);
        let mut tasks = vec![tokio::spawn(async move {
            while let Some(delivery) = consumer.next().await {
                account.received.lock().unwrap().insert(text(&delivery).parse().unwrap());
                account.redelivered.fetch_add(delivery.redelivered.into(), Ordering::Relaxed);
                // When it cannot be acknowledged any more it comes again.
                let _ = delivery.acker.ack().await;
            }
        })];
        for _ in 0..20 {
            let account = Arc::clone(&shared);
            let transport = Arc::clone(publishing);
            tasks.push(tokio::spawn(async move {
                while !account.stop.load(Ordering::Relaxed) {
                    let number = account.count.fetch_add(1, Ordering::Relaxed);
                    match transport.publish(to_queue("work", number.to_string()), PATIENCE).await {
                        Ok(()) => drop(account.confirmed.lock().unwrap().insert(number)),
                        Err(error) => account.refused.lock().unwrap().push(error),
                    }
                }
            }));
        }
        Self { shared, tasks }
    }

    fn confirmed(&self) -> usize {
        self.shared.confirmed.lock().unwrap().len()
    }

    /// Waits until more has gone through in both directions.
    async fn flows(&self) {
        let received = || self.shared.received.lock().unwrap().len();
        let (confirmed, taken) = (self.confirmed(), received());
        wait_until("messages flow", async || self.confirmed() > confirmed + 200 && received() > taken + 200).await;
    }

    /// Stops, and holds that every message that was confirmed has been received.
    async fn settle(mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for publisher in self.tasks.drain(1..) {
            publisher.await.unwrap();
        }
        let refused = self.shared.refused.lock().unwrap().clone();
        assert!(refused.is_empty(), "every publish had the time to succeed: {refused:?}");
        let confirmed = self.shared.confirmed.lock().unwrap().clone();
        let received = || self.shared.received.lock().unwrap();
        wait_until("every confirmed message is received", async || confirmed.is_subset(&received())).await;
        self.tasks[0].abort();
    }
}

async fn connected(broker: &Broker) -> Arc<AmqpTransport> {
    Arc::new(broker.connect().await)
}

#[tokio::test]
async fn a_wrong_password_is_told_apart_and_never_shown() {
    let broker = Broker::shared();
    let user = broker.add_user("right-secret");
    let connect = |url: String| async move { AmqpTransport::connect(AmqpOptions::new(&url).unwrap()).await };
    let error = connect(broker.url_for(&user, "wrong-secret")).await.unwrap_err();
    assert_eq!(error, TransportError::Credentials);
    assert!(!error.is_retryable());
    let error = connect(broker.url_for(&user, "right-secret")).await.unwrap_err();
    assert_eq!(error, TransportError::VirtualHost(broker.vhost().into()), "it may not use this virtual host yet");
    broker.permit(&user, "", "", "");
    let transport = connect(broker.url_for(&user, "right-secret")).await.unwrap();
    assert!(!format!("{transport:?} {transport:#?}").contains("secret"));
    let error = connect(format!("amqp://{user}:right-secret@127.0.0.1:{}/none", broker.port())).await.unwrap_err();
    assert_eq!(error, TransportError::VirtualHost("none".into()));
    assert!(!error.is_retryable());
}

#[test]
fn a_password_is_in_no_log_however_much_is_logged() {
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
async fn an_unreachable_broker_is_an_error_at_once() {
    let free = TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap().port();
    for host in [&format!("127.0.0.1:{free}"), "no-such-host.invalid"] {
        let options = AmqpOptions::new(&format!("amqp://user:secret@{host}")).unwrap();
        let error = AmqpTransport::connect(options).await.unwrap_err();
        assert!(matches!(error, TransportError::Unreachable(_)), "{error:?}");
        assert!(error.is_retryable() && !format!("{error} {error:?}").contains("secret"));
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_or_something_else_is_given_up_and_let_go() {
    for answer in [&b""[..], b"HTTP/1.0 200 OK\r\n\r\n", b"AMQP\0\x01\0\0"] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, answer).await.unwrap();
            // Until the client hangs up.
            let mut read = Vec::new();
            let _ = stream.read_to_end(&mut read).await;
            read
        });
        let options = AmqpOptions::new(&format!("amqp://user:secret@127.0.0.1:{port}")).unwrap();
        let error = AmqpTransport::connect(options.connect_timeout(Duration::from_secs(1))).await.unwrap_err();
        assert!(matches!(error, TransportError::Unreachable(_)), "{error:?}");
        let read = tokio::time::timeout(PATIENCE, server).await.expect("the client hangs up").unwrap();
        assert!(!read.windows(6).any(|window| window == b"secret"), "no password to a server that did not ask for it");
    }
}

#[tokio::test]
async fn the_brokers_tools_show_the_name_of_a_connection() {
    let broker = Broker::shared();
    let _transport = AmqpTransport::connect(broker.options().name("nanite-fred")).await.unwrap();
    wait_until("the name is shown", async || {
        let connections = broker.api("GET", &format!("/api/vhosts/{}/connections", broker.vhost()), &json!(null)).1;
        connections[0]["client_properties"]["connection_name"] == "nanite-fred"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_connections_closed_by_an_operator_come_back_and_lose_nothing() {
    let broker = Broker::shared();
    let (one, two) = (connected(&broker).await, connected(&broker).await);
    let mut own = two.consume(&bound(exclusive("own"), &["news"]), 1).await.unwrap();
    one.declare(&exclusive("waiting")).await.unwrap();
    let traffic = Traffic::start(&one, &two).await;
    for _ in 0..3 {
        traffic.flows().await;
        wait_until("the broker lists both connections", async || broker.connections().len() == 2).await;
        assert_eq!(broker.close_connections(), 2);
    }
    traffic.flows().await;
    // Exclusive queues went with their connection and are there again, bound as before, consumed or not.
    wait_until("its own queue gets the news", async || {
        one.publish(to_exchange("news", "x"), PATIENCE).await.unwrap();
        tokio::time::timeout(Duration::from_millis(100), own.next()).await.is_ok_and(|delivery| delivery.is_some())
    })
    .await;
    wait_until("the queue that waits is declared", async || one.depth("waiting").await == Ok(Some(0))).await;
    traffic.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_a_network_that_is_cut_or_silent_is_noticed() {
    let broker = Broker::shared();
    let proxy = Proxy::to(broker.port()).await;
    let url = broker.url().replace(&format!(":{}/", broker.port()), &format!(":{}/", proxy.port()));
    let options = AmqpOptions::new(&url).unwrap().heartbeat(Duration::from_secs(1));
    let transport = Arc::new(AmqpTransport::connect(options.connect_timeout(Duration::from_secs(2))).await.unwrap());
    let traffic = Traffic::start(&transport, &transport).await;
    traffic.flows().await;
    let connections = proxy.accepted();
    proxy.cut();
    let soon = Duration::from_millis(300);
    let late = transport.publish(to_queue("work", "0"), soon).await;
    assert_eq!(late, Err(TransportError::TimedOut(soon)), "while it is away, publishes wait up to their timeout");
    wait_until("it tries to connect again and again", async || proxy.accepted() > connections + 2).await;
    proxy.mend();
    traffic.flows().await;
    let connections = proxy.accepted();
    // Nothing passes and nobody says so: only the heartbeat tells.
    proxy.silence();
    wait_until("it gives up the silent connection", async || proxy.accepted() > connections).await;
    proxy.mend();
    traffic.flows().await;
    traffic.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_a_broker_that_restarts_or_is_killed_loses_nothing_that_was_confirmed() {
    let mut broker = Broker::private();
    let (one, two) = (connected(&broker).await, connected(&broker).await);
    one.declare(&durable("kept")).await.unwrap();
    for n in 0..100 {
        one.publish(to_queue("kept", n.to_string()), PATIENCE).await.unwrap();
    }
    one.publish(PublishRequest { persistent: false, ..to_queue("kept", "not persistent") }, PATIENCE).await.unwrap();
    let traffic = Traffic::start(&one, &two).await;
    traffic.flows().await;
    tokio::task::block_in_place(|| {
        broker.stop();
        broker.start();
    });
    traffic.flows().await;
    tokio::task::block_in_place(|| {
        broker.kill();
        broker.start();
    });
    traffic.flows().await;
    traffic.settle().await;
    assert_eq!(one.depth("kept").await, Ok(Some(100)));
    let mut consumer = two.consume(&durable("kept"), 10).await.unwrap();
    assert!(take(&mut consumer, 100).await.into_iter().eq((0..100).map(|n| n.to_string())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_d07_a_broker_that_takes_no_messages_hangs_nobody() {
    let broker = Broker::private();
    let transport = connected(&broker).await;
    let traffic = Traffic::start(&transport, &transport).await;
    traffic.flows().await;
    tokio::task::block_in_place(|| broker.ctl(&["set_vm_memory_high_watermark", "0.000001"]));
    let soon = Duration::from_millis(300);
    wait_until("publishes time out", async || {
        transport.publish(to_queue("work", "0"), soon).await == Err(TransportError::TimedOut(soon))
    })
    .await;
    // Far more than may be in flight: those that gave up are forgotten, not hoarded.
    for _ in 0..3 {
        let hopeless = (0..3_000).map(|_| transport.publish(to_queue("work", vec![b'0'; 10_000]), soon));
        assert!(join_all(hopeless).await.into_iter().all(|result| result == Err(TransportError::TimedOut(soon))));
    }
    tokio::task::block_in_place(|| broker.ctl(&["set_vm_memory_high_watermark", "absolute", "1GB"]));
    traffic.flows().await;
    traffic.settle().await;
    transport.close().await;
    let other = connected(&broker).await;
    other.declare(&durable("work")).await.unwrap();
    assert!(other.depth("work").await.unwrap().unwrap() < 100, "what was given up has not been published");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_a_deleted_queue_is_declared_and_consumed_again() {
    let broker = Broker::shared();
    let transport = connected(&broker).await;
    let mut consumer = transport.consume(&bound(durable("q"), &["news"]), 10).await.unwrap();
    transport.publish(to_queue("q", "1"), PATIENCE).await.unwrap();
    let held = next(&mut consumer).await;
    broker.delete_queue("q");
    wait_until("the queue is there again", async || transport.depth("q").await == Ok(Some(0))).await;
    wait_until("it is consumed", async || broker.queue("q")["consumers"] == 1).await;
    assert_eq!(held.acker.ack().await, Err(TransportError::Disconnected), "its message went with the queue");
    transport.publish(to_exchange("news", "2"), PATIENCE).await.unwrap();
    assert_eq!(take(&mut consumer, 1).await, ["2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_of_a_lost_connection_cannot_be_settled_on_the_next_one() {
    let broker = Broker::shared();
    let transport = connected(&broker).await;
    let mut consumer = transport.consume(&durable("q"), 10).await.unwrap();
    for body in ["1", "2", "3"] {
        transport.publish(to_queue("q", body), PATIENCE).await.unwrap();
    }
    let old = [next(&mut consumer).await, next(&mut consumer).await];
    // The third has been delivered and not yet taken.
    wait_until("all are delivered", async || transport.depth("q").await == Ok(Some(0))).await;
    wait_until("the broker lists the connection", async || broker.connections().len() == 1).await;
    let before = broker.connections();
    broker.close_connections();
    wait_until("it has another connection", async || {
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
    wait_until("nothing is left", async || transport.depth("q").await == Ok(Some(0))).await;
}

#[tokio::test]
async fn d01_a_full_queue_refuses_and_says_so() {
    let broker = Broker::shared();
    broker.set_policy(json!({"max-length": 2, "overflow": "reject-publish"}));
    let transport = broker.connect().await;
    transport.declare(&durable("q")).await.unwrap();
    wait_until("the queue is full", async || {
        transport.publish(to_queue("q", "x"), PATIENCE).await == Err(TransportError::Nacked)
    })
    .await;
    assert_eq!(transport.depth("q").await, Ok(Some(2)));
    let mut consumer = transport.consume(&durable("q"), 1).await.unwrap();
    take(&mut consumer, 2).await;
    wait_until("there is room again", async || transport.publish(to_queue("q", "x"), PATIENCE).await == Ok(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publish_that_the_broker_forbids_hurts_no_other() {
    let broker = Broker::shared();
    let owner = broker.connect().await;
    owner.declare(&bound(durable("mine"), &["open", "shut"])).await.unwrap();
    let user = broker.add_user("secret");
    // It may publish to queues by name and to one exchange, and declare nothing.
    broker.permit(&user, "^$", "^(amq.default|open)$", "");
    let options = AmqpOptions::new(&broker.url_for(&user, "secret")).unwrap();
    let transport = AmqpTransport::connect(options).await.unwrap();
    transport.publish(to_exchange("open", "known"), PATIENCE).await.unwrap();
    let publishes = (0..200).map(|n| {
        let message = match n % 50 {
            17 => to_exchange("shut", "x"),
            n if n % 2 == 0 => to_exchange("open", "x"),
            _ => to_queue("mine", "x"),
        };
        transport.publish(message, PATIENCE)
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
    assert!((197..400).contains(&depth), "those in flight beside a forbidden one may be there twice: {depth}");
}

#[tokio::test]
async fn an_exchange_that_was_deleted_is_declared_again() {
    let broker = Broker::shared();
    let transport = broker.connect().await;
    transport.publish(to_exchange("news", "1"), PATIENCE).await.unwrap();
    let (status, _) = broker.api("DELETE", &format!("/api/exchanges/{}/news", broker.vhost()), &json!(null));
    assert_eq!(status, 204);
    transport.publish(to_exchange("news", "2"), PATIENCE).await.unwrap();
    let mut consumer = transport.consume(&bound(durable("q"), &["news"]), 1).await.unwrap();
    transport.publish(to_exchange("news", "3"), PATIENCE).await.unwrap();
    assert_eq!(take(&mut consumer, 1).await, ["3"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_too_large_is_dropped_and_the_next_one_comes() {
    let broker = Broker::shared();
    let transport = broker.connect().await;
    let mut consumer = transport.consume(&durable("q"), 1).await.unwrap();
    // Somebody else's client, with no limit of its own.
    let other = lapin::Connection::connect(&broker.url(), lapin::ConnectionProperties::default()).await.unwrap();
    let channel = other.create_channel().await.unwrap();
    channel.confirm_select(Default::default()).await.unwrap();
    let body = vec![1; MAX_BODY + 1];
    let properties = lapin::BasicProperties::default();
    channel.basic_publish("".into(), "q".into(), Default::default(), &body, properties).await.unwrap().await.unwrap();
    transport.publish(to_queue("q", "small"), PATIENCE).await.unwrap();
    assert_eq!(take(&mut consumer, 1).await, ["small"]);
    drop(consumer);
    wait_until("nothing is left", async || transport.depth("q").await == Ok(Some(0))).await;
}
