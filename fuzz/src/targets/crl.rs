//! Revocation lists: nothing panics, and with any list whatever a revoked certificate is not believed, nor any other unless the list is
//! the CA's and current. Each input is looked at as it is, and once more signed anew by the CA.
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

/// The CA, as one that makes lists.
static CA: LazyLock<CertificateAuthority> = LazyLock::new(|| {
    let key = PrivateKey::from_pem(&read("fuzz/pki/root-key.pem"), None).unwrap();
    CertificateAuthority::from_pem(&read("fuzz/pki/root.pem"), key, Some("example.org")).unwrap()
});
/// A leaf that none of the CA's lists revokes, and one that each of them does.
static LEAVES: LazyLock<[Certificate; 2]> = LazyLock::new(|| {
    ["kept", "revoked"].map(|name| Certificate::from_pem(&read(&format!("fuzz/pki/{name}.pem"))).unwrap())
});
/// What was signed of each list that the CA has truly made.
static MADE: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let text = String::from_utf8(read("fuzz/pki/lists.pem")).unwrap();
    let blocks = text.split_inclusive("-----END X509 CRL-----\n");
    let ders = blocks.map(|block| X509Crl::from_pem(block.as_bytes()).unwrap().to_der().unwrap());
    ders.map(|der| der::signed_part(&der).unwrap()).collect()
});

/// The target.
pub fn run(data: &[u8]) {
    let text = data.starts_with(b"-----").then(|| data.to_vec());
    let judged = judge(&text.unwrap_or_else(|| pem(data)));
    if let Some(parts) = judged {
        assert!(parts.iter().any(|part| MADE.contains(part)), "a list was believed that the CA has not made");
    }
    if let Some(part) = der::signed_part(data) {
        judge(&pem(&der::signed(&part, &ROOT.key)));
    }
}

fn pem(der: &[u8]) -> Vec<u8> {
    let lines = openssl::base64::encode_block(der);
    let lines: Vec<&[u8]> = lines.as_bytes().chunks(64).collect();
    [b"-----BEGIN X509 CRL-----\n", &lines.join(&b'\n')[..], b"\n-----END X509 CRL-----\n"].concat()
}

/// Believes these lists, and asks for both leaves. Gives what was signed of the lists when by them a leaf is believed.
fn judge(text: &[u8]) -> Option<Vec<Vec<u8>>> {
    let list = RevocationList::from_pem(text, &CA);
    drop(ErrorStack::get());
    let list = list.ok().and_then(|(own, _)| own);
    let trust = Trust::authorities([ROOT.x509.clone()]).unwrap().with_crls_pem(text);
    drop(ErrorStack::get());
    let trust = trust.ok()?;
    assert!(trust.checks_revocation());
    let [kept, revoked] = LEAVES.each_ref().map(|leaf| trust.verify(leaf, &[], NOW).is_ok());
    let lists = lists(text);
    let marks = String::from_utf8_lossy(text).matches("X509 CRL").count();
    assert_eq!(marks, 2 * lists.len(), "a list was passed over");
    for (leaf, believed) in LEAVES.iter().zip([kept, revoked]) {
        assert!(!believed || lists.iter().any(|one| is_good_for(one, leaf)), "believed by no good list: {leaf:?}");
    }
    if let Some(list) = list {
        follow(&list);
        let only = lists.len() == 1;
        for (leaf, believed) in LEAVES.iter().zip([kept, revoked]) {
            assert!(!only || !believed || !list.revokes(leaf), "believed, and revoked by the only list");
        }
    }
    (kept || revoked).then(|| lists.iter().filter_map(|one| der::signed_part(&one.to_der().unwrap())).collect())
}

/// The lists in a text. Spaces and empty lines mean nothing (RFC 7468, section 2), which OpenSSL's reader sees otherwise.
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

/// Whether a list is the CA's, is current, and does not revoke a leaf, as another parser reads it where it can.
fn is_good_for(list: &X509Crl, leaf: &Certificate) -> bool {
    let serial = |x509: &openssl::x509::X509Ref| x509.serial_number().to_bn().unwrap().to_vec();
    let revoked = list.get_revoked().into_iter().flatten();
    let mut revoked = revoked.map(|one| one.serial_number().to_bn().unwrap().to_vec());
    if revoked.any(|one| one == serial(leaf.x509())) || !list.verify(&ROOT.key).unwrap_or(false) {
        return false;
    }
    let Ok(second) = CertificateList::from_der(&list.to_der().unwrap()) else { return true };
    let signed = &second.tbs_cert_list;
    let next = signed.next_update.as_ref().map_or(0, |next| next.to_unix_duration().as_secs());
    list.issuer_name().try_cmp(ROOT.x509.subject_name()).unwrap().is_eq()
        && signed.this_update.to_unix_duration().as_secs() <= NOW.as_secs()
        && NOW.as_secs() < next
}

/// The list that follows revokes what this one does, and one more.
fn follow(list: &RevocationList) {
    let day = Duration::from_secs(86_400);
    let Ok(next) = RevocationList::issue(Some(list), &CA, &[(&LEAVES[0], RevocationReason::Superseded)], day, NOW)
    else {
        return;
    };
    assert!(next.revokes(&LEAVES[0]));
    assert!(next.len() >= list.len() && (next.number() > list.number() || list.number() == u64::MAX));
    let text = next.to_pem().unwrap();
    let (again, _) = RevocationList::from_pem(&text, &CA).expect("a list of ours does not read back");
    let again = again.expect("a list of ours is not ours");
    assert_eq!((again.number(), again.len()), (next.number(), next.len()));
    if list.revokes(&LEAVES[1]) {
        assert!(again.revokes(&LEAVES[1]), "what was revoked is so no more");
    }
}
