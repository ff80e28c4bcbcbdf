//! s10: a hostile broker between real agents and mappers. An agent executes only what a mapper sealed for it, and only once; every
//! delivered message is opened or refused; and after the attack everything works.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nanite::agent::{Actor, Agent, Context, actor};
use nanite::certs::{CertificateAuthority, CertificateStore, KeyType, StaticCertificateStore, TrustStore};
use nanite::clock::{Clock, SystemClock};
use nanite::files::{Broadcast, FileRoot};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, Identity, Payload, SelectorName};
use nanite::proxy::MapperProxy;
use nanite::request::{Answers, Event, RequestError};
use nanite::security::{CONTENT_TYPE, SecureSerializer};
use nanite::serializer::OpenErrorKind;
use nanite::transport::{Destination, PublishRequest, Transport, topology};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::harness::hostile::{Action, HostileBroker, Ledger, Process, Random, RecordingSerializer};
use crate::harness::pki::{agent, mapper};
use crate::harness::system::{System, start, wait_until_known};
use crate::harness::{WAIT_TIMEOUT, recv, wait_until};

/// The least number of messages that are delivered to the nodes.
const MIN_DELIVERIES: u64 = 100_000;
/// The timeout of a request during the attack, when many of its messages are lost.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// The number of requests at a time.
const REQUESTERS: usize = 12;

/// The jobs that were requested, and those that were done. Each has a number.
#[derive(Debug, Default)]
struct Jobs {
    requested: Mutex<BTreeMap<u64, Requested>>,
    done: Mutex<BTreeMap<u64, Vec<Done>>>,
    answered: AtomicU64,
    files: AtomicU64,
    violations: Mutex<Vec<String>>,
}

/// The service and the agent that did a job.
type Done = (&'static str, Identity);

/// A requested service, and whether all its agents are targets.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Requested {
    service: &'static str,
    all: bool,
}

impl Jobs {
    /// Records a request and returns its number.
    fn request(&self, service: &'static str, all: bool) -> u64 {
        let mut requested = self.requested.lock().unwrap();
        let number = requested.len() as u64;
        requested.insert(number, Requested { service, all });
        number
    }

    fn done(&self, service: &'static str, number: u64, by: &Identity) {
        self.done.lock().unwrap().entry(number).or_default().push((service, by.clone()));
    }

    fn count_by(&self, by: &Identity) -> usize {
        self.done.lock().unwrap().values().flatten().filter(|(_, agent)| agent == by).count()
    }

    fn violation(&self, text: String) {
        self.violations.lock().unwrap().push(text);
    }

    /// Checks the answers to a request.
    fn check_answers(&self, number: u64, answers: Result<Answers, RequestError>) {
        let Ok(answers) = answers else { return };
        for (from, value) in answers.results() {
            self.answered.fetch_add(1, Ordering::Relaxed);
            if *value != answer(number, from) {
                self.violation(format!("{from} answered {value} to job {number}"));
            }
        }
    }

    /// Only requested jobs were done, by the right number of agents, and by each only once.
    fn check(&self) {
        let (requested, done) = (self.requested.lock().unwrap(), self.done.lock().unwrap());
        for (number, by) in done.iter() {
            let request = requested.get(number);
            let Some(Requested { service, all }) = request else { panic!("{number} was not requested: {by:?}") };
            assert!(by.iter().all(|(done, _)| done == service), "{service} was requested: {by:?}");
            let mut agents: Vec<&Identity> = by.iter().map(|(_, agent)| agent).collect();
            agents.sort();
            agents.dedup();
            assert_eq!(agents.len(), by.len(), "job {number} was done twice: {by:?}");
            assert!(*all || by.len() == 1, "job {number} was for one agent: {by:?}");
        }
        assert_eq!(*self.violations.lock().unwrap(), [""; 0]);
    }
}

/// The answer of this agent to this job.
fn answer(number: u64, by: &Identity) -> Payload {
    Payload(serde_json::json!([by.as_str(), number.wrapping_mul(7)]))
}

/// Real nodes. Each has only its own certificate and the CA's, and learns the others from their messages.
struct World {
    ca: CertificateAuthority,
    broker: Arc<HostileBroker>,
    ledger: Arc<Ledger>,
    jobs: Arc<Jobs>,
    processes: Mutex<Vec<Arc<Process>>>,
    source: TempDir,
    is_over: AtomicBool,
}

