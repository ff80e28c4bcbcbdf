//! What to do about failures of certificates and keys.

use std::path::Path;

use super::error::{CliError, Exit};
use crate::certs::{AuthorityError, CertificateDirectory, DirectoryError, IssueError, KeyError, TrustError};
use crate::packet::Identity;

/// A failure of what a directory of certificates holds.
pub(super) fn directory(error: &DirectoryError, directory: &CertificateDirectory) -> CliError {
    use DirectoryError as E;
    let dir = directory.path().display();
    let issue = |identity: &Identity| {
        format!("issue one with `nanite certs issue {} {} --dir {dir}`", identity.role(), identity.name())
    };
    let again = |path: &Path| match path.file_name().and_then(|name| name.to_str()).and_then(file_identity) {
        Some((role, name)) => format!("issue a new one with `nanite certs issue {role} {name} --dir {dir} --force`"),
        None => "put a certificate that `nanite certs issue` made in its place".to_owned(),
    };
    let failure = CliError::of(Exit::Security, error);
    match error {
        E::NoDirectory(path) => {
            failure.help(format!("make it, and a CA in it, with `nanite certs init --dir {}`", path.display()))
        }
        E::NoAuthority(_) => failure.help(format!(
            "copy ca.pem from where your certificates are issued, or make a new CA with `nanite certs init --dir {dir}`"
        )),
        E::NoCertificate { identity, .. } => failure.help(issue(identity)),
        E::NoKey { identity, .. } => failure.help(format!(
            "copy the key to this machine, or {} --force",
            issue(identity).replace('`', "").replacen("issue one with", "issue both anew with", 1)
        )),
        E::AmbiguousName(_) => failure.help("choose a name that does not end in '-key'"),
        E::Key { path, source, .. } => key(failure, path, source),
        E::Mismatch { certificate, .. } => failure.help(again(certificate)),
        E::Expired { path, .. } => failure.help(again(path)),
        E::NotYetValid { .. } => failure.help("check the clock of this machine, and that of the CA's"),
        E::OtherIdentity { found, .. } => failure.help(format!("name the file after {found}, or start as {found}")),
        E::Unreadable { path, .. } => failure.help(format!("check who may read {}", path.display())),
        E::Invalid { path, .. } => failure.help(again(path)),
        E::FileName { path } => failure.help(format!("rename {}", path.display())),
        E::Authority { path, source } => match source {
            AuthorityError::Unreadable { .. } => failure.help(format!("check who may read {}", path.display())),
            _ => failure.help(format!("{} has to hold the PEM of CA certificates only", path.display())),
        },
    }
}

/// A failure of a key file.
pub(super) fn key(failure: CliError, path: &Path, error: &KeyError) -> CliError {
    match error {
        KeyError::TooOpen { .. } => failure.help(format!(
            "if nobody else has read it: `chmod 600 {}`; otherwise make a new key and certificate",
            path.display()
        )),
        KeyError::Unreadable { .. } => failure.help(format!("check the owner and the mode of {}", path.display())),
        KeyError::Malformed => failure.help("a key file holds one private key in PEM; is it the right file?"),
        KeyError::KeyType => failure.help("make a key of the type p256, rsa2048, rsa3072 or rsa4096"),
        _ => failure,
    }
}

/// A certificate could not be issued.
pub(super) fn issue(error: &IssueError) -> CliError {
    use IssueError as E;
    match error {
        E::Domain(_) => CliError::of(Exit::Usage, error).help("give a domain such as `--domain example.org`"),
        E::Validity => CliError::of(Exit::Usage, error).help("give a time such as `--valid-for 30d`"),
        _ => {
            let failure = CliError::of(Exit::Security, error);
            match error {
                E::OutlivesAuthority(_) => failure.help("give a shorter time with `--valid-for`, or make a new CA"),
                E::AuthorityNotValid(..) => {
                    failure.help("check the clock of this machine; a CA that has expired has to be made anew")
                }
                E::NoPossession | E::MalformedRequest => failure.help("make a request with `nanite certs csr`"),
                E::NoDomain => failure.help("use a CA that `nanite certs init` made"),
                _ => failure,
            }
        }
    }
}

/// What to do when a certificate is not believed.
pub(super) fn trust(error: &TrustError) -> &'static str {
    use TrustError as E;
    match error {
        E::Expired(_) => "issue a new one with `nanite certs issue ... --force`",
        E::NotYetValid(_) | E::AuthorityNotYetValid => "check the clock of this machine, and that of the CA's",
        E::UnknownIssuer => "it is of another CA than ca.pem: issue it again here, or add its CA to ca.pem",
        E::AuthorityExpired => "make a new CA, and issue the certificates anew",
        E::Domain { .. } => "all nodes that talk to each other need certificates of one domain",
        E::Revoked | E::AuthorityRevoked => "issue a new one, with a new key",
        E::NoCrl | E::StaleCrl => "get a current revocation list from the CA",
        _ => "issue a new one with `nanite certs issue ... --force`",
    }
}

fn file_identity(name: &str) -> Option<(&str, &str)> {
    let (role, name) = name.strip_suffix(".pem")?.split_once('-')?;
    matches!(role, "agent" | "mapper").then_some((role, name))
}
