//! One AMQP connection: opening it, what its errors mean, and the delay before the next attempt.
//!
//! lapin's own recovery is off: it gives up eventually and cannot restore every consumer. Instead, the publisher and the consumers
//! watch the [`ConnectionState`] and start again on each new connection, which the supervisor opens.

use std::collections::hash_map::RandomState;
use std::future::Future;
use std::hash::{BuildHasher, Hasher};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use lapin::auth::AuthProvider;
use lapin::protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::AMQPUriTcpExt;
use lapin::types::{LongString, ShortString};
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use lapin::{AsyncTcpStream, ConnectionProperties, ErrorKind};
use parking_lot::Mutex;
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::accounts::MAX_FRAME_BYTES;
use super::options::AmqpOptions;
use super::stream::{GuardedStream, StreamState, guarded_runtime};
use super::tls::{CertificateRefusal, TlsConnector, handshake_error};
use crate::transport::{CALL_TIMEOUT, TransportError};

/// How long to wait for the broker when a connection or channel is closed.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest text of the broker that is logged or returned, in characters.
const MAX_BROKER_TEXT_CHARS: usize = 300;

/// What the publisher and the consumers know of the connection.
#[derive(Clone, Debug)]
pub(super) enum ConnectionState {
    Up(Arc<Connection>),
    Down,
    Closed,
}

