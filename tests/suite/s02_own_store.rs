//! s02: a certificate store of the user's own decides whom a node knows; trust decides whom it believes.

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
use crate::harness::pki::{Peers, Pki, agent, at, mapper};
use crate::harness::tamper::{self, Der};

/// Knows nobody at first, and keeps the certificates of those whose messages proved good.
#[derive(Debug, Default)]
struct Learner {
    known: Mutex<Vec<Arc<Certificate>>>,
    asked: AtomicU64,
    broken: AtomicBool,
}

impl Learner {
    fn works(&self) -> Result<(), StoreError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match self.broken.load(Ordering::SeqCst) {
            true => Err(StoreError::Other("the database is away".into())),
            false => Ok(()),
        }
    }

    fn knows(&self) -> usize {
        self.known.lock().unwrap().len()
    }
}

impl CertificateStore for Learner {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        self.works()?;
        let known = self.known.lock().unwrap();
        let found = known.iter().find(|one| one.identity() == query.identity && one.key_id() == query.key_id);
        Ok(found.or(query.presented).cloned())
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        self.works()?;
        let known = self.known.lock().unwrap();
        let meant = known.iter().filter(|one| match query.recipient {
            Recipient::One(identity) => one.identity() == identity,
            Recipient::Mappers => one.identity().role() == Role::Mapper,
        });
        Ok(meant.cloned().collect())
    }

    fn learned(&self, certificate: &Arc<Certificate>, _: Timestamp) {
        self.known.lock().unwrap().push(certificate.clone());
    }
}

fn node(pki: &Pki, credentials: Credentials) -> (Arc<Learner>, SecureSerializer) {
    with_trust(credentials, pki.ca.trust().unwrap())
}

fn with_trust(credentials: Credentials, trust: Trust) -> (Arc<Learner>, SecureSerializer) {
    let store = Arc::new(Learner::default());
    let builder = SecureSerializer::builder(credentials, store.clone(), trust);
    (store, builder.started_at(at(0)).build().unwrap())
}

fn request() -> Packet {
    Packet::Request(Request::new("/a/b".parse().unwrap(), Payload::from("x")))
}

fn register() -> Packet {
    let (identity, services) = (agent("fred"), vec!["/a/b".parse().unwrap()]);
    Register { identity, services, status: Status::new(0.5), tags: vec![], files: vec![], instance: None }.into()
}

#[test]
fn s02_nodes_that_know_only_the_ca_come_to_know_each_other() {
    let pki = Pki::new(KeyType::P256);
    let (at_mapper, m1) = node(&pki, pki.stranger(&mapper("m1")));
    let (at_agent, fred) = node(&pki, pki.stranger(&agent("fred")));
    let to_mappers = SealRequest::new(&Audience::Mappers, at(1));
    let error = fred.seal(&register(), &to_mappers).unwrap_err();
    assert!(matches!(error, SealError::NoRecipient(_)), "nobody to encrypt to yet: {error}");

    let advertise = m1.seal(&Advertise::default().into(), &SealRequest::new(&Audience::Agents, at(1))).unwrap();
    fred.open(&advertise.bytes, &OpenContext::new(InboundQueue::AgentControl, at(2))).unwrap();
    assert_eq!((at_agent.knows(), at_mapper.knows()), (1, 0));
    let register = fred.seal(&register(), &to_mappers).unwrap();
    m1.open(&register.bytes, &OpenContext::new(InboundQueue::Presence, at(2))).unwrap();
    assert_eq!(at_mapper.knows(), 1);
    let request_to_fred = m1.seal(&request(), &SealRequest::new(&Audience::One(agent("fred")), at(3))).unwrap();
    let inbound = fred.open(&request_to_fred.bytes, &OpenContext::new(InboundQueue::AgentInbox, at(3))).unwrap();
    assert_eq!(inbound.sender(), Some(&mapper("m1")));
    assert!(at_mapper.asked.load(Ordering::SeqCst) > 0);
}

