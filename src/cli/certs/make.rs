//! `nanite certs init`, `issue`, `csr` and `sign`: what makes files.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::{Node, Place};
use crate::certs::files::{self, PUBLIC, SECRET};
use crate::certs::{
    CertificateAuthority, CertificateDirectory, CertificateRequest, IssueError, KeyError, KeyType, PrivateKey,
};
use crate::cli::args::{self, CaPassphrase, Passphrase};
use crate::cli::error::{CliError, Exit};
use crate::cli::{output, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};

/// The trust domain when none is given: a name that no one can own (ICANN, 2024).
const DOMAIN: &str = "nanite.internal";

#[derive(Debug, Args)]
pub(in crate::cli) struct Init {
    #[command(flatten)]
    place: Place,
    /// The trust domain that stands in every certificate.
    #[arg(long, value_name = "DOMAIN", default_value = DOMAIN)]
    domain: String,
    /// The type of the CA's key.
    #[arg(long, value_name = "TYPE", default_value_t)]
    key_type: KeyType,
    /// How long the CA is valid.
    #[arg(long, value_name = "TIME", default_value = "3652d", value_parser = args::duration)]
    valid_for: Duration,
    #[command(flatten)]
    passphrase: CaPassphrase,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Issue {
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    place: Place,
    /// The type of its key.
    #[arg(long, value_name = "TYPE", default_value_t)]
    key_type: KeyType,
    /// How long the certificate is valid.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = args::duration)]
    valid_for: Duration,
    #[command(flatten)]
    ca: CaPassphrase,
    #[command(flatten)]
    passphrase: Passphrase,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Csr {
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    place: Place,
    /// The type of its key.
    #[arg(long, value_name = "TYPE", default_value_t)]
    key_type: KeyType,
    #[command(flatten)]
    passphrase: Passphrase,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Sign {
    #[command(flatten)]
    node: Node,
    /// The signing request, or - for stdin. Only its key is taken from it: whose certificate it becomes is what you say.
    #[arg(value_name = "REQUEST")]
    request: PathBuf,
    #[command(flatten)]
    place: Place,
    /// How long the certificate is valid.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = args::duration)]
    valid_for: Duration,
    #[command(flatten)]
    ca: CaPassphrase,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
struct How {
    /// Replace files that are there.
    #[arg(long)]
    force: bool,
    /// Say what was made as JSON.
    #[arg(long)]
    json: bool,
}

/// What was made.
#[derive(Serialize)]
struct Made {
    /// For whom.
    #[serde(skip)]
    title: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<String>,
}

impl Init {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let directory = self.place.directory();
        let (certificate, key) = (directory.ca_path(), directory.ca_key_path());
        self.how.check_free(&[&certificate, &key])?;
        let now = SystemClock.now();
        let ca = CertificateAuthority::create(&self.domain, self.key_type, self.valid_for, now)
            .map_err(|error| remedy::issue(&error))?;
        let pem = ca.certificate().to_pem().map_err(|error| remedy::issue(&IssueError::Openssl(error)))?;
        self.how.write_pair(
            &directory,
            (&key, &secret(ca.key(), bytes(&self.passphrase.read()?))?),
            (&certificate, &pem),
        )?;
        self.how.say(&Made {
            title: format!("CA of {}", ca.domain()),
            identity: None,
            domain: Some(ca.domain().to_owned()),
            certificate: Some(certificate),
            key: Some(key),
            request: None,
            expires: Some(ca.not_after().to_string()),
        })
    }
}

impl Issue {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let (directory, identity) = (self.place.directory(), self.node.identity()?);
        let failed = |error| remedy::directory(&error, &directory);
        let certificate = directory.certificate_path(&identity).map_err(failed)?;
        let key = directory.key_path(&identity).map_err(failed)?;
        self.how.check_free(&[&certificate, &key])?;
        let now = SystemClock.now();
        let ca = authority(&directory, &self.ca, now)?;
        let issued = ca.issue(&identity, self.key_type, self.valid_for, now).map_err(|error| remedy::issue(&error))?;
        let pem = issued.certificate().to_pem();
        self.how.write_pair(
            &directory,
            (&key, &secret(issued.key(), bytes(&self.passphrase.read()?))?),
            (&certificate, &pem),
        )?;
        self.how.say(&Made {
            title: identity.to_string(),
            identity: Some(identity.to_string()),
            domain: None,
            certificate: Some(certificate),
            key: Some(key),
            request: None,
            expires: Some(issued.certificate().not_after().to_string()),
        })
    }
}

impl Csr {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let (directory, identity) = (self.place.directory(), self.node.identity()?);
        let failed = |error| remedy::directory(&error, &directory);
        let key_path = directory.key_path(&identity).map_err(failed)?;
        let path = directory.certificate_path(&identity).map_err(failed)?.with_extension("csr");
        self.how.check_free(&[&path, &key_path])?;
        let key = PrivateKey::generate(self.key_type).map_err(|error| remedy::issue(&IssueError::Key(error)))?;
        let request = CertificateRequest::new(&identity, &key).and_then(|request| request.to_pem());
        let request = request.map_err(|error| remedy::issue(&error))?;
        self.how.write_pair(
            &directory,
            (&key_path, &secret(&key, bytes(&self.passphrase.read()?))?),
            (&path, &request),
        )?;
        self.how.say(&Made {
            title: format!("request of {identity}"),
            identity: Some(identity.to_string()),
            domain: None,
            certificate: None,
            key: Some(key_path),
            request: Some(path),
            expires: None,
        })
    }
}

impl Sign {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let (directory, identity) = (self.place.directory(), self.node.identity()?);
        let path = directory.certificate_path(&identity).map_err(|error| remedy::directory(&error, &directory))?;
        self.how.check_free(&[&path])?;
        let request = CertificateRequest::from_pem(&read(&self.request)?)
            .map_err(|error| remedy::issue(&error).context(self.request.display()))?;
        let now = SystemClock.now();
        let ca = authority(&directory, &self.ca, now)?;
        let issued = ca.sign(&request, &identity, self.valid_for, now).map_err(|error| remedy::issue(&error))?;
        self.how.write(&path, &issued.to_pem(), PUBLIC)?;
        self.how.say(&Made {
            title: identity.to_string(),
            identity: Some(identity.to_string()),
            domain: None,
            certificate: Some(path),
            key: None,
            request: None,
            expires: Some(issued.not_after().to_string()),
        })
    }
}

