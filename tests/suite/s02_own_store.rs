//! s02: a custom certificate store supplies certificates; the trust decides which of them are accepted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nanite::certs::{
    Certificate, CertificateStore, Credentials, KeyType, PrivateKey, Recipient, RecipientQuery, SignerQuery,
    StoreError, Trust,
};
use nanite::clock::{Clock, SystemClock, Timestamp};
use nanite::link::{Link, Outbound};
use nanite::packet::{Advertise, Packet, Payload, Ping, Register, Request, Role, Status};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, OpenContext, OpenErrorKind, SealError, SealRequest, Serializer};
use nanite::transport::MemoryBroker;
use openssl::nid::Nid;

use crate::harness::forge::{Forge, Forged};
use crate::harness::pki::{Peers, Pki, STARTED, agent, at, mapper};
use crate::harness::tamper::{self, Der};

/// Empty at first; keeps the certificates of verified messages.
#[derive(Debug, Default)]
struct LearningStore {
    known: Mutex<Vec<Arc<Certificate>>>,
    queries: AtomicU64,
    fails: AtomicBool,
}

impl LearningStore {
    fn count_query(&self) -> Result<(), StoreError> {
        self.queries.fetch_add(1, Ordering::SeqCst);
        match self.fails.load(Ordering::SeqCst) {
            true => Err(StoreError::Other("the database is down".into())),
            false => Ok(()),
        }
    }

    fn len(&self) -> usize {
        self.known.lock().unwrap().len()
    }
}

impl CertificateStore for LearningStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        self.count_query()?;
        let known = self.known.lock().unwrap();
        let found = known.iter().find(|found| found.identity() == query.identity && found.key_id() == query.key_id);
        Ok(found.or(query.presented).cloned())
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        self.count_query()?;
        let known = self.known.lock().unwrap();
        let recipients = known.iter().filter(|found| match query.recipient {
            Recipient::One(identity) => found.identity() == identity,
            Recipient::Mappers => found.identity().role() == Role::Mapper,
            _ => false,
        });
        Ok(recipients.cloned().collect())
    }

    fn learn(&self, certificate: &Arc<Certificate>, _: Timestamp) {
        self.known.lock().unwrap().push(certificate.clone());
    }
}

fn node(pki: &Pki, credentials: Credentials) -> (Arc<LearningStore>, SecureSerializer) {
    with_trust(credentials, pki.ca.trust().unwrap())
}

fn with_trust(credentials: Credentials, trust: Trust) -> (Arc<LearningStore>, SecureSerializer) {
    let store = Arc::new(LearningStore::default());
    let builder = SecureSerializer::builder(credentials, store.clone(), trust);
    (store, builder.started_at(STARTED).build().unwrap())
}

fn request() -> Packet {
    Packet::Request(Request::new("/a/b".parse().unwrap(), Payload::from("x")))
}

fn register() -> Packet {
    let (identity, services) = (agent("fred"), vec!["/a/b".parse().unwrap()]);
    Register::new(identity, services).with_status(Status::new(0.5)).into()
}

#[test]
fn s02_nodes_with_only_the_ca_learn_each_others_certificates() {
    let pki = Pki::new(KeyType::P256);
    let (at_mapper, m1) = node(&pki, pki.stranger(&mapper("m1")));
    let (at_agent, fred) = node(&pki, pki.stranger(&agent("fred")));
    let to_mappers = SealRequest::new(&Audience::Mappers, at(1));
    let error = fred.seal(&register(), &to_mappers).unwrap_err();
    assert!(matches!(error, SealError::NoRecipient(_)), "no mapper is known yet: {error}");

    let advertise = m1.seal(&Advertise::default().into(), &SealRequest::new(&Audience::Agents, at(1))).unwrap();
    fred.open(&advertise.bytes, &OpenContext::new(InboundQueue::AgentControl, at(2))).unwrap();
    assert_eq!((at_agent.len(), at_mapper.len()), (1, 0));
    let register = fred.seal(&register(), &to_mappers).unwrap();
    m1.open(&register.bytes, &OpenContext::new(InboundQueue::Presence, at(2))).unwrap();
    assert_eq!(at_mapper.len(), 1);
    let request_to_fred = m1.seal(&request(), &SealRequest::new(&Audience::One(agent("fred")), at(3))).unwrap();
    let inbound = fred.open(&request_to_fred.bytes, &OpenContext::new(InboundQueue::AgentInbox, at(3))).unwrap();
    assert_eq!(inbound.sender(), Some(&mapper("m1")));
    assert!(at_mapper.queries.load(Ordering::SeqCst) > 0);
}

