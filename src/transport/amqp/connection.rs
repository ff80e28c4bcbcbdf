//! One connection, and the supervisor that replaces it when it is lost.
//!
//! lapin's own recovery is off: it gives up in the end and cannot bring back every consumer. Here each connection is a
//! *generation*; publisher and consumers watch for the next one and start anew on it.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use lapin::auth::AuthProvider;
use lapin::tcp::AMQPUriTcpExt;
use lapin::types::{LongString, ShortString};
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties, Event};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::AmqpOptions;
use super::backoff::Backoff;
use super::declare::Declared;
use super::error::{classify_connect, printable, within};
use super::tls::{Connector, Fault};
use crate::transport::{CALL_TIMEOUT, TransportError};

/// The largest frame asked for. lapin keeps 64 frames of buffers per connection: with RabbitMQ's 128 KiB that would be 8 MiB.
const FRAME_MAX: u32 = 32 * 1024;
/// How often a connection is looked at, beside the events that it sends.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// A connection that lived this long was a good one: the next attempt comes soon.
const STEADY: Duration = Duration::from_secs(10);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// What publisher and consumers know of the connection.
#[derive(Clone, Debug)]
pub(super) enum ConnectionState {
    Up(Arc<Generation>),
    Down,
    Closed,
}

/// Waits until there is a connection.
pub(super) async fn up(links: &mut watch::Receiver<ConnectionState>) -> Result<Arc<Generation>, TransportError> {
    loop {
        match &*links.borrow_and_update() {
            ConnectionState::Up(generation) if generation.is_up() => return Ok(Arc::clone(generation)),
            ConnectionState::Up(_) | ConnectionState::Down => {}
            ConnectionState::Closed => return Err(TransportError::Closed),
        }
        links.changed().await.map_err(|_| TransportError::Closed)?;
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Generation {
    pub(super) number: u64,
    connection: Connection,
    _cut: Cut,
}

impl Generation {
    pub(super) fn is_up(&self) -> bool {
        self.connection.status().connected()
    }

    /// Whether the broker takes no more for the moment. Nothing may be written then: lapin would hoard it.
    pub(super) fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    pub(super) async fn channel(&self) -> Result<lapin::Channel, TransportError> {
        within(CALL_TIMEOUT, self.connection.create_channel()).await
    }

    async fn close(&self) {
        // The socket is shut in any case.
        let _ = within(CLOSE_TIMEOUT, self.connection.close(200, ShortString::from("closed"))).await;
    }
}

/// A second handle to the socket of a connection. Without it lapin's thread would live as long as the other side cares to keep
/// the socket open.
#[derive(Debug, Default)]
enum Socket {
    #[default]
    Connecting,
    Open(TcpStream),
    GivenUp,
}

/// Cuts the socket when the connection is given up.
#[derive(Debug)]
struct Cut(Arc<Mutex<Socket>>);

impl Drop for Cut {
    fn drop(&mut self) {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Socket::Open(socket) = std::mem::replace(&mut *socket, Socket::GivenUp) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// A new connection with its events.
pub(super) struct Opened {
    pub(super) generation: Arc<Generation>,
    events: std::pin::Pin<Box<dyn Stream<Item = Event> + Send>>,
}

/// Connects, once.
pub(super) async fn open(options: &AmqpOptions, number: u64) -> Result<Opened, TransportError> {
    let cut = Cut(Arc::default());
    let connector = match options.protection()?.cloned() {
        Some(tls) => {
            Some(tokio::task::spawn_blocking(move || tls.connector()).await.map_err(|_| TransportError::Closed)??)
        }
        None => None,
    };
    let fault = connector.as_ref().map(Connector::fault);
    let uri = AMQPUri {
        // TLS is added below, by a connector of our own.
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            // Who logs in is the provider's matter below.
            userinfo: AMQPUserInfo { username: String::new(), password: String::new() },
            host: options.host.clone(),
            port: options.port,
        },
        vhost: options.vhost.clone(),
        query: AMQPQueryString {
            frame_max: Some(FRAME_MAX),
            heartbeat: Some(u16::try_from(options.heartbeat.as_secs()).unwrap_or(u16::MAX)),
            ..AMQPQueryString::default()
        },
    };
    let properties = ConnectionProperties::default()
        .with_connection_name(options.name.as_str().into())
        .with_client_property("product".into(), "nanite".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
    let properties = match options.login() {
        Some((user, password)) => {
            properties.with_auth_provider(Plain { user: user.to_owned(), password: password.clone() })
        }
        None => properties.with_auth_provider(External),
    };
    let failed = |error: &lapin::Error| {
        let refused = fault.as_ref().and_then(Fault::error);
        refused.unwrap_or_else(|| classify_connect(error, &options.vhost))
    };
    let runtime = lapin::runtime::default_runtime().map_err(|error| failed(&error))?;
    let limit = options.connect_timeout;
    let socket = Arc::clone(&cut.0);
    let host = options.host.clone();
    let connect = Connection::connector(
        uri,
        runtime,
        async move |uri: AMQPUri, runtime| {
            let stream = tokio::time::timeout(limit, uri.connect_async(&runtime)).await;
            let stream = stream.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?;
            if let AsyncTcpStream::Plain(stream) = &stream {
                let second = stream.get_ref().as_fd().try_clone_to_owned()?;
                let mut socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
                if matches!(*socket, Socket::GivenUp) {
                    return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
                }
                *socket = Socket::Open(second.into());
            }
            match &connector {
                None => Ok(stream),
                Some(connector) => {
                    let secured = tokio::time::timeout(limit, stream.into_openssl(connector.ssl(), &host)).await;
                    Ok(secured.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?)
                }
            }
        },
        properties,
    );
    let connection = tokio::time::timeout(limit, connect).await;
    let connection = match connection {
        Ok(connection) => connection.map_err(|error| failed(&error))?,
        Err(_) => return Err(TransportError::Unreachable(format!("no answer within {limit:?}"))),
    };
    let events = Box::pin(connection.events_listener());
    Ok(Opened { generation: Arc::new(Generation { number, connection, _cut: cut }), events })
}

/// Logs in by user name and password, without showing the password to the rest of lapin.
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

/// Is whom its certificate says: nothing is said here.
struct External;

impl AuthProvider for External {
    fn mechanism(&self) -> ShortString {
        ShortString::from("EXTERNAL")
    }

    fn auth_starter(&self) -> Result<LongString, String> {
        Ok(LongString::default())
    }
}

/// Keeps a connection until told to close it, by `close` or by its other end going away.
pub(super) async fn supervise(
    options: AmqpOptions,
    first: Opened,
    links: watch::Sender<ConnectionState>,
    declared: Arc<Declared>,
    close: oneshot::Receiver<()>,
) {
    let mut close = pin!(close);
    let mut opened = first;
    let mut backoff = Backoff::new();
    loop {
        let since = Instant::now();
        let number = opened.generation.number;
        links.send_replace(ConnectionState::Up(Arc::clone(&opened.generation)));
        let lost = async {
            watch_over(&mut opened, &links, &declared).await;
        };
        tokio::select! {
            _ = &mut close => {
                opened.generation.close().await;
                break;
            }
            () = lost => {}
        }
        links.send_replace(ConnectionState::Down);
        tracing::warn!(broker = %options, "connection to the broker lost");
        if since.elapsed() >= STEADY {
            backoff.reset();
        }
        opened = tokio::select! {
            _ = &mut close => break,
            opened = reopen(&options, number + 1, &mut backoff) => opened,
        };
        declared.declare_missing(&opened.generation).await;
        tracing::info!(broker = %options, "connection to the broker is back");
    }
    links.send_replace(ConnectionState::Closed);
}

/// Returns when the connection is lost.
async fn watch_over(opened: &mut Opened, links: &watch::Sender<ConnectionState>, declared: &Declared) {
    let mut tick = tokio::time::interval(WATCH_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut has_events = true;
    while opened.generation.is_up() {
        let event = tokio::select! {
            event = opened.events.next(), if has_events => {
                has_events = event.is_some();
                event
            }
            _ = tick.tick() => None,
        };
        match event {
            Some(Event::ConnectionBlocked(reason)) => {
                tracing::warn!(reason = printable(&reason), "the broker takes no messages for now");
                links.send_replace(ConnectionState::Up(Arc::clone(&opened.generation)));
            }
            Some(Event::ConnectionUnblocked) => {
                tracing::info!("the broker takes messages again");
                links.send_replace(ConnectionState::Up(Arc::clone(&opened.generation)));
            }
            Some(_) => {}
            None => declared.declare_missing(&opened.generation).await,
        }
    }
}

/// Connects, however long it takes. Says why it does not work when the reason changes, not for every try.
async fn reopen(options: &AmqpOptions, number: u64, backoff: &mut Backoff) -> Opened {
    let mut said = None;
    loop {
        tokio::time::sleep(backoff.next()).await;
        match open(options, number).await {
            Ok(opened) => return opened,
            Err(error) => {
                if said.as_ref() != Some(&error) {
                    tracing::warn!(broker = %options, %error, "cannot connect to the broker yet");
                    said = Some(error);
                }
            }
        }
    }
}
