//! Logging in and out.

use std::sync::Arc;

use askama::Template;
use axum::body::Bytes;
use axum::extract::{Extension, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use zeroize::Zeroizing;

use super::form::Fields;
use super::guard::{LOGIN, SESSION};
use super::page::{self, Refusal};
use super::router::Tower;
use super::secret::{Digest, random};
use super::server::Peer;
use super::session::{self, Session};

const NO_COOKIE: Refusal = Refusal::Because(StatusCode::INTERNAL_SERVER_ERROR, "The cookie could not be made.");

/// How long a login page can be used.
const PAGE_LASTS: std::time::Duration = std::time::Duration::from_secs(3600);

#[derive(Template)]
#[template(path = "login.html")]
struct LoginPage<'a> {
    csrf: &'a str,
    /// Whether a token is asked for, and no password.
    by_token: bool,
    wrong: Option<String>,
}

/// `GET /login`: the form; with the token of an invitation it lets in at once.
pub(super) async fn form(
    State(tower): State<Arc<Tower>>,
    Extension(peer): Extension<Peer>,
    session: Result<Session, Refusal>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    if session.is_ok() {
        return Ok(Redirect::to("/").into_response());
    }
    let query = query.map(Zeroizing::new).unwrap_or_default();
    let fields = Fields::read(query.as_bytes()).unwrap_or_default();
    match fields.text("token") {
        "" => show(&tower, StatusCode::OK, None),
        // A link is for invitations alone: a password does not belong into an address.
        _ if !tower.door.takes_invitations() => show(&tower, StatusCode::FORBIDDEN, None),
        token => enter(&tower, peer, Zeroizing::new(token.to_owned())).await,
    }
}

/// `POST /login`: lets in whoever gives the password, or the token of an invitation.
pub(super) async fn submit(
    State(tower): State<Arc<Tower>>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refusal> {
    let fields = Fields::read(&body).map_err(|_| page::UNREADABLE)?;
    // The page's secret stands in its cookie and in its form: another site's form has neither.
    let cookie = session::cookie(&headers, &tower.origins.cookie(LOGIN));
    if !cookie.is_some_and(|cookie| !cookie.is_empty() && Digest::of(cookie).is_of(fields.text("csrf"))) {
        return Err(Refusal::Because(StatusCode::FORBIDDEN, "The login page is too old: load it again."));
    }
    enter(&tower, peer, Zeroizing::new(fields.text("secret").to_owned())).await
}

async fn enter(tower: &Tower, peer: Peer, secret: Zeroizing<String>) -> Result<Response, Refusal> {
    if let Err(wait) = tower.attempts.try_now(peer.0.ip(), tower.clock.now()) {
        tracing::warn!(peer = %peer.0, "too many attempts to log in");
        let seconds = wait.as_secs() + 1;
        let wrong = format!("Too many attempts: wait {seconds} s.");
        let mut response = show(tower, StatusCode::TOO_MANY_REQUESTS, Some(wrong))?;
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        return Ok(response);
    }
    match tower.door.opens(secret).await {
        Ok(true) => {}
        Ok(false) => {
            tracing::warn!(peer = %peer.0, "a wrong password or token");
            let what = if tower.door.takes_invitations() { "token, or one that was used" } else { "password" };
            return show(tower, StatusCode::FORBIDDEN, Some(format!("Wrong {what}.")));
        }
        Err(error) => {
            tracing::error!(%error, "a password was not checked");
            return Err(Refusal::Because(StatusCode::INTERNAL_SERVER_ERROR, "The password could not be checked."));
        }
    }
    tower.attempts.succeeded(peer.0.ip());
    let cookie = tower.sessions.begin(tower.clock.now()).map_err(|_| page::NO_RANDOMNESS)?;
    tracing::info!(peer = %peer.0, "logged in");
    with_cookie(tower, SESSION, &cookie, session::LASTS, Redirect::to("/").into_response())
}

fn show(tower: &Tower, status: StatusCode, wrong: Option<String>) -> Result<Response, Refusal> {
    let secret = random().map_err(|_| page::NO_RANDOMNESS)?;
    let page = LoginPage { csrf: &secret, by_token: tower.door.takes_invitations(), wrong };
    with_cookie(tower, LOGIN, &secret, PAGE_LASTS, page::html(status, &page))
}

/// `POST /logout`: ends the session.
pub(super) async fn logout(
    State(tower): State<Arc<Tower>>,
    session: Session,
    body: Bytes,
) -> Result<Response, Refusal> {
    page::fields_of(&session, &body)?;
    tower.sessions.end(&session, tower.clock.now());
    with_cookie(&tower, SESSION, "", std::time::Duration::ZERO, Redirect::to("/login").into_response())
}

fn with_cookie(
    tower: &Tower,
    name: &str,
    value: &str,
    lasts: std::time::Duration,
    mut response: Response,
) -> Result<Response, Refusal> {
    let text = tower.origins.set_cookie(name, value, lasts);
    let mut cookie = HeaderValue::from_str(&text).map_err(|_| NO_COOKIE)?;
    cookie.set_sensitive(true);
    response.headers_mut().append(header::SET_COOKIE, cookie);
    Ok(response)
}
