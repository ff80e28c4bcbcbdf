//! TLS to the broker: the CA that is trusted for it, and this node's own certificate towards it.
//!
//! The connector is made here and not by the AMQP library: that one's always trusts the system's CAs as well.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{SslConnector, SslMethod, SslVerifyMode, SslVersion};
use openssl::x509::X509;
use openssl::x509::store::X509StoreBuilder;
use zeroize::Zeroizing;

use crate::transport::TransportError;

/// The longest file, in bytes.
const MAX: u64 = 1024 * 1024;

/// How to speak TLS with a broker: TLS 1.2 or 1.3.
///
/// The broker's certificate must lead to one of the given CA certificates and be of the host name or address in the URL. The
/// system's CAs count for nothing. The files are read for each connection, so that renewed ones are used without a restart.
#[derive(Clone, Debug)]
pub struct Tls {
    ca: PathBuf,
    client: Option<(PathBuf, PathBuf)>,
}

impl Tls {
    /// Trusts the CA certificates in this file, in PEM.
    pub fn new(ca: impl Into<PathBuf>) -> Self {
        Self { ca: ca.into(), client: None }
    }

    /// Shows the broker a certificate: files in PEM, of a certificate (others of its chain may follow it) and of its private key,
    /// which only its owner may read and which has no passphrase.
    ///
    /// Where the URL names no user, the broker is asked to take the user from the certificate (SASL EXTERNAL), and no password is
    /// sent.
    #[must_use]
    pub fn client(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.client = Some((certificate.into(), key.into()));
        self
    }

    pub(super) fn has_client(&self) -> bool {
        self.client.is_some()
    }

    /// Reads the files. Blocks.
    pub(super) fn connector(&self) -> Result<Connector, TransportError> {
        let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(failed)?;
        let mut roots = X509StoreBuilder::new().map_err(failed)?;
        for certificate in certificates(&self.ca)? {
            roots.add_cert(certificate).map_err(failed)?;
        }
        // In place of the one with the system's CAs.
        builder.set_cert_store(roots.build());
        builder.set_min_proto_version(Some(SslVersion::TLS1_2)).map_err(failed)?;
        let fault = Fault::default();
        let noted = fault.clone();
        builder.set_verify_callback(SslVerifyMode::PEER, move |good, context| {
            if !good {
                noted.note(context.error().error_string());
            }
            good
        });
        if let Some((certificate, key)) = &self.client {
            let unusable = |path: &Path| {
                let path = path.to_owned();
                move |error: ErrorStack| TransportError::TlsFile { path, why: reason(&error) }
            };
            let mut chain = certificates(certificate)?.into_iter();
            if let Some(leaf) = chain.next() {
                builder.set_certificate(&leaf).map_err(unusable(certificate))?;
            }
            for other in chain {
                builder.add_extra_chain_cert(other).map_err(unusable(certificate))?;
            }
            let own = private_key(key)?;
            builder.set_private_key(&own).map_err(unusable(key))?;
            builder.check_private_key().map_err(unusable(key))?;
        }
        Ok(Connector { ssl: builder.build(), fault })
    }
}

/// What makes TLS of a TCP connection, once.
pub(super) struct Connector {
    ssl: SslConnector,
    fault: Fault,
}

impl Connector {
    /// What will be wrong with the broker's certificate, if anything is.
    pub(super) fn fault(&self) -> Fault {
        self.fault.clone()
    }

    /// For the stream that shakes hands.
    pub(super) fn ssl(&self) -> &SslConnector {
        &self.ssl
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").finish_non_exhaustive()
    }
}

/// Why the broker's certificate was refused.
#[derive(Clone, Debug, Default)]
pub(super) struct Fault(Arc<Mutex<Option<&'static str>>>);

impl Fault {
    fn note(&self, why: &'static str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }

    /// The refusal, if there was one.
    pub(super) fn error(&self) -> Option<TransportError> {
        let why = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        why.map(|why| TransportError::Tls(format!("its certificate is refused here: {why}")))
    }
}

/// The failure of TLS that stands behind an error of a stream, if one does.
pub(super) fn of_stream(error: &std::io::Error) -> Option<TransportError> {
    let error = error.get_ref()?;
    let stack = match error.downcast_ref::<openssl::ssl::Error>() {
        Some(error) => error.ssl_error()?,
        None => error.downcast_ref::<ErrorStack>()?,
    };
    let why = reason(stack);
    // Its words for what the other side has said.
    let who = if why.contains("alert") { "the broker says" } else { "the handshake failed" };
    Some(TransportError::Tls(format!("{who}: {why}")))
}

fn failed(error: ErrorStack) -> TransportError {
    TransportError::Tls(reason(&error))
}

/// OpenSSL's words for what went wrong, without places in its source.
fn reason(error: &ErrorStack) -> String {
    error.errors().first().and_then(openssl::error::Error::reason).unwrap_or("no reason given").to_owned()
}

fn certificates(path: &Path) -> Result<Vec<X509>, TransportError> {
    let wrong = |why: &str| TransportError::TlsFile { path: path.to_owned(), why: why.to_owned() };
    let pem = read(open(path)?, path)?;
    let certificates =
        X509::stack_from_pem(&pem).map_err(|_| wrong("it holds something else than certificates in PEM"))?;
    if certificates.is_empty() { Err(wrong("it holds no certificate in PEM")) } else { Ok(certificates) }
}

fn private_key(path: &Path) -> Result<PKey<Private>, TransportError> {
    let file = open(path)?;
    let mode = file.metadata().map_err(|error| unreadable(path, &error))?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(TransportError::TlsKeyMode { path: path.to_owned(), mode });
    }
    let pem = read(file, path)?;
    // With an empty passphrase, so that OpenSSL does not ask at the terminal for another.
    PKey::private_key_from_pem_passphrase(&pem, &[]).map_err(|_| TransportError::TlsFile {
        path: path.to_owned(),
        why: "it holds no private key in PEM, or one with a passphrase".to_owned(),
    })
}

fn open(path: &Path) -> Result<File, TransportError> {
    // Opening anything else, a named pipe for one, could wait for ever.
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => File::open(path).map_err(|error| unreadable(path, &error)),
        Ok(_) => Err(TransportError::TlsFile { path: path.to_owned(), why: "it is not a file".to_owned() }),
        Err(error) => Err(unreadable(path, &error)),
    }
}

fn read(file: File, path: &Path) -> Result<Zeroizing<Vec<u8>>, TransportError> {
    let mut content = Zeroizing::new(Vec::new());
    file.take(MAX).read_to_end(&mut content).map_err(|error| unreadable(path, &error))?;
    Ok(content)
}

fn unreadable(path: &Path, error: &std::io::Error) -> TransportError {
    TransportError::TlsFile { path: path.to_owned(), why: format!("it cannot be read: {error}") }
}
