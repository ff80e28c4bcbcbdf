//! s04: which certificates are trusted, and why others are refused.

use nanite::certs::{
    AuthorityError, Certificate, CertificateError, CertificateRequest, IssueError, KeyError, PrivateKey, Trust,
    TrustError,
};
use nanite::clock::Timestamp;
use nanite::packet::InvalidIdentity;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::x509::{X509, X509Req};

use crate::harness::forge::{Forge, Forged, curve, explicit_p256, p256, rsa};
use crate::harness::pki::{T0, at};

const DAY: u64 = 86_400;

fn trust(ca: &Forged) -> Trust {
    Trust::authorities([ca.x509.clone()]).unwrap()
}

fn read(forged: &Forged) -> Certificate {
    Certificate::from_der(&forged.der()).unwrap()
}

/// The verification at T0 of a leaf that this CA has signed.
fn verify(ca: &Forged, leaf: Forge) -> Result<(), TrustError> {
    trust(ca).verify(&read(&leaf.signed_by(ca)), &[], T0)
}

/// The verification at T0 of a self-signed leaf by pinned trust.
fn pinned(leaf: Forge) -> Result<(), TrustError> {
    Trust::pinned().verify(&read(&leaf.self_signed()), &[], T0)
}

fn before(days: u64) -> Timestamp {
    Timestamp::from_secs(T0.as_secs() - days * DAY)
}

#[test]
fn s04_trusts_valid_certificate_of_each_suite() {
    let ca = Forge::ca("root").self_signed();
    assert_eq!(verify(&ca, Forge::leaf()), Ok(()));
    let usage = "critical,digitalSignature,keyEncipherment,keyAgreement";
    assert_eq!(verify(&ca, Forge::leaf().set(Nid::KEY_USAGE, usage)), Ok(()));
    let rsa_usage = "critical,digitalSignature,keyEncipherment";
    assert_eq!(verify(&ca, Forge::leaf().key(rsa(2048)).set(Nid::KEY_USAGE, rsa_usage)), Ok(()));
}

/// Extended key usages that include a node's purpose, and others.
const FOR_NODES: [&str; 6] = [
    "clientAuth",
    "emailProtection",
    "anyExtendedKeyUsage",
    "critical,clientAuth",
    "serverAuth,clientAuth",
    "codeSigning,emailProtection,1.3.6.1.4.1.55555.1",
];
const FOR_OTHERS: [&str; 8] = [
    "serverAuth",
    "codeSigning",
    "timeStamping",
    "OCSPSigning",
    "critical,serverAuth",
    "serverAuth,codeSigning",
    "1.3.6.1.4.1.55555.1",
    // No key purposes at all.
    "DER:3000",
];

#[test]
fn s04_rejects_certificate_limited_to_other_purposes() {
    let ca = Forge::ca("root").self_signed();
    let leaf = |usage| Forge::leaf().set(Nid::EXT_KEY_USAGE, usage);
    let refused = Err(TrustError::KeyUsage("its extended key usage allows neither clientAuth nor emailProtection"));
    for usage in FOR_NODES {
        assert_eq!(verify(&ca, leaf(usage)), Ok(()), "{usage}");
        assert_eq!(pinned(leaf(usage)), Ok(()), "{usage}");
    }
    for usage in FOR_OTHERS {
        // Without key purposes it is not an extended key usage.
        if usage.starts_with("DER") {
            let unreadable = Certificate::from_der(&leaf(usage).signed_by(&ca).der()).map(drop);
            assert_eq!(unreadable, Err(CertificateError::Malformed));
            continue;
        }
        assert_eq!(verify(&ca, leaf(usage)), refused, "{usage}");
        assert_eq!(pinned(leaf(usage)), refused, "{usage}");
    }
}

