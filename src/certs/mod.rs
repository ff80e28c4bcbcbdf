//! Certificates and keys: reading, storing, verifying and issuing them.
//!
//! A node signs with its [`Credentials`], which a [`CertificateDirectory`] reads from files. It finds the certificates of peers in a
//! [`CertificateStore`], and verifies them with a [`Trust`]. A [`CertificateAuthority`] issues certificates.

mod authority;
mod cached_store;
mod certificate;
mod certificate_directory;
mod directory_store;
pub(crate) mod files;
mod issuing;
mod key;
mod revocation_list;
mod store;
mod trust;
mod trust_anchors;
mod trust_store;

pub use authority::CertificateAuthority;
pub use cached_store::CachedCertificateStore;
pub(crate) use certificate::is_readable;
pub use certificate::{Certificate, CertificateError, KeyId, Suite};
#[cfg(feature = "cli")]
pub(crate) use certificate::{allows_nodes, distinguished_name, purposes, timestamp};
pub use certificate_directory::CertificateDirectory;
#[cfg(feature = "cli")]
pub(crate) use certificate_directory::Content;
pub use directory_store::DirectoryCertificateStore;
pub use files::DirectoryError;
#[cfg(feature = "cli")]
pub(crate) use files::read_certificates;
pub use issuing::{CertificateRequest, IssueError};
pub use key::{Credentials, KeyError, KeyType, PrivateKey};
pub use revocation_list::{RevocationList, RevocationReason};
pub use store::{CertificateStore, Recipient, RecipientQuery, SignerQuery, StaticCertificateStore, StoreError};
pub use trust::Trust;
#[cfg(feature = "cli")]
pub(crate) use trust_anchors::CaCertificate;
pub use trust_anchors::{AuthorityError, TrustError};
pub use trust_store::TrustStore;

/// The OpenSSL library whose types are part of this module's interface.
#[doc(no_inline)]
pub use openssl;
/// The type of key texts that clear themselves when they are dropped.
#[doc(no_inline)]
pub use zeroize::Zeroizing;
