//! The pages of requests: the form, the list of the latest requests, and each request with its results as they arrive.

use std::sync::Arc;

use askama::Template;
use askama::filters::HtmlSafe;
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::{Frame, parse_session_form, render_fragment};
use crate::admin::access::Session;
use crate::admin::event_stream::event_stream;
use crate::admin::format::{DisplayTime, DisplayValue, count_of, visible};
use crate::admin::http::{FormFields, HttpError, render_page};
use crate::admin::requests::{
    FieldError, NewRequest, Progress, RequestForm, RequestResult, RequestStatus, ResultKind, SentRequest, StartError,
};
use crate::admin::state::{AppState, READ_ONLY};
use crate::packet::{Identity, SelectorName, Service, Tag};

/// The most agents in a list to choose from.
const MAX_LISTED_AGENTS: usize = 500;
/// The longest link to a form that is filled in, in bytes: less than the longest URL that the guard accepts.
const MAX_FORM_LINK_BYTES: usize = 3500;
const DEFAULT_TIMEOUT_SECONDS: &str = "30";

const UNKNOWN_REQUEST: HttpError =
    HttpError::Status(StatusCode::NOT_FOUND, "Unknown request. Only the latest requests are stored.");

#[derive(Template)]
#[template(path = "request_form.html")]
struct FormPage<'a> {
    frame: Frame,
    form: &'a RequestForm,
    field_errors: &'a [FieldError],
    /// Why the request was not sent, if not for a field.
    error: Option<&'a str>,
    selectors: [SelectorName; 4],
    services: Vec<String>,
    agents: Vec<String>,
}

impl FormPage<'_> {
    fn error_of(&self, field: &str) -> Option<&str> {
        self.field_errors.iter().find(|error| error.field == field).map(|error| error.message.as_str())
    }
}

fn describe_selector(selector: &SelectorName) -> &'static str {
    match selector {
        SelectorName::LeastLoaded => "least loaded agent",
        SelectorName::Random => "random agent",
        SelectorName::RoundRobin => "agents in turn (round robin)",
        SelectorName::All => "all agents",
    }
}

/// `GET /request`: the form, filled in from the query.
pub(in crate::admin) async fn form(
    State(state): State<Arc<AppState>>,
    session: Session,
    RawQuery(query): RawQuery,
) -> Response {
    let mut form = RequestForm::new(&FormFields::from_query(query.as_deref()));
    if form.timeout.is_empty() {
        form.timeout = DEFAULT_TIMEOUT_SECONDS.into();
    }
    form_page(&state, &session, StatusCode::OK, &form, &[], None)
}

/// `POST /request`: sends the request, and redirects to its page.
pub(in crate::admin) async fn send(
    State(state): State<Arc<AppState>>,
    session: Session,
    body: Bytes,
) -> Result<Response, HttpError> {
    let fields = parse_session_form(&session, &body)?;
    state.require_requests_allowed()?;
    let form = RequestForm::new(&fields);
    let request = match form.parse() {
        Ok(request) => request,
        Err(errors) => {
            return Ok(form_page(&state, &session, StatusCode::UNPROCESSABLE_ENTITY, &form, &errors, None));
        }
    };
    let started = state.requests.start(request, state.mapper.clone(), state.clock.now(), state.shutdown_started());
    Ok(match started {
        Ok(sent) => Redirect::to(&format!("/requests/{}", sent.id)).into_response(),
        Err(error) => {
            let error = match error {
                StartError::TooManyRequests => {
                    "Too many requests are in progress. Stop one, or wait until one has ended."
                }
                StartError::Randomness => "The system's random number generator failed.",
            };
            form_page(&state, &session, StatusCode::SERVICE_UNAVAILABLE, &form, &[], Some(error))
        }
    })
}

fn form_page(
    state: &AppState,
    session: &Session,
    status: StatusCode,
    form: &RequestForm,
    field_errors: &[FieldError],
    error: Option<&str>,
) -> Response {
    let snapshot = state.snapshot();
    let agents = snapshot.agents.iter().take(MAX_LISTED_AGENTS);
    let page = FormPage {
        frame: Frame::new(state, session, "request"),
        form,
        field_errors,
        error,
        selectors: SelectorName::ALL,
        services: snapshot.services().into_iter().map(Service::to_string).collect(),
        agents: agents.map(|agent| agent.record.identity.name().to_owned()).collect(),
    };
    render_page(status, &page)
}

/// The status of a request and the numbers of its results.
#[derive(Template)]
#[template(path = "progress.html")]
struct ProgressView {
    status: &'static str,
    /// The CSS class of the status.
    class: &'static str,
    counts: String,
    error: Option<String>,
    not_stored: u64,
}

impl HtmlSafe for ProgressView {}

impl ProgressView {
    fn new(progress: Progress) -> Self {
        let Progress { status, answers, failures, intermediate, not_stored } = progress;
        let (status, class, error) = match status {
            RequestStatus::Running => ("Running", "running", None),
            RequestStatus::Completed if failures == 0 => ("Completed", "good", None),
            RequestStatus::Completed => ("Completed with failures", "bad", None),
            RequestStatus::Failed(error) => ("Failed", "bad", Some(error)),
            RequestStatus::Stopped => ("Stopped", "bad", None),
        };
        let mut counts = format!("{}, {failures} failed", count_of(answers, "answer"));
        if intermediate > 0 {
            counts.push_str(&format!(", {}", count_of(intermediate, "intermediate result")));
        }
        Self { status, class, counts, error, not_stored }
    }
}

