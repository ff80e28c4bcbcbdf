//! Queues on the broker: declaring them and exchanges, asking for their depth, and consuming from them.
//!
//! A consumer has a channel of its own, and starts again on each new connection and whenever the broker ends it.

use std::collections::HashMap;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{FutureExt, Stream, StreamExt};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::accounts::{MAX_HELD_BYTES, Withheld};
use super::connection::{
    BACKOFF_RESET_AFTER, Backoff, CLOSE_TIMEOUT, Connection, ConnectionState, channel_error, classify, wait_until_up,
    within,
};
use super::stream::StreamState;
use crate::clock::{Clock, SystemClock};
use crate::limits::{LogDecision, LogLimit};
use crate::transport::message::check_name;
use crate::transport::{
    Acker, CALL_TIMEOUT, Consumer, Delivery, MAX_BODY_BYTES, Queue, QueueKind, Settle, Settlement, TransportError,
};

/// The most deliveries that are buffered for the application, in addition to those that lapin holds. All of them are within the
/// prefetch.
const MAX_BUFFERED_DELIVERIES: usize = 64;

/// How often a consumer checks whether its connection can hold another message.
const CAPACITY_CHECK_INTERVAL: Duration = Duration::from_millis(20);
/// Log lines about dropped messages: anyone who may publish can cause them.
static DROPPED_LOG: LogLimit = LogLimit::new(5);

/// A name as an AMQP short string.
pub(super) fn short_name(name: &str) -> Result<ShortString, TransportError> {
    check_name(name)?;
    ShortString::try_new(name).map_err(|_| TransportError::Name(name.to_owned()))
}

/// Declares a queue with its exchanges and bindings. Returns the channel that was used.
pub(super) async fn declare_queue(connection: &Connection, queue: &Queue) -> Result<Channel, TransportError> {
    let name = short_name(&queue.name)?;
    let mut channel = connection.channel().await?;
    for exchange in &queue.bindings {
        channel = declare_exchange_on(connection, channel, &exchange.name).await?;
    }
    let options = QueueDeclareOptions {
        durable: matches!(queue.kind, QueueKind::Durable(_)),
        exclusive: matches!(queue.kind, QueueKind::Exclusive),
        ..QueueDeclareOptions::default()
    };
    let call = channel.queue_declare(name.clone(), options, arguments(queue.kind));
    let declared =
        tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| TransportError::TimedOut(CALL_TIMEOUT))?;
    match declared.map_err(|error| conflict(&queue.name, &error)) {
        Ok(_) => {}
        // As with exchanges: without permission to declare it, an existing queue can still be used.
        Err(TransportError::Forbidden(reason)) if options.durable => {
            channel = connection.channel().await?;
            let options = QueueDeclareOptions { passive: true, ..options };
            let call = channel.queue_declare(name.clone(), options, FieldTable::default());
            within(CALL_TIMEOUT, call).await.map_err(|_| TransportError::Forbidden(reason))?;
        }
        Err(error) => return Err(error),
    }
    for exchange in &queue.bindings {
        let bind = channel.queue_bind(
            name.clone(),
            short_name(&exchange.name)?,
            ShortString::default(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        within(CALL_TIMEOUT, bind).await?;
    }
    Ok(channel)
}

/// Declares a durable fan-out exchange.
pub(super) async fn declare_exchange(connection: &Connection, exchange: &str) -> Result<(), TransportError> {
    let channel = declare_exchange_on(connection, connection.channel().await?, exchange).await?;
    close_channel(&channel).await;
    Ok(())
}

/// Without permission to declare it, an existing exchange can still be used. The broker closes the channel after a refusal, so the
/// returned channel may be another one.
async fn declare_exchange_on(
    connection: &Connection,
    channel: Channel,
    exchange: &str,
) -> Result<Channel, TransportError> {
    let name = short_name(exchange)?;
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let call = channel.exchange_declare(name.clone(), ExchangeKind::Fanout, options, FieldTable::default());
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Err(_) => Err(TransportError::TimedOut(CALL_TIMEOUT)),
        Ok(Ok(())) => Ok(channel),
        Ok(Err(error)) => match conflict(exchange, &error) {
            TransportError::Forbidden(reason) => {
                let channel = connection.channel().await?;
                let options = ExchangeDeclareOptions { passive: true, ..options };
                let call = channel.exchange_declare(name, ExchangeKind::Fanout, options, FieldTable::default());
                within(CALL_TIMEOUT, call).await.map_err(|_| TransportError::Forbidden(reason))?;
                Ok(channel)
            }
            error => Err(error),
        },
    }
}

