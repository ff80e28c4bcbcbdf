//! s10: a hostile broker between real agents and mappers. Whatever it does to their messages, nothing is executed but what a mapper
//! sealed for this agent, and that once; every message that it hands over is accounted for; and when it has calmed down, all is well.

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

use crate::harness::hostile::{Deed, HostileBroker, Ledger, Process, Random, Watched};
use crate::harness::pki::{agent, mapper};
use crate::harness::system::{System, knows, start};
use crate::harness::{PATIENCE, wait_until};

/// How many messages the nodes are handed, at least.
const MESSAGES: u64 = 100_000;
/// How long a request may take while many of its messages are lost.
const SHORT: Duration = Duration::from_secs(2);
/// How many requests are under way at a time.
const ASKERS: usize = 12;

/// AgentWorkload that was asked for, and work that was done.
#[derive(Debug, Default)]
struct AgentWorkload {
    asked: Mutex<BTreeMap<u64, Asked>>,
    done: Mutex<BTreeMap<u64, Vec<Done>>>,
    answered: AtomicU64,
    files: AtomicU64,
    faults: Mutex<Vec<String>>,
}

/// By which service, and by whom.
type Done = (&'static str, Identity);

/// A service, and whether all its agents were to do it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Asked(&'static str, bool);

impl AgentWorkload {
    fn ask(&self, service: &'static str, all: bool) -> u64 {
        let mut asked = self.asked.lock().unwrap();
        let number = asked.len() as u64;
        asked.insert(number, Asked(service, all));
        number
    }

    fn done(&self, service: &'static str, number: u64, by: &Identity) {
        self.done.lock().unwrap().entry(number).or_default().push((service, by.clone()));
    }

    fn count_by(&self, by: &Identity) -> usize {
        self.done.lock().unwrap().values().flatten().filter(|(_, agent)| agent == by).count()
    }

    fn fault(&self, what: String) {
        self.faults.lock().unwrap().push(what);
    }

    /// A request has ended: whatever was answered is right.
    fn ended(&self, number: u64, answers: Result<Answers, RequestError>) {
        let Ok(answers) = answers else { return };
        for (from, value) in answers.results() {
            self.answered.fetch_add(1, Ordering::Relaxed);
            if *value != answer(number, from) {
                self.fault(format!("{from} has answered {value} to number {number}"));
            }
        }
    }

    /// What was done is what was asked for, and once.
    fn check(&self) {
        let (asked, done) = (self.asked.lock().unwrap(), self.done.lock().unwrap());
        for (number, by) in done.iter() {
            let Some(Asked(service, all)) = asked.get(number) else { panic!("nobody asked for {number}: {by:?}") };
            assert!(by.iter().all(|(done, _)| done == service), "{service} was asked for: {by:?}");
            let mut agents: Vec<&Identity> = by.iter().map(|(_, agent)| agent).collect();
            agents.sort();
            agents.dedup();
            assert_eq!(agents.len(), by.len(), "number {number} was done twice: {by:?}");
            assert!(*all || by.len() == 1, "number {number} was for one agent: {by:?}");
        }
        assert_eq!(*self.faults.lock().unwrap(), [""; 0]);
    }
}

/// What this agent answers to this number.
fn answer(number: u64, by: &Identity) -> Payload {
    Payload(serde_json::json!([by.as_str(), number.wrapping_mul(7)]))
}

/// Real nodes, each with its own certificate and the CA's, that learn each other from what they send.
struct World {
    ca: CertificateAuthority,
    broker: Arc<HostileBroker>,
    ledger: Arc<Ledger>,
    work: Arc<AgentWorkload>,
    processes: Mutex<Vec<Arc<Process>>>,
    source: TempDir,
    over: AtomicBool,
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
            work: Arc::default(),
            processes: Mutex::default(),
            source: TempDir::new().unwrap(),
            over: AtomicBool::new(false),
        })
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn process(&self, identity: &Identity, key_type: KeyType) -> Arc<Process> {
        let now = SystemClock.now();
        let credentials = self.ca.issue(identity, key_type, CertificateAuthority::LEAF_VALID_FOR, now).unwrap();
        let trust = Arc::new(self.ca.trust().unwrap());
        let own = StaticCertificateStore::new([credentials.certificate().clone()]);
        let store: Arc<dyn CertificateStore> = Arc::new(TrustStore::new(trust.clone()).with_known(Arc::new(own)));
        let serializer = Arc::new(SecureSerializer::builder(credentials, store, trust).build().unwrap());
        let process = Process { name: identity.to_string(), wire: self.broker.connect(), serializer };
        let process = Arc::new(process);
        self.processes.lock().unwrap().push(process.clone());
        process
    }

    fn watched(&self, process: &Process) -> Arc<Watched> {
        Arc::new(Watched { inner: process.serializer.clone(), ledger: self.ledger.clone() })
    }

    /// An actor whose one service, `/PREFIX/do`, does work.
    fn actor(&self, prefix: &'static str, service: &'static str, identity: &Identity) -> impl Actor + use<> {
        let (work, identity) = (self.work.clone(), identity.clone());
        actor(prefix).expose("do", move |number: u64, context: Context| {
            let (work, identity) = (work.clone(), identity.clone());
            async move {
                work.done(service, number, &identity);
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
        let mut builder = Agent::builder(self.watched(&process), process.wire.clone())
            .ping_time(Duration::from_millis(50))
            .drain(Duration::from_secs(5))
            .status(|| 1.0);
        builder = match name {
            "late" => builder.actor(self.actor("late", "/late/do", &identity)),
            _ => builder.actor(self.actor("work", "/work/do", &identity)),
        };
        if let Some(root) = files {
            let root = FileRoot::new(root.path(), ["photos".parse().unwrap()]).unwrap();
            let (work, source) = (self.work.clone(), self.source.path().to_owned());
            builder = builder.files(root.on_file(move |file| {
                work.files.fetch_add(1, Ordering::Relaxed);
                if fs::read(&file.path).unwrap() != fs::read(source.join(file.path.file_name().unwrap())).unwrap() {
                    work.fault(format!("{} is not what was sent", file.path.display()));
                }
            }));
        }
        (builder.start().await.unwrap(), process)
    }

    async fn mapper(&self, name: &str, key_type: KeyType, short_lived: bool) -> (Mapper, Arc<Process>) {
        let identity = mapper(name);
        let process = self.process(&identity, key_type);
        let builder = Mapper::builder(self.watched(&process), process.wire.clone())
            .request_timeout(SHORT)
            .offline_redelivery_frequency(Duration::from_millis(200));
        let builder = if short_lived { builder.short_lived() } else { builder };
        (builder.start().await.unwrap(), process)
    }

    /// Asks for things in every way, until it is over.
    async fn ask(self: Arc<Self>, m1: Mapper, m2: Mapper, ann: MapperProxy, mut random: Random) {
        while !self.is_over() {
            let work = &self.work;
            match random.below(16) {
                0 => {
                    let number = work.ask("/work/do", true);
                    work.ended(number, m1.request("/work/do", number).selector(SelectorName::All).await);
                }
                1 => drop(m1.push("/work/do", work.ask("/work/do", false)).await),
                2 | 3 => {
                    let number = work.ask("/work/do", false);
                    let outcome = ann.request("/work/do", number).timeout(SHORT).await;
                    work.ended(number, outcome);
                }
                4 | 5 => {
                    let number = work.ask("/late/do", false);
                    let _ = m1.request("/late/do", number).offline_failsafe(true).push().await;
                }
                6..10 => {
                    let number = work.ask("/work/do", false);
                    work.ended(number, m2.request("/work/do", number).await);
                }
                10 => drop(m1.announce().await),
                _ => self.follow(&m1).await,
            }
        }
    }

    /// A request whose parts are looked at: they come in their order, and none twice.
    async fn follow(&self, mapper: &Mapper) {
        let number = self.work.ask("/work/do", false);
        let Ok(mut events) = mapper.request("/work/do", number).events().await else { return };
        let mut next = 0;
        while let Some(event) = events.next().await {
            match event {
                Event::Intermediate { key, value, .. } => {
                    let part = value.as_array().and_then(|value| value[1].as_u64()).unwrap();
                    if key != "part" || value[0].as_u64() != Some(number) || part < next {
                        self.work.fault(format!("part {value} of number {number}, after {next} parts"));
                    }
                    next = part + 1;
                }
                Event::Outcome { from, result: Ok(value), .. } if value != answer(number, &from) => {
                    self.work.fault(format!("{from} has answered {value} to number {number}"));
                }
                _ => {}
            }
        }
    }

    /// Sends files, until it is over.
    async fn send_files(self: Arc<Self>, mapper: Mapper) {
        let mut number = 0_u64;
        while !self.is_over() {
            let path = self.source.path().join(format!("file-{number}"));
            fs::write(&path, number.to_be_bytes().repeat(1000)).unwrap();
            let sending = mapper.broadcast(Broadcast::new(&path, "photos".parse().unwrap()), |_| ());
            let _ = tokio::time::timeout(SHORT, sending).await;
            number += 1;
        }
    }

    /// An agent that comes, does some work, and goes, until it is over; how often it came.
    async fn come_and_go(self: Arc<Self>) -> u64 {
        let (mut times, late) = (0, agent("late"));
        while !self.is_over() {
            let before = self.work.count_by(&late);
            let (handle, process) = self.agent("late", KeyType::P256, None).await;
            while !self.is_over() && self.work.count_by(&late) < before + 5 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            handle.stop().await.unwrap();
            process.wire.end();
            times += 1;
        }
        times
    }

    /// Every message that was handed over has been opened or refused.
    async fn all_accounted_for(&self) {
        let all = self.processes.lock().unwrap().clone();
        wait_until("every message is accounted for", async || {
            all.iter().all(|process| {
                let accounted = process.accounted();
                accounted == process.wire.delivered()
            })
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s10_a_hostile_broker_has_nothing_forged_or_repeated_done_and_every_message_is_accounted_for() {
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
    knows(&m1, &["ann", "bob", "rosa"]).await;
    knows(&m2, &["ann", "bob", "rosa"]).await;

    world.broker.let_loose(true);
    let mut askers = JoinSet::new();
    for n in 0..ASKERS {
        let random = Random::new(seed.wrapping_add(1 + n as u64));
        askers.spawn(world.clone().ask(m1.clone(), m2.clone(), ann.proxy().clone(), random));
    }
    askers.spawn(world.clone().send_files(m1.clone()));
    let late = tokio::spawn(world.clone().come_and_go());
    world.broker.storm(MESSAGES).await;
    world.broker.let_loose(false);
    world.over.store(true, Ordering::SeqCst);
    while let Some(ended) = askers.join_next().await {
        ended.unwrap();
    }
    let times = late.await.unwrap();

    // It has calmed down: everybody is still there, and does what is asked.
    for mapper in [&m1, &m2] {
        for identity in ["ann", "bob", "rosa"].map(agent) {
            let number = world.work.ask("/work/do", false);
            let request = mapper.request("/work/do", number).target(identity.clone());
            let answers = request.wait_for_agents(PATIENCE).timeout(PATIENCE).await.unwrap();
            assert_eq!(answers.outcomes, BTreeMap::from([(identity.clone(), Ok(answer(number, &identity)))]));
        }
    }
    world.all_accounted_for().await;

    let (deeds, cuts) = world.broker.deeds();
    let all = world.processes.lock().unwrap().clone();
    let mut refused: BTreeMap<OpenErrorKind, u64> = BTreeMap::new();
    for (kind, count) in all.iter().flat_map(|process| process.refused()) {
        *refused.entry(kind).or_default() += count;
    }
    let opened: u64 = all.iter().map(|process| process.serializer.counters().opened()).sum();
    let (done, answered) = (world.work.done.lock().unwrap().len(), world.work.answered.load(Ordering::Relaxed));
    let files = world.work.files.load(Ordering::Relaxed);
    println!("the broker: {deeds:?}, {cuts} connections cut");
    println!("opened {opened}, refused {refused:?}, of {} delivered", world.broker.delivered());
    println!("sealed {}, done {done}, answered {answered}, files {files}, late {times}", world.ledger.sealed());

    assert_eq!(world.ledger.faults(), [""; 0]);
    world.work.check();
    assert!(opened + refused.values().sum::<u64>() >= MESSAGES);
    // What the nodes say of themselves is what their serializers have counted. What a mapper gives back comes again for a while, and may
    // be refused between one look and the other; a refusal that is counted once and not twice would keep them apart for ever.
    wait_until("nodes and serializers have counted the same", async || {
        let handles = [ann.refusals(), bob.refusals(), rosa.refusals(), m1.refusals(), m2.refusals()];
        let all = [&ann_process, &bob_process, &rosa_process, &m1_process, &m2_process];
        handles == all.map(|process| process.refused())
    })
    .await;
    // It was a storm, and not a calm: everything was tried, every early step has refused something, and work was done all the same.
    use OpenErrorKind::*;
    for kind in
        [Malformed, Unsupported, WrongDestination, NotFresh, UnknownSigner, BadCertificate, BadSignature, Replayed]
    {
        assert!(refused[&kind] > 0, "nothing was refused as {kind}: {refused:?}");
    }
    assert_eq!(deeds.len(), 9, "{deeds:?}");
    assert!(deeds[&Deed::Bit] > 10_000 && deeds[&Deed::Again] > 10_000 && cuts > 0, "{deeds:?}");
    assert!(done > 100 && answered > 50 && files > 0 && times > 1);
    for handle in [ann, bob, rosa] {
        handle.stop().await.unwrap();
    }
}

/// Pushes with the numbers 1 and 2 that wait in the offline queue, sealed by a mapper that knew nobody.
async fn stored(system: &System) -> Vec<Arc<[u8]>> {
    // Whoever reads them later is known when they are sealed.
    system.serializer(&mapper("m2"));
    let m1 = system.mapper("m1").short_lived().start().await.unwrap();
    for number in [1, 2] {
        m1.request("/late/do", number).offline_failsafe(true).push().await.unwrap();
    }
    let waiting = system.waiting(topology::OFFLINE, 2).await;
    system.broker.delete_queue(topology::OFFLINE);
    waiting.into_iter().map(|waiting| waiting.body).collect()
}

/// The broker puts a message into a queue.
async fn put(system: &System, queue: &str, body: &Arc<[u8]>) {
    let message = PublishRequest {
        destination: Destination::Queue(queue.into()),
        body: body.clone(),
        content_type: CONTENT_TYPE.into(),
        message_id: "x".into(),
        expires_in: None,
        persistent: true,
    };
    system.connect().publish(message, PATIENCE).await.unwrap();
}

#[tokio::test]
async fn s10_a_stored_message_that_comes_many_times_in_a_row_is_carried_out_once() {
    let system = System::secure();
    let stored = stored(&system).await;
    let m2 = system.started_mapper("m2").await;
    let (did, mut done) = mpsc::unbounded_channel();
    let late = actor("late").expose("do", move |number: u64| {
        let did = did.clone();
        async move {
            did.send(number).unwrap();
            Ok::<_, Failure>(())
        }
    });
    let _agent = start(system.agent("late").actor(late).concurrency(1)).await;
    knows(&m2, &["late"]).await;
    for _ in 0..100 {
        put(&system, topology::OFFLINE, &stored[0]).await;
    }
    // It comes behind all the others, and is done behind them.
    put(&system, topology::OFFLINE, &stored[1]).await;
    let mut numbers = Vec::new();
    while numbers.last() != Some(&2) {
        numbers.push(done.recv().await.unwrap());
    }
    assert_eq!(numbers, [1, 2]);
}

#[tokio::test]
async fn s10_a_stored_message_is_for_the_offline_queue_alone() {
    let system = System::secure();
    let stored = stored(&system).await;
    let m2 = system.started_mapper("m2").await;
    put(&system, topology::REQUEST, &stored[0]).await;
    wait_until("it is refused", async || m2.refusals().contains(&(OpenErrorKind::WrongDestination, 1))).await;
}