#[test]
fn s02_a_store_is_told_only_of_certificates_that_proved_good() {
    let pki = Pki::new(KeyType::P256);
    let (at_agent, fred) = node(&pki, pki.stranger(&agent("fred")));
    let context = OpenContext::new(InboundQueue::AgentControl, at(2));
    let advertise = |pki: &Pki| {
        let (_, m1) = node(pki, pki.stranger(&mapper("m1")));
        m1.seal(&Advertise::default().into(), &SealRequest::new(&Audience::Agents, at(1))).unwrap().bytes
    };
    let strange = advertise(&Pki::new(KeyType::P256));
    assert_eq!(fred.open(&strange, &context).unwrap_err().kind, OpenErrorKind::BadCertificate);
    let mut changed = advertise(&pki);
    *changed.last_mut().unwrap() ^= 1;
    assert_eq!(fred.open(&changed, &context).unwrap_err().kind, OpenErrorKind::BadSignature);
    assert_eq!(at_agent.knows(), 0);
    fred.open(&advertise(&pki), &context).unwrap();
    assert_eq!(at_agent.knows(), 1);
}

#[test]
fn s02_a_store_that_fails_refuses_and_loses_nothing() {
    let pki = Pki::new(KeyType::P256);
    let (at_agent, fred) = node(&pki, pki.stranger(&agent("fred")));
    let m1 = pki.stranger(&mapper("m1"));
    at_agent.learned(m1.certificate(), at(0));
    let (at_mapper, m1) = node(&pki, m1);
    at_mapper.learned(pki.credentials(&agent("nobody")).certificate(), at(0));
    let to = Audience::One(agent("nobody"));
    at_mapper.broken.store(true, Ordering::SeqCst);
    let error = m1.seal(&request(), &SealRequest::new(&to, at(1))).unwrap_err();
    assert!(matches!(error, SealError::Store(_)), "{error}");

    let advertise = m1.seal(&Advertise::default().into(), &SealRequest::new(&Audience::Agents, at(1))).unwrap();
    let context = OpenContext::new(InboundQueue::AgentControl, at(2));
    at_agent.broken.store(true, Ordering::SeqCst);
    let error = fred.open(&advertise.bytes, &context).unwrap_err();
    assert_eq!(error.kind, OpenErrorKind::UnknownSigner);
    assert!(error.why.contains("the database is away"), "{error}");
    at_agent.broken.store(false, Ordering::SeqCst);
    fred.open(&advertise.bytes, &context).unwrap();
}

fn credentials(forged: &Forged, intermediates: Vec<Vec<u8>>) -> Credentials {
    let certificate = Arc::new(Certificate::from_der(&forged.der()).unwrap());
    let key = PrivateKey::new(forged.key.clone()).unwrap();
    Credentials::new(certificate, key).unwrap().with_intermediates(intermediates)
}

/// A root, a CA below it, and a leaf of that CA for this node.
fn below(root: &Forged, ca: &Forged, uri: &str) -> Credentials {
    assert!(root.x509.subject_name().try_cmp(ca.x509.issuer_name()).unwrap().is_eq());
    let leaf = Forge::leaf().set(Nid::SUBJECT_ALT_NAME, &format!("URI:spiffe://example.org/{uri}")).signed_by(ca);
    credentials(&leaf, vec![ca.der()])
}

#[test]
fn s02_certificates_in_between_come_with_a_registration_and_are_remembered() {
    let root = Forge::ca("root").self_signed();
    let (agents, mappers) = (Forge::ca("agents").signed_by(&root), Forge::ca("mappers").signed_by(&root));
    let trust = || Trust::authorities([root.x509.clone()]).unwrap();
    let (at_mapper, m1) = with_trust(below(&root, &mappers, "mapper/m1"), trust());
    let (_, fred) = with_trust(below(&root, &agents, "agent/fred"), trust());
    let advertise = m1.seal(&Advertise::default().into(), &SealRequest::new(&Audience::Agents, at(1))).unwrap();
    fred.open(&advertise.bytes, &OpenContext::new(InboundQueue::AgentControl, at(1))).unwrap();

    let register = fred.seal(&register(), &SealRequest::new(&Audience::Mappers, at(2))).unwrap();
    let opened = m1.open(&register.bytes, &OpenContext::new(InboundQueue::Presence, at(2))).unwrap();
    let proof = opened.signer().unwrap().proof().unwrap();
    assert_eq!(proof.certificates.len(), 2);
    assert_eq!(proof.certificates[0], at_mapper.known.lock().unwrap()[0].der(), "the sender's in front");
    // Hours later, when every verdict is made anew, a heartbeat comes without them, and a request goes out.
    let ping = Packet::Ping(Ping { identity: agent("fred"), status: Status::new(0.5), instance: None });
    let later = at(7_200);
    let ping = fred.seal(&ping, &SealRequest::new(&Audience::Mappers, later)).unwrap();
    m1.open(&ping.bytes, &OpenContext::new(InboundQueue::Presence, later)).unwrap();
    let work = m1.seal(&request(), &SealRequest::new(&Audience::One(agent("fred")), later)).unwrap();
    fred.open(&work.bytes, &OpenContext::new(InboundQueue::AgentInbox, later)).unwrap();
}

