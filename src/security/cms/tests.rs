//! The CMS layer by itself, against messages that others have made: an independent program, and the `openssl` program.

use std::path::Path;
use std::process::Command;

use der::asn1::{AnyRef, ObjectIdentifier};
use der::{Encode, Tag};
use openssl::pkey::PKey;
use openssl::x509::X509;
use spki::AlgorithmIdentifier;
use zeroize::Zeroizing;

use super::{Content, Enveloped, Recipient, algorithm, attributes_header, oid, read};
use crate::certs::{KeyType, PrivateKey, Suite};
use crate::security::crypto::{self, Crypto, key_encryption_key, sha256};

const SAMPLE: &[u8] = include_bytes!("../../../tests/vectors/envelope/sample/sample.der");
const SIGNER: &[u8] = include_bytes!("../../../tests/vectors/envelope/sample/m1.pem");
const FRED: &[u8] = include_bytes!("../../../tests/vectors/envelope/sample/fred-key.pem");
const BOB: &[u8] = include_bytes!("../../../tests/vectors/envelope/sample/bob-key.pem");

fn key_id(certificate: &[u8]) -> Vec<u8> {
    X509::from_pem(certificate).unwrap().subject_key_id().unwrap().as_slice().to_vec()
}

/// What a recipient's key gets out of an AuthEnvelopedData.
fn decrypt(enveloped: &Enveloped<'_>, key_id: &[u8], key: &PrivateKey) -> Vec<u8> {
    let crypto = Crypto::new().unwrap();
    let recipient = enveloped.recipients.iter().find(|one| one.key_id() == key_id).unwrap();
    let secret = match recipient {
        Recipient::Agreement(agreement) => {
            let shared = crypto.agree(key.pkey(), &crypto.public_key(agreement.point).unwrap()).unwrap();
            let kek = key_encryption_key(&shared, agreement.ukm).unwrap();
            crypto.unwrap(&kek, agreement.wrapped).unwrap()
        }
        Recipient::Transport(transport) => crypto::receive(key.pkey(), transport.encrypted).unwrap(),
    };
    crypto.decrypt(&secret, enveloped.nonce, enveloped.ciphertext, enveloped.tag).unwrap()
}

#[test]
fn s01_a_message_of_an_independent_program_is_verified_and_decrypted() {
    let message = read(SAMPLE).unwrap();
    assert_eq!((message.unsupported, message.suite, message.header), (None, Some(Suite::P256), &b"HEADER"[..]));
    assert_eq!(message.key_id, key_id(SIGNER));
    assert_eq!(message.digest, sha256(&[message.content_octets]));
    let signed = sha256(&[&attributes_header(message.attributes).unwrap(), message.attributes]);
    let signer = X509::from_pem(SIGNER).unwrap().public_key().unwrap();
    crypto::verify(&signer, Suite::P256, &signed, message.signature).unwrap();
    let Some(Content::Encrypted(enveloped)) = &message.content else { panic!("it is encrypted") };
    assert_eq!(enveloped.recipients.len(), 2);
    for (name, key) in [("fred", FRED), ("bob", BOB)] {
        let certificate = std::fs::read(format!("tests/vectors/envelope/sample/{name}.pem")).unwrap();
        let key = PrivateKey::from_pem(key, None).unwrap();
        let plaintext = decrypt(enveloped, &key_id(&certificate), &key);
        assert_eq!(plaintext[32..64], sha256(&[b"HEADER"]), "{name}: behind the salt stands the header's digest");
        assert_eq!(plaintext[64..], *br#"{"hello":1}"#, "{name}");
    }
}

#[test]
fn algorithm_identifiers_are_what_their_names_say() {
    type Identifier<P> = AlgorithmIdentifier<P>;
    let oid = |text: &str| ObjectIdentifier::new_unwrap(text);
    let bare = |text| Identifier::<AnyRef<'_>> { oid: oid(text), parameters: None }.to_der().unwrap();
    let null = |text| Identifier { oid: oid(text), parameters: Some(AnyRef::NULL) }.to_der().unwrap();
    let nested = |text, inner: &[u8]| {
        let inner = AnyRef::new(Tag::Sequence, &inner[2..]).unwrap();
        Identifier { oid: oid(text), parameters: Some(inner) }.to_der().unwrap()
    };
    let (sha256, mgf1) = ("2.16.840.1.101.3.4.2.1", "1.2.840.113549.1.1.8");
    assert_eq!(algorithm::SHA256, bare(sha256));
    assert_eq!(algorithm::SHA256_NULL, null(sha256));
    assert_eq!(algorithm::ECDSA_SHA256, bare("1.2.840.10045.4.3.2"));
    assert_eq!(algorithm::EC_PUBLIC_KEY, bare("1.2.840.10045.2.1"));
    assert_eq!(algorithm::AES_256_WRAP, bare("2.16.840.1.101.3.4.1.45"));
    assert_eq!(algorithm::ECDH_SHA256_WRAP, nested("1.3.132.1.11.1", algorithm::AES_256_WRAP));
    let explicit = |number: u8, inner: &[u8]| [&[0xa0 | number, inner.len() as u8][..], inner].concat();
    let parameters = |hash: &[u8], salt: bool| {
        let salt = if salt { explicit(2, &[2, 1, 32]) } else { Vec::new() };
        let fields = [explicit(0, hash), explicit(1, &nested(mgf1, hash)), salt].concat();
        [&[0x30, fields.len() as u8][..], &fields].concat()
    };
    let (pss, oaep) = ("1.2.840.113549.1.1.10", "1.2.840.113549.1.1.7");
    assert_eq!(algorithm::PSS_SHA256, nested(pss, &parameters(&null(sha256), true)));
    assert_eq!(algorithm::PSS_SHA256_ABSENT, nested(pss, &parameters(&bare(sha256), true)));
    assert_eq!(algorithm::OAEP_SHA256, nested(oaep, &parameters(&bare(sha256), false)));
    assert_eq!(algorithm::OAEP_SHA256_NULL, nested(oaep, &parameters(&null(sha256), false)));
}

/// A key and a certificate of it in a directory, as the `openssl` program wants them.
fn node(dir: &Path, name: &str, key_type: KeyType) -> PrivateKey {
    let key = PrivateKey::generate(key_type).unwrap();
    std::fs::write(dir.join(format!("{name}-key.pem")), key.to_pem().unwrap()).unwrap();
    openssl(dir, &format!("req -x509 -new -key {name}-key.pem -subj /CN={name} -days 2 -out {name}.pem"));
    key
}

fn openssl(dir: &Path, arguments: &str) {
    let run = Command::new("openssl").args(arguments.split_whitespace()).current_dir(dir).output().unwrap();
    assert!(run.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&run.stderr));
}

