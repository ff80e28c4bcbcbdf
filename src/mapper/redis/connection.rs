//! The way to Redis: addresses, TLS, and connections whose every answer has a time limit and a size limit.
//!
//! The only file that names the client library's connections. Redis counts as hostile: an answer longer than [`MAX_ANSWER`] ends the
//! connection before it is held in memory, an answer that is late ends it too.

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

use super::options::{RedisError, RedisOptions};

/// How much Redis may send in answer to one question, in bytes.
pub(super) const MAX_ANSWER: usize = 64 * 1024 * 1024;
/// How much of an error of Redis is repeated.
const MAX_WORDS: usize = 200;

/// Where Redis is, and how it is spoken to.
pub(super) struct Address {
    place: Place,
    redis: redis::RedisConnectionInfo,
    timeout: Duration,
}

enum Place {
    Tcp { host: String, port: u16, tls: Option<SslConnector> },
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Tcp { host, port, tls } => {
                let scheme = if tls.is_some() { "rediss" } else { "redis" };
                write!(f, "{scheme}://{host}:{port}")
            }
            Place::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Address {
    /// Reads a URL: `redis://USER:PASSWORD@HOST:PORT/DATABASE`, `rediss://` for TLS, `unix:///PATH`.
    pub fn new(url: &str, options: &RedisOptions) -> Result<Self, RedisError> {
        let (scheme, rest) = url.split_once("://").ok_or(RedisError::Url)?;
        let tls = scheme == "rediss";
        if !matches!(scheme, "redis" | "rediss" | "unix" | "redis+unix") || rest.contains('#') {
            return Err(RedisError::Url);
        }
        let plain = if tls { format!("redis://{rest}") } else { url.to_owned() };
        let info = plain.as_str().into_connection_info().map_err(|_| RedisError::Url)?;
        let place = match info.addr() {
            ConnectionAddr::Tcp(host, port) => Place::Tcp {
                host: host.clone(),
                port: *port,
                tls: tls.then(|| connector(options.authority.as_deref())).transpose()?,
            },
            ConnectionAddr::Unix(path) => Place::Unix(path.clone()),
            _ => return Err(RedisError::Url),
        };
        let mut redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
        if let Some(password) = &options.password {
            redis = redis.set_password(password.as_str());
        }
        Ok(Self { place, redis, timeout: options.timeout })
    }

    /// Opens a connection.
    pub async fn connect(&self) -> Result<Connection, RedisError> {
        let failed = |why: String| RedisError::Unreachable { address: self.to_string(), why };
        match tokio::time::timeout(self.timeout, self.open()).await {
            Ok(opened) => opened.map_err(failed),
            Err(_) => Err(failed(format!("no answer within {:?}", self.timeout))),
        }
    }

    async fn open(&self) -> Result<Connection, String> {
        let io = |error: io::Error| error.to_string();
        match &self.place {
            Place::Unix(path) => self.greet(UnixStream::connect(path).await.map_err(io)?).await,
            Place::Tcp { host, port, tls } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(io)?;
                stream.set_nodelay(true).map_err(io)?;
                let Some(connector) = tls else { return self.greet(stream).await };
                let ssl = connector.configure().and_then(|configured| configured.into_ssl(host));
                let ssl = ssl.map_err(|_| "TLS cannot be set up".to_owned())?;
                let mut stream = SslStream::new(ssl, stream).map_err(|_| "TLS cannot be set up".to_owned())?;
                let connected = Pin::new(&mut stream).connect().await;
                connected.map_err(|error| format!("TLS: {}", words(&error.to_string())))?;
                self.greet(stream).await
            }
        }
    }

