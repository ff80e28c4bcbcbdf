//! The server: routes, static assets and connections, with limits on their number, size and time.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::guard::guard;
use super::http::{HttpError, PeerAddr};
use super::pages::{agents, login, requests};
use super::state::AppState;

/// The most open connections; further clients wait to be accepted.
const MAX_CONNECTIONS: usize = 256;
/// How long the head of a request may take to arrive, from the connection or the last response.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(20);
const MAX_HEADER_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// How long a connection lasts, even if its client has stopped reading.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(900);
/// How long open connections may take to end at the shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// The pause after a failure to accept a connection: for lack of file descriptors, for example.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Name, content type and content. They are part of the program; no files are served.
const ASSETS: [(&str, &str, &str); 3] = [
    ("tower.css", "text/css; charset=utf-8", include_str!("assets/tower.css")),
    ("tower.js", "text/javascript; charset=utf-8", include_str!("assets/tower.js")),
    ("icon.svg", "image/svg+xml", include_str!("assets/icon.svg")),
];

const METHOD_NOT_ALLOWED: HttpError =
    HttpError::Status(StatusCode::METHOD_NOT_ALLOWED, "This page does not support this method.");

fn router(state: Arc<AppState>) -> Router {
    Router::new()
        .route("/", get(agents::list))
        .route("/events", get(agents::list_events))
        .route("/agents/{name}", get(agents::details))
        .route("/agents/{name}/events", get(agents::details_events))
        .route("/request", get(requests::form).post(requests::send))
        .route("/requests", get(requests::list))
        .route("/requests/{id}", get(requests::details))
        .route("/requests/{id}/events", get(requests::details_events))
        .route("/requests/{id}/stop", post(requests::stop))
        .route("/login", get(login::form).post(login::submit))
        .route("/logout", post(login::logout))
        .route("/assets/{name}", get(asset))
        .fallback(async || HttpError::PAGE_NOT_FOUND)
        .method_not_allowed_fallback(async || METHOD_NOT_ALLOWED)
        .layer(from_fn_with_state(state.clone(), guard))
        .with_state(state)
}

/// `GET /assets/NAME`.
async fn asset(Path(name): Path<String>) -> Response {
    match ASSETS.iter().find(|(asset, ..)| *asset == name) {
        Some((_, content_type, content)) => ([(header::CONTENT_TYPE, *content_type)], *content).into_response(),
        None => HttpError::PAGE_NOT_FOUND.into_response(),
    }
}

/// Serves the pages until `shutdown` completes.
pub(super) async fn serve(state: Arc<AppState>, listener: TcpListener, shutdown: impl Future<Output = ()>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let router = router(state.clone());
    let mut connections = JoinSet::new();
    let accept = async {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            while connections.try_join_next().is_some() {}
            match listener.accept().await {
                Ok((stream, peer)) => {
                    connections.spawn(serve_connection(state.clone(), router.clone(), stream, PeerAddr(peer), slot));
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection");
                    sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    };
    tokio::select! {
        () = state.refresh_snapshots() => {}
        () = accept => {}
        () = shutdown => {}
    }
    state.shut_down();
    // Connections that are still open after the timeout are dropped with the set.
    let _ = timeout(SHUTDOWN_TIMEOUT, async { while connections.join_next().await.is_some() {} }).await;
}

async fn serve_connection(
    state: Arc<AppState>,
    router: Router,
    stream: TcpStream,
    peer: PeerAddr,
    _slot: OwnedSemaphorePermit,
) {
    let service = TowerToHyperService::new(router.layer(Extension(peer)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEADER_BYTES)
        .max_buf_size(MAX_HEADER_BYTES * 4)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = sleep(CONNECTION_LIFETIME) => return,
        () = state.shutdown_started() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(peer = %peer.0, %error, "connection failed");
    }
}
