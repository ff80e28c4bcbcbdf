//! The nodes of a simulation: agents and mappers that run the real code, are killed and start again, and an account of all requests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nanite::agent::{Actor, Agent, StatusSource, actor, reply};
use nanite::certs::KeyType;
use nanite::clock::{Clock, Timestamp};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, FailureCode, Identity, Packet, SelectorName};
use nanite::request::{Event, Events, RequestError};
use nanite::security::SecureSerializer;
use nanite::serializer::{
    Cost, Inbound, OpenContext, OpenError, SealError, SealRequest, Sealed, Serializer, Verification,
};
use nanite::transport::Transport;
use parking_lot::Mutex;

use super::network::{Connection, Network};
use crate::harness::pki::Pki;

/// The service of all agents.
const SERVICE: &str = "/work/do";
/// How long requests may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The certificates of all nodes: made once for all simulations.
pub struct Domain {
    pki: Pki,
}

impl Domain {
    pub fn new() -> Self {
        let pki = Pki::new(KeyType::P256);
        for name in AGENTS {
            pki.credentials(&Identity::agent(name).unwrap());
        }
        for name in MAPPERS {
            pki.credentials(&Identity::mapper(name).unwrap());
        }
        Self { pki }
    }

    fn serializer(&self, identity: &Identity, started_at: Timestamp) -> Inline {
        let builder = self.pki.builder(identity).started_at(started_at);
        Inline(builder.build().unwrap())
    }
}

/// Seals and opens on the thread of the simulation, so that the order of events does not depend on other threads.
#[derive(Debug)]
struct Inline(SecureSerializer);

impl Serializer for Inline {
    fn content_type(&self) -> &str {
        self.0.content_type()
    }

    fn identity(&self) -> &Identity {
        self.0.identity()
    }

    fn seal(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Sealed, SealError> {
        self.0.seal(packet, request)
    }

    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError> {
        self.0.open(bytes, context)
    }

    fn cost(&self, _bytes: usize, _now: Timestamp) -> Cost {
        Cost::Trivial
    }

    fn verification(&self) -> Option<&dyn Verification> {
        self.0.verification()
    }
}

/// A constant load, read without a worker thread.
struct Idle;

impl StatusSource for Idle {
    fn status(&self) -> f64 {
        0.0
    }

    fn may_block(&self) -> bool {
        false
    }
}

pub const AGENTS: [&str; 3] = ["fred", "bob", "eve"];
pub const MAPPERS: [&str; 2] = ["desk", "board"];

/// What became of a request, as its requester saw it.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Answered(u64),
    Failed(FailureCode),
    /// It was not sent.
    NotSent(String),
    /// Its requester was killed while it waited.
    Abandoned,
}

/// The account of one request.
#[derive(Clone, Debug, Default)]
pub struct Account {
    pub begun: u64,
    pub done: u64,
    pub outcomes: Vec<Outcome>,
}

/// A node that may be down. A process of it runs until it is killed.
struct Node<P> {
    name: &'static str,
    ahead: i64,
    process: Option<(P, Arc<Connection>)>,
}

/// A whole system, and the account of what it did.
pub struct World {
    pub network: Arc<Network>,
    domain: Arc<Domain>,
    accounts: Arc<Mutex<BTreeMap<u64, Account>>>,
    agents: Vec<Node<Agent>>,
    mappers: Vec<Node<Mapper>>,
    /// The requesters: which mapper asks, and its task.
    requesters: Vec<(usize, u64, tokio::task::JoinHandle<()>)>,
    requests: u64,
}

impl World {
    pub async fn start(domain: Arc<Domain>, seed: u64) -> Self {
        let network = Network::new(seed);
        // Clocks differ by up to a second.
        let ahead = || network.below(2_000_000) as i64 - 1_000_000;
        let agents = AGENTS.map(|name| Node { name, ahead: ahead(), process: None }).into();
        let mappers = MAPPERS.map(|name| Node { name, ahead: ahead(), process: None }).into();
        let mut world =
            Self { network, domain, accounts: Arc::default(), agents, mappers, requesters: Vec::new(), requests: 0 };
        for mapper in 0..MAPPERS.len() {
            world.start_mapper(mapper).await;
        }
        for agent in 0..AGENTS.len() {
            world.start_agent(agent).await;
        }
        world
    }

    pub async fn start_agent(&mut self, index: usize) {
        let node = &mut self.agents[index];
        if node.process.is_some() {
            return;
        }
        self.network.note(format_args!("agent {} starts", node.name));
        let clock = self.network.clock(node.ahead);
        let serializer = self.domain.serializer(&Identity::agent(node.name).unwrap(), clock.now());
        let connection = self.network.connect(node.name);
        let agent = Agent::builder(serializer, connection.clone())
            .clock(clock)
            .status(Idle)
            .concurrency(2)
            .actor(work(node.name, self.network.clone(), self.accounts.clone()))
            .start()
            .await;
        match agent {
            Ok(agent) => node.process = Some((agent, connection)),
            Err(error) => self.network.note(format_args!("agent {} does not start: {error}", node.name)),
        }
    }

    pub async fn start_mapper(&mut self, index: usize) {
        let node = &mut self.mappers[index];
        if node.process.is_some() {
            return;
        }
        self.network.note(format_args!("mapper {} starts", node.name));
        let clock = self.network.clock(node.ahead);
        let serializer = self.domain.serializer(&Identity::mapper(node.name).unwrap(), clock.now());
        let connection = self.network.connect(node.name);
        let mapper = Mapper::builder(serializer, connection.clone()).clock(clock).start().await;
        match mapper {
            Ok(mapper) => node.process = Some((mapper, connection)),
            Err(error) => self.network.note(format_args!("mapper {} does not start: {error}", node.name)),
        }
    }

