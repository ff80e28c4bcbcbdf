//! A mapper in the test's hands: it has a valid certificate, takes proxied requests, asks agents, and answers what the test wants.

use std::sync::Arc;
use std::time::Duration;

use nanite::link::{Link, Outbound, Subscription};
use nanite::packet::{ForwardedProof, Identity, Intermediate, Outcome, Packet, Payload, Request, Token};
use nanite::serializer::{Inbound, InboundQueue, Proof, Verified};
use nanite::transport::{Destination, MemoryTransport, topology};

use super::WAIT_TIMEOUT;
use super::system::System;

pub struct HostileMapper {
    pub link: Link,
    requests: Subscription,
    inbox: Subscription,
}

/// A proxied request that the mapper took.
pub struct Taken {
    pub request: Request,
    pub signer: Verified,
}

/// An agent's message to the mapper: its content, and the agent's proof.
pub struct Answered {
    pub inbound: Inbound,
    pub proof: Option<Arc<Proof>>,
}

impl Answered {
    pub fn forwarded(&self) -> ForwardedProof {
        forwarded(self.proof.as_ref().expect("the agent proves its answers to proxied requests"))
    }
}

pub fn forwarded(proof: &Proof) -> ForwardedProof {
    ForwardedProof::new(proof.salt, proof.body.clone(), proof.signer_info.clone(), proof.certificates.clone())
}

/// What arrives next; fails the test if nothing does.
async fn next(messages: &mut Subscription) -> Inbound {
    let received = tokio::time::timeout(WAIT_TIMEOUT, messages.next()).await.expect("a message arrives in time");
    received.unwrap().accept().await
}

impl HostileMapper {
    pub async fn start(system: &System, name: &str) -> Self {
        Self::at(system, name, system.connect()).await
    }

    pub async fn at(system: &System, name: &str, transport: Arc<MemoryTransport>) -> Self {
        let identity = Identity::mapper(name).unwrap();
        let link = Link::builder(system.serializer(&identity), transport).build();
        let requests = link.subscribe(&topology::requests(), InboundQueue::Requests, 10).await.unwrap();
        let inbox = topology::mapper_inbox(identity.as_str(), link.instance());
        let inbox = link.subscribe(&inbox, InboundQueue::MapperInbox, 10).await.unwrap();
        Self { link, requests, inbox }
    }

    /// The next proxied request.
    pub async fn take(&mut self) -> Taken {
        let inbound = next(&mut self.requests).await;
        let signer = inbound.signer().unwrap().clone();
        let Packet::Request(request) = inbound.packet else { panic!("{:?}", inbound.packet) };
        Taken { request, signer }
    }

    /// The request as an honest mapper sends it to an agent.
    pub fn honest(&self, taken: &Taken) -> Request {
        let request = taken.request.clone().with_from(self.link.identity().clone());
        let request = request.with_token(Token::random().unwrap()).with_on_behalf_of(taken.signer.signer().clone());
        request.with_origin_token(taken.request.token.unwrap())
    }

    pub async fn send(&self, agent: &Identity, request: Request) {
        let message = Outbound::new(Packet::Request(request), agent.clone());
        let inbox = Destination::Queue(topology::agent_inbox_name(agent.as_str()));
        self.link.send(message, inbox).await.unwrap();
    }

    /// The next message of an agent.
    pub async fn answered(&mut self) -> Answered {
        let inbound = next(&mut self.inbox).await;
        let proof = inbound.signer().unwrap().proof().cloned();
        Answered { inbound, proof }
    }

    /// Sends a request to an agent and returns its outcome.
    pub async fn ask(&mut self, agent: &Identity, request: Request) -> Answered {
        self.send(agent, request).await;
        loop {
            let answered = self.answered().await;
            if let Packet::Outcome(_) = answered.inbound.packet {
                return answered;
            }
        }
    }

    /// An outcome for a request, with these results in the mapper's own word and these proofs.
    pub fn outcome(&self, to: &Taken, results: Payload, proofs: Vec<ForwardedProof>) -> Outcome {
        let asker = to.signer.signer().clone();
        let own = self.link.identity().clone();
        let mut outcome = Outcome::new(to.request.token.unwrap(), asker, own, Ok(results));
        outcome.proofs = proofs;
        outcome
    }

    /// An intermediate result for a request.
    pub fn part(&self, to: &Taken, agent: &Identity, value: &str) -> Intermediate {
        let asker = to.signer.signer().clone();
        let own = self.link.identity().clone();
        Intermediate::new(to.request.token.unwrap(), asker, own, "key", value.into()).with_origin(agent.clone())
    }

    /// Sends a packet as an answer to a request.
    pub async fn reply(&self, to: &Taken, packet: impl Into<Packet>) {
        let asker = to.signer.signer();
        let message = Outbound::new(packet, asker.clone()).in_reply_to(Some(to.signer.id()));
        let queue = topology::process_queue_name(asker.as_str(), to.signer.instance());
        self.link.send(message.lifetime(Duration::from_secs(60)), Destination::Queue(queue)).await.unwrap();
    }
}
