//! The names of exchanges and queues: the original's, and a few of ours.
//!
//! Identities are given in their wire form (`nanite-NAME`, `mapper-NAME`), which cannot hold a `.`; so no name below can be
//! another identity's.

use std::time::Duration;

use super::{Exchange, Queue, QueueKind};

/// Heartbeats of agents, to every mapper.
pub const HEARTBEAT: &str = "heartbeat";
/// Registrations of agents, to every mapper.
pub const REGISTRATION: &str = "registration";
/// Questions of mappers, to every agent.
pub const ADVERTISE: &str = "advertise";
/// The one queue of requests to the mappers; each is taken by one of them.
pub const REQUEST: &str = "request";
/// The queue of requests that wait for an agent.
pub const OFFLINE: &str = "mapper-offline";

/// The exchanges that all nodes share.
pub const EXCHANGES: [&str; 3] = [HEARTBEAT, REGISTRATION, ADVERTISE];

/// How long an inbox that nobody reads is kept.
pub const INBOX_EXPIRES: Duration = Duration::from_secs(24 * 3600);
/// How long the answers to a mapper process that is gone are kept.
pub const ANSWERS_EXPIRES: Duration = Duration::from_secs(10 * 60);

/// The name of an agent's inbox: `nanite-NAME`.
pub fn agent_inbox_name(identity: &str) -> String {
    identity.to_owned()
}

/// The name of the queue of one process, where its answers come: `nanite-NAME.INSTANCE` or `mapper-NAME.INSTANCE`.
pub fn process_queue_name(identity: &str, instance: u64) -> String {
    format!("{identity}.{instance}")
}

/// An agent's inbox.
pub fn agent_inbox(identity: &str) -> Queue {
    durable(agent_inbox_name(identity), Some(INBOX_EXPIRES))
}

/// The control queue of one agent process: questions of mappers, answers to its own requests.
pub fn agent_control(identity: &str, instance: u64) -> Queue {
    Queue {
        name: process_queue_name(identity, instance),
        kind: QueueKind::Exclusive,
        bindings: vec![Exchange(ADVERTISE.into())],
    }
}

/// The inbox of one mapper process: answers.
pub fn mapper_inbox(identity: &str, instance: u64) -> Queue {
    durable(process_queue_name(identity, instance), Some(ANSWERS_EXPIRES))
}

/// The presence queue of one mapper process: registrations and heartbeats.
pub fn mapper_presence(identity: &str, instance: u64) -> Queue {
    Queue {
        name: format!("{identity}.{instance}.presence"),
        kind: QueueKind::Exclusive,
        bindings: vec![Exchange(REGISTRATION.into()), Exchange(HEARTBEAT.into())],
    }
}

/// The queue of requests to the mappers.
pub fn requests() -> Queue {
    durable(REQUEST.into(), None)
}

/// The queue of requests that wait for an agent. One mapper at a time reads it, so that they keep their order.
pub fn offline() -> Queue {
    let kind = QueueKind::Durable { expires: None, quorum: false, ordered: true };
    Queue { name: OFFLINE.into(), kind, bindings: Vec::new() }
}

/// The queues that no node owns.
pub fn shared_queues() -> [Queue; 2] {
    [requests(), offline()]
}

fn durable(name: String, expires: Option<Duration>) -> Queue {
    Queue { name, kind: QueueKind::Durable { expires, quorum: false, ordered: false }, bindings: Vec::new() }
}
