//! The only module that knows CMS (RFC 5652, RFC 5083, RFC 5753): it writes and reads the one structure of a message.
//!
//! Here are the constants of both directions, and writing: each message has one encoding, in DER order. Reading is in `read.rs`.
//!
//! Everything that CMS leaves open is fixed here. Algorithm identifiers are compared as whole encodings, so that no parameter is ignored;
//! the only variation is SHA-256, whose parameters may be absent or NULL.

mod read;

use der::asn1::ObjectIdentifier;
use der::{Encode, Result, Tag, TagNumber};

use super::fields::{constructed, field, field_len, primitive, put, put_header, put_number};
use crate::certs::Suite;

pub(super) use read::{Content, Enveloped, Message, Recipient, SignerInfo, attributes_header, read, read_signer_info};

/// The most recipients of one message.
pub(super) const MAX_RECIPIENTS: usize = 64;
/// The most certificates in one message.
pub(super) const MAX_CERTIFICATES: usize = 4;
/// The longest user keying material that is read, in bytes.
pub(super) const MAX_UKM: usize = 64;
/// The length of a content encryption key under AES-256 key wrap (RFC 3394), in bytes.
pub(super) const WRAPPED: usize = 40;
/// The length of an uncompressed P-256 point, in bytes.
pub(super) const POINT: usize = 65;
/// The length of the nonce of AES-GCM, in bytes.
pub(super) const NONCE: usize = 12;
/// The length of the tag of AES-GCM, in bytes.
pub(super) const TAG: usize = 16;

const EXPLICIT_0: Tag = constructed(TagNumber::N0);
const EXPLICIT_1: Tag = constructed(TagNumber::N1);
const IMPLICIT_0: Tag = primitive(TagNumber::N0);

/// Object identifiers, as the content of their encoding.
mod oid {
    use der::asn1::ObjectIdentifier;

    const fn oid(text: &str) -> ObjectIdentifier {
        ObjectIdentifier::new_unwrap(text)
    }

    pub const DATA: ObjectIdentifier = oid("1.2.840.113549.1.7.1");
    pub const SIGNED_DATA: ObjectIdentifier = oid("1.2.840.113549.1.7.2");
    pub const AUTH_ENVELOPED_DATA: ObjectIdentifier = oid("1.2.840.113549.1.9.16.1.23");
    pub const CONTENT_TYPE: ObjectIdentifier = oid("1.2.840.113549.1.9.3");
    pub const MESSAGE_DIGEST: ObjectIdentifier = oid("1.2.840.113549.1.9.4");
    /// The header, a signed attribute. It uses the arc reserved for documentation until the project has an arc of its own.
    pub const HEADER: ObjectIdentifier = oid("1.3.6.1.4.1.32473.2.1");
    pub const AES_256_GCM: ObjectIdentifier = oid("2.16.840.1.101.3.4.1.46");
}

/// Whole encodings of algorithm identifiers.
mod algorithm {
    /// SHA-256 without parameters: written and read (RFC 5754, section 2).
    pub const SHA256: &[u8] = &[0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01];
    /// SHA-256 with NULL parameters: read, as the same section requires.
    pub const SHA256_NULL: &[u8] =
        &[0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00];
    /// ECDSA with SHA-256 (RFC 5754, section 3.3).
    pub const ECDSA_SHA256: &[u8] = &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    /// RSASSA-PSS with SHA-256, MGF1 with SHA-256 and a salt of 32 bytes (RFC 4056); SHA-256 with NULL parameters: written and
    /// read.
    pub const PSS_SHA256: &[u8] = &[
        0x30, 0x41, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a, 0x30, 0x34, 0xa0, 0x0f, 0x30,
        0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0xa1, 0x1c, 0x30, 0x1a,
        0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48,
        0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0xa2, 0x03, 0x02, 0x01, 0x20,
    ];
    /// The same with SHA-256 without parameters: read, as RFC 4055, section 2.1, requires.
    pub const PSS_SHA256_ABSENT: &[u8] = &[
        0x30, 0x3d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a, 0x30, 0x30, 0xa0, 0x0d, 0x30,
        0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0xa1, 0x1a, 0x30, 0x18, 0x06, 0x09,
        0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08, 0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65,
        0x03, 0x04, 0x02, 0x01, 0xa2, 0x03, 0x02, 0x01, 0x20,
    ];
    /// RSAES-OAEP with SHA-256 and MGF1 with SHA-256 (RFC 3560); SHA-256 without parameters: written and read, like OpenSSL.
    pub const OAEP_SHA256: &[u8] = &[
        0x30, 0x38, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x07, 0x30, 0x2b, 0xa0, 0x0d, 0x30,
        0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0xa1, 0x1a, 0x30, 0x18, 0x06, 0x09,
        0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08, 0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65,
        0x03, 0x04, 0x02, 0x01,
    ];
    /// The same with SHA-256 with NULL parameters: read.
    pub const OAEP_SHA256_NULL: &[u8] = &[
        0x30, 0x3c, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x07, 0x30, 0x2f, 0xa0, 0x0f, 0x30,
        0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0xa1, 0x1c, 0x30, 0x1a,
        0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48,
        0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00,
    ];
    /// The type of the originator's key: an EC key on the recipient's curve (RFC 5753, section 3.1.1).
    pub const EC_PUBLIC_KEY: &[u8] = &[0x30, 0x09, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
    /// AES-256 key wrap (RFC 3565), without parameters.
    pub const AES_256_WRAP: &[u8] = &[0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x01, 0x2d];
    /// dhSinglePass-stdDH-sha256kdf-scheme with AES-256 key wrap (RFC 5753, section 7.1.4).
    pub const ECDH_SHA256_WRAP: &[u8] = &[
        0x30, 0x15, 0x06, 0x06, 0x2b, 0x81, 0x04, 0x01, 0x0b, 0x01, 0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01,
        0x65, 0x03, 0x04, 0x01, 0x2d,
    ];
}

/// The algorithm identifier of a signature in this suite.
fn signature_algorithm(suite: Suite) -> &'static [u8] {
    match suite {
        Suite::P256 => algorithm::ECDSA_SHA256,
        Suite::Rsa => algorithm::PSS_SHA256,
    }
}

