//! What the memory broker does beyond the contract that both transports are tested against.

use super::*;
use crate::transport::{Destination, Exchange, QueueKind};

const SOON: Duration = Duration::from_secs(5);

fn durable(name: &str, expires: Option<Duration>) -> Queue {
    Queue {
        name: name.into(),
        kind: QueueKind::Durable { expires, quorum: false, ordered: false },
        bindings: Vec::new(),
    }
}

fn exclusive(name: &str, exchange: &str) -> Queue {
    Queue { name: name.into(), kind: QueueKind::Exclusive, bindings: vec![Exchange(exchange.into())] }
}

fn to_queue(name: &str, body: &str) -> PublishRequest {
    PublishRequest {
        destination: Destination::Queue(name.into()),
        body: body.as_bytes().into(),
        content_type: "text/plain".into(),
        message_id: "1".into(),
        expires_in: None,
        persistent: true,
    }
}

fn to_exchange(name: &str, body: &str) -> PublishRequest {
    PublishRequest { destination: Destination::Exchange(Exchange(name.into())), ..to_queue("", body) }
}

async fn next(consumer: &mut Consumer) -> Delivery {
    tokio::time::timeout(Duration::from_secs(60), consumer.next()).await.expect("a delivery").expect("an open consumer")
}

#[tokio::test(start_paused = true)]
async fn an_unused_queue_expires_with_its_messages() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let queue = durable("q", Some(Duration::from_secs(10)));
    let consumer = transport.consume(&queue, 1).await.unwrap();
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(transport.depth("q").await, Ok(Some(0)), "a consumed queue is in use");
    drop(consumer);
    tokio::time::advance(Duration::from_secs(9)).await;
    transport.publish(to_queue("q", "x"), SOON).await.unwrap();
    transport.declare(&queue).await.unwrap();
    tokio::time::advance(Duration::from_secs(9)).await;
    assert_eq!(transport.depth("q").await, Ok(Some(1)), "declaring it again is use");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(transport.publish(to_queue("q", "x"), SOON).await, Err(TransportError::Unroutable("q".into())));
    assert_eq!(transport.depth("q").await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn messages_expire_where_they_wait() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    transport.declare(&durable("q", None)).await.unwrap();
    let short = PublishRequest { expires_in: Some(Duration::from_secs(1)), ..to_queue("q", "short") };
    transport.publish(short.clone(), SOON).await.unwrap();
    transport.publish(to_queue("q", "long"), SOON).await.unwrap();
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(transport.depth("q").await, Ok(Some(1)));
    let mut consumer = transport.consume(&durable("q", None), 2).await.unwrap();
    assert_eq!(&next(&mut consumer).await.body[..], b"long");
    let at_once = PublishRequest { expires_in: Some(Duration::ZERO), ..to_queue("q", "at once") };
    transport.publish(at_once.clone(), SOON).await.unwrap();
    assert_eq!(&next(&mut consumer).await.body[..], b"at once", "a waiting consumer gets it");
    transport.publish(at_once, SOON).await.unwrap();
    assert_eq!(transport.depth("q").await, Ok(Some(0)), "a busy one does not");
}

