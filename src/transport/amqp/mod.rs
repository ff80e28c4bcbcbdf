//! RabbitMQ, with the client library lapin. No other folder uses lapin.
//!
//! [`AmqpTransport`] is a handle to several tasks: the supervisor of the connection (in this file), the publisher (`publisher`), and
//! one for each consumer (`consumer`). They watch the state of the connection and start again on each new one.

mod accounts;
mod connection;
mod consumer;
mod frames;
mod guard;
mod options;
mod publisher;
mod queues;
mod stream;
mod tls;

use std::collections::HashSet;
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, timeout, timeout_at};

use super::message::check_name;
use super::{CALL_TIMEOUT, Consumer, Destination, PublishRequest, Queue, Transport, TransportError};
use crate::clock::{Clock, SystemClock};
use crate::limits::{LogDecision, LogLimit};
use connection::{BACKOFF_RESET_AFTER, Backoff, Connection, ConnectionState, printable};
pub use options::AmqpOptions;
#[cfg(feature = "cli")]
pub(crate) use options::percent_encode;
use publisher::{PendingPublish, ShortStrings};
use queues::DeclaredQueues;
pub use tls::Tls;

/// The delay before an exchange is declared again, within the timeout of a publish.
const DECLARE_RETRY_DELAY: Duration = Duration::from_millis(100);
/// How long `close` waits for the supervisor. Longer than the supervisor waits for the broker.
const CLOSE_TIMEOUT: Duration = connection::CLOSE_TIMEOUT.saturating_add(Duration::from_secs(1));
/// How often the state of a connection is checked, in addition to the events that it reports.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Log lines about a broker that accepts no messages at the moment, and accepts them again.
static BLOCKED_LOG: LogLimit = LogLimit::new(2);

/// Whether log lines of this target may contain secrets: lapin logs what it sends, with the password of the login, and returned
/// messages.
#[cfg(feature = "cli")]
pub(crate) fn logs_secrets(target: &str) -> bool {
    target == "lapin" || target.starts_with("lapin::")
}

/// A connection to RabbitMQ that reconnects by itself.
///
/// It logs under `nanite` what a user needs to know. Keep the log of `lapin` off: at level *trace* it contains the password, and at
/// level *warn* the messages that the broker returns.
///
/// ```no_run
/// use nanite::transport::{AmqpOptions, AmqpTransport, Destination, PublishRequest, Transport, TransportError};
/// use std::time::Duration;
///
/// # async fn example() -> Result<(), TransportError> {
/// let transport = AmqpTransport::connect(AmqpOptions::new("amqp://localhost")?).await?;
/// let message = PublishRequest::new(Destination::queue("work"), "hello".as_bytes());
/// transport.publish(message, Duration::from_secs(10)).await?;
/// transport.close().await;
/// # Ok(())
/// # }
/// ```
pub struct AmqpTransport {
    options: AmqpOptions,
    state: watch::Receiver<ConnectionState>,
    publisher: mpsc::Sender<PendingPublish>,
    declared: Arc<DeclaredQueues>,
    /// The exchanges that were declared.
    exchanges: Mutex<HashSet<String>>,
    /// Makes the supervisor close the connection when it is dropped.
    close: Mutex<Option<oneshot::Sender<()>>>,
}