#[test]
fn s02_store_learns_only_verified_certificates() {
    let pki = Pki::new(KeyType::P256);
    let (at_agent, fred) = node(&pki, pki.stranger(&agent("fred")));
    let context = OpenContext::new(InboundQueue::AgentControl, at(2));
    let advertise = |pki: &Pki| {
        let (_, m1) = node(pki, pki.stranger(&mapper("m1")));
        m1.seal(&Advertise::default().into(), &SealRequest::new(&Audience::Agents, at(1))).unwrap().bytes
    };
    let from_other_ca = advertise(&Pki::new(KeyType::P256));
    assert_eq!(fred.open(&from_other_ca, &context).unwrap_err().kind, OpenErrorKind::BadCertificate);
    let mut changed = advertise(&pki);
    *changed.last_mut().unwrap() ^= 1;
    assert_eq!(fred.open(&changed, &context).unwrap_err().kind, OpenErrorKind::BadSignature);
    assert_eq!(at_agent.len(), 0);
    fred.open(&advertise(&pki), &context).unwrap();
    assert_eq!(at_agent.len(), 1);
}

#[test]
fn s02_failing_store_refuses_messages_and_recovers() {
    let pki = Pki::new(KeyType::P256);
    let (at_agent, fred) = node(&pki, pki.stranger(&agent("fred")));
    let m1 = pki.stranger(&mapper("m1"));
    at_agent.learn(m1.certificate(), at(0));
    let (at_mapper, m1) = node(&pki, m1);
    at_mapper.learn(pki.credentials(&agent("bob")).certificate(), at(0));
    let to = Audience::One(agent("bob"));
    at_mapper.fails.store(true, Ordering::SeqCst);
    let error = m1.seal(&request(), &SealRequest::new(&to, at(1))).unwrap_err();
    assert!(matches!(error, SealError::Store(_)), "{error}");

    let advertise = m1.seal(&Advertise::default().into(), &SealRequest::new(&Audience::Agents, at(1))).unwrap();
    let context = OpenContext::new(InboundQueue::AgentControl, at(2));
    at_agent.fails.store(true, Ordering::SeqCst);
    let error = fred.open(&advertise.bytes, &context).unwrap_err();
    assert_eq!(error.kind, OpenErrorKind::UnknownSigner);
    assert!(error.why.contains("the database is down"), "{error}");
    at_agent.fails.store(false, Ordering::SeqCst);
    fred.open(&advertise.bytes, &context).unwrap();
}

fn credentials(forged: &Forged, intermediates: Vec<Vec<u8>>) -> Credentials {
    let certificate = Arc::new(Certificate::from_der(&forged.der()).unwrap());
    let key = PrivateKey::new(forged.key.clone()).unwrap();
    Credentials::new(certificate, key).unwrap().with_intermediates(intermediates)
}

/// Credentials for this node from an intermediate CA below the root.
fn credentials_below(root: &Forged, ca: &Forged, uri: &str) -> Credentials {
    assert!(root.x509.subject_name().try_cmp(ca.x509.issuer_name()).unwrap().is_eq());
    let leaf = Forge::leaf().set(Nid::SUBJECT_ALT_NAME, &format!("URI:spiffe://example.org/{uri}")).signed_by(ca);
    credentials(&leaf, vec![ca.der()])
}

#[test]
fn s02_intermediates_from_registration_are_remembered() {
    let root = Forge::ca("root").self_signed();
    let (agents, mappers) = (Forge::ca("agents").signed_by(&root), Forge::ca("mappers").signed_by(&root));
    let trust = || Trust::authorities([root.x509.clone()]).unwrap();
    let (at_mapper, m1) = with_trust(credentials_below(&root, &mappers, "mapper/m1"), trust());
    let (_, fred) = with_trust(credentials_below(&root, &agents, "agent/fred"), trust());
    let advertise = m1.seal(&Advertise::default().into(), &SealRequest::new(&Audience::Agents, at(1))).unwrap();
    fred.open(&advertise.bytes, &OpenContext::new(InboundQueue::AgentControl, at(1))).unwrap();

    let register = fred.seal(&register(), &SealRequest::new(&Audience::Mappers, at(2))).unwrap();
    let opened = m1.open(&register.bytes, &OpenContext::new(InboundQueue::Presence, at(2))).unwrap();
    let proof = opened.signer().unwrap().proof().unwrap();
    assert_eq!(proof.certificates.len(), 2);
    assert_eq!(proof.certificates[0], at_mapper.known.lock().unwrap()[0].der(), "the sender's certificate is first");
    // Hours later, when no verification is cached, a heartbeat arrives without them, and a request is sent.
    let ping = Packet::Ping(Ping::new(agent("fred"), Status::new(0.5)));
    let later = at(7_200);
    let ping = fred.seal(&ping, &SealRequest::new(&Audience::Mappers, later)).unwrap();
    m1.open(&ping.bytes, &OpenContext::new(InboundQueue::Presence, later)).unwrap();
    let work = m1.seal(&request(), &SealRequest::new(&Audience::One(agent("fred")), later)).unwrap();
    fred.open(&work.bytes, &OpenContext::new(InboundQueue::AgentInbox, later)).unwrap();
}