#[tokio::test]
async fn a_full_queue_nacks_and_the_others_get_the_message() {
    let broker = MemoryBroker::with_limits(Limits { messages: 2, bytes: 10 });
    let transport = broker.connect();
    transport.declare(&exclusive("a", "e")).await.unwrap();
    transport.declare(&exclusive("b", "e")).await.unwrap();
    for _ in 0..2 {
        transport.publish(to_queue("a", "x"), SOON).await.unwrap();
    }
    assert_eq!(transport.publish(to_queue("a", "x"), SOON).await, Err(TransportError::Nacked));
    assert_eq!(transport.publish(to_exchange("e", "x"), SOON).await, Err(TransportError::Nacked));
    assert_eq!(broker.waiting("b").len(), 1);
    assert_eq!(transport.publish(to_queue("b", "0123456789"), SOON).await, Err(TransportError::Nacked), "bytes count");
    let mut consumer = transport.consume(&exclusive("a", "e"), 1).await.unwrap();
    next(&mut consumer).await.acker.ack().await.unwrap();
    transport.publish(to_queue("a", "x"), SOON).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_cut_connection_loses_its_exclusive_queues_and_gives_back_what_it_held() {
    let broker = MemoryBroker::new();
    let (here, there) = (broker.connect(), broker.connect());
    let mut own = here.consume(&exclusive("own", "e"), 1).await.unwrap();
    let mut work = here.consume(&durable("work", None), 10).await.unwrap();
    for body in ["1", "2", "3"] {
        there.publish(to_queue("work", body), SOON).await.unwrap();
    }
    let held = next(&mut work).await;
    here.cut();
    assert_eq!(held.acker.ack().await, Err(TransportError::Disconnected));
    assert_eq!(there.publish(to_queue("own", "x"), SOON).await, Err(TransportError::Unroutable("own".into())));
    assert_eq!(there.depth("work").await, Ok(Some(3)));
    assert_eq!(here.publish(to_queue("work", "4"), SOON).await, Err(TransportError::TimedOut(SOON)));
    let (late, ()) = tokio::join!(here.publish(to_queue("work", "4"), SOON), async { here.restore() });
    assert_eq!(late, Ok(()), "a publish waits for the connection");
    for body in ["1", "2", "3", "4"] {
        let delivery = next(&mut work).await;
        assert_eq!((&delivery.body[..], delivery.redelivered), (body.as_bytes(), body != "4"));
        delivery.acker.ack().await.unwrap();
    }
    there.publish(to_exchange("e", "news"), SOON).await.unwrap();
    assert_eq!(&next(&mut own).await.body[..], b"news", "the exclusive queue is there and bound again");
}

#[tokio::test]
async fn a_restart_keeps_what_is_persistent() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    transport.declare(&durable("q", None)).await.unwrap();
    transport.publish(to_queue("q", "kept"), SOON).await.unwrap();
    transport.publish(PublishRequest { persistent: false, ..to_queue("q", "lost") }, SOON).await.unwrap();
    broker.restart();
    let waiting: Vec<_> = broker.waiting("q").into_iter().map(|message| message.body.to_vec()).collect();
    assert_eq!(waiting, [b"kept".to_vec()]);
}

#[tokio::test]
async fn a_deleted_queue_is_declared_and_consumed_again() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut consumer = transport.consume(&exclusive("q", "e"), 1).await.unwrap();
    transport.publish(to_queue("q", "1"), SOON).await.unwrap();
    let gone = next(&mut consumer).await;
    transport.publish(to_queue("q", "lost with it"), SOON).await.unwrap();
    assert!(broker.delete_queue("q"));
    assert_eq!(gone.acker.ack().await, Err(TransportError::Disconnected));
    transport.publish(to_exchange("e", "2"), SOON).await.unwrap();
    assert_eq!(&next(&mut consumer).await.body[..], b"2");
    assert!(!broker.delete_queue("none"));
}

#[tokio::test]
async fn a_tap_sees_what_passes_and_counts_what_it_had_to_drop() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let tap = broker.tap(2);
    for body in ["1", "2", "3"] {
        transport.publish(to_exchange("e", body), SOON).await.unwrap();
    }
    let bodies: Vec<_> = tap.take().into_iter().map(|passed| passed.body.to_vec()).collect();
    assert_eq!((bodies, tap.missed()), (vec![b"2".to_vec(), b"3".to_vec()], 1));
    assert!(tap.take().is_empty());
}

#[tokio::test]
async fn a_queue_that_nobody_asks_for_is_swept_in_the_end() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    for n in 0..1_000 {
        transport.declare(&durable(&format!("q{n}"), Some(Duration::ZERO))).await.unwrap();
    }
    assert!(broker.0.state().queues() < 200);
}
