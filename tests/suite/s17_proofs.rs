//! A hostile mapper with a valid certificate cannot answer for an agent: the node that asks through it accepts only what the agent
//! signed as the answer to this request.

use std::time::Duration;

use nanite::agent::{Agent, Context, actor, reply};
use nanite::packet::{Chunk, Failure, FailureCode, ForwardedProof, Identity, Outcome, Packet, Payload};
use nanite::request::{Answers, Event, Events, RequestError};
use nanite::serializer::OpenErrorKind;
use serde_json::{Value, json};

use crate::harness::hostile_mapper::{HostileMapper, Taken, forwarded};
use crate::harness::pki::{agent, mapper};
use crate::harness::system::{System, start};
use crate::harness::{WAIT_TIMEOUT, wait_until};

/// The asker `boss`, the agents `fred` and `bob`, and the hostile mapper between them.
struct Stage {
    boss: Agent,
    evil: HostileMapper,
    system: System,
    _workers: [Agent; 2],
}

impl Stage {
    async fn new() -> Self {
        let system = System::settled();
        let worker = async |name: &str| {
            let own = name.to_owned();
            let bank = actor("bank").expose("balance", move |account: Value, context: Context| {
                let own = own.clone();
                async move {
                    context.emit("looking", "here").await?;
                    context.emit("looking", "there").await?;
                    reply(json!({"account": account, "by": own}))
                }
            });
            start(system.agent(name).actor(bank)).await
        };
        let workers = [worker("fred").await, worker("bob").await];
        let evil = HostileMapper::start(&system, "evil").await;
        let boss = start(system.agent("boss")).await;
        Self { boss, evil, system, _workers: workers }
    }

    /// The asker makes a request, which the hostile mapper takes.
    async fn request(&mut self, account: &str) -> (Events, Taken) {
        self.request_of(account, None).await
    }

    async fn request_of(&mut self, account: &str, target: Option<Identity>) -> (Events, Taken) {
        let mut request = self.boss.proxy().request("/bank/balance", account).timeout(Duration::from_secs(30));
        if let Some(target) = target {
            request = request.target(target);
        }
        (request.events().await.unwrap(), self.evil.take().await)
    }

    /// The outcome of an agent for this request, asked as an honest mapper does, with its proof.
    async fn proof(&mut self, taken: &Taken, by: &str) -> ForwardedProof {
        let request = self.evil.honest(taken);
        self.evil.ask(&agent(by), request).await.forwarded()
    }

    async fn forward(&self, taken: &Taken, proofs: Vec<ForwardedProof>) {
        self.evil.reply(taken, self.evil.outcome(taken, no_results(), proofs)).await;
    }

    fn refused(&self, kind: OpenErrorKind) -> u64 {
        self.boss.refusals().into_iter().find(|(refused, _)| *refused == kind).map_or(0, |(_, count)| count)
    }

    /// The request ended without a value, and one answer was refused at this step.
    async fn refuses(&self, events: Events, kind: OpenErrorKind, what: &str) {
        let answers = answers(events).await;
        if let Ok(answers) = &answers {
            assert!(!answers.outcomes.is_empty(), "{what}: the request ended without an outcome");
            for result in answers.outcomes.values() {
                let code = result.as_ref().map_err(|failure| &failure.code);
                assert_eq!(code, Err(&FailureCode::Lost), "{what}");
            }
        } else {
            assert!(
                matches!(&answers, Err(RequestError::Refused(failure)) if failure.code == FailureCode::Lost),
                "{what}: {answers:?}"
            );
        }
        let all: Vec<_> = self.boss.refusals().into_iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(self.refused(kind), 1, "{what}: {all:?}");
        assert_eq!(all.len(), 1, "{what}: {all:?}");
    }
}

async fn answers(events: Events) -> Result<Answers, RequestError> {
    tokio::time::timeout(WAIT_TIMEOUT, events.answers()).await.expect("the request ends in time")
}

fn no_results() -> Payload {
    json!({"results": {}, "failures": {}}).into()
}

fn balance(account: &str, by: &str) -> Payload {
    json!({"account": account, "by": by}).into()
}

