//! The one task that publishes: on a channel of its own, with confirms, many messages in flight at once.
//!
//! One task, because lapin numbers a publish and queues its frames in two steps: two tasks on one channel can have their confirms
//! swapped. What the broker says of one message then has to be found out with care:
//!
//! * A message that reached no queue comes back before its confirm, and lapin hands it out with *some* confirm of those that one
//!   frame of the broker confirmed, not always with its own. So each publish carries a number as its correlation id, and the
//!   verdict on a confirm waits until all confirms of the same frame have been looked at.
//! * When a message makes the broker close the channel, all in flight are lost and the broker does not say which it was. They are
//!   published again one at a time, until the one to blame is found.
//! * When the connection is lost, all in flight are published again on the next one, in order. Their callers' timeouts end it.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use futures_util::FutureExt;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::sync::{mpsc, oneshot, watch};

use super::backoff::Backoff;
use super::connection::{ConnectionState, Generation};
use super::declare::milliseconds;
use super::error::{classify, is_blame, soft, within};
use super::in_flight::InFlightPublishes;
use crate::transport::{CALL_TIMEOUT, Destination, PublishRequest, TransportError};

/// How many messages may be in flight.
const WINDOW: usize = 1024;
/// How many bytes may be in flight, unless it is one message.
const WINDOW_BYTES: usize = 64 * 1024 * 1024;
/// How many may wait to be taken by the publisher, and how many it holds while it cannot publish. A publish beyond them waits
/// for a place.
pub(super) const QUEUED: usize = 16 * 1024;
/// How often the publisher forgets messages whose callers have gone, while it cannot publish.
const FORGET_EVERY: Duration = Duration::from_secs(1);

/// A message to publish, and who waits for it.
pub(super) struct Job {
    pub(super) message: PublishRequest,
    pub(super) names: Names,
    /// An unroutable message to an exchange means that there is no such exchange.
    pub(super) reply: oneshot::Sender<Result<(), TransportError>>,
    pub(super) suspect: bool,
}

/// The texts of a message in the form that AMQP carries, where none is longer than 255 bytes.
#[derive(Clone)]
pub(super) struct Names {
    exchange: ShortString,
    routing_key: ShortString,
    content_type: ShortString,
    message_id: ShortString,
}

impl Names {
    /// # Errors
    /// [`TransportError::Name`] for the first that AMQP cannot carry.
    pub(super) fn of(message: &PublishRequest) -> Result<Self, TransportError> {
        let short = |text: &str| ShortString::try_new(text).map_err(|_| TransportError::Name(text.to_owned()));
        let (exchange, routing_key) = match &message.destination {
            Destination::Queue(queue) => (ShortString::default(), super::declare::name(queue)?),
            Destination::Exchange(exchange) => (super::declare::name(&exchange.0)?, ShortString::default()),
        };
        Ok(Self {
            exchange,
            routing_key,
            content_type: short(&message.content_type)?,
            message_id: short(&message.message_id)?,
        })
    }
}

type Outcome = lapin::Result<Confirmation>;

struct Publisher {
    jobs: mpsc::Receiver<Job>,
    links: watch::Receiver<ConnectionState>,
    /// To be published next.
    waiting: VecDeque<Job>,
    /// The channel in use, none when it is to be opened.
    channel: Option<Channel>,
    in_flight: InFlightPublishes<Job, Outcome>,
    bytes: usize,
    /// Numbers the publishes.
    count: u64,
    /// The numbers of messages that came back and whose confirms have not been judged.
    returned: HashSet<u64>,
    backoff: Backoff,
}

/// Publishes until the transport is closed. Callers that then still wait see their reply dropped.
pub(super) async fn run(jobs: mpsc::Receiver<Job>, links: watch::Receiver<ConnectionState>) {
    let mut publisher = Publisher {
        jobs,
        links,
        waiting: VecDeque::new(),
        channel: None,
        in_flight: InFlightPublishes::new(),
        bytes: 0,
        count: 0,
        returned: HashSet::new(),
        backoff: Backoff::new(),
    };
    let mut forget = tokio::time::interval(FORGET_EVERY);
    forget.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let link = publisher.links.borrow_and_update().clone();
        match link {
            ConnectionState::Closed => return,
            ConnectionState::Down => {}
            ConnectionState::Up(generation) => {
                if publisher.channel.is_none() {
                    publisher.open(&generation).await;
                }
                if !generation.is_blocked() {
                    publisher.launch();
                }
            }
        }
        let has_room = publisher.waiting.len() < QUEUED;
        tokio::select! {
            biased;
            changed = publisher.links.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = publisher.in_flight.woken() => publisher.land(),
            job = publisher.jobs.recv(), if has_room => match job {
                Some(job) => publisher.waiting.push_back(job),
                None => return,
            },
            _ = forget.tick(), if !publisher.waiting.is_empty() => {
                publisher.waiting.retain(|job| !job.reply.is_closed());
            }
        }
    }
}