/// Waits until there is a connection.
pub(super) async fn wait_until_up(
    state: &mut watch::Receiver<ConnectionState>,
) -> Result<Arc<Connection>, TransportError> {
    loop {
        match &*state.borrow_and_update() {
            ConnectionState::Up(connection) if connection.is_up() => return Ok(Arc::clone(connection)),
            ConnectionState::Up(_) | ConnectionState::Down => {}
            ConnectionState::Closed => return Err(TransportError::Closed),
        }
        state.changed().await.map_err(|_| TransportError::Closed)?;
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// Counts the connections of one transport, from 1.
    pub(super) number: u64,
    inner: lapin::Connection,
    stream: watch::Receiver<StreamState>,
    _socket: SocketGuard,
}

impl Connection {
    pub(super) fn is_up(&self) -> bool {
        self.inner.status().connected()
    }

    /// Whether the broker accepts no messages at the moment. Nothing may be published then: lapin would buffer it without limit.
    pub(super) fn is_blocked(&self) -> bool {
        self.stream.borrow().blocked.is_some()
    }

    /// What the stream of this connection has seen.
    pub(super) fn stream(&self) -> watch::Receiver<StreamState> {
        self.stream.clone()
    }

    pub(super) async fn channel(&self) -> Result<lapin::Channel, TransportError> {
        within(CALL_TIMEOUT, self.inner.create_channel()).await
    }

    pub(super) async fn close(&self) {
        // If this fails, dropping the connection shuts the socket down.
        let _ = within(CLOSE_TIMEOUT, self.inner.close(200, ShortString::from("closed"))).await;
    }
}

/// A second handle to the socket of a connection. Without it lapin's thread would run for as long as the peer keeps the socket open.
#[derive(Debug, Default)]
enum Socket {
    #[default]
    Connecting,
    Open(TcpStream),
    Abandoned,
}

/// Shuts the socket down when the connection is dropped.
#[derive(Debug, Default)]
struct SocketGuard(Arc<Mutex<Socket>>);

impl Drop for SocketGuard {
    fn drop(&mut self) {
        if let Socket::Open(socket) = std::mem::replace(&mut *self.0.lock(), Socket::Abandoned) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Makes one attempt to connect.
pub(super) async fn open(options: &AmqpOptions, number: u64) -> Result<Arc<Connection>, TransportError> {
    let guard = SocketGuard::default();
    let connector = match options.tls_options()?.cloned() {
        Some(tls) => {
            Some(tokio::task::spawn_blocking(move || tls.connector()).await.map_err(|_| TransportError::Closed)??)
        }
        None => None,
    };
    let refusal = connector.as_ref().map(TlsConnector::refusal);
    let failed = |error: &lapin::Error| {
        let refused = refusal.as_ref().and_then(CertificateRefusal::error);
        refused.unwrap_or_else(|| classify_connect(error, &options.vhost))
    };
    let runtime = lapin::runtime::default_runtime().map_err(|error| failed(&error))?;
    let (state, stream_state) = watch::channel(StreamState::default());
    let limit = options.connect_timeout;
    let socket = Arc::clone(&guard.0);
    let host = options.host.clone();
    let connect = lapin::Connection::connector(
        uri(options),
        guarded_runtime(),
        async move |uri: AMQPUri, _| {
            let stream = tokio::time::timeout(limit, uri.connect_async(&runtime)).await;
            let stream = stream.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?;
            if let AsyncTcpStream::Plain(stream) = &stream {
                let second = stream.get_ref().as_fd().try_clone_to_owned()?;
                let mut socket = socket.lock();
                if matches!(*socket, Socket::Abandoned) {
                    return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
                }
                *socket = Socket::Open(second.into());
            }
            let stream = match &connector {
                None => stream,
                Some(connector) => {
                    let secured = tokio::time::timeout(limit, stream.into_openssl(connector.ssl(), &host)).await;
                    secured.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?
                }
            };
            Ok(AsyncTcpStream::Plain(GuardedStream::new(stream, state.clone())))
        },
        properties(options),
    );
    match tokio::time::timeout(limit, connect).await {
        Ok(connected) => {
            let inner = connected.map_err(|error| failed(&error))?;
            Ok(Arc::new(Connection { number, inner, stream: stream_state, _socket: guard }))
        }
        Err(_) => Err(TransportError::Unreachable(format!("no answer within {limit:?}"))),
    }
}

fn uri(options: &AmqpOptions) -> AMQPUri {
    AMQPUri {
        // TLS is added by our own connector.
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            // The user is given by the `AuthProvider`.
            userinfo: AMQPUserInfo { username: String::new(), password: String::new() },
            host: options.host.clone(),
            port: options.port,
        },
        vhost: options.vhost.clone(),
        query: AMQPQueryString {
            frame_max: Some(MAX_FRAME_BYTES),
            heartbeat: Some(u16::try_from(options.heartbeat.as_secs()).unwrap_or(u16::MAX)),
            ..AMQPQueryString::default()
        },
    }
}

fn properties(options: &AmqpOptions) -> ConnectionProperties {
    let properties = ConnectionProperties::default()
        .with_connection_name(options.connection_name.as_str().into())
        .with_client_property("product".into(), "nanite".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
    match options.login() {
        Some((user, password)) => {
            properties.with_auth_provider(Plain { user: user.to_owned(), password: password.clone() })
        }
        None => properties.with_auth_provider(External),
    }
}

/// SASL PLAIN: user name and password. The password is not in the URI, which lapin may show.
struct Plain {
    user: String,
    password: Zeroizing<String>,
}

impl AuthProvider for Plain {
    fn mechanism(&self) -> ShortString {
        ShortString::from("PLAIN")
    }

    fn auth_starter(&self) -> Result<LongString, String> {
        Ok(format!("\0{}\0{}", self.user, self.password.as_str()).into())
    }
}

/// SASL EXTERNAL: the broker takes the user from the client's certificate.
struct External;

impl AuthProvider for External {
    fn mechanism(&self) -> ShortString {
        ShortString::from("EXTERNAL")
    }

    fn auth_starter(&self) -> Result<LongString, String> {
        Ok(LongString::default())
    }
}

/// Delays between attempts. They grow, and each is random up to a bound, so that the clients of a broker that restarts do not all
/// reconnect at once.
#[derive(Debug)]
pub(super) struct Backoff {
    bound: Duration,
}

const MIN_BACKOFF: Duration = Duration::from_millis(50);
const INITIAL_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// After a connection or a subscription that lasted this long, the first attempt to restore it is made soon.
pub(super) const BACKOFF_RESET_AFTER: Duration = Duration::from_secs(10);

impl Backoff {
    pub(super) const fn new() -> Self {
        Self { bound: INITIAL_BACKOFF }
    }

    pub(super) fn reset(&mut self) {
        self.bound = INITIAL_BACKOFF;
    }

    pub(super) fn next(&mut self) -> Duration {
        let bound = self.bound;
        self.bound = bound.saturating_mul(2).min(MAX_BACKOFF);
        // Each `RandomState` has random keys: random enough to spread load.
        let random = RandomState::new().build_hasher().finish() % 1_000;
        let delay = bound.saturating_mul(u32::try_from(random).unwrap_or(0)) / 1_000;
        delay.max(MIN_BACKOFF)
    }
}

/// Waits for the broker, at most for `limit`.
pub(super) async fn within<T>(
    limit: Duration,
    call: impl Future<Output = lapin::Result<T>>,
) -> Result<T, TransportError> {
    match tokio::time::timeout(limit, call).await {
        Ok(result) => result.map_err(|error| classify(&error)),
        Err(_) => Err(TransportError::TimedOut(limit)),
    }
}

/// An error of an open connection.
pub(super) fn classify(error: &lapin::Error) -> TransportError {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => TransportError::Forbidden(message(error)),
            AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED) => TransportError::Disconnected,
            AMQPErrorKind::Soft(_) | AMQPErrorKind::Hard(_) => TransportError::Broker(message(error)),
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

/// An error while connecting.
fn classify_connect(error: &lapin::Error, vhost: &str) -> TransportError {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => TransportError::Credentials,
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => TransportError::VirtualHost(printable(vhost)),
            AMQPErrorKind::Soft(_) | AMQPErrorKind::Hard(_) => TransportError::Unreachable(message(error)),
        },
        ErrorKind::IOError(error) | ErrorKind::RuntimeShutdownError(error) => {
            handshake_error(error).unwrap_or_else(|| TransportError::Unreachable(printable(&error.to_string())))
        }
        _ => TransportError::Unreachable(printable(&error.to_string())),
    }
}

/// The error with which the broker closed a channel, and its message, if it did so.
pub(super) fn channel_error(error: &lapin::Error) -> Option<(&AMQPSoftError, String)> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(soft) => Some((soft, message(error))),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

/// Whether the broker closed the channel or the connection because of something that was sent on it.
pub(super) fn is_caused_by_client(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.kind() != &AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED),
        _ => false,
    }
}

fn message(error: &AMQPError) -> String {
    printable(error.get_message().as_str())
}

/// Text of the broker that is safe for a log or a terminal: bounded, and without control characters.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(MAX_BROKER_TEXT_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_delays_are_random_and_grow_to_a_limit() {
        let mut backoff = Backoff::new();
        let delays: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(delays.iter().all(|delay| *delay >= MIN_BACKOFF && *delay <= MAX_BACKOFF));
        assert!(delays[0] <= INITIAL_BACKOFF);
        assert!(delays[10..].iter().any(|delay| *delay > MAX_BACKOFF / 4));
        assert!(delays[10..].iter().collect::<std::collections::BTreeSet<_>>().len() > 10);
        backoff.reset();
        assert!(backoff.next() <= INITIAL_BACKOFF);
    }

    #[test]
    fn control_characters_in_broker_text_are_replaced() {
        assert_eq!(printable("a\u{1b}[31m\nb"), "a [31m b");
        assert_eq!(printable(&"x".repeat(1_000)).len(), 300);
    }
}
