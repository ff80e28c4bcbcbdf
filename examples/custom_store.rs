//! A custom certificate store: it reads all certificates from one JSON file, `{"nanite-fred": "-----BEGIN CERTIFICATE..."}`, as a secret
//! store or a database might provide them.
//!
//! Needs no broker: creates a CA and two nodes in memory, and sends one sealed request from one to the other.
//!
//!     cargo run --example custom_store

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

use nanite::certs::{
    CachedCertificateStore, Certificate, CertificateAuthority, CertificateStore, KeyType, RecipientQuery, SignerQuery,
    StaticCertificateStore, StoreError,
};
use nanite::clock::{Clock, SystemClock};
use nanite::packet::{Identity, Packet, Payload, Request};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, OpenContext, SealRequest, Serializer, Verification};

/// Reads the file for every query; the cache in front of it makes queries rare.
#[derive(Debug)]
struct JsonStore {
    path: std::path::PathBuf,
}

impl JsonStore {
    fn load(&self) -> Result<StaticCertificateStore, StoreError> {
        let invalid = |why: String| StoreError::Invalid { location: self.path.display().to_string(), why };
        let unreadable = |source| StoreError::Unreadable { path: self.path.clone(), source };
        let text = std::fs::read_to_string(&self.path).map_err(unreadable)?;
        let pems: BTreeMap<String, String> = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        let read = |pem: &String| Certificate::from_pem(pem.as_bytes()).map(Arc::new);
        let certificates: Result<Vec<_>, _> = pems.values().map(read).collect();
        Ok(StaticCertificateStore::new(certificates.map_err(|error| invalid(error.to_string()))?))
    }
}

impl CertificateStore for JsonStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        self.load()?.signer(query)
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        self.load()?.recipients(query)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let now = SystemClock.now();
    let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
    let issue = |identity: &Identity| ca.issue(identity, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now);
    let (control, fred) = (issue(&Identity::mapper("control")?)?, issue(&Identity::agent("fred")?)?);

    let directory = tempfile::tempdir()?;
    let path = directory.path().join("certificates.json");
    let mut pems = BTreeMap::new();
    for node in [&control, &fred] {
        let certificate = node.certificate();
        pems.insert(certificate.identity().to_string(), String::from_utf8(certificate.to_pem())?);
    }
    std::fs::write(&path, serde_json::to_string_pretty(&pems)?)?;

    let store = Arc::new(CachedCertificateStore::new(JsonStore { path }));
    let to = Audience::One(fred.certificate().identity().clone());
    let mapper = SecureSerializer::builder(control, store.clone(), ca.trust()?).build()?;
    let agent = SecureSerializer::builder(fred, store, ca.trust()?).build()?;

    let request = Packet::Request(Request::new("/simple/echo".parse()?, Payload::from("hello")));
    // A process that has just started opens what names it.
    let instances = [agent.instance()];
    let mut options = SealRequest::new(&to, SystemClock.now());
    options.instances = &instances;
    let sealed = mapper.seal(&request, &options)?;
    println!("sealed: {} bytes, encrypted for nanite-fred only", sealed.bytes.len());
    let opened = agent.open(&sealed.bytes, &OpenContext::new(InboundQueue::AgentInbox, SystemClock.now()))?;
    let signer = opened.signer().ok_or("the message has no verified signer")?;
    if opened.packet != request {
        return Err("the opened packet differs".into());
    }
    println!("opened: the same packet, signed by {}", signer.signer());
    Ok(())
}
