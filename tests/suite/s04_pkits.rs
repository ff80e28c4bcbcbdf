//! s04: NIST's Public Key Interoperability Test Suite (PKITS, version 1.0.1, certificates of 2011) against the chain verification of
//! [`Trust`](nanite::certs::Trust): OpenSSL's, as our stores have it do, with everything on that they have on. Its messages each carry a
//! path and the revocation lists for it, and are named after the case; what is expected is in the name, by the suite's default
//! settings. `tests/vectors/pkits-exclusions.txt` lists what we do otherwise, and why.

use std::collections::BTreeMap;
use std::fs;

use nanite::certs::{AuthorityError, Trust};
use nanite::clock::Timestamp;
use openssl::x509::{X509, X509Crl};

use crate::harness::oracle::pkits;
use crate::harness::tamper::Der;

/// A moment at which the suite's certificates are to be judged: 2011-04-15.
const NOW: Timestamp = Timestamp::from_secs(1_302_825_600);

/// The cases of section 4.8 (certificate policies) in whose names the verdict is not, and that are invalid by default: each path has
/// a certificate that demands a policy, and no policy that all its certificates have.
const WITHOUT_A_POLICY: [&str; 6] = [
    "DifferentPoliciesTest4",
    "DifferentPoliciesTest5",
    "DifferentPoliciesTest7",
    "DifferentPoliciesTest8",
    "DifferentPoliciesTest9",
    "DifferentPoliciesTest12",
];

/// A case: the end entity's certificate, what lies between, and the lists.
struct Case {
    name: String,
    leaf: X509,
    others: Vec<Vec<u8>>,
    crls: Vec<X509Crl>,
}

impl Case {
    /// Takes a signed message apart.
    fn read(name: &str, message: &str) -> Self {
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
        // The signer is named by its issuer and serial number.
        let Der::Node(_, named) = signed.last().unwrap().clone().at(&[0, 1]).clone() else {
            panic!("{name}: no signer is named")
        };
        let is_signer = |certificate: &Der| {
            let mut certificate = certificate.clone();
            let signed = certificate.at(&[0]).children();
            [&signed[3], &signed[1]] == [&named[0], &named[1]]
        };
        let (leaf, others): (Vec<Der>, Vec<Der>) = within(0xa0).into_iter().partition(is_signer);
        let [leaf] = &leaf[..] else { panic!("{name}: {} signers", leaf.len()) };
        Self {
            name: name.to_owned(),
            leaf: X509::from_der(&leaf.bytes()).unwrap(),
            others: others.iter().map(Der::bytes).collect(),
            crls: within(0xa1).iter().map(|crl| X509Crl::from_der(&crl.bytes()).unwrap()).collect(),
        }
    }

    /// Whether the path is to be believed.
    fn is_valid(&self) -> bool {
        let invalid = self.name.starts_with("Invalid") || self.name.starts_with("Missing");
        !invalid && !WITHOUT_A_POLICY.contains(&&*self.name)
    }

    /// Why we do not believe it, if we do not.
    fn refused(&self, anchor: &X509) -> Option<String> {
        let trust = match Trust::authorities([anchor.clone()]).unwrap().with_crls(&self.crls) {
            Ok(trust) => trust,
            Err(error) => return Some(error.to_string()),
        };
        trust.verify_chain(&self.leaf, &self.others, NOW).err().map(|error| error.to_string())
    }
}

/// Every case, by its name.
fn cases() -> (X509, Vec<Case>) {
    let directory = pkits();
    let anchor = fs::read(directory.join("certs/TrustAnchorRootCertificate.crt")).unwrap();
    let mut cases = Vec::new();
    for entry in fs::read_dir(directory.join("smime")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().strip_prefix("Signed").unwrap();
        cases.push(Case::read(name, &fs::read_to_string(&path).unwrap()));
    }
    cases.sort_by(|one, other| one.name.cmp(&other.name));
    (X509::from_der(&anchor).unwrap(), cases)
}

/// The exclusions: the case, what is done in it, and why.
fn exclusions() -> BTreeMap<String, (String, String)> {
    let text = include_str!("../vectors/pkits-exclusions.txt");
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut exclusions = BTreeMap::new();
    for line in lines {
        let cells: Vec<&str> = line.splitn(3, ' ').collect();
        let [name, done, why] = cells[..] else { panic!("a name, what is done and a reason are needed: {line}") };
        assert!(matches!(done, "refused" | "accepted") && why.len() > 20, "{line}");
        assert!(exclusions.insert(name.to_owned(), (done.to_owned(), why.to_owned())).is_none(), "twice: {line}");
    }
    exclusions
}

#[test]
fn s04_pkits_cases_are_judged_as_they_should_be() {
    let (anchor, cases) = cases();
    let mut exclusions = exclusions();
    assert_eq!(cases.len(), 224, "the whole suite");
    let mut wrong = Vec::new();
    for case in &cases {
        let refused = case.refused(&anchor);
        let right = refused.is_none() == case.is_valid();
        match (right, exclusions.remove(&case.name)) {
            (true, None) => {}
            (true, Some(_)) => wrong.push(format!("{} is judged as it should be, and excluded", case.name)),
            (false, Some((done, _))) if (done == "refused") == refused.is_some() => {}
            (false, _) => wrong.push(format!(
                "{} {}",
                case.name,
                refused.map_or("accepted".to_owned(), |why| format!("refused: {why}"))
            )),
        }
    }
    wrong.extend(exclusions.keys().map(|name| format!("{name} is excluded, and not in the suite")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn s04_a_delta_list_is_not_taken_for_a_complete_one() {
    let (anchor, cases) = cases();
    for name in ["InvaliddeltaCRLIndicatorNoBaseTest1", "InvaliddeltaCRLTest3", "ValiddeltaCRLTest2"] {
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let trust = Trust::authorities([anchor.clone()]).unwrap().with_crls(&case.crls);
        assert!(matches!(trust, Err(AuthorityError::DeltaCrl)), "{name}: {trust:?}");
    }
}
