//! Certificates and keys: reading, keeping, checking and issuing them.

mod certificate;
mod key;
mod store;

pub use certificate::{Certificate, CertificateError, KeyId, Suite};
pub use key::{Credentials, KeyError, PrivateKey};
pub use store::{CertificateStore, Recipient, RecipientQuery, SignerQuery, StoreError};
