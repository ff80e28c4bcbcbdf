//! Security-first messaging: agents, mappers and requests over a broker that nobody has to trust.
//!
//! **[Agents](agent)** are workers that offer services. **[Mappers](mapper)** know from signed heartbeats which agents live, what they
//! offer and how loaded they are, and give [requests](request) to them. Every message is signed and encrypted end to end, with X.509
//! certificates, by the [`SecureSerializer`](security::SecureSerializer): the broker in between can neither read nor change, forge or
//! replay it.
//!
//! # The data's way
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
//! * To offer services: [`agent::actor`] and [`Agent::builder`](agent::Agent::builder).
//! * To ask for them: [`Mapper::builder`](mapper::Mapper::builder), or [`proxy::MapperProxy`] without a mapper of one's own.
//! * Who is who: [`certs`], with [`CertificateDirectory`](certs::CertificateDirectory) for files and
//!   [`CertificateAuthority`](certs::CertificateAuthority) to make them.
//! * How it travels: [`transport::AmqpTransport`] (RabbitMQ) or [`transport::MemoryBroker`] (one process).
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//! use nanite::agent::{Agent, Reply, actor};
//! use nanite::certs::{CertificateAuthority, KeyType, StaticCertificateStore};
//! use nanite::clock::{Clock, SystemClock};
//! use nanite::mapper::Mapper;
//! use nanite::packet::Identity;
//! use nanite::security::SecureSerializer;
//! use nanite::transport::MemoryBroker;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (fred, desk, now) = (Identity::agent("fred")?, Identity::mapper("desk")?, SystemClock.now());
//! let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
//! let of_fred = ca.issue(&fred, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
//! let of_desk = ca.issue(&desk, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
//! let store = Arc::new(StaticCertificateStore::new([&of_fred, &of_desk].map(|own| own.certificate().clone())));
//! let at_fred = SecureSerializer::builder(of_fred, store.clone(), ca.trust()?).build()?;
//! let at_desk = SecureSerializer::builder(of_desk, store, ca.trust()?).build()?;
//!
//! let broker = MemoryBroker::new();
//! let text = actor("text").expose("upper", |text: String| async move { Reply::Ok(text.to_uppercase()) });
//! let agent = Agent::builder(fred, Arc::new(at_fred), Arc::new(broker.connect())).actor(text).build()?.start().await?;
//! let mapper = Mapper::builder(desk, Arc::new(at_desk), Arc::new(broker.connect())).start().await?;
//!
//! let answers = mapper.request("/text/upper", "hello").wait_for_agents(Duration::from_secs(10)).await?;
//! assert!(answers.results().all(|(from, value)| from.name() == "fred" && value.as_str() == Some("HELLO")));
//! agent.stop().await?;
//! # Ok(())
//! # }
//! ```
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
    #[doc = include_str!("../docs/guide/requests.md")]
    struct Requests;
    #[doc = include_str!("../docs/guide/stores.md")]
    struct Stores;
}
