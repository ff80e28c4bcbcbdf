//! RabbitMQ, with the client library lapin. No other folder uses lapin.
//!
//! [`AmqpTransport`] is a handle to several tasks: the supervisor of the connection (`supervisor`), the publisher (`publisher`), and
//! one for each consumer (`consumer`). They watch the state of the connection and start again on each new one.

mod connection;
mod consumer;
mod declare;
mod options;
mod publisher;
mod supervisor;
mod tls;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::message::check_name;
use super::{CALL_TIMEOUT, Consumer, Destination, PublishRequest, Queue, Transport, TransportError};
use connection::{Connection, ConnectionState};
use declare::DeclaredQueues;
pub use options::AmqpOptions;
#[cfg(feature = "cli")]
pub(crate) use options::percent_encode;
use publisher::{PendingPublish, ShortStrings};
use supervisor::Supervisor;
pub use tls::Tls;

/// The delay before an exchange is declared again, within the timeout of a publish.
const DECLARE_RETRY_DELAY: Duration = Duration::from_millis(100);
/// How long `close` waits for the supervisor. Longer than the supervisor waits for the broker.
const CLOSE_TIMEOUT: Duration = connection::CLOSE_TIMEOUT.saturating_add(Duration::from_secs(1));

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
        let (sender, state) = watch::channel(ConnectionState::Up(Arc::clone(&first.0)));
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
            match declare::declare_exchange(&connection, exchange).await {
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
        consumer::start(&connection, self.state.clone(), queue, prefetch).await
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        queue.check()?;
        let connection = self.connection_in_time().await?;
        let channel = declare::declare_queue(&connection, queue).await?;
        self.declared.remember(queue, &connection);
        declare::close_channel(&channel).await;
        Ok(())
    }

    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
        check_name(queue)?;
        let connection = self.connection_in_time().await?;
        declare::depth(&connection, queue).await
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