impl How {
    /// Stops before anything is made when something would be replaced.
    fn check_free(&self, paths: &[&Path]) -> Result<(), CliError> {
        match paths.iter().find(|path| !self.force && std::fs::symlink_metadata(path).is_ok()) {
            Some(path) => Err(taken(path)),
            None => Ok(()),
        }
    }

    /// Writes a key and what belongs to it; when the second fails, the first is not left alone.
    fn write_pair(
        &self,
        directory: &CertificateDirectory,
        (key_path, key): (&Path, &[u8]),
        (path, content): (&Path, &[u8]),
    ) -> Result<(), CliError> {
        files::create_directory(directory.path()).map_err(|error| cannot_write(directory.path(), &error))?;
        self.write(key_path, key, SECRET)?;
        self.write(path, content, PUBLIC).inspect_err(|_| {
            if !self.force {
                let _ = std::fs::remove_file(key_path);
            }
        })
    }

    fn write(&self, path: &Path, content: &[u8], mode: u32) -> Result<(), CliError> {
        files::write(path, content, mode, self.force).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => taken(path),
            _ => cannot_write(path, &error),
        })
    }

    fn say(&self, made: &Made) -> Result<Exit, CliError> {
        if self.json {
            output::json(made)?;
            return Ok(Exit::Success);
        }
        let until = made.expires.as_ref().map(|at| format!(", valid until {at}")).unwrap_or_default();
        output::line(&format!("{}{until}", output::stdout_paint().bold(&made.title)))?;
        for (label, path) in [("certificate", &made.certificate), ("key", &made.key), ("request", &made.request)] {
            if let Some(path) = path {
                output::line(&format!("  {label:<11}  {}", path.display()))?;
            }
        }
        Ok(Exit::Success)
    }
}

/// The CA of a directory, with its key.
pub(super) fn authority(
    directory: &CertificateDirectory,
    passphrase: &CaPassphrase,
    now: Timestamp,
) -> Result<CertificateAuthority, CliError> {
    // For its errors: the same file is read below.
    directory.trust().map_err(|error| remedy::directory(&error, directory))?;
    let (path, key_path) = (directory.ca_path(), directory.ca_key_path());
    let key = PrivateKey::from_file(&key_path, bytes(&passphrase.read()?)).map_err(|error| {
        let failure = CliError::of(Exit::Security, &error);
        match error {
            KeyError::Unreadable { ref source, .. } if source.kind() == ErrorKind::NotFound => {
                CliError::new(Exit::Security, format!("there is no CA key: no file {}", key_path.display())).help(
                    "certificates are issued where the CA's key is; \
                     from here, make a request with `nanite certs csr` and have it signed there",
                )
            }
            error => remedy::key(failure.context(format!("the CA key {}", key_path.display())), &key_path, &error),
        }
    })?;
    let ca = CertificateAuthority::from_pem(&read(&path)?, key, None);
    let ca = ca.map_err(|error| match error {
        IssueError::Key(KeyError::Mismatch(_)) => {
            CliError::new(Exit::Security, format!("{} is not the key of {}", key_path.display(), path.display()))
                .help("put the two files of one CA together")
        }
        error => remedy::issue(&error).context(path.display()),
    })?;
    ca.check_valid(now).map_err(|error| remedy::issue(&error).context(path.display()))?;
    Ok(ca)
}

/// A file that is no longer than a megabyte, or stdin.
fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    const MAX: u64 = 1024 * 1024;
    let mut text = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(MAX).read_to_end(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX).read_to_end(&mut text))
    };
    read.map_err(|error| {
        CliError::of(Exit::Security, &error)
            .context(format!("cannot read {}", path.display()))
            .help("check the path, and who may read it")
    })?;
    Ok(text)
}

/// A key as it is written: under a passphrase where there is one.
pub(super) fn secret(key: &PrivateKey, passphrase: Option<&[u8]>) -> Result<zeroize::Zeroizing<Vec<u8>>, CliError> {
    let pem = match passphrase {
        Some(passphrase) => key.to_encrypted_pem(passphrase),
        None => key.to_pem(),
    };
    pem.map_err(|error| remedy::issue(&IssueError::Key(error)))
}

/// The bytes of a passphrase, where there is one.
pub(super) fn bytes(passphrase: &Option<zeroize::Zeroizing<Vec<u8>>>) -> Option<&[u8]> {
    passphrase.as_ref().map(|passphrase| passphrase.as_slice())
}

fn taken(path: &Path) -> CliError {
    CliError::new(Exit::Security, format!("{} exists, and is left as it is", path.display()))
        .help("give `--force` to replace it, or another directory")
}

pub(super) fn cannot_write(path: &Path, error: &std::io::Error) -> CliError {
    CliError::of(Exit::Failure, error)
        .context(format!("cannot write {}", path.display()))
        .help("check the path, who may write there, and that there is space")
}
