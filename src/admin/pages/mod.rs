//! The pages. This file holds what they share: the frame around every page, fragments, and the check of submitted forms.

pub(super) mod agents;
pub(super) mod login;
pub(super) mod requests;

mod agent_table;

use askama::Template;

use super::http::{FormFields, HttpError};
use super::session::{CsrfToken, Session};
use super::state::AppState;

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