#[tokio::test]
async fn s17_answer_through_a_mapper_is_accepted_with_the_agents_proof() {
    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let proofs = vec![stage.proof(&taken, "fred").await, stage.proof(&taken, "bob").await];
    stage.forward(&taken, proofs).await;
    let answers = answers(events).await.unwrap();
    let outcomes: Vec<_> = answers.outcomes.into_iter().collect();
    assert_eq!(outcomes, [(agent("bob"), Ok(balance("a", "bob"))), (agent("fred"), Ok(balance("a", "fred")))]);
    assert!(stage.boss.refusals().iter().all(|(_, count)| *count == 0));
}

#[tokio::test]
async fn s17_mapper_cannot_forge_an_answer() {
    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let forged = json!({"results": {"nanite-fred": {"account": "a", "by": "evil"}}, "failures": {}});
    stage.evil.reply(&taken, stage.evil.outcome(&taken, forged.into(), Vec::new())).await;
    stage.refuses(events, OpenErrorKind::NotAuthorized, "no proof").await;
}

#[tokio::test]
async fn s17_mapper_cannot_sign_for_an_agent() {
    let mut stage = Stage::new().await;
    // The mapper signs an answer itself: another hostile mapper opens it, and so has a proof of it.
    let (events, taken) = stage.request("a").await;
    let request = stage.evil.honest(&taken);
    let origin = nanite::packet::RequestOrigin::of(&request).unwrap();
    let mut accomplice = HostileMapper::start(&stage.system, "accomplice").await;
    let own = stage.evil.link.identity().clone();
    let mut outcome = Outcome::new(taken.request.token.unwrap(), mapper("accomplice"), own, Ok("forged".into()));
    outcome.request_origin = Some(origin.into());
    let inbox = nanite::transport::topology::process_queue_name("mapper-accomplice", accomplice.link.instance());
    let message = nanite::link::Outbound::new(outcome, mapper("accomplice"));
    stage.evil.link.send(message, nanite::transport::Destination::Queue(inbox)).await.unwrap();
    let proof = accomplice.answered().await.forwarded();
    stage.forward(&taken, vec![proof]).await;
    stage.refuses(events, OpenErrorKind::WrongDestination, "signed by a mapper").await;
}

#[tokio::test]
async fn s17_mapper_cannot_alter_an_answer() {
    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let mut proof = stage.proof(&taken, "fred").await;
    let at = proof.body.0.windows(4).rposition(|bytes| bytes == b"fred").unwrap();
    proof.body.0[at..at + 4].copy_from_slice(b"evil");
    stage.forward(&taken, vec![proof]).await;
    stage.refuses(events, OpenErrorKind::CannotOpen, "another value").await;

    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let mut proof = stage.proof(&taken, "fred").await;
    *proof.signer_info.0.last_mut().unwrap() ^= 1;
    stage.forward(&taken, vec![proof]).await;
    stage.refuses(events, OpenErrorKind::BadSignature, "another signature").await;
}

#[tokio::test]
async fn s17_mapper_cannot_swap_the_answers_of_two_agents() {
    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let (mut fred, bob) = (stage.proof(&taken, "fred").await, stage.proof(&taken, "bob").await);
    (fred.salt, fred.body) = (bob.salt, bob.body);
    stage.forward(&taken, vec![fred]).await;
    stage.refuses(events, OpenErrorKind::CannotOpen, "bob's answer under fred's signature").await;
}

#[tokio::test]
async fn s17_mapper_cannot_answer_with_another_agent_than_the_target() {
    let mut stage = Stage::new().await;
    let (events, taken) = stage.request_of("a", Some(agent("fred"))).await;
    let proof = stage.proof(&taken, "bob").await;
    stage.forward(&taken, vec![proof]).await;
    stage.refuses(events, OpenErrorKind::NotAuthorized, "another agent").await;
}

#[tokio::test]
async fn s17_mapper_cannot_swap_the_answers_to_two_requests() {
    let mut stage = Stage::new().await;
    let (first, taken_first) = stage.request("a").await;
    // The same question, so that only the token tells them apart.
    let (_second, taken_second) = stage.request("a").await;
    let proof = stage.proof(&taken_second, "fred").await;
    stage.forward(&taken_first, vec![proof]).await;
    stage.refuses(first, OpenErrorKind::WrongDestination, "the answer to another request").await;
}

