//! The pages of agents: all of them in a table, and each on a page of its own; as whole pages and as events for open ones.

use std::sync::Arc;

use askama::Template;
use askama::filters::HtmlSafe;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::Response;
use futures_util::stream::unfold;
use openssl::sha::sha256;

use super::chart::Chart;
use super::fleet::{Seen, Snapshot};
use super::form::Fields;
use super::history::{Happened, History, SAMPLES};
use super::live::{self, Live, Told};
use super::page::{self, Frame, Refusal};
use super::router::Tower;
use super::secret::hex;
use super::session::Session;
use super::text::{When, counted, visible};
use super::view::{Column, Shown, View};
use crate::clock::Timestamp;
use crate::packet::Identity;

/// How many loads the small chart of a row shows.
const SPARK: usize = 40;
/// How many services and tags a row names.
const NAMED: usize = 4;
/// How many events of all agents are shown.
const RECENT: usize = 8;

/// A row of the table.
struct Row {
    name: String,
    load: String,
    chart: Option<Chart>,
    services: Vec<String>,
    more_services: usize,
    tags: Vec<String>,
    more_tags: usize,
    in_flight: usize,
    answered: u64,
    failed: u64,
    heard: When,
}

impl Row {
    /// `now` is for ages; without it times are exact, and the script makes ages of them.
    fn of(seen: &Seen, history: &History, now: Option<Timestamp>) -> Self {
        let record = &seen.record;
        Self {
            name: record.identity.name().to_owned(),
            load: record.status.to_string(),
            chart: Chart::of(&history.loads(&record.identity, SPARK), 120, 28),
            services: record.services.iter().take(NAMED).map(ToString::to_string).collect(),
            more_services: record.services.len().saturating_sub(NAMED),
            tags: record.tags.iter().take(NAMED).map(|tag| visible(tag.as_str()).into_owned()).collect(),
            more_tags: record.tags.len().saturating_sub(NAMED),
            in_flight: seen.work.in_flight,
            answered: seen.work.answered,
            failed: seen.work.failed,
            heard: when(record.last_seen, now),
        }
    }
}

fn when(at: Timestamp, now: Option<Timestamp>) -> When {
    now.map_or_else(|| When::exactly(at), |now| When::new(at, now))
}

#[derive(Template)]
#[template(path = "row.html")]
struct OneRow<'a> {
    row: &'a Row,
}

/// The figures above the table.
#[derive(Template)]
#[template(path = "tiles.html")]
struct Tiles {
    agents: usize,
    services: usize,
    in_flight: usize,
    answered: u64,
    failed: u64,
    refused: u64,
    /// Why messages were refused.
    refusals: String,
    problem: Option<String>,
}

impl HtmlSafe for Tiles {}

impl Tiles {
    fn of(snapshot: &Snapshot) -> Self {
        let all = || snapshot.agents.iter().map(|seen| seen.work);
        let refusals: Vec<String> = snapshot.refused.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        Self {
            agents: snapshot.agents.len(),
            services: snapshot.services().len(),
            in_flight: all().map(|work| work.in_flight).sum(),
            answered: all().map(|work| work.answered).sum(),
            failed: all().map(|work| work.failed).sum(),
            refused: snapshot.refused.iter().map(|(_, count)| count).sum(),
            refusals: refusals.join(", "),
            problem: snapshot.problem.clone(),
        }
    }
}

/// The links to the other pages of a table.
#[derive(Template)]
#[template(path = "pager.html")]
struct Pager {
    page: usize,
    pages: usize,
    earlier: Option<String>,
    later: Option<String>,
}

impl HtmlSafe for Pager {}

impl Pager {
    fn of(view: &View, shown: &Shown<'_>) -> Self {
        let link = |page| view.on_page(page).query();
        Self {
            page: shown.page,
            pages: shown.pages,
            earlier: (shown.page > 1).then(|| link(shown.page - 1)),
            later: (shown.page < shown.pages).then(|| link(shown.page + 1)),
        }
    }
}

/// An event of an agent's past.
struct Event {
    name: String,
    what: &'static str,
    bad: bool,
    at: When,
}

impl Event {
    fn of(agent: &Identity, happened: Happened, now: Option<Timestamp>) -> Self {
        let Happened { at, what } = happened;
        Self { name: agent.name().to_owned(), what: what.as_str(), bad: what.is_bad(), at: when(at, now) }
    }
}

