//! Shared by the `nanite certs` commands: arguments, the CA with its key, and reading and writing files.

use std::cmp::Reverse;
use std::io::{Error, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use zeroize::Zeroizing;

use crate::certs::{
    Certificate, CertificateAuthority, CertificateDirectory, Content, DirectoryError, IssueError, KeyError, PrivateKey,
    files,
};
use crate::cli::args::CaPassphrase;
use crate::cli::error::{CliError, Exit, Result};
use crate::cli::{node, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Role};

const MAX_FILE_BYTES: u64 = 64 * 1024 * 1024;

#[derive(Debug, Args)]
pub(super) struct DirectoryArgs {
    /// The directory of certificates and keys.
    #[arg(long, value_name = "DIR", env = "NANITE_CERTS")]
    dir: PathBuf,
}

impl DirectoryArgs {
    pub(super) fn open(&self) -> CertificateDirectory {
        CertificateDirectory::new(&self.dir)
    }
}

#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    /// Agents do the work, mappers dispatch it.
    role: Role,
    /// Its name: 1 to 64 letters, digits, '-' and '_'.
    name: String,
}

impl NodeArgs {
    pub(super) fn identity(&self) -> Result<Identity> {
        node::named(self.role, &self.name)
    }
}

impl From<IssueError> for CliError {
    fn from(error: IssueError) -> Self {
        remedy::issue(&error)
    }
}

/// The paths of a node's certificate and key.
pub(super) fn node_paths(directory: &CertificateDirectory, node: &Identity) -> Result<(PathBuf, PathBuf)> {
    let paths = directory.certificate_path(node).and_then(|path| Ok((path, directory.key_path(node)?)));
    paths.map_err(|error| remedy::directory(&error, directory))
}

/// The certificates of a node, newest first.
pub(super) fn node_certificates(directory: &CertificateDirectory, node: &Identity) -> Result<Vec<Arc<Certificate>>> {
    let failed = |error| remedy::directory(&error, directory);
    let (path, _) = node_paths(directory, node)?;
    if !path.exists() {
        return Err(failed(DirectoryError::NoCertificate { identity: node.clone(), path }));
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Content::Node(_, file) = directory.read_file(name).map_err(failed)? else { return Ok(Vec::new()) };
    let mut certificates = file.certificates;
    certificates.sort_by_key(|certificate| Reverse(certificate.not_before()));
    Ok(certificates)
}

/// A certificate directory and its CA, with the key.
pub(super) struct Issuer {
    pub directory: CertificateDirectory,
    pub ca: CertificateAuthority,
    pub now: Timestamp,
}

impl Issuer {
    pub(super) fn load(directory: CertificateDirectory, passphrase: &CaPassphrase) -> Result<Self> {
        // For its more precise errors: the same file is parsed below.
        directory.trust().map_err(|error| remedy::directory(&error, &directory))?;
        let (path, key_path, now) = (directory.ca_path(), directory.ca_key_path(), SystemClock.now());
        let key = PrivateKey::from_file(&key_path, secret(&passphrase.read()?)).map_err(|error| match &error {
            KeyError::Unreadable { source, .. } if source.kind() == ErrorKind::NotFound => {
                CliError::new(Exit::Security, format!("there is no CA key: no file {}", key_path.display())).help(
                    "issue certificates on the machine with the CA key; \
                     from here, create a request with `nanite certs csr` and have it signed there",
                )
            }
            _ => key_error(&format!("the CA key {}", key_path.display()), &key_path, &error),
        })?;
        let ca = CertificateAuthority::from_pem(&read(&path)?, key, None).map_err(|error| match error {
            IssueError::Key(KeyError::Mismatch(_)) => {
                CliError::new(Exit::Security, format!("{} is not the key of {}", key_path.display(), path.display()))
                    .help("use the two files of one CA")
            }
            error => CliError::from(error).context(path.display()),
        })?;
        ca.check_valid(now).map_err(|error| CliError::from(error).context(path.display()))?;
        Ok(Self { directory, ca, now })
    }
}

/// Why a key file cannot be used; `name` is left out where the error names the file.
pub(super) fn key_error(name: &str, path: &Path, error: &KeyError) -> CliError {
    let failure = CliError::of(Exit::Security, error);
    let failure = match error {
        KeyError::Unreadable { .. } | KeyError::TooOpen { .. } => failure,
        _ => failure.context(name),
    };
    remedy::key(failure, path, error)
}

/// Reads a file, or stdin for `-`.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(MAX_FILE_BYTES).read_to_end(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut text))
    };
    read.map(|_| text).map_err(|error| {
        CliError::of(Exit::Security, &error)
            .context(format!("cannot read {}", path.display()))
            .help("check the path and its permissions")
    })
}

/// Writes a file that everyone may read. Without `replace`, an existing file is an error.
pub(super) fn write(path: &Path, content: &[u8], replace: bool) -> Result<()> {
    write_with_mode(path, content, files::PUBLIC, replace)
}

/// Writes a key for its owner only, encrypted if there is a passphrase.
pub(super) fn write_key(
    path: &Path,
    key: &PrivateKey,
    passphrase: &Option<Zeroizing<Vec<u8>>>,
    replace: bool,
) -> Result<()> {
    let pem = secret(passphrase).map_or_else(|| key.to_pem(), |passphrase| key.to_encrypted_pem(passphrase));
    write_with_mode(path, &pem.map_err(IssueError::Key)?, files::SECRET, replace)
}

fn write_with_mode(path: &Path, content: &[u8], mode: u32, replace: bool) -> Result<()> {
    files::write(path, content, mode, replace).map_err(|error| cannot_write(path, &error))
}

pub(super) fn cannot_write(path: &Path, error: &Error) -> CliError {
    if error.kind() == ErrorKind::AlreadyExists {
        return CliError::new(Exit::Security, format!("{} exists and was not replaced", path.display()))
            .help("replace it with `--force`, or use another directory");
    }
    CliError::of(Exit::Failure, error)
        .context(format!("cannot write {}", path.display()))
        .help("check the path, its permissions and the free space")
}

pub(super) fn secret(passphrase: &Option<Zeroizing<Vec<u8>>>) -> Option<&[u8]> {
    passphrase.as_deref().map(Vec::as_slice)
}
