//! `nanite certs revoke` and `crl`: what the CA does not stand by any more, and the list that says so.

use std::io::ErrorKind;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::make::{authority, cannot_write};
use super::{Node, Place};
use crate::certs::files::{self, PUBLIC};
use crate::certs::{CertificateAuthority, CertificateDirectory, Content, Reason, RevocationList};
use crate::cli::args::{self, CaPassphrase};
use crate::cli::error::{CliError, Exit};
use crate::cli::{output, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};

#[derive(Debug, Args)]
pub(in crate::cli) struct Revoke {
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    place: Place,
    /// Why.
    #[arg(long, value_name = "REASON", default_value = "key-compromise")]
    reason: Why,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Crl {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
struct How {
    /// How long the list holds: a node that has no newer one by then believes nobody.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = args::duration)]
    valid_for: Duration,
    #[command(flatten)]
    passphrase: CaPassphrase,
    /// Say what was made as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Why {
    KeyCompromise,
    Superseded,
    CessationOfOperation,
    Unspecified,
}

impl From<Why> for Reason {
    fn from(why: Why) -> Self {
        match why {
            Why::KeyCompromise => Reason::KeyCompromise,
            Why::Superseded => Reason::Superseded,
            Why::CessationOfOperation => Reason::CessationOfOperation,
            Why::Unspecified => Reason::Unspecified,
        }
    }
}

#[derive(Serialize)]
struct Made<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<String>,
    /// How many certificates were revoked by this.
    revoked: usize,
    number: u64,
    in_all: usize,
    next_update: String,
    file: &'a std::path::Path,
}

impl Revoke {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let (directory, identity) = (self.place.directory(), self.node.identity()?);
        let failed = |error| remedy::directory(&error, &directory);
        let path = directory.certificate_path(&identity).map_err(failed)?;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let held = match directory.read_file(name).map_err(failed)? {
            Content::Node(_, held) => held,
            _ => return Err(CliError::new(Exit::Failure, format!("{} is no certificate", path.display()))),
        };
        let now = SystemClock.now();
        let ca = authority(&directory, &self.how.passphrase, now)?;
        let reason = Reason::from(self.reason);
        let revoked: Vec<_> = held.nodes.iter().map(|certificate| (&**certificate, reason)).collect();
        self.how.publish(&directory, &ca, &revoked, now, Some(identity.to_string()))
    }
}

impl Crl {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let directory = self.place.directory();
        let now = SystemClock.now();
        let ca = authority(&directory, &self.how.passphrase, now)?;
        self.how.publish(&directory, &ca, &[], now, None)
    }
}

impl How {
    fn publish(
        &self,
        directory: &CertificateDirectory,
        ca: &CertificateAuthority,
        revoked: &[(&crate::certs::Certificate, Reason)],
        now: Timestamp,
        identity: Option<String>,
    ) -> Result<Exit, CliError> {
        let before = own_list(directory, ca)?.map_or(0, |list| list.len());
        let list = publish(directory, ca, revoked, self.valid_for, now)?;
        let path = directory.crl_path();
        let made = Made {
            identity,
            revoked: list.len().saturating_sub(before),
            number: list.number(),
            in_all: list.len(),
            next_update: list.next_update().to_string(),
            file: &path,
        };
        if self.json {
            output::json(&made)?;
            return Ok(Exit::Success);
        }
        let paint = output::stdout_paint();
        if let Some(identity) = &made.identity {
            let what = match made.revoked {
                0 => "was revoked before".to_owned(),
                1 => "is revoked".to_owned(),
                several => format!("is revoked: {several} certificates"),
            };
            output::line(&format!("{} {what}", paint.bold(identity)))?;
        }
        output::line(&format!("list {}: {} revoked, valid until {}", made.number, made.in_all, made.next_update))?;
        output::line(&format!("  {:<11}  {}", "list", path.display()))?;
        Ok(Exit::Success)
    }
}

/// The CA's list in the directory, where there is one.
pub(super) fn own_list(
    directory: &CertificateDirectory,
    ca: &CertificateAuthority,
) -> Result<Option<RevocationList>, CliError> {
    Ok(read(directory, ca)?.0)
}

/// Writes the CA's next list, with these certificates revoked beside those that are. Lists of other CAs stay.
pub(super) fn publish(
    directory: &CertificateDirectory,
    ca: &CertificateAuthority,
    revoked: &[(&crate::certs::Certificate, Reason)],
    valid_for: Duration,
    now: Timestamp,
) -> Result<RevocationList, CliError> {
    let failed = |error| remedy::issue(&error).context(directory.crl_path().display());
    let (before, others) = read(directory, ca)?;
    let list = RevocationList::next(before.as_ref(), ca, revoked, valid_for, now).map_err(failed)?;
    let mut text = list.to_pem().map_err(failed)?;
    for other in others {
        text.extend(other.to_pem().unwrap_or_default());
    }
    let path = directory.crl_path();
    files::write(&path, &text, PUBLIC, true).map_err(|error| cannot_write(&path, &error))?;
    Ok(list)
}

fn read(
    directory: &CertificateDirectory,
    ca: &CertificateAuthority,
) -> Result<(Option<RevocationList>, Vec<openssl::x509::X509Crl>), CliError> {
    let path = directory.crl_path();
    match std::fs::read(&path) {
        Ok(text) => RevocationList::from_pem(&text, ca).map_err(|error| remedy::issue(&error).context(path.display())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok((None, Vec::new())),
        Err(error) => Err(CliError::of(Exit::Security, &error)
            .context(format!("cannot read {}", path.display()))
            .help("check the path, and who may read it")),
    }
}
