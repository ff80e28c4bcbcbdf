//! Declaring queues and exchanges, and asking about queues.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};

use super::connection::Generation;
use super::error::{classify, soft, within};
use crate::transport::{CALL_TIMEOUT, Queue, QueueKind, TransportError, check_name};

const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A name as AMQP carries it.
pub(super) fn name(name: &str) -> Result<ShortString, TransportError> {
    check_name(name)?;
    ShortString::try_new(name).map_err(|_| TransportError::Name(name.to_owned()))
}

/// Declares a queue with its exchanges and bindings. Returns the channel that it was done on.
pub(super) async fn queue(generation: &Generation, queue: &Queue) -> Result<Channel, TransportError> {
    let queue_name = name(&queue.name)?;
    let mut channel = generation.channel().await?;
    for exchange in &queue.bindings {
        channel = declare_exchange(generation, channel, &exchange.0).await?;
    }
    let options = QueueDeclareOptions {
        durable: matches!(queue.kind, QueueKind::Durable { .. }),
        exclusive: matches!(queue.kind, QueueKind::Exclusive),
        ..QueueDeclareOptions::default()
    };
    let call = channel.queue_declare(queue_name.clone(), options, arguments(queue.kind));
    let declared =
        tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| TransportError::TimedOut(CALL_TIMEOUT))?;
    match declared.map_err(|error| conflict(&queue.name, &error)) {
        Ok(_) => {}
        // As with exchanges: who may not declare it can still use it when it is there.
        Err(TransportError::Forbidden(why)) if options.durable => {
            channel = generation.channel().await?;
            let options = QueueDeclareOptions { passive: true, ..options };
            let call = channel.queue_declare(queue_name.clone(), options, FieldTable::default());
            within(CALL_TIMEOUT, call).await.map_err(|_| TransportError::Forbidden(why))?;
        }
        Err(error) => return Err(error),
    }
    for exchange in &queue.bindings {
        let bind = channel.queue_bind(
            queue_name.clone(),
            name(&exchange.0)?,
            ShortString::default(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        within(CALL_TIMEOUT, bind).await?;
    }
    Ok(channel)
}

/// Declares a durable fan-out exchange.
pub(super) async fn exchange(generation: &Generation, exchange: &str) -> Result<(), TransportError> {
    let channel = declare_exchange(generation, generation.channel().await?, exchange).await?;
    close(&channel).await;
    Ok(())
}

/// Who may not declare it can still use it when it is there. The broker closes the channel of who asks too much, so the channel
/// that comes back may be another.
async fn declare_exchange(
    generation: &Generation,
    channel: Channel,
    exchange: &str,
) -> Result<Channel, TransportError> {
    let name = name(exchange)?;
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let call = channel.exchange_declare(name.clone(), ExchangeKind::Fanout, options, FieldTable::default());
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Err(_) => Err(TransportError::TimedOut(CALL_TIMEOUT)),
        Ok(Ok(())) => Ok(channel),
        Ok(Err(error)) => match conflict(exchange, &error) {
            TransportError::Forbidden(why) => {
                let channel = generation.channel().await?;
                let options = ExchangeDeclareOptions { passive: true, ..options };
                let call = channel.exchange_declare(name, ExchangeKind::Fanout, options, FieldTable::default());
                within(CALL_TIMEOUT, call).await.map_err(|_| TransportError::Forbidden(why))?;
                Ok(channel)
            }
            error => Err(error),
        },
    }
}

/// How many messages are ready in a queue.
pub(super) async fn depth(generation: &Generation, queue: &str) -> Result<Option<u64>, TransportError> {
    let channel = generation.channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let call = channel.queue_declare(name(queue)?, options, FieldTable::default());
    let asked = tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| TransportError::TimedOut(CALL_TIMEOUT))?;
    match asked {
        Ok(state) => {
            close(&channel).await;
            Ok(Some(u64::from(state.message_count())))
        }
        Err(error) if matches!(soft(&error), Some((AMQPSoftError::NOTFOUND, _))) => Ok(None),
        Err(error) => Err(conflict(queue, &error)),
    }
}

