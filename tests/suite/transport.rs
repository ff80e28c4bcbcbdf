//! The contract of `Transport`, sentence by sentence, against the broker in memory and against RabbitMQ.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use nanite::transport::{
    Consumer, Delivery, Destination, Exchange, MAX_BODY, MemoryBroker, PublishRequest, Queue, QueueKind, Transport,
    TransportError,
};

use crate::harness::broker::Broker;
use crate::harness::{PATIENCE, wait_until};

/// Where a test runs: queues of its own, and as many connections as it asks for.
#[derive(Debug)]
pub enum World {
    Memory(MemoryBroker),
    Amqp(Broker),
}

impl World {
    async fn connect(&self) -> Arc<dyn Transport> {
        match self {
            Self::Memory(broker) => Arc::new(broker.connect()),
            Self::Amqp(broker) => Arc::new(broker.connect().await),
        }
    }
}

pub fn durable(name: &str) -> Queue {
    let kind = QueueKind::Durable { expires: Some(Duration::from_secs(600)), quorum: false, ordered: false };
    Queue { name: name.into(), kind, bindings: Vec::new() }
}

pub fn exclusive(name: &str) -> Queue {
    Queue { name: name.into(), kind: QueueKind::Exclusive, bindings: Vec::new() }
}

pub fn bound(queue: Queue, exchanges: &[&str]) -> Queue {
    Queue { bindings: exchanges.iter().map(|name| Exchange((*name).into())).collect(), ..queue }
}

pub fn to_queue(name: &str, body: impl AsRef<[u8]>) -> PublishRequest {
    PublishRequest {
        destination: Destination::Queue(name.into()),
        body: body.as_ref().into(),
        content_type: "text/plain".into(),
        message_id: "0123456789abcdef".into(),
        expires_in: None,
        persistent: true,
    }
}

pub fn to_exchange(name: &str, body: impl AsRef<[u8]>) -> PublishRequest {
    PublishRequest { destination: Destination::Exchange(Exchange(name.into())), ..to_queue("", body) }
}

pub async fn next(consumer: &mut Consumer) -> Delivery {
    tokio::time::timeout(PATIENCE, consumer.next()).await.expect("a delivery in time").expect("an open consumer")
}

pub fn text(delivery: &Delivery) -> String {
    String::from_utf8(delivery.body.to_vec()).unwrap()
}

/// Takes so many messages, acknowledges them, and says what they were.
pub async fn take(consumer: &mut Consumer, count: usize) -> Vec<String> {
    let mut taken = Vec::new();
    for _ in 0..count {
        let delivery = next(consumer).await;
        taken.push(text(&delivery));
        delivery.acker.ack().await.unwrap();
    }
    taken
}

async fn depth_becomes(transport: &dyn Transport, queue: &str, depth: Option<u64>) {
    wait_until(&format!("{queue} holds {depth:?}"), async || transport.depth(queue).await == Ok(depth)).await;
}

macro_rules! for_both {
    ($($(#[$doc:meta])* async fn $name:ident($world:ident) $body:block)*) => {
        $($(#[$doc])* async fn $name($world: &World) $body)*

        mod memory {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(&World::Memory(MemoryBroker::new())).await;
            })*
        }

        mod amqp {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(&World::Amqp(Broker::shared())).await;
            })*
        }
    };
}

