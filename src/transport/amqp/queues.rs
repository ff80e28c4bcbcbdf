//! Queues and exchanges on the broker: declaring them, asking for the depth of a queue, and declaring again what was deleted.

use std::collections::HashMap;
use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::connection::{CLOSE_TIMEOUT, Connection, ConnectionState, channel_error, classify, wait_until_up, within};
use crate::transport::message::check_name;
use crate::transport::{CALL_TIMEOUT, Queue, QueueKind, TransportError};

/// How often exchanges, bindings and queues are checked and restored.
const TOPOLOGY_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// A name as an AMQP short string.
pub(super) fn short_name(name: &str) -> Result<ShortString, TransportError> {
    check_name(name)?;
    ShortString::try_new(name).map_err(|_| TransportError::Name(name.to_owned()))
}

/// Declares a queue with its exchanges and bindings. Returns the channel that was used.
pub(super) async fn declare_queue(connection: &Connection, queue: &Queue) -> Result<Channel, TransportError> {
    let name = short_name(&queue.name)?;
    let mut channel = connection.channel().await?;
    for exchange in &queue.bindings {
        channel = declare_exchange_on(connection, channel, &exchange.name).await?;
    }
    let options = QueueDeclareOptions {
        durable: matches!(queue.kind, QueueKind::Durable(_)),
        exclusive: matches!(queue.kind, QueueKind::Exclusive),
        ..QueueDeclareOptions::default()
    };
    let call = channel.queue_declare(name.clone(), options, arguments(queue.kind));
    let declared =
        tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| TransportError::TimedOut(CALL_TIMEOUT))?;
    match declared.map_err(|error| conflict(&queue.name, &error)) {
        Ok(_) => {}
        // As with exchanges: without permission to declare it, an existing queue can still be used.
        Err(TransportError::Forbidden(reason)) if options.durable => {
            channel = connection.channel().await?;
            let options = QueueDeclareOptions { passive: true, ..options };
            let call = channel.queue_declare(name.clone(), options, FieldTable::default());
            within(CALL_TIMEOUT, call).await.map_err(|_| TransportError::Forbidden(reason))?;
        }
        Err(error) => return Err(error),
    }
    for exchange in &queue.bindings {
        bind(&channel, &queue.name, &exchange.name).await?;
    }
    Ok(channel)
}

/// Declares a durable fan-out exchange.
pub(super) async fn declare_exchange(connection: &Connection, exchange: &str) -> Result<(), TransportError> {
    let channel = declare_exchange_on(connection, connection.channel().await?, exchange).await?;
    close_channel(&channel).await;
    Ok(())
}

/// Without permission to declare it, an existing exchange can still be used. The broker closes the channel after a refusal, so the
/// returned channel may be another one.
async fn declare_exchange_on(
    connection: &Connection,
    channel: Channel,
    exchange: &str,
) -> Result<Channel, TransportError> {
    let name = short_name(exchange)?;
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let call = channel.exchange_declare(name.clone(), ExchangeKind::Fanout, options, FieldTable::default());
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Err(_) => Err(TransportError::TimedOut(CALL_TIMEOUT)),
        Ok(Ok(())) => Ok(channel),
        Ok(Err(error)) => match conflict(exchange, &error) {
            TransportError::Forbidden(reason) => {
                let channel = connection.channel().await?;
                let options = ExchangeDeclareOptions { passive: true, ..options };
                let call = channel.exchange_declare(name, ExchangeKind::Fanout, options, FieldTable::default());
                within(CALL_TIMEOUT, call).await.map_err(|_| TransportError::Forbidden(reason))?;
                Ok(channel)
            }
            error => Err(error),
        },
    }
}

