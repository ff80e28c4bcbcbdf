//! The server: routes, static assets and connections, with limits on their number, size and time. Every request passes the guard before
//! its handler: a check of host, origin, size and time. The guard sets the security headers of every response, errors included.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
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

use super::http::{HttpError, PeerAddr};
use super::pages::{agents, login_form, login_submit, logout, requests};
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

/// The largest encoded form. The error message names it too.
const MAX_FORM_BYTES: usize = 1 << 20;
const FORM_READ_TIMEOUT: Duration = Duration::from_secs(15);
/// The longest path with its query.
const MAX_TARGET_BYTES: usize = 4096;

/// The headers of every response. Pages load only our own style sheet, script and images, run no other script, and cannot be framed.
/// Our script creates elements from text only through one named policy (Trusted Types). Caches store nothing.
const SECURITY_HEADERS: [(HeaderName, &str); 8] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; \
         base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types nanite",
    ),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    // Not 'no-referrer': browsers would then send `Origin: null` with our own forms.
    (header::REFERRER_POLICY, "same-origin"),
    (header::CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("permissions-policy"), "camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
];

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
        .route("/login", get(login_form).post(login_submit))
        .route("/logout", post(logout))
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

/// The middleware.
async fn guard(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let mut response = match check(&state, request).await {
        Ok(request) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    for (name, value) in SECURITY_HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Checks a request and reads its form.
async fn check(state: &AppState, request: Request) -> Result<Request, HttpError> {
    let reject = |status, message| Err(HttpError::Status(status, message));
    let headers = request.headers();
    let has_our_host = single_header(headers, header::HOST).is_some_and(|host| state.origins.allows_host(host));
    if request.uri().host().is_some() || !has_our_host {
        return reject(StatusCode::MISDIRECTED_REQUEST, "This server does not serve the requested host.");
    }
    if request.uri().path_and_query().is_some_and(|target| target.as_str().len() > MAX_TARGET_BYTES) {
        return reject(StatusCode::URI_TOO_LONG, "The URL is too long.");
    }
    if request.method() == Method::GET || request.method() == Method::HEAD {
        return Ok(request);
    }
    if request.method() != Method::POST {
        return reject(StatusCode::METHOD_NOT_ALLOWED, "Only GET and POST are supported.");
    }
    if !is_same_origin(state, headers) {
        return reject(StatusCode::FORBIDDEN, "The form was not sent from one of these pages.");
    }
    let is_form = single_header(headers, header::CONTENT_TYPE)
        .is_some_and(|kind| kind.split(';').next().unwrap_or_default().trim() == "application/x-www-form-urlencoded");
    if !is_form {
        return reject(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Only forms are accepted.");
    }
    let (parts, body) = request.into_parts();
    match timeout(FORM_READ_TIMEOUT, to_bytes(body, MAX_FORM_BYTES)).await {
        Ok(Ok(bytes)) => Ok(Request::from_parts(parts, Body::from(bytes))),
        Ok(Err(_)) => reject(StatusCode::PAYLOAD_TOO_LARGE, "The form is too large: at most 1 MiB is accepted."),
        Err(_) => reject(StatusCode::REQUEST_TIMEOUT, "The form took too long to arrive."),
    }
}

/// Whether the browser reports one of our own pages as the origin, if it reports one. Handlers check the CSRF token in addition.
fn is_same_origin(state: &AppState, headers: &HeaderMap) -> bool {
    let is_ours = |origin: &HeaderValue| origin.to_str().is_ok_and(|origin| state.origins.allows_origin(origin));
    headers.get_all(header::ORIGIN).iter().all(is_ours)
        && headers.get_all("sec-fetch-site").iter().all(|site| site == "same-origin")
}

/// The value of a header that occurs exactly once.
fn single_header(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    let first = values.next().and_then(|value| value.to_str().ok());
    first.filter(|_| values.next().is_none())
}
