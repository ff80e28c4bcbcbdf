//! Message security: the secure serializer, which signs every message and encrypts it for its recipients.
//!
//! # What is promised
//!
//! 1. Who opened a message knows who signed it: by a certificate that its [`Trust`](crate::certs::Trust) believes now, and whose
//!    one identity is the sender that the header, the body and [`Verified`](crate::serializer::Verified) name.
//! 2. What was signed is what is opened: header, recipients and body belong together. A body cannot be moved under another
//!    header, a message cannot be signed anew by somebody who only has its bytes, and all recipients see the same body.
//! 3. Nobody but the recipients that the sender chose can read the body. An [`Advertise`](crate::packet::Advertise) holds no secret
//!    and is signed only.
//! 4. It is fresh, for this node and for this kind of queue, and is opened once.
//! 5. The algorithms are those of the two suites; nothing in a message changes them.
//! 6. Bytes from outside cannot make it panic, block, or grow without bound; errors hold no byte of a body and go back to nobody.
//!
//! # What is not promised
//!
//! * That a message arrives, or in order: who carries messages can drop and delay them.
//! * That nobody sees who talks to whom, when, how much, and in which kind of message: the header is in the clear.
//! * Secrecy of past messages once a recipient's private key is stolen.
//! * Anything about a node whose key is stolen or whose clock lies. A clock that is more than 30 s behind cannot open what others
//!   send it; one that is set back far can be made to open old messages only until the replay memory or the process's start ends it.
//! * That a stored message (the offline queue) is opened only once across restarts: the replay memory is in this process.
//!
//! # Opening
//!
//! Twelve steps, each with its [kind of error](crate::serializer::OpenErrorKind), in this order; the first failure ends it:
//! size, shape, algorithms, destination, freshness, signer, certificate, signature, replay, authority, decryption, body. Bytes that
//! are not verified are used in the first six only to refuse, and nothing is decrypted before the signature is checked.
//!
//! The wire format is `docs/wire-format.md`.

mod agreement;
mod builder;
mod cms;
mod context;
mod credentials;
mod crypto;
mod envelope;
mod fields;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod inspect;
mod open;
mod peers;
mod proof;
mod replay;
mod seal;
mod serializer;

pub use builder::{BuildError, DangerousOptions, SecureSerializerBuilder};
pub use credentials::IdentityMismatch;
pub use envelope::Header;
pub use inspect::{Inspection, inspect};
pub use replay::ReplayLimits;
pub use serializer::{CONTENT_TYPE, Counters, SecureSerializer};
