//! `nanite certs renew` and `needs-renewal`: a new key and certificate before the old ones expire, beside them for a while.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::Place;
use super::make::{authority, bytes, cannot_write, secret};
use super::revoke::{own_list, publish};
use crate::certs::files::{self, PUBLIC, SECRET};
use crate::certs::{
    Certificate, CertificateAuthority, CertificateDirectory, Content, KeyType, PrivateKey, RevocationList, Suite,
};
use crate::cli::args::{self, CaPassphrase, Passphrase};
use crate::cli::error::{CliError, Exit};
use crate::cli::{output, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Role};

/// Which certificates.
#[derive(Debug, Args)]
struct Which {
    /// Of an agent or mapper of this name.
    #[arg(requires = "name")]
    role: Option<Role>,
    /// Its name.
    name: Option<String>,
    /// Of every node whose key is in the directory, and the revocation list where there is one.
    #[arg(long, conflicts_with = "role")]
    all: bool,
    #[command(flatten)]
    place: Place,
    /// What has less than this left has to be renewed [default: a third of its validity].
    #[arg(long, value_name = "TIME", value_parser = args::duration)]
    before: Option<Duration>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Renew {
    #[command(flatten)]
    which: Which,
    /// Only what has to be renewed by now.
    #[arg(long)]
    if_needed: bool,
    /// How long the new certificate is valid.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = args::duration)]
    valid_for: Duration,
    /// The type of the new key [default: as before].
    #[arg(long, value_name = "TYPE")]
    key_type: Option<KeyType>,
    /// Run this in a shell after each renewal, with NANITE_IDENTITY, NANITE_CERTIFICATE and NANITE_KEY: to copy the files, for one.
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    #[command(flatten)]
    ca: CaPassphrase,
    #[command(flatten)]
    passphrase: Passphrase,
    /// Say what was renewed as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct NeedsRenewal {
    #[command(flatten)]
    which: Which,
}

#[derive(Serialize)]
struct Renewed {
    identity: String,
    expires: String,
    certificate: std::path::PathBuf,
    key: std::path::PathBuf,
}

impl Which {
    /// The nodes that are meant.
    fn identities(&self, directory: &CertificateDirectory) -> Result<Vec<Identity>, CliError> {
        if let (Some(role), Some(name)) = (self.role, &self.name) {
            return Ok(vec![crate::cli::identity::named(role, name)?]);
        }
        if !self.all {
            return Err(CliError::new(Exit::Usage, "which one?").help("name it, as in `agent fred`, or give `--all`"));
        }
        let mut all = Vec::new();
        for entry in directory.entries().map_err(|error| remedy::directory(&error, directory))? {
            if let Ok(Content::Node(identity, _)) = entry.content
                && directory.key_path(&identity).is_ok_and(|path| path.exists())
            {
                all.push(identity);
            }
        }
        Ok(all)
    }

    fn is_due(&self, from: Timestamp, to: Timestamp, now: Timestamp) -> bool {
        let before = self.before.unwrap_or_else(|| to.since(from) / 3);
        to.since(now) <= before
    }
}

/// The certificates of a node, the newest first.
fn held(directory: &CertificateDirectory, identity: &Identity) -> Result<Vec<Arc<Certificate>>, CliError> {
    let failed = |error| remedy::directory(&error, directory);
    let path = directory.certificate_path(identity).map_err(failed)?;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !path.exists() {
        let error = crate::certs::DirectoryError::NoCertificate { identity: identity.clone(), path };
        return Err(failed(error));
    }
    let mut nodes = match directory.read_file(name).map_err(failed)? {
        Content::Node(_, held) => held.nodes,
        _ => Vec::new(),
    };
    nodes.sort_by_key(|certificate| std::cmp::Reverse(certificate.not_before()));
    Ok(nodes)
}

impl NeedsRenewal {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let directory = self.which.place.directory();
        let now = SystemClock.now();
        for identity in self.which.identities(&directory)? {
            let newest = held(&directory, &identity)?.into_iter().next();
            if newest.is_some_and(|newest| self.which.is_due(newest.not_before(), newest.not_after(), now)) {
                output::line(&format!("{identity} has to be renewed"))?;
                return Ok(Exit::Success);
            }
        }
        if self.which.all
            && let Ok(Content::Revocations(lists)) = directory.read_file("crl.pem")
        {
            let due = |list: &openssl::x509::X509Crl| {
                let from = crate::certs::moment(list.last_update());
                let to = list.next_update().and_then(crate::certs::moment);
                from.zip(to).is_none_or(|(from, to)| self.which.is_due(from, to, now))
            };
            if lists.iter().any(due) {
                output::line("the revocation list has to be made anew")?;
                return Ok(Exit::Success);
            }
        }
        Ok(Exit::Failure)
    }
}

