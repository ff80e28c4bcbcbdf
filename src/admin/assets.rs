//! The style, the script and the icon: in the program itself, no other file is served.

use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::page::Refusal;

/// Name, type, content.
const ASSETS: [(&str, &str, &str); 3] = [
    ("tower.css", "text/css; charset=utf-8", include_str!("assets/tower.css")),
    ("tower.js", "text/javascript; charset=utf-8", include_str!("assets/tower.js")),
    ("icon.svg", "image/svg+xml", include_str!("assets/icon.svg")),
];

/// Nothing stands at that address.
pub(super) const NO_PAGE: Refusal = Refusal::Because(StatusCode::NOT_FOUND, "There is no such page.");

/// `GET /assets/NAME`.
pub(super) async fn get(Path(name): Path<String>) -> Response {
    match ASSETS.iter().find(|(asset, ..)| *asset == name) {
        Some((_, kind, content)) => ([(header::CONTENT_TYPE, *kind)], *content).into_response(),
        None => NO_PAGE.into_response(),
    }
}
