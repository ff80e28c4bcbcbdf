//! What a broker may make a connection hold. The client library would hold anything: bodies of any length, deliveries beyond the
//! prefetch, returned messages that were not published.
//!
//! * A broker that sends more than it was asked for breaks the protocol: the connection ends with a [`Violation`].
//! * What anyone who may publish can put into a queue never ends the connection: it would be delivered again on the next one. Of the
//!   properties of a message, only those that are used are passed on. A body that is too large, or that would make the connection
//!   hold too many bytes, is left out, and the consumer learns that ([`Withheld`]).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::frames::{BASIC, ContentHeader, METHOD, Reader, write_frame, write_short_string};
use crate::transport::MAX_BODY_BYTES;

/// The largest frame that is requested of the broker, and accepted. lapin keeps buffers of 64 frames per connection: with RabbitMQ's
/// 128 KiB that would be 8 MiB. Content headers can be larger, since RabbitMQ never splits them.
pub(super) const MAX_FRAME_BYTES: u32 = 32 * 1024;
/// The largest message that is read to drop it: RabbitMQ's own maximum. Also the longest content header.
pub(super) const MAX_DROPPED_BYTES: u64 = 512 * 1024 * 1024;
/// The most bytes of unsettled messages that one connection holds, unless it is a single message.
pub(super) const MAX_HELD_BYTES: u64 = 128 * 1024 * 1024;
/// How many more unsettled deliveries than the prefetch are accepted.
const DELIVERY_SLACK: usize = 16;
/// The most requests of the broker whose answers it has not read.
const MAX_UNANSWERED: u32 = 64;

/// How a broker broke the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("the broker does not speak AMQP 0-9-1")]
    NotAmqp,
    #[error("the broker sent a frame of {length} bytes; the limit is {limit}")]
    FrameTooLong { length: u64, limit: u64 },
    #[error("the broker announced a message of {length} bytes; the limit is {limit}")]
    BodyTooLong { length: u64, limit: u64 },
    #[error("the broker delivered more than {limit} messages before they were acknowledged")]
    TooManyDeliveries { limit: usize },
    #[error("the broker returned more messages than were published")]
    TooManyReturns,
    #[error("the broker sent {MAX_UNANSWERED} requests without reading the answers")]
    TooManyRequests,
    #[error("the broker sent a frame out of order: {0}")]
    OutOfOrder(&'static str),
}

/// Why a delivered message comes without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Withheld {
    /// It has this many bytes, which is over the limit.
    TooLarge(u64),
    /// The connection holds too many bytes at the moment.
    NoCapacity,
}

impl Withheld {
    /// Passed on as the property `type`. The guard leaves out the one that the publisher has set.
    fn write(self) -> String {
        match self {
            Self::TooLarge(length) => length.to_string(),
            Self::NoCapacity => "no capacity".to_owned(),
        }
    }

    /// Reads the property `type` of a delivery.
    pub(super) fn read(kind: &str) -> Self {
        kind.parse().map_or(Self::NoCapacity, Self::TooLarge)
    }
}

/// What one connection holds, and what the broker was asked for.
#[derive(Debug)]
pub(super) struct Accounts {
    frame_max: u32,
    channels: HashMap<u16, Channel>,
    unanswered: u32,
    /// The bytes of unsettled messages.
    held_bytes: u64,
    /// Why the broker accepts no messages at the moment.
    blocked: Option<String>,
}

#[derive(Debug, Default)]
struct Channel {
    prefetch: u16,
    is_consuming: bool,
    /// The unsettled deliveries, with their lengths.
    unsettled: BTreeMap<u64, u64>,
    /// The numbers of the publishes that are not confirmed.
    unconfirmed: BTreeSet<u64>,
    published: u64,
    /// Returned messages whose confirms have not arrived.
    returned: usize,
    content: Content,
}

/// What is to arrive on a channel next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Content {
    #[default]
    None,
    HeaderOfDelivery {
        tag: u64,
    },
    HeaderOfReturn,
    Body {
        remaining: u64,
        is_withheld: bool,
    },
}

impl Accounts {
    pub(super) fn new() -> Self {
        Self { frame_max: MAX_FRAME_BYTES, channels: HashMap::new(), unanswered: 0, held_bytes: 0, blocked: None }
    }

    /// The largest frame of methods and bodies.
    pub(super) fn frame_max(&self) -> u32 {
        self.frame_max
    }

    pub(super) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    pub(super) fn blocked(&self) -> Option<&str> {
        self.blocked.as_deref()
    }

    fn channel(&mut self, number: u16) -> Result<&mut Channel, Violation> {
        self.channels.get_mut(&number).ok_or(Violation::OutOfOrder("content on a channel that is not open"))
    }