    async fn greet(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Connection, String> {
        let left = Arc::new(AtomicUsize::new(MAX_ANSWER));
        let stream = Bounded { stream, left: left.clone() };
        // The time limit is that of `ask`.
        let config = AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
        let opened = MultiplexedConnection::new_with_config(&self.redis, stream, config).await;
        let (connection, driver) = opened.map_err(|error| words(&error.to_string()))?;
        let driver = Arc::new(Driver(tokio::spawn(driver).abort_handle()));
        Ok(Connection { connection, left, timeout: self.timeout, _driver: driver })
    }
}

/// TLS that believes the given CAs alone: those of the system do not count.
fn connector(authority: Option<&[u8]>) -> Result<SslConnector, RedisError> {
    let authorities = authority.ok_or(RedisError::NoAuthority)?;
    let wrong = |_| RedisError::Authority;
    let mut store = X509StoreBuilder::new().map_err(wrong)?;
    let certificates = X509::stack_from_pem(authorities).map_err(wrong)?;
    if certificates.is_empty() {
        return Err(RedisError::Authority);
    }
    for certificate in certificates {
        store.add_cert(certificate).map_err(wrong)?;
    }
    let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(wrong)?;
    builder.set_cert_store(store.build());
    builder.set_verify(SslVerifyMode::PEER);
    builder.set_min_proto_version(Some(SslVersion::TLS1_2)).map_err(wrong)?;
    Ok(builder.build())
}

/// Why Redis did not answer as it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The connection is of no use any more.
    Lost(String),
    /// Redis refused this one thing.
    Refused(String),
}

impl Trouble {
    /// The answer is of another shape than asked for.
    pub fn strange() -> Self {
        Self::Lost("it answers something else than was asked".into())
    }

    /// Whether a key is of another type than it should be.
    pub fn is_wrong_type(&self) -> bool {
        matches!(self, Self::Refused(why) if why.starts_with("WRONGTYPE"))
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(why) | Self::Refused(why) => f.write_str(why),
        }
    }
}

/// A connection. Clones share it; it is closed with the last.
#[derive(Clone)]
pub(super) struct Connection {
    connection: MultiplexedConnection,
    left: Arc<AtomicUsize>,
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
    /// Asks one thing.
    pub async fn ask(&self, command: &Cmd) -> Result<Value, Trouble> {
        let mut connection = self.connection.clone();
        match self.within(connection.send_packed_command(command)).await? {
            Value::ServerError(error) => Err(refused(&error)),
            answer => Ok(answer),
        }
    }

    /// Asks several things at once; each has its own answer.
    pub async fn ask_all(&self, pipeline: &Pipeline) -> Result<Vec<Result<Value, Trouble>>, Trouble> {
        let mut connection = self.connection.clone();
        let count = pipeline.len();
        let answers = self.within(connection.send_packed_commands(pipeline, 0, count)).await?;
        if answers.len() != count {
            return Err(Trouble::strange());
        }
        let each = |answer| match answer {
            Value::ServerError(error) => Err(refused(&error)),
            answer => Ok(answer),
        };
        Ok(answers.into_iter().map(each).collect())
    }

    async fn within<T>(&self, answer: impl Future<Output = redis::RedisResult<T>>) -> Result<T, Trouble> {
        self.left.store(MAX_ANSWER, Ordering::Relaxed);
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) if matches!(error.kind(), redis::ErrorKind::Server(_) | redis::ErrorKind::Extension) => Err(
                Trouble::Refused(words(&format!("{} {}", error.code().unwrap_or(""), error.detail().unwrap_or("")))),
            ),
            Ok(Err(error)) => Err(Trouble::Lost(words(&error.to_string()))),
            Err(_) => Err(Trouble::Lost(format!("no answer within {:?}", self.timeout))),
        }
    }
}

fn refused(error: &redis::ServerError) -> Trouble {
    Trouble::Refused(words(&format!("{} {}", error.code(), error.details().unwrap_or(""))))
}

/// Another's words, fit to be logged.
fn words(text: &str) -> String {
    text.chars().take(MAX_WORDS).flat_map(char::escape_debug).collect::<String>().trim().to_owned()
}

/// A stream that ends when it brings more than is left to it.
struct Bounded<S> {
    stream: S,
    left: Arc<AtomicUsize>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let length = buf.filled().len().saturating_sub(before);
        let enough = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(length));
        match enough {
            Ok(_) => read,
            Err(_) => Poll::Ready(Err(io::Error::other("an answer longer than accepted"))),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
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