impl World {
    fn new(seed: u64) -> Arc<Self> {
        let now = SystemClock.now();
        let ca =
            CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now).unwrap();
        Arc::new(Self {
            ca,
            broker: HostileBroker::new(seed),
            ledger: Arc::default(),
            jobs: Arc::default(),
            processes: Mutex::default(),
            source: TempDir::new().unwrap(),
            is_over: AtomicBool::new(false),
        })
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    fn process(&self, identity: &Identity, key_type: KeyType) -> Arc<Process> {
        let now = SystemClock.now();
        let credentials = self.ca.issue(identity, key_type, CertificateAuthority::LEAF_VALID_FOR, now).unwrap();
        let trust = Arc::new(self.ca.trust().unwrap());
        let own = StaticCertificateStore::new([credentials.certificate().clone()]);
        let store: Arc<dyn CertificateStore> = Arc::new(TrustStore::new(trust.clone()).with_store(Arc::new(own)));
        let serializer = Arc::new(SecureSerializer::builder(credentials, store, trust).build().unwrap());
        let process = Arc::new(Process { name: identity.to_string(), transport: self.broker.connect(), serializer });
        self.processes.lock().unwrap().push(process.clone());
        process
    }

    fn recording(&self, process: &Process) -> Arc<RecordingSerializer> {
        Arc::new(RecordingSerializer { inner: process.serializer.clone(), ledger: self.ledger.clone() })
    }

    /// An actor with the service `/PREFIX/do`, which does jobs.
    fn actor(&self, prefix: &'static str, service: &'static str, identity: &Identity) -> impl Actor + use<> {
        let (jobs, identity) = (self.jobs.clone(), identity.clone());
        actor(prefix).expose("do", move |number: u64, context: Context| {
            let (jobs, identity) = (jobs.clone(), identity.clone());
            async move {
                jobs.done(service, number, &identity);
                for part in 0..2 {
                    context.emit("part", [number, part]).await?;
                }
                Ok::<_, Failure>(answer(number, &identity))
            }
        })
    }

    async fn agent(&self, name: &str, key_type: KeyType, files: Option<&TempDir>) -> (Agent, Arc<Process>) {
        let identity = agent(name);
        let process = self.process(&identity, key_type);
        let mut builder = Agent::builder(self.recording(&process), process.transport.clone())
            .ping_time(Duration::from_millis(50))
            .drain(Duration::from_secs(5))
            .status(|| 1.0);
        builder = match name {
            "late" => builder.actor(self.actor("late", "/late/do", &identity)),
            _ => builder.actor(self.actor("work", "/work/do", &identity)),
        };
        if let Some(root) = files {
            let root = FileRoot::new(root.path(), ["photos".parse().unwrap()]).unwrap();
            let (jobs, source) = (self.jobs.clone(), self.source.path().to_owned());
            builder = builder.files(root.on_file(move |file| {
                jobs.files.fetch_add(1, Ordering::Relaxed);
                if fs::read(&file.path).unwrap() != fs::read(source.join(file.path.file_name().unwrap())).unwrap() {
                    jobs.violation(format!("{} is not what was sent", file.path.display()));
                }
            }));
        }
        (builder.start().await.unwrap(), process)
    }

    async fn mapper(&self, name: &str, key_type: KeyType, short_lived: bool) -> (Mapper, Arc<Process>) {
        let identity = mapper(name);
        let process = self.process(&identity, key_type);
        let builder = Mapper::builder(self.recording(&process), process.transport.clone())
            .request_timeout(REQUEST_TIMEOUT)
            .offline_redelivery_frequency(Duration::from_millis(200));
        let builder = if short_lived { builder.short_lived() } else { builder };
        (builder.start().await.unwrap(), process)
    }

    /// Makes requests of all kinds until the attack is over.
    async fn make_requests(self: Arc<Self>, m1: Mapper, m2: Mapper, ann: MapperProxy, mut random: Random) {
        while !self.is_over() {
            let jobs = &self.jobs;
            match random.below(16) {
                0 => {
                    let number = jobs.request("/work/do", true);
                    jobs.check_answers(number, m1.request("/work/do", number).selector(SelectorName::All).await);
                }
                1 => drop(m1.push("/work/do", jobs.request("/work/do", false)).await),
                2 | 3 => {
                    let number = jobs.request("/work/do", false);
                    let outcome = ann.request("/work/do", number).timeout(REQUEST_TIMEOUT).await;
                    jobs.check_answers(number, outcome);
                }
                4 | 5 => {
                    let number = jobs.request("/late/do", false);
                    let _ = m1.request("/late/do", number).offline_failsafe(true).push().await;
                }
                6..10 => {
                    let number = jobs.request("/work/do", false);
                    jobs.check_answers(number, m2.request("/work/do", number).await);
                }
                10 => drop(m1.announce().await),
                _ => self.follow_events(&m1).await,
            }
        }
    }

