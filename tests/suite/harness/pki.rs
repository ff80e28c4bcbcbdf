//! Certificates for tests: a CA, nodes with their credentials, and a store with the certificates that a test puts in.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nanite::certs::{
    Certificate, CertificateAuthority, CertificateStore, Credentials, KeyType, Recipient, RecipientQuery, SignerQuery,
    StoreError,
};
use nanite::clock::Timestamp;
use nanite::packet::{Identity, Role};
use nanite::security::{SecureSerializer, SecureSerializerBuilder};

/// The start time of tests with a scripted clock.
pub const T0: Timestamp = Timestamp::from_secs(1_795_500_000);

/// The start of the serializers of such tests: early enough that they accept messages from [`T0`] on that do not name their process.
pub const STARTED: Timestamp = Timestamp::from_secs(1_795_500_000 - 60);

/// This many seconds after [`T0`].
pub fn at(seconds: u64) -> Timestamp {
    T0.saturating_add(Duration::from_secs(seconds))
}

/// A store that returns the certificates that a test put in, trusted or not.
#[derive(Debug, Default)]
pub struct Peers {
    certificates: Mutex<Vec<Arc<Certificate>>>,
    pub learned: Mutex<Vec<Arc<Certificate>>>,
}

impl Peers {
    pub fn put(&self, certificate: &Arc<Certificate>) {
        self.certificates.lock().unwrap().push(certificate.clone());
    }
}

impl CertificateStore for Peers {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        let known = self.certificates.lock().unwrap();
        let is_signer =
            |found: &&Arc<Certificate>| found.identity() == query.identity && found.key_id() == query.key_id;
        Ok(known.iter().find(is_signer).cloned())
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        let known = self.certificates.lock().unwrap();
        let recipients = known.iter().filter(|found| match query.recipient {
            Recipient::One(identity) => found.identity() == identity,
            Recipient::Mappers => found.identity().role() == Role::Mapper,
            _ => false,
        });
        Ok(recipients.cloned().collect())
    }

    fn may_block(&self, _now: Timestamp) -> bool {
        false
    }

    fn learn(&self, certificate: &Arc<Certificate>, _now: Timestamp) {
        self.learned.lock().unwrap().push(certificate.clone());
    }
}

/// A CA, and a store with all certificates that it has issued.
pub struct Pki {
    pub ca: CertificateAuthority,
    pub peers: Arc<Peers>,
    issued: Mutex<HashMap<Identity, Credentials>>,
    key_type: KeyType,
    /// From when the certificates are valid.
    start: Timestamp,
}

impl Pki {
    /// A CA that is valid from [`T0`], whose nodes have keys of this type.
    pub fn new(key_type: KeyType) -> Self {
        Self::starting(key_type, T0)
    }

    /// A CA that is valid from this time, for tests with the system clock.
    pub fn starting(key_type: KeyType, start: Timestamp) -> Self {
        let valid_for = CertificateAuthority::VALID_FOR;
        let ca = CertificateAuthority::create("example.org", KeyType::P256, valid_for, start).unwrap();
        Self { ca, peers: Arc::default(), issued: Mutex::default(), key_type, start }
    }

    /// The credentials of a node, whose certificate is in the store.
    pub fn credentials(&self, identity: &Identity) -> Credentials {
        let mut issued = self.issued.lock().unwrap();
        let make = || {
            let credentials = self.stranger(identity);
            self.peers.put(credentials.certificate());
            credentials
        };
        issued.entry(identity.clone()).or_insert_with(make).clone()
    }

    /// The credentials of a node whose certificate is not in the store.
    pub fn stranger(&self, identity: &Identity) -> Credentials {
        self.ca.issue(identity, self.key_type, CertificateAuthority::LEAF_VALID_FOR, self.start).unwrap()
    }

    /// A builder of a serializer for a node that started at [`STARTED`].
    pub fn builder(&self, identity: &Identity) -> SecureSerializerBuilder {
        self.builder_for(self.credentials(identity))
    }

    /// The same, with credentials of the test's own.
    pub fn builder_for(&self, credentials: Credentials) -> SecureSerializerBuilder {
        let trust = self.ca.trust().unwrap();
        SecureSerializer::builder(credentials, self.peers.clone(), trust).started_at(STARTED)
    }

    /// A serializer for a node that started at [`STARTED`].
    pub fn serializer(&self, identity: &Identity) -> SecureSerializer {
        self.builder(identity).build().unwrap()
    }
}

/// The agent of this name.
pub fn agent(name: &str) -> Identity {
    Identity::agent(name).unwrap()
}

/// The mapper of this name.
pub fn mapper(name: &str) -> Identity {
    Identity::mapper(name).unwrap()
}