/// What comes along is not signed: whoever carries a message can put other certificates beside the signer's.
#[test]
fn s10_certificates_put_into_a_message_on_its_way_do_not_shut_its_sender_out() {
    let root = Forge::ca("root").self_signed();
    let between = Forge::ca("agents").signed_by(&root);
    let other = Der::parse(&Forge::ca("other").self_signed().der());
    let junk = Der::Node(0x30, vec![Der::Leaf(5, vec![])]);
    let trust = || Trust::authorities([root.x509.clone()]).unwrap();
    for put in [junk, other] {
        let mapper_leaf =
            Forge::leaf().set(Nid::SUBJECT_ALT_NAME, "URI:spiffe://example.org/mapper/m1").signed_by(&root);
        let (_, m1) = with_trust(credentials(&mapper_leaf, vec![]), trust());
        let of_fred = below(&root, &between, "agent/fred");
        let own = Der::parse(of_fred.certificate().der());
        let (at_agent, fred) = with_trust(of_fred, trust());
        at_agent.learned(credentials(&mapper_leaf, vec![]).certificate(), at(0));
        let seal = |packet: Packet, now| fred.seal(&packet, &SealRequest::new(&Audience::Mappers, now)).unwrap().bytes;
        let ping = || Packet::Ping(Ping { identity: agent("fred"), status: Status::new(0.5), instance: None });
        let open = |bytes: &[u8], now| m1.open(bytes, &OpenContext::new(InboundQueue::Presence, now)).map(drop);
        open(&seal(register(), at(2)), at(2)).unwrap();

        let mut carried = tamper::Forged::new(&seal(register(), at(3)));
        let mut certificates = vec![own, put];
        certificates.sort_by_key(Der::bytes);
        *carried.signed().at(&[3]).children() = certificates;
        // Taken or not: what matters is what is left behind when verdicts are made anew.
        let _ = open(&carried.bytes(), at(3));
        open(&seal(ping(), at(7_200)), at(7_200)).unwrap();
    }
}

#[test]
fn s10_revoked_signers_and_recipients_are_refused() {
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
    assert_eq!(store.knows(), 0);
    store.learned(credentials(&m1, vec![]).certificate(), at(0));
    let error = reader.seal(&register(), &SealRequest::new(&Audience::Mappers, at(2))).unwrap_err();
    assert!(matches!(&error, SealError::NoRecipient(whom) if whom.contains("revoked")), "{error}");
    let (_, other) = with_trust(credentials(&fred, vec![]), trust(&[]));
    other.open(&advertise, &context).unwrap();
}

/// Answers when it is told to.
#[derive(Debug)]
struct Slow {
    known: Arc<Peers>,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Slow {
    fn wait(&self) {
        drop(self.opened.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
    }
}

impl CertificateStore for Slow {
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
fn s02_a_store_that_blocks_holds_up_nothing_but_its_messages() {
    let now = SystemClock.now();
    let pki = Pki::starting(KeyType::P256, now);
    pki.credentials(&agent("fred"));
    let m1 = pki.credentials(&mapper("m1"));
    let store = Arc::new(Slow { known: pki.peers.clone(), open: Mutex::new(false), opened: Condvar::new() });
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
    assert!(sealing.iter().all(|task| !task.is_finished()), "the store has not answered yet");

    *store.open.lock().unwrap() = true;
    store.opened.notify_all();
    for task in sealing {
        runtime.block_on(task).unwrap().unwrap();
    }
    assert_eq!(other_work, Ok(()), "all threads waited for the store");
}
