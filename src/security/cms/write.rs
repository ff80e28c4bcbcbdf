//! Writing: each message has one encoding, in DER order.

use der::asn1::ObjectIdentifier;
use der::{Encode, Result, Tag, TagNumber};

use super::{NONCE, POINT, TAG, WRAPPED, algorithm, oid, signature_algorithm};
use crate::certs::Suite;
use crate::security::fields::{constructed, field, field_len, primitive, put, put_header, put_number};

const EXPLICIT_0: Tag = constructed(TagNumber::N0);
const EXPLICIT_1: Tag = constructed(TagNumber::N1);
const IMPLICIT_0: Tag = primitive(TagNumber::N0);

fn put_oid(out: &mut Vec<u8>, oid: &ObjectIdentifier) -> Result<()> {
    oid.encode(out)
}

/// A KeyAgreeRecipientInfo for one recipient.
pub(crate) fn agreement(key_id: &[u8], point: &[u8; POINT], ukm: &[u8], wrapped: &[u8; WRAPPED]) -> Result<Vec<u8>> {
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
pub(crate) fn transport(key_id: &[u8], encrypted: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(encrypted.len() + 128);
    put_number(&mut out, Tag::Integer, 2)?;
    put(&mut out, IMPLICIT_0, &[key_id])?;
    out.extend_from_slice(algorithm::OAEP_SHA256);
    put(&mut out, Tag::OctetString, &[encrypted])?;
    field(Tag::Sequence, &[&out])
}

/// The input of the key derivation besides the shared secret: ECC-CMS-SharedInfo (RFC 5753, section 7.2).
pub(crate) fn shared_info(ukm: Option<&[u8]>) -> Result<Vec<u8>> {
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
pub(crate) fn enveloped<E: From<der::Error>>(
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
pub(crate) fn signed_attributes_for(encrypted: bool, digest: &[u8; 32], header: &[u8]) -> Result<Vec<u8>> {
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
pub(crate) fn signed_data(
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
