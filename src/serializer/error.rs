//! Why a message could not be sealed or was refused.

use std::borrow::Cow;
use std::fmt;

use super::CodecError;
use crate::packet::{Identity, RandomnessError};

/// Why a message could not be sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The store has no valid certificate for somebody the message is for, or the audience is empty.
    #[error("no valid certificate for {0}")]
    NoRecipient(String),
    /// More recipients than one message can have.
    #[error("{0} recipients, at most 64 are possible")]
    TooManyRecipients(usize),
    /// The class is not allowed for this kind and audience.
    #[error("this kind of message cannot be {0}")]
    NotAllowed(&'static str),
    /// The own certificate is not valid now.
    #[error("own certificate: {0}")]
    OwnCertificate(String),
    /// The certificate store failed.
    #[error("certificate store: {0}")]
    Store(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The message would be longer than receivers accept.
    #[error("{0} bytes, at most {1} are accepted")]
    TooLarge(usize, usize),
    /// The packet cannot be expressed in the codec.
    #[error("the packet cannot be encoded")]
    Codec(#[from] CodecError),
    /// A cryptographic operation failed.
    #[error("cryptography: {0}")]
    Crypto(String),
    /// The random generator failed.
    #[error(transparent)]
    Random(#[from] RandomnessError),
}

/// At which step a message was refused; the steps are in this order, and the first failure ends the opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// Longer than accepted for its kind.
    TooLarge,
    /// Not of the one shape that is accepted.
    Malformed,
    /// An algorithm, version or content type that is not accepted.
    Unsupported,
    /// Not for this node, or not for this queue.
    WrongDestination,
    /// From the future, expired, valid for too long, or made before this process started.
    NotFresh,
    /// The store knows no such signer.
    UnknownSigner,
    /// The signer's certificate is not valid (chain, time, revocation, usage, identity).
    BadCertificate,
    /// The signature is not the signer's over this message.
    BadSignature,
    /// Seen before; or the memory for what was seen is full.
    Replayed,
    /// The signer may not send this.
    NotAuthorized,
    /// Decryption failed, in any way.
    CannotOpen,
    /// The body is not what its header says, or not well formed.
    BadBody,
}

impl OpenErrorKind {
    /// Every kind, in the order of the steps.
    pub const ALL: [OpenErrorKind; 12] = [
        Self::TooLarge,
        Self::Malformed,
        Self::Unsupported,
        Self::WrongDestination,
        Self::NotFresh,
        Self::UnknownSigner,
        Self::BadCertificate,
        Self::BadSignature,
        Self::Replayed,
        Self::NotAuthorized,
        Self::CannotOpen,
        Self::BadBody,
    ];

    /// The kind as one word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TooLarge => "TooLarge",
            Self::Malformed => "Malformed",
            Self::Unsupported => "Unsupported",
            Self::WrongDestination => "WrongDestination",
            Self::NotFresh => "NotFresh",
            Self::UnknownSigner => "UnknownSigner",
            Self::BadCertificate => "BadCertificate",
            Self::BadSignature => "BadSignature",
            Self::Replayed => "Replayed",
            Self::NotAuthorized => "NotAuthorized",
            Self::CannotOpen => "CannotOpen",
            Self::BadBody => "BadBody",
        }
    }
}

impl fmt::Display for OpenErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a message was refused. It stays here: nothing of it travels back to the sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenError {
    /// At which step.
    pub kind: OpenErrorKind,
    /// What was wrong, without any byte of the message.
    pub why: Cow<'static, str>,
    /// Who the message claims to be from, once that could be read. Unverified up to and including
    /// [`OpenErrorKind::BadSignature`].
    pub claimed: Option<Identity>,
    /// Whether it is for the mappers, verified, and sealed to the keys of others of them: one of these can open it.
    pub for_others: bool,
    /// When it is a registration or heartbeat, verified, of an earlier process of its sender than one that was heard: both instances.
    pub superseded: Option<SupersededProcess>,
}

/// Two processes of one sender, by their instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SupersededProcess {
    /// The one that said it.
    pub instance: u64,
    /// The later one, which was heard before.
    pub latest: u64,
}

impl OpenError {
    /// A refusal at this step.
    pub fn new(kind: OpenErrorKind, why: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, why: why.into(), claimed: None, for_others: false, superseded: None }
    }

    /// The same refusal of a message that is sealed to the keys of other mappers.
    #[must_use]
    pub fn for_others(self) -> Self {
        Self { for_others: true, ..self }
    }

    /// The same refusal, with who the message claims to be from.
    #[must_use]
    pub fn claimed_by(mut self, identity: &Identity) -> Self {
        self.claimed = Some(identity.clone());
        self
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.why)
    }
}

impl std::error::Error for OpenError {}
