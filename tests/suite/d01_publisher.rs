//! d01: the publisher at a broker that answers in ways that RabbitMQ may answer in, but seldom does.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::join_all;
use nanite::transport::{AmqpOptions, AmqpTransport, Transport, TransportError};
use parking_lot::Mutex;

use crate::harness::fake_broker::{BODY, CONTENT_HEADER, FakeBroker, METHOD, content_header, frame, method, short};
use crate::harness::{WAIT_TIMEOUT, wait_until};
use crate::transport::to_queue;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d01_unconfirmed_messages_are_published_again_in_order() {
    /// Less than may be in flight.
    const COUNT: usize = 500;
    let seen: Arc<Mutex<Vec<Vec<String>>>> = Arc::default();
    let bodies = Arc::clone(&seen);
    let broker = FakeBroker::start(move |client, received| {
        // The first two connections confirm nothing.
        client.confirms = client.number > 1;
        if received.kind == BODY {
            let mut bodies = bodies.lock();
            bodies.resize(client.number + 1, Vec::new());
            bodies[client.number].push(String::from_utf8(received.payload.clone()).unwrap());
        }
        Ok(())
    });
    broker.attack();
    let transport = AmqpTransport::connect(AmqpOptions::new(&broker.url()).unwrap()).await.unwrap();
    let expected: Vec<String> = (0..COUNT).map(|n| n.to_string()).collect();
    let published = join_all(expected.iter().map(|body| transport.publish(to_queue("q", body), WAIT_TIMEOUT)));
    let interrupt = async {
        for connection in 0..2 {
            let all_seen = async || seen.lock().get(connection).is_some_and(|bodies| bodies.len() == COUNT);
            wait_until("all messages are published", all_seen).await;
            broker.disconnect();
        }
    };
    let (results, ()) = tokio::join!(published, interrupt);
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    let seen = seen.lock().clone();
    assert_eq!(seen.len(), 3);
    for bodies in &seen {
        assert_eq!(*bodies, expected);
    }
}

/// The client library attaches returned messages to whichever confirms arrive next: here, the message that was returned last to the
/// first confirm. No result may be decided before all confirms of the frame have been read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d01_returned_messages_in_another_order_than_their_confirms_are_unroutable() {
    /// Less than may be in flight.
    const COUNT: u64 = 1_000;
    const ROUNDS: u64 = 10;
    let broker = FakeBroker::start(move |client, received| {
        client.confirms = false;
        let published = client.published();
        if received.kind != BODY || published % COUNT != 0 {
            return Ok(());
        }
        let channel = received.channel;
        let fields = [vec![1, 56], short("NO_ROUTE"), short(""), short("q")].concat();
        let mut answer = Vec::new();
        // Every second message is returned.
        for number in (published - COUNT + 1..=published).rev().filter(|number| number % 2 == 0) {
            answer.extend(frame(METHOD, channel, &method(60, 50, &fields)));
            let properties = short(&number.to_string());
            answer.extend(frame(CONTENT_HEADER, channel, &content_header(0, 1 << 10, &properties)));
        }
        let fields = [&published.to_be_bytes()[..], &[1]].concat();
        answer.extend(frame(METHOD, channel, &method(60, 80, &fields)));
        client.send(&answer)
    });
    broker.attack();
    let transport = AmqpTransport::connect(AmqpOptions::new(&broker.url()).unwrap()).await.unwrap();
    for round in 0..ROUNDS {
        let published = (0..COUNT).map(|n| transport.publish(to_queue("q", n.to_string()), WAIT_TIMEOUT));
        let results = join_all(published).await;
        let wrong: BTreeSet<usize> = results
            .iter()
            .enumerate()
            .filter(|(n, result)| match result {
                Ok(()) => n % 2 == 1,
                Err(error) => n % 2 == 0 || *error != TransportError::Unroutable("q".to_owned()),
            })
            .map(|(n, _)| n)
            .collect();
        assert!(wrong.is_empty(), "round {round}: {wrong:?}");
    }
}
