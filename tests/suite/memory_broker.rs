//! The memory broker only: limits, expiry, restarts and taps, beyond the contract of `Transport`.

use std::time::Duration;

use nanite::transport::{DurableOptions, MemoryBroker, Queue, QueueLimits, Transport, TransportError};

use crate::transport::{next, to_exchange, to_queue};

const TIMEOUT: Duration = Duration::from_secs(5);

#[tokio::test(start_paused = true)]
async fn unused_queue_expires_with_its_messages() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let queue = Queue::new("q", DurableOptions::new().expires_after(Duration::from_secs(10)));
    let consumer = transport.consume(&queue, 1).await.unwrap();
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(transport.depth("q").await, Ok(Some(0)), "a consumed queue is in use");
    drop(consumer);
    tokio::time::advance(Duration::from_secs(9)).await;
    transport.publish(to_queue("q", "x"), TIMEOUT).await.unwrap();
    transport.declare(&queue).await.unwrap();
    tokio::time::advance(Duration::from_secs(9)).await;
    assert_eq!(transport.depth("q").await, Ok(Some(1)), "declaring it again counts as use");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(transport.publish(to_queue("q", "x"), TIMEOUT).await, Err(TransportError::Unroutable("q".into())));
    assert_eq!(transport.depth("q").await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn messages_expire_at_the_head_of_their_queue() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    transport.declare(&Queue::durable("q")).await.unwrap();
    let short = to_queue("q", "short").expires_in(Duration::from_secs(1));
    transport.publish(short, TIMEOUT).await.unwrap();
    transport.publish(to_queue("q", "long"), TIMEOUT).await.unwrap();
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(transport.depth("q").await, Ok(Some(1)));
    let mut consumer = transport.consume(&Queue::durable("q"), 2).await.unwrap();
    assert_eq!(&next(&mut consumer).await.body[..], b"long");
    let at_once = to_queue("q", "at once").expires_in(Duration::ZERO);
    transport.publish(at_once.clone(), TIMEOUT).await.unwrap();
    assert_eq!(&next(&mut consumer).await.body[..], b"at once", "an idle consumer receives it");
    transport.publish(at_once, TIMEOUT).await.unwrap();
    assert_eq!(transport.depth("q").await, Ok(Some(0)), "a busy consumer does not");
}

#[tokio::test]
async fn full_queue_nacks_and_other_bound_queues_get_the_message() {
    let broker = MemoryBroker::with_limits(QueueLimits::new().messages(2).bytes(10));
    let transport = broker.connect();
    transport.declare(&Queue::exclusive("a").bind("e")).await.unwrap();
    transport.declare(&Queue::exclusive("b").bind("e")).await.unwrap();
    for _ in 0..2 {
        transport.publish(to_queue("a", "x"), TIMEOUT).await.unwrap();
    }
    assert_eq!(transport.publish(to_queue("a", "x"), TIMEOUT).await, Err(TransportError::Nacked));
    assert_eq!(transport.publish(to_exchange("e", "x"), TIMEOUT).await, Err(TransportError::Nacked));
    assert_eq!(broker.queued_messages("b").len(), 1);
    assert_eq!(
        transport.publish(to_queue("b", "0123456789"), TIMEOUT).await,
        Err(TransportError::Nacked),
        "bytes count"
    );
    let mut consumer = transport.consume(&Queue::exclusive("a").bind("e"), 1).await.unwrap();
    next(&mut consumer).await.acker.ack().await.unwrap();
    transport.publish(to_queue("a", "x"), TIMEOUT).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn disconnect_deletes_exclusive_queues_and_requeues_messages() {
    let broker = MemoryBroker::new();
    let (transport, other) = (broker.connect(), broker.connect());
    let mut own = transport.consume(&Queue::exclusive("own").bind("e"), 1).await.unwrap();
    let mut work = transport.consume(&Queue::durable("work"), 10).await.unwrap();
    for body in ["1", "2", "3"] {
        other.publish(to_queue("work", body), TIMEOUT).await.unwrap();
    }
    let held = next(&mut work).await;
    transport.disconnect();
    assert_eq!(held.acker.ack().await, Err(TransportError::Disconnected));
    assert_eq!(other.publish(to_queue("own", "x"), TIMEOUT).await, Err(TransportError::Unroutable("own".into())));
    assert_eq!(other.depth("work").await, Ok(Some(3)));
    assert_eq!(transport.publish(to_queue("work", "4"), TIMEOUT).await, Err(TransportError::TimedOut(TIMEOUT)));
    let (late, ()) = tokio::join!(transport.publish(to_queue("work", "4"), TIMEOUT), async { transport.reconnect() });
    assert_eq!(late, Ok(()), "the publish waits for the connection");
    for body in ["1", "2", "3", "4"] {
        let delivery = next(&mut work).await;
        assert_eq!((&delivery.body[..], delivery.redelivered), (body.as_bytes(), body != "4"));
        delivery.acker.ack().await.unwrap();
    }
    other.publish(to_exchange("e", "news"), TIMEOUT).await.unwrap();
    assert_eq!(&next(&mut own).await.body[..], b"news", "the exclusive queue is declared and bound again");
}

#[tokio::test]
async fn restart_keeps_persistent_messages() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    transport.declare(&Queue::durable("q")).await.unwrap();
    transport.publish(to_queue("q", "kept"), TIMEOUT).await.unwrap();
    transport.publish(to_queue("q", "lost").persistent(false), TIMEOUT).await.unwrap();
    broker.restart();
    let waiting: Vec<_> = broker.queued_messages("q").into_iter().map(|message| message.body.to_vec()).collect();
    assert_eq!(waiting, [b"kept".to_vec()]);
}

#[tokio::test]
async fn redeclares_and_consumes_a_deleted_queue() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut consumer = transport.consume(&Queue::exclusive("q").bind("e"), 1).await.unwrap();
    transport.publish(to_queue("q", "1"), TIMEOUT).await.unwrap();
    let gone = next(&mut consumer).await;
    transport.publish(to_queue("q", "deleted with it"), TIMEOUT).await.unwrap();
    assert!(broker.delete_queue("q"));
    assert_eq!(gone.acker.ack().await, Err(TransportError::Disconnected));
    transport.publish(to_exchange("e", "2"), TIMEOUT).await.unwrap();
    assert_eq!(&next(&mut consumer).await.body[..], b"2");
    assert!(!broker.delete_queue("none"));
}

#[tokio::test]
async fn tap_records_messages_and_counts_dropped_ones() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let tap = broker.tap(2);
    for body in ["1", "2", "3"] {
        transport.publish(to_exchange("e", body), TIMEOUT).await.unwrap();
    }
    let bodies: Vec<_> = tap.take().into_iter().map(|published| published.body.to_vec()).collect();
    assert_eq!((bodies, tap.dropped()), (vec![b"2".to_vec(), b"3".to_vec()], 1));
    assert!(tap.take().is_empty());
}