    /// Takes a method of the broker, and appends what the client may read of it.
    pub(super) fn receive_method(&mut self, number: u16, payload: &[u8], out: &mut Vec<u8>) -> Result<(), Violation> {
        let malformed = Violation::OutOfOrder("a method without its fields");
        let mut fields = Reader(payload);
        let method = fields.u16().zip(fields.u16()).ok_or(malformed.clone())?;
        match method {
            // connection.start: its table of properties is not used.
            (10, 10) => {
                let start = without_server_properties(payload, fields).ok_or(malformed)?;
                write_frame(out, METHOD, number, &start);
                return Ok(());
            }
            // connection.blocked and unblocked: only changes are passed on.
            (10, 60) => {
                let reason = fields.short_string().ok_or(malformed)?;
                if self.blocked.replace(String::from_utf8_lossy(reason).into_owned()).is_some() {
                    return Ok(());
                }
            }
            (10, 61) if self.blocked.take().is_none() => return Ok(()),
            // channel.flow, channel.close.
            (20, 20 | 40) => self.count_request()?,
            // channel.close-ok.
            (20, 41) => self.remove_channel(number),
            // basic.cancel.
            (BASIC, 30) => {
                fields.short_string().ok_or(malformed.clone())?;
                if fields.u8().ok_or(malformed)? & 1 == 0 {
                    self.count_request()?;
                }
            }
            // basic.return.
            (BASIC, 50) => {
                let channel = self.channel(number)?;
                channel.expect_no_content()?;
                if channel.returned >= channel.unconfirmed.len() {
                    return Err(Violation::TooManyReturns);
                }
                channel.returned += 1;
                channel.content = Content::HeaderOfReturn;
                let mut returned = payload.get(..4).unwrap_or_default().to_vec();
                returned.extend(fields.u16().ok_or(malformed)?.to_be_bytes());
                // Text, exchange and routing key are not used.
                returned.extend([0; 3]);
                write_frame(out, METHOD, number, &returned);
                return Ok(());
            }
            // basic.deliver.
            (BASIC, 60) => {
                let channel = self.channel(number)?;
                channel.expect_no_content()?;
                let consumer = fields.short_string().ok_or(malformed.clone())?;
                let (tag, redelivered) = fields.u64().zip(fields.u8()).ok_or(malformed)?;
                channel.count_delivery(tag)?;
                channel.content = Content::HeaderOfDelivery { tag };
                let mut delivered = payload.get(..4).unwrap_or_default().to_vec();
                write_short_string(&mut delivered, consumer);
                delivered.extend(tag.to_be_bytes());
                delivered.push(redelivered);
                // Exchange and routing key are not used. Publishers can write any bytes there.
                delivered.extend([0; 2]);
                write_frame(out, METHOD, number, &delivered);
                return Ok(());
            }
            // basic.get-ok.
            (BASIC, 71) => return Err(Violation::OutOfOrder("a message that was not asked for")),
            // basic.ack and basic.nack: confirms.
            (BASIC, 80 | 120) => {
                let (tag, bits) = fields.u64().zip(fields.u8()).ok_or(malformed)?;
                self.channel(number)?.confirm(tag, bits & 1 != 0);
            }
            _ => {}
        }
        write_frame(out, METHOD, number, payload);
        Ok(())
    }

    fn count_request(&mut self) -> Result<(), Violation> {
        self.unanswered += 1;
        if self.unanswered > MAX_UNANSWERED { Err(Violation::TooManyRequests) } else { Ok(()) }
    }

    fn remove_channel(&mut self, number: u16) {
        let channel = self.channels.remove(&number).unwrap_or_default();
        self.held_bytes -= channel.unsettled.values().sum::<u64>().min(self.held_bytes);
    }

    /// Takes a content header, and appends one with the properties that are used.
    pub(super) fn receive_content_header(
        &mut self,
        number: u16,
        mut header: ContentHeader,
        out: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        let held_bytes = self.held_bytes;
        let channel = self.channel(number)?;
        let length = header.body_size;
        let (is_withheld, held) = match channel.content {
            _ if header.class != BASIC => return Err(Violation::OutOfOrder("content of an unknown class")),
            Content::None | Content::Body { .. } => {
                return Err(Violation::OutOfOrder("a content header without a method"));
            }
            _ if length > MAX_DROPPED_BYTES => {
                return Err(Violation::BodyTooLong { length, limit: MAX_DROPPED_BYTES });
            }
            // The publisher still has it.
            Content::HeaderOfReturn => (true, 0),
            Content::HeaderOfDelivery { tag } => {
                let withheld = if length > MAX_BODY_BYTES as u64 {
                    Some(Withheld::TooLarge(length))
                } else if held_bytes > 0 && held_bytes.saturating_add(length) > MAX_HELD_BYTES {
                    Some(Withheld::NoCapacity)
                } else {
                    channel.unsettled.insert(tag, length);
                    None
                };
                header.kind = withheld.map(|withheld| withheld.write().into_bytes());
                if withheld.is_some() { (true, 0) } else { (false, length) }
            }
        };
        channel.content = if length == 0 { Content::None } else { Content::Body { remaining: length, is_withheld } };
        if is_withheld {
            header.body_size = 0;
        }
        self.held_bytes += held;
        header.write_frame(out, number);
        Ok(())
    }

