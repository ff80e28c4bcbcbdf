//! What lapin and the broker say, as [`TransportError`].

use std::future::Future;
use std::time::Duration;

use lapin::ErrorKind;
use lapin::protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError};

use super::tls;
use crate::transport::TransportError;

/// Waits for the broker, at most `limit`.
pub(super) async fn within<T>(
    limit: Duration,
    call: impl Future<Output = lapin::Result<T>>,
) -> Result<T, TransportError> {
    match tokio::time::timeout(limit, call).await {
        Ok(result) => result.map_err(|error| classify(&error)),
        Err(_) => Err(TransportError::TimedOut(limit)),
    }
}

/// What went wrong on a connection that stood.
pub(super) fn classify(error: &lapin::Error) -> TransportError {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => TransportError::Forbidden(text(error)),
            AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED) => TransportError::Disconnected,
            AMQPErrorKind::Soft(_) | AMQPErrorKind::Hard(_) => TransportError::Broker(text(error)),
        },
        ErrorKind::InvalidChannel(_)
        | ErrorKind::InvalidChannelState(..)
        | ErrorKind::InvalidConnectionState(_)
        | ErrorKind::IOError(_)
        | ErrorKind::RuntimeShutdownError(_)
        | ErrorKind::MissingHeartbeatError => TransportError::Disconnected,
        _ => TransportError::Broker(printable(&error.to_string())),
    }
}

/// What went wrong on the way to a connection.
pub(super) fn classify_connect(error: &lapin::Error, vhost: &str) -> TransportError {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => TransportError::Credentials,
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => TransportError::VirtualHost(printable(vhost)),
            AMQPErrorKind::Soft(_) | AMQPErrorKind::Hard(_) => TransportError::Unreachable(text(error)),
        },
        ErrorKind::IOError(error) | ErrorKind::RuntimeShutdownError(error) => {
            tls::of_stream(error).unwrap_or_else(|| TransportError::Unreachable(printable(&error.to_string())))
        }
        _ => TransportError::Unreachable(printable(&error.to_string())),
    }
}

/// The channel error that the broker closed a channel with, if that is what happened.
pub(super) fn soft(error: &lapin::Error) -> Option<(&AMQPSoftError, String)> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(soft) => Some((soft, text(error))),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

/// Whether the broker ended the channel or the connection because of something that was sent on it.
pub(super) fn is_blame(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.kind() != &AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED),
        _ => false,
    }
}

fn text(error: &AMQPError) -> String {
    printable(error.get_message().as_str())
}

/// A broker's words, fit for a log or a terminal: bounded, and without control characters.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_brokers_words_cannot_steer_a_terminal() {
        assert_eq!(printable("a\u{1b}[31m\nb"), "a [31m b");
        assert_eq!(printable(&"x".repeat(1_000)).len(), 300);
    }
}