fn put_oid(out: &mut Vec<u8>, oid: &ObjectIdentifier) -> Result<()> {
    oid.encode(out)
}

/// A KeyAgreeRecipientInfo for one recipient.
pub(super) fn agreement(key_id: &[u8], point: &[u8; POINT], ukm: &[u8], wrapped: &[u8; WRAPPED]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(320);
    put_number(&mut out, Tag::Integer, 3)?;
    let public_key = field(Tag::BitString, &[&[0], point])?;
    let originator = field(EXPLICIT_1, &[algorithm::EC_PUBLIC_KEY, &public_key])?;
    put(&mut out, EXPLICIT_0, &[&originator])?;
    put(&mut out, EXPLICIT_1, &[&field(Tag::OctetString, &[ukm])?])?;
    out.extend_from_slice(algorithm::ECDH_SHA256_WRAP);
    let rid = field(EXPLICIT_0, &[&field(Tag::OctetString, &[key_id])?])?;
    let key = field(Tag::Sequence, &[&rid, &field(Tag::OctetString, &[wrapped])?])?;
    put(&mut out, Tag::Sequence, &[&key])?;
    field(EXPLICIT_1, &[&out])
}

/// A KeyTransRecipientInfo.
pub(super) fn transport(key_id: &[u8], encrypted: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(encrypted.len() + 128);
    put_number(&mut out, Tag::Integer, 2)?;
    put(&mut out, IMPLICIT_0, &[key_id])?;
    out.extend_from_slice(algorithm::OAEP_SHA256);
    put(&mut out, Tag::OctetString, &[encrypted])?;
    field(Tag::Sequence, &[&out])
}

/// The input of the key derivation besides the shared secret: ECC-CMS-SharedInfo (RFC 5753, section 7.2).
pub(super) fn shared_info(ukm: Option<&[u8]>) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(128);
    out.extend_from_slice(algorithm::AES_256_WRAP);
    if let Some(ukm) = ukm {
        put(&mut out, EXPLICIT_0, &[&field(Tag::OctetString, &[ukm])?])?;
    }
    // The length of the key encryption key, in bits.
    put(&mut out, constructed(TagNumber::N2), &[&field(Tag::OctetString, &[&256u32.to_be_bytes()])?])?;
    field(Tag::Sequence, &[&out])
}

/// An AuthEnvelopedData for these recipients. `encrypt` writes the ciphertext, of `length` bytes, and returns the tag.
pub(super) fn enveloped<E: From<der::Error>>(
    mut recipients: Vec<Vec<u8>>,
    nonce: &[u8; NONCE],
    length: usize,
    encrypt: impl FnOnce(&mut [u8]) -> std::result::Result<[u8; TAG], E>,
) -> std::result::Result<Vec<u8>, E> {
    recipients.sort_unstable();
    let recipients_len = recipients.iter().map(Vec::len).sum();
    let mut algorithm = Vec::with_capacity(32);
    put_oid(&mut algorithm, &oid::AES_256_GCM)?;
    let mut parameters = field(Tag::OctetString, &[nonce])?;
    put_number(&mut parameters, Tag::Integer, TAG as u64)?;
    put(&mut algorithm, Tag::Sequence, &[&parameters])?;
    let mut before = Vec::with_capacity(64);
    put_oid(&mut before, &oid::DATA)?;
    put(&mut before, Tag::Sequence, &[&algorithm])?;

    let content_len = before.len() + field_len(length)?;
    let total = 3 + field_len(recipients_len)? + field_len(content_len)? + field_len(TAG)?;
    let mut out = Vec::with_capacity(field_len(total)?);
    put_header(&mut out, Tag::Sequence, total)?;
    put_number(&mut out, Tag::Integer, 0)?;
    put_header(&mut out, Tag::Set, recipients_len)?;
    recipients.iter().for_each(|recipient| out.extend_from_slice(recipient));
    put_header(&mut out, Tag::Sequence, content_len)?;
    out.extend_from_slice(&before);
    put_header(&mut out, IMPLICIT_0, length)?;
    let start = out.len();
    out.resize(start + length, 0);
    let tag = encrypt(out.get_mut(start..).unwrap_or_default())?;
    put(&mut out, Tag::OctetString, &[&tag])?;
    Ok(out)
}

