//! Private keys, and credentials: a certificate with its private key.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{PKey, PKeyRef, Private};
use openssl::rsa::Rsa;
use openssl::symm::Cipher;
use zeroize::Zeroizing;

use super::certificate::{Certificate, Suite};

/// The longest key file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// The types of new keys.
///
/// ```
/// use nanite::certs::KeyType;
///
/// assert_eq!(KeyType::default(), KeyType::P256);
/// assert_eq!(KeyType::ALL.map(KeyType::as_str), ["p256", "rsa2048", "rsa3072", "rsa4096"]);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyType {
    /// A key on the curve P-256: small and fast.
    #[default]
    P256,
    /// RSA of 2,048 bits, for infrastructures that require RSA.
    Rsa2048,
    /// RSA of 3,072 bits.
    Rsa3072,
    /// RSA of 4,096 bits.
    Rsa4096,
}

impl KeyType {
    /// Every type.
    pub const ALL: [KeyType; 4] = [Self::P256, Self::Rsa2048, Self::Rsa3072, Self::Rsa4096];

    /// The type as a word: `p256`, `rsa2048`, `rsa3072` or `rsa4096`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::P256 => "p256",
            Self::Rsa2048 => "rsa2048",
            Self::Rsa3072 => "rsa3072",
            Self::Rsa4096 => "rsa4096",
        }
    }

    fn generate(self) -> Result<PKey<Private>, ErrorStack> {
        let bits = match self {
            Self::P256 => {
                let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
                return PKey::from_ec_key(EcKey::generate(&group)?);
            }
            Self::Rsa2048 => 2048,
            Self::Rsa3072 => 3072,
            Self::Rsa4096 => 4096,
        };
        PKey::from_rsa(Rsa::generate(bits)?)
    }
}

impl fmt::Display for KeyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A private key. OpenSSL holds it and clears it when it is dropped; `Debug` does not print it.
///
/// ```
/// use nanite::certs::{KeyType, PrivateKey, Suite};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let key = PrivateKey::generate(KeyType::P256)?;
/// let pem = key.to_encrypted_pem(b"a long random passphrase")?;
/// assert_eq!(PrivateKey::from_pem(&pem, Some(b"a long random passphrase"))?.suite(), Suite::P256);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct PrivateKey {
    key: PKey<Private>,
    suite: Suite,
}