/// The number of ready messages in a queue; `None` if there is no such queue.
pub(super) async fn depth(connection: &Connection, queue: &str) -> Result<Option<u64>, TransportError> {
    let channel = connection.channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let call = channel.queue_declare(short_name(queue)?, options, FieldTable::default());
    let declared =
        tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| TransportError::TimedOut(CALL_TIMEOUT))?;
    match declared {
        Ok(state) => {
            close_channel(&channel).await;
            Ok(Some(u64::from(state.message_count())))
        }
        Err(error) if matches!(channel_error(&error), Some((AMQPSoftError::NOTFOUND, _))) => Ok(None),
        Err(error) => Err(conflict(queue, &error)),
    }
}

/// Closes a channel. Its unacknowledged deliveries return to their queues.
pub(super) async fn close_channel(channel: &Channel) {
    if channel.status().connected() {
        let _ = within(CLOSE_TIMEOUT, channel.close(200, ShortString::from("done"))).await;
    }
}

fn conflict(queue: &str, error: &lapin::Error) -> TransportError {
    match channel_error(error) {
        Some((AMQPSoftError::RESOURCELOCKED | AMQPSoftError::PRECONDITIONFAILED, reason)) => {
            TransportError::QueueConflict { queue: queue.to_owned(), reason }
        }
        _ => classify(error),
    }
}

/// The arguments of a queue. The queue type is always given, since the broker's default is configurable.
fn arguments(kind: QueueKind) -> FieldTable {
    let mut arguments = FieldTable::default();
    let quorum = matches!(kind, QueueKind::Durable(options) if options.quorum);
    let queue_type = if quorum { "quorum" } else { "classic" };
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(queue_type.into()));
    if let Some(unused) = kind.expires_after() {
        arguments.insert("x-expires".into(), AMQPValue::LongLongInt(i64::from(milliseconds(unused).max(1))));
    }
    if kind.is_ordered() {
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    }
    arguments
}

/// Milliseconds, up to RabbitMQ's maximum (about 49 days).
pub(super) fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Declares the exchanges of a queue and binds it again, in intervals, for as long as it is consumed: a broker does not tell its clients
/// that an exchange was deleted or a queue unbound, and the queue would receive nothing.
pub(super) async fn watch_bindings(
    mut state: watch::Receiver<ConnectionState>,
    queue: Queue,
    is_consuming: impl Fn() -> bool,
) {
    let mut last_error = None;
    loop {
        tokio::time::sleep(TOPOLOGY_CHECK_INTERVAL).await;
        if !is_consuming() {
            return;
        }
        let Ok(connection) = wait_until_up(&mut state).await else { return };
        match bind_again(&connection, &queue).await {
            Ok(missing) => {
                last_error = None;
                for exchange in missing {
                    tracing::warn!(
                        queue = queue.name,
                        exchange,
                        "the exchange was missing; declared it and bound the queue again"
                    );
                }
            }
            // The loss of a connection is logged by its supervisor, the loss of the queue by its consumer.
            Err(TransportError::Disconnected) => {}
            Err(error) => {
                if last_error.as_ref() != Some(&error) {
                    tracing::warn!(queue = queue.name, %error, "cannot check the bindings of the queue; retrying");
                    last_error = Some(error);
                }
            }
        }
    }
}

/// Returns the exchanges that were missing. AMQP has no way to see whether a binding was missing.
async fn bind_again(connection: &Connection, queue: &Queue) -> Result<Vec<String>, TransportError> {
    let mut channel = connection.channel().await?;
    let mut missing = Vec::new();
    for exchange in &queue.bindings {
        let name = short_name(&exchange.name)?;
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let call = channel.exchange_declare(name.clone(), ExchangeKind::Fanout, options, FieldTable::default());
        let exists =
            tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| TransportError::TimedOut(CALL_TIMEOUT))?;
        match exists {
            Ok(()) => {}
            Err(error) if matches!(channel_error(&error), Some((AMQPSoftError::NOTFOUND, _))) => {
                channel = declare_exchange_on(connection, connection.channel().await?, &exchange.name).await?;
                missing.push(exchange.name.clone());
            }
            Err(error) => return Err(conflict(&exchange.name, &error)),
        }
        bind(&channel, &queue.name, &exchange.name).await?;
    }
    close_channel(&channel).await;
    Ok(missing)
}

