//! The kinds of queue, and the packets that each accepts.

use crate::packet::{Kind, Role};

/// The kind of queue that a message arrives from. Each accepts few kinds of packets, so a message moved to another queue is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InboundQueue {
    /// An agent's own queue: requests and pushes.
    AgentInbox,
    /// An agent's control queue: advertises, files, and answers to its own requests.
    AgentControl,
    /// A mapper's own queue: answers, and advertises of other mappers.
    MapperInbox,
    /// Registrations, heartbeats and advertises to every mapper.
    Presence,
    /// Proxied requests: one of the mappers receives each.
    Requests,
    /// Requests that wait until an agent offers their service.
    Offline,
}

impl InboundQueue {
    /// The kind of queue as a word.
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

    /// Whether mappers share one queue, and one of them receives each message.
    pub const fn is_shared(self) -> bool {
        matches!(self, InboundQueue::Requests | InboundQueue::Offline)
    }

    /// Whether an unknown sender in this queue is answered, so that it sends its certificate.
    pub const fn answers_unknown_senders(self) -> bool {
        matches!(self, InboundQueue::Presence | InboundQueue::Requests)
    }

    /// The role that consumes from it.
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
            // A mapper advertises itself to another.
            (InboundQueue::MapperInbox, Kind::Advertise) => matches!(sender, Role::Mapper),
            // Answers arrive from agents, and from mappers for proxied requests.
            (InboundQueue::MapperInbox, _) => true,
            // A node that may not know all mappers advertises itself to them.
            (InboundQueue::Presence, Kind::Advertise) => true,
            (InboundQueue::Presence, _) => matches!(sender, Role::Agent),
            // Agents, and programs with a mapper's certificate that run a proxy.
            (InboundQueue::Requests, _) => true,
            // Only mappers publish there.
            (InboundQueue::Offline, _) => matches!(sender, Role::Mapper),
            (InboundQueue::AgentInbox | InboundQueue::AgentControl, _) => matches!(sender, Role::Mapper),
        };
        right_role && self.accepts(kind)
    }

    /// The queue in which a node of this role receives answers.
    pub(crate) const fn for_answers_to(role: Role) -> Self {
        match role {
            Role::Agent => InboundQueue::AgentControl,
            Role::Mapper => InboundQueue::MapperInbox,
        }
    }

    /// The longest message that it accepts, in bytes.
    pub fn max_bytes(self) -> usize {
        Kind::ALL.into_iter().filter(|kind| self.accepts(*kind)).map(Kind::max_bytes).max().unwrap_or(0)
    }
}
