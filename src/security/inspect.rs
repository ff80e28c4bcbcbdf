//! Inspecting a message: parsed, not verified.

use super::cms::{Content, Recipient};
use super::envelope::Header;
use super::open::parse;
use crate::certs::{KeyId, Suite};
use crate::packet::Kind;
use crate::serializer::{OpenError, OpenErrorKind};

/// The contents of a message that can be read without a key. **Nothing is verified.**
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// Its length in bytes.
    pub bytes: usize,
    /// Its header.
    pub header: Header,
    /// The key id of the certificate that it names as the signer's.
    pub signer: KeyId,
    /// The suite of its signature.
    pub suite: Suite,
    /// The recipients; empty when it is not encrypted.
    pub recipients: Vec<(KeyId, Suite)>,
    /// The DER of the certificates in it.
    pub certificates: Vec<Vec<u8>>,
}

/// Parses a message without a key, a store or a queue: the first three steps of opening.
///
/// # Errors
/// [`OpenError`] of the kind `TooLarge`, `Malformed` or `Unsupported`.
pub fn inspect(bytes: &[u8]) -> Result<Inspection, OpenError> {
    let limit = Kind::ALL.into_iter().map(Kind::max_bytes).max().unwrap_or(0);
    let (message, header) = parse(bytes, limit)?;
    let malformed = || OpenError::new(OpenErrorKind::Malformed, "it does not have the structure of a secure message");
    let key_id = |bytes: &[u8]| KeyId::new(bytes).ok_or_else(malformed);
    let recipients = match &message.content {
        Some(Content::Encrypted(enveloped)) => enveloped.recipients.as_slice(),
        _ => &[],
    };
    let suite_of = |recipient: &Recipient<'_>| match recipient {
        Recipient::Agreement(_) => Suite::P256,
        Recipient::Transport(_) => Suite::Rsa,
    };
    Ok(Inspection {
        bytes: bytes.len(),
        signer: key_id(message.key_id)?,
        suite: message.suite.ok_or_else(malformed)?,
        recipients: recipients
            .iter()
            .map(|recipient| Ok((key_id(recipient.key_id())?, suite_of(recipient))))
            .collect::<Result<_, OpenError>>()?,
        certificates: message.certificates.iter().map(|der| der.to_vec()).collect(),
        header,
    })
}
