//! The form that asks: choosing a service, whom to ask, what with; and reading what was written into it.

use std::sync::Arc;
use std::time::Duration;

use askama::Template;
use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};

use super::form::Fields;
use super::page::{self, Frame, Refusal};
use super::router::Tower;
use super::runs::{Asked, NotSent};
use super::session::Session;
use crate::packet::{Identity, Payload, Role, SelectorName, Service, Tag};

/// How many agents are offered to choose from.
const AGENTS: usize = 500;
/// How many tags a request may ask for.
const MAX_TAGS: usize = 64;
/// How long answers may be waited for, in seconds.
const TIMES: std::ops::RangeInclusive<f64> = 0.1..=3600.0;

/// What stands in the form.
#[derive(Clone, Debug, Default)]
struct Draft {
    service: String,
    selector: SelectorName,
    target: String,
    tags: String,
    payload: String,
    timeout: String,
}

/// What is wrong with a field: its name, and why.
type Wrong = (&'static str, String);

#[derive(Template)]
#[template(path = "ask.html")]
struct Page<'a> {
    frame: Frame,
    draft: &'a Draft,
    wrong: &'a [Wrong],
    /// What keeps the whole request from being sent.
    problem: Option<&'a str>,
    selectors: [SelectorName; 4],
    services: Vec<String>,
    agents: Vec<String>,
}

impl Page<'_> {
    fn why(&self, field: &str) -> Option<&str> {
        self.wrong.iter().find(|(name, _)| *name == field).map(|(_, why)| why.as_str())
    }
}

/// A selector, in words.
pub(super) fn describe(selector: &SelectorName) -> &'static str {
    match selector {
        SelectorName::LeastLoaded => "the least loaded one",
        SelectorName::Random => "any one",
        SelectorName::RoundRobin => "each in turn",
        SelectorName::All => "all of them",
    }
}

/// `GET /request`: the form, with what the query says filled in.
pub(super) async fn form(State(tower): State<Arc<Tower>>, session: Session, RawQuery(query): RawQuery) -> Response {
    let query = Fields::read(query.unwrap_or_default().as_bytes()).unwrap_or_default();
    let mut draft = Draft::of(&query);
    if draft.timeout.is_empty() {
        draft.timeout = "30".into();
    }
    show(&tower, &session, StatusCode::OK, &draft, &[], None)
}

/// `POST /request`: sends it, and leads to what comes of it.
pub(super) async fn send(State(tower): State<Arc<Tower>>, session: Session, body: Bytes) -> Result<Response, Refusal> {
    let fields = page::fields_of(&session, &body)?;
    tower.may_ask()?;
    let draft = Draft::of(&fields);
    let asked = match draft.asked() {
        Ok(asked) => asked,
        Err(wrong) => return Ok(show(&tower, &session, StatusCode::UNPROCESSABLE_ENTITY, &draft, &wrong, None)),
    };
    Ok(match tower.runs.start(asked, tower.mapper.clone(), tower.clock.now(), tower.stopping.subscribe()) {
        Ok(run) => Redirect::to(&format!("/requests/{}", run.id)).into_response(),
        Err(why) => {
            let problem = match why {
                NotSent::Busy => "Too many requests are under way: stop one, or wait until one has ended.",
                NotSent::Random => "The system's random generator failed.",
            };
            show(&tower, &session, StatusCode::SERVICE_UNAVAILABLE, &draft, &[], Some(problem))
        }
    })
}

fn show(
    tower: &Tower,
    session: &Session,
    status: StatusCode,
    draft: &Draft,
    wrong: &[Wrong],
    problem: Option<&str>,
) -> Response {
    let snapshot = tower.snapshot.borrow().clone();
    let page = Page {
        frame: Frame::of(tower, session, "request"),
        draft,
        wrong,
        problem,
        selectors: SelectorName::ALL,
        services: snapshot.services().into_iter().map(Service::to_string).collect(),
        agents: snapshot.agents.iter().take(AGENTS).map(|seen| seen.record.identity.name().to_owned()).collect(),
    };
    page::html(status, &page)
}

impl Draft {
    fn of(fields: &Fields) -> Self {
        let text = |name| fields.text(name).to_owned();
        Self {
            service: text("service"),
            // An unknown name is no choice of the form.
            selector: fields.text("selector").parse().unwrap_or_default(),
            target: text("target"),
            tags: text("tags"),
            payload: text("payload"),
            timeout: text("timeout"),
        }
    }

