//! `nanite demo`: a complete system in this process, to look at. It needs no broker and leaves nothing behind.
//!
//! `system` starts the nodes, the scenes here use and attack them, `report` holds the results and prints them.

mod report;
mod system;

use std::sync::Arc;
use std::time::{Duration, Instant};

use report::{
    AgentInfo, BrokerView, FailedRequest, PartialAnswers, Rate, Rates, Refusal, Report, SearchedWord, Selection, millis,
};
use system::{NUMBER, Pki, RunningAgent, SHOUT, SHOUTED, System, TAG, TEXT, WORDS, failed};

use super::error::{CliError, Exit, Result};
use super::{output, runtime};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::mapper::MapperDispatch;
use crate::packet::{FailureCode, Identity, Payload, Request, SelectorName, Service, Tag};
use crate::request::{Event, RequestBuilder, RequestError};
use crate::security::CONTENT_TYPE;
use crate::serializer::{Audience, Codec, Json, OpenErrorKind, PlainSerializer, SealRequest, Serializer};
use crate::transport::{Destination, MemoryTransport, PublishRequest, PublishedMessage, Transport, topology};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print one JSON object with all results.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<Exit> {
        let report = runtime::run(demonstrate(!self.json))?;
        if self.json {
            output::json(&report)?;
        }
        Ok(if report.ok { Exit::Success } else { Exit::Failure })
    }
}

/// Plays all scenes, and prints each if `visible`. Unexpected results are in the report; an error means that it could not go on.
async fn demonstrate(visible: bool) -> Result<Report> {
    let print = |lines: Vec<String>| if visible { output::line(&lines.join("\n")) } else { Ok(()) };
    let start = Instant::now();
    let mut report = Report::default();
    print(report::title())?;

    let pki = Pki::create()?;
    report.certificates = pki.certificates(start);
    print(report.certificates.lines())?;

    let started = Instant::now();
    let (secure, plain) = (System::secure(&pki).await?, System::plain(&pki).await?);
    report.agents = agents(&secure).await?;
    print(report.agent_lines(millis(started)))?;

    let (results, plain_results) = (requests(&secure).await?, requests(&plain).await?);
    (report.requests, report.parts, report.failures) = (results.requests, results.parts, results.failures);
    report.broker = search(&results.messages, &plain_results.messages);
    print(report.request_lines(&format!("{SHOUT} \"{TEXT}\"")))?;
    print(report.parts_and_failure_lines())?;
    print(report.broker.lines())?;

    report.refusals = attacks(&pki, &secure, &results.messages).await?;
    print(report.refusal_lines())?;

    print(report::rates_heading(&IN_FLIGHT))?;
    for (system, of) in [(&secure, "secure"), (&plain, "plain")] {
        let rates = Rates { of, at: rates(system).await? };
        print(rates.lines())?;
        report.rates.push(rates);
    }
    report.finish(start);
    print(report.summary())?;
    Ok(report)
}

/// A tag that no agent has.
const UNKNOWN_TAG: &str = "on-the-moon";
/// How long an agent may take to refuse a message.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(30);
/// More than the longest lifetime of a live message.
const TOO_OLD: Duration = Duration::from_secs(120);
/// How many concurrent requests the rates are measured with.
pub(super) const IN_FLIGHT: [usize; 2] = [1, 64];
const MEASURING_TIME: Duration = Duration::from_millis(500);

struct RequestResults {
    pub requests: Vec<Selection>,
    pub parts: PartialAnswers,
    pub failures: Vec<FailedRequest>,
    /// All messages that the broker has carried so far.
    pub messages: Vec<PublishedMessage>,
}

/// The agents, as the mapper knows them.
async fn agents(system: &System) -> Result<Vec<AgentInfo>> {
    let records = system.mapper.agents().await.map_err(failed("cannot list the agents"))?;
    let info = records.iter().map(|record| AgentInfo {
        identity: record.identity.clone(),
        load: record.status.load(),
        services: record.services.iter().map(ToString::to_string).collect(),
        tags: record.tags.iter().map(ToString::to_string).collect(),
    });
    Ok(info.collect())
}

