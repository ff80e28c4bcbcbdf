//! The task that publishes: on a channel of its own, with publisher confirms, and many publishes in flight at once.
//!
//! There is only one such task, because lapin numbers a publish and queues its frames in two steps: two tasks on one channel could
//! have their confirms swapped. What the broker says about each message is found out with care:
//!
//! * A message that reached no queue is returned before its confirm, and lapin attaches it to *one* of the confirms that arrived in
//!   the same frame, not always its own. So each publish carries its number as the correlation id, and the result of a confirm is
//!   decided only after all confirms of the same frame have been read.
//! * If a message makes the broker close the channel, all publishes in flight are lost and the broker does not say which one caused
//!   it. They are published again one at a time, until the cause is found.
//! * If the connection is lost, all publishes in flight are published again on the next one, in order. Their callers' timeouts limit
//!   this.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures_util::FutureExt;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::connection::{Backoff, Connection, ConnectionState, channel_error, classify, is_caused_by_client, within};
use super::queues::{milliseconds, short_name};
use crate::transport::{CALL_TIMEOUT, Destination, PublishRequest, TransportError};

/// The most publishes in flight.
const MAX_IN_FLIGHT: usize = 1024;
/// The most bytes in flight, unless it is a single message.
const MAX_IN_FLIGHT_BYTES: usize = 64 * 1024 * 1024;
/// The most publishes that wait for the task, and the most that the task holds while it cannot publish. Further publishes wait for
/// capacity.
pub(super) const QUEUE_CAPACITY: usize = 16 * 1024;
/// How often messages whose callers have given up are dropped while the task cannot publish.
const PRUNE_INTERVAL: Duration = Duration::from_secs(1);

/// A message to publish, with its caller.
pub(super) struct PendingPublish {
    pub(super) message: PublishRequest,
    pub(super) properties: ShortStrings,
    /// For an exchange, [`TransportError::Unroutable`] means that the exchange does not exist.
    pub(super) result: oneshot::Sender<Result<(), TransportError>>,
    /// Whether it may be the cause why the broker closed the channel.
    pub(super) is_suspect: bool,
}

/// The texts of a message as AMQP short strings, at most 255 bytes each.
#[derive(Clone)]
pub(super) struct ShortStrings {
    exchange: ShortString,
    routing_key: ShortString,
    content_type: ShortString,
    message_id: ShortString,
}

impl ShortStrings {
    /// # Errors
    /// [`TransportError::Name`] for the first that is too long.
    pub(super) fn of(message: &PublishRequest) -> Result<Self, TransportError> {
        let short = |text: &str| ShortString::try_new(text).map_err(|_| TransportError::Name(text.to_owned()));
        let (exchange, routing_key) = match &message.destination {
            Destination::Queue(queue) => (ShortString::default(), short_name(queue)?),
            Destination::Exchange(exchange) => (short_name(&exchange.name)?, ShortString::default()),
        };
        Ok(Self {
            exchange,
            routing_key,
            content_type: short(&message.content_type)?,
            message_id: short(&message.message_id)?,
        })
    }
}

type Confirmed = lapin::Result<Confirmation>;

struct Publisher {
    requests: mpsc::Receiver<PendingPublish>,
    state: watch::Receiver<ConnectionState>,
    /// To be published next.
    waiting: VecDeque<PendingPublish>,
    /// The channel in use; `None` if one is to be opened.
    channel: Option<Channel>,
    in_flight: InFlightPublishes<PendingPublish, Confirmed>,
    bytes_in_flight: usize,
    /// The number of the last publish.
    last_number: u64,
    /// The numbers of returned messages whose confirms have not been decided.
    returned: HashSet<u64>,
    backoff: Backoff,
}