#[test]
fn s04_rejects_certificate_below_ca_limited_to_other_purposes() {
    for usage in FOR_NODES.into_iter().chain(FOR_OTHERS) {
        let root = |usage| Forge::ca("root").set(Nid::EXT_KEY_USAGE, usage).self_signed();
        let between = |root| Forge::ca("between").set(Nid::EXT_KEY_USAGE, usage).signed_by(root);
        let (free, limited) = (root(""), root(usage));
        let (of_free, of_limited) = (between(&free), Forge::ca("between").signed_by(&limited));
        let chain =
            |root, between: &Forged| trust(root).verify(&read(&Forge::leaf().signed_by(between)), &[between.der()], T0);
        // The limit of a CA holds for all below it, whatever they say themselves.
        let below = Forge::ca("below").signed_by(&of_free);
        let deep = read(&Forge::leaf().set(Nid::EXT_KEY_USAGE, "clientAuth").signed_by(&below));
        let verdicts = [
            chain(&free, &of_free),
            chain(&limited, &of_limited),
            verify(&limited, Forge::leaf()),
            trust(&free).verify(&deep, &[of_free.der(), below.der()], T0),
        ];
        for verdict in verdicts {
            match FOR_NODES.contains(&usage) {
                true => assert_eq!(verdict, Ok(()), "{usage}"),
                // OpenSSL itself refuses what it cannot read.
                false if usage.starts_with("DER") => assert!(verdict.is_err(), "{usage}"),
                false => assert_eq!(verdict, Err(TrustError::AuthorityKeyUsage), "{usage}"),
            }
        }
    }
}

#[test]
fn s04_rejects_key_with_explicit_curve_parameters() {
    let key = explicit_p256();
    let forged = Forge::leaf().key(key.clone()).self_signed();
    // The certificate really has the parameters in place of the name.
    let text = String::from_utf8(forged.x509.to_text().unwrap()).unwrap();
    assert!(text.contains("Field Type: prime-field"), "{text}");
    assert_eq!(Certificate::from_der(&forged.der()).map(drop), Err(CertificateError::KeyType));
    // A node's own key, in each form of a key file.
    let ec = key.ec_key().unwrap();
    let cipher = openssl::symm::Cipher::aes_256_cbc;
    for (what, pem) in [
        ("PKCS #8", key.private_key_to_pem_pkcs8().unwrap()),
        ("SEC 1", ec.private_key_to_pem().unwrap()),
        ("encrypted PKCS #8", key.private_key_to_pem_pkcs8_passphrase(cipher(), b"pass").unwrap()),
        ("encrypted SEC 1", ec.private_key_to_pem_passphrase(cipher(), b"pass").unwrap()),
    ] {
        let read = PrivateKey::from_pem(&pem, Some(b"pass"));
        assert!(matches!(read, Err(KeyError::KeyType)), "{what}: {read:?}");
    }
    assert!(matches!(PrivateKey::new(key.clone()), Err(KeyError::KeyType)));
    // A signing request.
    let mut request = X509Req::builder().unwrap();
    request.set_pubkey(&key).unwrap();
    request.sign(&key, MessageDigest::sha256()).unwrap();
    let refused = CertificateRequest::from_pem(&request.build().to_pem().unwrap());
    assert!(matches!(refused, Err(IssueError::KeyType)), "{refused:?}");
    // A CA, as the anchor of a chain, and below it.
    let root = Forge::ca("root").self_signed();
    let refused = "Certificate public key has explicit ECC parameters";
    for (root, between) in [
        (Forge::ca("root").key(key.clone()).self_signed(), Forge::ca("between")),
        (root, Forge::ca("between").key(key)),
    ] {
        let between = between.signed_by(&root);
        let leaf = read(&Forge::leaf().signed_by(&between));
        let trust = Trust::from_pem(&root.x509.to_pem().unwrap()).unwrap();
        assert_eq!(trust.verify(&leaf, &[between.der()], T0), Err(TrustError::Chain(refused.into())));
    }
}

