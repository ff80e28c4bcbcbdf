//! Consuming from a queue: on a channel of its own, which starts again on each new connection and whenever the broker ends it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{FutureExt, Stream, StreamExt};
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::accounts::{MAX_HELD_BYTES, Withheld};
use super::connection::{BACKOFF_RESET_AFTER, Backoff, Connection, ConnectionState, classify, wait_until_up, within};
use super::queues::{close_channel, declare_queue, short_name, watch_bindings};
use super::stream::StreamState;
use crate::clock::{Clock, SystemClock};
use crate::limits::{LogDecision, LogLimit};
use crate::transport::{
    Acker, CALL_TIMEOUT, Consumer, Delivery, MAX_BODY_BYTES, Queue, Settle, Settlement, TransportError,
};

/// The most deliveries that are buffered for the application, in addition to those that lapin holds. All of them are within the
/// prefetch.
const MAX_BUFFERED_DELIVERIES: usize = 64;

/// How often a consumer checks whether its connection can hold another message.
const CAPACITY_CHECK_INTERVAL: Duration = Duration::from_millis(20);
/// Log lines about dropped messages: anyone who may publish can cause them.
static DROPPED_LOG: LogLimit = LogLimit::new(5);

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
    if !queue.bindings.is_empty() {
        let consumer = sender.downgrade();
        let is_consuming = move || consumer.upgrade().is_some_and(|sender| !sender.is_closed());
        tokio::spawn(watch_bindings(state.clone(), queue.clone(), is_consuming));
    }
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