/// A request for display.
struct RequestView {
    id: String,
    service: String,
    selector: &'static str,
    target: Option<String>,
    tags: Vec<String>,
    timeout_seconds: f64,
    sent_at: DisplayTime,
    payload: DisplayValue,
    /// The link to the form with the same input.
    form_link: String,
}

impl RequestView {
    fn new(sent: &SentRequest, state: &AppState) -> Self {
        let SentRequest { id, request, sent_at, .. } = sent;
        Self {
            id: id.to_string(),
            service: request.service.to_string(),
            selector: describe_selector(&request.selector),
            target: request.target.as_ref().map(|target| target.name().to_owned()),
            tags: request.tags.iter().map(|tag| visible(tag.as_str()).into_owned()).collect(),
            timeout_seconds: request.timeout.as_secs_f64(),
            sent_at: DisplayTime::new(*sent_at, Some(state.clock.now())),
            payload: DisplayValue::new(&request.payload),
            form_link: form_link(request),
        }
    }
}

/// The link to the form with this request. It omits the tags or the payload if the link would be too long.
fn form_link(request: &NewRequest) -> String {
    let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let tags: Vec<&str> = request.tags.iter().map(Tag::as_str).collect();
    let payload = match &request.payload.0 {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut link = format!(
        "/request?service={}&selector={}&target={}&timeout={}",
        encode(request.service.as_str()),
        request.selector,
        request.target.as_ref().map_or("", Identity::name),
        request.timeout.as_secs_f64(),
    );
    for (name, text) in [("tags", tags.join("\n")), ("payload", payload)] {
        let text = encode(&text);
        if link.len() + text.len() < MAX_FORM_LINK_BYTES {
            link.push_str(&format!("&{name}={text}"));
        }
    }
    link
}

#[derive(Template)]
#[template(path = "requests.html")]
struct RequestListPage {
    frame: Frame,
    requests: Vec<(RequestView, ProgressView)>,
}

/// `GET /requests`: the latest requests.
pub(in crate::admin) async fn list(State(state): State<Arc<AppState>>, session: Session) -> Response {
    let requests = state.requests.all();
    let requests =
        requests.iter().map(|sent| (RequestView::new(sent, &state), ProgressView::new(sent.progress()))).collect();
    render_page(StatusCode::OK, &RequestListPage { frame: Frame::new(&state, &session, "requests"), requests })
}

/// A result of a request.
#[derive(Template)]
#[template(path = "result.html")]
struct ResultView<'a> {
    index: usize,
    elapsed: String,
    agent: &'a str,
    kind: &'a ResultKind,
    value: &'a DisplayValue,
}

impl HtmlSafe for ResultView<'_> {}

impl<'a> ResultView<'a> {
    fn new(index: usize, result: &'a RequestResult) -> Self {
        let millis = result.elapsed.as_micros() as f64 / 1000.0;
        let elapsed = if millis < 1000.0 { format!("{millis:.1} ms") } else { format!("{:.2} s", millis / 1000.0) };
        Self { index, elapsed, agent: result.from.name(), kind: &result.kind, value: &result.value }
    }
}

#[derive(Template)]
#[template(path = "request.html")]
struct RequestPage<'a> {
    frame: Frame,
    request: RequestView,
    progress: ProgressView,
    is_running: bool,
    results: Vec<ResultView<'a>>,
}

/// `GET /requests/ID`: a request with its results so far.
pub(in crate::admin) async fn details(
    State(state): State<Arc<AppState>>,
    session: Session,
    Path(id): Path<String>,
) -> Result<Response, HttpError> {
    let sent = state.requests.find(&id).ok_or(UNKNOWN_REQUEST)?;
    // The progress is read before the results: a page that shows a completed request has all its results.
    let progress = sent.progress();
    let results = sent.results_from(0);
    let page = RequestPage {
        frame: Frame::new(&state, &session, "requests"),
        request: RequestView::new(&sent, &state),
        is_running: progress.status.is_running(),
        progress: ProgressView::new(progress),
        results: results.iter().enumerate().map(|(index, result)| ResultView::new(index, result)).collect(),
    };
    Ok(render_page(StatusCode::OK, &page))
}

/// `GET /requests/ID/events?from=N`: the progress, and the results from this index on.
pub(in crate::admin) async fn details_events(
    State(state): State<Arc<AppState>>,
    session: Session,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, HttpError> {
    let sent = state.requests.find(&id).ok_or(UNKNOWN_REQUEST)?;
    let mut index: usize = FormFields::from_query(query.as_deref()).get("from").parse().unwrap_or(0);
    event_stream(&state, session, sent.subscribe(), move |_, _, update| {
        // Before the results, as above.
        let progress = sent.progress();
        for result in sent.results_from(index) {
            update.append(index, render_fragment(&ResultView::new(index, &result)));
            index += 1;
        }
        if !progress.status.is_running() {
            update.complete();
        }
        update.set_part("progress", render_fragment(&ProgressView::new(progress)));
    })
}

/// `POST /requests/ID/stop`: stops waiting for results.
pub(in crate::admin) async fn stop(
    State(state): State<Arc<AppState>>,
    session: Session,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<Response, HttpError> {
    parse_session_form(&session, &body)?;
    state.require_requests_allowed()?;
    state.requests.find(&id).ok_or(UNKNOWN_REQUEST)?.stop();
    Ok(Redirect::to(&format!("/requests/{id}")).into_response())
}