    /// What is asked, or all that is wrong with it.
    fn asked(&self) -> Result<Asked, Vec<Wrong>> {
        let mut wrong = Vec::new();
        let mut note = |field: &'static str, why: String| wrong.push((field, why));
        let service = self.service.trim().parse::<Service>().map_err(|error| note("service", error.to_string())).ok();
        let target = match self.target.trim() {
            "" => None,
            name => agent(name).map_err(|why| note("target", why)).ok(),
        };
        let lines: Vec<&str> = self.tags.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let tags: Vec<Tag> = lines
            .iter()
            .filter_map(|line| line.parse().map_err(|error| note("tags", format!("'{line}': {error}"))).ok())
            .collect();
        if lines.len() > MAX_TAGS {
            note("tags", format!("at most {MAX_TAGS} tags"));
        }
        let seconds = self.timeout.trim().parse::<f64>().ok().filter(|seconds| TIMES.contains(seconds));
        if seconds.is_none() {
            note("timeout", format!("a number of seconds between {} and {}", TIMES.start(), TIMES.end()));
        }
        match (service, seconds) {
            (Some(service), Some(seconds)) if wrong.is_empty() => Ok(Asked {
                service,
                payload: payload(&self.payload),
                selector: self.selector,
                target,
                tags,
                timeout: Duration::from_secs_f64(seconds),
            }),
            _ => Err(wrong),
        }
    }
}

/// JSON where it parses, else text; null where nothing is written. Browsers send line ends as CR LF, which nobody wrote.
fn payload(text: &str) -> Payload {
    let text = text.replace("\r\n", "\n");
    if text.trim().is_empty() { Payload::default() } else { Payload::from_text(&text) }
}

/// An agent by its name or its identity.
fn agent(text: &str) -> Result<Identity, String> {
    match text.parse::<Identity>() {
        Ok(agent) if agent.role() == Role::Agent => Ok(agent),
        _ => Identity::agent(text).map_err(|error| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(form: &str) -> Result<Asked, Vec<Wrong>> {
        Draft::of(&Fields::read(form.as_bytes()).unwrap()).asked()
    }

    #[test]
    fn n20_a_form_becomes_a_request() {
        let form = "service=/a/b&selector=all&target=nanite-fred&tags=one%0D%0A%0D%0Atwo%2C+2&timeout=0.5&payload=%7B%22a%22%3A1%7D";
        let asked = asked(form).unwrap();
        assert_eq!((asked.service.as_str(), asked.selector), ("/a/b", SelectorName::All));
        assert_eq!(asked.target.unwrap().as_str(), "nanite-fred");
        assert_eq!(asked.tags.iter().map(Tag::as_str).collect::<Vec<_>>(), ["one", "two, 2"]);
        assert_eq!((asked.timeout, asked.payload.0), (Duration::from_millis(500), serde_json::json!({"a": 1})));
    }

    #[test]
    fn n20_a_payload_is_json_where_it_parses() {
        assert_eq!(payload("").0, serde_json::Value::Null);
        assert_eq!(payload("5").0, serde_json::json!(5));
        assert_eq!(payload("{\"a\":").0, serde_json::json!("{\"a\":"));
        assert_eq!(payload("a\r\nb").0, serde_json::json!("a\nb"));
    }

    #[test]
    fn n20_everything_that_is_wrong_is_said_at_once() {
        let fields = |form: &str| asked(form).unwrap_err().into_iter().map(|(field, _)| field).collect::<Vec<_>>();
        assert_eq!(fields("service=echo&target=a+b&tags=%01&timeout=x"), ["service", "target", "tags", "timeout"]);
        for timeout in ["", "0", "-1", "NaN", "inf", "1e9"] {
            assert_eq!(fields(&format!("service=/a/b&timeout={timeout}")), ["timeout"], "{timeout}");
        }
        let many = "x%0A".repeat(MAX_TAGS + 1);
        assert_eq!(fields(&format!("service=/a/b&timeout=1&tags={many}")), ["tags"]);
        assert_eq!(
            asked("service=/a/b&timeout=1&target=mapper-x").unwrap().target.unwrap().as_str(),
            "nanite-mapper-x"
        );
    }
}