/// The number of ready messages in a queue; `None` if there is no such queue.
pub(super) async fn depth(connection: &Connection, queue: &str) -> Result<Option<u64>, TransportError> {
    let channel = connection.channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let call = channel.queue_declare(short_name(queue)?, options, FieldTable::default());
    let declared =
        tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| TransportError::TimedOut(CALL_TIMEOUT))?;
    match declared {
        Ok(state) => {
            close_channel(&channel).await;
            Ok(Some(u64::from(state.message_count())))
        }
        Err(error) if matches!(channel_error(&error), Some((AMQPSoftError::NOTFOUND, _))) => Ok(None),
        Err(error) => Err(conflict(queue, &error)),
    }
}

/// Closes a channel. Its unacknowledged deliveries return to their queues.
pub(super) async fn close_channel(channel: &Channel) {
    if channel.status().connected() {
        let _ = within(CLOSE_TIMEOUT, channel.close(200, ShortString::from("done"))).await;
    }
}

fn conflict(queue: &str, error: &lapin::Error) -> TransportError {
    match channel_error(error) {
        Some((AMQPSoftError::RESOURCELOCKED | AMQPSoftError::PRECONDITIONFAILED, reason)) => {
            TransportError::QueueConflict { queue: queue.to_owned(), reason }
        }
        _ => classify(error),
    }
}

/// The arguments of a queue. The queue type is always given, since the broker's default is configurable.
fn arguments(kind: QueueKind) -> FieldTable {
    let mut arguments = FieldTable::default();
    let quorum = matches!(kind, QueueKind::Durable(options) if options.quorum);
    let queue_type = if quorum { "quorum" } else { "classic" };
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(queue_type.into()));
    if let Some(unused) = kind.expires_after() {
        arguments.insert("x-expires".into(), AMQPValue::LongLongInt(i64::from(milliseconds(unused).max(1))));
    }
    if kind.is_ordered() {
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    }
    arguments
}

/// Milliseconds, up to RabbitMQ's maximum (about 49 days).
pub(super) fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// The queues that were declared without being consumed, to declare them again on each new connection. Queues that expire when
/// unused are not remembered.
#[derive(Debug, Default)]
pub(super) struct DeclaredQueues(Mutex<HashMap<String, DeclaredQueue>>);

#[derive(Debug)]
struct DeclaredQueue {
    queue: Queue,
    /// The number of the connection on which it was declared last.
    connection: u64,
    /// Whether the failure to declare it again has been logged.
    logged: bool,
}

impl DeclaredQueues {
    pub(super) fn remember(&self, queue: &Queue, connection: &Connection) {
        if queue.kind.expires_after().is_none() {
            let declared = DeclaredQueue { queue: queue.clone(), connection: connection.number, logged: false };
            self.0.lock().insert(queue.name.clone(), declared);
        }
    }

    /// Declares the queues that have not been declared on this connection. A failure is retried at the next call.
    pub(super) async fn declare_missing(&self, connection: &Connection) {
        let missing: Vec<Queue> = {
            let queues = self.0.lock();
            let missing = queues.values().filter(|declared| declared.connection != connection.number);
            missing.map(|declared| declared.queue.clone()).collect()
        };
        for queue in missing {
            let result = declare_queue(connection, &queue).await;
            if let Ok(channel) = &result {
                close_channel(channel).await;
            }
            let mut queues = self.0.lock();
            let Some(declared) = queues.get_mut(&queue.name) else { continue };
            match result {
                Ok(_) => {
                    declared.connection = connection.number;
                    declared.logged = false;
                }
                Err(error) => {
                    if !declared.logged {
                        tracing::warn!(queue = queue.name, %error, "cannot declare the queue again yet; retrying");
                    }
                    declared.logged = true;
                }
            }
        }
    }
}