impl AmqpTransport {
    /// Connects. This first attempt is made once; after it succeeded, a lost connection is restored without limit.
    ///
    /// Must be called within a Tokio runtime, which the transport keeps using.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), nanite::transport::TransportError> {
    /// use nanite::transport::{AmqpOptions, AmqpTransport, Tls};
    ///
    /// let tls = Tls::new("broker-ca.pem").client_certificate("fred.pem", "fred-key.pem");
    /// let transport = AmqpTransport::connect(AmqpOptions::new("amqps://broker.example.org")?.tls(tls)).await?;
    /// # drop(transport);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`TransportError::Unreachable`], [`TransportError::Credentials`] or [`TransportError::VirtualHost`]; for TLS also
    /// [`TransportError::Tls`], [`TransportError::TlsFile`] and [`TransportError::TlsKeyMode`]; [`TransportError::Address`] if the
    /// URL is `amqps` and no [`Tls`] is given, or the other way round.
    pub async fn connect(options: AmqpOptions) -> Result<Self, TransportError> {
        let first = connection::open(&options, 1).await?;
        let (sender, state) = watch::channel(ConnectionState::Up(Arc::clone(&first)));
        let declared = Arc::new(DeclaredQueues::default());
        let (close, closed) = oneshot::channel();
        let supervisor = Supervisor { options: options.clone(), state: sender, declared: Arc::clone(&declared) };
        tokio::spawn(supervisor.run(first, closed));
        let (publisher, requests) = mpsc::channel(publisher::QUEUE_CAPACITY);
        tokio::spawn(publisher::run(requests, state.clone()));
        let close = Mutex::new(Some(close));
        Ok(Self { options, state, publisher, declared, exchanges: Mutex::default(), close })
    }

    async fn connection(&self) -> Result<Arc<Connection>, TransportError> {
        connection::wait_until_up(&mut self.state.clone()).await
    }

    /// The connection, for calls without a timeout of their own.
    async fn connection_in_time(&self) -> Result<Arc<Connection>, TransportError> {
        timeout(CALL_TIMEOUT, self.connection()).await.unwrap_or(Err(TransportError::TimedOut(CALL_TIMEOUT)))
    }

    /// Declares an exchange unless that was done before.
    async fn ensure_exchange(&self, exchange: &str) -> Result<(), TransportError> {
        if self.exchanges.lock().contains(exchange) {
            return Ok(());
        }
        loop {
            let connection = self.connection().await?;
            match queues::declare_exchange(&connection, exchange).await {
                Ok(()) => break,
                Err(error) if error.is_retryable() => tokio::time::sleep(DECLARE_RETRY_DELAY).await,
                Err(error) => return Err(error),
            }
        }
        self.exchanges.lock().insert(exchange.to_owned());
        Ok(())
    }

    async fn publish_confirmed(
        &self,
        message: &PublishRequest,
        properties: ShortStrings,
    ) -> Result<(), TransportError> {
        loop {
            if let Destination::Exchange(exchange) = &message.destination {
                self.ensure_exchange(&exchange.name).await?;
            }
            let (sender, result) = oneshot::channel();
            let properties = properties.clone();
            let request = PendingPublish { message: message.clone(), properties, result: sender, is_suspect: false };
            // Without Tokio's budget, so that the first poll reserves a position in the queue: this keeps the order.
            tokio::task::unconstrained(self.publisher.send(request)).await.map_err(|_| TransportError::Closed)?;
            match (result.await.map_err(|_| TransportError::Closed)?, &message.destination) {
                // The exchange was deleted, or the broker lost its data.
                (Err(TransportError::Unroutable(_)), Destination::Exchange(exchange)) => {
                    self.exchanges.lock().remove(&exchange.name);
                    tokio::time::sleep(DECLARE_RETRY_DELAY).await;
                }
                (result, _) => return result,
            }
        }
    }
}

#[async_trait]
impl Transport for AmqpTransport {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        message.check()?;
        let properties = ShortStrings::of(&message)?;
        let deadline = Instant::now().checked_add(timeout);
        let published = self.publish_confirmed(&message, properties);
        match deadline {
            Some(deadline) => timeout_at(deadline, published).await.unwrap_or(Err(TransportError::TimedOut(timeout))),
            None => published.await,
        }
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        queue.check()?;
        let connection = self.connection_in_time().await?;
        consumer::consume(&connection, self.state.clone(), queue, prefetch).await
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        queue.check()?;
        let connection = self.connection_in_time().await?;
        let channel = queues::declare_queue(&connection, queue).await?;
        self.declared.remember(queue, &connection);
        queues::close_channel(&channel).await;
        Ok(())
    }

    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
        check_name(queue)?;
        let connection = self.connection_in_time().await?;
        queues::depth(&connection, queue).await
    }

    async fn close(&self) {
        drop(self.close.lock().take());
        let mut state = self.state.clone();
        let _ = timeout(CLOSE_TIMEOUT, state.wait_for(|state| matches!(state, ConnectionState::Closed))).await;
    }
}