    /// Makes a request and checks its intermediate results: they are in order, and none comes twice.
    async fn follow_events(&self, mapper: &Mapper) {
        let number = self.jobs.request("/work/do", false);
        let Ok(mut events) = mapper.request("/work/do", number).events().await else { return };
        let mut next = 0;
        while let Some(event) = events.next().await {
            match event {
                Event::Intermediate { key, value, .. } => {
                    let part = value.as_array().and_then(|value| value[1].as_u64()).unwrap();
                    if key != "part" || value[0].as_u64() != Some(number) || part < next {
                        self.jobs.violation(format!("part {value} of job {number}, after {next} parts"));
                    }
                    next = part + 1;
                }
                Event::Outcome { from, result: Ok(value), .. } if value != answer(number, &from) => {
                    self.jobs.violation(format!("{from} answered {value} to job {number}"));
                }
                _ => {}
            }
        }
    }

    /// Sends files until the attack is over.
    async fn send_files(self: Arc<Self>, mapper: Mapper) {
        let mut number = 0_u64;
        while !self.is_over() {
            let path = self.source.path().join(format!("file-{number}"));
            fs::write(&path, number.to_be_bytes().repeat(1000)).unwrap();
            let sending = mapper.broadcast(Broadcast::new(&path, "photos".parse().unwrap()), |_| ());
            let _ = tokio::time::timeout(REQUEST_TIMEOUT, sending).await;
            number += 1;
        }
    }

    /// Starts an agent, lets it do some jobs and stops it, until the attack is over. Returns the number of starts.
    async fn restart_agent(self: Arc<Self>) -> u64 {
        let (mut starts, late) = (0, agent("late"));
        while !self.is_over() {
            let before = self.jobs.count_by(&late);
            let (running, process) = self.agent("late", KeyType::P256, None).await;
            while !self.is_over() && self.jobs.count_by(&late) < before + 5 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            running.stop().await.unwrap();
            process.transport.end();
            starts += 1;
        }
        starts
    }

