//! What every request passes, whatever it asks for: the name it comes under, where a form comes from, how much it brings and how
//! long that takes. And what every answer carries, refusals included.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::page::Refusal;
use super::router::Tower;

/// The largest form, in bytes as sent.
pub(super) const MAX_FORM: usize = 1 << 20;
/// How long a form may take to arrive.
const FORM_TIME: Duration = Duration::from_secs(15);
/// The longest path with its query, in bytes.
const MAX_TARGET: usize = 4096;

/// The cookie of a session, and that of a login page.
pub(super) const SESSION: &str = "nanite";
pub(super) const LOGIN: &str = "nanite-login";

/// What every answer carries. Pages load nothing but our own style and script, run nothing else, and stand in nobody's frame;
/// a script of ours makes elements from text only through the one policy that it names. Nothing is kept by caches.
const HEADERS: [(HeaderName, &str); 8] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; \
         base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types nanite",
    ),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    // Not 'no-referrer': browsers would hide the Origin of our own forms, too.
    (header::REFERRER_POLICY, "same-origin"),
    (header::CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("permissions-policy"), "camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
];

/// Stands before every handler.
pub(super) async fn guard(State(tower): State<Arc<Tower>>, request: Request, next: Next) -> Response {
    let mut response = match admit(&tower, request).await {
        Ok(request) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

async fn admit(tower: &Tower, request: Request) -> Result<Request, Refusal> {
    let refused = |status, why| Err(Refusal::Because(status, why));
    let headers = request.headers();
    if request.uri().host().is_some() || !only(headers, header::HOST).is_some_and(|host| tower.origins.is_ours(host)) {
        return refused(StatusCode::MISDIRECTED_REQUEST, "This is not the host that was asked for.");
    }
    if request.uri().path_and_query().is_some_and(|target| target.as_str().len() > MAX_TARGET) {
        return refused(StatusCode::URI_TOO_LONG, "The address is too long.");
    }
    if request.method() == Method::GET || request.method() == Method::HEAD {
        return Ok(request);
    }
    if request.method() != Method::POST {
        return refused(StatusCode::METHOD_NOT_ALLOWED, "Only GET and POST are known here.");
    }
    if !is_from_our_page(tower, headers) {
        return refused(StatusCode::FORBIDDEN, "The form is not one of these pages.");
    }
    let is_form = only(headers, header::CONTENT_TYPE)
        .is_some_and(|kind| kind.split(';').next().unwrap_or_default().trim() == "application/x-www-form-urlencoded");
    if !is_form {
        return refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Only forms are taken.");
    }
    let (parts, body) = request.into_parts();
    match tokio::time::timeout(FORM_TIME, to_bytes(body, MAX_FORM)).await {
        Ok(Ok(bytes)) => Ok(Request::from_parts(parts, Body::from(bytes))),
        Ok(Err(_)) => refused(StatusCode::PAYLOAD_TOO_LARGE, "The form is too large: at most 1 MiB."),
        Err(_) => refused(StatusCode::REQUEST_TIMEOUT, "The form took too long to arrive."),
    }
}

/// Where a browser says where a form comes from, it has to be a page of ours. The secret in the form is checked beside this.
fn is_from_our_page(tower: &Tower, headers: &HeaderMap) -> bool {
    let ours = |origin: &HeaderValue| origin.to_str().is_ok_and(|origin| tower.origins.is_our_page(origin));
    headers.get_all(header::ORIGIN).iter().all(ours)
        && headers.get_all("sec-fetch-site").iter().all(|site| site == "same-origin")
}

/// The value of a header that stands there once.
fn only(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut all = headers.get_all(name).iter();
    let first = all.next().and_then(|value| value.to_str().ok());
    first.filter(|_| all.next().is_none())
}

/// The answer to whoever is not logged in: a page leads to the login, everything else is refused.
pub(super) fn login_first(parts: &Parts) -> Refusal {
    let wants_events = parts.headers.get(header::ACCEPT).is_some_and(|accept| accept == "text/event-stream");
    if parts.method == Method::GET && !wants_events {
        return Refusal::LogIn;
    }
    Refusal::Because(StatusCode::UNAUTHORIZED, "Log in first.")
}
