//! Making requests: what mappers and proxies share. How a request is built, what comes back, and the pending requests.

mod answers;
mod builder;
mod forwarded;
mod pending;
mod reply;

pub use answers::{Answers, Event, RequestError};
pub use builder::{Dispatch, Events, RequestBuilder, RequestSpec};
pub(crate) use builder::{after, sealed};
pub(crate) use forwarded::{ForwardedOutcomes, HandedOver};
pub use pending::AgentWorkload;
pub(crate) use pending::PendingRequests;
pub(crate) use reply::ReplyTo;