/// The certificates in a message are not signed: the broker can add others beside the signer's.
#[test]
fn s10_certificates_injected_in_transit_do_not_lock_out_the_sender() {
    let root = Forge::ca("root").self_signed();
    let between = Forge::ca("agents").signed_by(&root);
    let other = Der::parse(&Forge::ca("other").self_signed().der());
    let junk = Der::Node(0x30, vec![Der::Leaf(5, vec![])]);
    let trust = || Trust::authorities([root.x509.clone()]).unwrap();
    for injected in [junk, other] {
        let mapper_leaf =
            Forge::leaf().set(Nid::SUBJECT_ALT_NAME, "URI:spiffe://example.org/mapper/m1").signed_by(&root);
        let (_, m1) = with_trust(credentials(&mapper_leaf, vec![]), trust());
        let of_fred = credentials_below(&root, &between, "agent/fred");
        let own = Der::parse(of_fred.certificate().der());
        let (at_agent, fred) = with_trust(of_fred, trust());
        at_agent.learn(credentials(&mapper_leaf, vec![]).certificate(), at(0));
        let seal = |packet: Packet, now| fred.seal(&packet, &SealRequest::new(&Audience::Mappers, now)).unwrap().bytes;
        let ping = || Packet::Ping(Ping::new(agent("fred"), Status::new(0.5)));
        let open = |bytes: &[u8], now| m1.open(bytes, &OpenContext::new(InboundQueue::Presence, now)).map(drop);
        open(&seal(register(), at(2)), at(2)).unwrap();

        let mut changed = tamper::Forged::new(&seal(register(), at(3)));
        let mut certificates = vec![own, injected];
        certificates.sort_by_key(Der::bytes);
        *changed.signed().at(&[3]).children() = certificates;
        // This may be refused; what matters is that later messages are accepted when no verification is cached.
        let _ = open(&changed.bytes(), at(3));
        open(&seal(ping(), at(7_200)), at(7_200)).unwrap();
    }
}

#[test]
fn s10_rejects_revoked_signers_and_recipients() {
    let root = Forge::ca("root").self_signed();
    let leaf = |uri: &str| {
        Forge::leaf().set(Nid::SUBJECT_ALT_NAME, &format!("URI:spiffe://example.org/{uri}")).signed_by(&root)
    };
    let (m1, fred) = (leaf("mapper/m1"), leaf("agent/fred"));
    let trust = |revoked: &[&openssl::x509::X509]| {
        let crl = root.crl(revoked, at(0), at(86_400));
        Trust::authorities([root.x509.clone()]).unwrap().with_crls(&[crl]).unwrap()
    };
    let (_, sender) = with_trust(credentials(&m1, vec![]), trust(&[]));
    let advertise =
        sender.seal(&Advertise::default().into(), &SealRequest::new(&Audience::Agents, at(1))).unwrap().bytes;
    let context = OpenContext::new(InboundQueue::AgentControl, at(2));
    let (store, reader) = with_trust(credentials(&fred, vec![]), trust(&[&m1.x509]));
    let error = reader.open(&advertise, &context).unwrap_err();
    assert_eq!((error.kind, &*error.why), (OpenErrorKind::BadCertificate, "it is revoked"));
    assert_eq!(store.len(), 0);
    store.learn(credentials(&m1, vec![]).certificate(), at(0));
    let error = reader.seal(&register(), &SealRequest::new(&Audience::Mappers, at(2))).unwrap_err();
    assert!(matches!(&error, SealError::NoRecipient(why) if why.contains("revoked")), "{error}");
    let (_, other) = with_trust(credentials(&fred, vec![]), trust(&[]));
    other.open(&advertise, &context).unwrap();
}

/// Blocks until it is opened.
#[derive(Debug)]
struct BlockingStore {
    known: Arc<Peers>,
    open: Mutex<bool>,
    opened: Condvar,
}

impl BlockingStore {
    fn wait(&self) {
        drop(self.opened.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
    }
}

impl CertificateStore for BlockingStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        self.wait();
        self.known.signer(query)
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        self.wait();
        self.known.recipients(query)
    }
}

#[test]
fn s02_blocking_store_delays_only_its_own_messages() {
    let now = SystemClock.now();
    let pki = Pki::starting(KeyType::P256, now);
    pki.credentials(&agent("fred"));
    let m1 = pki.credentials(&mapper("m1"));
    let store = Arc::new(BlockingStore { known: pki.peers.clone(), open: Mutex::new(false), opened: Condvar::new() });
    let serializer = SecureSerializer::builder(m1, store.clone(), pki.ca.trust().unwrap()).build().unwrap();
    let transport = Arc::new(MemoryBroker::new().connect());
    let link = Link::builder(Arc::new(serializer), transport).build();

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let seal = || {
        let link = link.clone();
        async move { link.seal(Outbound::new(request(), agent("fred"))).await }
    };
    let sealing: Vec<_> = (0..8).map(|_| runtime.spawn(seal())).collect();
    let (done, other_work) = std::sync::mpsc::channel();
    runtime.spawn(async move { done.send(()).unwrap() });
    let other_work = other_work.recv_timeout(Duration::from_secs(20));
    assert!(sealing.iter().all(|task| !task.is_finished()), "the store still blocks");

    *store.open.lock().unwrap() = true;
    store.opened.notify_all();
    for task in sealing {
        runtime.block_on(task).unwrap().unwrap();
    }
    assert_eq!(other_work, Ok(()), "the store blocked every thread of the runtime");
}