#[test]
fn s04_certificate_that_is_not_a_nodes_is_not_parsed() {
    use CertificateError as E;
    let ca = Forge::ca("root").self_signed();
    let fred = "URI:spiffe://example.org/agent/fred";
    let san = |value: &str| Forge::leaf().set(Nid::SUBJECT_ALT_NAME, value);
    let cases = [
        ("no URI", san("DNS:fred.example.org"), E::IdentityCount(0)),
        ("no names at all", san(""), E::IdentityCount(0)),
        ("two URIs", san(&format!("{fred},URI:spiffe://example.org/agent/bob")), E::IdentityCount(2)),
        ("the same URI twice", san(&format!("{fred},{fred}")), E::IdentityCount(2)),
        ("another scheme", san("URI:https://example.org/agent/fred"), E::Identity(InvalidIdentity::Uri)),
        ("another role", san("URI:spiffe://example.org/root/fred"), E::Identity(InvalidIdentity::Role)),
        ("a path too many", san("URI:spiffe://example.org/agent/fred/x"), E::Identity(InvalidIdentity::Uri)),
        ("a CA", Forge::leaf().set(Nid::BASIC_CONSTRAINTS, "critical,CA:TRUE"), E::IsCa),
        ("no key id", Forge::leaf().set(Nid::SUBJECT_KEY_IDENTIFIER, ""), E::NoKeyId),
        ("another curve", Forge::leaf().key(curve(Nid::SECP384R1)), E::KeyType),
        ("a short RSA key", Forge::leaf().key(rsa(1024)), E::KeyType),
    ];
    for (what, forge, expected) in cases {
        let error = Certificate::from_der(&forge.signed_by(&ca).der()).unwrap_err();
        assert_eq!(error, expected, "{what}");
    }
    let good = Forge::leaf().signed_by(&ca).der();
    for cut in [0, 1, good.len() / 2, good.len() - 1] {
        assert_eq!(Certificate::from_der(&good[..cut]).unwrap_err(), E::Malformed, "{cut} bytes");
    }
}

#[test]
fn s04_rejects_wrong_key_usage() {
    let ca = Forge::ca("root").self_signed();
    let usage = |key: openssl::pkey::PKey<openssl::pkey::Private>, usage: &str| {
        verify(&ca, Forge::leaf().key(key).set(Nid::KEY_USAGE, usage))
    };
    let refused = |why| Err(TrustError::KeyUsage(why));
    assert_eq!(usage(p256(), ""), refused("it is not stated"));
    assert_eq!(usage(p256(), "critical,keyAgreement"), refused("digitalSignature is missing"));
    assert_eq!(usage(p256(), "critical,digitalSignature"), refused("keyAgreement is missing"));
    assert_eq!(usage(p256(), "critical,digitalSignature,keyEncipherment"), refused("keyAgreement is missing"));
    assert_eq!(usage(rsa(2048), "critical,digitalSignature,keyAgreement"), refused("keyEncipherment is missing"));
    let signs = "critical,digitalSignature,keyAgreement,keyCertSign";
    assert_eq!(usage(p256(), signs), refused("it may sign certificates or revocation lists"));
    // Pinning skips only the chain.
    assert_eq!(pinned(Forge::leaf().set(Nid::KEY_USAGE, "")), refused("it is not stated"));
    assert_eq!(pinned(Forge::leaf().valid(before(2), before(1))), Err(TrustError::Expired(before(1))));
    assert_eq!(pinned(Forge::leaf()), Ok(()));
}

#[test]
fn s04_rejects_expired_and_not_yet_valid_certificates() {
    let ca = Forge::ca("root").self_signed();
    assert_eq!(verify(&ca, Forge::leaf().valid(before(2), before(1))), Err(TrustError::Expired(before(1))));
    assert_eq!(verify(&ca, Forge::leaf().valid(at(DAY), at(2 * DAY))), Err(TrustError::NotYetValid(at(DAY))));
    let old = Forge::ca("root").valid(before(9), before(1)).self_signed();
    assert_eq!(verify(&old, Forge::leaf()), Err(TrustError::AuthorityExpired));
    let early = Forge::ca("root").valid(at(1), at(DAY)).self_signed();
    assert_eq!(verify(&early, Forge::leaf()), Err(TrustError::AuthorityNotYetValid));
}