/// A subscription to a queue.
#[derive(Debug)]
struct Subscription {
    channel: Channel,
    deliveries: lapin::Consumer,
    stream: watch::Receiver<StreamState>,
}

/// Starts to consume. Errors of this first attempt are returned; later ones are retried.
pub(super) async fn consume(
    connection: &Connection,
    state: watch::Receiver<ConnectionState>,
    queue: &Queue,
    prefetch: u16,
) -> Result<Consumer, TransportError> {
    let prefetch = prefetch.max(1);
    let first = subscribe(connection, queue, prefetch).await?;
    let (sender, receiver) = mpsc::channel(usize::from(prefetch).min(MAX_BUFFERED_DELIVERIES));
    tokio::spawn(run(first, state, queue.clone(), prefetch, sender));
    Ok(Consumer::new(Deliveries(receiver)))
}

async fn subscribe(connection: &Connection, queue: &Queue, prefetch: u16) -> Result<Subscription, TransportError> {
    let channel = declare_queue(connection, queue).await?;
    within(CALL_TIMEOUT, channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
    let consume = channel.basic_consume(
        short_name(&queue.name)?,
        ShortString::default(),
        BasicConsumeOptions::default(),
        FieldTable::default(),
    );
    let deliveries = within(CALL_TIMEOUT, consume).await?;
    Ok(Subscription { channel, deliveries, stream: connection.stream() })
}

async fn run(
    first: Subscription,
    mut state: watch::Receiver<ConnectionState>,
    queue: Queue,
    prefetch: u16,
    sender: mpsc::Sender<(Channel, Delivery)>,
) {
    let mut subscription = first;
    let mut backoff = Backoff::new();
    loop {
        let since = Instant::now();
        let ended = forward(&mut subscription, &queue, &sender).await;
        close_channel(&subscription.channel).await;
        let Ended::ByBroker(reason) = ended else { return };
        // The loss of a connection is logged once, by its supervisor.
        let is_up = matches!(&*state.borrow(), ConnectionState::Up(connection) if connection.is_up());
        if is_up {
            tracing::warn!(queue = queue.name, reason, "consuming ended; starting again");
        }
        // A broker that ends each subscription at once is not asked again without a pause.
        let pause = if since.elapsed() >= BACKOFF_RESET_AFTER {
            backoff.reset();
            Duration::ZERO
        } else if is_up {
            backoff.next()
        } else {
            Duration::ZERO
        };
        let resubscribed = async {
            tokio::time::sleep(pause).await;
            resubscribe(&mut state, &queue, prefetch, &mut backoff).await
        };
        subscription = tokio::select! {
            () = sender.closed() => return,
            resubscribed = resubscribed => match resubscribed {
                Some(resubscribed) => resubscribed,
                None => return,
            },
        };
        tracing::info!(queue = queue.name, "consuming again");
    }
}

/// Why a subscription ended.
enum Ended {
    /// The application has dropped its consumer.
    ByApplication,
    /// The broker or the connection ended it, for this reason.
    ByBroker(String),
}

/// Forwards deliveries to the application until the subscription ends.
async fn forward(subscription: &mut Subscription, queue: &Queue, sender: &mpsc::Sender<(Channel, Delivery)>) -> Ended {
    let Subscription { channel, deliveries, stream } = subscription;
    loop {
        let next = tokio::select! {
            biased;
            () = sender.closed() => return Ended::ByApplication,
            next = deliveries.next() => next,
        };
        let delivery = match next {
            Some(Ok(delivery)) => delivery,
            Some(Err(error)) => return Ended::ByBroker(classify(&error).to_string()),
            None => return Ended::ByBroker("cancelled by the broker".to_owned()),
        };
        let settle = AmqpSettle { channel: channel.clone(), tag: delivery.delivery_tag };
        if let Some(kind) = delivery.properties.kind() {
            let settlement = match Withheld::read(kind.as_str()) {
                Withheld::TooLarge(length) => {
                    if DROPPED_LOG.next(SystemClock.now()) == LogDecision::Log {
                        tracing::warn!(
                            queue = queue.name,
                            length,
                            limit = MAX_BODY_BYTES,
                            "dropped a message that is too large"
                        );
                    }
                    Settlement::Ack
                }
                Withheld::NoCapacity => {
                    tokio::select! {
                        () = sender.closed() => return Ended::ByApplication,
                        () = wait_for_capacity(channel, stream) => Settlement::Requeue,
                    }
                }
            };
            if let Err(error) = settle.settle(settlement).await {
                tracing::debug!(%error, "a withheld message will be delivered again");
            }
            continue;
        }
        let content_type = delivery.properties.content_type().as_ref().map(|t| t.as_str().to_owned());
        let delivery = Delivery::new(delivery.data, Acker::new(settle))
            .content_type(content_type.unwrap_or_default())
            .redelivered(delivery.redelivered);
        if sender.send((channel.clone(), delivery)).await.is_err() {
            return Ended::ByApplication;
        }
    }
}

/// Waits until the connection holds less than half of what it may, or is lost.
async fn wait_for_capacity(channel: &Channel, stream: &watch::Receiver<StreamState>) {
    while channel.status().connected() && stream.borrow().held_bytes > MAX_HELD_BYTES / 2 {
        tokio::time::sleep(CAPACITY_CHECK_INTERVAL).await;
    }
}

/// Subscribes again as soon as possible; `None` if the transport is closed. Logs the error when it changes, not for every attempt.
async fn resubscribe(
    state: &mut watch::Receiver<ConnectionState>,
    queue: &Queue,
    prefetch: u16,
    backoff: &mut Backoff,
) -> Option<Subscription> {
    let mut last_error = None;
    loop {
        let connection = wait_until_up(state).await.ok()?;
        match subscribe(&connection, queue, prefetch).await {
            Ok(subscription) => return Some(subscription),
            Err(error) => {
                if last_error.as_ref() != Some(&error) {
                    tracing::warn!(queue = queue.name, %error, "cannot consume again yet; retrying");
                    last_error = Some(error);
                }
            }
        }
        drop(connection);
        tokio::time::sleep(backoff.next()).await;
    }
}

/// The deliveries for the application. Those whose channel is closed are left out: they cannot be settled, and will be redelivered.
#[derive(Debug)]
struct Deliveries(mpsc::Receiver<(Channel, Delivery)>);

impl Stream for Deliveries {
    type Item = Delivery;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        loop {
            match std::task::ready!(self.0.poll_recv(cx)) {
                Some((channel, delivery)) if channel.status().connected() => return Poll::Ready(Some(delivery)),
                Some(_) => {}
                None => return Poll::Ready(None),
            }
        }
    }
}