impl Publisher {
    async fn open(&mut self, generation: &Generation) {
        match open_channel(generation).await {
            Ok(channel) => {
                self.channel = Some(channel);
                self.backoff.reset();
            }
            Err(error) => {
                tracing::debug!(%error, "no channel to publish on yet");
                tokio::time::sleep(self.backoff.next()).await;
            }
        }
    }

    /// Publishes what waits, as far as the window allows.
    fn launch(&mut self) {
        while let Some(channel) = &self.channel {
            if self.in_flight.len() >= WINDOW || (self.bytes >= WINDOW_BYTES && self.in_flight.len() > 0) {
                return;
            }
            let Some(job) = self.waiting.pop_front().or_else(|| self.jobs.try_recv().ok()) else { return };
            if job.reply.is_closed() {
                continue;
            }
            // What may have broken the last channel flies alone.
            if self.in_flight.len() > 0 && (job.suspect || self.in_flight.values().any(|job| job.suspect)) {
                self.waiting.push_front(job);
                return;
            }
            self.count += 1;
            self.bytes += job.message.body.len();
            let flight = publish(channel.clone(), self.count, &job);
            self.in_flight.launch(self.count, job, flight);
        }
    }

    /// Looks at every publish that the broker has said something of.
    fn land(&mut self) {
        let mut landed = self.take_landed();
        let mut lost = Vec::new();
        while !landed.is_empty() {
            if let Some(channel) = &self.channel {
                // lapin hands out the confirms of one frame one after the other, under a lock that this call takes for a moment:
                // when it returns, all that were confirmed together with those in `landed` have woken their futures.
                let _ = channel.wait_for_confirms().now_or_never();
            }
            let later = self.take_landed();
            for (tag, job, outcome) in landed {
                match self.judge(tag, &job, outcome) {
                    Ok(verdict) => {
                        // A caller that has given up does not hear it.
                        let _ = job.reply.send(verdict);
                    }
                    Err(error) => lost.push((job, error)),
                }
            }
            landed = later;
        }
        if let Some(((_, error), _)) = lost.split_first() {
            let error = error.clone();
            self.publish_again(lost.into_iter().map(|(job, _)| job).collect(), &error);
        }
    }

    fn take_landed(&mut self) -> Vec<(u64, Job, Outcome)> {
        let landed = self.in_flight.poll();
        for (_, job, outcome) in &landed {
            self.bytes = self.bytes.saturating_sub(job.message.body.len());
            if let Ok(Confirmation::Ack(Some(message)) | Confirmation::Nack(Some(message))) = outcome
                && let Some(id) = message.delivery.properties.correlation_id()
                && let Ok(id) = id.as_str().parse()
            {
                self.returned.insert(id);
            }
        }
        landed
    }

    /// What the caller is to be told, or why it has to be published again.
    fn judge(&mut self, tag: u64, job: &Job, outcome: Outcome) -> Result<Result<(), TransportError>, lapin::Error> {
        let returned = self.returned.remove(&tag);
        match outcome? {
            Confirmation::Ack(_) | Confirmation::Nack(_) if returned => Ok(Err(unroutable(&job.message.destination))),
            Confirmation::Ack(_) => Ok(Ok(())),
            Confirmation::Nack(_) => Ok(Err(TransportError::Nacked)),
            Confirmation::NotRequested => Ok(Err(TransportError::Broker("it does not confirm publishes".into()))),
        }
    }

    /// The channel is gone: what was in flight goes to the head of what waits, in order, for the next one.
    fn publish_again(&mut self, mut lost: Vec<Job>, error: &lapin::Error) {
        self.channel = None;
        self.returned.clear();
        self.bytes = 0;
        lost.extend(self.in_flight.abandon());
        let blame = is_blame(error);
        if blame && let [_] = lost.as_slice() {
            for job in lost {
                let _ = job.reply.send(Err(refusal(&job.message.destination, error)));
            }
            return;
        }
        for mut job in lost.into_iter().rev() {
            job.suspect |= blame;
            self.waiting.push_front(job);
        }
    }
}

async fn open_channel(generation: &Generation) -> Result<Channel, TransportError> {
    let channel = generation.channel().await?;
    within(CALL_TIMEOUT, channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

fn publish(channel: Channel, number: u64, job: &Job) -> impl Future<Output = Outcome> + Send + 'static {
    let Names { exchange, routing_key, content_type, message_id } = job.names.clone();
    let message = job.message.clone();
    let mandatory = matches!(message.destination, Destination::Queue(_));
    let mut properties = BasicProperties::default()
        .with_content_type(content_type)
        .with_message_id(message_id)
        .with_correlation_id(number.to_string().into())
        .with_delivery_mode(if message.persistent { 2 } else { 1 });
    if let Some(expires) = message.expires_in {
        properties = properties.with_expiration(milliseconds(expires).to_string().into());
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
        Destination::Exchange(exchange) => TransportError::Unroutable(exchange.0.clone()),
    }
}

/// What is wrong with the message because of which the broker closed the channel.
fn refusal(destination: &Destination, error: &lapin::Error) -> TransportError {
    match soft(error) {
        Some((AMQPSoftError::NOTFOUND, _)) => unroutable(destination),
        _ => classify(error),
    }
}
