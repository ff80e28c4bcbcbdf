//! Certificates and chains: nothing panics; what is read says the same to a second parser; and what is believed was issued by the CA,
//! for a node of its domain, for now. Each input is looked at as it is, and once more signed anew by the CA that it names.
//!
//! An input is a text, or certificates in DER one after the other: a leaf, and what comes along.

use std::sync::{Arc, LazyLock};

use nanite::certs::{Certificate, CertificateRequest, CertificateStore, Recipient, RecipientQuery, SignerQuery};
use nanite::certs::{StaticCertificateStore, Trust};
use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::x509::X509;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage, SubjectAltName, SubjectKeyIdentifier};

use super::der;
use super::world::{NOW, read};

/// A CA of `fuzz/pki`: its certificate and key.
pub struct Authority {
    /// The certificate.
    pub x509: X509,
    /// The key.
    pub key: PKey<Private>,
}

impl Authority {
    fn read(name: &str) -> Self {
        let pem = |name: &str| read(&format!("fuzz/pki/{name}.pem"));
        let key = PKey::private_key_from_pem(&pem(&format!("{name}-key"))).unwrap();
        Self { x509: X509::from_pem(&pem(name)).unwrap(), key }
    }
}

/// The root, and the CA below it.
pub static ROOT: LazyLock<Authority> = LazyLock::new(|| Authority::read("root"));
static INTERMEDIATE: LazyLock<Authority> = LazyLock::new(|| Authority::read("intermediate"));

/// The name in the certificates that the CA below the root has issued.
const BELOW: &[u8] = b"fuzz intermediate";
/// The domain of the nodes.
const DOMAIN: &str = "example.org";

/// What was signed of each certificate that was truly issued.
static ISSUED: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let all = X509::stack_from_pem(&read("fuzz/pki/issued.pem")).unwrap();
    all.iter().map(|x509| der::signed_part(&x509.to_der().unwrap()).unwrap()).collect()
});

/// The target.
pub fn run(data: &[u8]) {
    read_text(data);
    let mut all = Vec::new();
    let mut rest = data;
    while let Some((_, after)) = der::content(rest).filter(|_| all.len() < 9) {
        all.push(rest[..rest.len() - after.len()].to_vec());
        rest = after;
    }
    let Some((leaf, others)) = all.split_first() else { return };
    if let Some(certificate) = judge(leaf, others) {
        let genuine = der::signed_part(certificate.der()).is_some_and(|part| ISSUED.contains(&part));
        assert!(genuine, "believed, and issued by nobody");
    }
    if let Some(part) = der::signed_part(leaf) {
        let below = part.windows(BELOW.len()).any(|window| window == BELOW);
        let key = if below { &INTERMEDIATE.key } else { &ROOT.key };
        judge(&der::signed(&part, key), &[INTERMEDIATE.x509.to_der().unwrap()]);
    }
}

fn read_text(data: &[u8]) {
    let _ = Certificate::from_pem(data);
    let _ = CertificateRequest::from_pem(data);
    if let Ok(trust) = Trust::from_pem(data) {
        assert!(!trust.certificates().is_empty());
    }
    drop(ErrorStack::get());
}

/// Reads a certificate, compares what is read, and gives it back when it is believed.
fn judge(leaf: &[u8], others: &[Vec<u8>]) -> Option<Arc<Certificate>> {
    let certificate = Certificate::from_der(leaf);
    drop(ErrorStack::get());
    let certificate = Arc::new(certificate.ok()?);
    let again = Certificate::from_der(certificate.der()).expect("it does not read back");
    assert_eq!(again.fingerprint(), certificate.fingerprint());
    let second = x509_cert::Certificate::from_der(certificate.der()).expect("no DER");
    compare(&certificate, &second);
    ask(&certificate);
    let trust = Trust::authorities([ROOT.x509.clone()]).unwrap().for_domain(DOMAIN);
    trust.verify(&certificate, others, NOW).ok()?;
    check_believed(&certificate, &second);
    Some(certificate)
}

/// What is read here is what another parser reads.
fn compare(certificate: &Certificate, second: &x509_cert::Certificate) {
    let (_, names) = second.tbs_certificate.get::<SubjectAltName>().unwrap().expect("no names");
    let uris: Vec<&str> = names
        .0
        .iter()
        .filter_map(|name| match name {
            GeneralName::UniformResourceIdentifier(uri) => Some(uri.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(uris, [certificate.identity().uri(certificate.domain())]);
    let (_, key_id) = second.tbs_certificate.get::<SubjectKeyIdentifier>().unwrap().expect("no key id");
    assert_eq!(key_id.0.as_bytes(), certificate.key_id().as_bytes());
    let validity = &second.tbs_certificate.validity;
    assert_eq!(validity.not_before.to_unix_duration().as_secs(), certificate.not_before().as_secs());
    assert_eq!(validity.not_after.to_unix_duration().as_secs(), certificate.not_after().as_secs());
    let constraints = second.tbs_certificate.get::<BasicConstraints>().unwrap();
    assert!(constraints.is_none_or(|(_, constraints)| !constraints.ca), "a CA's");
}

/// A store answers with it for its name and key, and for no other.
fn ask(certificate: &Arc<Certificate>) {
    let store = StaticCertificateStore::new([certificate.clone()]);
    let query = SignerQuery::new(certificate.identity(), certificate.key_id(), NOW);
    assert!(store.signer(&query).unwrap().is_some());
    let to = store.recipients(&RecipientQuery::new(Recipient::One(certificate.identity()), NOW)).unwrap();
    assert_eq!(!to.is_empty(), certificate.is_valid_at(NOW));
}

/// What holds for everything that is believed, as another parser reads it.
fn check_believed(certificate: &Certificate, second: &x509_cert::Certificate) {
    let signed = &second.tbs_certificate;
    assert_eq!(certificate.domain(), DOMAIN);
    assert!(signed.validity.not_before.to_unix_duration().as_secs() <= NOW.as_secs());
    assert!(NOW.as_secs() < signed.validity.not_after.to_unix_duration().as_secs());
    let (_, usage) = signed.get::<KeyUsage>().unwrap().expect("no key usage");
    assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());
    let issuers = [&ROOT.x509, &INTERMEDIATE.x509];
    // Names are the same or not as RFC 5280 (section 7.1) compares them, not byte by byte.
    let issuer = certificate.x509().issuer_name();
    let is_issuer = |ca: &&X509| ca.subject_name().try_cmp(issuer).is_ok_and(|order| order.is_eq());
    let by = issuers.into_iter().find(is_issuer).expect("another issuer");
    assert!(certificate.x509().verify(&by.public_key().unwrap()).unwrap(), "another signature");
    for extension in signed.extensions.iter().flatten().filter(|extension| extension.critical) {
        let id = extension.extn_id.to_string();
        let known = ["2.5.29.", "1.3.6.1.5.5.7.1.", "2.16.840.1.113730.1."].iter().any(|arc| id.starts_with(arc));
        assert!(known, "a critical extension that nobody knows: {id}");
    }
}