    /// Kills an agent: nothing of it runs any more, and its connection breaks.
    pub fn kill_agent(&mut self, index: usize) {
        if let Some((agent, connection)) = self.agents[index].process.take() {
            self.network.note(format_args!("agent {} is killed", self.agents[index].name));
            drop(agent);
            connection.inner.disconnect();
        }
    }

    /// Kills a mapper with all requesters in its process.
    pub fn kill_mapper(&mut self, index: usize) {
        let Some((mapper, connection)) = self.mappers[index].process.take() else { return };
        self.network.note(format_args!("mapper {} is killed", self.mappers[index].name));
        for (_, number, task) in self.requesters.extract_if(.., |(of, _, task)| *of == index && !task.is_finished()) {
            task.abort();
            self.accounts.lock().entry(number).or_default().outcomes.push(Outcome::Abandoned);
        }
        drop(mapper);
        connection.inner.disconnect();
    }

    /// Cuts the connection of a node for a time.
    pub fn cut(&self, index: usize, mends_after: Duration) {
        let connections = self.agents.iter().map(|node| (node.name, node.process.as_ref().map(|(_, it)| it)));
        let connections =
            connections.chain(self.mappers.iter().map(|node| (node.name, node.process.as_ref().map(|(_, it)| it))));
        let Some((name, Some(connection))) = connections.collect::<Vec<_>>().get(index).cloned() else { return };
        self.network.note(format_args!("{name} is cut off for {mends_after:?}"));
        connection.inner.disconnect();
        let connection = connection.clone();
        tokio::spawn(async move {
            tokio::time::sleep(mends_after).await;
            connection.inner.reconnect();
        });
    }

    /// Has a mapper request something; the account notes how it ends.
    pub fn request(&mut self, mapper: usize) {
        let Some((process, _)) = &self.mappers[mapper].process else { return };
        let number = self.requests;
        self.requests += 1;
        let (network, accounts) = (self.network.clone(), self.accounts.clone());
        accounts.lock().insert(number, Account::default());
        let request = process
            .request(SERVICE, number)
            .selector(SelectorName::RoundRobin)
            .timeout(REQUEST_TIMEOUT)
            .wait_for_agents(REQUEST_TIMEOUT);
        let name = self.mappers[mapper].name;
        self.requesters.push((
            mapper,
            number,
            tokio::spawn(async move {
                network.note(format_args!("{name} requests {number}"));
                let outcomes = follow(request.events().await).await;
                network.note(format_args!("request {number} of {name}: {outcomes:?}"));
                accounts.lock().entry(number).or_default().outcomes.extend(outcomes);
            }),
        ));
    }

    /// Waits for all requesters; the numbers of those that have not ended within a time.
    pub async fn finish(&mut self, limit: Duration) -> Vec<u64> {
        let deadline = tokio::time::Instant::now() + limit;
        let mut hung = Vec::new();
        for (_, number, task) in self.requesters.drain(..) {
            match tokio::time::timeout_at(deadline, task).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => panic!("a requester panicked: {error}"),
                Err(_) => hung.push(number),
            }
        }
        hung
    }

    pub fn accounts(&self) -> BTreeMap<u64, Account> {
        self.accounts.lock().clone()
    }

    /// What an idle system holds: running jobs, requests in flight, messages in queues.
    pub async fn remains(&self) -> Vec<String> {
        let mut remains = Vec::new();
        for node in &self.agents {
            let Some((agent, connection)) = &node.process else { continue };
            remains.extend(agent.running().iter().map(|job| format!("{} runs {job:?}", node.name)));
            let depth = connection.inner.depth(&format!("nanite-{}", node.name)).await.unwrap().unwrap_or(0);
            remains.extend((depth > 0).then(|| format!("{depth} messages wait for {}", node.name)));
        }
        for node in &self.mappers {
            let Some((mapper, _)) = &node.process else { continue };
            let agents = AGENTS.map(|name| Identity::agent(name).unwrap());
            for (agent, workload) in agents.iter().zip(mapper.workloads(&agents)) {
                let waiting = workload.in_flight;
                remains.extend((waiting > 0).then(|| format!("{waiting} requests of {} wait for {agent}", node.name)));
            }
        }
        remains
    }
}

/// Follows a request to its end: one outcome for each target.
async fn follow(events: Result<Events, RequestError>) -> Vec<Outcome> {
    let mut events = match events {
        Ok(events) => events,
        Err(error) => return vec![Outcome::NotSent(error.to_string())],
    };
    let mut outcomes = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Outcome { result: Ok(value), .. } => {
                outcomes.push(Outcome::Answered(value.as_u64().unwrap_or(u64::MAX)))
            }
            Event::Outcome { result: Err(failure), .. } | Event::Failed(failure) => {
                outcomes.push(Outcome::Failed(failure.code))
            }
            _ => {}
        }
    }
    outcomes
}

/// The actor of an agent: it accounts for what it begins and ends.
fn work(name: &'static str, network: Arc<Network>, accounts: Arc<Mutex<BTreeMap<u64, Account>>>) -> impl Actor {
    actor("work").expose("do", move |number: u64| {
        let (network, accounts) = (network.clone(), accounts.clone());
        async move {
            network.note(format_args!("{name} begins {number}"));
            accounts.lock().entry(number).or_default().begun += 1;
            let takes = network.pause(300);
            tokio::time::sleep(takes).await;
            network.note(format_args!("{name} has done {number}"));
            accounts.lock().entry(number).or_default().done += 1;
            if number % 7 == 3 { Err(Failure::failed("as it should")) } else { reply(number * 2 + 1) }
        }
    })
}
