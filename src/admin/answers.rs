//! The pages of requests: all of them, and each with its answers as they come; as whole pages and as events for open ones.

use std::sync::Arc;

use askama::Template;
use askama::filters::HtmlSafe;
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};
use futures_util::stream::unfold;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::ask::describe;
use super::form::Fields;
use super::live::{self, Live, Told};
use super::page::{self, Frame, Refusal};
use super::router::Tower;
use super::runs::{Asked, Entry, Phase, Run, Tally, What};
use super::session::Session;
use super::text::{Value, When, counted, visible};
use crate::packet::{Identity, Tag};

/// The longest address of a form with something in it, in bytes; the guard takes a little more.
const MAX_AGAIN: usize = 3500;

/// Something that came, as it is shown.
#[derive(Template)]
#[template(path = "entry.html")]
struct Shown<'a> {
    number: usize,
    after: String,
    name: &'a str,
    what: &'a What,
    value: &'a Value,
}

impl HtmlSafe for Shown<'_> {}

impl<'a> Shown<'a> {
    fn of(number: usize, entry: &'a Entry) -> Self {
        let millis = entry.after.as_micros() as f64 / 1000.0;
        let after = if millis < 1000.0 { format!("{millis:.1} ms") } else { format!("{:.2} s", millis / 1000.0) };
        Self { number, after, name: entry.from.name(), what: &entry.what, value: &entry.value }
    }
}

/// How far a request is, in words.
#[derive(Template)]
#[template(path = "tally.html")]
struct Progress {
    word: &'static str,
    /// For the style: running, good or bad.
    mood: &'static str,
    text: String,
    problem: Option<String>,
    left_out: u64,
}

impl HtmlSafe for Progress {}

impl Progress {
    fn of(tally: &Tally) -> Self {
        let Tally { phase, answered, failed, parts, left_out } = tally;
        let (word, mood) = match phase {
            Phase::Running => ("Running", "running"),
            Phase::Ended if *failed == 0 => ("Answered", "good"),
            Phase::Ended => ("Ended with failures", "bad"),
            Phase::Failed(_) => ("Not sent", "bad"),
            Phase::Stopped => ("Stopped", "bad"),
        };
        let mut text = format!("{}, {failed} failed", counted(*answered, "answer"));
        if *parts > 0 {
            text.push_str(&format!(", {}", counted(*parts, "intermediate result")));
        }
        let problem = if let Phase::Failed(why) = phase { Some(why.clone()) } else { None };
        Self { word, mood, text, problem, left_out: *left_out }
    }
}

/// What was asked.
struct Question {
    id: String,
    service: String,
    selector: &'static str,
    target: Option<String>,
    tags: Vec<String>,
    timeout: f64,
    at: When,
    payload: Value,
    /// The form again, with the same in it.
    again: String,
}

impl Question {
    fn of(run: &Run, tower: &Tower) -> Self {
        let asked = &run.asked;
        Self {
            id: run.id.to_string(),
            service: asked.service.to_string(),
            selector: describe(&asked.selector),
            target: asked.target.as_ref().map(|target| target.name().to_owned()),
            tags: asked.tags.iter().map(|tag| visible(tag.as_str()).into_owned()).collect(),
            timeout: asked.timeout.as_secs_f64(),
            at: When::new(run.at, tower.clock.now()),
            payload: Value::of(&asked.payload),
            again: again(asked),
        }
    }
}

/// The address of the form with the same in it; without what makes it too long for an address.
fn again(asked: &Asked) -> String {
    let encoded = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let tags: Vec<&str> = asked.tags.iter().map(Tag::as_str).collect();
    let payload = match &asked.payload.0 {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut address = format!(
        "/request?service={}&selector={}&target={}&timeout={}",
        encoded(asked.service.as_str()),
        asked.selector,
        asked.target.as_ref().map_or("", Identity::name),
        asked.timeout.as_secs_f64(),
    );
    for (name, text) in [("tags", tags.join("\n")), ("payload", payload)] {
        let text = encoded(&text);
        if address.len() + text.len() < MAX_AGAIN {
            address.push_str(&format!("&{name}={text}"));
        }
    }
    address
}

#[derive(Template)]
#[template(path = "run.html")]
struct RunPage<'a> {
    frame: Frame,
    question: Question,
    tally: Progress,
    running: bool,
    entries: Vec<Shown<'a>>,
}

#[derive(Template)]
#[template(path = "runs.html")]
struct RunsPage {
    frame: Frame,
    runs: Vec<(Question, Progress)>,
}

const UNKNOWN: Refusal =
    Refusal::Because(StatusCode::NOT_FOUND, "No such request is known; only the last ones are kept.");

/// `GET /requests`: the last requests.
pub(super) async fn all(State(tower): State<Arc<Tower>>, session: Session) -> Response {
    let runs = tower.runs.all();
    let runs = runs.iter().map(|run| (Question::of(run, &tower), Progress::of(&run.tally()))).collect();
    page::html(StatusCode::OK, &RunsPage { frame: Frame::of(&tower, &session, "requests"), runs })
}

/// `GET /requests/ID`: one request, with what has come by now.
pub(super) async fn one(
    State(tower): State<Arc<Tower>>,
    session: Session,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    let run = tower.runs.find(&id).ok_or(UNKNOWN)?;
    // Before the entries: what comes in between is shown, and the page is not taken for whole.
    let tally = run.tally();
    let entries = run.entries(0);
    let page = RunPage {
        frame: Frame::of(&tower, &session, "requests"),
        question: Question::of(&run, &tower),
        running: tally.phase == Phase::Running,
        tally: Progress::of(&tally),
        entries: entries.iter().enumerate().map(|(number, entry)| Shown::of(number, entry)).collect(),
    };
    Ok(page::html(StatusCode::OK, &page))
}

/// `GET /requests/ID/events?from=N`: what comes, from the entry with this number on.
pub(super) async fn one_events(
    State(tower): State<Arc<Tower>>,
    session: Session,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    let run = tower.runs.find(&id).ok_or(UNKNOWN)?;
    let query = Fields::read(query.unwrap_or_default().as_bytes()).unwrap_or_default();
    let from: usize = query.text("from").parse().unwrap_or(0);
    let live = Live::open(&tower, session)?;
    let begin = Some((live, run.changes(), Told::default(), from));
    Ok(live::events(unfold((begin, run), async |(state, run)| {
        let (mut live, mut changes, mut told, mut from) = state?;
        loop {
            changes.borrow_and_update();
            let tally = run.tally();
            let mut message = Told::message(live.tower.clock.now().as_secs());
            for entry in run.entries(from) {
                Told::append(&mut message, from, page::piece(&Shown::of(from, &entry)));
                from += 1;
            }
            told.part(&mut message, "tally", page::piece(&Progress::of(&tally)));
            let ended = tally.phase != Phase::Running;
            if ended {
                Told::done(&mut message);
            }
            if let Some(event) = live.event(&message) {
                let next = (!ended).then_some((live, changes, told, from));
                return Some((event, (next, run)));
            }
            let changed = async {
                // The request is kept as long as its page.
                let _ = changes.changed().await;
            };
            if !live.wait(changed).await {
                return None;
            }
        }
    })))
}

/// `POST /requests/ID/stop`: waits for no more answers.
pub(super) async fn stop(
    State(tower): State<Arc<Tower>>,
    session: Session,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<Response, Refusal> {
    page::fields_of(&session, &body)?;
    tower.may_ask()?;
    let run = tower.runs.find(&id).ok_or(UNKNOWN)?;
    run.stop();
    Ok(Redirect::to(&format!("/requests/{id}")).into_response())
}
