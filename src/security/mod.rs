//! Message security: the secure serializer, which signs every message and encrypts it for its recipients.
//!
//! # Guarantees
//!
//! 1. The receiver of a message knows its signer, by a certificate that its [`Trust`](crate::certs::Trust) accepts now. The one identity
//!    in that certificate is the sender in the header, in the body and in [`Verified`](crate::serializer::Verified).
//! 2. Header, recipients and body belong together as they were signed. A body cannot be moved under another header, ciphertext cannot be
//!    signed again by another node, and all recipients see the same body.
//! 3. Only the recipients can read the body. An [`Advertise`](crate::packet::Advertise) contains no secret and is signed only.
//! 4. A message is fresh, is for this node and this kind of queue, and is opened once.
//! 5. The algorithms are those of the two suites; nothing in a message changes them.
//! 6. Untrusted bytes cannot cause a panic, block, or grow memory without bound; errors contain no byte of a body and are not sent to
//!    anyone.
//!
//! # Not guaranteed
//!
//! * Delivery or order: the broker can drop and delay messages.
//! * Hiding sender, recipients, time, size and kind of a message: the header is not encrypted.
//! * Secrecy of past messages after a recipient's private key is stolen.
//! * Anything about a node whose key is stolen or whose clock is wrong. A clock that is more than 30 s behind cannot open what others send;
//!   a clock that is set back far can be made to open old messages, up to the limits of the replay memory and the start of the process.
//! * That a stored message (in the offline queue) is opened only once across restarts: the replay memory is in this process.
//!
//! # Opening
//!
//! Twelve steps, each with its [kind of error](crate::serializer::OpenErrorKind), in this order; the first failure ends it:
//! size, structure, algorithms, destination, freshness, signer, certificate, signature, replay, authority, decryption, body. The first six
//! use unverified bytes only to refuse, and nothing is decrypted before the signature has been verified.
//!
//! The wire format is in `docs/wire-format.md`.

mod agreement;
mod cms;
mod context;
mod crypto;
mod envelope;
mod fields;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod open;
mod order;
mod replay;
mod seal;
mod serializer;
mod verify;

pub use context::IdentityMismatch;
pub use envelope::Header;
pub use replay::ReplayLimits;
pub use serializer::{BuildError, CONTENT_TYPE, Counters, DangerousOptions, SecureSerializer, SecureSerializerBuilder};
pub use verify::{Inspection, inspect};
