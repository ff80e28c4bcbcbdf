//! A node's private key, and the pair of certificate and key.

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

use super::{Certificate, Suite};

/// The longest key file that is read, in bytes.
const MAX: u64 = 64 * 1024;

/// The keys that can be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KeyType {
    /// The curve P-256: small and fast.
    #[default]
    P256,
    /// RSA of 2,048 bits, for infrastructures that need it.
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

/// A private key. It is held by OpenSSL, which clears it when it is dropped; nothing prints it.
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
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Others than the owner can read or write the file.
    #[error("the key {path} has mode {mode:04o}: others than its owner can use it")]
    TooOpen {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The key is under a passphrase, and none was given.
    #[error("the key is under a passphrase, and none was given")]
    NeedsPassphrase,
    /// No private key, or the wrong passphrase.
    #[error("no private key, or the wrong passphrase")]
    Malformed,
    /// The key is of another type or size.
    #[error("the key is neither P-256 nor RSA of 2048 to 8192 bits")]
    KeyType,
    /// OpenSSL could not make or write a key.
    #[error("OpenSSL cannot make the key")]
    Openssl(#[from] ErrorStack),
    /// The certificate is not this key's.
    #[error("the certificate of {0} does not belong to this key")]
    Mismatch(String),
}

impl PrivateKey {
    /// Takes a key that OpenSSL holds.
    ///
    /// # Errors
    /// [`KeyError::KeyType`] when there is no suite for it.
    pub fn new(key: PKey<Private>) -> Result<Self, KeyError> {
        let suite = Suite::of(&key).ok_or(KeyError::KeyType)?;
        Ok(Self { key, suite })
    }

    /// Makes a new key. An RSA key uses the CPU for up to some seconds.
    ///
    /// # Errors
    /// [`KeyError::Openssl`] when OpenSSL cannot.
    pub fn generate(key_type: KeyType) -> Result<Self, KeyError> {
        Self::new(key_type.generate()?)
    }

    /// The key in PEM (PKCS #8), without a passphrase: for a file that only its owner can read.
    ///
    /// # Errors
    /// [`KeyError::Openssl`] when OpenSSL cannot.
    pub fn to_pem(&self) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        Ok(Zeroizing::new(self.key.private_key_to_pem_pkcs8()?))
    }

    /// The key in PEM (PKCS #8), encrypted under this passphrase by AES-256. What protects it is the length of the passphrase.
    ///
    /// # Errors
    /// [`KeyError::Openssl`] when OpenSSL cannot.
    pub fn to_encrypted_pem(&self, passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let pem = self.key.private_key_to_pem_pkcs8_passphrase(Cipher::aes_256_cbc(), passphrase)?;
        Ok(Zeroizing::new(pem))
    }

    /// Reads a key in PEM, without or with a passphrase. A key under a passphrase is refused when none is given: nothing asks
    /// on a terminal.
    ///
    /// # Errors
    /// [`KeyError`] says why it cannot be used.
    pub fn from_pem(pem: &[u8], passphrase: Option<&[u8]>) -> Result<Self, KeyError> {
        let encrypted = |mark: &[u8]| pem.windows(mark.len()).any(|part| part == mark);
        let is_encrypted = encrypted(b"-----BEGIN ENCRYPTED PRIVATE KEY-----") || encrypted(b"Proc-Type: 4,ENCRYPTED");
        if passphrase.is_none() && is_encrypted {
            return Err(KeyError::NeedsPassphrase);
        }
        let key = PKey::private_key_from_pem_passphrase(pem, passphrase.unwrap_or_default());
        Self::new(key.map_err(|_| KeyError::Malformed)?)
    }

    /// Reads a key file, which only its owner may read: modes wider than 0600 are refused.
    ///
    /// # Errors
    /// [`KeyError`] says why it cannot be used.
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
        file.take(MAX).read_to_end(&mut pem).map_err(unreadable)?;
        Self::from_pem(&pem, passphrase)
    }

    /// The size of its modulus or field.
    pub fn bits(&self) -> u32 {
        self.key.bits()
    }

    /// The suite that goes with it.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// The key, for cryptography inside the crate.
    pub(crate) fn pkey(&self) -> &PKeyRef<Private> {
        &self.key
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({:?})", self.suite)
    }
}

/// A node's certificate with its private key, and the certificates between it and its CA.
#[derive(Clone, Debug)]
pub struct Credentials {
    certificate: Arc<Certificate>,
    key: PrivateKey,
    intermediates: Vec<Vec<u8>>,
}

impl Credentials {
    /// Joins a certificate and its key.
    ///
    /// # Errors
    /// [`KeyError::Mismatch`] when they do not belong together.
    pub fn new(certificate: Arc<Certificate>, key: PrivateKey) -> Result<Self, KeyError> {
        if !certificate.public_key().public_eq(key.pkey()) {
            return Err(KeyError::Mismatch(certificate.identity().to_string()));
        }
        Ok(Self { certificate, key, intermediates: Vec::new() })
    }

    /// With the DER of the certificates between this one and its CA, to be sent along where peers learn certificates.
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

    /// The DER of the certificates between this one and its CA.
    pub fn intermediates(&self) -> &[Vec<u8>] {
        &self.intermediates
    }
}
