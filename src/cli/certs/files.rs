//! Shared by the `nanite certs` commands: the directory and node arguments, the CA with its key, and reading and writing files.

use std::io::{Error, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use zeroize::Zeroizing;

use crate::certs::files;
use crate::certs::{
    Certificate, CertificateAuthority, CertificateDirectory, Content, DirectoryError, IssueError, KeyError, PrivateKey,
};
use crate::cli::error::{CliError, Exit};
use crate::cli::passphrase::CaArgs;
use crate::cli::{node, remedy};
use crate::clock::Timestamp;
use crate::packet::{Identity, Role};

/// The longest certificate or signing request that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

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
    pub(super) fn identity(&self) -> Result<Identity, CliError> {
        node::identity(self.role, &self.name)
    }
}

/// The files of a node: its certificate and its key.
pub(super) fn node_paths(
    directory: &CertificateDirectory,
    identity: &Identity,
) -> Result<(PathBuf, PathBuf), CliError> {
    let paths = directory.certificate_path(identity).and_then(|path| Ok((path, directory.key_path(identity)?)));
    paths.map_err(|error| remedy::directory(&error, directory))
}

/// The certificates of a node, newest first.
pub(super) fn node_certificates(
    directory: &CertificateDirectory,
    identity: &Identity,
) -> Result<Vec<Arc<Certificate>>, CliError> {
    let failed = |error| remedy::directory(&error, directory);
    let path = directory.certificate_path(identity).map_err(failed)?;
    if !path.exists() {
        return Err(failed(DirectoryError::NoCertificate { identity: identity.clone(), path }));
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Content::Node(_, file) = directory.read_file(name).map_err(failed)? else { return Ok(Vec::new()) };
    let mut certificates = file.nodes;
    certificates.sort_by_key(|certificate| std::cmp::Reverse(certificate.not_before()));
    Ok(certificates)
}

/// The CA of a directory, with its key.
pub(super) fn load_ca(
    directory: &CertificateDirectory,
    passphrase: &CaArgs,
    now: Timestamp,
) -> Result<CertificateAuthority, CliError> {
    // For its more precise errors: the same file is parsed below.
    directory.trust().map_err(|error| remedy::directory(&error, directory))?;
    let (path, key_path) = (directory.ca_path(), directory.ca_key_path());
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
        error => remedy::issue(&error).context(path.display()),
    })?;
    ca.check_valid(now).map_err(|error| remedy::issue(&error).context(path.display()))?;
    Ok(ca)
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
pub(super) fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    let mut text = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(MAX_FILE_BYTES).read_to_end(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut text))
    };
    read.map(|_| text).map_err(|error| cannot_read(path, &error))
}

pub(super) fn cannot_read(path: &Path, error: &Error) -> CliError {
    CliError::of(Exit::Security, error)
        .context(format!("cannot read {}", path.display()))
        .help("check the path and its permissions")
}

/// Writes a file for everyone to read. Without `replace`, an existing file is an error.
pub(super) fn write_public(path: &Path, content: &[u8], replace: bool) -> Result<(), CliError> {
    write(path, content, files::PUBLIC, replace)
}

/// Writes a key for its owner only, encrypted if there is a passphrase.
pub(super) fn write_key(
    path: &Path,
    key: &PrivateKey,
    passphrase: &Option<Zeroizing<Vec<u8>>>,
    replace: bool,
) -> Result<(), CliError> {
    let pem = match passphrase {
        Some(passphrase) => key.to_encrypted_pem(passphrase),
        None => key.to_pem(),
    };
    let pem = pem.map_err(|error| remedy::issue(&IssueError::Key(error)))?;
    write(path, &pem, files::SECRET, replace)
}

fn write(path: &Path, content: &[u8], mode: u32, replace: bool) -> Result<(), CliError> {
    files::write(path, content, mode, replace).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => already_exists(path),
        _ => cannot_write(path, &error),
    })
}

pub(super) fn already_exists(path: &Path) -> CliError {
    CliError::new(Exit::Security, format!("{} exists and was not replaced", path.display()))
        .help("replace it with `--force`, or use another directory")
}

pub(super) fn cannot_write(path: &Path, error: &Error) -> CliError {
    CliError::of(Exit::Failure, error)
        .context(format!("cannot write {}", path.display()))
        .help("check the path, its permissions and the free space")
}

/// The bytes of an optional passphrase.
pub(super) fn secret(passphrase: &Option<Zeroizing<Vec<u8>>>) -> Option<&[u8]> {
    passphrase.as_deref().map(Vec::as_slice)
}
