//! Live updates of open pages by server-sent events. A stream sends only what has changed, and its number and lifetime are bounded.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, timeout};

use super::access::Session;
use super::http::HttpError;
use super::state::AppState;

/// How long a stream lasts; then the browser opens another.
const STREAM_LIFETIME: Duration = Duration::from_secs(600);
/// After this time without an event, the stream sends an empty comment, to notice when the browser has gone.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);

const TOO_MANY_STREAMS: HttpError = HttpError::Status(StatusCode::SERVICE_UNAVAILABLE, "Too many pages are open.");

/// The response with a stream of updates. `render` puts the page's content into a [`PageUpdate`] for each new value of `source`; the
/// stream sends what differs from the content before. It ends with the session, with the shutdown, or when the page is complete.
pub(super) fn event_stream<T, R>(
    state: &Arc<AppState>,
    session: Session,
    source: watch::Receiver<T>,
    render: R,
) -> Result<Response, HttpError>
where
    T: Clone + Send + Sync + 'static,
    R: FnMut(&AppState, T, &mut PageUpdate) + Send + 'static,
{
    let slot = state.event_stream_slots.clone().try_acquire_owned().map_err(|_| TOO_MANY_STREAMS)?;
    let now = Instant::now();
    let stream = EventStream {
        state: state.clone(),
        session,
        source,
        render,
        update: PageUpdate::default(),
        ends_at: now + STREAM_LIFETIME,
        last_sent: now,
        _slot: slot,
    };
    let events = unfold(Some(stream), async |stream| {
        let mut stream = stream?;
        let event = stream.next_event().await?;
        let rest = (!stream.update.is_complete).then_some(stream);
        Some((Ok::<_, Infallible>(event), rest))
    });
    Ok(Sse::new(events).into_response())
}

struct EventStream<T, R> {
    state: Arc<AppState>,
    session: Session,
    source: watch::Receiver<T>,
    render: R,
    update: PageUpdate,
    ends_at: Instant,
    last_sent: Instant,
    _slot: OwnedSemaphorePermit,
}

impl<T: Clone, R: FnMut(&AppState, T, &mut PageUpdate)> EventStream<T, R> {
    /// Waits for the next event. None at the end of the stream.
    async fn next_event(&mut self) -> Option<Event> {
        loop {
            let value = self.source.borrow_and_update().clone();
            (self.render)(&self.state, value, &mut self.update);
            if let Some(event) = self.event() {
                self.last_sent = Instant::now();
                return Some(event);
            }
            tokio::select! {
                // The source's sender outlives the stream, which holds the state. A timeout lets the loop check everything again.
                _ = timeout(KEEP_ALIVE_INTERVAL, self.source.changed()) => {}
                () = self.state.shutdown_started() => return None,
            }
            let is_valid = self.state.sessions.is_valid(&self.session, self.state.clock.now());
            if !is_valid || Instant::now() >= self.ends_at {
                return None;
            }
        }
    }

    /// The event to send now, if any.
    fn event(&mut self) -> Option<Event> {
        let message = self.update.take_message(self.state.clock.now().as_secs());
        if !message.is_empty() {
            Some(Event::default().data(serde_json::to_string(&message).unwrap_or_default()))
        } else if self.last_sent.elapsed() >= KEEP_ALIVE_INTERVAL {
            Some(Event::default().comment(""))
        } else {
            None
        }
    }
}

/// The content of a page: what was sent before, and what has changed since.
#[derive(Debug, Default)]
pub(super) struct PageUpdate {
    /// Hashes of the contents of elements that were sent.
    parts: HashMap<&'static str, u64>,
    /// Ids and hashes of the table's rows that were sent. None at first: the page may show rows that are gone.
    rows: Option<Vec<(String, u64)>>,
    is_complete: bool,
    /// What has changed.
    message: Message,
}

/// The data of an event.
#[derive(Debug, Default, Serialize)]
struct Message {
    /// Seconds since the epoch.
    now: u64,
    /// New contents of elements, by their ids.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    parts: BTreeMap<&'static str, String>,
    /// All rows of the table in their order, with their content where it has changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    rows: Option<Vec<(String, Option<String>)>>,
    /// New items at the end of the list, with their indexes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    append: Vec<(usize, String)>,
    /// Whether this is the last message.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    done: bool,
}

impl Message {
    fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.rows.is_none() && self.append.is_empty() && !self.done
    }
}

impl PageUpdate {
    /// Sets the content of an element.
    pub fn set_part(&mut self, id: &'static str, content: String) {
        let hash = hash(&content);
        if self.parts.insert(id, hash) != Some(hash) {
            self.message.parts.insert(id, content);
        }
    }

    /// Sets the rows of the table: their ids and contents.
    pub fn set_rows(&mut self, rows: Vec<(String, String)>) {
        let previous = self.rows.take();
        let current: Vec<(String, u64)> = rows.iter().map(|(id, content)| (id.clone(), hash(content))).collect();
        if previous.as_ref() != Some(&current) {
            let hashes: HashMap<&str, u64> = previous.iter().flatten().map(|(id, hash)| (id.as_str(), *hash)).collect();
            let changed = rows.into_iter().zip(&current).map(|((id, content), (_, hash))| {
                let is_new = hashes.get(id.as_str()) != Some(hash);
                (id, is_new.then_some(content))
            });
            self.message.rows = Some(changed.collect());
        }
        self.rows = Some(current);
    }

    /// Adds an item to the end of the list.
    pub fn append(&mut self, index: usize, content: String) {
        self.message.append.push((index, content));
    }

    /// Ends the stream after this update.
    pub fn complete(&mut self) {
        self.is_complete = true;
        self.message.done = true;
    }

    fn take_message(&mut self, now: u64) -> Message {
        Message { now, ..std::mem::take(&mut self.message) }
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

    #[test]
    fn n20_page_update_contains_only_changes() {
        let mut update = PageUpdate::default();
        let mut message = |part: &str, rows: &[(&str, &str)]| {
            update.set_part("tiles", part.to_owned());
            update.set_rows(rows.iter().map(|(id, content)| ((*id).to_owned(), (*content).to_owned())).collect());
            serde_json::to_string(&update.take_message(7)).unwrap()
        };
        assert_eq!(
            message("1", &[("a", "x"), ("b", "y")]),
            r#"{"now":7,"parts":{"tiles":"1"},"rows":[["a","x"],["b","y"]]}"#
        );
        assert_eq!(message("1", &[("a", "x"), ("b", "y")]), r#"{"now":7}"#);
        assert_eq!(message("1", &[("a", "x"), ("b", "z")]), r#"{"now":7,"rows":[["a",null],["b","z"]]}"#);
        assert_eq!(message("1", &[("b", "z"), ("a", "x")]), r#"{"now":7,"rows":[["b",null],["a",null]]}"#);
        assert_eq!(message("2", &[("b", "z")]), r#"{"now":7,"parts":{"tiles":"2"},"rows":[["b",null]]}"#);
        assert_eq!(message("2", &[]), r#"{"now":7,"rows":[]}"#);
        assert_eq!(message("2", &[]), r#"{"now":7}"#);

        let mut update = PageUpdate::default();
        update.set_rows(Vec::new());
        assert_eq!(update.take_message(7).rows, Some(Vec::new()), "the page may show agents that are gone by now");
    }
}
