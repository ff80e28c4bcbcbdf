//! The pages. This file holds what they share, the frame around every page, fragments, and the check of submitted forms; and the pages
//! without a session: login and logout.

pub(super) mod agents;
pub(super) mod requests;

mod agent_table;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use askama::Template;
use axum::body::Bytes;
use axum::extract::{Extension, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use zeroize::Zeroizing;

use super::access::{CsrfToken, LOGIN_COOKIE, SESSION_COOKIE, SESSION_LIFETIME, Session};
use super::forwarded;
use super::http::{FormFields, HttpError, PeerAddr, cookie, render_page};
use super::state::AppState;

/// How long a login page can be used.
const LOGIN_PAGE_LIFETIME: Duration = Duration::from_secs(3600);

const INVALID_COOKIE: HttpError =
    HttpError::Status(StatusCode::INTERNAL_SERVER_ERROR, "The cookie could not be created.");
const LOGIN_PAGE_EXPIRED: HttpError =
    HttpError::Status(StatusCode::FORBIDDEN, "The login page has expired. Reload it and try again.");
const PASSWORD_CHECK_FAILED: HttpError =
    HttpError::Status(StatusCode::INTERNAL_SERVER_ERROR, "The password could not be checked.");

/// The values of the frame around every page of a session.
struct Frame {
    /// The mapper's identity.
    mapper: String,
    csrf: CsrfToken,
    allow_requests: bool,
    /// The current entry of the navigation.
    section: &'static str,
    /// Seconds since the epoch.
    now: u64,
}

impl Frame {
    fn new(state: &AppState, session: &Session, section: &'static str) -> Self {
        Self {
            mapper: state.mapper.identity().to_string(),
            csrf: session.csrf.clone(),
            allow_requests: state.allow_requests,
            section,
            now: state.clock.now().as_secs(),
        }
    }
}

/// A part of a page, for its event stream.
fn render_fragment(fragment: &impl Template) -> String {
    fragment.render().unwrap_or_default()
}

/// The fields of a form of this session. Every handler of a form must start with this check.
fn parse_session_form(session: &Session, body: &[u8]) -> Result<FormFields, HttpError> {
    let fields = FormFields::parse(body)?;
    if session.csrf.verify(fields.get("csrf")) { Ok(fields) } else { Err(HttpError::CSRF) }
}

#[derive(Template)]
#[template(path = "login.html")]
struct LoginPage<'a> {
    csrf: &'a str,
    /// Whether the page asks for an invitation token, not for a password.
    uses_invitations: bool,
    error: Option<String>,
}

/// `GET /login`: the login page. With an invitation token in the query it logs in.
pub(super) async fn login_form(
    State(state): State<Arc<AppState>>,
    Extension(PeerAddr(peer)): Extension<PeerAddr>,
    headers: HeaderMap,
    session: Result<Session, HttpError>,
    RawQuery(query): RawQuery,
) -> Result<Response, HttpError> {
    if session.is_ok() {
        return Ok(Redirect::to("/").into_response());
    }
    let query = query.map(Zeroizing::new).unwrap_or_default();
    let fields = FormFields::from_query(Some(&*query));
    match fields.get("token") {
        "" => login_page(&state, StatusCode::OK, None),
        // Only for invitations: a password must not be in a URL.
        _ if !state.authenticator.uses_invitations() => login_page(&state, StatusCode::FORBIDDEN, None),
        token => {
            log_in(
                &state,
                forwarded::client(peer.ip(), &headers, &state.trusted_proxies),
                Zeroizing::new(token.to_owned()),
            )
            .await
        }
    }
}

/// `POST /login`: logs in with the password or an invitation token.
pub(super) async fn login_submit(
    State(state): State<Arc<AppState>>,
    Extension(PeerAddr(peer)): Extension<PeerAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, HttpError> {
    let fields = FormFields::parse(&body)?;
    // Double submit: the page's CSRF token is in its cookie and in its form. A form of another site has neither.
    let token = cookie(&headers, &state.origins.cookie_name(LOGIN_COOKIE)).filter(|token| !token.is_empty());
    if !token.is_some_and(|token| CsrfToken::from_cookie(token).verify(fields.get("csrf"))) {
        return Err(LOGIN_PAGE_EXPIRED);
    }
    let client = forwarded::client(peer.ip(), &headers, &state.trusted_proxies);
    log_in(&state, client, Zeroizing::new(fields.get("secret").to_owned())).await
}

async fn log_in(state: &AppState, client: IpAddr, secret: Zeroizing<String>) -> Result<Response, HttpError> {
    if let Err(wait) = state.login_attempts.check(client, state.clock.now()) {
        tracing::warn!(%client, "too many login attempts");
        let seconds = wait.as_secs() + 1;
        let error = format!("Too many attempts. Try again in {seconds} s.");
        let mut response = login_page(state, StatusCode::TOO_MANY_REQUESTS, Some(error))?;
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        return Ok(response);
    }
    match state.authenticator.verify(secret).await {
        Ok(true) => {}
        Ok(false) => {
            tracing::warn!(%client, "login failed: wrong password or token");
            let error = if state.authenticator.uses_invitations() {
                "Wrong token, or it was used already."
            } else {
                "Wrong password."
            };
            return login_page(state, StatusCode::FORBIDDEN, Some(error.to_owned()));
        }
        Err(error) => {
            tracing::error!(%error, "failed to check a password");
            return Err(PASSWORD_CHECK_FAILED);
        }
    }
    state.login_attempts.reset(client);
    let cookie = state.sessions.create(state.clock.now()).map_err(|_| HttpError::RANDOMNESS)?;
    tracing::info!(%client, "logged in");
    with_cookie(state, SESSION_COOKIE, &cookie, SESSION_LIFETIME, Redirect::to("/").into_response())
}

fn login_page(state: &AppState, status: StatusCode, error: Option<String>) -> Result<Response, HttpError> {
    let csrf = CsrfToken::random().map_err(|_| HttpError::RANDOMNESS)?;
    let uses_invitations = state.authenticator.uses_invitations();
    let page = LoginPage { csrf: csrf.as_str(), uses_invitations, error };
    with_cookie(state, LOGIN_COOKIE, csrf.as_str(), LOGIN_PAGE_LIFETIME, render_page(status, &page))
}

/// `POST /logout`: ends the session.
pub(super) async fn logout(
    State(state): State<Arc<AppState>>,
    session: Session,
    body: Bytes,
) -> Result<Response, HttpError> {
    parse_session_form(&session, &body)?;
    state.sessions.remove(&session, state.clock.now());
    with_cookie(&state, SESSION_COOKIE, "", Duration::ZERO, Redirect::to("/login").into_response())
}

fn with_cookie(
    state: &AppState,
    name: &str,
    value: &str,
    max_age: Duration,
    mut response: Response,
) -> Result<Response, HttpError> {
    let cookie = state.origins.set_cookie(name, value, max_age);
    let mut cookie = HeaderValue::from_str(&cookie).map_err(|_| INVALID_COOKIE)?;
    cookie.set_sensitive(true);
    response.headers_mut().append(header::SET_COOKIE, cookie);
    Ok(response)
}
