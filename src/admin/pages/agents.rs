//! The pages of agents: the table of all agents, and the details of each agent. Each page has an event stream.

use std::sync::Arc;

use askama::Template;
use askama::filters::HtmlSafe;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::Response;
use data_encoding::HEXLOWER;
use openssl::sha::sha256;

use super::agent_table::{Column, TablePage, TableQuery};
use super::{Frame, render_fragment};
use crate::admin::access::Session;
use crate::admin::event_stream::event_stream;
use crate::admin::format::{DisplayTime, LoadChart, count_of, visible};
use crate::admin::history::{History, HistoryEvent, MAX_LOAD_SAMPLES};
use crate::admin::http::{HttpError, render_page};
use crate::admin::state::{AgentSnapshot, AppState, Snapshot};
use crate::clock::Timestamp;
use crate::packet::{Identity, Tag};

/// The number of loads in the chart of a row.
const ROW_CHART_SAMPLES: usize = 40;
/// The most services, and the most tags, in a row.
const MAX_NAMES_PER_ROW: usize = 4;
/// The most events under the table.
const MAX_LISTED_EVENTS: usize = 8;

const UNKNOWN_AGENT: HttpError = HttpError::Status(StatusCode::NOT_FOUND, "No agent with this name is known.");

/// A row of the table.
#[derive(Template)]
#[template(path = "agent_row.html")]
struct AgentRow {
    name: String,
    load: String,
    chart: Option<LoadChart>,
    services: Vec<String>,
    more_services: usize,
    tags: Vec<String>,
    more_tags: usize,
    in_flight: usize,
    answered: u64,
    failed: u64,
    last_heartbeat: DisplayTime,
}

impl HtmlSafe for AgentRow {}

impl AgentRow {
    fn new(agent: &AgentSnapshot, history: &History, now: Option<Timestamp>) -> Self {
        let AgentSnapshot { record, workload } = agent;
        Self {
            name: record.identity.name().to_owned(),
            load: record.status.to_string(),
            chart: LoadChart::new(&history.loads(&record.identity, ROW_CHART_SAMPLES), 120, 28),
            services: record.services.iter().take(MAX_NAMES_PER_ROW).map(ToString::to_string).collect(),
            more_services: record.services.len().saturating_sub(MAX_NAMES_PER_ROW),
            tags: record.tags.iter().take(MAX_NAMES_PER_ROW).map(visible_tag).collect(),
            more_tags: record.tags.len().saturating_sub(MAX_NAMES_PER_ROW),
            in_flight: workload.in_flight,
            answered: workload.answered,
            failed: workload.failed,
            last_heartbeat: DisplayTime::new(record.last_seen, now),
        }
    }
}

fn visible_tag(tag: &Tag) -> String {
    visible(tag.as_str()).into_owned()
}

/// The totals above the table.
#[derive(Template)]
#[template(path = "totals.html")]
struct Totals {
    agents: usize,
    services: usize,
    in_flight: usize,
    answered: u64,
    failed: u64,
    refused: u64,
    refused_by_reason: String,
    error: Option<String>,
}

impl HtmlSafe for Totals {}

impl Totals {
    fn new(snapshot: &Snapshot) -> Self {
        let workloads = || snapshot.agents.iter().map(|agent| agent.workload);
        let refused: Vec<String> = snapshot.refused.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        Self {
            agents: snapshot.agents.len(),
            services: snapshot.services().len(),
            in_flight: workloads().map(|workload| workload.in_flight).sum(),
            answered: workloads().map(|workload| workload.answered).sum(),
            failed: workloads().map(|workload| workload.failed).sum(),
            refused: snapshot.refused.iter().map(|(_, count)| count).sum(),
            refused_by_reason: refused.join(", "),
            error: snapshot.error.clone(),
        }
    }
}

/// The links to the previous and the next page of the table.
#[derive(Template)]
#[template(path = "pager.html")]
struct Pager {
    page: usize,
    page_count: usize,
    previous: Option<String>,
    next: Option<String>,
}

impl HtmlSafe for Pager {}

impl Pager {
    fn new(query: &TableQuery, shown: &TablePage<'_>) -> Self {
        let TablePage { page, page_count, .. } = *shown;
        let link = |page| query.with_page(page).to_query_string();
        Self {
            page,
            page_count,
            previous: (page > 1).then(|| link(page - 1)),
            next: (page < page_count).then(|| link(page + 1)),
        }
    }
}

