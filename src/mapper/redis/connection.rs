//! Connections to Redis: their options and errors, addresses, TLS, and commands whose replies have a time limit and a size limit.
//!
//! Redis is not trusted: a reply longer than [`MAX_REPLY_BYTES`] ends the connection before it is buffered, and so does a late one.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use openssl::ssl::{SslConnector, SslMethod, SslVerifyMode, SslVersion};
use openssl::x509::X509;
use openssl::x509::store::X509StoreBuilder;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, ConnectionAddr, IntoConnectionInfo, Pipeline, ProtocolVersion, Value};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::AbortHandle;
use tokio_openssl::SslStream;
use zeroize::Zeroizing;

use crate::packet::Identity;
use crate::serializer::Serializer;

/// The most bytes that Redis may send in reply to one command or pipeline.
pub(super) const MAX_REPLY_BYTES: usize = 64 * 1024 * 1024;
/// The most characters of an error message from Redis that are logged.
const MAX_ERROR_CHARS: usize = 200;

/// Options for [`RedisState::connect`](super::RedisState::connect).
///
/// ```
/// use std::time::Duration;
/// use nanite::mapper::RedisOptions;
/// # use nanite::serializer::Serializer;
///
/// # fn options(serializer: std::sync::Arc<dyn Serializer>) -> RedisOptions {
/// RedisOptions::new(serializer)
///     .prefix("staging")
///     .password("open sesame")
///     .timeout(Duration::from_secs(5))
/// # }
/// ```
pub struct RedisOptions {
    pub(super) serializer: Arc<dyn Serializer>,
    pub(super) prefix: String,
    pub(super) password: Option<Zeroizing<String>>,
    pub(super) ca_certificates: Option<Vec<u8>>,
    pub(super) timeout: Duration,
    pub(super) refresh_interval: Duration,
    pub(super) accept_unsigned: bool,
}

impl RedisOptions {
    /// The defaults. `serializer` verifies registrations and heartbeats: pass the one that the mapper uses.
    pub fn new(serializer: impl Serializer + 'static) -> Self {
        Self {
            serializer: Arc::new(serializer),
            prefix: "nanite".to_owned(),
            password: None,
            ca_certificates: None,
            timeout: Duration::from_secs(2),
            refresh_interval: Duration::from_secs(1),
            accept_unsigned: false,
        }
    }

    /// The prefix of all keys; `nanite` by default. Mappers with different prefixes share nothing. 1 to 64 letters, digits, '.', '-'
    /// and '_'.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// The password, instead of one in the URL.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.password = Some(Zeroizing::new(password.into()));
        self
    }

    /// The PEM certificates of the authorities that may issue the Redis server's certificate; required for `rediss://` URLs. The
    /// system's certificate authorities are not trusted.
    #[must_use]
    pub fn ca_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.ca_certificates = Some(pem.into());
        self
    }

    /// How long to wait for a reply; 2 s by default. After that the connection is given up.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How often this mapper reads the changes of others and writes the heartbeats it received; every second by default.
    #[must_use]
    pub fn refresh_interval(mut self, interval: Duration) -> Self {
        self.refresh_interval = interval;
        self
    }

    /// Options that weaken security.
    #[must_use]
    pub fn dangerous(self) -> DangerousRedisOptions {
        DangerousRedisOptions(self)
    }
}

impl fmt::Debug for RedisOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisOptions").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// Options that weaken security; see [`RedisOptions::dangerous`].
#[derive(Debug)]
pub struct DangerousRedisOptions(RedisOptions);

impl DangerousRedisOptions {
    /// Reads and writes unsigned registrations and heartbeats, as plain formats have them. An attacker who can write to Redis can then
    /// invent agents.
    #[must_use]
    pub fn accept_unsigned(mut self) -> RedisOptions {
        self.0.accept_unsigned = true;
        self.0
    }
}

/// Why the shared state in Redis cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RedisError {
    /// The URL is invalid.
    #[error("invalid Redis URL: expected redis://HOST:PORT/DATABASE, rediss:// for TLS, or unix:///PATH")]
    InvalidUrl,
    /// The prefix is too short or too long, or has other characters.
    #[error("invalid key prefix: expected 1 to 64 letters, digits, '.', '-' and '_'")]
    InvalidPrefix,
    /// The URL is `rediss://`, but no CA certificate is given.
    #[error("TLS requires the CA certificate of the Redis server")]
    MissingCa,
    /// The CA certificate is not valid PEM.
    #[error("the CA certificate of the Redis server is not a PEM certificate")]
    InvalidCa,
    /// The serializer does not sign, so other mappers could not verify what is shared.
    #[error("plain formats do not sign registrations, so they are not shared")]
    NotSigned,
    /// Redis cannot be reached, or refuses access.
    #[error("cannot use the Redis at {address}: {why}")]
    Unreachable {
        /// The address, without the password.
        address: String,
        /// The reason.
        why: String,
    },
}

