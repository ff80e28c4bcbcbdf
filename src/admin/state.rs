//! The state that all pages share, the latest snapshot of the agents, and the session of a request.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, header};
use tokio::sync::{Semaphore, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::access::{Access, Authenticator, LoginAttempts, SESSION_COOKIE, Session, Sessions};
use super::forwarded::TrustedProxy;
use super::history::History;
use super::http::{HttpError, cookie};
use super::origin::Origins;
use super::requests::Requests;
use crate::clock::{Clock, Timestamp};
use crate::mapper::{AgentRecord, Mapper};
use crate::packet::Service;
use crate::request::AgentWorkload;

/// How often the snapshot is refreshed.
const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(1);
/// The most services in a list to choose from.
const MAX_LISTED_SERVICES: usize = 1000;
/// The most event streams at a time.
const MAX_EVENT_STREAMS: usize = 32;

/// The message for requests that are disabled.
pub(super) const READ_ONLY: &str = "This Control Tower is read-only. To send requests, start it with --allow-requests.";

/// The application state.
#[derive(Debug)]
pub(super) struct AppState {
    pub mapper: Mapper,
    pub history: History,
    pub clock: Arc<dyn Clock>,
    pub allow_requests: bool,
    pub origins: Origins,
    pub trusted_proxies: Vec<TrustedProxy>,
    pub authenticator: Authenticator,
    pub login_attempts: LoginAttempts,
    pub sessions: Sessions,
    pub requests: Requests,
    pub event_stream_slots: Arc<Semaphore>,
    snapshot: watch::Sender<Arc<Snapshot>>,
    shutdown: watch::Sender<bool>,
}

/// All agents at one time.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub at: Timestamp,
    /// In the order of their names.
    pub agents: Vec<AgentSnapshot>,
    /// The number of messages that the mapper refused, by reason.
    pub refused: Vec<(String, u64)>,
    /// Why the agents could not be read.
    pub error: Option<String>,
}

#[derive(Clone, Debug)]
pub(super) struct AgentSnapshot {
    pub record: Arc<AgentRecord>,
    pub workload: AgentWorkload,
}

impl Snapshot {
    pub fn empty(at: Timestamp) -> Self {
        Self { at, agents: Vec::new(), refused: Vec::new(), error: None }
    }

    /// The offered services, sorted, up to a limit.
    pub fn services(&self) -> Vec<&Service> {
        let mut services: Vec<&Service> = self.agents.iter().flat_map(|agent| &agent.record.services).collect();
        services.sort_unstable();
        services.dedup();
        services.truncate(MAX_LISTED_SERVICES);
        services
    }
}

impl AppState {
    pub fn new(
        mapper: Mapper,
        history: History,
        access: Access,
        clock: Arc<dyn Clock>,
        origins: Origins,
        trusted_proxies: Vec<TrustedProxy>,
        allow_requests: bool,
    ) -> Self {
        Self {
            snapshot: watch::Sender::new(Arc::new(Snapshot::empty(clock.now()))),
            mapper,
            history,
            clock,
            allow_requests,
            origins,
            trusted_proxies,
            authenticator: Authenticator::new(access),
            login_attempts: LoginAttempts::default(),
            sessions: Sessions::default(),
            requests: Requests::default(),
            event_stream_slots: Arc::new(Semaphore::new(MAX_EVENT_STREAMS)),
            shutdown: watch::Sender::new(false),
        }
    }

    /// An error unless users may send requests.
    pub fn require_requests_allowed(&self) -> Result<(), HttpError> {
        if self.allow_requests { Ok(()) } else { Err(HttpError::Status(StatusCode::FORBIDDEN, READ_ONLY)) }
    }

    /// Reads the agents from the mapper, and records their loads.
    pub async fn take_snapshot(&self) -> Snapshot {
        let at = self.clock.now();
        let (records, error) = match self.mapper.agents().await {
            Ok(records) => (records, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        self.history.record_loads(records.iter().map(Arc::as_ref));
        let workloads = self.mapper.workloads(records.iter().map(|record| &record.identity));
        let agents = records.into_iter().zip(workloads).map(|(record, workload)| AgentSnapshot { record, workload });
        let refused = self.mapper.refusals().into_iter().filter(|(_, count)| *count > 0);
        let refused = refused.map(|(kind, count)| (kind.to_string(), count)).collect();
        Snapshot { at, agents: agents.collect(), refused, error }
    }

    /// The latest snapshot of [`AppState::refresh_snapshots`].
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    pub fn subscribe_to_snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.subscribe()
    }

    /// Refreshes the snapshot at an interval. Never returns.
    pub async fn refresh_snapshots(&self) {
        let mut ticks = interval(SNAPSHOT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.snapshot.send_replace(Arc::new(self.take_snapshot().await));
        }
    }

    /// Starts the shutdown: streams, requests and connections end.
    pub fn shut_down(&self) {
        self.shutdown.send_replace(true);
    }

    /// Completes when the shutdown starts.
    pub fn shutdown_started(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut shutdown = self.shutdown.subscribe();
        async move {
            // An error means that the state is gone.
            let _ = shutdown.wait_for(|started| *started).await;
        }
    }
}

impl FromRequestParts<Arc<AppState>> for Session {
    type Rejection = HttpError;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<AppState>) -> Result<Self, HttpError> {
        let cookie = cookie(&parts.headers, &state.origins.cookie_name(SESSION_COOKIE));
        let session = cookie.and_then(|cookie| state.sessions.find(cookie, state.clock.now()));
        session.ok_or_else(|| login_required(parts))
    }
}

/// The response without a session: pages redirect to the login page, everything else is an error.
fn login_required(parts: &Parts) -> HttpError {
    let is_event_stream = parts.headers.get(header::ACCEPT).is_some_and(|accept| accept == "text/event-stream");
    if parts.method == Method::GET && !is_event_stream {
        return HttpError::LoginRequired;
    }
    HttpError::Status(StatusCode::UNAUTHORIZED, "Log in first.")
}
