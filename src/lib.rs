//! Security-first messaging: agents, mappers and requests over a broker that nobody has to trust.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

#[cfg(feature = "admin")]
pub mod admin;
pub mod agent;
pub mod audit;
pub mod certs;
#[cfg(feature = "cli")]
pub mod cli;
pub mod clock;
pub mod files;
pub mod link;
pub mod mapper;
pub mod packet;
pub mod policy;
pub mod proxy;
pub mod request;
pub mod security;
pub mod serializer;
pub mod transport;