/// Every kind of request, once.
async fn requests(system: &System) -> Result<RequestResults> {
    type Builder<'a> = RequestBuilder<MapperDispatch>;
    let (ada, bob) = (system.ada.agent.identity(), system.bob.agent.identity());
    let known = |from: &[Identity]| from.iter().all(|identity| identity == ada || identity == bob);
    let alternating = |from: &[Identity]| known(from) && from.windows(2).all(|pair| pair.first() != pair.last());
    let by = |name: SelectorName| move |request: Builder| request.selector(name);
    let tag = |name: &str| name.parse::<Tag>().map_err(failed("invalid tag"));
    let (known_tag, unknown_tag) = (tag(TAG)?, tag(UNKNOWN_TAG)?);
    let all_tagged = |request: Builder| request.selector(SelectorName::All).tag(known_tag.clone());
    let only = |expected: &Identity, from: &[Identity]| from.iter().all(|identity| identity == expected);
    let requests = vec![
        select(system, "least_loaded", 3, by(SelectorName::LeastLoaded), |from| only(ada, from)).await?,
        select(system, "random", 6, by(SelectorName::Random), known).await?,
        select(system, "rr", 4, by(SelectorName::RoundRobin), alternating).await?,
        select(system, "all", 1, by(SelectorName::All), |from| from == [ada.clone(), bob.clone()]).await?,
        select(system, "target", 1, |request| request.target(bob.clone()), |from| from == [bob.clone()]).await?,
        select(system, "tag", 1, all_tagged, |from| from == [ada.clone()]).await?,
    ];
    let failures = failures(system, unknown_tag).await?;
    let parts = partial_answers(system).await?;
    Ok(RequestResults { requests, parts, failures, messages: system.tap.take() })
}

/// Sends the same request several times, and checks the answers and who sent them.
async fn select(
    system: &System,
    by: &'static str,
    count: usize,
    options: impl Fn(RequestBuilder<MapperDispatch>) -> RequestBuilder<MapperDispatch>,
    expected: impl Fn(&[Identity]) -> bool,
) -> Result<Selection> {
    let start = Instant::now();
    let mut selection = Selection { by, requests: count, ok: true, ..Selection::default() };
    for _ in 0..count {
        let answers = options(system.mapper.request(SHOUT, TEXT)).await.map_err(failed("a request was not sent"))?;
        selection.ok &= answers.failures().next().is_none();
        for (from, value) in answers.results() {
            selection.ok &= *value == Payload::from(SHOUTED);
            selection.answered_by.push(from.clone());
            selection.results.insert(from.clone(), value.clone());
        }
    }
    selection.millis = millis(start) / count as f64;
    selection.ok &= selection.answered_by.len() >= count && expected(&selection.answered_by);
    Ok(selection)
}

async fn partial_answers(system: &System) -> Result<PartialAnswers> {
    let mut events = system.mapper.request(WORDS, TEXT).events().await.map_err(failed("a request was not sent"))?;
    let mut answers = PartialAnswers { service: WORDS, ok: true, ..PartialAnswers::default() };
    while let Some(event) = events.next().await {
        match event {
            Event::Intermediate { key, value, missed, .. } => {
                answers.ok &= missed == 0;
                answers.parts.push((key, value));
            }
            Event::Outcome { result: Ok(value), .. } => answers.result = value,
            Event::Outcome { result: Err(failure), .. } | Event::Failed(failure) => {
                return Err(CliError::new(Exit::Failure, failure).context(WORDS));
            }
        }
    }
    let words = TEXT.split_whitespace();
    answers.ok &= words.clone().map(Payload::from).eq(answers.parts.iter().map(|(_, value)| value.clone()));
    answers.ok &= answers.result == Payload::from(format!("{} words", words.count()).as_str());
    Ok(answers)
}