/// Closes a channel. What was delivered on it and not settled goes back.
pub(super) async fn close(channel: &Channel) {
    if channel.status().connected() {
        let _ = within(CLOSE_TIMEOUT, channel.close(200, ShortString::from("done"))).await;
    }
}

fn conflict(queue: &str, error: &lapin::Error) -> TransportError {
    match soft(error) {
        Some((AMQPSoftError::RESOURCELOCKED | AMQPSoftError::PRECONDITIONFAILED, why)) => {
            TransportError::QueueConflict { queue: queue.to_owned(), why }
        }
        _ => classify(error),
    }
}

/// The arguments of a queue. Its type is named, since the broker's own default can be set otherwise.
fn arguments(kind: QueueKind) -> FieldTable {
    let mut arguments = FieldTable::default();
    let quorum = matches!(kind, QueueKind::Durable { quorum: true, .. });
    let queue_type = if quorum { "quorum" } else { "classic" };
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(queue_type.into()));
    if let QueueKind::Durable { expires: Some(expires), .. } = kind {
        arguments.insert("x-expires".into(), AMQPValue::LongLongInt(i64::from(milliseconds(expires).max(1))));
    }
    if let QueueKind::Durable { ordered: true, .. } = kind {
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    }
    arguments
}

/// Milliseconds, up to the most that RabbitMQ takes (some 49 days).
pub(super) fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// The queues that were declared without being consumed, to be declared again on each new connection. Those that expire when
/// unused are not among them: what nobody consumes may go.
#[derive(Debug, Default)]
pub(super) struct Declared(Mutex<HashMap<String, Known>>);

#[derive(Debug)]
struct Known {
    queue: Queue,
    generation: u64,
    complained: bool,
}

impl Declared {
    pub(super) fn remember(&self, queue: &Queue, generation: u64) {
        if matches!(queue.kind, QueueKind::Durable { expires: Some(_), .. }) {
            return;
        }
        let known = Known { queue: queue.clone(), generation, complained: false };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(queue.name.clone(), known);
    }

    /// Declares what has not been declared in this generation. What does not succeed is tried again at the next call.
    pub(super) async fn declare_missing(&self, generation: &Generation) {
        let missing: Vec<Queue> = {
            let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            known
                .values()
                .filter(|known| known.generation != generation.number)
                .map(|known| known.queue.clone())
                .collect()
        };
        for missing in missing {
            let result = queue(generation, &missing).await;
            if let Ok(channel) = &result {
                close(channel).await;
            }
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(known) = known.get_mut(&missing.name) else { continue };
            match result {
                Ok(_) => {
                    known.generation = generation.number;
                    known.complained = false;
                }
                Err(error) => {
                    if !known.complained {
                        tracing::warn!(queue = missing.name, %error, "queue cannot be declared again yet");
                    }
                    known.complained = true;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_stay_within_what_the_broker_takes() {
        assert_eq!(milliseconds(Duration::from_secs(3)), 3_000);
        assert_eq!(milliseconds(Duration::from_secs(u64::MAX)), u32::MAX);
        let kind = QueueKind::Durable { expires: Some(Duration::ZERO), quorum: false, ordered: false };
        assert_eq!(arguments(kind).inner().get("x-expires"), Some(&AMQPValue::LongLongInt(1)));
    }

    #[test]
    fn names_that_amqp_cannot_carry_are_refused() {
        for wrong in ["", "amq.direct", &"x".repeat(256)] {
            assert_eq!(name(wrong), Err(TransportError::Name(wrong.to_owned())));
        }
        assert_eq!(name(&"x".repeat(255)).unwrap().as_str().len(), 255);
    }
}