#[derive(Template)]
#[template(path = "events.html")]
struct Recent {
    events: Vec<Event>,
    /// Whether the events are of several agents.
    named: bool,
}

impl HtmlSafe for Recent {}

impl Recent {
    fn of_all(history: &History, now: Option<Timestamp>) -> Self {
        let events = history.recent(RECENT).into_iter().map(|(agent, event)| Event::of(&agent, event, now)).collect();
        Self { events, named: true }
    }
}

/// A column's head: its title, where it leads, and how the table is sorted by it now.
struct Head {
    title: &'static str,
    link: String,
    sorted: &'static str,
    is_number: bool,
}

#[derive(Template)]
#[template(path = "agents.html")]
struct AgentsPage<'a> {
    frame: Frame,
    view: &'a View,
    heads: Vec<Head>,
    tiles: Tiles,
    summary: String,
    rows: Vec<Row>,
    pager: Pager,
    recent: Recent,
}

fn summary(view: &View, shown: &Shown<'_>, snapshot: &Snapshot) -> String {
    let all = counted(snapshot.agents.len() as u64, "agent");
    if view.search.is_empty() { all } else { format!("{} of {all}", shown.found) }
}

/// What stands in place of rows, when there are none.
fn none(view: &View) -> &'static str {
    if view.search.is_empty() { "No agents yet: they show up as soon as they are heard." } else { "No agent fits." }
}

/// `GET /`: the table.
pub(super) async fn table(State(tower): State<Arc<Tower>>, session: Session, RawQuery(query): RawQuery) -> Response {
    let view = View::read(&Fields::read(query.unwrap_or_default().as_bytes()).unwrap_or_default());
    let snapshot = Snapshot::of(&tower).await;
    let shown = view.of(&snapshot);
    let now = Some(snapshot.now);
    let head = |column: Column| Head {
        title: column.title(),
        link: view.sorted_by(column).query(),
        sorted: match (column == view.sort, view.descending) {
            (false, _) => "none",
            (true, false) => "ascending",
            (true, true) => "descending",
        },
        is_number: column.is_number(),
    };
    let page = AgentsPage {
        frame: Frame::of(&tower, &session, "agents"),
        heads: Column::ALL.into_iter().map(head).collect(),
        tiles: Tiles::of(&snapshot),
        summary: summary(&view, &shown, &snapshot),
        rows: shown.agents.iter().map(|seen| Row::of(seen, &tower.history, now)).collect(),
        pager: Pager::of(&view, &shown),
        recent: Recent::of_all(&tower.history, now),
        view: &view,
    };
    page::html(StatusCode::OK, &page)
}

/// `GET /events`: what changes in the table, with the query of its page.
pub(super) async fn table_events(
    State(tower): State<Arc<Tower>>,
    session: Session,
    RawQuery(query): RawQuery,
) -> Result<Response, Refusal> {
    let view = View::read(&Fields::read(query.unwrap_or_default().as_bytes()).unwrap_or_default());
    let live = Live::open(&tower, session)?;
    let begin = (live, tower.snapshot.subscribe(), Told::default(), view);
    Ok(live::events(unfold(begin, async |(mut live, mut snapshots, mut told, view)| {
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let shown = view.of(&snapshot);
            let history = &live.tower.history;
            let mut message = Told::message(snapshot.now.as_secs());
            told.part(&mut message, "tiles", page::piece(&Tiles::of(&snapshot)));
            told.part(&mut message, "summary", summary(&view, &shown, &snapshot));
            told.part(&mut message, "none", none(&view).to_owned());
            told.part(&mut message, "pager", page::piece(&Pager::of(&view, &shown)));
            told.part(&mut message, "recent", page::piece(&Recent::of_all(history, None)));
            let rows = shown.agents.iter().map(|seen| {
                let row = Row::of(seen, history, None);
                let content = page::piece(&OneRow { row: &row });
                (row.name, content)
            });
            told.rows(&mut message, rows.collect());
            if let Some(event) = live.event(&message) {
                return Some((event, (live, snapshots, told, view)));
            }
            let changed = async {
                // The tower outlives its pages.
                let _ = snapshots.changed().await;
            };
            if !live.wait(changed).await {
                return None;
            }
        }
    })))
}

