//! Requests of every kind, and what the broker saw of them.

use std::time::Instant;

use super::facts::{Agent, Asked, Broker, Failed, Parts, Searched};
use super::world::{NUMBER, SHOUT, SHOUTED, TAG, TEXT, WORDS, World};
use super::{millis, stopped};
use crate::cli::error::{CliError, Exit};
use crate::mapper::MapperDispatch;
use crate::packet::{FailureCode, Identity, Payload, SelectorName, Tag};
use crate::request::{Event, RequestBuilder, RequestError};
use crate::transport::PublishedMessage;

/// A tag that nobody carries.
const NOBODYS_TAG: &str = "on-the-moon";

/// What one pass gave.
pub(super) struct Seen {
    pub requests: Vec<Asked>,
    pub parts: Parts,
    pub failures: Vec<Failed>,
    /// All that went through the broker since the world began.
    pub passed: Vec<PublishedMessage>,
}

/// The agents, as the mapper knows them.
pub(super) async fn agents(world: &World) -> Result<Vec<Agent>, CliError> {
    let known = world.mapper.agents().await.map_err(stopped("cannot look at the agents"))?;
    let agent = |record: &std::sync::Arc<crate::mapper::AgentRecord>| Agent {
        identity: record.identity.clone(),
        load: record.status.load(),
        services: record.services.iter().map(ToString::to_string).collect(),
        tags: record.tags.iter().map(ToString::to_string).collect(),
    };
    Ok(known.iter().map(agent).collect())
}

/// All requests, once.
pub(super) async fn play(world: &World) -> Result<Seen, CliError> {
    let (ada, bob) = (&world.ada.identity, &world.bob.identity);
    let one_of_both = |from: &[Identity]| from.iter().all(|one| one == ada || one == bob);
    let in_turn = |from: &[Identity]| from.windows(2).all(|pair| pair.first() != pair.last());
    let by = |name: SelectorName| move |request: RequestBuilder<MapperDispatch>| request.selector(name);
    let (tag, moon) = (tag(TAG)?, tag(NOBODYS_TAG)?);
    let requests = vec![
        asked(world, "least_loaded", 3, by(SelectorName::LeastLoaded), |from| from.iter().all(|one| one == ada))
            .await?,
        asked(world, "random", 6, by(SelectorName::Random), one_of_both).await?,
        asked(world, "rr", 4, by(SelectorName::RoundRobin), |from| one_of_both(from) && in_turn(from)).await?,
        asked(world, "all", 1, by(SelectorName::All), |from| from == [ada.clone(), bob.clone()]).await?,
        asked(world, "target", 1, |request| request.target(bob.clone()), |from| from == [bob.clone()]).await?,
        asked(
            world,
            "tag",
            1,
            |request| request.selector(SelectorName::All).tag(tag.clone()),
            |from| from == [ada.clone()],
        )
        .await?,
    ];
    let failures = vec![fails_at_agent(world).await?, fails_for_want_of_an_agent(world, moon).await?];
    let parts = in_parts(world).await?;
    Ok(Seen { requests, parts, failures, passed: world.tap.take() })
}

fn tag(name: &str) -> Result<Tag, CliError> {
    name.parse().map_err(stopped("cannot name a tag"))
}

/// Asks for the same thing some times, and looks at who answers.
async fn asked(
    world: &World,
    by: &'static str,
    times: usize,
    choose: impl Fn(RequestBuilder<MapperDispatch>) -> RequestBuilder<MapperDispatch>,
    should_answer: impl Fn(&[Identity]) -> bool,
) -> Result<Asked, CliError> {
    let began = Instant::now();
    let mut asked =
        Asked { by, requests: times, answered_by: Vec::new(), results: Default::default(), millis: 0.0, ok: true };
    for _ in 0..times {
        let answers = choose(world.mapper.request(SHOUT, TEXT)).await.map_err(stopped("a request was not sent"))?;
        asked.ok &= answers.failures().next().is_none();
        for (from, value) in answers.results() {
            asked.ok &= *value == Payload::from(SHOUTED);
            asked.answered_by.push(from.clone());
            asked.results.insert(from.clone(), value.clone());
        }
    }
    asked.millis = millis(began) / times as f64;
    asked.ok &= asked.answered_by.len() >= times && should_answer(&asked.answered_by);
    Ok(asked)
}