    /// Takes the beginning of a body frame. Returns whether it is withheld.
    pub(super) fn receive_body(&mut self, number: u16, length: u64) -> Result<bool, Violation> {
        let channel = self.channel(number)?;
        let Content::Body { remaining, is_withheld } = channel.content else {
            return Err(Violation::OutOfOrder("a body without a content header"));
        };
        channel.content = match remaining.checked_sub(length) {
            None => return Err(Violation::OutOfOrder("a body longer than announced")),
            Some(0) => Content::None,
            Some(remaining) => Content::Body { remaining, is_withheld },
        };
        Ok(is_withheld)
    }

    /// Takes the first bytes of a method that the client has sent.
    pub(super) fn sent_method(&mut self, number: u16, mut fields: Reader<'_>) {
        let Some(method) = fields.u16().zip(fields.u16()) else { return };
        let channel = self.channels.get_mut(&number);
        match (method, channel) {
            // connection.tune-ok.
            ((10, 31), _) => {
                if let Some((_, frame_max)) = fields.u16().zip(fields.u32()) {
                    self.frame_max = self.frame_max.min(frame_max);
                }
            }
            // channel.open.
            ((20, 10), _) => drop(self.channels.insert(number, Channel::default())),
            // channel.close-ok.
            ((20, 41), _) => {
                self.unanswered = self.unanswered.saturating_sub(1);
                self.remove_channel(number);
            }
            // channel.flow-ok, basic.cancel-ok.
            ((20, 21) | (BASIC, 31), _) => self.unanswered = self.unanswered.saturating_sub(1),
            // basic.qos.
            ((BASIC, 10), Some(channel)) => {
                channel.prefetch = fields.u32().zip(fields.u16()).map_or(0, |(_, prefetch)| prefetch);
            }
            // basic.consume.
            ((BASIC, 20), Some(channel)) => channel.is_consuming = true,
            // basic.publish.
            ((BASIC, 40), Some(channel)) => {
                channel.published += 1;
                channel.unconfirmed.insert(channel.published);
            }
            // basic.ack, basic.reject, basic.nack. A reject has no bit for several deliveries; ours set none.
            ((BASIC, 80 | 90 | 120), Some(channel)) => {
                if let Some(length) = fields.u64().and_then(|tag| channel.unsettled.remove(&tag)) {
                    self.held_bytes = self.held_bytes.saturating_sub(length);
                }
            }
            _ => {}
        }
    }
}

impl Channel {
    fn expect_no_content(&self) -> Result<(), Violation> {
        match self.content {
            Content::None => Ok(()),
            _ => Err(Violation::OutOfOrder("a message within another")),
        }
    }

    fn count_delivery(&mut self, tag: u64) -> Result<(), Violation> {
        let limit = if self.is_consuming { usize::from(self.prefetch) } else { 0 } + DELIVERY_SLACK;
        // A tag is used once. The length follows.
        if self.unsettled.insert(tag, 0).is_some() {
            return Err(Violation::OutOfOrder("a delivery tag that is in use"));
        }
        if self.unsettled.len() > limit { Err(Violation::TooManyDeliveries { limit }) } else { Ok(()) }
    }

    fn confirm(&mut self, tag: u64, is_multiple: bool) {
        let before = self.unconfirmed.len();
        match (is_multiple, tag) {
            (false, _) => drop(self.unconfirmed.remove(&tag)),
            (true, 0) => self.unconfirmed.clear(),
            (true, _) => self.unconfirmed = self.unconfirmed.split_off(&tag.saturating_add(1)),
        }
        self.returned = self.returned.saturating_sub(before - self.unconfirmed.len());
    }
}

/// The payload of connection.start with an empty table of server properties.
fn without_server_properties(payload: &[u8], mut fields: Reader<'_>) -> Option<Vec<u8>> {
    fields.u16()?;
    let mut start = payload.get(..6)?.to_vec();
    let length = fields.u32()?;
    fields.take(usize::try_from(length).ok()?)?;
    start.extend([0; 4]);
    start.extend(fields.0);
    Some(start)
}