/// The content of the signed attributes, in DER order.
pub(super) fn signed_attributes_for(encrypted: bool, digest: &[u8; 32], header: &[u8]) -> Result<Vec<u8>> {
    let attribute = |name: &ObjectIdentifier, value: &[u8]| -> Result<Vec<u8>> {
        let mut out = name.to_der()?;
        put(&mut out, Tag::Set, &[value])?;
        field(Tag::Sequence, &[&out])
    };
    let mut attributes = [
        attribute(&oid::CONTENT_TYPE, &content_type(encrypted).to_der()?)?,
        attribute(&oid::MESSAGE_DIGEST, &field(Tag::OctetString, &[digest])?)?,
        attribute(&oid::HEADER, &field(Tag::OctetString, &[header])?)?,
    ];
    attributes.sort_unstable();
    Ok(attributes.concat())
}

fn content_type(encrypted: bool) -> &'static ObjectIdentifier {
    if encrypted { &oid::AUTH_ENVELOPED_DATA } else { &oid::DATA }
}

/// The whole message.
pub(super) fn signed_data(
    encrypted: bool,
    content: &[u8],
    certificates: &[&[u8]],
    key_id: &[u8],
    attributes: &[u8],
    suite: Suite,
    signature: &[u8],
) -> Result<Vec<u8>> {
    let mut info = Vec::with_capacity(attributes.len() + signature.len() + 128);
    put_number(&mut info, Tag::Integer, 3)?;
    put(&mut info, IMPLICIT_0, &[key_id])?;
    info.extend_from_slice(algorithm::SHA256);
    put(&mut info, EXPLICIT_0, &[attributes])?;
    info.extend_from_slice(signature_algorithm(suite));
    put(&mut info, Tag::OctetString, &[signature])?;
    let info = field(Tag::Sequence, &[&info])?;

    let mut after = Vec::with_capacity(info.len() + 8);
    if !certificates.is_empty() {
        let mut sorted = certificates.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        put(&mut after, EXPLICIT_0, &sorted)?;
    }
    put(&mut after, Tag::Set, &[&info])?;

    let type_len = field_len(content_type(encrypted).as_bytes().len())?;
    let octets_len = field_len(content.len())?;
    let encapsulated_len = type_len + field_len(octets_len)?;
    let signed_len = 3 + field_len(algorithm::SHA256.len())? + field_len(encapsulated_len)? + after.len();
    let explicit_len = field_len(signed_len)?;
    let total = field_len(oid::SIGNED_DATA.as_bytes().len())? + field_len(explicit_len)?;

    let mut out = Vec::with_capacity(field_len(total)?);
    put_header(&mut out, Tag::Sequence, total)?;
    put_oid(&mut out, &oid::SIGNED_DATA)?;
    put_header(&mut out, EXPLICIT_0, explicit_len)?;
    put_header(&mut out, Tag::Sequence, signed_len)?;
    put_number(&mut out, Tag::Integer, 3)?;
    put(&mut out, Tag::Set, &[algorithm::SHA256])?;
    put_header(&mut out, Tag::Sequence, encapsulated_len)?;
    put_oid(&mut out, content_type(encrypted))?;
    put_header(&mut out, EXPLICIT_0, octets_len)?;
    put(&mut out, Tag::OctetString, &[content])?;
    out.extend_from_slice(&after);
    Ok(out)
}

/// The CMS layer by itself, against messages that others have made: an independent program, and the `openssl` program.
#[cfg(test)]
mod tests {
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
            assert_eq!(plaintext[32..64], sha256(&[b"HEADER"]), "{name}: the header digest follows the salt");
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

    /// The content of a ContentInfo.
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
        let options =
            [(KeyType::P256, ""), (KeyType::Rsa2048, "-keyopt rsa_padding_mode:pss -keyopt rsa_pss_saltlen:32")];
        for (key_type, options) in options {
            let key = node(dir.path(), "m1", key_type);
            let how = "cms -sign -binary -nodetach -nocerts -keyid -nosmimecap -md sha256 -in body -outform DER";
            openssl(dir.path(), &format!("{how} -signer m1.pem -inkey m1-key.pem -out signed.der {options}"));
            let bytes = std::fs::read(dir.path().join("signed.der")).unwrap();
            let message = read(&bytes).unwrap();
            assert_eq!(
                message.unsupported,
                Some("another signed attribute"),
                "it signs the time, in place of a header"
            );
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
}
