//! What all pages share: the frame around them, forms that carry the session's secret, and pages that say what went wrong.

use askama::Template;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};

use super::form::Fields;
use super::router::Tower;
use super::session::Session;

/// What a tower that only shows says of a request.
pub(super) const READ_ONLY: &str = "This Control Tower only shows. To send requests, start it with --allow-requests.";

/// What stands around every page.
pub(super) struct Frame {
    /// The mapper's name.
    pub mapper: String,
    /// What forms carry.
    pub csrf: String,
    pub allow_requests: bool,
    /// Which part of the pages this is.
    pub section: &'static str,
    /// Seconds since the epoch.
    pub now: u64,
}

impl Frame {
    pub fn of(tower: &Tower, session: &Session, section: &'static str) -> Self {
        Self {
            mapper: tower.mapper.identity().to_string(),
            csrf: session.csrf.to_string(),
            allow_requests: tower.allow_requests,
            section,
            now: tower.clock.now().as_secs(),
        }
    }
}

#[derive(Template)]
#[template(path = "problem.html")]
struct Problem<'a> {
    status: StatusCode,
    why: &'a str,
}

/// Why a page is not shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A page of its own says what went wrong.
    Because(StatusCode, &'static str),
    /// Whoever asks has to log in first.
    LogIn,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Refusal::Because(status, why) => html(status, &Problem { status, why }),
            Refusal::LogIn => Redirect::to("/login").into_response(),
        }
    }
}

/// A page.
pub(super) fn html(status: StatusCode, page: &impl Template) -> Response {
    match page.render() {
        Ok(text) => (status, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// A piece of a page, for a page that is open already.
pub(super) fn piece(piece: &impl Template) -> String {
    piece.render().unwrap_or_default()
}

/// The fields of a form of this session; every handler of a form begins with it.
pub(super) fn fields_of(session: &Session, body: &[u8]) -> Result<Fields, Refusal> {
    let fields = Fields::read(body).map_err(|_| UNREADABLE)?;
    if session.wrote(fields.text("csrf")) { Ok(fields) } else { Err(FOREIGN) }
}

/// What is no form.
pub(super) const UNREADABLE: Refusal = Refusal::Because(StatusCode::BAD_REQUEST, "The form cannot be read.");
const FOREIGN: Refusal =
    Refusal::Because(StatusCode::FORBIDDEN, "The form is not one of this session: load the page again.");
/// The system's random generator failed.
pub(super) const NO_RANDOMNESS: Refusal =
    Refusal::Because(StatusCode::INTERNAL_SERVER_ERROR, "The system's random generator failed.");
