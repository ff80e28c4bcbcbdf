//! RabbitMQ, by lapin: the only folder that names it.
//!
//! [`AmqpTransport`] is a handle. Behind it, tasks: the supervisor of the connection (`connection`), one that publishes
//! (`publisher`), and one for each consumer (`consumer`). All follow a watch on the connection and start anew on each new one.

mod backoff;
mod connection;
mod consumer;
mod declare;
mod error;
mod in_flight;
mod options;
mod publisher;
mod tls;

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    CALL_TIMEOUT, Consumer, Destination, PublishRequest, Queue, Transport, TransportError, check_message, check_name,
    check_queue,
};
use connection::{ConnectionState, Generation};
use declare::Declared;
pub use options::AmqpOptions;
#[cfg(feature = "cli")]
pub(crate) use options::segment;
use publisher::{Job, Names};
pub use tls::Tls;

/// How long to wait before an exchange that could not be declared is tried again, within the timeout of a publish.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// How long `close` waits for the broker's agreement.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(6);

/// Whether a log of this target may hold secrets: lapin says what it sends, its login with the password too, and what comes back
/// to it.
#[cfg(feature = "cli")]
pub(crate) fn logs_secrets(target: &str) -> bool {
    target == "lapin" || target.starts_with("lapin::")
}

/// A connection to RabbitMQ that comes back by itself.
///
/// What a user needs to know of it is logged under `nanite`. The log of `lapin` should stay off: at the level *trace* it holds the
/// login with the password, and at the level *warn* the messages that come back.
pub struct AmqpTransport {
    options: AmqpOptions,
    links: watch::Receiver<ConnectionState>,
    jobs: mpsc::Sender<Job>,
    declared: Arc<Declared>,
    /// The exchanges that are known to exist.
    exchanges: Mutex<HashSet<String>>,
    /// Tells the supervisor to close the connection when it is dropped.
    close: Mutex<Option<oneshot::Sender<()>>>,
}

impl AmqpTransport {
    /// Connects. Once this has succeeded, a lost connection is restored without end; but this first attempt is made once.
    ///
    /// Must be called within a Tokio runtime, which the transport keeps using.
    ///
    /// # Errors
    /// [`TransportError::Unreachable`], [`TransportError::Credentials`] or [`TransportError::VirtualHost`]; for TLS also
    /// [`TransportError::Tls`], [`TransportError::TlsFile`] and [`TransportError::TlsKeyMode`]; [`TransportError::Address`] when the
    /// URL says `amqps` and no [`Tls`] is given, or the other way round.
    pub async fn connect(options: AmqpOptions) -> Result<Self, TransportError> {
        let first = connection::open(&options, 1).await?;
        let (link, links) = watch::channel(ConnectionState::Up(Arc::clone(&first.generation)));
        let declared = Arc::new(Declared::default());
        let (close, closed) = oneshot::channel();
        tokio::spawn(connection::supervise(options.clone(), first, link, Arc::clone(&declared), closed));
        let (jobs, queued) = mpsc::channel(publisher::QUEUED);
        tokio::spawn(publisher::run(queued, links.clone()));
        let close = Mutex::new(Some(close));
        Ok(Self { options, links, jobs, declared, exchanges: Mutex::default(), close })
    }

    async fn up(&self) -> Result<Arc<Generation>, TransportError> {
        connection::up(&mut self.links.clone()).await
    }

    /// The connection, as soon as there is one; for calls without a timeout of their own.
    async fn up_in_time(&self) -> Result<Arc<Generation>, TransportError> {
        timeout(CALL_TIMEOUT, self.up()).await.unwrap_or(Err(TransportError::TimedOut(CALL_TIMEOUT)))
    }

    /// Declares an exchange if that has not been done.
    async fn know_exchange(&self, exchange: &str) -> Result<(), TransportError> {
        if self.exchanges.lock().unwrap_or_else(PoisonError::into_inner).contains(exchange) {
            return Ok(());
        }
        loop {
            let generation = self.up().await?;
            match declare::exchange(&generation, exchange).await {
                Ok(()) => break,
                Err(error) if error.is_retryable() => tokio::time::sleep(RETRY_AFTER).await,
                Err(error) => return Err(error),
            }
        }
        self.exchanges.lock().unwrap_or_else(PoisonError::into_inner).insert(exchange.to_owned());
        Ok(())
    }

    async fn publish_confirmed(&self, message: &PublishRequest, names: Names) -> Result<(), TransportError> {
        loop {
            if let Destination::Exchange(exchange) = &message.destination {
                self.know_exchange(&exchange.0).await?;
            }
            let (reply, verdict) = oneshot::channel();
            let job = Job { message: message.clone(), names: names.clone(), reply, suspect: false };
            // Outside of Tokio's budget, so that the first poll takes a place in the queue: that keeps the order.
            tokio::task::unconstrained(self.jobs.send(job)).await.map_err(|_| TransportError::Closed)?;
            match (verdict.await.map_err(|_| TransportError::Closed)?, &message.destination) {
                // The exchange has gone: a broker without its data, or somebody deleted it.
                (Err(TransportError::Unroutable(_)), Destination::Exchange(exchange)) => {
                    self.exchanges.lock().unwrap_or_else(PoisonError::into_inner).remove(&exchange.0);
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                (verdict, _) => return verdict,
            }
        }
    }
}

#[async_trait]
impl Transport for AmqpTransport {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        check_message(&message)?;
        let names = Names::of(&message)?;
        let deadline = Instant::now().checked_add(timeout);
        let published = self.publish_confirmed(&message, names);
        match deadline {
            Some(deadline) => timeout_at(deadline, published).await.unwrap_or(Err(TransportError::TimedOut(timeout))),
            None => published.await,
        }
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        check_queue(queue)?;
        let generation = self.up_in_time().await?;
        consumer::start(&generation, self.links.clone(), queue, prefetch).await
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        check_queue(queue)?;
        let generation = self.up_in_time().await?;
        let channel = declare::queue(&generation, queue).await?;
        self.declared.remember(queue, generation.number);
        declare::close(&channel).await;
        Ok(())
    }

    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
        check_name(queue)?;
        let generation = self.up_in_time().await?;
        declare::depth(&generation, queue).await
    }

    async fn close(&self) {
        drop(self.close.lock().unwrap_or_else(PoisonError::into_inner).take());
        let mut links = self.links.clone();
        // The supervisor gives up waiting for the broker before this does.
        let _ = timeout(CLOSE_TIMEOUT, links.wait_for(|link| matches!(link, ConnectionState::Closed))).await;
    }
}

impl fmt::Debug for AmqpTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpTransport").field("broker", &self.options).finish_non_exhaustive()
    }
}
