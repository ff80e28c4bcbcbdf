//! The kinds of queue, and what may come on each.

use crate::packet::{Kind, Role};

/// The kind of queue a message arrives on. Each takes few kinds of packet, so a message moved to another queue is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InboundQueue {
    /// An agent's own queue: its work.
    AgentInbox,
    /// What is said to one agent or to all beside its work: advertise, files, answers to its own requests.
    AgentControl,
    /// A mapper's own queue: answers, and other mappers that make themselves known.
    MapperInbox,
    /// Registrations and heartbeats, and nodes that make themselves known, to every mapper.
    Presence,
    /// Requests to the mappers, one of which takes each.
    Requests,
    /// Requests that wait for an agent to come.
    Offline,
}

impl InboundQueue {
    /// The kind of queue as a word, for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            InboundQueue::AgentInbox => "agent-inbox",
            InboundQueue::AgentControl => "agent-control",
            InboundQueue::MapperInbox => "mapper-inbox",
            InboundQueue::Presence => "presence",
            InboundQueue::Requests => "requests",
            InboundQueue::Offline => "offline",
        }
    }

    /// Whether a packet of this kind may arrive here.
    pub const fn accepts(self, kind: Kind) -> bool {
        match self {
            InboundQueue::AgentInbox => matches!(kind, Kind::Request | Kind::Push),
            InboundQueue::AgentControl => matches!(
                kind,
                Kind::Advertise
                    | Kind::Outcome
                    | Kind::Intermediate
                    | Kind::FileStart
                    | Kind::FileChunk
                    | Kind::FileEnd
            ),
            InboundQueue::MapperInbox => matches!(kind, Kind::Outcome | Kind::Intermediate | Kind::Advertise),
            InboundQueue::Presence => matches!(kind, Kind::Register | Kind::Unregister | Kind::Ping | Kind::Advertise),
            InboundQueue::Requests | InboundQueue::Offline => matches!(kind, Kind::Request | Kind::Push),
        }
    }

    /// Whether several mappers read from the same queue, and each message is for one of them.
    pub const fn is_shared(self) -> bool {
        matches!(self, InboundQueue::Requests | InboundQueue::Offline)
    }

    /// Whether somebody who is not known is asked for its certificate when a message of it comes here.
    pub const fn answers_unknown_senders(self) -> bool {
        matches!(self, InboundQueue::Presence | InboundQueue::Requests)
    }

    /// Which role reads here.
    pub const fn reader(self) -> Role {
        match self {
            InboundQueue::AgentInbox | InboundQueue::AgentControl => Role::Agent,
            InboundQueue::MapperInbox | InboundQueue::Presence | InboundQueue::Requests | InboundQueue::Offline => {
                Role::Mapper
            }
        }
    }

    /// Whether a sender of this role may send this kind here.
    pub const fn permits(self, sender: Role, kind: Kind) -> bool {
        let right_role = match (self, kind) {
            // A mapper tells another that it is there.
            (InboundQueue::MapperInbox, Kind::Advertise) => matches!(sender, Role::Mapper),
            // Answers come to a mapper from agents, and from other mappers when it asked them as a proxy.
            (InboundQueue::MapperInbox, _) => true,
            // Whoever knows no mapper yet, or may not know all of them, makes itself known to them.
            (InboundQueue::Presence, Kind::Advertise) => true,
            (InboundQueue::Presence, _) => matches!(sender, Role::Agent),
            // Agents, and programs with a mapper's certificate but no mapper of their own.
            (InboundQueue::Requests, _) => true,
            // Only mappers put anything there.
            (InboundQueue::Offline, _) => matches!(sender, Role::Mapper),
            (InboundQueue::AgentInbox | InboundQueue::AgentControl, _) => matches!(sender, Role::Mapper),
        };
        right_role && self.accepts(kind)
    }

    /// The longest message that may arrive here, in bytes.
    pub fn max_bytes(self) -> usize {
        Kind::ALL.into_iter().filter(|kind| self.accepts(*kind)).map(Kind::max_bytes).max().unwrap_or(0)
    }
}
