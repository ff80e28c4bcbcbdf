//! Security-first messaging: agents, mappers and requests over an untrusted broker.
//!
//! **[Agents](agent)** are workers that offer services. **[Mappers](mapper)** know from signed heartbeats which agents live, what they
//! offer and how loaded they are, and give [requests](request) to them. Every message is signed and encrypted end to end, with X.509
//! certificates, by the [`SecureSerializer`](security::SecureSerializer): the broker in between can neither read nor change, forge or
//! replay it.
//!
//! # How a request travels
//!
//! ```text
//!   mapper                                                             agent
//!   Mapper::request("/text/upper", "hello")                            Actor::call(..) -> Payload
//!        |  registry, selector                                              ^  policy, deadline
//!        v                                                                  |
//!   packet::Request                                                    packet::Request
//!        |                                                                  ^
//!        v  serializer: codec, then security: encrypt, sign                 |  verify, decrypt, then codec
//!      bytes --> transport --> queue nanite-fred --> transport --------> bytes
//!
//!   and the packet::Outcome goes the same way back, to the queue of the mapper's process
//! ```
//!
//! # Where to begin
//!
//! [`Node`] is the front door: from a directory of certificates and the URL of a broker to an agent or a mapper.
//!
//! ```no_run
//! use nanite::Node;
//! use nanite::agent::{actor, reply};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! // An agent that offers /text/upper.
//! let node = Node::from_dir("certs", "fred")?.connect("amqp://localhost").await?;
//! let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
//! node.agent().actor(text).start().await?.run().await?;
//!
//! // A mapper that requests it, in another program.
//! let node = Node::from_dir("certs", "desk")?.connect("amqp://localhost").await?;
//! let answers = node.mapper().start().await?.request("/text/upper", "hello").await?;
//! # drop(answers);
//! # Ok(())
//! # }
//! ```
//!
//! Behind it:
//!
//! * Services: [`agent::actor`] for closures, [`agent::ProgramActors`] for programs in any language.
//! * Requests: [`mapper::Mapper`], or [`proxy::MapperProxy`] to have them dispatched by a mapper elsewhere.
//! * Certificates: [`certs::CertificateDirectory`] for files and [`certs::CertificateAuthority`] to issue them.
//! * Transports: [`transport::AmqpTransport`] (RabbitMQ) and [`transport::MemoryBroker`] (one process).
//!
//! # Plug-in points
//!
//! Each is one small object-safe trait whose documentation is its contract: [`certs::CertificateStore`], [`serializer::Serializer`] and
//! [`serializer::Codec`], [`transport::Transport`], [`mapper::Selector`], [`mapper::ClusterState`], [`policy::Policy`],
//! [`agent::Actor`], [`agent::StatusSource`], [`clock::Clock`].
//!
//! # Features
//!
//! On by default: `cli` (the program), `amqp` (RabbitMQ), `msgpack`, `yaml`, `policy` (rules from a file). Also there: `admin` (pages that
//! show the agents).

#![forbid(unsafe_code)]
#![warn(missing_docs)]

// What is sent, and how it becomes bytes.
pub mod packet;
pub mod serializer;

// Who is who, and who may do what.
pub mod audit;
pub mod certs;
pub mod policy;
pub mod security;

// How it travels.
pub mod link;
pub mod transport;

// Who offers work, who gives it out, and who asks for it.
pub mod agent;
pub mod files;
pub mod mapper;
pub mod proxy;
pub mod request;

pub mod clock;
mod limits;

// The front door.
mod node;
pub use node::{Node, NodeBuilder, NodeError};

// Programs.
#[cfg(feature = "admin")]
pub mod admin;
#[cfg(feature = "cli")]
pub mod cli;

/// The code in the documents is compiled, and run where it can be.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/guide/agents.md")]
    struct Agents;
    #[doc = include_str!("../docs/guide/mappers.md")]
    struct Mappers;
    #[doc = include_str!("../docs/guide/policy.md")]
    struct Policy;
    #[doc = include_str!("../docs/guide/requests.md")]
    struct Requests;
    #[doc = include_str!("../docs/guide/stores.md")]
    struct Stores;
}
