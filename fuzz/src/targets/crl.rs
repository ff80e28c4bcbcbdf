//! Revocation lists: nothing panics; no list makes a revoked certificate trusted, and other certificates are trusted only with a current
//! list of the CA. Each input is checked unchanged, and again with a valid signature of the CA.
//!
//! An input is a text, or a list in DER.

use std::sync::LazyLock;
use std::time::Duration;

use nanite::certs::{Certificate, CertificateAuthority, PrivateKey, RevocationList, RevocationReason, Trust};
use openssl::error::ErrorStack;
use openssl::x509::X509Crl;
use x509_cert::crl::CertificateList;
use x509_cert::der::Decode;

use super::certificate::ROOT;
use super::der;
use super::world::{NOW, read};

/// The CA that makes the lists.
static CA: LazyLock<CertificateAuthority> = LazyLock::new(|| {
    let key = PrivateKey::from_pem(&read("fuzz/pki/root-key.pem"), None).unwrap();
    CertificateAuthority::from_pem(&read("fuzz/pki/root.pem"), key, Some("example.org")).unwrap()
});
/// A leaf that no list of the CA revokes, and one that every list revokes.
static LEAVES: LazyLock<[Certificate; 2]> = LazyLock::new(|| {
    ["good", "revoked"].map(|name| Certificate::from_pem(&read(&format!("fuzz/pki/{name}.pem"))).unwrap())
});
/// The signed part of each list that the CA made.
static MADE: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let text = String::from_utf8(read("fuzz/pki/lists.pem")).unwrap();
    let blocks = text.split_inclusive("-----END X509 CRL-----\n");
    let ders = blocks.map(|block| X509Crl::from_pem(block.as_bytes()).unwrap().to_der().unwrap());
    ders.map(|der| der::signed_part(&der).unwrap()).collect()
});

/// The target.
pub fn run(data: &[u8]) {
    let text = data.starts_with(b"-----").then(|| data.to_vec());
    if let Some(parts) = check(&text.unwrap_or_else(|| pem(data))) {
        assert!(parts.iter().any(|part| MADE.contains(part)), "trusted a list that the CA did not make");
    }
    if let Some(part) = der::signed_part(data) {
        check(&pem(&der::signed(&part, &ROOT.key)));
    }
}

fn pem(der: &[u8]) -> Vec<u8> {
    let lines = openssl::base64::encode_block(der);
    let lines: Vec<&[u8]> = lines.as_bytes().chunks(64).collect();
    [b"-----BEGIN X509 CRL-----\n", &lines.join(&b'\n')[..], b"\n-----END X509 CRL-----\n"].concat()
}

/// Verifies both leaves with these lists. Returns the signed parts of the lists if a leaf is trusted.
fn check(text: &[u8]) -> Option<Vec<Vec<u8>>> {
    let list = RevocationList::from_pem(text, &CA);
    drop(ErrorStack::get());
    let list = list.ok().and_then(|(own, _)| own);
    let trust = Trust::authorities([ROOT.x509.clone()]).unwrap().with_crls_pem(text);
    drop(ErrorStack::get());
    let trust = trust.ok()?;
    assert!(trust.checks_revocation());
    let [good, revoked] = LEAVES.each_ref().map(|leaf| trust.verify(leaf, &[], NOW).is_ok());
    let lists = lists(text);
    let marks = String::from_utf8_lossy(text).matches("X509 CRL").count();
    assert_eq!(marks, 2 * lists.len(), "a list was ignored");
    for (leaf, trusted) in LEAVES.iter().zip([good, revoked]) {
        assert!(!trusted || lists.iter().any(|list| is_good_for(list, leaf)), "trusted without a good list: {leaf:?}");
    }
    if let Some(list) = list {
        check_next(&list);
        let is_only = lists.len() == 1;
        for (leaf, trusted) in LEAVES.iter().zip([good, revoked]) {
            assert!(!is_only || !trusted || !list.revokes(leaf), "trusted, but revoked by the only list");
        }
    }
    (good || revoked).then(|| lists.iter().filter_map(|list| der::signed_part(&list.to_der().unwrap())).collect())
}

/// The lists in a text. Whitespace and empty lines are ignored (RFC 7468, section 2); OpenSSL's parser does not ignore them.
fn lists(text: &[u8]) -> Vec<X509Crl> {
    let text = String::from_utf8_lossy(text);
    let blocks = text.split("-----BEGIN X509 CRL-----").skip(1).filter_map(|rest| rest.split("-----END").next());
    let lines = blocks.map(|block| {
        let base64: Vec<u8> = block.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        base64.chunks(64).map(<[u8]>::to_vec).collect::<Vec<_>>().join(&b'\n')
    });
    let pem = lines.map(|lines| [b"-----BEGIN X509 CRL-----\n", &lines[..], b"\n-----END X509 CRL-----\n"].concat());
    pem.filter_map(|block| X509Crl::from_pem(&block).ok()).collect()
}

/// Whether a list is the CA's, is current, and does not revoke a leaf, as a second parser reads it if it can.
fn is_good_for(list: &X509Crl, leaf: &Certificate) -> bool {
    let serial = |x509: &openssl::x509::X509Ref| x509.serial_number().to_bn().unwrap().to_vec();
    let revoked = list.get_revoked().into_iter().flatten();
    let mut revoked = revoked.map(|entry| entry.serial_number().to_bn().unwrap().to_vec());
    if revoked.any(|revoked| revoked == serial(leaf.x509())) || !list.verify(&ROOT.key).unwrap_or(false) {
        return false;
    }
    let Ok(second) = CertificateList::from_der(&list.to_der().unwrap()) else { return true };
    let signed = &second.tbs_cert_list;
    let next = signed.next_update.as_ref().map_or(0, |next| next.to_unix_duration().as_secs());
    list.issuer_name().try_cmp(ROOT.x509.subject_name()).unwrap().is_eq()
        && signed.this_update.to_unix_duration().as_secs() <= NOW.as_secs()
        && NOW.as_secs() < next
}

/// The next list revokes everything that this one does, and one more certificate.
fn check_next(list: &RevocationList) {
    let day = Duration::from_secs(86_400);
    let Ok(next) = RevocationList::issue(Some(list), &CA, &[(&LEAVES[0], RevocationReason::Superseded)], day, NOW)
    else {
        return;
    };
    assert!(next.revokes(&LEAVES[0]));
    assert!(next.len() >= list.len() && (next.number() > list.number() || list.number() == u64::MAX));
    let text = next.to_pem().unwrap();
    let (again, _) = RevocationList::from_pem(&text, &CA).expect("our own list does not parse");
    let again = again.expect("our own list is not recognised");
    assert_eq!((again.number(), again.len()), (next.number(), next.len()));
    if list.revokes(&LEAVES[1]) {
        assert!(again.revokes(&LEAVES[1]), "a revoked certificate is no longer revoked");
    }
}