#[tokio::test]
async fn s17_mapper_cannot_replay_an_older_answer() {
    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let old = stage.proof(&taken, "fred").await;
    stage.forward(&taken, vec![old.clone()]).await;
    assert_eq!(answers(events).await.unwrap().results().count(), 1);
    let (events, taken) = stage.request("a").await;
    stage.forward(&taken, vec![old]).await;
    stage.refuses(events, OpenErrorKind::WrongDestination, "an older answer").await;
}

#[tokio::test]
async fn s17_mapper_cannot_give_an_answer_to_another_asker() {
    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let mut request = stage.evil.honest(&taken);
    request.on_behalf_of = Some(agent("bob"));
    let proof = stage.evil.ask(&agent("fred"), request).await.forwarded();
    stage.forward(&taken, vec![proof]).await;
    stage.refuses(events, OpenErrorKind::WrongDestination, "on behalf of another node").await;
}

#[tokio::test]
async fn s17_mapper_cannot_ask_another_question_than_the_asker() {
    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let mut request = stage.evil.honest(&taken);
    request.payload = "b".into();
    let proof = stage.evil.ask(&agent("fred"), request).await.forwarded();
    stage.forward(&taken, vec![proof]).await;
    stage.refuses(events, OpenErrorKind::WrongDestination, "the answer to another payload").await;
}

#[tokio::test]
async fn s17_outcome_is_no_intermediate_result_and_a_part_no_outcome() {
    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let request = stage.evil.honest(&taken);
    stage.evil.send(&agent("fred"), request).await;
    let part = stage.evil.answered().await;
    assert!(matches!(part.inbound.packet, Packet::Intermediate(_)));
    stage.forward(&taken, vec![part.forwarded()]).await;
    stage.refuses(events, OpenErrorKind::Malformed, "an intermediate result as an outcome").await;
}

#[tokio::test]
async fn s17_proof_of_a_node_of_another_ca_or_without_form_is_refused() {
    let mut stage = Stage::new().await;
    let other = System::settled();
    let _fred = start(other.agent("fred").actor(actor("bank").expose("balance", |(): ()| async { reply(1) }))).await;
    let mut accomplice = HostileMapper::start(&other, "evil").await;
    let (events, taken) = stage.request("a").await;
    let request = accomplice.honest(&taken);
    let proof = accomplice.ask(&agent("fred"), request).await.forwarded();
    stage.forward(&taken, vec![proof]).await;
    stage.refuses(events, OpenErrorKind::UnknownSigner, "not in the store").await;

    // The store knows the certificate; its CA is another one.
    let mut stage = Stage::new().await;
    stage.system.pki().peers.put(other.pki().credentials(&agent("fred")).certificate());
    let (events, taken) = stage.request("a").await;
    let request = accomplice.honest(&taken);
    let proof = accomplice.ask(&agent("fred"), request).await.forwarded();
    stage.forward(&taken, vec![proof]).await;
    stage.refuses(events, OpenErrorKind::BadCertificate, "of another CA").await;

    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let mut broken = stage.proof(&taken, "fred").await;
    broken.certificates = vec![broken.certificates[0].clone(); 5];
    stage.forward(&taken, vec![broken]).await;
    stage.refuses(events, OpenErrorKind::Malformed, "more certificates than a proof has").await;

    let mut stage = Stage::new().await;
    let (events, taken) = stage.request("a").await;
    let mut long = stage.proof(&taken, "fred").await;
    long.certificates[0] = Chunk(vec![0; 300 << 10]);
    stage.forward(&taken, vec![long]).await;
    stage.refuses(events, OpenErrorKind::TooLarge, "a proof that is too long").await;
}

#[tokio::test]
async fn s17_mapper_may_only_report_that_an_answer_is_missing() {
    let mut stage = Stage::new().await;
    let failure = |code: &str| json!({"code": code, "message": "says the mapper"});
    let (events, taken) = stage.request("a").await;
    let failures = json!({"nanite-fred": failure("lost"), "nanite-bob": failure("bad_payload")});
    let results = json!({"results": {}, "failures": failures});
    stage.evil.reply(&taken, stage.evil.outcome(&taken, results.into(), Vec::new())).await;
    let outcomes = answers(events).await.unwrap().outcomes;
    let lost = outcomes[&agent("fred")].clone().unwrap_err();
    assert_eq!((lost.code, lost.reported_by), (FailureCode::Lost, Some(mapper("evil"))));
    let refused = outcomes[&agent("bob")].clone().unwrap_err();
    assert_eq!((refused.code, refused.reported_by), (FailureCode::Lost, None), "only the agent may say that");
    assert_eq!(stage.refused(OpenErrorKind::NotAuthorized), 1);

    // As a whole.
    let (mut events, taken) = stage.request("a").await;
    let mut outcome = stage.evil.outcome(&taken, no_results(), Vec::new());
    outcome.failure = Some(Failure::new(FailureCode::Other("sold".into()), "says the mapper"));
    stage.evil.reply(&taken, outcome).await;
    let Some(Event::Failed(failure)) = tokio::time::timeout(WAIT_TIMEOUT, events.next()).await.unwrap() else {
        panic!("the request failed as a whole");
    };
    assert_eq!((failure.code, failure.reported_by), (FailureCode::Lost, Some(mapper("evil"))));
}

