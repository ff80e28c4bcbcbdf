//! Why a transport call failed.

use std::path::PathBuf;
use std::time::Duration;

/// Why a transport call failed.
///
/// ```
/// use nanite::transport::TransportError;
///
/// assert!(TransportError::Disconnected.is_retryable());
/// assert!(!TransportError::Credentials.is_retryable());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The URL of the broker is invalid.
    #[error("invalid broker URL: {0}")]
    Address(String),
    /// The broker cannot be reached.
    #[error("broker unreachable: {0}")]
    Unreachable(String),
    /// TLS failed: one side refuses the other's certificate.
    #[error("no TLS connection to the broker: {0}")]
    Tls(String),
    /// A certificate or key file for TLS cannot be used.
    #[error("{path}: {reason}")]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// Why it cannot be used.
        reason: String,
    },
    /// A private key for TLS is accessible to other users.
    #[error("the key {path} has mode {mode:04o}: users other than its owner can access it")]
    TlsKeyMode {
        /// The key's file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The broker refused the user name and password.
    #[error("the broker refused the user name or password")]
    Credentials,
    /// The virtual host does not exist, or the user may not use it.
    #[error("the broker refused the virtual host: {0}")]
    VirtualHost(String),
    /// The user lacks a permission.
    #[error("the broker denied permission: {0}")]
    Forbidden(String),
    /// The queue exists with other properties, or belongs to another connection.
    #[error("queue {queue} cannot be declared: {reason}")]
    QueueConflict {
        /// The queue.
        queue: String,
        /// What the broker said.
        reason: String,
    },
    /// The name of a queue or exchange, or another text of the message, is not valid in AMQP.
    #[error("invalid queue name: {0:?}")]
    Name(String),
    /// The message is larger than a transport accepts.
    #[error("a message of {length} bytes is too large; the limit is {limit}")]
    TooLarge {
        /// The length of its body, in bytes.
        length: usize,
        /// The limit, in bytes: [`MAX_BODY_BYTES`](super::MAX_BODY_BYTES).
        limit: usize,
    },
    /// The queue does not exist.
    #[error("no queue {0}")]
    Unroutable(String),
    /// The broker rejected the message, for example because a queue is full.
    #[error("the broker rejected the message")]
    Nacked,
    /// The broker did not confirm or answer in time. The message may have been published or not.
    #[error("not confirmed within {0:?}")]
    TimedOut(Duration),
    /// The connection was lost.
    #[error("connection to the broker lost")]
    Disconnected,
    /// The transport is closed.
    #[error("the transport is closed")]
    Closed,
    /// The broker reported another error.
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
