//! `nanite certs init`, `issue`, `csr` and `sign`: create CAs, certificates and signing requests.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::files::{
    DirectoryArgs, NodeArgs, already_exists, cannot_write, load_ca, node_paths, read, write_key, write_public,
};
use crate::certs::files::create_directory;
use crate::certs::{CertificateAuthority, CertificateRequest, IssueError, KeyType, PrivateKey};
use crate::cli::error::{CliError, Exit};
use crate::cli::passphrase::{self, CaArgs};
use crate::cli::{duration, output, remedy};
use crate::clock::{Clock, SystemClock};

/// The default trust domain: ICANN reserved `.internal` for private use in 2024.
const DEFAULT_DOMAIN: &str = "nanite.internal";

#[derive(Debug, Args)]
pub(in crate::cli) struct Init {
    #[command(flatten)]
    directory: DirectoryArgs,
    /// The trust domain, written into every certificate.
    #[arg(long, value_name = "DOMAIN", default_value = DEFAULT_DOMAIN)]
    domain: String,
    /// The type of the CA key.
    #[arg(long, value_name = "TYPE", default_value_t)]
    key_type: KeyType,
    /// How long the CA is valid.
    #[arg(long, value_name = "TIME", default_value = "3652d", value_parser = duration::parse)]
    valid_for: Duration,
    #[command(flatten)]
    passphrase: CaArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Issue {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    key: NewKeyArgs,
    /// How long the certificate is valid.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = duration::parse)]
    valid_for: Duration,
    #[command(flatten)]
    ca: CaArgs,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Csr {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    key: NewKeyArgs,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Sign {
    #[command(flatten)]
    target: Target,
    /// The signing request, or - for stdin. Only its key is used: role and name are those of this command line.
    #[arg(value_name = "REQUEST")]
    request: PathBuf,
    /// How long the certificate is valid.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = duration::parse)]
    valid_for: Duration,
    #[command(flatten)]
    ca: CaArgs,
}

/// Arguments of every command that creates files for a node.
#[derive(Debug, Args)]
struct Target {
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    directory: DirectoryArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct NewKeyArgs {
    /// The type of the new key.
    #[arg(long, value_name = "TYPE", default_value_t)]
    key_type: KeyType,
    #[command(flatten)]
    passphrase: passphrase::Args,
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// Replace existing files.
    #[arg(long)]
    force: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Default, Serialize)]
struct Created {
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
        let directory = self.directory.open();
        let (path, key_path) = (directory.ca_path(), directory.ca_key_path());
        self.output.check_absent(&[&path, &key_path])?;
        let ca = CertificateAuthority::create(&self.domain, self.key_type, self.valid_for, SystemClock.now())
            .map_err(|error| remedy::issue(&error))?;
        let pem = ca.certificate().to_pem().map_err(|error| remedy::issue(&IssueError::Openssl(error)))?;
        self.output.write_pair((&key_path, ca.key(), self.passphrase.read()?), (&path, &pem))?;
        self.output.print(&Created {
            title: format!("CA of {}", ca.domain()),
            domain: Some(ca.domain().to_owned()),
            certificate: Some(path),
            key: Some(key_path),
            expires: Some(ca.not_after().to_string()),
            ..Created::default()
        })
    }
}

impl Issue {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let Target { node, directory, output } = self.target;
        let (directory, identity) = (directory.open(), node.identity()?);
        let (path, key_path) = node_paths(&directory, &identity)?;
        output.check_absent(&[&path, &key_path])?;
        let now = SystemClock.now();
        let ca = load_ca(&directory, &self.ca, now)?;
        let issued =
            ca.issue(&identity, self.key.key_type, self.valid_for, now).map_err(|error| remedy::issue(&error))?;
        let certificate = issued.certificate();
        output.write_pair((&key_path, issued.key(), self.key.passphrase.read()?), (&path, &certificate.to_pem()))?;
        output.print(&Created {
            title: identity.to_string(),
            identity: Some(identity.to_string()),
            certificate: Some(path),
            key: Some(key_path),
            expires: Some(certificate.not_after().to_string()),
            ..Created::default()
        })
    }
}

impl Csr {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let Target { node, directory, output } = self.target;
        let (directory, identity) = (directory.open(), node.identity()?);
        let (path, key_path) = node_paths(&directory, &identity)?;
        let path = path.with_extension("csr");
        output.check_absent(&[&path, &key_path])?;
        let key = PrivateKey::generate(self.key.key_type).map_err(|error| remedy::issue(&IssueError::Key(error)))?;
        let request = CertificateRequest::new(&identity, &key).and_then(|request| request.to_pem());
        let request = request.map_err(|error| remedy::issue(&error))?;
        output.write_pair((&key_path, &key, self.key.passphrase.read()?), (&path, &request))?;
        output.print(&Created {
            title: format!("request of {identity}"),
            identity: Some(identity.to_string()),
            key: Some(key_path),
            request: Some(path),
            ..Created::default()
        })
    }
}

impl Sign {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let Target { node, directory, output } = self.target;
        let (directory, identity) = (directory.open(), node.identity()?);
        let (path, _) = node_paths(&directory, &identity)?;
        output.check_absent(&[&path])?;
        let request = CertificateRequest::from_pem(&read(&self.request)?)
            .map_err(|error| remedy::issue(&error).context(self.request.display()))?;
        let now = SystemClock.now();
        let ca = load_ca(&directory, &self.ca, now)?;
        let issued = ca.sign(&request, &identity, self.valid_for, now).map_err(|error| remedy::issue(&error))?;
        write_public(&path, &issued.to_pem(), output.force)?;
        output.print(&Created {
            title: identity.to_string(),
            identity: Some(identity.to_string()),
            certificate: Some(path),
            expires: Some(issued.not_after().to_string()),
            ..Created::default()
        })
    }
}

impl OutputArgs {
    /// Fails before anything is created if a file would be replaced without `--force`.
    fn check_absent(&self, paths: &[&Path]) -> Result<(), CliError> {
        match paths.iter().find(|path| !self.force && path.symlink_metadata().is_ok()) {
            Some(path) => Err(already_exists(path)),
            None => Ok(()),
        }
    }

    /// Writes a key, then its certificate or request; if the second fails, the new key is removed.
    fn write_pair(
        &self,
        (key_path, key, passphrase): (&Path, &PrivateKey, Option<zeroize::Zeroizing<Vec<u8>>>),
        (path, content): (&Path, &[u8]),
    ) -> Result<(), CliError> {
        let directory = path.parent().unwrap_or(path);
        create_directory(directory).map_err(|error| cannot_write(directory, &error))?;
        write_key(key_path, key, &passphrase, self.force)?;
        write_public(path, content, self.force).inspect_err(|_| {
            if !self.force {
                let _ = std::fs::remove_file(key_path);
            }
        })
    }

    fn print(&self, created: &Created) -> Result<Exit, CliError> {
        if self.json {
            output::json(created)?;
            return Ok(Exit::Success);
        }
        let title = output::stdout_paint().bold(&created.title);
        match &created.expires {
            Some(expires) => output::line(&format!("{title}, valid until {expires}"))?,
            None => output::line(&title)?,
        }
        let files = [("certificate", &created.certificate), ("key", &created.key), ("request", &created.request)];
        for (label, path) in files {
            if let Some(path) = path {
                output::line(&format!("  {label:<11}  {}", path.display()))?;
            }
        }
        Ok(Exit::Success)
    }
}