/// A request to a handler that returns an error, and one that no agent matches.
async fn failures(system: &System, unknown_tag: Tag) -> Result<Vec<FailedRequest>> {
    let answers = system.mapper.request(NUMBER, TEXT).await.map_err(failed("a request was not sent"))?;
    let from = answers.outcomes.keys().next().cloned();
    let failure = answers.failures().next().map(|(_, failure)| (failure.code.to_string(), failure.message.clone()));
    let (code, message) = failure.unwrap_or_default();
    let ok = code == FailureCode::Failed.as_str() && message == "invalid digit found in string";
    let failing = FailedRequest { asked: NUMBER, from, code, message, ok };

    let (ok, message) = match system.mapper.request(SHOUT, TEXT).tag(unknown_tag).await {
        Err(error) => (matches!(error, RequestError::NoTarget(_)), error.to_string()),
        Ok(_) => (false, "it was answered".to_owned()),
    };
    let code = if ok { FailureCode::NoTarget.to_string() } else { String::new() };
    Ok(vec![failing, FailedRequest { asked: SHOUT, from: None, code, message, ok }])
}

/// Searches the broker's messages for words, and to check the search, the same messages in plain text.
fn search(messages: &[PublishedMessage], plain: &[PublishedMessage]) -> BrokerView {
    let words = [
        ("service", SHOUT, true),
        ("payload", TEXT, true),
        ("answer", SHOUTED, true),
        ("part", "midnight", true),
        ("failure", "invalid digit", true),
        ("tag", TAG, true),
        ("name", "nanite-ada", false),
    ];
    let searched = words.map(|(what, word, secret)| {
        let (found, found_when_plain) = (count_containing(messages, word), count_containing(plain, word));
        SearchedWord { what, word, secret, found, found_when_plain }
    });
    let lengths = || messages.iter().map(|message| message.body.len());
    BrokerView {
        messages: messages.len(),
        bytes: lengths().sum(),
        smallest: lengths().min().unwrap_or(0),
        largest: lengths().max().unwrap_or(0),
        plaintext_found: searched.iter().filter(|word| word.secret).map(|word| word.found).sum(),
        searched: searched.into(),
    }
}

fn count_containing(messages: &[PublishedMessage], word: &str) -> usize {
    let contains = |body: &[u8]| body.windows(word.len()).any(|window| window == word.as_bytes());
    messages.iter().filter(|message| contains(&message.body)).count()
}

/// Puts messages into the queues of agents, as anyone with access to the broker could, and watches what the agents do.
async fn attacks(pki: &Pki, system: &System, captured: &[PublishedMessage]) -> Result<Vec<Refusal>> {
    use OpenErrorKind as Kind;
    let (ada, bob, now) = (&system.ada, &system.bob, SystemClock.now());
    let ada_inbox = Destination::Queue(topology::agent_inbox_name(ada.agent.identity().as_str()));
    let valid = captured.iter().find(|message| message.destination == ada_inbox);
    let valid = &valid.ok_or_else(|| CliError::new(Exit::Failure, "no request was sent to ada"))?.body;
    let (tower, impostor, other_agent) =
        (pki.serializer(&pki.tower)?, pki.impostor(&pki.tower)?, pki.serializer(&pki.bob)?);
    let plain = PlainSerializer::json(tower.identity().clone());
    let sealed = |by: &dyn Serializer, at: Timestamp| -> Result<Vec<u8>> {
        // Most of the message is the encrypted payload.
        let service: Service = SHOUT.parse().map_err(failed("invalid service"))?;
        let request = Request::new(service, Payload::from(TEXT.repeat(200).as_str()));
        let audience = Audience::One(ada.agent.identity().clone());
        let sealed = by.seal(&request.into(), &SealRequest::new(&audience, at));
        Ok(sealed.map_err(failed("cannot seal a message"))?.bytes.to_vec())
    };
    let forged = sealed(&*impostor, now)?;
    let mut changed = sealed(&*tower, now)?;
    let middle = changed.len() / 2;
    changed.iter_mut().skip(middle).take(1).for_each(|byte| *byte ^= 1);
    let (wrong_role, old) = (sealed(&*other_agent, now)?, sealed(&*tower, now.saturating_sub(TOO_OLD))?);
    let mut noise = vec![0; 700];
    openssl::rand::rand_bytes(&mut noise).map_err(failed("cannot create random bytes"))?;
    let downgraded = sealed(&plain, now)?;

    let attacks: [(_, _, _, Arc<[u8]>, _); 8] = [
        ("forged", "in the mapper's name, by a stranger's key", ada, forged.into(), Kind::UnknownSigner),
        ("changed", "a valid message with one bit flipped", ada, changed.into(), Kind::BadSignature),
        ("replayed", "a valid message, a second time", ada, valid.clone(), Kind::Replayed),
        ("re-targeted", "a valid message for ada, sent to bob", bob, valid.clone(), Kind::WrongDestination),
        ("wrong role", "bob's own certificate, a request to ada", ada, wrong_role.into(), Kind::NotAuthorized),
        ("old", "a valid message, two minutes late", ada, old.into(), Kind::NotFresh),
        ("noise", "700 random bytes", ada, noise.into(), Kind::Malformed),
        ("downgraded", "a plain request, with no signature", ada, downgraded.into(), Kind::Unsupported),
    ];
    let attacker = system.broker.connect();
    let mut refusals = Vec::new();
    for (attack, how, target, body, expected) in attacks {
        let identity = target.agent.identity().clone();
        let message = PublishRequest {
            destination: Destination::Queue(topology::agent_inbox_name(identity.as_str())),
            body,
            content_type: if attack == "downgraded" { Json.content_type() } else { CONTENT_TYPE }.to_owned(),
            message_id: attack.to_owned(),
            expires_in: None,
            persistent: false,
        };
        let (refused, handler_ran) = publish_and_wait(&attacker, message, target).await?;
        refusals.push(Refusal { attack, how, at: identity, expected, refused, handler_ran });
    }
    Ok(refusals)
}

