//! Requests sent from the pages: the form's input, the requests in progress, and the latest requests with their results. All of it is
//! bounded.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};

use super::format::{DisplayValue, visible};
use super::http::FormFields;
use crate::clock::Timestamp;
use crate::mapper::Mapper;
use crate::packet::{Identity, Payload, RandomnessError, Role, SelectorName, Service, Tag, Token};
use crate::request::Event;

const MAX_RUNNING_REQUESTS: usize = 16;
const MAX_STORED_REQUESTS: usize = 32;
/// The most results that are stored of a request. Intermediate results get half of it, so that there is room for outcomes.
const MAX_RESULTS_PER_REQUEST: usize = 2000;
/// The most bytes of results that are stored of a request; the same half applies.
const MAX_RESULT_BYTES_PER_REQUEST: usize = 2 << 20;
const MAX_TAGS: usize = 64;
const TIMEOUT_SECONDS: RangeInclusive<f64> = 0.1..=3600.0;

/// The text in the fields of the form.
#[derive(Clone, Debug, Default)]
pub(super) struct RequestForm {
    pub service: String,
    pub selector: SelectorName,
    pub target: String,
    pub tags: String,
    pub payload: String,
    pub timeout: String,
}

/// A request to send.
#[derive(Clone, Debug)]
pub(super) struct NewRequest {
    pub service: Service,
    pub payload: Payload,
    pub selector: SelectorName,
    pub target: Option<Identity>,
    pub tags: Vec<Tag>,
    pub timeout: Duration,
}

/// What is wrong with a field.
#[derive(Clone, Debug)]
pub(super) struct FieldError {
    /// The name of the field.
    pub field: &'static str,
    pub message: String,
}

impl RequestForm {
    pub fn new(fields: &FormFields) -> Self {
        let text = |name| fields.get(name).to_owned();
        Self {
            service: text("service"),
            // The form offers only valid names.
            selector: fields.get("selector").parse().unwrap_or_default(),
            target: text("target"),
            tags: text("tags"),
            payload: text("payload"),
            timeout: text("timeout"),
        }
    }

    /// The request, or all errors in the form.
    pub fn parse(&self) -> Result<NewRequest, Vec<FieldError>> {
        let mut errors = Vec::new();
        let mut report = |field: &'static str, message: String| errors.push(FieldError { field, message });
        let service = self.service.trim().parse::<Service>();
        let service = service.map_err(|error| report("service", error.to_string())).ok();
        let target = match self.target.trim() {
            "" => None,
            name => parse_agent(name).map_err(|message| report("target", message)).ok(),
        };
        let lines: Vec<&str> = self.tags.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let tags: Vec<Tag> = lines
            .iter()
            .filter_map(|line| line.parse().map_err(|error| report("tags", format!("'{line}': {error}"))).ok())
            .collect();
        if lines.len() > MAX_TAGS {
            report("tags", format!("at most {MAX_TAGS} tags are allowed"));
        }
        let timeout = self.timeout.trim().parse::<f64>().ok().filter(|seconds| TIMEOUT_SECONDS.contains(seconds));
        if timeout.is_none() {
            let (min, max) = (TIMEOUT_SECONDS.start(), TIMEOUT_SECONDS.end());
            report("timeout", format!("must be a number of seconds between {min} and {max}"));
        }
        match (service, timeout) {
            (Some(service), Some(timeout)) if errors.is_empty() => Ok(NewRequest {
                service,
                payload: parse_payload(&self.payload),
                selector: self.selector,
                target,
                tags,
                timeout: Duration::from_secs_f64(timeout),
            }),
            _ => Err(errors),
        }
    }
}

/// Valid JSON as JSON, other text as a string, blank text as null. Browsers send newlines as CR LF; these become LF again.
fn parse_payload(text: &str) -> Payload {
    let text = text.replace("\r\n", "\n");
    if text.trim().is_empty() { Payload::default() } else { Payload::from_text(&text) }
}

/// An agent by its name or its identity.
fn parse_agent(text: &str) -> Result<Identity, String> {
    match text.parse::<Identity>() {
        Ok(agent) if agent.role() == Role::Agent => Ok(agent),
        _ => Identity::agent(text).map_err(|error| error.to_string()),
    }
}

/// The requests in progress and the latest ones.
#[derive(Debug)]
pub(super) struct Requests {
    stored: Mutex<VecDeque<Arc<SentRequest>>>,
    slots: Arc<Semaphore>,
}

/// Why a request was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StartError {
    TooManyRequests,
    Randomness,
}

impl From<RandomnessError> for StartError {
    fn from(_: RandomnessError) -> Self {
        StartError::Randomness
    }
}

impl Default for Requests {
    fn default() -> Self {
        Self { stored: Mutex::default(), slots: Arc::new(Semaphore::new(MAX_RUNNING_REQUESTS)) }
    }
}

