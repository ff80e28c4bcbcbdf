//! Why bytes could not travel.

use std::path::PathBuf;
use std::time::Duration;

/// Why a transport could not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The address of the broker is not understood.
    #[error("not a broker address: {0}")]
    Address(String),
    /// The broker cannot be reached.
    #[error("broker unreachable: {0}")]
    Unreachable(String),
    /// No secure connection: the broker's certificate is refused, or it refuses ours.
    #[error("no secure connection to the broker: {0}")]
    Tls(String),
    /// A file for TLS cannot be used.
    #[error("{path}: {why}")]
    TlsFile {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Others than its owner can use a private key for TLS.
    #[error("the key {path} has mode {mode:04o}: others than its owner can use it")]
    TlsKeyMode {
        /// The key's file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The broker refused the user name and password.
    #[error("the broker refused the user name or password")]
    Credentials,
    /// The broker refused the virtual host, or the user may not use it.
    #[error("the broker refused the virtual host: {0}")]
    VirtualHost(String),
    /// The user may not do this.
    #[error("the broker refused it: {0}")]
    Forbidden(String),
    /// The queue exists with other properties, or belongs to another connection.
    #[error("queue {queue} cannot be declared: {why}")]
    QueueConflict {
        /// Which queue.
        queue: String,
        /// What the broker said.
        why: String,
    },
    /// Not a name that a queue or an exchange can have.
    #[error("not a queue name: {0:?}")]
    Name(String),
    /// The message is larger than a transport carries.
    #[error("a message of {length} bytes is too large; at most {limit}")]
    TooLarge {
        /// The length of its body.
        length: usize,
        /// The most that is carried: [`MAX_BODY`](super::MAX_BODY).
        limit: usize,
    },
    /// There is no such queue.
    #[error("no queue {0}")]
    Unroutable(String),
    /// The broker did not take the message (a full queue, say).
    #[error("the broker did not take the message")]
    Nacked,
    /// Not confirmed in time: it may have been published or not.
    #[error("not confirmed within {0:?}")]
    TimedOut(Duration),
    /// The connection went away.
    #[error("connection to the broker lost")]
    Disconnected,
    /// The transport was closed.
    #[error("the transport is closed")]
    Closed,
    /// The broker said something else.
    #[error("broker: {0}")]
    Broker(String),
}

impl TransportError {
    /// Whether trying the same again can help.
    pub const fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Nacked | Self::TimedOut(_) | Self::Disconnected | Self::Broker(_) => true,
            Self::Address(_)
            | Self::Tls(_)
            | Self::TlsFile { .. }
            | Self::TlsKeyMode { .. }
            | Self::Credentials
            | Self::VirtualHost(_)
            | Self::Forbidden(_)
            | Self::QueueConflict { .. }
            | Self::Name(_)
            | Self::TooLarge { .. }
            | Self::Unroutable(_)
            | Self::Closed => false,
        }
    }
}