/// Settles a delivery on the channel that it arrived on, and on no other.
#[derive(Debug)]
struct AmqpSettle {
    channel: Channel,
    tag: u64,
}

#[async_trait]
impl Settle for AmqpSettle {
    async fn settle(&self, settlement: Settlement) -> Result<(), TransportError> {
        if !self.channel.status().connected() {
            return Err(TransportError::Disconnected);
        }
        // The first poll queues the frame in order. Waiting until it has reached the socket would tell nothing: the broker does not
        // confirm settlements.
        let sent = match settlement {
            Settlement::Ack => self.channel.basic_ack(self.tag, BasicAckOptions::default()).now_or_never(),
            Settlement::Requeue => {
                let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
                self.channel.basic_nack(self.tag, options).now_or_never()
            }
        };
        match sent {
            None | Some(Ok(())) => Ok(()),
            Some(Err(_)) => Err(TransportError::Disconnected),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::DurableOptions;

    #[test]
    fn durations_are_limited_to_the_brokers_range() {
        assert_eq!(milliseconds(Duration::from_secs(3)), 3_000);
        assert_eq!(milliseconds(Duration::from_secs(u64::MAX)), u32::MAX);
        let kind = DurableOptions::new().expires_after(Duration::ZERO).into();
        assert_eq!(arguments(kind).inner().get("x-expires"), Some(&AMQPValue::LongLongInt(1)));
    }

    #[test]
    fn rejects_names_that_amqp_cannot_carry() {
        for name in ["", "amq.direct", &"x".repeat(256)] {
            assert_eq!(short_name(name), Err(TransportError::Name(name.to_owned())));
        }
        assert_eq!(short_name(&"x".repeat(255)).unwrap().as_str().len(), 255);
    }
}
