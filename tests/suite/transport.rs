//! The guarantees of `Transport`, one by one, with the memory broker and with RabbitMQ.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use nanite::transport::{
    Consumer, Delivery, Destination, DurableOptions, MAX_BODY_BYTES, MemoryBroker, PublishRequest, Queue, Transport,
    TransportError,
};

use crate::harness::broker::Broker;
use crate::harness::{PATIENCE, wait_until};

/// The broker of one test, without any queues.
#[derive(Debug)]
pub enum TestBroker {
    Memory(MemoryBroker),
    Amqp(Broker),
}

impl TestBroker {
    async fn connect(&self) -> Arc<dyn Transport> {
        match self {
            Self::Memory(broker) => Arc::new(broker.connect()),
            Self::Amqp(broker) => Arc::new(broker.connect().await),
        }
    }
}

/// A durable queue that expires when unused.
pub fn durable(name: &str) -> Queue {
    Queue::new(name, DurableOptions::new().expires_after(Duration::from_secs(600)))
}

pub fn to_queue(name: &str, body: impl AsRef<[u8]>) -> PublishRequest {
    message(Destination::queue(name), body)
}

pub fn to_exchange(name: &str, body: impl AsRef<[u8]>) -> PublishRequest {
    message(Destination::exchange(name), body)
}

fn message(destination: Destination, body: impl AsRef<[u8]>) -> PublishRequest {
    PublishRequest::new(destination, body.as_ref()).content_type("text/plain").message_id("0123456789abcdef")
}

pub async fn next(consumer: &mut Consumer) -> Delivery {
    tokio::time::timeout(PATIENCE, consumer.next()).await.expect("a delivery in time").expect("an open consumer")
}

pub fn text(delivery: &Delivery) -> String {
    String::from_utf8(delivery.body.to_vec()).unwrap()
}

/// Receives and acknowledges this many messages, and returns their texts.
pub async fn receive(consumer: &mut Consumer, count: usize) -> Vec<String> {
    let mut received = Vec::new();
    for _ in 0..count {
        let delivery = next(consumer).await;
        received.push(text(&delivery));
        delivery.acker.ack().await.unwrap();
    }
    received
}

async fn wait_for_depth(transport: &dyn Transport, queue: &str, depth: Option<u64>) {
    wait_until(&format!("the depth of {queue} is {depth:?}"), async || transport.depth(queue).await == Ok(depth)).await;
}

macro_rules! for_both {
    ($($(#[$doc:meta])* async fn $name:ident($broker:ident) $body:block)*) => {
        $($(#[$doc])* async fn $name($broker: &TestBroker) $body)*

        mod memory {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(&TestBroker::Memory(MemoryBroker::new())).await;
            })*
        }

        mod amqp {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(&TestBroker::Amqp(Broker::shared())).await;
            })*
        }
    };
}