/// A request that is answered part by part.
async fn in_parts(world: &World) -> Result<Parts, CliError> {
    let mut events = world.mapper.request(WORDS, TEXT).events().await.map_err(stopped("a request was not sent"))?;
    let mut seen = Parts { service: WORDS, ok: true, ..Parts::default() };
    while let Some(event) = events.next().await {
        match event {
            Event::Intermediate { key, value, missed, .. } => {
                seen.ok &= missed == 0;
                seen.parts.push((key, value));
            }
            Event::Outcome { result: Ok(value), .. } => seen.result = value,
            Event::Outcome { result: Err(failure), .. } | Event::Failed(failure) => {
                return Err(CliError::new(Exit::Failure, failure).context(WORDS));
            }
        }
    }
    let words = TEXT.split_whitespace();
    let right = words.clone().map(Payload::from).eq(seen.parts.iter().map(|(_, value)| value.clone()));
    seen.ok &= right && seen.result == Payload::from(format!("{} words", words.count()).as_str());
    Ok(seen)
}

/// A handler that returns an error.
async fn fails_at_agent(world: &World) -> Result<Failed, CliError> {
    let answers = world.mapper.request(NUMBER, TEXT).await.map_err(stopped("a request was not sent"))?;
    let from = answers.outcomes.keys().next().cloned();
    let failed = answers.failures().next();
    let (code, message) =
        failed.map_or_else(Default::default, |(_, failure)| (failure.code.to_string(), failure.message.clone()));
    let ok = code == FailureCode::Failed.as_str() && message == "invalid digit found in string";
    Ok(Failed { asked: NUMBER, from, code, message, ok })
}

/// A request that no agent fits.
async fn fails_for_want_of_an_agent(world: &World, moon: Tag) -> Result<Failed, CliError> {
    let (code, message) = match world.mapper.request(SHOUT, TEXT).tag(moon).await {
        Err(error @ RequestError::NoTarget(_)) => (FailureCode::NoTarget.to_string(), error.to_string()),
        Err(error) => (String::new(), error.to_string()),
        Ok(_) => (String::new(), "it was answered".to_owned()),
    };
    let ok = code == FailureCode::NoTarget.as_str();
    Ok(Failed { asked: SHOUT, from: None, code, message, ok })
}

/// Searches what the broker carried, and as a check of the search the same messages as they look when they are plain.
pub(super) fn what_the_broker_saw(passed: &[PublishedMessage], plain: &[PublishedMessage]) -> Broker {
    let words = [
        ("service", SHOUT, true),
        ("payload", TEXT, true),
        ("answer", SHOUTED, true),
        ("part", "midnight", true),
        ("failure", "invalid digit", true),
        ("tag", TAG, true),
        ("name", "nanite-ada", false),
    ];
    let searched: Vec<Searched> = words
        .into_iter()
        .map(|(what, word, secret)| {
            let (found, found_when_plain) = (count(passed, word), count(plain, word));
            Searched { what, word, secret, found, found_when_plain }
        })
        .collect();
    let lengths = || passed.iter().map(|message| message.body.len());
    Broker {
        messages: passed.len(),
        bytes: lengths().sum(),
        smallest: lengths().min().unwrap_or(0),
        largest: lengths().max().unwrap_or(0),
        plaintext_found: searched.iter().filter(|word| word.secret).map(|word| word.found).sum(),
        searched,
    }
}

/// How many of these messages hold this word.
fn count(passed: &[PublishedMessage], word: &str) -> usize {
    let holds = |body: &[u8]| body.windows(word.len()).any(|window| window == word.as_bytes());
    passed.iter().filter(|message| holds(&message.body)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Destination, MemoryBroker, PublishRequest, Transport};
    use std::time::Duration;

    #[tokio::test]
    async fn u01_the_search_finds_a_word_anywhere_in_a_message() {
        let broker = MemoryBroker::new();
        let tap = broker.tap(10);
        for body in ["the eagle lands", "xxthe eagle lan", "eagl", "", "\0\u{1}eagle"] {
            let message = PublishRequest {
                destination: Destination::Exchange(crate::transport::Exchange("x".into())),
                body: body.as_bytes().into(),
                content_type: "text".into(),
                message_id: "1".into(),
                expires_in: None,
                persistent: false,
            };
            broker.connect().publish(message, Duration::from_secs(1)).await.unwrap();
        }
        let passed = tap.take();
        assert_eq!(passed.len(), 5);
        assert_eq!((count(&passed, "eagle"), count(&passed, "lands"), count(&passed, "eagles")), (3, 1, 0));
    }
}