impl fmt::Debug for AmqpTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpTransport").field("broker", &self.options).finish_non_exhaustive()
    }
}

/// The task that keeps the connection of one transport open.
struct Supervisor {
    options: AmqpOptions,
    state: watch::Sender<ConnectionState>,
    declared: Arc<DeclaredQueues>,
}

impl Supervisor {
    /// Runs until `close` is sent or its sender is dropped.
    async fn run(self, first: Arc<Connection>, close: oneshot::Receiver<()>) {
        let mut close = pin!(close);
        let mut connection = first;
        let mut backoff = Backoff::new();
        loop {
            let since = Instant::now();
            self.state.send_replace(ConnectionState::Up(Arc::clone(&connection)));
            tokio::select! {
                _ = &mut close => {
                    connection.close().await;
                    break;
                }
                () = self.watch(&connection) => {}
            }
            self.state.send_replace(ConnectionState::Down);
            let violation = connection.stream().borrow().violation.clone();
            match violation {
                Some(reason) => {
                    tracing::warn!(broker = %self.options, %reason, "connection to the broker ended; reconnecting");
                }
                None => tracing::warn!(broker = %self.options, "connection to the broker lost; reconnecting"),
            }
            if since.elapsed() >= BACKOFF_RESET_AFTER {
                backoff.reset();
            }
            connection = tokio::select! {
                _ = &mut close => break,
                reconnected = self.reconnect(connection.number + 1, &mut backoff) => reconnected,
            };
            self.declared.declare_missing(&connection).await;
            tracing::info!(broker = %self.options, "reconnected to the broker");
        }
        self.state.send_replace(ConnectionState::Closed);
    }

    /// Returns when the connection is lost.
    async fn watch(&self, connection: &Arc<Connection>) {
        let mut stream = connection.stream();
        let mut tick = tokio::time::interval(CHECK_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_blocked = false;
        while connection.is_up() {
            let seen = stream.borrow_and_update().clone();
            if seen.is_closed || seen.violation.is_some() {
                return;
            }
            if is_blocked != seen.blocked.is_some() {
                is_blocked = seen.blocked.is_some();
                match seen.blocked {
                    // A broker may say so without end.
                    _ if BLOCKED_LOG.next(SystemClock.now()) != LogDecision::Log => {}
                    Some(reason) => {
                        tracing::warn!(reason = printable(&reason), "the broker accepts no messages at the moment");
                    }
                    None => tracing::info!("the broker accepts messages again"),
                }
                self.state.send_replace(ConnectionState::Up(Arc::clone(connection)));
            }
            tokio::select! {
                _ = stream.changed() => {}
                _ = tick.tick() => {
                    let closed = stream.wait_for(|seen| seen.is_closed || seen.violation.is_some());
                    tokio::select! {
                        _ = closed => {}
                        () = self.declared.declare_missing(connection) => {}
                    }
                }
            }
        }
    }

    /// Tries to connect until it succeeds. Logs the error when it changes, not for every attempt.
    async fn reconnect(&self, number: u64, backoff: &mut Backoff) -> Arc<Connection> {
        let mut last_error = None;
        loop {
            tokio::time::sleep(backoff.next()).await;
            match connection::open(&self.options, number).await {
                Ok(connection) => return connection,
                Err(error) => {
                    if last_error.as_ref() != Some(&error) {
                        tracing::warn!(broker = %self.options, %error, "cannot connect to the broker; retrying");
                        last_error = Some(error);
                    }
                }
            }
        }
    }
}
