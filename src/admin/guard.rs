//! The checks that every request passes before its handler: host, origin, size and time. And the security headers of every response,
//! errors included.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::time::timeout;

use super::http::HttpError;
use super::state::AppState;

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

/// The middleware.
pub(super) async fn guard(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
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
