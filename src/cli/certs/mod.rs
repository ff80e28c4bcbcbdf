//! `nanite certs`: makes, shows and checks certificates.

mod list;
mod make;
mod renew;
mod revoke;
mod show;
mod verify;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::error::{CliError, Exit};
use crate::certs::CertificateDirectory;
use crate::clock::Timestamp;
use crate::packet::{Identity, Role};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a CA: the certificate that all nodes need, and the key that issues theirs.
    Init(make::Init),
    /// Issue a certificate with a new key to an agent or mapper.
    Issue(make::Issue),
    /// List the certificates in a directory.
    List(list::List),
    /// Explain the certificates in a file.
    Show(show::Show),
    /// Check certificates and keys: chain, dates, usage, modes.
    Verify(verify::Verify),
    /// Make new keys and certificates in place of those that are about to expire; both are good until then.
    Renew(renew::Renew),
    /// Say by the exit code whether something has to be renewed: 0 when so, 1 when not.
    NeedsRenewal(renew::NeedsRenewal),
    /// Revoke a node's certificates: nobody believes them any more.
    Revoke(revoke::Revoke),
    /// Make the list of what is revoked anew, before the last one is out of date.
    Crl(revoke::Crl),
    /// Make a key and a signing request, on a machine that has no CA key.
    Csr(make::Csr),
    /// Issue a certificate for a signing request.
    Sign(make::Sign),
}

pub(super) fn run(command: Command) -> Result<Exit, CliError> {
    match command {
        Command::Init(args) => args.run(),
        Command::Issue(args) => args.run(),
        Command::List(args) => args.run(),
        Command::Show(args) => args.run(),
        Command::Verify(args) => args.run(),
        Command::Renew(args) => args.run(),
        Command::NeedsRenewal(args) => args.run(),
        Command::Revoke(args) => args.run(),
        Command::Crl(args) => args.run(),
        Command::Csr(args) => args.run(),
        Command::Sign(args) => args.run(),
    }
}

/// Which directory.
#[derive(Debug, Args)]
struct Place {
    /// The directory of certificates and keys.
    #[arg(long, value_name = "DIR", env = "NANITE_CERTS")]
    dir: PathBuf,
}

impl Place {
    fn directory(&self) -> CertificateDirectory {
        CertificateDirectory::new(&self.dir)
    }
}

/// Which node.
#[derive(Debug, Args)]
struct Node {
    /// Agents do work, mappers dispatch it.
    role: Role,
    /// Its name: 1 to 64 letters, digits, '-' and '_'.
    name: String,
}

impl Node {
    fn identity(&self) -> Result<Identity, CliError> {
        Identity::new(self.role, &self.name)
            .map_err(|error| CliError::of(Exit::Usage, &error).context(format!("'{}'", self.name.escape_debug())))
    }
}

/// How many whole days are left; negative when it has expired.
fn days_left(not_after: Timestamp, now: Timestamp) -> i64 {
    let (end, now) = (not_after.as_secs().cast_signed(), now.as_secs().cast_signed());
    end.saturating_sub(now).div_euclid(86_400)
}
