//! Keeping open pages up to date by server-sent events: how many and how long, and sending only what has changed.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::future::Future;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, timeout};

use super::page::Refusal;
use super::router::{Tower, stopped};
use super::session::Session;

/// How many pages are kept up to date at a time.
pub(super) const PAGES: usize = 32;
/// How long one connection is used for it; the browser opens another then.
const LASTS: Duration = Duration::from_secs(600);
/// After how long something is sent when nothing has changed: so it is noticed when the browser has gone.
const QUIET: Duration = Duration::from_secs(15);

const FULL: Refusal = Refusal::Because(StatusCode::SERVICE_UNAVAILABLE, "Too many pages are open.");

/// A page that is kept up to date.
#[derive(Debug)]
pub(super) struct Live {
    pub tower: Arc<Tower>,
    session: Session,
    stopping: watch::Receiver<bool>,
    until: Instant,
    spoke: Instant,
    _slot: OwnedSemaphorePermit,
}

impl Live {
    /// Begins; refused when too many pages are open.
    pub fn open(tower: &Arc<Tower>, session: Session) -> Result<Self, Refusal> {
        let slot = tower.live.clone().try_acquire_owned().map_err(|_| FULL)?;
        let now = Instant::now();
        let stopping = tower.stopping.subscribe();
        Ok(Self { tower: tower.clone(), session, stopping, until: now + LASTS, spoke: now, _slot: slot })
    }

    /// Waits until something has changed, or for so long that something has to be sent anyway. False when the page is no longer
    /// kept up to date: its time is over, the session has ended, or all stops.
    pub async fn wait(&mut self, changed: impl Future<Output = ()>) -> bool {
        tokio::select! {
            _ = timeout(QUIET, changed) => {}
            () = stopped(&mut self.stopping) => return false,
        }
        Instant::now() < self.until && self.tower.sessions.lasts(&self.session, self.tower.clock.now())
    }

    /// The event for this message; none when there is nothing to say yet.
    pub fn event(&mut self, message: &Message) -> Option<Event> {
        let now = Instant::now();
        let event = if !message.is_empty() {
            Event::default().data(serde_json::to_string(message).unwrap_or_default())
        } else if now.duration_since(self.spoke) >= QUIET {
            Event::default().comment("")
        } else {
            return None;
        };
        self.spoke = now;
        Some(event)
    }
}

/// The answer that is a stream of events.
pub(super) fn events(stream: impl Stream<Item = Event> + Send + 'static) -> Response {
    use futures_util::StreamExt;
    Sse::new(stream.map(Ok::<_, Infallible>)).into_response()
}

/// What an open page is told.
#[derive(Debug, Default, Serialize)]
pub(super) struct Message {
    /// Seconds since the epoch.
    now: u64,
    /// New contents of elements, by their ids.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    parts: BTreeMap<&'static str, String>,
    /// The rows of the table in their order, each with its new content where that has changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    rows: Option<Vec<(String, Option<String>)>>,
    /// What is put at the end of the list, with its number.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    append: Vec<(usize, String)>,
    /// Nothing comes after this.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    done: bool,
}

impl Message {
    fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.rows.is_none() && self.append.is_empty() && !self.done
    }
}

/// What an open page has, to tell it only what is new.
#[derive(Debug, Default)]
pub(super) struct Told {
    parts: HashMap<&'static str, u64>,
    /// None before the first message: the page may have rows that are gone.
    rows: Option<Vec<(String, u64)>>,
}

impl Told {
    /// Begins a message.
    pub fn message(now: u64) -> Message {
        Message { now, ..Message::default() }
    }

    /// The content of an element.
    pub fn part(&mut self, message: &mut Message, id: &'static str, content: String) {
        let hash = hash(&content);
        if self.parts.insert(id, hash) != Some(hash) {
            message.parts.insert(id, content);
        }
    }

    /// The rows of the table, by their ids.
    pub fn rows(&mut self, message: &mut Message, rows: Vec<(String, String)>) {
        let before = self.rows.take();
        let known: HashMap<&str, u64> = before.iter().flatten().map(|(id, content)| (id.as_str(), *content)).collect();
        let now: Vec<(String, u64)> = rows.iter().map(|(id, content)| (id.clone(), hash(content))).collect();
        if before.as_ref() != Some(&now) {
            let changed = rows.into_iter().zip(&now).map(|((id, content), (_, hash))| {
                let new = known.get(id.as_str()) != Some(hash);
                (id, new.then_some(content))
            });
            message.rows = Some(changed.collect());
        }
        self.rows = Some(now);
    }

    /// Something at the end of the list.
    pub fn append(message: &mut Message, number: usize, content: String) {
        message.append.push((number, content));
    }

    /// Nothing comes after this message.
    pub fn done(message: &mut Message) {
        message.done = true;
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, content: &str) -> (String, String) {
        (id.to_owned(), content.to_owned())
    }

    #[test]
    fn n20_an_open_page_is_told_what_is_new() {
        let mut told = Told::default();
        let mut say = |part: &str, rows: &[(&str, &str)]| {
            let mut message = Told::message(7);
            told.part(&mut message, "tiles", part.to_owned());
            told.rows(&mut message, rows.iter().map(|(id, content)| row(id, content)).collect());
            serde_json::to_string(&message).unwrap()
        };
        assert_eq!(
            say("1", &[("a", "x"), ("b", "y")]),
            r#"{"now":7,"parts":{"tiles":"1"},"rows":[["a","x"],["b","y"]]}"#
        );
        assert_eq!(say("1", &[("a", "x"), ("b", "y")]), r#"{"now":7}"#);
        assert_eq!(say("1", &[("a", "x"), ("b", "z")]), r#"{"now":7,"rows":[["a",null],["b","z"]]}"#);
        assert_eq!(say("1", &[("b", "z"), ("a", "x")]), r#"{"now":7,"rows":[["b",null],["a",null]]}"#);
        assert_eq!(say("2", &[("b", "z")]), r#"{"now":7,"parts":{"tiles":"2"},"rows":[["b",null]]}"#);
        assert_eq!(say("2", &[]), r#"{"now":7,"rows":[]}"#);
        assert_eq!(say("2", &[]), r#"{"now":7}"#);

        let mut message = Told::message(7);
        Told::default().rows(&mut message, Vec::new());
        assert_eq!(message.rows, Some(Vec::new()), "the page may show agents that are gone by now");
    }
}