/// Publishes until the transport is closed. The results of publishes that wait then are dropped.
pub(super) async fn run(requests: mpsc::Receiver<PendingPublish>, state: watch::Receiver<ConnectionState>) {
    let mut publisher = Publisher {
        requests,
        state,
        waiting: VecDeque::new(),
        channel: None,
        in_flight: InFlightPublishes::new(),
        bytes_in_flight: 0,
        last_number: 0,
        returned: HashSet::new(),
        backoff: Backoff::new(),
    };
    let mut prune = tokio::time::interval(PRUNE_INTERVAL);
    prune.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let state = publisher.state.borrow_and_update().clone();
        match state {
            ConnectionState::Closed => return,
            ConnectionState::Down => {}
            ConnectionState::Up(connection) => {
                if publisher.channel.is_none() {
                    publisher.open_channel(&connection).await;
                }
                if !connection.is_blocked() {
                    publisher.publish_waiting();
                }
            }
        }
        let has_capacity = publisher.waiting.len() < QUEUE_CAPACITY;
        tokio::select! {
            biased;
            changed = publisher.state.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = publisher.in_flight.woken() => publisher.handle_confirms(),
            request = publisher.requests.recv(), if has_capacity => match request {
                Some(request) => publisher.waiting.push_back(request),
                None => return,
            },
            _ = prune.tick(), if !publisher.waiting.is_empty() => {
                publisher.waiting.retain(|request| !request.result.is_closed());
            }
        }
    }
}

impl Publisher {
    async fn open_channel(&mut self, connection: &Connection) {
        match confirming_channel(connection).await {
            Ok(channel) => {
                self.channel = Some(channel);
                self.backoff.reset();
            }
            Err(error) => {
                tracing::debug!(%error, "cannot open a channel to publish on; retrying");
                tokio::time::sleep(self.backoff.next()).await;
            }
        }
    }

    /// Publishes waiting messages, up to the limits of what may be in flight.
    fn publish_waiting(&mut self) {
        while let Some(channel) = &self.channel {
            let in_flight = self.in_flight.len();
            if in_flight >= MAX_IN_FLIGHT || (self.bytes_in_flight >= MAX_IN_FLIGHT_BYTES && in_flight > 0) {
                return;
            }
            let Some(request) = self.waiting.pop_front().or_else(|| self.requests.try_recv().ok()) else { return };
            if request.result.is_closed() {
                continue;
            }
            // A message that may have broken the last channel is in flight alone.
            if in_flight > 0 && (request.is_suspect || self.in_flight.values().any(|request| request.is_suspect)) {
                self.waiting.push_front(request);
                return;
            }
            self.last_number += 1;
            self.bytes_in_flight += request.message.body.len();
            let confirmed = publish(channel.clone(), self.last_number, &request);
            self.in_flight.insert(self.last_number, request, confirmed);
        }
    }

    /// Handles every publish that the broker has confirmed, rejected or returned.
    fn handle_confirms(&mut self) {
        let mut confirmed = self.take_confirmed();
        let mut lost = Vec::new();
        while !confirmed.is_empty() {
            if let Some(channel) = &self.channel {
                // lapin completes the confirms of one frame one after the other, under a lock that this call takes for a moment:
                // when it returns, all confirms of the same frames as those in `confirmed` have woken their futures.
                let _ = channel.wait_for_confirms().now_or_never();
            }
            let later = self.take_confirmed();
            for (number, request, confirm) in confirmed {
                match self.result_of(number, &request, confirm) {
                    Ok(result) => {
                        // The caller may have given up.
                        let _ = request.result.send(result);
                    }
                    Err(error) => lost.push((number, request, error)),
                }
            }
            confirmed = later;
        }
        if let Some(((.., error), _)) = lost.split_first() {
            let error = error.clone();
            self.publish_again(lost.into_iter().map(|(number, request, _)| (number, request)).collect(), &error);
        }
    }

    fn take_confirmed(&mut self) -> Vec<(u64, PendingPublish, Confirmed)> {
        let confirmed = self.in_flight.poll_woken();
        for (_, request, confirm) in &confirmed {
            self.bytes_in_flight = self.bytes_in_flight.saturating_sub(request.message.body.len());
            if let Ok(Confirmation::Ack(Some(message)) | Confirmation::Nack(Some(message))) = confirm
                && let Some(number) = message.delivery.properties.correlation_id()
                && let Ok(number) = number.as_str().parse()
            {
                self.returned.insert(number);
            }
        }
        confirmed
    }

