//! Reading: the whole structure is checked before algorithms are, and nothing is copied.

use der::asn1::ObjectIdentifier;
use der::{Result, Tag, TagNumber};

use super::{MAX_CERTIFICATES, MAX_RECIPIENTS, MAX_UKM, NONCE, POINT, TAG, WRAPPED, algorithm, oid};
use crate::certs::Suite;
use crate::security::fields::{Fields, constructed, primitive, put_header};

const EXPLICIT_0: Tag = constructed(TagNumber::N0);
const EXPLICIT_1: Tag = constructed(TagNumber::N1);
const IMPLICIT_0: Tag = primitive(TagNumber::N0);

/// A message with the right structure; nothing in it is verified.
#[derive(Debug)]
pub(crate) struct Message<'a> {
    /// The signed content; none when its type is unknown.
    pub content: Option<Content<'a>>,
    /// The octets of the content: the input of the digest.
    pub content_octets: &'a [u8],
    /// The DER of the certificates in it.
    pub certificates: Vec<&'a [u8]>,
    /// The whole SignerInfo.
    pub signer_info: &'a [u8],
    /// The key id of the signer.
    pub key_id: &'a [u8],
    /// The content of the signed attributes.
    pub attributes: &'a [u8],
    /// The digest in the signed attributes.
    pub digest: &'a [u8],
    /// The header in the signed attributes.
    pub header: &'a [u8],
    /// The suite that the signature names; none when it is unknown.
    pub suite: Option<Suite>,
    /// The signature.
    pub signature: &'a [u8],
    /// What is not supported, if anything; fields above may be missing then.
    pub unsupported: Option<&'static str>,
}

/// The signed content.
#[derive(Debug)]
pub(crate) enum Content<'a> {
    /// Encrypted for its recipients.
    Encrypted(Enveloped<'a>),
    /// Not encrypted.
    Plain(&'a [u8]),
}

/// An AuthEnvelopedData.
#[derive(Debug)]
pub(crate) struct Enveloped<'a> {
    /// The recipients, 1 to 64.
    pub recipients: Vec<Recipient<'a>>,
    /// The nonce.
    pub nonce: &'a [u8; NONCE],
    /// The ciphertext.
    pub ciphertext: &'a [u8],
    /// The authentication tag.
    pub tag: &'a [u8; TAG],
}

/// One recipient, with its encrypted content encryption key.
#[derive(Debug)]
pub(crate) enum Recipient<'a> {
    /// By key agreement.
    Agreement(Agreement<'a>),
    /// By key transport.
    Transport(Transport<'a>),
}

/// A KeyAgreeRecipientInfo.
#[derive(Debug)]
pub(crate) struct Agreement<'a> {
    pub key_id: &'a [u8],
    pub point: &'a [u8; POINT],
    pub ukm: Option<&'a [u8]>,
    pub wrapped: &'a [u8; WRAPPED],
}

/// A KeyTransRecipientInfo.
#[derive(Debug)]
pub(crate) struct Transport<'a> {
    pub key_id: &'a [u8],
    pub encrypted: &'a [u8],
}

impl<'a> Recipient<'a> {
    /// The key id of the recipient.
    pub fn key_id(&self) -> &'a [u8] {
        match self {
            Recipient::Agreement(agreement) => agreement.key_id,
            Recipient::Transport(transport) => transport.key_id,
        }
    }
}

