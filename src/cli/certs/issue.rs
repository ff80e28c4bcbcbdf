//! `nanite certs init`, `issue`, `csr` and `sign`: create CAs, certificates and signing requests.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use zeroize::Zeroizing;

use super::files::{DirectoryArgs, Issuer, NodeArgs, cannot_write, node_paths, read, write, write_key};
use crate::certs::files::create_directory;
use crate::certs::{CertificateAuthority, CertificateRequest, IssueError, KeyType, PrivateKey};
use crate::cli::args::{self, CaPassphrase, Passphrase};
use crate::cli::error::{CliError, Exit, Result};
use crate::cli::output;
use crate::clock::{Clock, SystemClock};
use crate::packet::Identity;

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
    #[arg(long, value_name = "TIME", default_value = "3652d", value_parser = args::duration)]
    valid_for: Duration,
    #[command(flatten)]
    passphrase: CaPassphrase,
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
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = args::duration)]
    valid_for: Duration,
    #[command(flatten)]
    ca: CaPassphrase,
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
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = args::duration)]
    valid_for: Duration,
    #[command(flatten)]
    ca: CaPassphrase,
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
    passphrase: Passphrase,
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
struct Created<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<&'a Identity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<String>,
}

impl Init {
    pub(super) fn run(self) -> Result<Exit> {
        let directory = self.directory.open();
        let (path, key_path) = (directory.ca_path(), directory.ca_key_path());
        self.output.check_absent(&[&path, &key_path])?;
        let ca = CertificateAuthority::create(&self.domain, self.key_type, self.valid_for, SystemClock.now())?;
        let pem = ca.certificate().to_pem().map_err(IssueError::Openssl)?;
        self.output.write_pair((&key_path, ca.key(), self.passphrase.read()?), (&path, &pem))?;
        let (domain, expires) = (Some(ca.domain()), Some(ca.not_after().to_string()));
        let created = Created { domain, certificate: Some(&path), key: Some(&key_path), expires, ..Created::default() };
        self.output.report(&format!("CA of {}", ca.domain()), &created)
    }
}

impl Issue {
    pub(super) fn run(self) -> Result<Exit> {
        let Target { node, directory, output } = self.target;
        let (directory, identity) = (directory.open(), node.identity()?);
        let (path, key_path) = node_paths(&directory, &identity)?;
        output.check_absent(&[&path, &key_path])?;
        let Issuer { ca, now, .. } = Issuer::load(directory, &self.ca)?;
        let issued = ca.issue(&identity, self.key.key_type, self.valid_for, now)?;
        let certificate = issued.certificate();
        output.write_pair((&key_path, issued.key(), self.key.passphrase.read()?), (&path, &certificate.to_pem()))?;
        let (identity, expires) = (Some(&identity), Some(certificate.not_after().to_string()));
        let created =
            Created { identity, certificate: Some(&path), key: Some(&key_path), expires, ..Created::default() };
        output.report(certificate.identity().as_str(), &created)
    }
}

impl Csr {
    pub(super) fn run(self) -> Result<Exit> {
        let Target { node, directory, output } = self.target;
        let (directory, identity) = (directory.open(), node.identity()?);
        let (path, key_path) = node_paths(&directory, &identity)?;
        let path = path.with_extension("csr");
        output.check_absent(&[&path, &key_path])?;
        let key = PrivateKey::generate(self.key.key_type).map_err(IssueError::Key)?;
        let pem = CertificateRequest::new(&identity, &key)?.to_pem()?;
        output.write_pair((&key_path, &key, self.key.passphrase.read()?), (&path, &pem))?;
        let created =
            Created { identity: Some(&identity), key: Some(&key_path), request: Some(&path), ..Created::default() };
        output.report(&format!("request of {identity}"), &created)
    }
}

impl Sign {
    pub(super) fn run(self) -> Result<Exit> {
        let Target { node, directory, output } = self.target;
        let (directory, identity) = (directory.open(), node.identity()?);
        let (path, _) = node_paths(&directory, &identity)?;
        output.check_absent(&[&path])?;
        let request = CertificateRequest::from_pem(&read(&self.request)?)
            .map_err(|error| CliError::from(error).context(self.request.display()))?;
        let Issuer { ca, now, .. } = Issuer::load(directory, &self.ca)?;
        let issued = ca.sign(&request, &identity, self.valid_for, now)?;
        write(&path, &issued.to_pem(), output.force)?;
        let expires = Some(issued.not_after().to_string());
        let created = Created { identity: Some(&identity), certificate: Some(&path), expires, ..Created::default() };
        output.report(identity.as_str(), &created)
    }
}

impl OutputArgs {
    /// Fails before anything is created if a file would be replaced without `--force`.
    fn check_absent(&self, paths: &[&Path]) -> Result<()> {
        match paths.iter().find(|path| !self.force && path.symlink_metadata().is_ok()) {
            Some(path) => Err(cannot_write(path, &ErrorKind::AlreadyExists.into())),
            None => Ok(()),
        }
    }

    /// Writes a key, then its certificate or request; if the second fails, the new key is removed.
    fn write_pair(
        &self,
        (key_path, key, passphrase): (&Path, &PrivateKey, Option<Zeroizing<Vec<u8>>>),
        (path, content): (&Path, &[u8]),
    ) -> Result<()> {
        let directory = path.parent().unwrap_or(path);
        create_directory(directory).map_err(|error| cannot_write(directory, &error))?;
        write_key(key_path, key, &passphrase, self.force)?;
        write(path, content, self.force).inspect_err(|_| {
            if !self.force {
                let _ = std::fs::remove_file(key_path);
            }
        })
    }

    fn report(&self, title: &str, created: &Created<'_>) -> Result<Exit> {
        output::json_or(self.json, created, |created| created.print(title))?;
        Ok(Exit::Success)
    }
}

impl Created<'_> {
    fn print(&self, title: &str) -> Result<()> {
        let expires = self.expires.as_ref().map(|expires| format!(", valid until {expires}")).unwrap_or_default();
        output::line(&format!("{}{expires}", output::stdout_paint().bold(title)))?;
        let files = [("certificate", self.certificate), ("key", self.key), ("request", self.request)];
        let mut files = files.into_iter().filter_map(|(label, path)| Some((label, path?)));
        files.try_for_each(|(label, path)| output::line(&format!("  {label:<11}  {}", path.display())))
    }
}
