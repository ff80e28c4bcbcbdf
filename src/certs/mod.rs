//! Certificates and keys: reading, keeping, checking and issuing them.

mod anchors;
mod certificate;
mod issue;
mod key;
mod name;
mod pem;
mod request;
mod signing;
mod store;
mod trust;

pub use certificate::{Certificate, CertificateError, KeyId, Suite};
pub use issue::{CertificateAuthority, IssueError};
pub use key::{Credentials, KeyError, KeyType, PrivateKey};
pub use request::CertificateRequest;
pub use store::{CertificateStore, Recipient, RecipientQuery, SignerQuery, StoreError};
pub use trust::{AuthorityError, Trust, TrustError};