#[test]
fn s04_rejects_certificate_of_unknown_ca() {
    let (ca, other) = (Forge::ca("root").self_signed(), Forge::ca("root").self_signed());
    let leaf = read(&Forge::leaf().signed_by(&other));
    assert_eq!(trust(&ca).verify(&leaf, &[other.der()], T0), Err(TrustError::UnknownIssuer));
    // Without an authority key identifier, no chain is built.
    let nameless = Forge::leaf().set(Nid::AUTHORITY_KEY_IDENTIFIER, "").signed_by(&other);
    let refused = trust(&ca).verify(&read(&nameless), &[], T0);
    assert!(matches!(&refused, Err(TrustError::Chain(_))), "{refused:?}");
    let own = read(&Forge::leaf().self_signed());
    assert_eq!(trust(&ca).verify(&own, &[own.der().to_vec()], T0), Err(TrustError::UnknownIssuer));
}

#[test]
fn s04_ca_with_trust_domain_is_trusted_for_it_only() {
    let named = |domain| Forge::ca("root").set(Nid::SUBJECT_ALT_NAME, &format!("URI:spiffe://{domain}")).self_signed();
    assert_eq!(verify(&named("example.org"), Forge::leaf()), Ok(()));
    let refused = TrustError::Domain { found: "example.org".into(), wanted: "example.com".into() };
    for _ in 0..2 {
        assert_eq!(verify(&named("example.com"), Forge::leaf()), Err(refused.clone()));
    }
    let unnamed = Forge::ca("root").self_signed();
    let leaf = read(&Forge::leaf().signed_by(&unnamed));
    assert_eq!(trust(&unnamed).verify(&leaf, &[], T0), Ok(()));
    assert_eq!(trust(&unnamed).for_domain("example.com").verify(&leaf, &[], T0), Err(refused));
}

#[test]
fn s04_trust_domain_stays_when_authorities_are_replaced() {
    let (old, new) = (Forge::ca("old").self_signed(), Forge::ca("new").self_signed());
    let trust_old = trust(&old).for_domain("example.com");
    let refused = TrustError::Domain { found: "example.org".into(), wanted: "example.com".into() };
    assert_eq!(trust_old.verify(&read(&Forge::leaf().signed_by(&old)), &[], T0), Err(refused.clone()));
    // The domain of the other trust is not taken over either.
    for other in [trust(&new), trust(&new).for_domain("example.org")] {
        trust_old.replace_authorities(&other);
        assert_eq!(trust_old.verify(&read(&Forge::leaf().signed_by(&new)), &[], T0), Err(refused.clone()));
        let com = Forge::leaf().set(Nid::SUBJECT_ALT_NAME, "URI:spiffe://example.com/agent/fred");
        assert_eq!(trust_old.verify(&read(&com.signed_by(&new)), &[], T0), Ok(()));
    }
    // Nor does it get lost with other revocation lists.
    let with_lists = trust(&new).for_domain("example.com").with_crls(&[new.crl(&[], before(1), at(DAY))]).unwrap();
    assert_eq!(with_lists.verify(&read(&Forge::leaf().signed_by(&new)), &[], T0), Err(refused));
}

#[test]
fn s04_chain_is_built_from_presented_or_configured_intermediates() {
    let root = Forge::ca("root").self_signed();
    let between = Forge::ca("between").signed_by(&root);
    let leaf = read(&Forge::leaf().signed_by(&between));
    assert_eq!(trust(&root).verify(&leaf, &[], T0), Err(TrustError::UnknownIssuer));
    assert_eq!(trust(&root).verify(&leaf, &[between.der()], T0), Ok(()));
    let both = Trust::authorities([between.x509.clone(), root.x509.clone()]).unwrap();
    assert_eq!(both.verify(&leaf, &[], T0), Ok(()));
    // A chain must end in a root: an intermediate certificate is not an anchor.
    assert_eq!(trust(&between).verify(&leaf, &[], T0), Err(TrustError::UnknownIssuer));
    let unreadable = trust(&root).verify(&leaf, &[vec![1, 2, 3]], T0);
    assert!(matches!(unreadable, Err(TrustError::Chain(why)) if why.contains("cannot be read")));
    let many = trust(&root).verify(&leaf, &vec![between.der(); 9], T0);
    assert!(matches!(many, Err(TrustError::Chain(why)) if why.contains("more than 8")));
}