impl Requests {
    /// Sends a request and collects its results, until `shutdown` completes.
    pub fn start(
        &self,
        request: NewRequest,
        mapper: Mapper,
        now: Timestamp,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<Arc<SentRequest>, StartError> {
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| StartError::TooManyRequests)?;
        let sent = Arc::new(SentRequest {
            id: Token::random()?,
            request,
            sent_at: now,
            results: Mutex::default(),
            changes: watch::Sender::new(0),
            stop: Notify::new(),
        });
        let mut stored = self.stored.lock();
        if stored.len() >= MAX_STORED_REQUESTS {
            // More are stored than may run, so at least one has ended.
            let ended = stored.iter().position(|sent| !sent.progress().status.is_running());
            stored.remove(ended.unwrap_or(0));
        }
        stored.push_back(sent.clone());
        tokio::spawn(run(sent.clone(), mapper, shutdown, slot));
        Ok(sent)
    }

    pub fn find(&self, id: &str) -> Option<Arc<SentRequest>> {
        let id: Token = id.parse().ok()?;
        self.stored.lock().iter().find(|sent| sent.id == id).cloned()
    }

    /// All stored requests, newest first.
    pub fn all(&self) -> Vec<Arc<SentRequest>> {
        self.stored.lock().iter().rev().cloned().collect()
    }
}

/// A request that was sent, with its results so far.
#[derive(Debug)]
pub(super) struct SentRequest {
    pub id: Token,
    pub request: NewRequest,
    pub sent_at: Timestamp,
    results: Mutex<Results>,
    /// The number of changes.
    changes: watch::Sender<u64>,
    stop: Notify,
}

#[derive(Clone, Debug, Default)]
struct Results {
    stored: Vec<Arc<RequestResult>>,
    stored_bytes: usize,
    progress: Progress,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    pub status: RequestStatus,
    pub answers: u64,
    pub failures: u64,
    pub intermediate: u64,
    /// Results that are counted, but not stored.
    pub not_stored: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum RequestStatus {
    #[default]
    Running,
    /// Every target has its outcome.
    Completed,
    /// The request failed as a whole.
    Failed(String),
    /// Stopped by the user or by the shutdown.
    Stopped,
}

impl RequestStatus {
    pub fn is_running(&self) -> bool {
        *self == Self::Running
    }
}

#[derive(Clone, Debug)]
pub(super) struct RequestResult {
    /// The time since the request was sent.
    pub elapsed: Duration,
    pub from: Identity,
    pub kind: ResultKind,
    pub value: DisplayValue,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ResultKind {
    /// `missed` is the number of intermediate results that were lost before this one.
    Intermediate {
        key: String,
        missed: u64,
    },
    Answer,
    Failure {
        code: String,
    },
}

async fn run(sent: Arc<SentRequest>, mapper: Mapper, shutdown: impl Future<Output = ()>, _slot: OwnedSemaphorePermit) {
    let status = tokio::select! {
        status = sent.collect(&mapper) => status,
        () = sent.stop.notified() => RequestStatus::Stopped,
        () = shutdown => RequestStatus::Stopped,
    };
    sent.update(|results| results.progress.status = status);
}

impl SentRequest {
    /// Sends the request and stores its results. Returns the final status.
    async fn collect(&self, mapper: &Mapper) -> RequestStatus {
        let started = Instant::now();
        let NewRequest { service, payload, selector, target, tags, timeout } = self.request.clone();
        let mut request = mapper.request(service.as_str(), payload).selector(selector).timeout(timeout);
        if let Some(target) = target {
            request = request.target(target);
        }
        request = tags.into_iter().fold(request, |request, tag| request.tag(tag));
        let mut events = match request.events().await {
            Ok(events) => events,
            Err(error) => return RequestStatus::Failed(error_chain(&error)),
        };
        while let Some(event) = events.next().await {
            let elapsed = started.elapsed();
            let (from, kind, value) = match event {
                Event::Intermediate { from, key, value, missed, .. } => {
                    let key = visible(&key).into_owned();
                    (from, ResultKind::Intermediate { key, missed }, DisplayValue::new(&value))
                }
                Event::Outcome { from, result: Ok(value), .. } => (from, ResultKind::Answer, DisplayValue::new(&value)),
                Event::Outcome { from, result: Err(failure), .. } => {
                    let code = visible(failure.code.as_str()).into_owned();
                    (from, ResultKind::Failure { code }, DisplayValue::new(&failure.message.as_str().into()))
                }
                Event::Failed(failure) => {
                    return RequestStatus::Failed(visible(&failure.to_string()).into_owned());
                }
            };
            self.update(|results| results.add(RequestResult { elapsed, from, kind, value }));
        }
        RequestStatus::Completed
    }

