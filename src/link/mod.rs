//! Where a serializer meets a transport: the one hot path of agents, mappers, proxies and files.
//!
//! [`Link::send`] seals and publishes; a [`Subscription`] delivers and opens. Short calls of the serializer run on the runtime's threads,
//! long ones on a bounded number of worker threads ([`Cost`](crate::serializer::Cost)); the messages of one queue are handed on in the
//! order of arrival. Refused messages are counted, logged without their content and acknowledged; a message that another process may be
//! able to open is requeued.

mod context;
mod receive;
mod recent;
mod send;

pub(crate) use context::UnverifiedPeer;
pub use context::{Link, LinkBuilder};
pub(crate) use receive::HeldMessage;
pub use receive::{Received, Subscription, acknowledge};
pub(crate) use recent::{RecentMessage, RecentMessages};
pub(crate) use send::wait_for_mappers;
pub use send::{Outbound, SealedMessage, SendError};