/// The first thing that is not supported.
#[derive(Default)]
pub(super) struct Notes(Option<&'static str>);

impl Notes {
    fn note(&mut self, what: &'static str) {
        self.0.get_or_insert(what);
    }

    /// The next field, an AlgorithmIdentifier: which of these it is.
    fn algorithm(&mut self, fields: &mut Fields<'_>, accepted: &[&[u8]], what: &'static str) -> Result<Option<usize>> {
        let found = fields.element()?;
        let position = accepted.iter().position(|one| *one == found);
        if position.is_none() {
            let mut outer = Fields::new(found)?;
            let mut inside = outer.inside(Tag::Sequence)?;
            inside.typed::<ObjectIdentifier>()?;
            if !inside.is_empty() {
                inside.element()?;
            }
            inside.end()?;
            self.note(what);
        }
        Ok(position)
    }
}

fn malformed() -> der::Error {
    der::ErrorKind::Failed.into()
}

fn ensure(good: bool) -> Result<()> {
    good.then_some(()).ok_or_else(malformed)
}

/// Reads a message.
///
/// # Errors
/// When the structure is wrong. A message with the right structure that names something unsupported is returned with a note.
pub(crate) fn read(bytes: &[u8]) -> Result<Message<'_>> {
    let mut notes = Notes::default();
    let mut outer = Fields::new(bytes)?;
    let mut content_info = outer.inside(Tag::Sequence)?;
    outer.end()?;
    let content_type: ObjectIdentifier = content_info.typed()?;
    let mut explicit = content_info.inside(EXPLICIT_0)?;
    content_info.end()?;
    if content_type != oid::SIGNED_DATA {
        explicit.element()?;
        explicit.end()?;
        return Ok(Message::unsupported("another content type than SignedData"));
    }
    let mut signed = explicit.inside(Tag::Sequence)?;
    explicit.end()?;

    ensure(signed.number(Tag::Integer)? == 3)?;
    let mut digests = signed.inside(Tag::Set)?;
    notes.algorithm(&mut digests, &[algorithm::SHA256, algorithm::SHA256_NULL], "another digest than SHA-256")?;
    digests.end()?;

    let mut encapsulated = signed.inside(Tag::Sequence)?;
    let content_type: ObjectIdentifier = encapsulated.typed()?;
    let mut explicit = encapsulated.inside(EXPLICIT_0)?;
    encapsulated.end()?;
    let content_octets = explicit.value(Tag::OctetString)?;
    explicit.end()?;
    let content = match content_type {
        oid::AUTH_ENVELOPED_DATA => enveloped(content_octets, &mut notes)?.map(Content::Encrypted),
        oid::DATA => Some(Content::Plain(content_octets)),
        _ => {
            notes.note("another kind of content than authenticated encryption");
            None
        }
    };

    let certificates = if signed.next_is(EXPLICIT_0) { certificates(signed.value(EXPLICIT_0)?)? } else { Vec::new() };
    let mut infos = signed.inside(Tag::Set)?;
    signed.end()?;
    let signer_info = infos.element()?;
    infos.end()?;

    let signer = signer_info_fields(signer_info, content_type, &mut notes)?;
    Ok(Message {
        content,
        content_octets,
        certificates,
        signer_info,
        key_id: signer.key_id,
        attributes: signer.attributes,
        digest: signer.digest,
        header: signer.header,
        suite: signer.suite,
        signature: signer.signature,
        unsupported: notes.0,
    })
}

/// A SignerInfo with the right structure, on its own; nothing in it is verified.
#[derive(Debug)]
pub(crate) struct SignerInfo<'a> {
    /// The key id of the signer.
    pub key_id: &'a [u8],
    /// The content of the signed attributes.
    pub attributes: &'a [u8],
    /// The digest in the signed attributes.
    pub digest: &'a [u8],
    /// The header in the signed attributes.
    pub header: &'a [u8],
    /// The suite that the signature names; none when it is unknown.
    pub suite: Option<Suite>,
    /// The signature.
    pub signature: &'a [u8],
    /// What is not supported, if anything.
    pub unsupported: Option<&'static str>,
}

/// Reads the SignerInfo of a message that is not at hand, which was encrypted or not.
///
/// # Errors
/// When the structure is wrong.
pub(crate) fn read_signer_info(bytes: &[u8], encrypted: bool) -> Result<SignerInfo<'_>> {
    let mut notes = Notes::default();
    let content_type = if encrypted { oid::AUTH_ENVELOPED_DATA } else { oid::DATA };
    let signer = signer_info_fields(bytes, content_type, &mut notes)?;
    Ok(SignerInfo { unsupported: notes.0, ..signer })
}

fn signer_info_fields<'a>(
    bytes: &'a [u8],
    content_type: ObjectIdentifier,
    notes: &mut Notes,
) -> Result<SignerInfo<'a>> {
    let mut outer = Fields::new(bytes)?;
    let mut info = outer.inside(Tag::Sequence)?;
    outer.end()?;
    ensure(info.number(Tag::Integer)? == 3)?;
    let key_id = key_id(info.value(IMPLICIT_0)?)?;
    notes.algorithm(&mut info, &[algorithm::SHA256, algorithm::SHA256_NULL], "another digest than SHA-256")?;
    let attributes = info.value(EXPLICIT_0)?;
    let signature_algorithms = [algorithm::ECDSA_SHA256, algorithm::PSS_SHA256, algorithm::PSS_SHA256_ABSENT];
    let suite = match notes.algorithm(&mut info, &signature_algorithms, "another signature algorithm")? {
        Some(0) => Some(Suite::P256),
        Some(_) => Some(Suite::Rsa),
        None => None,
    };
    let signature = info.value(Tag::OctetString)?;
    info.end()?;
    let [digest, header] = three_attributes(attributes, content_type, notes)?;
    Ok(SignerInfo { key_id, attributes, digest, header, suite, signature, unsupported: None })
}

