//! `nanite certs`: creates, lists and checks certificates, and replaces or revokes them.

mod files;
mod issue;
mod lifecycle;
mod show;

use super::error::{Exit, Result};
pub(super) use show::{authority, revocation_list};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Create a CA: the certificate that all nodes need, and the key that issues theirs.
    Init(issue::Init),
    /// Issue a certificate with a new key to an agent or mapper.
    Issue(issue::Issue),
    /// List the certificates in a directory.
    List(show::List),
    /// Explain the certificates in a file.
    Show(show::Show),
    /// Check certificates and keys: chain, dates, usage, file modes.
    Verify(show::Verify),
    /// Create new keys and certificates before the current ones expire; both stay valid until then.
    Renew(lifecycle::Renew),
    /// Check whether a renewal is due: exit 0 if it is, 1 if not.
    NeedsRenewal(lifecycle::NeedsRenewal),
    /// Revoke a node's certificates: all nodes refuse them.
    Revoke(lifecycle::Revoke),
    /// Create a new revocation list before the current one is out of date.
    Crl(lifecycle::Crl),
    /// Create a key and a signing request, on a machine without the CA key.
    Csr(issue::Csr),
    /// Issue a certificate for a signing request.
    Sign(issue::Sign),
}

pub(super) fn run(command: Command) -> Result<Exit> {
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