for_both! {
    async fn delivers_confirmed_messages_unchanged(broker) {
        let transport = broker.connect().await;
        transport.declare(&durable("q")).await.unwrap();
        let every_byte: Vec<u8> = (0..=255).collect();
        let large = vec![7; 1_000_000];
        for body in [&every_byte[..], b"", &large] {
            let message = to_queue("q", body).content_type("application/x-test");
            transport.publish(message, PATIENCE).await.unwrap();
        }
        assert_eq!(transport.depth("q").await, Ok(Some(3)));
        let mut consumer = transport.consume(&durable("q"), 10).await.unwrap();
        for body in [&every_byte[..], b"", &large] {
            let delivery = next(&mut consumer).await;
            assert!(delivery.body[..] == *body);
            assert_eq!((delivery.content_type.as_str(), delivery.redelivered), ("application/x-test", false));
            delivery.acker.ack().await.unwrap();
        }
        drop(consumer);
        wait_for_depth(&*transport, "q", Some(0)).await;
    }

    async fn d01_publish_to_missing_queue_is_unroutable(broker) {
        let transport = broker.connect().await;
        let error = transport.publish(to_queue("nowhere", "x"), PATIENCE).await.unwrap_err();
        assert_eq!(error, TransportError::Unroutable("nowhere".into()));
        assert!(!error.is_retryable());
        transport.declare(&durable("nowhere")).await.unwrap();
        transport.publish(to_queue("nowhere", "x"), PATIENCE).await.unwrap();
    }

    async fn d01_concurrent_publishes_get_their_own_results(broker) {
        let transport = broker.connect().await;
        transport.declare(&durable("here")).await.unwrap();
        for round in 0..20 {
            let publishes = (0..100).map(|n| {
                let queue = if (n + round) % 3 == 0 { "nowhere" } else { "here" };
                // Confirms of transient messages arrive together with those of returned messages.
                let message = to_queue(queue, format!("{n}")).persistent(n % 2 == 0);
                transport.publish(message, PATIENCE)
            });
            for (n, result) in join_all(publishes).await.into_iter().enumerate() {
                let expected = if (n + round) % 3 == 0 {
                    Err(TransportError::Unroutable("nowhere".into()))
                } else {
                    Ok(())
                };
                assert_eq!(result, expected, "message {n} of round {round}");
            }
        }
    }

    async fn exchange_delivers_to_every_bound_queue(broker) {
        let (sender, receiver) = (broker.connect().await, broker.connect().await);
        sender.publish(to_exchange("news", "unrouted"), PATIENCE).await.unwrap();
        let mut one = receiver.consume(&Queue::exclusive("one").bind("news").bind("other"), 10).await.unwrap();
        let mut two = receiver.consume(&durable("two").bind("news"), 10).await.unwrap();
        sender.publish(to_exchange("news", "1"), PATIENCE).await.unwrap();
        sender.publish(to_exchange("other", "2"), PATIENCE).await.unwrap();
        sender.publish(to_exchange("news", "3"), PATIENCE).await.unwrap();
        assert_eq!(receive(&mut one, 3).await, ["1", "2", "3"]);
        assert_eq!(receive(&mut two, 2).await, ["1", "3"]);
    }

    async fn redeclaring_a_queue_adds_bindings(broker) {
        let transport = broker.connect().await;
        transport.declare(&durable("q").bind("a")).await.unwrap();
        transport.declare(&durable("q").bind("b")).await.unwrap();
        transport.publish(to_exchange("a", "1"), PATIENCE).await.unwrap();
        transport.publish(to_exchange("b", "2"), PATIENCE).await.unwrap();
        assert_eq!(transport.depth("q").await, Ok(Some(2)));
    }

    async fn messages_keep_publish_order(broker) {
        let transport = broker.connect().await;
        let mut consumer = transport.consume(&durable("q"), 100).await.unwrap();
        let bodies: Vec<String> = (0..2_000).map(|n| n.to_string()).collect();
        let publishing = async {
            for chunk in bodies.chunks(300) {
                let mut publishes: Vec<_> =
                    chunk.iter().map(|body| transport.publish(to_queue("q", body), PATIENCE)).collect();
                let mut in_flight = Vec::new();
                for mut publish in publishes.drain(..) {
                    match (&mut publish).now_or_never() {
                        Some(result) => result.unwrap(),
                        None => in_flight.push(publish),
                    }
                }
                // The order in which they are polled from now on does not matter.
                for publish in in_flight.into_iter().rev() {
                    publish.await.unwrap();
                }
            }
        };
        let (received, ()) = tokio::join!(receive(&mut consumer, bodies.len()), publishing);
        assert!(received == bodies);
    }

    async fn unacknowledged_messages_are_redelivered_when_the_consumer_ends(broker) {
        let transport = broker.connect().await;
        let mut consumer = transport.consume(&durable("q"), 10).await.unwrap();
        for body in ["1", "2", "3"] {
            transport.publish(to_queue("q", body), PATIENCE).await.unwrap();
        }
        let first = next(&mut consumer).await;
        drop(next(&mut consumer).await);
        // A dropped delivery stays unacknowledged.
        wait_for_depth(&*transport, "q", Some(0)).await;
        drop(consumer);
        wait_for_depth(&*transport, "q", Some(3)).await;
        assert_eq!(first.acker.ack().await, Err(TransportError::Disconnected), "its consumer has ended");
        let mut again = transport.consume(&durable("q"), 10).await.unwrap();
        for body in ["1", "2", "3"] {
            let delivery = next(&mut again).await;
            assert_eq!(text(&delivery), body);
            assert!(delivery.redelivered || body == "3", "{body} was delivered before");
            delivery.acker.ack().await.unwrap();
        }
    }

    async fn requeued_message_keeps_its_position(broker) {
        let transport = broker.connect().await;
        for body in ["1", "2", "3"] {
            transport.declare(&durable("q")).await.unwrap();
            transport.publish(to_queue("q", body), PATIENCE).await.unwrap();
        }
        let mut consumer = transport.consume(&durable("q"), 1).await.unwrap();
        let delivery = next(&mut consumer).await;
        assert!(!delivery.redelivered);
        delivery.acker.requeue().await.unwrap();
        let delivery = next(&mut consumer).await;
        assert_eq!((text(&delivery).as_str(), delivery.redelivered), ("1", true));
        delivery.acker.ack().await.unwrap();
        assert_eq!(receive(&mut consumer, 2).await, ["2", "3"]);
    }

    async fn n15_at_most_prefetch_deliveries_are_unacknowledged(broker) {
        let transport = broker.connect().await;
        transport.declare(&durable("q")).await.unwrap();
        for n in 0..10 {
            transport.publish(to_queue("q", n.to_string()), PATIENCE).await.unwrap();
        }
        let mut consumer = transport.consume(&durable("q"), 3).await.unwrap();
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(next(&mut consumer).await);
        }
        assert_eq!(transport.depth("q").await, Ok(Some(7)), "delivered messages are not ready");
        held.remove(1).acker.ack().await.unwrap();
        assert_eq!(text(&next(&mut consumer).await), "3");
        wait_for_depth(&*transport, "q", Some(6)).await;
        drop(consumer);
        let mut one = transport.consume(&durable("q"), 0).await.unwrap();
        let held = next(&mut one).await;
        wait_for_depth(&*transport, "q", Some(8)).await;
        held.acker.ack().await.unwrap();
        next(&mut one).await;
    }

    async fn consumers_of_one_queue_share_its_messages(broker) {
        let (one, two) = (broker.connect().await, broker.connect().await);
        let mut consumers =
            [one.consume(&durable("q"), 5).await.unwrap(), one.consume(&durable("q"), 5).await.unwrap(), two.consume(&durable("q"), 5).await.unwrap()];
        for n in 0..15 {
            one.publish(to_queue("q", n.to_string()), PATIENCE).await.unwrap();
        }
        let mut seen = BTreeSet::new();
        for consumer in &mut consumers {
            // Nothing is acknowledged until every consumer has its share, so that none receives more.
            let mut held = Vec::new();
            for _ in 0..5 {
                held.push(next(consumer).await);
            }
            for delivery in held {
                assert!(seen.insert(text(&delivery)), "{delivery:?} was delivered twice");
                delivery.acker.ack().await.unwrap();
            }
        }
        assert_eq!(seen.len(), 15);
    }

    async fn exclusive_queue_rejects_other_connections(broker) {
        let (owner, other) = (broker.connect().await, broker.connect().await);
        let mut consumer = owner.consume(&Queue::exclusive("own"), 1).await.unwrap();
        let conflicts = [
            other.declare(&Queue::exclusive("own")).await.unwrap_err(),
            other.consume(&Queue::exclusive("own"), 1).await.unwrap_err(),
            other.depth("own").await.unwrap_err(),
        ];
        for error in conflicts {
            assert!(matches!(&error, TransportError::QueueConflict { queue, .. } if queue == "own"), "{error:?}");
            assert!(!error.is_retryable());
        }
        other.publish(to_queue("own", "hello"), PATIENCE).await.unwrap();
        assert_eq!(receive(&mut consumer, 1).await, ["hello"]);
        owner.close().await;
        wait_until("the queue is deleted with its connection", async || {
            other.publish(to_queue("own", "x"), PATIENCE).await == Err(TransportError::Unroutable("own".into()))
        })
        .await;
        other.declare(&Queue::exclusive("own")).await.unwrap();
    }

    async fn declaring_a_queue_with_other_properties_is_a_conflict(broker) {
        let transport = broker.connect().await;
        transport.declare(&durable("q")).await.unwrap();
        transport.publish(to_queue("q", "kept"), PATIENCE).await.unwrap();
        let other = Queue::durable("q");
        for wrong in [Queue::exclusive("q"), other] {
            let error = transport.declare(&wrong).await.unwrap_err();
            assert!(matches!(&error, TransportError::QueueConflict { queue, .. } if queue == "q"), "{error:?}");
            let error = transport.consume(&wrong, 1).await.unwrap_err();
            assert!(matches!(&error, TransportError::QueueConflict { queue, .. } if queue == "q"), "{error:?}");
        }
        assert_eq!(transport.depth("q").await, Ok(Some(1)));
    }

    async fn durable_queue_survives_its_connection(broker) {
        let first = broker.connect().await;
        first.declare(&durable("q")).await.unwrap();
        first.publish(to_queue("q", "kept"), PATIENCE).await.unwrap();
        first.close().await;
        let second = broker.connect().await;
        let mut consumer = second.consume(&durable("q"), 1).await.unwrap();
        assert_eq!(receive(&mut consumer, 1).await, ["kept"]);
    }

    async fn quorum_queue_redelivers_requeued_messages(broker) {
        let transport = broker.connect().await;
        let quorum = Queue::new("q", DurableOptions::new().quorum(true));
        transport.declare(&quorum).await.unwrap();
        for body in ["1", "2"] {
            transport.publish(to_queue("q", body), PATIENCE).await.unwrap();
        }
        let mut consumer = transport.consume(&quorum, 10).await.unwrap();
        next(&mut consumer).await.acker.requeue().await.unwrap();
        let mut received = Vec::new();
        for _ in 0..2 {
            let delivery = next(&mut consumer).await;
            received.push((text(&delivery), delivery.redelivered));
            delivery.acker.ack().await.unwrap();
        }
        received.sort();
        assert_eq!(received, [("1".to_owned(), true), ("2".to_owned(), false)]);
    }

    async fn ordered_queue_has_one_active_consumer(broker) {
        let transports = [broker.connect().await, broker.connect().await];
        let ordered = Queue::new("q", DurableOptions::new().ordered(true));
        let mut first = transports[0].consume(&ordered, 2).await.unwrap();
        let mut second = transports[1].consume(&ordered, 2).await.unwrap();
        for n in 0..6 {
            transports[0].publish(to_queue("q", n.to_string()), PATIENCE).await.unwrap();
        }
        assert_eq!(receive(&mut first, 3).await, ["0", "1", "2"]);
        drop(first);
        assert_eq!(receive(&mut second, 3).await, ["3", "4", "5"]);
    }

    async fn unused_queue_expires(broker) {
        let transport = broker.connect().await;
        let options = DurableOptions::new().expires_after(Duration::from_millis(200));
        transport.declare(&Queue::new("q", options)).await.unwrap();
        wait_until("the queue is deleted", async || {
            transport.publish(to_queue("q", "x"), PATIENCE).await == Err(TransportError::Unroutable("q".into()))
        })
        .await;
        assert_eq!(transport.depth("q").await, Ok(None));
    }

    async fn message_expires(broker) {
        let transport = broker.connect().await;
        transport.declare(&durable("q")).await.unwrap();
        let short = to_queue("q", "short").expires_in(Duration::from_millis(50));
        transport.publish(short, PATIENCE).await.unwrap();
        let long = to_queue("q", "long").expires_in(Duration::MAX);
        transport.publish(long, PATIENCE).await.unwrap();
        wait_for_depth(&*transport, "q", Some(1)).await;
        let mut consumer = transport.consume(&durable("q"), 1).await.unwrap();
        assert_eq!(receive(&mut consumer, 1).await, ["long"]);
    }

    async fn close_ends_consumers_and_requeues_their_messages(broker) {
        let (transport, other) = (broker.connect().await, broker.connect().await);
        let mut consumer = transport.consume(&durable("q"), 10).await.unwrap();
        for body in ["1", "2", "3"] {
            transport.publish(to_queue("q", body), PATIENCE).await.unwrap();
        }
        let held = next(&mut consumer).await;
        transport.close().await;
        assert!(tokio::time::timeout(PATIENCE, consumer.next()).await.unwrap().is_none());
        assert_eq!(held.acker.ack().await, Err(TransportError::Disconnected));
        wait_for_depth(&*other, "q", Some(3)).await;
        assert_eq!(transport.publish(to_queue("q", "x"), PATIENCE).await, Err(TransportError::Closed));
        assert_eq!(transport.declare(&durable("q")).await, Err(TransportError::Closed));
        assert_eq!(transport.depth("q").await, Err(TransportError::Closed));
        assert_eq!(transport.consume(&durable("q"), 1).await.unwrap_err(), TransportError::Closed);
        transport.close().await;
    }

    async fn dropping_a_transport_closes_it(broker) {
        let (transport, other) = (broker.connect().await, broker.connect().await);
        let mut consumer = transport.consume(&Queue::exclusive("own").bind("e"), 1).await.unwrap();
        drop(transport);
        assert!(tokio::time::timeout(PATIENCE, consumer.next()).await.unwrap().is_none());
        wait_for_depth(&*other, "own", None).await;
    }

    async fn rejects_invalid_names(broker) {
        let transport = broker.connect().await;
        for name in ["", "amq.mine", &"x".repeat(256)] {
            let refused = Err(TransportError::Name(name.into()));
            assert_eq!(transport.declare(&durable(name)).await, refused);
            assert_eq!(transport.declare(&durable("q").bind(name)).await, refused);
            assert_eq!(transport.consume(&durable(name), 1).await.map(drop), refused);
            assert_eq!(transport.depth(name).await.map(drop), refused);
            assert_eq!(transport.publish(to_queue(name, "x"), PATIENCE).await, refused);
            assert_eq!(transport.publish(to_exchange(name, "x"), PATIENCE).await, refused);
        }
        let name = "ü".repeat(127);
        transport.declare(&durable(&name)).await.unwrap();
        transport.publish(to_queue(&name, "x"), PATIENCE).await.unwrap();
    }

    async fn rejects_bodies_over_the_limit(broker) {
        let transport = broker.connect().await;
        let mut consumer = transport.consume(&durable("q"), 1).await.unwrap();
        let too_large = transport.publish(to_queue("q", vec![1; MAX_BODY_BYTES + 1]), PATIENCE).await;
        assert_eq!(too_large, Err(TransportError::TooLarge { length: MAX_BODY_BYTES + 1, limit: MAX_BODY_BYTES }));
        transport.publish(to_queue("q", vec![2; MAX_BODY_BYTES]), PATIENCE).await.unwrap();
        let delivery = next(&mut consumer).await;
        assert!(delivery.body.len() == MAX_BODY_BYTES && delivery.body.iter().all(|byte| *byte == 2));
        delivery.acker.ack().await.unwrap();
    }

    async fn consumer_next_is_cancel_safe(broker) {
        let transport = broker.connect().await;
        let mut consumer = transport.consume(&durable("q"), 10).await.unwrap();
        let publishing = async {
            for n in 0..200 {
                transport.publish(to_queue("q", n.to_string()), PATIENCE).await.unwrap();
            }
        };
        tokio::pin!(publishing);
        let mut received = Vec::new();
        let mut published = false;
        while received.len() < 200 {
            tokio::select! {
                biased;
                () = tokio::task::yield_now() => {}
                () = &mut publishing, if !published => published = true,
                delivery = consumer.next() => {
                    let delivery = delivery.unwrap();
                    received.push(text(&delivery));
                    delivery.acker.ack().await.unwrap();
                }
            }
        }
        assert!(received.into_iter().eq((0..200).map(|n| n.to_string())));
    }
}
