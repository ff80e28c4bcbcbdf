//! Certificates and keys: reading, keeping, checking and issuing them.

mod anchors;
mod certificate;
mod key;
mod name;
mod pem;
mod store;
mod trust;

pub use certificate::{Certificate, CertificateError, KeyId, Suite};
pub use key::{Credentials, KeyError, PrivateKey};
pub use store::{CertificateStore, Recipient, RecipientQuery, SignerQuery, StoreError};
pub use trust::{AuthorityError, Trust, TrustError};