/// A list of events.
#[derive(Template)]
#[template(path = "agent_events.html")]
struct EventList {
    events: Vec<ListedEvent>,
    /// Whether each event has the name of its agent.
    show_names: bool,
}

impl HtmlSafe for EventList {}

struct ListedEvent {
    agent: String,
    text: &'static str,
    is_problem: bool,
    at: DisplayTime,
}

impl ListedEvent {
    fn new(agent: &Identity, event: HistoryEvent, now: Option<Timestamp>) -> Self {
        let HistoryEvent { at, kind } = event;
        Self {
            agent: agent.name().to_owned(),
            text: kind.as_str(),
            is_problem: kind.is_problem(),
            at: DisplayTime::new(at, now),
        }
    }
}

impl EventList {
    fn recent(history: &History, now: Option<Timestamp>) -> Self {
        let events = history.recent_events(MAX_LISTED_EVENTS);
        let events = events.into_iter().map(|(agent, event)| ListedEvent::new(&agent, event, now)).collect();
        Self { events, show_names: true }
    }
}

/// The header of a column.
struct ColumnHeader {
    title: &'static str,
    link: String,
    /// The value of `aria-sort`.
    sort_order: &'static str,
    is_number: bool,
}

impl ColumnHeader {
    fn new(column: Column, query: &TableQuery) -> Self {
        Self {
            title: column.title(),
            link: query.sorted_by(column).to_query_string(),
            sort_order: match (column == query.sort, query.descending) {
                (false, _) => "none",
                (true, false) => "ascending",
                (true, true) => "descending",
            },
            is_number: column.is_number(),
        }
    }
}

#[derive(Template)]
#[template(path = "agents.html")]
struct AgentListPage<'a> {
    frame: Frame,
    query: &'a TableQuery,
    columns: Vec<ColumnHeader>,
    rows: Vec<AgentRow>,
    content: AgentList,
}

/// The parts of the table's page that change, other than the rows.
struct AgentList {
    totals: Totals,
    summary: String,
    /// The text in place of rows.
    no_rows: &'static str,
    pager: Pager,
    events: EventList,
}

impl AgentList {
    fn new(
        query: &TableQuery,
        shown: &TablePage<'_>,
        snapshot: &Snapshot,
        history: &History,
        now: Option<Timestamp>,
    ) -> Self {
        let all = count_of(snapshot.agents.len() as u64, "agent");
        let (summary, no_rows) = match query.search.as_str() {
            "" => (all, "No agents yet. They appear here when they register."),
            _ => (format!("{} of {all}", shown.matching), "No agent matches."),
        };
        Self {
            totals: Totals::new(snapshot),
            summary,
            no_rows,
            pager: Pager::new(query, shown),
            events: EventList::recent(history, now),
        }
    }
}

/// `GET /`: the table.
pub(in crate::admin) async fn list(
    State(state): State<Arc<AppState>>,
    session: Session,
    RawQuery(query): RawQuery,
) -> Response {
    let query = TableQuery::parse(query.as_deref());
    let snapshot = state.take_snapshot().await;
    let shown = query.select(&snapshot);
    let now = Some(snapshot.at);
    let page = AgentListPage {
        frame: Frame::new(&state, &session, "agents"),
        columns: Column::ALL.into_iter().map(|column| ColumnHeader::new(column, &query)).collect(),
        rows: shown.agents.iter().map(|agent| AgentRow::new(agent, &state.history, now)).collect(),
        content: AgentList::new(&query, &shown, &snapshot, &state.history, now),
        query: &query,
    };
    render_page(StatusCode::OK, &page)
}

/// `GET /events`: the changes of the table. It takes the same query as the table.
pub(in crate::admin) async fn list_events(
    State(state): State<Arc<AppState>>,
    session: Session,
    RawQuery(query): RawQuery,
) -> Result<Response, HttpError> {
    let query = TableQuery::parse(query.as_deref());
    event_stream(&state, session, state.subscribe_to_snapshots(), move |state, snapshot, update| {
        let shown = query.select(&snapshot);
        let content = AgentList::new(&query, &shown, &snapshot, &state.history, None);
        update.set_part("totals", render_fragment(&content.totals));
        update.set_part("summary", content.summary);
        update.set_part("no-rows", content.no_rows.to_owned());
        update.set_part("pager", render_fragment(&content.pager));
        update.set_part("events", render_fragment(&content.events));
        let rows = shown.agents.iter().map(|agent| AgentRow::new(agent, &state.history, None));
        update.set_rows(rows.map(|row| (row.name.clone(), render_fragment(&row))).collect());
    })
}

