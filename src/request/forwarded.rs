//! What a node accepts of a mapper's answer to its proxied request: the answers of agents with their proofs, for this request; of the
//! mapper itself only that there is no answer.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::answers::{Answers, Event};
use crate::packet::{
    Failure, FailureCode, ForwardedProof, Identity, Intermediate, Kind, MessageId, Outcome, Packet, Payload,
    RequestOrigin, Role,
};
use crate::serializer::{Forwarded, OpenError, OpenErrorKind, Proof, Verified};

/// The answers that a mapper forwards: verified, or refused.
pub(super) type ForwardedAnswers = Vec<Result<Forwarded, OpenError>>;

/// A request that a mapper answers for all targets.
#[derive(Clone, Debug)]
pub(crate) struct HandedOver {
    /// The message to the mappers.
    message: MessageId,
    /// What the agents sign with their answers.
    origin: RequestOrigin,
    /// The only agent that may answer.
    target: Option<Identity>,
    /// The sequence number of the next intermediate result of each agent.
    next_parts: BTreeMap<Identity, u64>,
}

impl HandedOver {
    pub fn new(message: MessageId, origin: RequestOrigin, target: Option<Identity>) -> Self {
        Self { message, origin, target, next_parts: BTreeMap::new() }
    }

    /// The message to the mappers was sent again as `new`. False if it was not `old`.
    pub fn sent_again(&mut self, old: MessageId, new: MessageId) -> bool {
        let is_current = self.message == old;
        if is_current {
            self.message = new;
        }
        is_current
    }

    /// Whether a message is the answer of a mapper to this request.
    pub fn is_answered_by(&self, from: &Identity, signer: Option<&Verified>) -> bool {
        from.role() == Role::Mapper && signer.is_none_or(|signer| signer.in_reply_to() == Some(self.message))
    }

    /// The outcomes in a mapper's signed answer. What is not proven is added to `refused`.
    pub fn outcomes(
        &self,
        mapper: &Identity,
        answer: Outcome,
        forwarded: ForwardedAnswers,
        refused: &mut Vec<OpenError>,
    ) -> Result<Vec<Event>, Failure> {
        if let Some(failure) = answer.failure {
            return Err(reported(failure, mapper, MAY_FAIL_AS));
        }
        let mut outcomes = BTreeMap::new();
        let mut unproven = BTreeMap::new();
        let mut refuse = |error: OpenError, outcome: Failure| {
            if let Some(agent) = &error.claimed {
                unproven.entry(agent.clone()).or_insert(outcome);
            }
            refused.push(error);
        };
        for one in forwarded {
            match one.and_then(|one| self.check(one)) {
                Ok(Forwarded { from, packet: Packet::Outcome(outcome), proof }) => {
                    outcomes.entry(from).or_insert((outcome.into_result(), Some(proof)));
                }
                Ok(Forwarded { from, .. }) => refuse(not_proven(&from), no_proof()),
                Err(error) => refuse(error, no_proof()),
            }
        }
        for (agent, result) in answer.results.parse::<Answers>().unwrap_or_default().outcomes {
            match result {
                // The mapper's own word: it has no answer.
                Err(failure) if MAY_REPORT_OF_AGENT.contains(&failure.code) && self.is_target(&agent) => {
                    let failure = reported(failure, mapper, MAY_REPORT_OF_AGENT);
                    outcomes.entry(agent).or_insert((Err(failure), None));
                }
                _ if outcomes.contains_key(&agent) => {}
                _ => refuse(not_proven(&agent), no_proof()),
            }
        }
        for (agent, failure) in unproven {
            if let Entry::Vacant(outcome) = outcomes.entry(agent)
                && self.is_target(outcome.key())
            {
                outcome.insert((Err(failure), None));
            }
        }
        if outcomes.is_empty() {
            return Err(no_proof());
        }
        let event = |(from, (result, proof))| Event::Outcome { from, result, proof };
        Ok(outcomes.into_iter().map(event).collect())
    }