/// Publishes a message to an agent, and waits until it is refused or a handler is called.
async fn publish_and_wait(
    attacker: &MemoryTransport,
    message: PublishRequest,
    target: &RunningAgent,
) -> Result<(Option<OpenErrorKind>, bool)> {
    let (refusals_before, calls_before) = (target.agent.refusals(), target.calls());
    attacker.publish(message, REFUSAL_TIMEOUT).await.map_err(failed("cannot publish"))?;
    let deadline = Instant::now() + REFUSAL_TIMEOUT;
    loop {
        let refusals = target.agent.refusals();
        let increased = refusals.iter().zip(&refusals_before).find(|(now, before)| now.1 > before.1);
        let (refused, handler_ran) = (increased.map(|((kind, _), _)| *kind), target.calls() > calls_before);
        if refused.is_some() || handler_ran || Instant::now() > deadline {
            return Ok((refused, handler_ran));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Measures round trips per second with each number of concurrent requests.
async fn rates(system: &System) -> Result<Vec<Rate>> {
    let mut rates = Vec::new();
    for in_flight in IN_FLIGHT {
        let start = Instant::now();
        let send = |mapper: crate::mapper::Mapper| async move {
            let (mut answered, mut failed) = (0, 0);
            while start.elapsed() < MEASURING_TIME {
                match mapper.request(SHOUT, TEXT).selector(SelectorName::RoundRobin).await {
                    Ok(answers) if answers.results().count() == 1 => answered += 1,
                    _ => failed += 1,
                }
            }
            (answered, failed)
        };
        let senders: Vec<_> = (0..in_flight).map(|_| tokio::spawn(send(system.mapper.clone()))).collect();
        let mut rate = Rate { in_flight, ..Rate::default() };
        for sender in senders {
            let (answered, failures) = sender.await.map_err(failed("a measurement failed"))?;
            rate.round_trips += answered;
            rate.failed += failures;
        }
        rate.seconds = start.elapsed().as_secs_f64();
        rate.per_second = rate.round_trips as f64 / rate.seconds;
        rates.push(rate);
    }
    Ok(rates)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::MemoryBroker;

    #[tokio::test]
    async fn u01_search_finds_a_word_anywhere_in_a_message() {
        let broker = MemoryBroker::new();
        let tap = broker.tap(10);
        for body in ["the eagle lands", "xxthe eagle lan", "eagl", "", "\0\u{1}eagle"] {
            let message = PublishRequest {
                destination: Destination::exchange("x"),
                body: body.as_bytes().into(),
                content_type: "text".into(),
                message_id: "1".into(),
                expires_in: None,
                persistent: false,
            };
            broker.connect().publish(message, Duration::from_secs(1)).await.unwrap();
        }
        let messages = tap.take();
        assert_eq!(messages.len(), 5);
        let count = |word| count_containing(&messages, word);
        assert_eq!((count("eagle"), count("lands"), count("eagles")), (3, 1, 0));
    }
}