/// What is known of one agent.
#[derive(Template)]
#[template(path = "facts.html")]
struct Facts {
    name: String,
    identity: String,
    allow_requests: bool,
    /// None when it is gone.
    here: Option<Here>,
    chart: Option<Chart>,
    past: Recent,
}

/// An agent that is there.
struct Here {
    load: String,
    heard: When,
    /// When its process started, where it says that.
    started: Option<When>,
    instance: u64,
    /// Whether a signature proves what it says of itself.
    proved: bool,
    /// The SHA-256 of the certificate that came with its registration.
    certificate: Option<String>,
    services: Vec<String>,
    tags: Vec<String>,
    files: Vec<String>,
    in_flight: usize,
    answered: u64,
    failed: u64,
}

impl Here {
    fn of(seen: &Seen, now: Option<Timestamp>) -> Self {
        let record = &seen.record;
        let certificate = record.proof.as_ref().and_then(|proof| proof.certificates.first());
        let shown = |tag: &crate::packet::Tag| visible(tag.as_str()).into_owned();
        Self {
            load: record.status.to_string(),
            heard: when(record.last_seen, now),
            started: (record.instance != 0).then(|| when(Timestamp::from_micros(record.instance), now)),
            instance: record.instance,
            proved: record.proof.is_some(),
            certificate: certificate.map(|der| hex(&sha256(der))),
            services: record.services.iter().map(ToString::to_string).collect(),
            tags: record.tags.iter().map(shown).collect(),
            files: record.files.iter().map(shown).collect(),
            in_flight: seen.work.in_flight,
            answered: seen.work.answered,
            failed: seen.work.failed,
        }
    }
}

impl HtmlSafe for Facts {}

impl Facts {
    /// None when nothing is known of this agent.
    fn of(tower: &Tower, agent: &Identity, snapshot: &Snapshot, now: Option<Timestamp>) -> Option<Self> {
        let seen = snapshot.agents.iter().find(|seen| seen.record.identity == *agent);
        let happened = tower.history.happened(agent);
        if seen.is_none() && happened.is_none() {
            return None;
        }
        let events = happened.unwrap_or_default().into_iter().map(|happened| Event::of(agent, happened, now)).collect();
        Some(Self {
            name: agent.name().to_owned(),
            identity: agent.to_string(),
            allow_requests: tower.allow_requests,
            here: seen.map(|seen| Here::of(seen, now)),
            chart: Chart::of(&tower.history.loads(agent, SAMPLES), 720, 120),
            past: Recent { events, named: false },
        })
    }
}

#[derive(Template)]
#[template(path = "agent.html")]
struct AgentPage {
    frame: Frame,
    facts: Facts,
}

const UNKNOWN: Refusal = Refusal::Because(StatusCode::NOT_FOUND, "No agent of that name is known.");

/// `GET /agents/NAME`: one agent.
pub(super) async fn one(
    State(tower): State<Arc<Tower>>,
    session: Session,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    let agent = Identity::agent(&name).map_err(|_| UNKNOWN)?;
    let snapshot = Snapshot::of(&tower).await;
    let facts = Facts::of(&tower, &agent, &snapshot, Some(snapshot.now)).ok_or(UNKNOWN)?;
    Ok(page::html(StatusCode::OK, &AgentPage { frame: Frame::of(&tower, &session, "agents"), facts }))
}

/// `GET /agents/NAME/events`: what changes about it.
pub(super) async fn one_events(
    State(tower): State<Arc<Tower>>,
    session: Session,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    let agent = Identity::agent(&name).map_err(|_| UNKNOWN)?;
    let live = Live::open(&tower, session)?;
    let begin = (live, tower.snapshot.subscribe(), Told::default(), agent);
    Ok(live::events(unfold(begin, async |(mut live, mut snapshots, mut told, agent)| {
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let mut message = Told::message(snapshot.now.as_secs());
            if let Some(facts) = Facts::of(&live.tower, &agent, &snapshot, None) {
                told.part(&mut message, "facts", page::piece(&facts));
            }
            if let Some(event) = live.event(&message) {
                return Some((event, (live, snapshots, told, agent)));
            }
            let changed = async {
                // The tower outlives its pages.
                let _ = snapshots.changed().await;
            };
            if !live.wait(changed).await {
                return None;
            }
        }
    })))
}
