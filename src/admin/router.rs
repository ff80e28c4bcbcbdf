//! Which page stands where, and what all of them share.

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tokio::sync::{Semaphore, watch};

use super::access::Door;
use super::attempts::Attempts;
use super::fleet::Snapshot;
use super::history::History;
use super::live::PAGES;
use super::origin::Origins;
use super::page::Refusal;
use super::runs::Runs;
use super::session::Sessions;
use super::{ControlTower, agents, answers, ask, assets, guard, login, page};
use crate::clock::Clock;
use crate::mapper::Mapper;

/// What all pages share.
#[derive(Debug)]
pub(super) struct Tower {
    pub mapper: Mapper,
    pub history: History,
    pub clock: Arc<dyn Clock>,
    pub allow_requests: bool,
    pub origins: Origins,
    pub door: Door,
    pub attempts: Attempts,
    pub sessions: Sessions,
    pub runs: Runs,
    /// The agents, as they were looked at last.
    pub snapshot: watch::Sender<Arc<Snapshot>>,
    /// How many pages may be kept up to date.
    pub live: Arc<Semaphore>,
    /// Becomes true when all stops.
    pub stopping: watch::Sender<bool>,
}

impl Tower {
    pub fn new(tower: ControlTower, origins: Origins) -> Self {
        let ControlTower { mapper, history, access, clock, allow_requests, public: _ } = tower;
        Self {
            snapshot: watch::Sender::new(Arc::new(Snapshot::nothing(clock.now()))),
            mapper,
            history,
            clock,
            allow_requests,
            origins,
            door: Door::new(access),
            attempts: Attempts::default(),
            sessions: Sessions::default(),
            runs: Runs::default(),
            live: Arc::new(Semaphore::new(PAGES)),
            stopping: watch::Sender::new(false),
        }
    }
}

impl Tower {
    /// Whether requests are sent from here.
    pub fn may_ask(&self) -> Result<(), Refusal> {
        if self.allow_requests { Ok(()) } else { Err(Refusal::Because(StatusCode::FORBIDDEN, page::READ_ONLY)) }
    }
}

/// Waits until all stops.
pub(super) async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error says that the tower is gone.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// All pages, behind the guard.
pub(super) fn router(tower: Arc<Tower>) -> Router {
    Router::new()
        .route("/", get(agents::table))
        .route("/events", get(agents::table_events))
        .route("/agents/{name}", get(agents::one))
        .route("/agents/{name}/events", get(agents::one_events))
        .route("/request", get(ask::form).post(ask::send))
        .route("/requests", get(answers::all))
        .route("/requests/{id}", get(answers::one))
        .route("/requests/{id}/events", get(answers::one_events))
        .route("/requests/{id}/stop", post(answers::stop))
        .route("/login", get(login::form).post(login::submit))
        .route("/logout", post(login::logout))
        .route("/assets/{name}", get(assets::get))
        .fallback(async || assets::NO_PAGE)
        .method_not_allowed_fallback(async || {
            Refusal::Because(StatusCode::METHOD_NOT_ALLOWED, "This cannot be done here.")
        })
        .layer(from_fn_with_state(tower.clone(), guard::guard))
        .with_state(tower)
}
