//! Certificates and chains: nothing panics; a certificate that parses means the same to a second parser; and a trusted certificate was
//! issued by the CA, for a node of its domain, and is valid now. Each input is checked unchanged, and again with a valid signature of the CA
//! that it names.
//!
//! An input is a text, or certificates in DER, one after the other: a leaf, and the certificates sent with it.

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

/// The root CA.
pub static ROOT: LazyLock<Authority> = LazyLock::new(|| Authority::read("root"));
/// The CA below the root.
static INTERMEDIATE: LazyLock<Authority> = LazyLock::new(|| Authority::read("intermediate"));

/// The issuer name in the certificates of the intermediate CA.
const INTERMEDIATE_NAME: &[u8] = b"fuzz intermediate";
/// The trust domain of the nodes.
const DOMAIN: &str = "example.org";

/// The signed part of each certificate that a CA issued.
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
    if let Some(certificate) = check(leaf, others) {
        let genuine = der::signed_part(certificate.der()).is_some_and(|part| ISSUED.contains(&part));
        assert!(genuine, "trusted, but not issued by a CA");
    }
    if let Some(part) = der::signed_part(leaf) {
        let by_intermediate = part.windows(INTERMEDIATE_NAME.len()).any(|window| window == INTERMEDIATE_NAME);
        let key = if by_intermediate { &INTERMEDIATE.key } else { &ROOT.key };
        check(&der::signed(&part, key), &[INTERMEDIATE.x509.to_der().unwrap()]);
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

/// Parses a certificate, compares it with a second parser, and returns it if it is trusted.
fn check(leaf: &[u8], others: &[Vec<u8>]) -> Option<Arc<Certificate>> {
    let certificate = Certificate::from_der(leaf);
    drop(ErrorStack::get());
    let certificate = Arc::new(certificate.ok()?);
    let again = Certificate::from_der(certificate.der()).expect("does not parse a second time");
    assert_eq!(again.fingerprint(), certificate.fingerprint());
    let second = x509_cert::Certificate::from_der(certificate.der()).expect("not DER");
    compare(&certificate, &second);
    check_store(&certificate);
    let trust = Trust::authorities([ROOT.x509.clone()]).unwrap().for_domain(DOMAIN);
    trust.verify(&certificate, others, NOW).ok()?;
    check_trusted(&certificate, &second);
    Some(certificate)
}

/// Both parsers read the same.
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
    assert!(constraints.is_none_or(|(_, constraints)| !constraints.ca), "is a CA certificate");
}

/// A store finds it by its identity and key id.
fn check_store(certificate: &Arc<Certificate>) {
    let store = StaticCertificateStore::new([certificate.clone()]);
    let query = SignerQuery::new(certificate.identity(), certificate.key_id(), NOW);
    assert!(store.signer(&query).unwrap().is_some());
    let to = store.recipients(&RecipientQuery::new(Recipient::One(certificate.identity()), NOW)).unwrap();
    assert_eq!(!to.is_empty(), certificate.is_valid_at(NOW));
}

/// Checks what must be true of every trusted certificate, as the second parser reads it.
fn check_trusted(certificate: &Certificate, second: &x509_cert::Certificate) {
    let signed = &second.tbs_certificate;
    assert_eq!(certificate.domain(), DOMAIN);
    assert!(signed.validity.not_before.to_unix_duration().as_secs() <= NOW.as_secs());
    assert!(NOW.as_secs() < signed.validity.not_after.to_unix_duration().as_secs());
    let (_, usage) = signed.get::<KeyUsage>().unwrap().expect("no key usage");
    assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());
    let issuers = [&ROOT.x509, &INTERMEDIATE.x509];
    // Names are compared as RFC 5280, section 7.1, says, not byte by byte.
    let issuer = certificate.x509().issuer_name();
    let is_issuer = |ca: &&X509| ca.subject_name().try_cmp(issuer).is_ok_and(|order| order.is_eq());
    let authority = issuers.into_iter().find(is_issuer).expect("not issued by a CA of ours");
    assert!(certificate.x509().verify(&authority.public_key().unwrap()).unwrap(), "the signature is not the issuer's");
    for extension in signed.extensions.iter().flatten().filter(|extension| extension.critical) {
        let id = extension.extn_id.to_string();
        let known = ["2.5.29.", "1.3.6.1.5.5.7.1.", "2.16.840.1.113730.1."].iter().any(|arc| id.starts_with(arc));
        assert!(known, "an unknown critical extension: {id}");
    }
}
