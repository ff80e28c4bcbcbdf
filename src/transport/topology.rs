//! The names and properties of the exchanges and queues that nodes use.
//!
//! Identities are given in their wire form (`nanite-NAME`, `mapper-NAME`), which cannot contain a `.`; so no name below can be
//! that of another identity.

use std::time::Duration;

use super::message::{DurableOptions, Queue};

/// The exchange for heartbeats of agents, to every mapper.
pub const HEARTBEAT: &str = "heartbeat";
/// The exchange for registrations of agents, to every mapper.
pub const REGISTRATION: &str = "registration";
/// The exchange for questions of mappers, to every agent.
pub const ADVERTISE: &str = "advertise";
/// The queue of proxied requests, shared by all mappers.
pub const REQUEST: &str = "request";
/// The offline queue: requests that wait for an agent.
pub const OFFLINE: &str = "mapper-offline";

/// The exchanges that all nodes share.
pub const EXCHANGES: [&str; 3] = [HEARTBEAT, REGISTRATION, ADVERTISE];

/// After how long without a consumer the inbox of an agent is deleted.
pub const AGENT_INBOX_EXPIRES_AFTER: Duration = Duration::from_secs(24 * 3600);
/// After how long without a consumer the inbox of a mapper process is deleted.
pub const MAPPER_INBOX_EXPIRES_AFTER: Duration = Duration::from_secs(10 * 60);

/// The name of an agent's inbox: `nanite-NAME`.
pub fn agent_inbox_name(identity: &str) -> String {
    identity.to_owned()
}

/// The name of the queue of one process, where its answers arrive: `nanite-NAME.INSTANCE` or `mapper-NAME.INSTANCE`.
///
/// ```
/// assert_eq!(nanite::transport::topology::process_queue_name("mapper-desk", 42), "mapper-desk.42");
/// ```
pub fn process_queue_name(identity: &str, instance: u64) -> String {
    format!("{identity}.{instance}")
}

/// An agent's inbox: requests.
pub fn agent_inbox(identity: &str) -> Queue {
    expiring(agent_inbox_name(identity), AGENT_INBOX_EXPIRES_AFTER)
}

/// The control queue of one agent process: questions of mappers, answers to its own requests.
pub fn agent_control(identity: &str, instance: u64) -> Queue {
    Queue::exclusive(process_queue_name(identity, instance)).bind(ADVERTISE)
}

/// The inbox of one mapper process: answers.
pub fn mapper_inbox(identity: &str, instance: u64) -> Queue {
    expiring(process_queue_name(identity, instance), MAPPER_INBOX_EXPIRES_AFTER)
}

/// The presence queue of one mapper process: registrations and heartbeats.
pub fn mapper_presence(identity: &str, instance: u64) -> Queue {
    Queue::exclusive(format!("{identity}.{instance}.presence")).bind(REGISTRATION).bind(HEARTBEAT)
}

/// The queue of proxied requests.
pub fn requests() -> Queue {
    Queue::durable(REQUEST)
}

/// The offline queue. One mapper at a time consumes it, so that requests keep their order.
pub fn offline() -> Queue {
    Queue::new(OFFLINE, DurableOptions::new().ordered(true))
}

/// The queues that all mappers share.
pub fn shared_queues() -> [Queue; 2] {
    [requests(), offline()]
}

fn expiring(name: String, unused: Duration) -> Queue {
    Queue::new(name, DurableOptions::new().expires_after(unused))
}