for_both! {
    async fn a_confirmed_message_is_in_its_queue_and_comes_as_it_was_sent(world) {
        let transport = world.connect().await;
        transport.declare(&durable("q")).await.unwrap();
        let every_byte: Vec<u8> = (0..=255).collect();
        let large = vec![7; 1_000_000];
        for body in [&every_byte[..], b"", &large] {
            let message = PublishRequest { content_type: "application/x-test".into(), ..to_queue("q", body) };
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
        depth_becomes(&*transport, "q", Some(0)).await;
    }

    async fn d01_no_such_queue_is_an_error_at_once(world) {
        let transport = world.connect().await;
        let error = transport.publish(to_queue("nowhere", "x"), PATIENCE).await.unwrap_err();
        assert_eq!(error, TransportError::Unroutable("nowhere".into()));
        assert!(!error.is_retryable());
        transport.declare(&durable("nowhere")).await.unwrap();
        transport.publish(to_queue("nowhere", "x"), PATIENCE).await.unwrap();
    }

    async fn d01_each_of_many_publishes_at_once_hears_of_its_own_message(world) {
        let transport = world.connect().await;
        transport.declare(&durable("here")).await.unwrap();
        for round in 0..20 {
            let publishes = (0..100).map(|n| {
                let queue = if (n + round) % 3 == 0 { "nowhere" } else { "here" };
                // Routed messages that are not persistent are confirmed together with those that come back.
                let message = PublishRequest { persistent: n % 2 == 0, ..to_queue(queue, format!("{n}")) };
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

    async fn an_exchange_reaches_every_queue_bound_to_it(world) {
        let (sender, receiver) = (world.connect().await, world.connect().await);
        sender.publish(to_exchange("news", "to nobody"), PATIENCE).await.unwrap();
        let mut one = receiver.consume(&bound(exclusive("one"), &["news", "other"]), 10).await.unwrap();
        let mut two = receiver.consume(&bound(durable("two"), &["news"]), 10).await.unwrap();
        sender.publish(to_exchange("news", "1"), PATIENCE).await.unwrap();
        sender.publish(to_exchange("other", "2"), PATIENCE).await.unwrap();
        sender.publish(to_exchange("news", "3"), PATIENCE).await.unwrap();
        assert_eq!(take(&mut one, 3).await, ["1", "2", "3"]);
        assert_eq!(take(&mut two, 2).await, ["1", "3"]);
    }

    async fn declaring_again_adds_bindings(world) {
        let transport = world.connect().await;
        transport.declare(&bound(durable("q"), &["a"])).await.unwrap();
        transport.declare(&bound(durable("q"), &["b"])).await.unwrap();
        transport.publish(to_exchange("a", "1"), PATIENCE).await.unwrap();
        transport.publish(to_exchange("b", "2"), PATIENCE).await.unwrap();
        assert_eq!(transport.depth("q").await, Ok(Some(2)));
    }

    async fn messages_arrive_in_the_order_in_which_their_publishes_began(world) {
        let transport = world.connect().await;
        let mut consumer = transport.consume(&durable("q"), 100).await.unwrap();
        let bodies: Vec<String> = (0..2_000).map(|n| n.to_string()).collect();
        let publishing = async {
            for some in bodies.chunks(300) {
                let mut publishes: Vec<_> =
                    some.iter().map(|body| transport.publish(to_queue("q", body), PATIENCE)).collect();
                let mut under_way = Vec::new();
                for mut publish in publishes.drain(..) {
                    match (&mut publish).now_or_never() {
                        Some(result) => result.unwrap(),
                        None => under_way.push(publish),
                    }
                }
                // In which order they are looked at from now on does not matter.
                for publish in under_way.into_iter().rev() {
                    publish.await.unwrap();
                }
            }
        };
        let (taken, ()) = tokio::join!(take(&mut consumer, bodies.len()), publishing);
        assert!(taken == bodies);
    }

    async fn what_is_not_acknowledged_comes_again_when_its_consumer_ends(world) {
        let transport = world.connect().await;
        let mut consumer = transport.consume(&durable("q"), 10).await.unwrap();
        for body in ["1", "2", "3"] {
            transport.publish(to_queue("q", body), PATIENCE).await.unwrap();
        }
        let first = next(&mut consumer).await;
        drop(next(&mut consumer).await);
        // A delivery that was dropped stays unacknowledged.
        depth_becomes(&*transport, "q", Some(0)).await;
        drop(consumer);
        depth_becomes(&*transport, "q", Some(3)).await;
        assert_eq!(first.acker.ack().await, Err(TransportError::Disconnected), "its consumer is gone");
        let mut again = transport.consume(&durable("q"), 10).await.unwrap();
        for body in ["1", "2", "3"] {
            let delivery = next(&mut again).await;
            assert_eq!(text(&delivery), body);
            assert!(delivery.redelivered || body == "3", "{body} was delivered before");
            delivery.acker.ack().await.unwrap();
        }
    }

    async fn a_requeued_message_comes_again_before_those_behind_it(world) {
        let transport = world.connect().await;
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
        assert_eq!(take(&mut consumer, 2).await, ["2", "3"]);
    }

    async fn n15_at_most_prefetch_deliveries_are_unacknowledged(world) {
        let transport = world.connect().await;
        transport.declare(&durable("q")).await.unwrap();
        for n in 0..10 {
            transport.publish(to_queue("q", n.to_string()), PATIENCE).await.unwrap();
        }
        let mut consumer = transport.consume(&durable("q"), 3).await.unwrap();
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(next(&mut consumer).await);
        }
        assert_eq!(transport.depth("q").await, Ok(Some(7)), "what is delivered does not wait");
        held.remove(1).acker.ack().await.unwrap();
        assert_eq!(text(&next(&mut consumer).await), "3");
        depth_becomes(&*transport, "q", Some(6)).await;
        drop(consumer);
        let mut one = transport.consume(&durable("q"), 0).await.unwrap();
        let held = next(&mut one).await;
        depth_becomes(&*transport, "q", Some(8)).await;
        held.acker.ack().await.unwrap();
        next(&mut one).await;
    }

    async fn consumers_of_one_queue_share_its_messages(world) {
        let (one, two) = (world.connect().await, world.connect().await);
        let mut consumers =
            [one.consume(&durable("q"), 5).await.unwrap(), one.consume(&durable("q"), 5).await.unwrap(), two.consume(&durable("q"), 5).await.unwrap()];
        for n in 0..15 {
            one.publish(to_queue("q", n.to_string()), PATIENCE).await.unwrap();
        }
        let mut seen = BTreeSet::new();
        for consumer in &mut consumers {
            // Nothing is acknowledged until all have their share: no one takes another's.
            let mut held = Vec::new();
            for _ in 0..5 {
                held.push(next(consumer).await);
            }
            for delivery in held {
                assert!(seen.insert(text(&delivery)), "{delivery:?} came twice");
                delivery.acker.ack().await.unwrap();
            }
        }
        assert_eq!(seen.len(), 15);
    }

    async fn an_exclusive_queue_is_closed_to_other_connections(world) {
        let (owner, other) = (world.connect().await, world.connect().await);
        let mut consumer = owner.consume(&exclusive("own"), 1).await.unwrap();
        let conflicts = [
            other.declare(&exclusive("own")).await.unwrap_err(),
            other.consume(&exclusive("own"), 1).await.unwrap_err(),
            other.depth("own").await.unwrap_err(),
        ];
        for error in conflicts {
            assert!(matches!(&error, TransportError::QueueConflict { queue, .. } if queue == "own"), "{error:?}");
            assert!(!error.is_retryable());
        }
        other.publish(to_queue("own", "hello"), PATIENCE).await.unwrap();
        assert_eq!(take(&mut consumer, 1).await, ["hello"]);
        owner.close().await;
        wait_until("the queue has gone with its connection", async || {
            other.publish(to_queue("own", "x"), PATIENCE).await == Err(TransportError::Unroutable("own".into()))
        })
        .await;
        other.declare(&exclusive("own")).await.unwrap();
    }

    async fn a_queue_with_other_properties_is_a_conflict(world) {
        let transport = world.connect().await;
        transport.declare(&durable("q")).await.unwrap();
        transport.publish(to_queue("q", "kept"), PATIENCE).await.unwrap();
        let other = Queue { kind: QueueKind::Durable { expires: None, quorum: false, ordered: false }, ..durable("q") };
        for wrong in [exclusive("q"), other] {
            let error = transport.declare(&wrong).await.unwrap_err();
            assert!(matches!(&error, TransportError::QueueConflict { queue, .. } if queue == "q"), "{error:?}");
            let error = transport.consume(&wrong, 1).await.unwrap_err();
            assert!(matches!(&error, TransportError::QueueConflict { queue, .. } if queue == "q"), "{error:?}");
        }
        assert_eq!(transport.depth("q").await, Ok(Some(1)));
    }

    async fn a_durable_queue_outlives_its_connection(world) {
        let first = world.connect().await;
        first.declare(&durable("q")).await.unwrap();
        first.publish(to_queue("q", "kept"), PATIENCE).await.unwrap();
        first.close().await;
        let second = world.connect().await;
        let mut consumer = second.consume(&durable("q"), 1).await.unwrap();
        assert_eq!(take(&mut consumer, 1).await, ["kept"]);
    }

    async fn a_queue_of_the_replicated_kind_keeps_the_same_promises(world) {
        let transport = world.connect().await;
        let quorum = Queue { kind: QueueKind::Durable { expires: None, quorum: true, ordered: false }, ..durable("q") };
        transport.declare(&quorum).await.unwrap();
        for body in ["1", "2"] {
            transport.publish(to_queue("q", body), PATIENCE).await.unwrap();
        }
        let mut consumer = transport.consume(&quorum, 10).await.unwrap();
        next(&mut consumer).await.acker.requeue().await.unwrap();
        let mut come = Vec::new();
        for _ in 0..2 {
            let delivery = next(&mut consumer).await;
            come.push((text(&delivery), delivery.redelivered));
            delivery.acker.ack().await.unwrap();
        }
        come.sort();
        assert_eq!(come, [("1".to_owned(), true), ("2".to_owned(), false)]);
    }

    async fn an_ordered_queue_is_consumed_by_one_after_the_other(world) {
        let transports = [world.connect().await, world.connect().await];
        let ordered = Queue { kind: QueueKind::Durable { expires: None, quorum: false, ordered: true }, ..durable("q") };
        let mut first = transports[0].consume(&ordered, 2).await.unwrap();
        let mut second = transports[1].consume(&ordered, 2).await.unwrap();
        for n in 0..6 {
            transports[0].publish(to_queue("q", n.to_string()), PATIENCE).await.unwrap();
        }
        assert_eq!(take(&mut first, 3).await, ["0", "1", "2"]);
        drop(first);
        assert_eq!(take(&mut second, 3).await, ["3", "4", "5"]);
    }

    async fn an_unused_queue_expires(world) {
        let transport = world.connect().await;
        let kind = QueueKind::Durable { expires: Some(Duration::from_millis(200)), quorum: false, ordered: false };
        transport.declare(&Queue { kind, ..durable("q") }).await.unwrap();
        wait_until("the queue is gone", async || {
            transport.publish(to_queue("q", "x"), PATIENCE).await == Err(TransportError::Unroutable("q".into()))
        })
        .await;
        assert_eq!(transport.depth("q").await, Ok(None));
    }

    async fn a_message_expires(world) {
        let transport = world.connect().await;
        transport.declare(&durable("q")).await.unwrap();
        let short = PublishRequest { expires_in: Some(Duration::from_millis(50)), ..to_queue("q", "short") };
        transport.publish(short, PATIENCE).await.unwrap();
        let long = PublishRequest { expires_in: Some(Duration::MAX), ..to_queue("q", "long") };
        transport.publish(long, PATIENCE).await.unwrap();
        depth_becomes(&*transport, "q", Some(1)).await;
        let mut consumer = transport.consume(&durable("q"), 1).await.unwrap();
        assert_eq!(take(&mut consumer, 1).await, ["long"]);
    }

    async fn closing_ends_consumers_and_gives_back_what_they_held(world) {
        let (transport, other) = (world.connect().await, world.connect().await);
        let mut consumer = transport.consume(&durable("q"), 10).await.unwrap();
        for body in ["1", "2", "3"] {
            transport.publish(to_queue("q", body), PATIENCE).await.unwrap();
        }
        let held = next(&mut consumer).await;
        transport.close().await;
        assert!(tokio::time::timeout(PATIENCE, consumer.next()).await.unwrap().is_none());
        assert_eq!(held.acker.ack().await, Err(TransportError::Disconnected));
        depth_becomes(&*other, "q", Some(3)).await;
        assert_eq!(transport.publish(to_queue("q", "x"), PATIENCE).await, Err(TransportError::Closed));
        assert_eq!(transport.declare(&durable("q")).await, Err(TransportError::Closed));
        assert_eq!(transport.depth("q").await, Err(TransportError::Closed));
        assert_eq!(transport.consume(&durable("q"), 1).await.unwrap_err(), TransportError::Closed);
        transport.close().await;
    }

    async fn dropping_it_is_as_closing_it(world) {
        let (transport, other) = (world.connect().await, world.connect().await);
        let mut consumer = transport.consume(&bound(exclusive("own"), &["e"]), 1).await.unwrap();
        drop(transport);
        assert!(tokio::time::timeout(PATIENCE, consumer.next()).await.unwrap().is_none());
        depth_becomes(&*other, "own", None).await;
    }

    async fn names_that_a_broker_cannot_have_are_refused(world) {
        let transport = world.connect().await;
        for name in ["", "amq.mine", &"x".repeat(256)] {
            let refused = Err(TransportError::Name(name.into()));
            assert_eq!(transport.declare(&durable(name)).await, refused);
            assert_eq!(transport.declare(&bound(durable("q"), &[name])).await, refused);
            assert_eq!(transport.consume(&durable(name), 1).await.map(drop), refused);
            assert_eq!(transport.depth(name).await.map(drop), refused);
            assert_eq!(transport.publish(to_queue(name, "x"), PATIENCE).await, refused);
            assert_eq!(transport.publish(to_exchange(name, "x"), PATIENCE).await, refused);
        }
        let name = "ü".repeat(127);
        transport.declare(&durable(&name)).await.unwrap();
        transport.publish(to_queue(&name, "x"), PATIENCE).await.unwrap();
    }

    async fn the_largest_body_passes_and_no_larger_one(world) {
        let transport = world.connect().await;
        let mut consumer = transport.consume(&durable("q"), 1).await.unwrap();
        let too_large = transport.publish(to_queue("q", vec![1; MAX_BODY + 1]), PATIENCE).await;
        assert_eq!(too_large, Err(TransportError::TooLarge { length: MAX_BODY + 1, limit: MAX_BODY }));
        transport.publish(to_queue("q", vec![2; MAX_BODY]), PATIENCE).await.unwrap();
        let delivery = next(&mut consumer).await;
        assert!(delivery.body.len() == MAX_BODY && delivery.body.iter().all(|byte| *byte == 2));
        delivery.acker.ack().await.unwrap();
    }

    async fn next_may_be_given_up_at_any_time(world) {
        let transport = world.connect().await;
        let mut consumer = transport.consume(&durable("q"), 10).await.unwrap();
        let publishing = async {
            for n in 0..200 {
                transport.publish(to_queue("q", n.to_string()), PATIENCE).await.unwrap();
            }
        };
        tokio::pin!(publishing);
        let mut taken = Vec::new();
        let mut published = false;
        while taken.len() < 200 {
            tokio::select! {
                biased;
                () = tokio::task::yield_now() => {}
                () = &mut publishing, if !published => published = true,
                delivery = consumer.next() => {
                    let delivery = delivery.unwrap();
                    taken.push(text(&delivery));
                    delivery.acker.ack().await.unwrap();
                }
            }
        }
        assert!(taken.into_iter().eq((0..200).map(|n| n.to_string())));
    }
}