    /// The result for the caller, or why the message must be published again.
    fn result_of(
        &mut self,
        number: u64,
        request: &PendingPublish,
        confirm: Confirmed,
    ) -> Result<Result<(), TransportError>, lapin::Error> {
        let returned = self.returned.remove(&number);
        match confirm? {
            Confirmation::Ack(_) | Confirmation::Nack(_) if returned => {
                Ok(Err(unroutable(&request.message.destination)))
            }
            Confirmation::Ack(_) => Ok(Ok(())),
            Confirmation::Nack(_) => Ok(Err(TransportError::Nacked)),
            Confirmation::NotRequested => Ok(Err(TransportError::Broker("it does not confirm publishes".into()))),
        }
    }

    /// The channel is closed: returns everything in flight to the head of the waiting messages, in order, for the next channel.
    fn publish_again(&mut self, mut lost: Vec<(u64, PendingPublish)>, error: &lapin::Error) {
        self.channel = None;
        self.returned.clear();
        self.bytes_in_flight = 0;
        lost.extend(self.in_flight.take_all());
        // lapin fails the publishes in no particular order.
        lost.sort_unstable_by_key(|(number, _)| *number);
        let is_caused_by_client = is_caused_by_client(error);
        if is_caused_by_client && let [_] = lost.as_slice() {
            for (_, request) in lost {
                let _ = request.result.send(Err(rejection(&request.message.destination, error)));
            }
            return;
        }
        for (_, mut request) in lost.into_iter().rev() {
            request.is_suspect |= is_caused_by_client;
            self.waiting.push_front(request);
        }
    }
}