/// Why a private key cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read the key {path}")]
    Unreadable {
        /// The key file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// Users other than the owner can read or write the file.
    #[error("the key {path} has mode {mode:04o}: users other than its owner can access it")]
    TooOpen {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The key is encrypted, and no passphrase was given.
    #[error("the key is encrypted, and no passphrase was given")]
    NeedsPassphrase,
    /// Not a private key, or the wrong passphrase.
    #[error("not a private key, or the wrong passphrase")]
    Malformed,
    /// The type or size of the key is not supported.
    #[error("the key is neither P-256 nor RSA of 2048 to 8192 bits")]
    KeyType,
    /// OpenSSL failed to generate or encode the key.
    #[error("OpenSSL cannot make the key")]
    Openssl(#[from] ErrorStack),
    /// The certificate belongs to another key.
    #[error("the certificate of {0} does not belong to this key")]
    Mismatch(String),
}

impl PrivateKey {
    /// Takes a key that OpenSSL holds.
    ///
    /// # Errors
    /// [`KeyError::KeyType`] when its type or size is not supported.
    pub fn new(key: PKey<Private>) -> Result<Self, KeyError> {
        let suite = Suite::of(&key).ok_or(KeyError::KeyType)?;
        Ok(Self { key, suite })
    }

    /// Generates a key. An RSA key takes up to some seconds of CPU time.
    ///
    /// # Errors
    /// [`KeyError::Openssl`] when OpenSSL fails.
    pub fn generate(key_type: KeyType) -> Result<Self, KeyError> {
        Self::new(key_type.generate()?)
    }

    /// The key in PEM (PKCS #8), unencrypted: write it only to a file that only its owner can read.
    ///
    /// # Errors
    /// [`KeyError::Openssl`] when OpenSSL fails.
    pub fn to_pem(&self) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        Ok(Zeroizing::new(self.key.private_key_to_pem_pkcs8()?))
    }

    /// The key in PEM (PKCS #8), encrypted with AES-256 under a passphrase. Its protection is the length of the passphrase.
    ///
    /// # Errors
    /// [`KeyError::Openssl`] when OpenSSL fails.
    pub fn to_encrypted_pem(&self, passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let pem = self.key.private_key_to_pem_pkcs8_passphrase(Cipher::aes_256_cbc(), passphrase)?;
        Ok(Zeroizing::new(pem))
    }

    /// Parses a key in PEM. An encrypted key is refused when no passphrase is given: OpenSSL never prompts for one.
    ///
    /// # Errors
    /// [`KeyError`] when the key cannot be used.
    pub fn from_pem(pem: &[u8], passphrase: Option<&[u8]>) -> Result<Self, KeyError> {
        let contains = |marker: &[u8]| pem.windows(marker.len()).any(|part| part == marker);
        let is_encrypted = contains(b"-----BEGIN ENCRYPTED PRIVATE KEY-----") || contains(b"Proc-Type: 4,ENCRYPTED");
        if passphrase.is_none() && is_encrypted {
            return Err(KeyError::NeedsPassphrase);
        }
        let key = PKey::private_key_from_pem_passphrase(pem, passphrase.unwrap_or_default());
        Self::new(key.map_err(|_| KeyError::Malformed)?)
    }

    /// Reads a key file. Its mode must not allow more than 0600.
    ///
    /// # Errors
    /// [`KeyError`] when the key cannot be used.
    pub fn from_file(path: &Path, passphrase: Option<&[u8]>) -> Result<Self, KeyError> {
        use std::io::Read;
        use std::os::unix::fs::PermissionsExt;
        let unreadable = |source| KeyError::Unreadable { path: path.to_owned(), source };
        if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
            return Err(unreadable(std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a file")));
        }
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o7777;
        if mode & 0o177 != 0 {
            return Err(KeyError::TooOpen { path: path.to_owned(), mode });
        }
        let mut pem = Zeroizing::new(Vec::new());
        file.take(MAX_FILE_BYTES).read_to_end(&mut pem).map_err(unreadable)?;
        Self::from_pem(&pem, passphrase)
    }

    /// The size of its modulus or field, in bits.
    pub fn bits(&self) -> u32 {
        self.key.bits()
    }

    /// The algorithms of the key.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// The key as OpenSSL holds it.
    pub(crate) fn pkey(&self) -> &PKeyRef<Private> {
        &self.key
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({:?})", self.suite)
    }
}

/// A node's certificate, its private key, and the intermediate certificates between it and its CA.
///
/// ```
/// use nanite::certs::{CertificateAuthority, Credentials, KeyType, PrivateKey};
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let now = SystemClock.now();
/// # let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// let issued = ca.issue(&Identity::agent("fred")?, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
/// let (certificate, key) = (issued.certificate().clone(), issued.key().clone());
/// assert!(Credentials::new(certificate.clone(), key).is_ok());
/// assert!(Credentials::new(certificate, PrivateKey::generate(KeyType::P256)?).is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Credentials {
    certificate: Arc<Certificate>,
    key: PrivateKey,
    intermediates: Vec<Vec<u8>>,
}

impl Credentials {
    /// Credentials from a certificate and its key.
    ///
    /// # Errors
    /// [`KeyError::Mismatch`] when the certificate belongs to another key.
    pub fn new(certificate: Arc<Certificate>, key: PrivateKey) -> Result<Self, KeyError> {
        if !certificate.public_key().public_eq(key.pkey()) {
            return Err(KeyError::Mismatch(certificate.identity().to_string()));
        }
        Ok(Self { certificate, key, intermediates: Vec::new() })
    }

    /// Adds the intermediate certificates between this one and its CA, in DER. They are sent to peers that learn certificates.
    #[must_use]
    pub fn with_intermediates(mut self, intermediates: Vec<Vec<u8>>) -> Self {
        self.intermediates = intermediates;
        self
    }

    /// The certificate.
    pub fn certificate(&self) -> &Arc<Certificate> {
        &self.certificate
    }

    /// The key.
    pub fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// The intermediate certificates between this one and its CA, in DER.
    pub fn intermediates(&self) -> &[Vec<u8>] {
        &self.intermediates
    }
}
