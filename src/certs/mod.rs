//! Certificates and keys: reading, keeping, checking and issuing them.

mod anchors;
mod cached;
mod certificate;
mod directory;
#[cfg(any(feature = "cli", test))]
pub(crate) mod files;
mod fixed;
mod issue;
mod key;
mod learned;
mod name;
mod node;
mod pem;
mod request;
mod revocation;
mod signing;
mod store;
mod trust;

#[cfg(feature = "cli")]
pub(crate) use anchors::Authority;
pub use cached::CachedCertificateStore;
#[cfg(feature = "cli")]
pub(crate) use certificate::moment;
pub use certificate::{Certificate, CertificateError, KeyId, Suite};
pub use directory::DirectoryCertificateStore;
pub use fixed::StaticCertificateStore;
pub use issue::{CertificateAuthority, IssueError};
pub use key::{Credentials, KeyError, KeyType, PrivateKey};
pub use learned::TrustStore;
#[cfg(feature = "cli")]
pub(crate) use name::text as name_text;
#[cfg(feature = "cli")]
pub(crate) use node::Content;
pub use node::{CertificateDirectory, DirectoryError};
#[cfg(feature = "cli")]
pub(crate) use pem::read_certificates;
pub use request::CertificateRequest;
pub use revocation::{Reason, RevocationList};
pub use store::{CertificateStore, Recipient, RecipientQuery, SignerQuery, StoreError};
pub use trust::{AuthorityError, Trust, TrustError};
