//! Consuming from a queue: a channel of its own, anew on each connection and whenever the broker ends the consumption.

use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use futures_util::{FutureExt, Stream, StreamExt};
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::sync::{mpsc, watch};

use super::backoff::Backoff;
use super::connection::{ConnectionState, Generation, up};
use super::declare;
use super::error::{classify, within};
use crate::transport::{Acker, CALL_TIMEOUT, Consumer, Delivery, MAX_BODY, Queue, Settle, Settlement, TransportError};

/// How many deliveries may be between lapin and the program, beside those that lapin holds; all of them within the prefetch.
const HANDED_OVER: usize = 64;

/// A consumption that the broker has agreed to.
#[derive(Debug)]
struct Subscription {
    channel: Channel,
    deliveries: lapin::Consumer,
}

/// Starts to consume. Errors now are the caller's; later ones are dealt with here.
pub(super) async fn start(
    generation: &Generation,
    links: watch::Receiver<ConnectionState>,
    queue: &Queue,
    prefetch: u16,
) -> Result<Consumer, TransportError> {
    let prefetch = prefetch.max(1);
    let first = subscribe(generation, queue, prefetch).await?;
    let (sender, receiver) = mpsc::channel(usize::from(prefetch).min(HANDED_OVER));
    tokio::spawn(keep_consuming(first, links, queue.clone(), prefetch, sender));
    Ok(Consumer::new(Deliveries(receiver)))
}

async fn subscribe(generation: &Generation, queue: &Queue, prefetch: u16) -> Result<Subscription, TransportError> {
    let channel = declare::queue(generation, queue).await?;
    within(CALL_TIMEOUT, channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
    let consume = channel.basic_consume(
        declare::name(&queue.name)?,
        ShortString::default(),
        BasicConsumeOptions::default(),
        FieldTable::default(),
    );
    let deliveries = within(CALL_TIMEOUT, consume).await?;
    Ok(Subscription { channel, deliveries })
}

async fn keep_consuming(
    first: Subscription,
    mut links: watch::Receiver<ConnectionState>,
    queue: Queue,
    prefetch: u16,
    sender: mpsc::Sender<(Channel, Delivery)>,
) {
    let mut subscription = first;
    let mut backoff = Backoff::new();
    loop {
        let end = hand_over(&mut subscription, &queue, &sender).await;
        declare::close(&subscription.channel).await;
        let End::Lost(why) = end else { return };
        // With a connection that is lost or being closed everything ends: its supervisor says so, once.
        if matches!(&*links.borrow(), ConnectionState::Up(generation) if generation.is_up()) {
            tracing::warn!(queue = queue.name, why, "consumption ended; starting it again");
        }
        let again = subscribe_again(&mut links, &queue, prefetch, &mut backoff);
        subscription = tokio::select! {
            () = sender.closed() => return,
            again = again => match again {
                Some(again) => again,
                None => return,
            },
        };
        tracing::info!(queue = queue.name, "consuming again");
    }
}

/// Why no more is handed over.
enum End {
    /// The program has dropped its consumer.
    Dropped,
    /// The broker or the connection ended it.
    Lost(String),
}

async fn hand_over(subscription: &mut Subscription, queue: &Queue, sender: &mpsc::Sender<(Channel, Delivery)>) -> End {
    let Subscription { channel, deliveries } = subscription;
    loop {
        let next = tokio::select! {
            biased;
            () = sender.closed() => return End::Dropped,
            next = deliveries.next() => next,
        };
        let delivery = match next {
            Some(Ok(delivery)) => delivery,
            Some(Err(error)) => return End::Lost(classify(&error).to_string()),
            None => return End::Lost("cancelled by the broker".to_owned()),
        };
        let settle = AmqpSettle { channel: channel.clone(), tag: delivery.delivery_tag };
        if delivery.data.len() > MAX_BODY {
            let length = delivery.data.len();
            tracing::warn!(queue = queue.name, length, limit = MAX_BODY, "message dropped: too large");
            if let Err(error) = settle.settle(Settlement::Ack).await {
                tracing::debug!(%error, "the message comes again");
            }
            continue;
        }
        let content_type = delivery.properties.content_type().as_ref().map(|t| t.as_str().to_owned());
        let delivery = Delivery {
            body: delivery.data.into(),
            content_type: content_type.unwrap_or_default(),
            redelivered: delivery.redelivered,
            acker: Acker::new(settle),
        };
        if sender.send((channel.clone(), delivery)).await.is_err() {
            return End::Dropped;
        }
    }
}

/// Consumes again as soon as it works; none when the transport is closed. Says why it does not work when the reason changes.
async fn subscribe_again(
    links: &mut watch::Receiver<ConnectionState>,
    queue: &Queue,
    prefetch: u16,
    backoff: &mut Backoff,
) -> Option<Subscription> {
    let mut said = None;
    loop {
        let generation = up(links).await.ok()?;
        match subscribe(&generation, queue, prefetch).await {
            Ok(subscription) => {
                backoff.reset();
                return Some(subscription);
            }
            Err(error) => {
                if said.as_ref() != Some(&error) {
                    tracing::warn!(queue = queue.name, %error, "cannot consume yet");
                    said = Some(error);
                }
            }
        }
        drop(generation);
        tokio::time::sleep(backoff.next()).await;
    }
}

/// What the program reads from. Deliveries whose channel has gone are left out: they come again, and nobody could settle them.
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

/// Settles on the channel that the delivery came on, and on no other.
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
        // The first poll puts the frame in order behind what was sent before. That it has reached the socket would be no news: the
        // broker confirms no settlement.
        let told = match settlement {
            Settlement::Ack => self.channel.basic_ack(self.tag, BasicAckOptions::default()).now_or_never(),
            Settlement::Requeue => {
                let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
                self.channel.basic_nack(self.tag, options).now_or_never()
            }
        };
        match told {
            None | Some(Ok(())) => Ok(()),
            Some(Err(_)) => Err(TransportError::Disconnected),
        }
    }
}