#[tokio::test]
async fn s17_intermediate_results_through_a_mapper_have_the_agents_proof() {
    let mut stage = Stage::new().await;
    let (mut events, taken) = stage.request("a").await;
    let (_other, other) = stage.request("a").await;
    let fred = agent("fred");
    let mut parts = async |taken: &Taken| {
        let request = stage.evil.honest(taken);
        stage.evil.send(&fred, request).await;
        let (first, second) = (stage.evil.answered().await, stage.evil.answered().await);
        (first.forwarded(), second.forwarded(), stage.evil.answered().await.forwarded())
    };
    let (_, foreign, _) = parts(&other).await;
    let (first, second, outcome) = parts(&taken).await;
    let send = async |proof: Option<ForwardedProof>| {
        let mut part = stage.evil.part(&taken, &fred, "forged");
        part.proof = proof.map(Box::new);
        stage.evil.reply(&taken, part).await;
    };
    let mut altered = first.clone();
    altered.salt.0[0] ^= 1;
    send(None).await;
    send(Some(altered)).await;
    send(Some(foreign)).await;
    send(Some(outcome.clone())).await;
    // The first is missing, and the second comes twice.
    send(Some(second.clone())).await;
    send(Some(second)).await;
    send(Some(first)).await;
    stage.forward(&taken, vec![outcome]).await;
    let mut seen = Vec::new();
    while let Some(event) = tokio::time::timeout(WAIT_TIMEOUT, events.next()).await.unwrap() {
        seen.push(match event {
            Event::Intermediate { from, key, value, missed, .. } => format!("{from} {key} {value} {missed}"),
            Event::Outcome { from, result, .. } => format!("{from} {}", result.unwrap()),
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(seen, [r#"nanite-fred looking "there" 1"#, r#"nanite-fred {"account":"a","by":"fred"}"#]);
    for (kind, count) in [
        (OpenErrorKind::NotAuthorized, 1),
        (OpenErrorKind::CannotOpen, 1),
        (OpenErrorKind::WrongDestination, 1),
        (OpenErrorKind::Malformed, 1),
    ] {
        assert_eq!(stage.refused(kind), count, "{kind}: {:?}", stage.boss.refusals());
    }
}

#[tokio::test]
async fn s17_answers_keep_their_proof_through_two_mappers() {
    let system = System::settled();
    let boss = start(system.agent("boss")).await;
    let asking = system.mapper("m1").offline_failsafe(true).start().await.unwrap();
    // No agent offers it: the request waits in the offline queue, in the name of m1.
    let mut events = boss.proxy().request("/bank/balance", "a").events().await.unwrap();
    let m2 = system.mapper("m2").offline_redelivery_frequency(Duration::from_millis(50));
    let _m2 = m2.start().await.unwrap();
    system.waiting(nanite::transport::topology::REQUEST, 0).await;
    wait_until("the request is held", async || {
        system.broker.queued_messages(nanite::transport::topology::OFFLINE).is_empty()
    })
    .await;
    let bank = actor("bank").expose("balance", |account: String| async move { reply(account) });
    let _fred = start(system.agent("fred").actor(bank)).await;
    let event = tokio::time::timeout(WAIT_TIMEOUT, events.next()).await.unwrap();
    let Some(Event::Outcome { from, result, proof: Some(proof), .. }) = event else { panic!("{event:?}") };
    assert_eq!((from, result), (agent("fred"), Ok("a".into())));
    assert!(forwarded(&proof).certificates.len() == 1);
    drop(asking);
}