/// What stands inside a ContentInfo.
fn inside(content_info: &[u8]) -> Vec<u8> {
    use crate::security::fields::{Fields, constructed};
    let mut fields = Fields::new(content_info).unwrap().inside(Tag::Sequence).unwrap();
    assert_eq!(fields.typed::<ObjectIdentifier>().unwrap(), oid::AUTH_ENVELOPED_DATA);
    fields.value(constructed(der::TagNumber::N0)).unwrap().to_vec()
}

#[test]
fn s01_what_the_openssl_program_encrypts_is_decrypted() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("body"), b"from openssl").unwrap();
    let options = [
        (KeyType::P256, "-keyopt ecdh_kdf_md:sha256"),
        (KeyType::Rsa2048, "-keyopt rsa_padding_mode:oaep -keyopt rsa_oaep_md:sha256 -keyopt rsa_mgf1_md:sha256"),
    ];
    for (key_type, options) in options {
        let key = node(dir.path(), "fred", key_type);
        let how = "cms -encrypt -binary -aes-256-gcm -keyid -in body -outform DER -out enveloped.der";
        openssl(dir.path(), &format!("{how} -recip fred.pem {options}"));
        let enveloped = inside(&std::fs::read(dir.path().join("enveloped.der")).unwrap());
        let mut notes = super::read::Notes::default();
        let read = super::read::enveloped(&enveloped, &mut notes).unwrap().unwrap();
        let certificate = std::fs::read(dir.path().join("fred.pem")).unwrap();
        assert_eq!(decrypt(&read, &key_id(&certificate), &key), b"from openssl", "{key_type:?}");
    }
}

#[test]
fn s01_what_the_openssl_program_signs_is_verified_as_far_as_the_shape_goes() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("body"), b"from openssl").unwrap();
    let options = [(KeyType::P256, ""), (KeyType::Rsa2048, "-keyopt rsa_padding_mode:pss -keyopt rsa_pss_saltlen:32")];
    for (key_type, options) in options {
        let key = node(dir.path(), "m1", key_type);
        let how = "cms -sign -binary -nodetach -nocerts -keyid -nosmimecap -md sha256 -in body -outform DER";
        openssl(dir.path(), &format!("{how} -signer m1.pem -inkey m1-key.pem -out signed.der {options}"));
        let bytes = std::fs::read(dir.path().join("signed.der")).unwrap();
        let message = read(&bytes).unwrap();
        assert_eq!(message.unsupported, Some("another signed attribute"), "it signs the time, in place of a header");
        assert!(matches!(message.content, Some(Content::Plain(b"from openssl"))));
        assert_eq!(message.suite, Some(key.suite()));
        let signed = sha256(&[&attributes_header(message.attributes).unwrap(), message.attributes]);
        let public = PKey::public_key_from_der(&key.pkey().public_key_to_der().unwrap()).unwrap();
        crypto::verify(&public, key.suite(), &signed, message.signature).unwrap();
    }
}

#[test]
fn s01_key_derivation_with_user_keying_material_is_that_of_rfc_5753() {
    // SharedInfo with a ukm of one byte, written out by hand.
    let expected = "301a300b060960864801650304012da0030401aaa206040400000100";
    let found: String = super::shared_info(Some(&[0xaa])).unwrap().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(found, expected);
    let (shared, ukm) = (Zeroizing::new([7; 32]), [9; 32]);
    let info = super::shared_info(Some(&ukm)).unwrap();
    let expected = sha256(&[&shared[..], &[0, 0, 0, 1], &info]);
    assert_eq!(*key_encryption_key(&shared, Some(&ukm)).unwrap(), expected);
}
