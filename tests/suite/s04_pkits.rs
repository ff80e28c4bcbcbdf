//! s04: NIST's Public Key Interoperability Test Suite (PKITS, version 1.0.1, certificates of 2011) against the chain verification of
//! [`Trust`](nanite::certs::Trust), that is, OpenSSL with the options that nanite sets. Each message of the suite carries a path and its
//! revocation lists. Its name is that of the case and contains the expected verdict for the suite's default settings.
//! `tests/vectors/pkits-exclusions.txt` lists the verdicts that differ here, and why.

use std::collections::BTreeMap;
use std::fs;

use nanite::certs::{AuthorityError, Trust};
use nanite::clock::Timestamp;
use openssl::x509::{X509, X509Crl};

use crate::harness::oracle::pkits;
use crate::harness::tamper::Der;

/// The time of verification: 2011-04-15, when the suite's certificates are valid.
const NOW: Timestamp = Timestamp::from_secs(1_302_825_600);

/// The cases of section 4.8 (certificate policies) whose names lack the verdict and that are invalid by default: each path has a certificate
/// that requires a policy, but no policy that all certificates share.
const WITHOUT_COMMON_POLICY: [&str; 6] = [
    "DifferentPoliciesTest4",
    "DifferentPoliciesTest5",
    "DifferentPoliciesTest7",
    "DifferentPoliciesTest8",
    "DifferentPoliciesTest9",
    "DifferentPoliciesTest12",
];

/// A case: the end entity's certificate, the intermediate certificates, and the revocation lists.
struct Case {
    name: String,
    leaf: X509,
    intermediates: Vec<Vec<u8>>,
    crls: Vec<X509Crl>,
}

impl Case {
    /// Parses a signed message.
    fn parse(name: &str, message: &str) -> Self {
        let base64 = message.rsplit_once("smime.p7s\"").unwrap().1.split("------").next().unwrap();
        let mut signed =
            Der::parse(&openssl::base64::decode_block(&base64.split_whitespace().collect::<String>()).unwrap());
        let signed = signed.at(&[1, 0]).children();
        let within = |tag: u8| {
            let field = signed.iter().find(|field| matches!(field, Der::Node(found, _) if *found == tag));
            field.map_or(Vec::new(), |field| match field {
                Der::Node(_, inside) => inside.clone(),
                Der::Leaf(..) => unreachable!(),
            })
        };
        // The signer info identifies the signer by issuer and serial number.
        let Der::Node(_, signer_id) = signed.last().unwrap().clone().at(&[0, 1]).clone() else {
            panic!("{name}: no signer info")
        };
        let is_signer = |certificate: &Der| {
            let mut certificate = certificate.clone();
            let signed = certificate.at(&[0]).children();
            [&signed[3], &signed[1]] == [&signer_id[0], &signer_id[1]]
        };
        let (leaf, intermediates): (Vec<Der>, Vec<Der>) = within(0xa0).into_iter().partition(is_signer);
        let [leaf] = &leaf[..] else { panic!("{name}: {} signers", leaf.len()) };
        Self {
            name: name.to_owned(),
            leaf: X509::from_der(&leaf.bytes()).unwrap(),
            intermediates: intermediates.iter().map(Der::bytes).collect(),
            crls: within(0xa1).iter().map(|crl| X509Crl::from_der(&crl.bytes()).unwrap()).collect(),
        }
    }

    /// Whether the path is valid.
    fn is_valid(&self) -> bool {
        let invalid = self.name.starts_with("Invalid") || self.name.starts_with("Missing");
        !invalid && !WITHOUT_COMMON_POLICY.contains(&&*self.name)
    }

    /// Why the path is refused; none when it is accepted.
    fn refusal(&self, anchor: &X509) -> Option<String> {
        let trust = match Trust::authorities([anchor.clone()]).unwrap().with_crls(&self.crls) {
            Ok(trust) => trust,
            Err(error) => return Some(error.to_string()),
        };
        trust.verify_chain(&self.leaf, &self.intermediates, NOW).err().map(|error| error.to_string())
    }
}

/// The anchor, and every case in the order of names.
fn cases() -> (X509, Vec<Case>) {
    let directory = pkits();
    let anchor = fs::read(directory.join("certs/TrustAnchorRootCertificate.crt")).unwrap();
    let mut cases = Vec::new();
    for entry in fs::read_dir(directory.join("smime")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().strip_prefix("Signed").unwrap();
        cases.push(Case::parse(name, &fs::read_to_string(&path).unwrap()));
    }
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    (X509::from_der(&anchor).unwrap(), cases)
}

/// The exclusions: for each case the actual result and the reason.
fn exclusions() -> BTreeMap<String, (String, String)> {
    let text = include_str!("../vectors/pkits-exclusions.txt");
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut exclusions = BTreeMap::new();
    for line in lines {
        let cells: Vec<&str> = line.splitn(3, ' ').collect();
        let [name, result, why] = cells[..] else { panic!("not a name, a result and a reason: {line}") };
        assert!(matches!(result, "refused" | "accepted") && why.len() > 20, "{line}");
        assert!(exclusions.insert(name.to_owned(), (result.to_owned(), why.to_owned())).is_none(), "twice: {line}");
    }
    exclusions
}

#[test]
fn s04_pkits_verdicts_match() {
    let (anchor, cases) = cases();
    let mut exclusions = exclusions();
    assert_eq!(cases.len(), 224, "the whole suite");
    let mut wrong = Vec::new();
    for case in &cases {
        let refusal = case.refusal(&anchor);
        let as_expected = refusal.is_none() == case.is_valid();
        match (as_expected, exclusions.remove(&case.name)) {
            (true, None) => {}
            (true, Some(_)) => wrong.push(format!("{} has the expected verdict, but is excluded", case.name)),
            (false, Some((result, _))) if (result == "refused") == refusal.is_some() => {}
            (false, _) => wrong.push(format!(
                "{} {}",
                case.name,
                refusal.map_or("accepted".to_owned(), |why| format!("refused: {why}"))
            )),
        }
    }
    wrong.extend(exclusions.keys().map(|name| format!("{name} is excluded, but not in the suite")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn s04_rejects_delta_revocation_list() {
    let (anchor, cases) = cases();
    for name in ["InvaliddeltaCRLIndicatorNoBaseTest1", "InvaliddeltaCRLTest3", "ValiddeltaCRLTest2"] {
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let trust = Trust::authorities([anchor.clone()]).unwrap().with_crls(&case.crls);
        assert!(matches!(trust, Err(AuthorityError::DeltaCrl)), "{name}: {trust:?}");
    }
}
