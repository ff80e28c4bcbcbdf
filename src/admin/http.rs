//! HTTP building blocks: error responses, HTML responses, form fields, cookies and the client's address.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use askama::Template;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use percent_encoding::percent_decode_str;

/// The most fields of a form or query.
const MAX_FIELDS: usize = 32;

/// The address of the client at the other end of the connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct PeerAddr(pub SocketAddr);

/// The response in place of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HttpError {
    /// An error page with this status and message.
    Status(StatusCode, &'static str),
    /// A redirect to the login page.
    LoginRequired,
}

impl HttpError {
    pub const INVALID_FORM: Self = Self::Status(StatusCode::BAD_REQUEST, "The form is not valid.");
    pub const CSRF: Self =
        Self::Status(StatusCode::FORBIDDEN, "The form does not belong to this session. Reload the page and try again.");
    pub const PAGE_NOT_FOUND: Self = Self::Status(StatusCode::NOT_FOUND, "Page not found.");
    pub const RANDOMNESS: Self =
        Self::Status(StatusCode::INTERNAL_SERVER_ERROR, "The system's random number generator failed.");
}

#[derive(Template)]
#[template(path = "error.html")]
struct ErrorPage<'a> {
    status: StatusCode,
    message: &'a str,
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        match self {
            HttpError::Status(status, message) => render_page(status, &ErrorPage { status, message }),
            HttpError::LoginRequired => Redirect::to("/login").into_response(),
        }
    }
}

/// The response with a whole page.
pub(super) fn render_page(status: StatusCode, page: &impl Template) -> Response {
    match page.render() {
        Ok(text) => (status, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// The value of a cookie in a request. None if the request has it twice: another site may have planted the second.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let headers = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut values =
        headers.flat_map(|text| text.split(';')).filter_map(|pair| pair.trim().strip_prefix(name)?.strip_prefix('='));
    values.next().filter(|_| values.next().is_none())
}

/// The fields of a form or query, parsed strictly: each at most once, and valid UTF-8.
#[derive(Debug, Default)]
pub(super) struct FormFields(BTreeMap<String, String>);

/// Not a form, too many fields, or a repeated field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InvalidForm;

impl From<InvalidForm> for HttpError {
    fn from(_: InvalidForm) -> Self {
        HttpError::INVALID_FORM
    }
}

impl FormFields {
    /// Parses `name=value&name=value` (application/x-www-form-urlencoded).
    pub fn parse(text: &[u8]) -> Result<Self, InvalidForm> {
        let text = std::str::from_utf8(text).map_err(|_| InvalidForm)?;
        let mut fields = BTreeMap::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if fields.len() >= MAX_FIELDS || fields.insert(decode(name)?, decode(value)?).is_some() {
                return Err(InvalidForm);
            }
        }
        Ok(Self(fields))
    }

    /// Parses the query of a URL. An invalid query counts as empty.
    pub fn from_query(query: Option<&str>) -> Self {
        Self::parse(query.unwrap_or_default().as_bytes()).unwrap_or_default()
    }

    /// The value of a field; empty if the field is missing.
    pub fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }
}

fn decode(text: &str) -> Result<String, InvalidForm> {
    let text = text.replace('+', " ");
    percent_decode_str(&text).decode_utf8().map(|text| text.into_owned()).map_err(|_| InvalidForm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n20_parses_form_fields() {
        let fields = FormFields::parse(b"a=1+2&b=%C3%A4%26&c&d=x=y&").unwrap();
        let values: Vec<&str> = ["a", "b", "c", "d", "e"].iter().map(|name| fields.get(name)).collect();
        assert_eq!(values, ["1 2", "\u{e4}&", "", "x=y", ""]);
    }

    #[test]
    fn n20_rejects_ambiguous_forms() {
        let many: Vec<u8> = (0..=MAX_FIELDS).flat_map(|n| format!("f{n}=1&").into_bytes()).collect();
        for bad in [&b"a=1&a=2"[..], b"a=%ff", b"\xff=1", b"a=%C3", &many] {
            assert_eq!(FormFields::parse(bad).unwrap_err(), InvalidForm);
        }
    }

    #[test]
    fn n20_ignores_duplicate_cookies() {
        let headers = |text: &'static str| HeaderMap::from_iter([(header::COOKIE, text.parse().unwrap())]);
        assert_eq!(cookie(&headers("a=1; nanite=xyz; b=2"), "nanite"), Some("xyz"));
        assert_eq!(cookie(&headers("nanite2=xyz"), "nanite"), None);
        assert_eq!(cookie(&headers("nanite=x; nanite=y"), "nanite"), None);
    }
}