async fn bind(channel: &Channel, queue: &str, exchange: &str) -> Result<(), TransportError> {
    let (queue, exchange) = (short_name(queue)?, short_name(exchange)?);
    let bind =
        channel.queue_bind(queue, exchange, ShortString::default(), QueueBindOptions::default(), FieldTable::default());
    within(CALL_TIMEOUT, bind).await
}

/// The queues that were declared without being consumed, to declare them again on each new connection. Queues that expire when
/// unused are not remembered.
#[derive(Debug, Default)]
pub(super) struct DeclaredQueues(Mutex<HashMap<String, DeclaredQueue>>);

#[derive(Debug)]
struct DeclaredQueue {
    queue: Queue,
    /// The number of the connection on which it was declared last.
    connection: u64,
    /// When it was declared or known to exist.
    checked: Instant,
    /// Whether the failure to declare it again has been logged.
    logged: bool,
}

impl DeclaredQueues {
    pub(super) fn remember(&self, queue: &Queue, connection: &Connection) {
        if queue.kind.expires_after().is_none() {
            let declared = DeclaredQueue {
                queue: queue.clone(),
                connection: connection.number,
                checked: Instant::now(),
                logged: false,
            };
            self.0.lock().insert(queue.name.clone(), declared);
        }
    }

    /// Declares the queues that have not been declared on this connection, and those that were deleted. A failure is retried at the
    /// next call.
    pub(super) async fn declare_missing(&self, connection: &Connection) {
        let to_check: Vec<(Queue, bool)> = {
            let queues = self.0.lock();
            let is_new = |declared: &DeclaredQueue| declared.connection != connection.number;
            let to_check = queues
                .values()
                .filter(|declared| is_new(declared) || declared.checked.elapsed() >= TOPOLOGY_CHECK_INTERVAL);
            to_check.map(|declared| (declared.queue.clone(), is_new(declared))).collect()
        };
        for (queue, is_new) in to_check {
            let result = if is_new { declare(connection, &queue).await } else { restore(connection, &queue).await };
            let mut queues = self.0.lock();
            let Some(declared) = queues.get_mut(&queue.name) else { continue };
            match result {
                Ok(()) => {
                    declared.connection = connection.number;
                    declared.checked = Instant::now();
                    declared.logged = false;
                }
                Err(error) => {
                    if !declared.logged {
                        tracing::warn!(queue = queue.name, %error, "cannot declare the queue again yet; retrying");
                    }
                    declared.logged = true;
                }
            }
        }
    }
}

async fn declare(connection: &Connection, queue: &Queue) -> Result<(), TransportError> {
    let channel = declare_queue(connection, queue).await?;
    close_channel(&channel).await;
    Ok(())
}

/// Declares a queue again if it was deleted.
async fn restore(connection: &Connection, queue: &Queue) -> Result<(), TransportError> {
    if depth(connection, &queue.name).await?.is_none() {
        declare(connection, queue).await?;
        tracing::warn!(queue = queue.name, "the queue was missing; declared it again");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::DurableOptions;

    #[test]
    fn durations_are_limited_to_the_brokers_range() {
        assert_eq!(milliseconds(Duration::from_secs(3)), 3_000);
        assert_eq!(milliseconds(Duration::from_secs(u64::MAX)), u32::MAX);
        let kind = DurableOptions::new().expires_after(Duration::ZERO).into();
        assert_eq!(arguments(kind).inner().get("x-expires"), Some(&AMQPValue::LongLongInt(1)));
    }

    #[test]
    fn rejects_names_that_amqp_cannot_carry() {
        for name in ["", "amq.direct", &"x".repeat(256)] {
            assert_eq!(short_name(name), Err(TransportError::Name(name.to_owned())));
        }
        assert_eq!(short_name(&"x".repeat(255)).unwrap().as_str().len(), 255);
    }
}