#[test]
fn s04_ca_certificates_follow_openssls_strict_rules() {
    let root = Forge::ca("root").self_signed();
    let chain = |between: Forge| {
        let between = between.signed_by(&root);
        let leaf = read(&Forge::leaf().signed_by(&between));
        trust(&root).verify(&leaf, &[between.der()], T0)
    };
    let ca = || Forge::ca("between");
    let faults = [
        ("not a CA", ca().set(Nid::BASIC_CONSTRAINTS, "critical,CA:FALSE")),
        ("no basic constraints", ca().set(Nid::BASIC_CONSTRAINTS, "")),
        ("basic constraints not critical", ca().set(Nid::BASIC_CONSTRAINTS, "CA:TRUE")),
        ("may not sign", ca().set(Nid::KEY_USAGE, "critical,cRLSign")),
        ("names of others only", ca().set(Nid::NAME_CONSTRAINTS, "critical,permitted;URI:example.com")),
        ("the name excluded", ca().set(Nid::NAME_CONSTRAINTS, "critical,excluded;URI:example.org")),
        ("signed with SHA-1", ca().digest(MessageDigest::sha1())),
        ("a weak key", ca().key(rsa(1024))),
    ];
    for (what, between) in faults {
        let refused = chain(between);
        assert!(matches!(&refused, Err(TrustError::Chain(_))), "{what}: {refused:?}");
    }
    assert_eq!(chain(ca().set(Nid::NAME_CONSTRAINTS, "critical,permitted;URI:example.org")), Ok(()));
    assert_eq!(chain(ca().valid(before(2), before(1))), Err(TrustError::AuthorityExpired));
    assert_eq!(chain(ca().valid(at(1), at(9))), Err(TrustError::AuthorityNotYetValid));

    for (nid, value) in [
        (Nid::NETSCAPE_COMMENT, "critical,an unknown extension"),
        (Nid::POLICY_CONSTRAINTS, "critical,requireExplicitPolicy:0"),
    ] {
        let refused = verify(&root, Forge::leaf().set(nid, value));
        assert!(matches!(&refused, Err(TrustError::Chain(_))), "{value}: {refused:?}");
    }
}

#[test]
fn s04_rejects_too_long_path() {
    let root = Forge::ca("root").set(Nid::BASIC_CONSTRAINTS, "critical,CA:TRUE,pathlen:0").self_signed();
    assert_eq!(verify(&root, Forge::leaf()), Ok(()));
    let between = Forge::ca("between").signed_by(&root);
    let leaf = read(&Forge::leaf().signed_by(&between));
    let refused = trust(&root).verify(&leaf, &[between.der()], T0);
    assert!(matches!(&refused, Err(TrustError::Chain(why)) if why.contains("path length")), "{refused:?}");

    // Without a path length of the CA, the limit is eight intermediate certificates.
    let root = Forge::ca("root").self_signed();
    let mut above = Forge::ca("ca0").signed_by(&root);
    let mut ders = vec![above.der()];
    for n in 1..9 {
        above = Forge::ca(&format!("ca{n}")).signed_by(&above);
        ders.push(above.der());
    }
    let all = Trust::authorities([root.x509].into_iter().chain(ders.iter().map(|der| X509::from_der(der).unwrap())));
    let refused = all.unwrap().verify(&read(&Forge::leaf().signed_by(&above)), &[], T0);
    assert!(matches!(&refused, Err(TrustError::Chain(why)) if why.contains("too long")), "{refused:?}");
}

