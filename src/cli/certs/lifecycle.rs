//! `nanite certs renew`, `needs-renewal`, `revoke` and `crl`: replace or revoke certificates, and keep the revocation list current.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use clap::Args;
use openssl::x509::X509Crl;
use serde::Serialize;

use super::files::{
    DirectoryArgs, Issuer, NodeArgs, key_error, node_certificates, node_paths, read, secret, write, write_key,
};
use crate::certs::{
    Certificate, CertificateDirectory, Content, KeyType, PrivateKey, RevocationList, RevocationReason, Suite, timestamp,
};
use crate::cli::args::{CaPassphrase, Passphrase};
use crate::cli::error::{CliError, Exit, Result};
use crate::cli::{args, node, output, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Role};

/// The certificates to renew or check.
#[derive(Debug, Args)]
struct Selection {
    /// Of the agent or mapper with this name.
    #[arg(requires = "name")]
    role: Option<Role>,
    /// Its name.
    name: Option<String>,
    /// Of every node whose key is in the directory, and the revocation list if there is one.
    #[arg(long, conflicts_with = "role")]
    all: bool,
    #[command(flatten)]
    directory: DirectoryArgs,
    /// Renewal is due when less than this is left [default: a third of the validity].
    #[arg(long, value_name = "TIME", value_parser = args::duration)]
    before: Option<Duration>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Renew {
    #[command(flatten)]
    selection: Selection,
    /// Renew only what is due.
    #[arg(long)]
    if_needed: bool,
    /// How long the new certificate is valid.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = args::duration)]
    valid_for: Duration,
    /// The type of the new key [default: as before].
    #[arg(long, value_name = "TYPE")]
    key_type: Option<KeyType>,
    /// Run this in a shell after each renewal, with NANITE_IDENTITY, NANITE_CERTIFICATE and NANITE_KEY: for example, to copy the files.
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    #[command(flatten)]
    ca: CaPassphrase,
    #[command(flatten)]
    passphrase: Passphrase,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct NeedsRenewal {
    #[command(flatten)]
    selection: Selection,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Revoke {
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    directory: DirectoryArgs,
    /// Why it is revoked.
    #[arg(long, value_name = "REASON", default_value = "key-compromise")]
    reason: RevocationReason,
    #[command(flatten)]
    list: ListArgs,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Crl {
    #[command(flatten)]
    directory: DirectoryArgs,
    #[command(flatten)]
    list: ListArgs,
}

/// Arguments of the commands that write a revocation list.
#[derive(Debug, Args)]
struct ListArgs {
    /// How long the list is valid; without a newer one, nodes then refuse every certificate.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = args::duration)]
    valid_for: Duration,
    #[command(flatten)]
    passphrase: CaPassphrase,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Renewed {
    identity: Identity,
    expires: String,
    certificate: PathBuf,
    key: PathBuf,
}

#[derive(Serialize)]
struct Published<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<&'a Identity>,
    /// How many certificates this command revoked.
    revoked: usize,
    number: u64,
    in_all: usize,
    next_update: String,
    file: PathBuf,
}

impl Selection {
    fn identities(&self, directory: &CertificateDirectory) -> Result<Vec<Identity>> {
        if let (Some(role), Some(name)) = (self.role, &self.name) {
            return Ok(vec![node::named(role, name)?]);
        }
        if !self.all {
            return Err(CliError::new(Exit::Usage, "no certificate is named")
                .help("name it, as in `agent fred`, or use `--all`"));
        }
        let entries = directory.entries().map_err(|error| remedy::directory(&error, directory))?;
        let identities = entries.into_iter().filter_map(|entry| match entry.content {
            Ok(Content::Node(identity, _)) => Some(identity),
            _ => None,
        });
        Ok(identities.filter(|identity| directory.key_path(identity).is_ok_and(|path| path.exists())).collect())
    }

    fn is_due(&self, from: Timestamp, to: Timestamp, now: Timestamp) -> bool {
        to.since(now) <= self.before.unwrap_or_else(|| to.since(from) / 3)
    }
}

impl NeedsRenewal {
    pub(super) fn run(self) -> Result<Exit> {
        let directory = self.selection.directory.open();
        let mut items = Vec::new();
        for identity in self.selection.identities(&directory)? {
            if let Some(newest) = node_certificates(&directory, &identity)?.first() {
                let validity = Some((newest.not_before(), newest.not_after()));
                items.push((format!("the certificate of {identity}"), validity));
            }
        }
        if self.selection.all
            && let Ok(Content::Revocations(lists)) = directory.read_file("crl.pem")
        {
            let validity = |list: &X509Crl| timestamp(list.last_update()).zip(list.next_update().and_then(timestamp));
            items.extend(lists.iter().map(|list| ("the revocation list".to_owned(), validity(list))));
        }
        let now = SystemClock.now();
        match items.iter().find(|(_, validity)| validity.is_none_or(|(from, to)| self.selection.is_due(from, to, now)))
        {
            Some((name, _)) => output::line(&format!("{name} is due for renewal")).map(|()| Exit::Success),
            None => Ok(Exit::Failure),
        }
    }
}

impl Renew {
    pub(super) fn run(self) -> Result<Exit> {
        let directory = self.selection.directory.open();
        let identities = self.selection.identities(&directory)?;
        let issuer = Issuer::load(directory, &self.ca)?;
        let mut renewals = Vec::new();
        for identity in identities {
            if let Some(renewed) = self.renew(&issuer, &identity)? {
                if !self.json {
                    let title = output::stdout_paint().bold(identity.as_str());
                    output::line(&format!("{title}, valid until {}", renewed.expires))?;
                }
                self.execute(&renewed)?;
                renewals.push(renewed);
            }
        }
        if self.selection.all
            && let (Some(list), _) = issuer.read_lists()?
        {
            let from = list.next_update().saturating_sub(RevocationList::VALID_FOR);
            if !self.if_needed || self.selection.is_due(from, list.next_update(), issuer.now) {
                let list = issuer.publish(&[], RevocationList::VALID_FOR)?;
                if !self.json {
                    output::line(&format!("revocation list, valid until {}", list.next_update()))?;
                }
            }
        }
        if self.json {
            output::json(&renewals)?;
        } else if renewals.is_empty() {
            output::note("no certificate is due for renewal");
        }
        Ok(Exit::Success)
    }

    fn renew(&self, issuer: &Issuer, identity: &Identity) -> Result<Option<Renewed>> {
        let Issuer { directory, ca, now } = issuer;
        let certificates = node_certificates(directory, identity)?;
        let is_due = |newest: &Certificate| self.selection.is_due(newest.not_before(), newest.not_after(), *now);
        if self.if_needed && !certificates.first().is_some_and(|newest| is_due(newest)) {
            return Ok(None);
        }
        let (path, key_path) = node_paths(directory, identity)?;
        let old_key_path = directory.old_key_path(identity).map_err(|error| remedy::directory(&error, directory))?;
        let passphrase = self.passphrase.read()?;
        let key = PrivateKey::from_file(&key_path, secret(&passphrase))
            .map_err(|error| key_error(&format!("the key of {identity}"), &key_path, &error))?;
        let key_type = self.key_type.unwrap_or(match (key.suite(), key.bits()) {
            (Suite::P256, _) => KeyType::P256,
            (Suite::Rsa, ..=2048) => KeyType::Rsa2048,
            (Suite::Rsa, ..=3072) => KeyType::Rsa3072,
            (Suite::Rsa, _) => KeyType::Rsa4096,
        });
        let issued = ca.issue(identity, key_type, self.valid_for, *now)?;
        let mut pem = issued.certificate().to_pem();
        // The certificate of the previous key stays in the file while it is usable.
        let (list, _) = issuer.read_lists()?;
        let is_revoked = |certificate: &Certificate| list.as_ref().is_some_and(|list| list.revokes(certificate));
        let previous = certificates.iter().find(|certificate| certificate.public_key().public_eq(key.pkey()));
        if let Some(previous) = previous.filter(|previous| previous.is_valid_at(*now) && !is_revoked(previous)) {
            pem.extend(previous.to_pem());
        }
        // In this order a key and its certificate exist at any moment.
        write_key(&old_key_path, &key, &passphrase, true)?;
        write(&path, &pem, true)?;
        write_key(&key_path, issued.key(), &passphrase, true)?;
        let expires = issued.certificate().not_after().to_string();
        Ok(Some(Renewed { identity: identity.clone(), expires, certificate: path, key: key_path }))
    }

    fn execute(&self, renewed: &Renewed) -> Result<()> {
        let Some(command) = &self.exec else { return Ok(()) };
        let status = Command::new("sh")
            .args(["-c", command])
            .env("NANITE_IDENTITY", renewed.identity.as_str())
            .env("NANITE_CERTIFICATE", &renewed.certificate)
            .env("NANITE_KEY", &renewed.key)
            .status();
        let status = status.map_err(|error| CliError::of(Exit::Failure, &error).context("cannot run a shell"))?;
        if status.success() {
            return Ok(());
        }
        let message = format!("{} was renewed, but the `--exec` command failed: {status}", renewed.identity);
        Err(CliError::new(Exit::Failure, message).help("see its output, and run it again by hand"))
    }
}

impl Revoke {
    pub(super) fn run(self) -> Result<Exit> {
        let (directory, identity) = (self.directory.open(), self.node.identity()?);
        let certificates = node_certificates(&directory, &identity)?;
        let revoked: Vec<_> = certificates.iter().map(|certificate| (&**certificate, self.reason)).collect();
        self.list.publish(directory, &revoked, Some(&identity))
    }
}

impl Crl {
    pub(super) fn run(self) -> Result<Exit> {
        self.list.publish(self.directory.open(), &[], None)
    }
}

impl ListArgs {
    fn publish(
        &self,
        directory: CertificateDirectory,
        revoked: &[(&Certificate, RevocationReason)],
        identity: Option<&Identity>,
    ) -> Result<Exit> {
        let issuer = Issuer::load(directory, &self.passphrase)?;
        let before = issuer.read_lists()?.0.map_or(0, |list| list.len());
        let list = issuer.publish(revoked, self.valid_for)?;
        let (number, in_all, next_update) = (list.number(), list.len(), list.next_update().to_string());
        let (revoked, file) = (in_all.saturating_sub(before), issuer.directory.crl_path());
        if self.json {
            output::json(&Published { identity, revoked, number, in_all, next_update, file })?;
            return Ok(Exit::Success);
        }
        if let Some(identity) = identity {
            let result = match revoked {
                0 => "was already revoked".to_owned(),
                1 => "is revoked".to_owned(),
                count => format!("is revoked: {count} certificates"),
            };
            output::line(&format!("{} {result}", output::stdout_paint().bold(identity.as_str())))?;
        }
        output::line(&format!("list {number}: {in_all} revoked, valid until {next_update}"))?;
        output::line(&format!("  {:<11}  {}", "list", file.display()))?;
        Ok(Exit::Success)
    }
}

impl Issuer {
    /// Writes the CA's next list: its current entries and `revoked`. Lists of other CAs are kept.
    fn publish(&self, revoked: &[(&Certificate, RevocationReason)], valid_for: Duration) -> Result<RevocationList> {
        let path = self.directory.crl_path();
        let failed = |error| CliError::from(error).context(path.display());
        let (current, others) = self.read_lists()?;
        let list = RevocationList::issue(current.as_ref(), &self.ca, revoked, valid_for, self.now).map_err(failed)?;
        let mut text = list.to_pem().map_err(failed)?;
        others.iter().for_each(|other| text.extend(other.to_pem().unwrap_or_default()));
        write(&path, &text, true)?;
        Ok(list)
    }

    /// The CA's own revocation list, if there is one, and those of other CAs.
    fn read_lists(&self) -> Result<(Option<RevocationList>, Vec<X509Crl>)> {
        let path = self.directory.crl_path();
        if !path.exists() {
            return Ok((None, Vec::new()));
        }
        let lists = RevocationList::from_pem(&read(&path)?, &self.ca);
        lists.map_err(|error| CliError::from(error).context(path.display()))
    }
}
