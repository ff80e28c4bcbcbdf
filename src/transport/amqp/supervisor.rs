//! Keeps a connection open: opens a new one when it is lost, and declares its queues again.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::Event;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::connection::{Backoff, Connection, ConnectionState, Events, open, printable};
use super::declare::DeclaredQueues;
use super::options::AmqpOptions;

/// How often the state of a connection is checked, in addition to the events that it reports.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// After a connection that lasted this long, the first attempt to reconnect is made soon.
const BACKOFF_RESET_AFTER: Duration = Duration::from_secs(10);

/// The task that keeps the connection of one transport open.
pub(super) struct Supervisor {
    pub(super) options: AmqpOptions,
    pub(super) state: watch::Sender<ConnectionState>,
    pub(super) declared: Arc<DeclaredQueues>,
}

impl Supervisor {
    /// Runs until `close` is sent or its sender is dropped.
    pub(super) async fn run(self, first: (Arc<Connection>, Events), close: oneshot::Receiver<()>) {
        let mut close = pin!(close);
        let (mut connection, mut events) = first;
        let mut backoff = Backoff::new();
        loop {
            let since = Instant::now();
            self.state.send_replace(ConnectionState::Up(Arc::clone(&connection)));
            tokio::select! {
                _ = &mut close => {
                    connection.close().await;
                    break;
                }
                () = self.watch(&connection, &mut events) => {}
            }
            self.state.send_replace(ConnectionState::Down);
            tracing::warn!(broker = %self.options, "connection to the broker lost; reconnecting");
            if since.elapsed() >= BACKOFF_RESET_AFTER {
                backoff.reset();
            }
            (connection, events) = tokio::select! {
                _ = &mut close => break,
                reconnected = self.reconnect(connection.number + 1, &mut backoff) => reconnected,
            };
            self.declared.declare_missing(&connection).await;
            tracing::info!(broker = %self.options, "reconnected to the broker");
        }
        self.state.send_replace(ConnectionState::Closed);
    }

    /// Returns when the connection is lost.
    async fn watch(&self, connection: &Arc<Connection>, events: &mut Events) {
        let mut tick = tokio::time::interval(CHECK_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut has_events = true;
        while connection.is_up() {
            let event = tokio::select! {
                event = events.next(), if has_events => {
                    has_events = event.is_some();
                    event
                }
                _ = tick.tick() => None,
            };
            match event {
                Some(Event::ConnectionBlocked(reason)) => {
                    tracing::warn!(reason = printable(&reason), "the broker accepts no messages at the moment");
                    self.state.send_replace(ConnectionState::Up(Arc::clone(connection)));
                }
                Some(Event::ConnectionUnblocked) => {
                    tracing::info!("the broker accepts messages again");
                    self.state.send_replace(ConnectionState::Up(Arc::clone(connection)));
                }
                Some(_) => {}
                None => self.declared.declare_missing(connection).await,
            }
        }
    }

    /// Tries to connect until it succeeds. Logs the error when it changes, not for every attempt.
    async fn reconnect(&self, number: u64, backoff: &mut Backoff) -> (Arc<Connection>, Events) {
        let mut last_error = None;
        loop {
            tokio::time::sleep(backoff.next()).await;
            match open(&self.options, number).await {
                Ok(opened) => return opened,
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