async fn confirming_channel(connection: &Connection) -> Result<Channel, TransportError> {
    let channel = connection.channel().await?;
    within(CALL_TIMEOUT, channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

fn publish(
    channel: Channel,
    number: u64,
    request: &PendingPublish,
) -> impl Future<Output = Confirmed> + Send + 'static {
    let ShortStrings { exchange, routing_key, content_type, message_id } = request.properties.clone();
    let message = request.message.clone();
    let mandatory = matches!(message.destination, Destination::Queue(_));
    let mut properties = BasicProperties::default()
        .with_content_type(content_type)
        .with_message_id(message_id)
        .with_correlation_id(number.to_string().into())
        .with_delivery_mode(if message.persistent { 2 } else { 1 });
    if let Some(expires_in) = message.expires_in {
        properties = properties.with_expiration(milliseconds(expires_in).to_string().into());
    }
    let options = BasicPublishOptions { mandatory, ..BasicPublishOptions::default() };
    async move {
        let confirm = channel.basic_publish(exchange, routing_key, options, &message.body, properties).await?;
        confirm.await
    }
}

fn unroutable(destination: &Destination) -> TransportError {
    match destination {
        Destination::Queue(name) => TransportError::Unroutable(name.clone()),
        Destination::Exchange(exchange) => TransportError::Unroutable(exchange.name.clone()),
    }
}

/// The error for a message that made the broker close the channel.
fn rejection(destination: &Destination, error: &lapin::Error) -> TransportError {
    match channel_error(error) {
        Some((AMQPSoftError::NOTFOUND, _)) => unroutable(destination),
        _ => classify(error),
    }
}

/// The publishes that wait for their confirms: futures with their values, in the order of their numbers.
///
/// Unlike the usual sets of futures, [`poll_woken`](Self::poll_woken) polls *every* future that was woken before the call. The
/// publisher depends on this to have read everything that the broker had said at a moment.
struct InFlightPublishes<T, O> {
    publishes: BTreeMap<u64, InFlightPublish<T, O>>,
    woken: Arc<Woken>,
}

struct InFlightPublish<T, O> {
    value: T,
    future: Pin<Box<dyn Future<Output = O> + Send>>,
    waker: Waker,
    /// The output of a future that was ready at its first poll.
    output: Option<O>,
}

#[derive(Default)]
struct Woken {
    numbers: Mutex<Vec<u64>>,
    notify: Notify,
}

struct PublishWaker {
    number: u64,
    woken: Arc<Woken>,
}

impl Wake for PublishWaker {
    fn wake(self: Arc<Self>) {
        self.woken.numbers.lock().push(self.number);
        self.woken.notify.notify_one();
    }
}

impl<T, O> InFlightPublishes<T, O> {
    fn new() -> Self {
        Self { publishes: BTreeMap::new(), woken: Arc::default() }
    }

    fn len(&self) -> usize {
        self.publishes.len()
    }

    fn values(&self) -> impl Iterator<Item = &T> {
        self.publishes.values().map(|publish| &publish.value)
    }

    /// Adds a future and polls it for the first time, at once. Each number is used once.
    fn insert(&mut self, number: u64, value: T, future: impl Future<Output = O> + Send + 'static) {
        let waker = Waker::from(Arc::new(PublishWaker { number, woken: Arc::clone(&self.woken) }));
        // With Tokio's budget a future that is ready could return `Pending`.
        let future = Box::pin(tokio::task::unconstrained(future));
        let mut publish = InFlightPublish { value, future, waker, output: None };
        if let Poll::Ready(output) = publish.future.as_mut().poll(&mut Context::from_waker(&publish.waker)) {
            publish.output = Some(output);
            publish.waker.wake_by_ref();
        }
        self.publishes.insert(number, publish);
    }

    /// Waits until a future was woken. Cancel safe.
    fn woken(&self) -> impl Future<Output = ()> + Send + use<T, O> {
        let woken = Arc::clone(&self.woken);
        async move { woken.notify.notified().await }
    }

    /// Polls every future that was woken, and takes those that are ready.
    fn poll_woken(&mut self) -> Vec<(u64, T, O)> {
        let numbers = std::mem::take(&mut *self.woken.numbers.lock());
        let mut ready = Vec::new();
        for number in numbers {
            let Some(publish) = self.publishes.get_mut(&number) else { continue };
            let output = match publish.output.take() {
                Some(output) => output,
                None => match publish.future.as_mut().poll(&mut Context::from_waker(&publish.waker)) {
                    Poll::Ready(output) => output,
                    Poll::Pending => continue,
                },
            };
            if let Some(publish) = self.publishes.remove(&number) {
                ready.push((number, publish.value, output));
            }
        }
        ready
    }

    /// Takes all that are not ready, with their numbers, in order.
    fn take_all(&mut self) -> Vec<(u64, T)> {
        std::mem::take(&mut self.publishes).into_iter().map(|(number, publish)| (number, publish.value)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn polls_every_woken_publish_and_no_other() {
        let mut in_flight = InFlightPublishes::new();
        let mut ends = Vec::new();
        for number in 0..1_000 {
            let (end, wait) = oneshot::channel::<u64>();
            ends.push(end);
            in_flight.insert(number, number * 10, wait);
        }
        assert!(in_flight.poll_woken().is_empty());
        for end in ends.drain(..500).rev() {
            end.send(7).unwrap();
        }
        in_flight.woken().await;
        let mut ready = in_flight.poll_woken();
        ready.sort_by_key(|(number, ..)| *number);
        assert_eq!(ready.len(), 500);
        assert!(ready.iter().enumerate().all(|(n, ready)| *ready == (n as u64, n as u64 * 10, Ok(7))));
        assert_eq!(in_flight.take_all(), (500..1_000).map(|number| (number, number * 10)).collect::<Vec<_>>());
        assert_eq!(in_flight.len(), 0);
    }

    #[tokio::test]
    async fn a_publish_that_is_ready_at_once_is_reported() {
        let mut in_flight = InFlightPublishes::new();
        in_flight.insert(1, (), std::future::ready("done"));
        in_flight.woken().await;
        assert_eq!(in_flight.poll_woken(), [(1, (), "done")]);
    }
}
