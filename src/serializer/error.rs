//! Errors: why a packet could not be encoded or decoded, and why a message could not be sealed or was refused.

use std::borrow::Cow;
use std::fmt;

use crate::packet::{Identity, Kind, MessageId, RandomnessError};

/// Why a packet could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
#[error("{codec}: {why}")]
pub struct CodecError {
    codec: &'static str,
    why: String,
}

impl CodecError {
    /// An error of the codec of this name. `why` must hold nothing of the message.
    pub fn new(codec: &'static str, why: impl fmt::Display) -> Self {
        Self { codec, why: why.to_string() }
    }
}

/// Why a message could not be sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The store has no valid certificate for a node of the audience, or the audience is empty.
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

/// The step that refused a message. The steps are in this order; the first failure ends the opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// Longer than accepted for its kind.
    TooLarge,
    /// Not the one accepted structure.
    Malformed,
    /// An algorithm, version or content type that is not accepted.
    Unsupported,
    /// Not for this node, or not for this queue.
    WrongDestination,
    /// From the future, expired, valid for too long, or issued before this process started.
    NotFresh,
    /// The store does not know the signer.
    UnknownSigner,
    /// The signer's certificate is not valid (chain, time, revocation, usage, identity).
    BadCertificate,
    /// The signature is not the signer's over this message.
    BadSignature,
    /// Opened before, or the replay memory is full.
    Replayed,
    /// The signer may not send this.
    NotAuthorized,
    /// Decryption failed, in any way.
    CannotOpen,
    /// The body does not match its header, or is not well formed.
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

    /// The kind as a word.
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

/// Why a message was refused. The error is local: nothing of it is sent to the sender.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenError {
    /// The step.
    pub kind: OpenErrorKind,
    /// What was wrong, without a byte of the message.
    pub why: Cow<'static, str>,
    /// The sender that the message claims, once it could be read. Unverified up to and including [`OpenErrorKind::BadSignature`].
    pub claimed: Option<Identity>,
    /// Whether it is verified and for other processes: encrypted for other mappers, or addressed to a newer process of this node. One of
    /// them can open it.
    pub for_others: bool,
    /// Set for a verified message that does not name this process and may be from before its start: it can be sent again, addressed to
    /// this process.
    pub not_addressed: Option<NotAddressed>,
    /// Set for a verified registration or heartbeat of a process that a newer process of the same identity has replaced.
    pub superseded: Option<SupersededProcess>,
}

/// A verified message that does not name the process that received it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NotAddressed {
    /// Its kind.
    pub kind: Kind,
    /// The instance of its sender.
    pub instance: u64,
    /// Its id.
    pub id: MessageId,
}

/// A process that a newer process of the same identity has replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SupersededProcess {
    /// The instance of the sender.
    pub instance: u64,
    /// The newest instance that was heard.
    pub latest: u64,
}

impl OpenError {
    /// A refusal at this step.
    pub fn new(kind: OpenErrorKind, why: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, why: why.into(), claimed: None, for_others: false, not_addressed: None, superseded: None }
    }

    /// The same refusal of a message that another process can open.
    #[must_use]
    pub fn for_others(self) -> Self {
        Self { for_others: true, ..self }
    }

    /// The same refusal, with the claimed sender.
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