/// The details of an agent.
#[derive(Template)]
#[template(path = "agent_details.html")]
struct AgentDetails {
    name: String,
    identity: String,
    allow_requests: bool,
    /// None if the agent is offline.
    online: Option<OnlineAgent>,
    chart: Option<LoadChart>,
    events: EventList,
}

impl HtmlSafe for AgentDetails {}

struct OnlineAgent {
    load: String,
    last_heartbeat: DisplayTime,
    /// When its process started, if the agent reports it.
    started: Option<DisplayTime>,
    instance: u64,
    /// Whether its registration has a verified signature.
    is_verified: bool,
    /// The SHA-256 of the certificate that came with its registration, in hexadecimal.
    certificate: Option<String>,
    services: Vec<String>,
    tags: Vec<String>,
    file_domains: Vec<String>,
    in_flight: usize,
    answered: u64,
    failed: u64,
}

impl OnlineAgent {
    fn new(agent: &AgentSnapshot, now: Option<Timestamp>) -> Self {
        let AgentSnapshot { record, workload } = agent;
        let certificate = record.proof.as_ref().and_then(|proof| proof.certificates.first());
        // An instance is the start time of a process, in microseconds since the epoch.
        let started = (record.instance != 0).then(|| Timestamp::from_micros(record.instance));
        Self {
            load: record.status.to_string(),
            last_heartbeat: DisplayTime::new(record.last_seen, now),
            started: started.map(|started| DisplayTime::new(started, now)),
            instance: record.instance,
            is_verified: record.proof.is_some(),
            certificate: certificate.map(|der| HEXLOWER.encode(&sha256(der))),
            services: record.services.iter().map(ToString::to_string).collect(),
            tags: record.tags.iter().map(visible_tag).collect(),
            file_domains: record.files.iter().map(visible_tag).collect(),
            in_flight: workload.in_flight,
            answered: workload.answered,
            failed: workload.failed,
        }
    }
}

impl AgentDetails {
    /// None if the agent is unknown.
    fn new(state: &AppState, identity: &Identity, snapshot: &Snapshot, now: Option<Timestamp>) -> Option<Self> {
        let online = snapshot.agents.iter().find(|agent| agent.record.identity == *identity);
        let events = state.history.events(identity);
        if online.is_none() && events.is_none() {
            return None;
        }
        let events = events.unwrap_or_default().into_iter();
        let events = events.map(|event| ListedEvent::new(identity, event, now)).collect();
        Some(Self {
            name: identity.name().to_owned(),
            identity: identity.to_string(),
            allow_requests: state.allow_requests,
            online: online.map(|agent| OnlineAgent::new(agent, now)),
            chart: LoadChart::new(&state.history.loads(identity, MAX_LOAD_SAMPLES), 720, 120),
            events: EventList { events, show_names: false },
        })
    }
}

#[derive(Template)]
#[template(path = "agent.html")]
struct AgentPage {
    frame: Frame,
    details: AgentDetails,
}

/// `GET /agents/NAME`: the details of one agent.
pub(in crate::admin) async fn details(
    State(state): State<Arc<AppState>>,
    session: Session,
    Path(name): Path<String>,
) -> Result<Response, HttpError> {
    let identity = Identity::agent(&name).map_err(|_| UNKNOWN_AGENT)?;
    let snapshot = state.take_snapshot().await;
    let details = AgentDetails::new(&state, &identity, &snapshot, Some(snapshot.at)).ok_or(UNKNOWN_AGENT)?;
    let page = AgentPage { frame: Frame::new(&state, &session, "agents"), details };
    Ok(render_page(StatusCode::OK, &page))
}

/// `GET /agents/NAME/events`: the changes of the details.
pub(in crate::admin) async fn details_events(
    State(state): State<Arc<AppState>>,
    session: Session,
    Path(name): Path<String>,
) -> Result<Response, HttpError> {
    let identity = Identity::agent(&name).map_err(|_| UNKNOWN_AGENT)?;
    event_stream(&state, session, state.subscribe_to_snapshots(), move |state, snapshot, update| {
        if let Some(details) = AgentDetails::new(state, &identity, &snapshot, None) {
            update.set_part("details", render_fragment(&details));
        }
    })
}