/// The address of a Redis server, and the settings for a connection.
pub(super) struct Address {
    endpoint: Endpoint,
    settings: redis::RedisConnectionInfo,
    timeout: Duration,
}

enum Endpoint {
    Tcp { host: String, port: u16, tls: Option<SslConnector> },
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Endpoint::Tcp { host, port, tls } => {
                let scheme = if tls.is_some() { "rediss" } else { "redis" };
                write!(f, "{scheme}://{host}:{port}")
            }
            Endpoint::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Address {
    /// Parses a URL: `redis://USER:PASSWORD@HOST:PORT/DATABASE`, `rediss://` for TLS, `unix:///PATH`.
    pub fn new(url: &str, options: &RedisOptions) -> Result<Self, RedisError> {
        let (scheme, rest) = url.split_once("://").ok_or(RedisError::InvalidUrl)?;
        let tls = scheme == "rediss";
        if !matches!(scheme, "redis" | "rediss" | "unix" | "redis+unix") || rest.contains('#') {
            return Err(RedisError::InvalidUrl);
        }
        let plain = if tls { format!("redis://{rest}") } else { url.to_owned() };
        let info = plain.as_str().into_connection_info().map_err(|_| RedisError::InvalidUrl)?;
        let endpoint = match info.addr() {
            ConnectionAddr::Tcp(host, port) => Endpoint::Tcp {
                host: host.clone(),
                port: *port,
                tls: tls.then(|| tls_connector(options.ca_certificates.as_deref())).transpose()?,
            },
            ConnectionAddr::Unix(path) => Endpoint::Unix(path.clone()),
            _ => return Err(RedisError::InvalidUrl),
        };
        let mut settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
        if let Some(password) = &options.password {
            settings = settings.set_password(password.as_str());
        }
        Ok(Self { endpoint, settings, timeout: options.timeout })
    }

    /// Opens a connection.
    pub async fn connect(&self) -> Result<Connection, RedisError> {
        let failed = |why: String| RedisError::Unreachable { address: self.to_string(), why };
        match tokio::time::timeout(self.timeout, self.open()).await {
            Ok(opened) => opened.map_err(failed),
            Err(_) => Err(failed(format!("no reply within {:?}", self.timeout))),
        }
    }

    async fn open(&self) -> Result<Connection, String> {
        let io = |error: io::Error| error.to_string();
        match &self.endpoint {
            Endpoint::Unix(path) => self.handshake(UnixStream::connect(path).await.map_err(io)?).await,
            Endpoint::Tcp { host, port, tls } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(io)?;
                stream.set_nodelay(true).map_err(io)?;
                let Some(connector) = tls else { return self.handshake(stream).await };
                let ssl = connector.configure().and_then(|configured| configured.into_ssl(host));
                let ssl = ssl.map_err(|_| "failed to set up TLS".to_owned())?;
                let mut stream = SslStream::new(ssl, stream).map_err(|_| "failed to set up TLS".to_owned())?;
                let connected = Pin::new(&mut stream).connect().await;
                connected.map_err(|error| format!("TLS: {}", sanitize(&error.to_string())))?;
                self.handshake(stream).await
            }
        }
    }

    async fn handshake(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Connection, String> {
        let remaining = Arc::new(AtomicUsize::new(MAX_REPLY_BYTES));
        let stream = LimitedStream { stream, remaining: remaining.clone() };
        // `Connection::within_limits` has its own timeout.
        let config = AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
        let opened = MultiplexedConnection::new_with_config(&self.settings, stream, config).await;
        let (connection, driver) = opened.map_err(|error| sanitize(&error.to_string()))?;
        let driver = Arc::new(Driver(tokio::spawn(driver).abort_handle()));
        Ok(Connection { connection, remaining, timeout: self.timeout, _driver: driver })
    }
}

/// Trusts only the given certificate authorities, not those of the system.
fn tls_connector(ca_certificates: Option<&[u8]>) -> Result<SslConnector, RedisError> {
    let pem = ca_certificates.ok_or(RedisError::MissingCa)?;
    let invalid = |_| RedisError::InvalidCa;
    let mut store = X509StoreBuilder::new().map_err(invalid)?;
    let certificates = X509::stack_from_pem(pem).map_err(invalid)?;
    if certificates.is_empty() {
        return Err(RedisError::InvalidCa);
    }
    for certificate in certificates {
        store.add_cert(certificate).map_err(invalid)?;
    }
    let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(invalid)?;
    builder.set_cert_store(store.build());
    builder.set_verify(SslVerifyMode::PEER);
    builder.set_min_proto_version(Some(SslVersion::TLS1_2)).map_err(invalid)?;
    Ok(builder.build())
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CommandError {
    /// The connection cannot be used any more.
    Connection(String),
    /// Redis rejected the command. The connection is fine.
    Rejected(String),
}

impl CommandError {
    /// The reply has another type than the command returns.
    pub fn unexpected_reply() -> Self {
        Self::Connection("unexpected type of reply".into())
    }

    /// Whether a key holds a value of another type than it should.
    pub fn is_wrong_type(&self) -> bool {
        matches!(self, Self::Rejected(why) if why.starts_with("WRONGTYPE"))
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(why) | Self::Rejected(why) => f.write_str(why),
        }
    }
}

/// A connection. Clones share it; it is closed when the last one is dropped.
#[derive(Clone)]
pub(super) struct Connection {
    connection: MultiplexedConnection,
    /// How many more bytes may be received until the next command is sent.
    remaining: Arc<AtomicUsize>,
    timeout: Duration,
    _driver: Arc<Driver>,
}

struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connection")
    }
}