    /// The intermediate result in a mapper's signed message.
    pub fn intermediate(&mut self, mapper: &Identity, forwarded: ForwardedAnswers) -> Result<Option<Event>, OpenError> {
        let one = forwarded.into_iter().next().unwrap_or_else(|| Err(not_proven(mapper)));
        let Forwarded { from, packet, proof } = self.check(one?)?;
        let Packet::Intermediate(Intermediate { key, value, sequence, .. }) = packet else {
            return Err(not_proven(&from));
        };
        let next_part = self.next_parts.entry(from.clone()).or_default();
        let number = sequence.unwrap_or(*next_part);
        // A copy.
        let Some(missed) = number.checked_sub(*next_part) else { return Ok(None) };
        *next_part = number.saturating_add(1);
        Ok(Some(Event::Intermediate { from, key, value, missed, proof: Some(proof) }))
    }

    /// Whether a verified answer is one to this request.
    fn check(&self, answer: Forwarded) -> Result<Forwarded, OpenError> {
        let origin = match &answer.packet {
            Packet::Outcome(outcome) => outcome.request_origin.as_deref(),
            Packet::Intermediate(part) => part.request_origin.as_deref(),
            _ => None,
        };
        if origin != Some(&self.origin) {
            let why = "an agent's answer to another request";
            return Err(OpenError::new(OpenErrorKind::WrongDestination, why).claimed_by(&answer.from));
        }
        if !self.is_target(&answer.from) {
            let why = "an answer of another agent than the target";
            return Err(OpenError::new(OpenErrorKind::NotAuthorized, why).claimed_by(&answer.from));
        }
        Ok(answer)
    }

    fn is_target(&self, agent: &Identity) -> bool {
        self.target.as_ref().is_none_or(|target| target == agent)
    }
}

/// Why a mapper may fail a request as a whole, in its own word.
const MAY_FAIL_AS: &[FailureCode] = &[
    FailureCode::NoTarget,
    FailureCode::Denied,
    FailureCode::Lost,
    FailureCode::TimedOut,
    FailureCode::Overloaded,
    FailureCode::BadAnswer,
];
/// What a mapper may report of an agent, in its own word.
const MAY_REPORT_OF_AGENT: &[FailureCode] = &[FailureCode::Lost, FailureCode::TimedOut];

/// A failure in the mapper's word.
fn reported(failure: Failure, mapper: &Identity, codes: &[FailureCode]) -> Failure {
    let code = if codes.contains(&failure.code) { failure.code } else { FailureCode::Lost };
    Failure { reported_by: Some(mapper.clone()), ..Failure::new(code, failure.message) }
}

fn not_proven(agent: &Identity) -> OpenError {
    OpenError::new(OpenErrorKind::NotAuthorized, "a mapper's answer for an agent, without the agent's proof")
        .claimed_by(agent)
}

fn no_proof() -> Failure {
    Failure::new(FailureCode::Lost, "the mapper's answer was refused: it has no valid proof of the agent")
}

/// The answers that a mapper forwards to the node that it works for.
#[derive(Debug, Default)]
pub(crate) struct ForwardedOutcomes {
    answers: Answers,
    proofs: Vec<Arc<Proof>>,
    bytes: usize,
}

impl ForwardedOutcomes {
    /// Adds the outcome of a target.
    pub fn add(&mut self, from: Identity, result: Result<Payload, Failure>, proof: Option<Arc<Proof>>) {
        match proof {
            Some(proof) => {
                self.bytes = self.bytes.saturating_add(proof.body.len());
                self.proofs.push(proof);
            }
            None => {
                self.bytes = self.bytes.saturating_add(result.as_ref().map_or(0, Payload::approximate_bytes));
                self.answers.outcomes.insert(from, result);
            }
        }
        if self.is_too_large() {
            (self.answers, self.proofs) = Default::default();
        }
    }

    /// Whether the outcomes do not fit into one message.
    fn is_too_large(&self) -> bool {
        self.bytes > Kind::Outcome.max_bytes()
    }

    /// The answer, and the proofs that it carries.
    pub fn finish(self) -> (Result<Payload, Failure>, Vec<ForwardedProof>) {
        if self.is_too_large() {
            let why = "the answers of the agents are too large for one message";
            return (Err(Failure::new(FailureCode::BadAnswer, why)), Vec::new());
        }
        let answers = Payload::new(self.answers);
        let answers = answers.map_err(|error| Failure::new(FailureCode::BadAnswer, error.to_string()));
        (answers, self.proofs.iter().map(|proof| forwarded(proof)).collect())
    }
}

/// A proof as it travels.
pub(super) fn forwarded(proof: &Proof) -> ForwardedProof {
    ForwardedProof::new(proof.salt, proof.body.clone(), proof.signer_info.clone(), proof.certificates.clone())
}