    /// Waits until every delivered message has been opened or refused.
    async fn all_opened_or_refused(&self) {
        let all = self.processes.lock().unwrap().clone();
        wait_until("every message is opened or refused", async || {
            // In this order: a delivery is counted before it is opened.
            all.iter().all(|process| process.opened_or_refused() == process.transport.delivered())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s10_hostile_broker_causes_no_forged_or_repeated_execution() {
    let seed = std::env::var("NANITE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| SystemClock.now().as_micros());
    println!("NANITE_SEED={seed}");
    let world = World::new(seed);
    let roots = [TempDir::new().unwrap(), TempDir::new().unwrap()];
    let (m1, m1_process) = world.mapper("m1", KeyType::P256, false).await;
    let (m2, m2_process) = world.mapper("m2", KeyType::Rsa2048, true).await;
    let (ann, ann_process) = world.agent("ann", KeyType::P256, Some(&roots[0])).await;
    let (bob, bob_process) = world.agent("bob", KeyType::P256, None).await;
    let (rosa, rosa_process) = world.agent("rosa", KeyType::Rsa2048, Some(&roots[1])).await;
    wait_until_known(&m1, &["ann", "bob", "rosa"]).await;
    wait_until_known(&m2, &["ann", "bob", "rosa"]).await;

    world.broker.set_hostile(true);
    let mut requesters = JoinSet::new();
    for n in 0..REQUESTERS {
        let random = Random::new(seed.wrapping_add(1 + n as u64));
        requesters.spawn(world.clone().make_requests(m1.clone(), m2.clone(), ann.proxy().clone(), random));
    }
    requesters.spawn(world.clone().send_files(m1.clone()));
    let restarted = tokio::spawn(world.clone().restart_agent());
    world.broker.attack_until_delivered(MIN_DELIVERIES).await;
    world.broker.set_hostile(false);
    world.is_over.store(true, Ordering::SeqCst);
    while let Some(ended) = requesters.join_next().await {
        ended.unwrap();
    }
    let starts = restarted.await.unwrap();

    // After the attack every agent does what is requested.
    for mapper in [&m1, &m2] {
        for identity in ["ann", "bob", "rosa"].map(agent) {
            let number = world.jobs.request("/work/do", false);
            let request = mapper.request("/work/do", number).target(identity.clone());
            let answers = request.wait_for_agents(WAIT_TIMEOUT).timeout(WAIT_TIMEOUT).await.unwrap();
            assert_eq!(answers.outcomes, BTreeMap::from([(identity.clone(), Ok(answer(number, &identity)))]));
        }
    }
    world.all_opened_or_refused().await;

    let (actions, disconnects) = world.broker.actions();
    let all = world.processes.lock().unwrap().clone();
    let mut refused: BTreeMap<OpenErrorKind, u64> = BTreeMap::new();
    for (kind, count) in all.iter().flat_map(|process| process.refused()) {
        *refused.entry(kind).or_default() += count;
    }
    let opened: u64 = all.iter().map(|process| process.serializer.counters().opened()).sum();
    let (done, answered) = (world.jobs.done.lock().unwrap().len(), world.jobs.answered.load(Ordering::Relaxed));
    let files = world.jobs.files.load(Ordering::Relaxed);
    println!("the broker: {actions:?}, {disconnects} connections interrupted");
    println!("opened {opened}, refused {refused:?}, of {} delivered", world.broker.delivered());
    println!("sealed {}, done {done}, answered {answered}, files {files}, starts {starts}", world.ledger.sealed());

    assert_eq!(world.ledger.violations(), [""; 0]);
    world.jobs.check();
    assert!(opened + refused.values().sum::<u64>() >= MIN_DELIVERIES);
    // The nodes report what their serializers have counted. Messages that a mapper has requeued may still be refused between the two
    // reads; if a refusal were counted only once, they would never be equal.
    wait_until("nodes and serializers have counted the same", async || {
        let reported = [ann.refusals(), bob.refusals(), rosa.refusals(), m1.refusals(), m2.refusals()];
        let all = [&ann_process, &bob_process, &rosa_process, &m1_process, &m2_process];
        // Of the messages that a mapper asks for again, only the serializer keeps count.
        let repeated = |kind: &OpenErrorKind| *kind == OpenErrorKind::NotFresh;
        reported.iter().zip(all.map(|process| process.refused())).all(|(reported, counted)| {
            reported
                .iter()
                .zip(&counted)
                .all(|(reported, counted)| reported == counted || (repeated(&reported.0) && reported.1 <= counted.1))
        })
    })
    .await;
    // All attacks were tried, every early step of opening has refused something, and jobs were done all the same.
    use OpenErrorKind::*;
    for kind in
        [Malformed, Unsupported, WrongDestination, NotFresh, UnknownSigner, BadCertificate, BadSignature, Replayed]
    {
        assert!(refused[&kind] > 0, "nothing was refused as {kind}: {refused:?}");
    }
    assert_eq!(actions.len(), 9, "{actions:?}");
    let (flipped, replayed) = (actions[&Action::FlipBit], actions[&Action::Replay]);
    assert!(flipped > 10_000 && replayed > 10_000 && disconnects > 0, "{actions:?}");
    assert!(done > 100 && answered > 50 && files > 0 && starts > 1);
    for agent in [ann, bob, rosa] {
        agent.stop().await.unwrap();
    }
}

/// Pushes with the payloads 1 and 2 from the offline queue, sealed by a mapper that knew no agent.
async fn stored(system: &System) -> Vec<Arc<[u8]>> {
    // The mapper that opens them later must be known when they are sealed.
    system.serializer(&mapper("m2"));
    let m1 = system.mapper("m1").short_lived().start().await.unwrap();
    for number in [1, 2] {
        m1.request("/late/do", number).offline_failsafe(true).push().await.unwrap();
    }
    let waiting = system.waiting(topology::OFFLINE, 2).await;
    system.broker.delete_queue(topology::OFFLINE);
    waiting.into_iter().map(|message| message.body).collect()
}

/// Puts a message into a queue, as the broker could.
async fn inject(system: &System, queue: &str, body: &Arc<[u8]>) {
    let message = PublishRequest::new(Destination::queue(queue), body.clone()).content_type(CONTENT_TYPE);
    system.connect().publish(message, WAIT_TIMEOUT).await.unwrap();
}

#[tokio::test]
async fn s10_replayed_stored_message_is_executed_once() {
    let system = System::secure();
    let stored = stored(&system).await;
    let m2 = system.started_mapper("m2").await;
    let (sender, mut done) = mpsc::unbounded_channel();
    let late = actor("late").expose("do", move |number: u64| {
        let sender = sender.clone();
        async move {
            sender.send(number).unwrap();
            Ok::<_, Failure>(())
        }
    });
    let _agent = start(system.agent("late").actor(late).concurrency(1)).await;
    wait_until_known(&m2, &["late"]).await;
    for _ in 0..100 {
        inject(&system, topology::OFFLINE, &stored[0]).await;
    }
    // It is behind all the others, and done after them.
    inject(&system, topology::OFFLINE, &stored[1]).await;
    let mut numbers = Vec::new();
    while numbers.last() != Some(&2) {
        numbers.push(recv(&mut done).await);
    }
    assert_eq!(numbers, [1, 2]);
}

#[tokio::test]
async fn s10_stored_message_is_refused_outside_the_offline_queue() {
    let system = System::secure();
    let stored = stored(&system).await;
    let m2 = system.started_mapper("m2").await;
    inject(&system, topology::REQUEST, &stored[0]).await;
    wait_until("it is refused", async || m2.refusals().contains(&(OpenErrorKind::WrongDestination, 1))).await;
}