impl Renew {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let directory = self.which.place.directory();
        let now = SystemClock.now();
        let identities = self.which.identities(&directory)?;
        let ca = authority(&directory, &self.ca, now)?;
        let mut all = Vec::new();
        for identity in identities {
            if let Some(renewed) = self.renew(&directory, &ca, &identity, now)? {
                if !self.json {
                    let title = output::stdout_paint().bold(&renewed.identity);
                    output::line(&format!("{title}, valid until {}", renewed.expires))?;
                }
                self.execute(&renewed)?;
                all.push(renewed);
            }
        }
        let list = own_list(&directory, &ca)?.filter(|_| self.which.all);
        if list.is_some_and(|list| {
            let from = list.next_update().saturating_sub(RevocationList::VALID_FOR);
            !self.if_needed || self.which.is_due(from, list.next_update(), now)
        }) {
            let list = publish(&directory, &ca, &[], RevocationList::VALID_FOR, now)?;
            if !self.json {
                output::line(&format!("revocation list, valid until {}", list.next_update()))?;
            }
        }
        if self.json {
            output::json(&all)?;
        } else if all.is_empty() {
            output::note("no certificate has to be renewed yet");
        }
        Ok(Exit::Success)
    }

    fn renew(
        &self,
        directory: &CertificateDirectory,
        ca: &CertificateAuthority,
        identity: &Identity,
        now: Timestamp,
    ) -> Result<Option<Renewed>, CliError> {
        let failed = |error| remedy::directory(&error, directory);
        let certificates = held(directory, identity)?;
        let due = certificates.first().is_some_and(|one| self.which.is_due(one.not_before(), one.not_after(), now));
        if self.if_needed && !due {
            return Ok(None);
        }
        let certificate_path = directory.certificate_path(identity).map_err(failed)?;
        let key_path = directory.key_path(identity).map_err(failed)?;
        let old_key_path = directory.old_key_path(identity).map_err(failed)?;
        let passphrase = self.passphrase.read()?;
        let key = PrivateKey::from_file(&key_path, bytes(&passphrase)).map_err(|error| {
            let failure = CliError::of(Exit::Security, &error).context(format!("the key of {identity}"));
            remedy::key(failure, &key_path, &error)
        })?;
        let key_type = self.key_type.unwrap_or(match (key.suite(), key.bits()) {
            (Suite::P256, _) => KeyType::P256,
            (Suite::Rsa, ..=2048) => KeyType::Rsa2048,
            (Suite::Rsa, ..=3072) => KeyType::Rsa3072,
            (Suite::Rsa, _) => KeyType::Rsa4096,
        });
        let issued = ca.issue(identity, key_type, self.valid_for, now).map_err(|error| remedy::issue(&error))?;
        let mut pem = issued.certificate().to_pem();
        // The one of the key before, as long as it is good for something.
        let revoked = own_list(directory, ca)?;
        let is_revoked = |one: &Certificate| revoked.as_ref().is_some_and(|list| list.revokes(one));
        let old = certificates.iter().find(|one| one.public_key().public_eq(key.pkey()));
        if let Some(old) = old.filter(|old| old.is_valid_at(now) && !is_revoked(old)) {
            pem.extend(old.to_pem());
        }
        // In this order, a key and its certificate are there at any moment.
        let put = |path: &std::path::Path, content: &[u8], mode| {
            files::write(path, content, mode, true).map_err(|error| cannot_write(path, &error))
        };
        put(&old_key_path, &secret(&key, bytes(&passphrase))?, SECRET)?;
        put(&certificate_path, &pem, PUBLIC)?;
        put(&key_path, &secret(issued.key(), bytes(&passphrase))?, SECRET)?;
        Ok(Some(Renewed {
            identity: identity.to_string(),
            expires: issued.certificate().not_after().to_string(),
            certificate: certificate_path,
            key: key_path,
        }))
    }

    fn execute(&self, renewed: &Renewed) -> Result<(), CliError> {
        let Some(command) = &self.exec else { return Ok(()) };
        let status = Command::new("sh")
            .args(["-c", command])
            .env("NANITE_IDENTITY", &renewed.identity)
            .env("NANITE_CERTIFICATE", &renewed.certificate)
            .env("NANITE_KEY", &renewed.key)
            .status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(CliError::new(
                Exit::Failure,
                format!("{} is renewed, and the command that was to follow failed: {status}", renewed.identity),
            )
            .help("see what it said, and run it by hand")),
            Err(error) => Err(CliError::of(Exit::Failure, &error).context("cannot run a shell")),
        }
    }
}