impl Connection {
    /// Sends a command.
    pub async fn execute(&self, command: &Cmd) -> Result<Value, CommandError> {
        let mut connection = self.connection.clone();
        reply(self.within_limits(connection.send_packed_command(command)).await?)
    }

    /// Sends several commands at once; each has its own reply.
    pub async fn execute_all(&self, pipeline: &Pipeline) -> Result<Vec<Result<Value, CommandError>>, CommandError> {
        let mut connection = self.connection.clone();
        let count = pipeline.len();
        let replies = self.within_limits(connection.send_packed_commands(pipeline, 0, count)).await?;
        if replies.len() != count {
            return Err(CommandError::unexpected_reply());
        }
        Ok(replies.into_iter().map(reply).collect())
    }

    /// Reads the fields of these agents from a hash, one result for each agent.
    pub async fn hash_fields(&self, key: String, agents: &[Identity]) -> Result<Vec<Option<Vec<u8>>>, CommandError> {
        if agents.is_empty() {
            return Ok(Vec::new());
        }
        let mut command = redis::cmd("HMGET");
        command.arg(key);
        agents.iter().for_each(|agent| {
            command.arg(agent.as_str());
        });
        let values = array(self.execute(&command).await?)?;
        if values.len() == agents.len() { Ok(values) } else { Err(CommandError::unexpected_reply()) }
    }

    async fn within_limits<T>(&self, reply: impl Future<Output = redis::RedisResult<T>>) -> Result<T, CommandError> {
        self.remaining.store(MAX_REPLY_BYTES, Ordering::Relaxed);
        match tokio::time::timeout(self.timeout, reply).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) if matches!(error.kind(), redis::ErrorKind::Server(_) | redis::ErrorKind::Extension) => {
                Err(rejected(error.code().unwrap_or(""), error.detail()))
            }
            Ok(Err(error)) => Err(CommandError::Connection(sanitize(&error.to_string()))),
            Err(_) => Err(CommandError::Connection(format!("no reply within {:?}", self.timeout))),
        }
    }
}

fn reply(reply: Value) -> Result<Value, CommandError> {
    match reply {
        Value::ServerError(error) => Err(rejected(error.code(), error.details())),
        reply => Ok(reply),
    }
}

fn rejected(code: &str, detail: Option<&str>) -> CommandError {
    CommandError::Rejected(sanitize(&format!("{code} {}", detail.unwrap_or(""))))
}

/// Shortens and escapes a message from Redis for the log.
fn sanitize(text: &str) -> String {
    text.chars().take(MAX_ERROR_CHARS).flat_map(char::escape_debug).collect::<String>().trim().to_owned()
}

/// Decodes a reply that is a string or nil.
pub(super) fn string(reply: Value) -> Result<Option<Vec<u8>>, CommandError> {
    match reply {
        Value::BulkString(string) => Ok(Some(string)),
        Value::Nil => Ok(None),
        _ => Err(CommandError::unexpected_reply()),
    }
}

/// Decodes a reply that is an array of strings or nil.
pub(super) fn array(reply: Value) -> Result<Vec<Option<Vec<u8>>>, CommandError> {
    match reply {
        Value::Array(items) => items.into_iter().map(string).collect(),
        _ => Err(CommandError::unexpected_reply()),
    }
}

/// Parses a decimal number.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A stream that fails once it has received more bytes than remain.
struct LimitedStream<S> {
    stream: S,
    remaining: Arc<AtomicUsize>,
}

impl<S: AsyncRead + Unpin> AsyncRead for LimitedStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let length = buf.filled().len().saturating_sub(before);
        let within = self.remaining.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(length));
        match within {
            Ok(_) => read,
            Err(_) => Poll::Ready(Err(io::Error::other("reply too large"))),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LimitedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