    pub fn progress(&self) -> Progress {
        self.results.lock().progress.clone()
    }

    /// The stored results from this index on.
    pub fn results_from(&self, index: usize) -> Vec<Arc<RequestResult>> {
        self.results.lock().stored.get(index..).unwrap_or_default().to_vec()
    }

    /// Changes with every result and with the status.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Ignores all results from now on.
    pub fn stop(&self) {
        self.stop.notify_one();
    }

    fn update(&self, update: impl FnOnce(&mut Results)) {
        update(&mut self.results.lock());
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Results {
    /// Counts a result, and stores it if there is room.
    fn add(&mut self, result: RequestResult) {
        let (count, share) = match result.kind {
            ResultKind::Intermediate { .. } => (&mut self.progress.intermediate, 2),
            ResultKind::Answer => (&mut self.progress.answers, 1),
            ResultKind::Failure { .. } => (&mut self.progress.failures, 1),
        };
        *count += 1;
        let bytes = self.stored_bytes + result.value.text.len();
        if self.stored.len() >= MAX_RESULTS_PER_REQUEST / share || bytes > MAX_RESULT_BYTES_PER_REQUEST / share {
            self.progress.not_stored += 1;
        } else {
            self.stored_bytes = bytes;
            self.stored.push(Arc::new(result));
        }
    }
}

/// An error and its causes in one line.
fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(form: &str) -> Result<NewRequest, Vec<FieldError>> {
        RequestForm::new(&FormFields::parse(form.as_bytes()).unwrap()).parse()
    }

    #[test]
    fn n20_parses_request_form() {
        let form = "service=/a/b&selector=all&target=nanite-fred&tags=one%0D%0A%0D%0Atwo%2C+2&timeout=0.5&payload=%7B%22a%22%3A1%7D";
        let request = parse(form).unwrap();
        assert_eq!((request.service.as_str(), request.selector), ("/a/b", SelectorName::All));
        assert_eq!(request.target.unwrap().as_str(), "nanite-fred");
        assert_eq!(request.tags.iter().map(Tag::as_str).collect::<Vec<_>>(), ["one", "two, 2"]);
        assert_eq!((request.timeout, request.payload.0), (Duration::from_millis(500), serde_json::json!({"a": 1})));
    }

    #[test]
    fn n20_payload_is_json_text_or_null() {
        assert_eq!(parse_payload("").0, serde_json::Value::Null);
        assert_eq!(parse_payload("5").0, serde_json::json!(5));
        assert_eq!(parse_payload("{\"a\":").0, serde_json::json!("{\"a\":"));
        assert_eq!(parse_payload("a\r\nb").0, serde_json::json!("a\nb"));
    }

    #[test]
    fn n20_reports_all_form_errors_at_once() {
        let fields = |form: &str| parse(form).unwrap_err().iter().map(|error| error.field).collect::<Vec<_>>();
        assert_eq!(fields("service=echo&target=a+b&tags=%01&timeout=x"), ["service", "target", "tags", "timeout"]);
        for timeout in ["", "0", "-1", "NaN", "inf", "1e9"] {
            assert_eq!(fields(&format!("service=/a/b&timeout={timeout}")), ["timeout"], "{timeout}");
        }
        let many = "x%0A".repeat(MAX_TAGS + 1);
        assert_eq!(fields(&format!("service=/a/b&timeout=1&tags={many}")), ["tags"]);
        let target = parse("service=/a/b&timeout=1&target=mapper-x").unwrap().target;
        assert_eq!(target.unwrap().as_str(), "nanite-mapper-x");
    }

    #[test]
    fn n20_stored_results_are_bounded_and_the_rest_is_counted() {
        let mut results = Results::default();
        let result = |kind: ResultKind, bytes: usize| {
            let value = DisplayValue { text: "x".repeat(bytes), is_text: true, omitted_bytes: 0 };
            RequestResult { elapsed: Duration::ZERO, from: Identity::agent("fred").unwrap(), kind, value }
        };
        let limit = MAX_RESULTS_PER_REQUEST as u64;
        for _ in 0..limit {
            results.add(result(ResultKind::Intermediate { key: "k".into(), missed: 0 }, 1));
        }
        assert_eq!((results.progress.intermediate, results.progress.not_stored), (limit, limit / 2));
        results.add(result(ResultKind::Answer, 64 * 1024));
        assert_eq!(results.stored.last().unwrap().kind, ResultKind::Answer, "there is room for outcomes");
        for _ in 0..100 {
            results.add(result(ResultKind::Failure { code: "failed".into() }, 64 * 1024));
        }
        assert!(results.stored_bytes <= MAX_RESULT_BYTES_PER_REQUEST && results.progress.not_stored > limit / 2);
        assert_eq!((results.progress.answers, results.progress.failures), (1, 100));
    }
}