impl Message<'_> {
    fn unsupported(what: &'static str) -> Self {
        Message {
            content: None,
            content_octets: &[],
            certificates: Vec::new(),
            signer_info: &[],
            key_id: &[],
            attributes: &[],
            digest: &[],
            header: &[],
            suite: None,
            signature: &[],
            unsupported: Some(what),
        }
    }
}

/// The tag and length in front of the signed attributes in the signature's input: the tag of a SET, which differs from the one in the
/// message (RFC 5652, section 5.4).
pub(crate) fn attributes_header(content: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(6);
    put_header(&mut out, Tag::Set, content.len())?;
    Ok(out)
}

/// Key ids are bounded, so that nothing long is stored for them.
fn key_id(bytes: &[u8]) -> Result<&[u8]> {
    ensure((1..=crate::certs::KeyId::MAX_BYTES).contains(&bytes.len()))?;
    Ok(bytes)
}

fn certificates(content: &[u8]) -> Result<Vec<&[u8]>> {
    let mut fields = Fields::new(content)?;
    let mut found = Vec::new();
    while !fields.is_empty() {
        ensure(found.len() < MAX_CERTIFICATES && fields.next_is(Tag::Sequence))?;
        let next = fields.element()?;
        ensure(found.last().is_none_or(|before| *before < next))?;
        found.push(next);
    }
    ensure(!found.is_empty())?;
    Ok(found)
}

/// Exactly the three attributes, each with one value, in DER order. Returns the digest and the header.
fn three_attributes<'a>(content: &'a [u8], content_type: ObjectIdentifier, notes: &mut Notes) -> Result<[&'a [u8]; 2]> {
    let mut set = Fields::new(content)?;
    let (mut types, mut digest, mut header) = (0, None, None);
    let mut before: &[u8] = &[];
    for _ in 0..3 {
        let whole = set.element()?;
        ensure(before < whole)?;
        before = whole;
        let mut outer = Fields::new(whole)?;
        let mut attribute = outer.inside(Tag::Sequence)?;
        let name: ObjectIdentifier = attribute.typed()?;
        let mut values = attribute.inside(Tag::Set)?;
        attribute.end()?;
        match name {
            oid::CONTENT_TYPE => {
                types += 1;
                ensure(values.typed::<ObjectIdentifier>()? == content_type)?;
            }
            oid::MESSAGE_DIGEST => {
                ensure(digest.is_none())?;
                digest = Some(&values.octets::<32>()?[..]);
            }
            oid::HEADER => {
                ensure(header.is_none())?;
                header = Some(values.value(Tag::OctetString)?);
            }
            _ => {
                notes.note("another signed attribute");
                values.element()?;
            }
        }
        values.end()?;
    }
    set.end()?;
    match (digest, header) {
        (Some(digest), Some(header)) if types == 1 => Ok([digest, header]),
        _ if notes.0.is_some() => Ok([&[], &[]]),
        _ => Err(malformed()),
    }
}

/// Reads an AuthEnvelopedData (RFC 5083, section 2.1); none when something is not supported.
pub(super) fn enveloped<'a>(bytes: &'a [u8], notes: &mut Notes) -> Result<Option<Enveloped<'a>>> {
    let mut outer = Fields::new(bytes)?;
    let mut data = outer.inside(Tag::Sequence)?;
    outer.end()?;
    ensure(data.number(Tag::Integer)? == 0)?;
    let mut set = data.inside(Tag::Set)?;
    let mut recipients = Vec::with_capacity(1);
    let mut count = 0;
    let mut before: &[u8] = &[];
    while !set.is_empty() {
        count += 1;
        ensure(count <= MAX_RECIPIENTS)?;
        let whole = set.element()?;
        ensure(before < whole)?;
        before = whole;
        if let Some(next) = recipient(whole, notes)? {
            ensure(recipients.iter().all(|earlier: &Recipient<'_>| earlier.key_id() != next.key_id()))?;
            recipients.push(next);
        }
    }
    ensure(count > 0)?;

    let mut content = data.inside(Tag::Sequence)?;
    ensure(content.typed::<ObjectIdentifier>()? == oid::DATA)?;
    let nonce = gcm_nonce(&mut content, notes)?;
    let ciphertext = content.value(IMPLICIT_0)?;
    content.end()?;
    let tag = data.octets()?;
    data.end()?;
    Ok(nonce.map(|nonce| Enveloped { recipients, nonce, ciphertext, tag }))
}

/// The nonce of AES-256-GCM with a tag of 16 bytes (RFC 5084); none when it is another algorithm.
fn gcm_nonce<'a>(fields: &mut Fields<'a>, notes: &mut Notes) -> Result<Option<&'a [u8; NONCE]>> {
    let mut algorithm = fields.inside(Tag::Sequence)?;
    if algorithm.typed::<ObjectIdentifier>()? != oid::AES_256_GCM {
        if !algorithm.is_empty() {
            algorithm.element()?;
        }
        algorithm.end()?;
        notes.note("another content encryption than AES-256-GCM");
        return Ok(None);
    }
    let mut parameters = algorithm.inside(Tag::Sequence)?;
    algorithm.end()?;
    let nonce = parameters.octets()?;
    // The default tag length is 12; it is omitted then.
    let tag_length = if parameters.is_empty() { 12 } else { parameters.number(Tag::Integer)? };
    parameters.end()?;
    if tag_length != TAG as u64 {
        notes.note("another length of the authentication tag than 16");
        return Ok(None);
    }
    Ok(Some(nonce))
}

