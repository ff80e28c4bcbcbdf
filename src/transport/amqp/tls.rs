//! TLS to the broker: the CA that is trusted for it, and the client's own certificate.
//!
//! The connector is made here and not by lapin, which would always trust the system's CAs as well.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{SslConnector, SslMethod, SslVerifyMode, SslVersion};
use openssl::x509::X509;
use openssl::x509::store::X509StoreBuilder;
use parking_lot::Mutex;
use zeroize::Zeroizing;

use crate::transport::TransportError;

/// How much of a certificate or key file is read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// The certificates for TLS 1.2 or 1.3 to a broker.
///
/// The broker's certificate must be issued by one of the given CAs, for the host name or address in the URL. The system's CAs are not
/// trusted. The files are read for each connection, so that renewed certificates are used without a restart.
///
/// ```
/// use nanite::transport::{AmqpOptions, Tls};
///
/// # fn main() -> Result<(), nanite::transport::TransportError> {
/// let tls = Tls::new("broker-ca.pem").client_certificate("fred.pem", "fred-key.pem");
/// let options = AmqpOptions::new("amqps://broker.example.org")?.tls(tls);
/// assert!(options.uses_tls());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Tls {
    ca: PathBuf,
    /// The files of the certificate and the key.
    client: Option<(PathBuf, PathBuf)>,
}

impl Tls {
    /// Trusts the CA certificates in this PEM file.
    pub fn new(ca: impl Into<PathBuf>) -> Self {
        Self { ca: ca.into(), client: None }
    }

    /// The client's certificate and private key, in PEM files. The certificate may be followed by others of its chain. The key must
    /// be accessible only to its owner, and have no passphrase.
    ///
    /// If the URL has no user, the broker is asked to take the user from the certificate (SASL EXTERNAL), and no password is sent.
    #[must_use]
    pub fn client_certificate(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.client = Some((certificate.into(), key.into()));
        self
    }

    pub(super) fn has_client_certificate(&self) -> bool {
        self.client.is_some()
    }

    /// Reads the files. Blocks.
    pub(super) fn connector(&self) -> Result<TlsConnector, TransportError> {
        let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(tls_error)?;
        let mut roots = X509StoreBuilder::new().map_err(tls_error)?;
        for certificate in read_certificates(&self.ca)? {
            roots.add_cert(certificate).map_err(tls_error)?;
        }
        // Replaces the store with the system's CAs.
        builder.set_cert_store(roots.build());
        builder.set_min_proto_version(Some(SslVersion::TLS1_2)).map_err(tls_error)?;
        let refusal = CertificateRefusal::default();
        let noted = refusal.clone();
        builder.set_verify_callback(SslVerifyMode::PEER, move |good, context| {
            if !good {
                noted.note(context.error().error_string());
            }
            good
        });
        if let Some((certificate, key)) = &self.client {
            let unusable = |path: &Path| {
                let path = path.to_owned();
                move |error: ErrorStack| TransportError::TlsFile { path, reason: reason(&error) }
            };
            let mut chain = read_certificates(certificate)?.into_iter();
            if let Some(leaf) = chain.next() {
                builder.set_certificate(&leaf).map_err(unusable(certificate))?;
            }
            for issuer in chain {
                builder.add_extra_chain_cert(issuer).map_err(unusable(certificate))?;
            }
            let private_key = read_private_key(key)?;
            builder.set_private_key(&private_key).map_err(unusable(key))?;
            builder.check_private_key().map_err(unusable(key))?;
        }
        Ok(TlsConnector { ssl: builder.build(), refusal })
    }
}

/// Secures one TCP connection.
pub(super) struct TlsConnector {
    ssl: SslConnector,
    refusal: CertificateRefusal,
}

impl TlsConnector {
    /// Why the broker's certificate will have been refused, if it is.
    pub(super) fn refusal(&self) -> CertificateRefusal {
        self.refusal.clone()
    }

    pub(super) fn ssl(&self) -> &SslConnector {
        &self.ssl
    }
}

impl fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConnector").finish_non_exhaustive()
    }
}

/// Why the broker's certificate was refused.
#[derive(Clone, Debug, Default)]
pub(super) struct CertificateRefusal(Arc<Mutex<Option<&'static str>>>);

impl CertificateRefusal {
    fn note(&self, reason: &'static str) {
        self.0.lock().get_or_insert(reason);
    }

    /// The error, if the certificate was refused.
    pub(super) fn error(&self) -> Option<TransportError> {
        let reason = *self.0.lock();
        reason.map(|reason| TransportError::Tls(format!("its certificate is refused: {reason}")))
    }
}

/// The TLS failure behind an error of a stream, if there is one.
pub(super) fn handshake_error(error: &std::io::Error) -> Option<TransportError> {
    let error = error.get_ref()?;
    let stack = match error.downcast_ref::<openssl::ssl::Error>() {
        Some(error) => error.ssl_error()?,
        None => error.downcast_ref::<ErrorStack>()?,
    };
    let reason = reason(stack);
    // OpenSSL's texts for TLS alerts of the peer contain this word.
    let context = if reason.contains("alert") { "the broker says" } else { "the handshake failed" };
    Some(TransportError::Tls(format!("{context}: {reason}")))
}

fn tls_error(error: ErrorStack) -> TransportError {
    TransportError::Tls(reason(&error))
}

/// OpenSSL's text for the error, without its source code locations.
fn reason(error: &ErrorStack) -> String {
    error.errors().first().and_then(openssl::error::Error::reason).unwrap_or("no reason given").to_owned()
}

fn read_certificates(path: &Path) -> Result<Vec<X509>, TransportError> {
    let invalid = |reason: &str| TransportError::TlsFile { path: path.to_owned(), reason: reason.to_owned() };
    let pem = read(open(path)?, path)?;
    let certificates =
        X509::stack_from_pem(&pem).map_err(|_| invalid("it contains something other than certificates in PEM"))?;
    if certificates.is_empty() { Err(invalid("it contains no certificate in PEM")) } else { Ok(certificates) }
}

fn read_private_key(path: &Path) -> Result<PKey<Private>, TransportError> {
    let file = open(path)?;
    let mode = file.metadata().map_err(|error| unreadable(path, &error))?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(TransportError::TlsKeyMode { path: path.to_owned(), mode });
    }
    let pem = read(file, path)?;
    // An empty passphrase keeps OpenSSL from asking for one at the terminal.
    PKey::private_key_from_pem_passphrase(&pem, &[]).map_err(|_| TransportError::TlsFile {
        path: path.to_owned(),
        reason: "it contains no private key in PEM, or one with a passphrase".to_owned(),
    })
}

fn open(path: &Path) -> Result<File, TransportError> {
    // Opening a named pipe, for example, could block without limit.
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => File::open(path).map_err(|error| unreadable(path, &error)),
        Ok(_) => Err(TransportError::TlsFile { path: path.to_owned(), reason: "it is not a file".to_owned() }),
        Err(error) => Err(unreadable(path, &error)),
    }
}

fn read(file: File, path: &Path) -> Result<Zeroizing<Vec<u8>>, TransportError> {
    let mut content = Zeroizing::new(Vec::new());
    file.take(MAX_FILE_BYTES).read_to_end(&mut content).map_err(|error| unreadable(path, &error))?;
    Ok(content)
}

fn unreadable(path: &Path, error: &std::io::Error) -> TransportError {
    TransportError::TlsFile { path: path.to_owned(), reason: format!("it cannot be read: {error}") }
}