#[test]
fn s04_rejects_revoked_certificate_and_outdated_list() {
    let root = Forge::ca("root").self_signed();
    let (good, bad) = (Forge::leaf().signed_by(&root), Forge::leaf().signed_by(&root));
    let (from, to) = (before(1), at(10 * DAY));
    let with = |crls: &[openssl::x509::X509Crl]| trust(&root).with_crls(crls).unwrap();
    let lists = with(&[root.crl(&[&bad.x509], from, to)]);
    for _ in 0..2 {
        assert_eq!(lists.verify(&read(&good), &[], T0), Ok(()));
        assert_eq!(lists.verify(&read(&bad), &[], T0), Err(TrustError::Revoked));
    }
    // A cached verification does not outlive the list.
    let last = Timestamp::from_secs(to.as_secs() - 1);
    assert_eq!(lists.verify(&read(&good), &[], last), Ok(()));
    assert_eq!(lists.verify(&read(&good), &[], to), Err(TrustError::StaleCrl));
    let early = with(&[root.crl(&[], at(DAY), to)]);
    assert_eq!(early.verify(&read(&good), &[], T0), Err(TrustError::StaleCrl));

    // Two lists in one PEM text: both are used.
    let other = Forge::ca("other").self_signed();
    let two = [other.crl(&[], from, to), root.crl(&[&bad.x509], from, to)].map(|crl| crl.to_pem().unwrap()).concat();
    let two = trust(&root).with_crls_pem(&two).unwrap();
    assert_eq!(two.verify(&read(&good), &[], T0), Ok(()));
    assert_eq!(two.verify(&read(&bad), &[], T0), Err(TrustError::Revoked));
}

#[test]
fn s04_rejects_revocation_list_not_signed_by_the_issuer() {
    let root = Forge::ca("root").self_signed();
    let leaf = read(&Forge::leaf().signed_by(&root));
    let (from, to) = (before(1), at(DAY));
    let other = Forge::ca("other").self_signed();
    let foreign = trust(&root).with_crls(&[other.crl(&[], from, to)]).unwrap();
    assert_eq!(foreign.verify(&leaf, &[], T0), Err(TrustError::NoCrl));
    // A list by another key under the same name could hide the CA's own list.
    let impostor = Forge::ca("root").self_signed();
    let forged = trust(&root).with_crls(&[impostor.crl(&[], from, to)]).unwrap();
    assert_eq!(forged.verify(&leaf, &[], T0), Err(TrustError::NoCrl));
    let mute = Forge::ca("root").set(Nid::KEY_USAGE, "critical,keyCertSign").self_signed();
    let unsigned = trust(&mute).with_crls(&[mute.crl(&[], from, to)]).unwrap();
    let refused = unsigned.verify(&read(&Forge::leaf().signed_by(&mute)), &[], T0);
    assert!(matches!(&refused, Err(TrustError::Chain(_))), "{refused:?}");
    let pinned = Trust::pinned().with_crls(&[root.crl(&[], from, to)]);
    assert!(matches!(pinned, Err(AuthorityError::Pinned)));
}

#[test]
fn s04_rejects_leaf_below_revoked_intermediate() {
    let root = Forge::ca("root").self_signed();
    let between = Forge::ca("between").signed_by(&root);
    let leaf = read(&Forge::leaf().signed_by(&between));
    let (from, to) = (before(1), at(DAY));
    let with = |revoked: &[&X509], both: bool| {
        let mut crls = vec![root.crl(revoked, from, to)];
        if both {
            crls.push(between.crl(&[], from, to));
        }
        trust(&root).with_crls(&crls).unwrap().verify(&leaf, &[between.der()], T0)
    };
    assert_eq!(with(&[], true), Ok(()));
    assert_eq!(with(&[&between.x509], true), Err(TrustError::AuthorityRevoked));
    assert_eq!(with(&[], false), Err(TrustError::NoCrl), "every issuer of the chain needs a list");
}

#[test]
fn s04_concurrent_verification() {
    let root = Forge::ca("root").self_signed();
    let (good, bad) = (Forge::leaf().signed_by(&root), Forge::leaf().signed_by(&root));
    let trust = trust(&root).with_crls(&[root.crl(&[&bad.x509], before(1), at(DAY))]).unwrap();
    let (good, bad) = (read(&good), read(&bad));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (trust, good, bad) = (&trust, &good, &bad);
            scope.spawn(move || {
                for second in 0..50 {
                    // A new OpenSSL store for every second, which loads the lists again.
                    let now = at(second * 61 + thread);
                    assert_eq!(trust.verify(good, &[], now), Ok(()));
                    assert_eq!(trust.verify(bad, &[], now), Err(TrustError::Revoked));
                }
            });
        }
    });
}
