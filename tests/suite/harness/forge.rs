//! Certificates that `nanite certs` would never make, built with OpenSSL: each with one fault.

use std::time::Duration;

use nanite::clock::Timestamp;
use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::ec::{Asn1Flag, EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::x509::extension::AuthorityKeyIdentifier;
use openssl::x509::{
    CrlNumber, X509, X509Builder, X509Crl, X509CrlBuilder, X509Extension, X509Name, X509RevokedBuilder,
};

use super::pki::T0;

const DAY: Duration = Duration::from_secs(86_400);

/// A certificate and its key.
pub struct Forged {
    pub x509: X509,
    pub key: PKey<Private>,
}

/// The content of a certificate to forge.
pub struct Forge {
    pub subject: String,
    pub key: PKey<Private>,
    pub from: Timestamp,
    pub to: Timestamp,
    /// Extensions in OpenSSL's syntax, in this order.
    pub extensions: Vec<(Nid, String)>,
    pub digest: MessageDigest,
}

pub fn p256() -> PKey<Private> {
    curve(Nid::X9_62_PRIME256V1)
}

pub fn curve(nid: Nid) -> PKey<Private> {
    PKey::from_ec_key(EcKey::generate(&EcGroup::from_curve_name(nid).unwrap()).unwrap()).unwrap()
}

/// A key on P-256 that is encoded with the curve's parameters in place of its name.
pub fn explicit_p256() -> PKey<Private> {
    let mut group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    group.set_asn1_flag(Asn1Flag::EXPLICIT_CURVE);
    PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
}

pub fn rsa(bits: u32) -> PKey<Private> {
    PKey::from_rsa(Rsa::generate(bits).unwrap()).unwrap()
}

impl Forge {
    /// A valid leaf for `nanite-fred`.
    pub fn leaf() -> Self {
        Self::with(
            "fred",
            &[
                (Nid::BASIC_CONSTRAINTS, "critical,CA:FALSE"),
                (Nid::KEY_USAGE, "critical,digitalSignature,keyAgreement"),
                (Nid::SUBJECT_ALT_NAME, "URI:spiffe://example.org/agent/fred"),
            ],
        )
    }

    /// A valid CA with this name.
    pub fn ca(name: &str) -> Self {
        Self::with(
            name,
            &[(Nid::BASIC_CONSTRAINTS, "critical,CA:TRUE"), (Nid::KEY_USAGE, "critical,keyCertSign,cRLSign")],
        )
    }

    fn with(subject: &str, extensions: &[(Nid, &str)]) -> Self {
        let ids = [(Nid::SUBJECT_KEY_IDENTIFIER, "hash"), (Nid::AUTHORITY_KEY_IDENTIFIER, "keyid:always")];
        let extensions = ids.iter().chain(extensions).map(|(nid, value)| (*nid, (*value).to_owned()));
        let (from, to) = (T0.saturating_sub(DAY), T0.saturating_add(DAY * 30));
        let extensions = extensions.collect();
        Self { subject: subject.to_owned(), key: p256(), from, to, extensions, digest: MessageDigest::sha256() }
    }

    /// Replaces the extension of this kind, or removes it if the value is empty.
    pub fn set(mut self, nid: Nid, value: &str) -> Self {
        self.extensions.retain(|(other, _)| *other != nid);
        if !value.is_empty() {
            self.extensions.push((nid, value.to_owned()));
        }
        self
    }

    pub fn key(self, key: PKey<Private>) -> Self {
        Self { key, ..self }
    }

    pub fn valid(self, from: Timestamp, to: Timestamp) -> Self {
        Self { from, to, ..self }
    }

    pub fn digest(self, digest: MessageDigest) -> Self {
        Self { digest, ..self }
    }

    /// Signs it with its own key.
    pub fn self_signed(self) -> Forged {
        self.sign(None)
    }

    /// Signs it with the issuer's key.
    pub fn signed_by(self, issuer: &Forged) -> Forged {
        self.sign(Some(issuer))
    }

    fn sign(self, issuer: Option<&Forged>) -> Forged {
        let name = name(&self.subject);
        let mut builder = X509Builder::new().unwrap();
        let mut serial = [0; 15];
        openssl::rand::rand_bytes(&mut serial).unwrap();
        let serial = BigNum::from_slice(&serial).unwrap().to_asn1_integer().unwrap();
        builder.set_version(2).unwrap();
        builder.set_serial_number(&serial).unwrap();
        builder.set_subject_name(&name).unwrap();
        builder.set_issuer_name(issuer.map_or(&name, |issuer| issuer.x509.subject_name())).unwrap();
        builder.set_not_before(&time(self.from)).unwrap();
        builder.set_not_after(&time(self.to)).unwrap();
        builder.set_pubkey(&self.key).unwrap();
        for (nid, value) in &self.extensions {
            let context = builder.x509v3_context(issuer.map(|issuer| issuer.x509.as_ref()), None);
            // OpenSSL cannot add it to a self-signed certificate that is not built yet.
            if *nid == Nid::AUTHORITY_KEY_IDENTIFIER && issuer.is_none() {
                continue;
            }
            #[expect(deprecated, reason = "the only function that accepts every extension")]
            let extension = X509Extension::new_nid(None, Some(&context), *nid, value).unwrap();
            builder.append_extension(extension).unwrap();
        }
        builder.sign(issuer.map_or(&self.key, |issuer| &issuer.key), self.digest).unwrap();
        Forged { x509: builder.build(), key: self.key }
    }
}

impl Forged {
    /// A list of the certificates that this CA has revoked, valid between two times.
    pub fn crl(&self, revoked: &[&X509], from: Timestamp, to: Timestamp) -> X509Crl {
        let mut builder = X509CrlBuilder::new().unwrap();
        builder.set_issuer_name(self.x509.subject_name()).unwrap();
        builder.set_last_update(&time(from)).unwrap();
        builder.set_next_update(&time(to)).unwrap();
        // A list needs at least one entry.
        let other = BigNum::from_u32(1).unwrap().to_asn1_integer().unwrap();
        for serial in std::iter::once(&*other).chain(revoked.iter().map(|x509| x509.serial_number())) {
            let mut entry = X509RevokedBuilder::new().unwrap();
            entry.set_serial_number(serial).unwrap();
            entry.set_revocation_date(&time(from)).unwrap();
            builder.add_revoked(entry.build()).unwrap();
        }
        let dummy = X509::builder().unwrap();
        let context = dummy.x509v3_context(Some(&self.x509), None);
        builder.append_extension(AuthorityKeyIdentifier::new().keyid(true).build(&context).unwrap()).unwrap();
        let number = CrlNumber::new(BigNum::from_u32(1).unwrap()).unwrap().build().unwrap();
        builder.append_extension(number).unwrap();
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        builder.build().unwrap()
    }

    pub fn der(&self) -> Vec<u8> {
        self.x509.to_der().unwrap()
    }
}

fn name(subject: &str) -> X509Name {
    let mut name = X509Name::builder().unwrap();
    name.append_entry_by_nid(Nid::COMMONNAME, subject).unwrap();
    name.build()
}

fn time(at: Timestamp) -> Asn1Time {
    Asn1Time::from_unix(i64::try_from(at.as_secs()).unwrap()).unwrap()
}