fn recipient<'a>(whole: &'a [u8], notes: &mut Notes) -> Result<Option<Recipient<'a>>> {
    let mut outer = Fields::new(whole)?;
    if outer.next_is(EXPLICIT_1) {
        return Ok(agreement(outer.inside(EXPLICIT_1)?, notes)?.map(Recipient::Agreement));
    }
    if outer.next_is(Tag::Sequence) {
        return Ok(transport(outer.inside(Tag::Sequence)?, notes)?.map(Recipient::Transport));
    }
    let others = [TagNumber::N2, TagNumber::N3, TagNumber::N4];
    ensure(others.into_iter().any(|number| outer.next_is(constructed(number))))?;
    notes.note("another kind of recipient");
    Ok(None)
}

fn agreement<'a>(mut info: Fields<'a>, notes: &mut Notes) -> Result<Option<Agreement<'a>>> {
    ensure(info.number(Tag::Integer)? == 3)?;
    let mut originator = info.inside(EXPLICIT_0)?;
    let mut key = originator.inside(EXPLICIT_1)?;
    originator.end()?;
    let key_algorithm = notes.algorithm(&mut key, &[algorithm::EC_PUBLIC_KEY], "another kind of originator key")?;
    let bits = key.value(Tag::BitString)?;
    key.end()?;
    let ukm = if info.next_is(EXPLICIT_1) {
        let mut explicit = info.inside(EXPLICIT_1)?;
        let ukm = explicit.value(Tag::OctetString)?;
        explicit.end()?;
        ensure((1..=MAX_UKM).contains(&ukm.len()))?;
        Some(ukm)
    } else {
        None
    };
    let scheme = notes.algorithm(&mut info, &[algorithm::ECDH_SHA256_WRAP], "another key agreement")?;
    let mut keys = info.inside(Tag::Sequence)?;
    info.end()?;
    let mut key = keys.inside(Tag::Sequence)?;
    keys.end()?;
    let mut rid = key.inside(EXPLICIT_0)?;
    let key_id = key_id(rid.value(Tag::OctetString)?)?;
    rid.end()?;
    let wrapped = key.value(Tag::OctetString)?;
    key.end()?;
    if key_algorithm.is_none() || scheme.is_none() {
        return Ok(None);
    }
    // No unused bits, and not compressed (0x04).
    let point: &[u8; POINT] = match bits {
        [0, point @ ..] if point.first() == Some(&4) => point.try_into().map_err(|_| malformed())?,
        _ => return Err(malformed()),
    };
    let wrapped = wrapped.try_into().map_err(|_| malformed())?;
    Ok(Some(Agreement { key_id, point, ukm, wrapped }))
}

fn transport<'a>(mut info: Fields<'a>, notes: &mut Notes) -> Result<Option<Transport<'a>>> {
    ensure(info.number(Tag::Integer)? == 2)?;
    let key_id = key_id(info.value(IMPLICIT_0)?)?;
    let algorithm =
        notes.algorithm(&mut info, &[algorithm::OAEP_SHA256, algorithm::OAEP_SHA256_NULL], "another key transport")?;
    let encrypted = info.value(Tag::OctetString)?;
    info.end()?;
    Ok(algorithm.map(|_| Transport { key_id, encrypted }))
}
