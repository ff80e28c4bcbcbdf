//! `nanite certs verify`: whether the certificates, revocation lists and keys of a directory would be accepted.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::Args;
use openssl::x509::{X509CrlRef, X509KeyUsage};
use serde::Serialize;

use super::files::{DirectoryArgs, key_error};
use crate::certs::{
    CaCertificate, CertificateDirectory, Content, Credentials, KeyError, PrivateKey, TrustError, distinguished_name,
    timestamp,
};
use crate::cli::error::{CliError, Exit};
use crate::cli::{output, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};

#[derive(Debug, Args)]
pub(in crate::cli) struct Verify {
    #[command(flatten)]
    directory: DirectoryArgs,
    /// Check only these files of the directory [default: all].
    files: Vec<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Finding {
    file: PathBuf,
    ok: bool,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn new(file: &Path, result: Result<String, CliError>) -> Self {
        let (ok, message, remedy) = match result {
            Ok(message) => (true, message, None),
            Err(error) => (false, error.message().to_owned(), error.remedy().map(str::to_owned)),
        };
        Self { file: file.to_owned(), ok, message, remedy }
    }
}

impl Verify {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let directory = self.directory.open();
        let mut findings = verify(&directory, SystemClock.now())?;
        if !self.files.is_empty() {
            let canonical = |path: &Path| path.canonicalize().ok();
            let selected: Vec<_> = self.files.iter().map(|file| canonical(file)).collect();
            findings.retain(|finding| selected.contains(&canonical(&finding.file)));
            let checked: Vec<_> = findings.iter().map(|finding| canonical(&finding.file)).collect();
            if let Some(unknown) = self.files.iter().find(|file| !checked.contains(&canonical(file))) {
                let (file, directory) = (unknown.display(), directory.path().display());
                return Err(CliError::new(
                    Exit::Usage,
                    format!("{file} is not a certificate or key file of {directory}"),
                )
                .help("name files of that directory, or another directory with `--dir`"));
            }
        }
        output::json_or(self.json, &findings, |findings| findings.iter().try_for_each(print))?;
        Ok(if findings.iter().all(|finding| finding.ok) { Exit::Success } else { Exit::Security })
    }
}

fn verify(directory: &CertificateDirectory, now: Timestamp) -> Result<Vec<Finding>, CliError> {
    let failed = |error| remedy::directory(&error, directory);
    let trust = directory.trust().map_err(failed)?;
    let mut findings = Vec::new();
    for entry in directory.entries().map_err(failed)? {
        let path = entry.path;
        match entry.content {
            Ok(Content::Authorities(authorities)) => {
                findings.extend(authorities.iter().map(|ca| Finding::new(&path, authority(ca, now))));
                let is_key_of = |key: &PrivateKey, ca: &CaCertificate| {
                    ca.x509.public_key().is_ok_and(|public| public.public_eq(key.pkey()))
                };
                let matches = |key: &PrivateKey| authorities.iter().any(|ca| is_key_of(key, ca));
                findings.extend(key(&directory.ca_key_path(), &path, "the CA's key", matches));
            }
            Ok(Content::Revocations(lists)) => {
                findings.extend(lists.iter().map(|list| Finding::new(&path, revocation_list(list, now))));
            }
            Ok(Content::Node(identity, held)) => {
                findings.extend(held.certificates.iter().map(|certificate| {
                    let result = trust.verify(certificate, &held.intermediates, now).map_err(|error| {
                        let name = format!("the certificate of {identity}");
                        CliError::of(Exit::Security, &error).context(name).help(remedy::trust(&error))
                    });
                    let message = format!("{identity}, valid until {}", certificate.not_after());
                    Finding::new(&path, result.map(|()| message))
                }));
                let matches = |key: &PrivateKey| {
                    held.certificates
                        .iter()
                        .any(|certificate| Credentials::new(certificate.clone(), key.clone()).is_ok())
                };
                if let Ok(key_path) = directory.key_path(&identity) {
                    findings.extend(key(&key_path, &path, &format!("the key of {identity}"), matches));
                }
            }
            Err(error) => findings.push(Finding::new(&path, Err(failed(error)))),
        }
    }
    Ok(findings)
}

/// Whether a CA may issue certificates now.
pub(in crate::cli) fn authority(ca: &CaCertificate, now: Timestamp) -> Result<String, CliError> {
    let (message, help) = if now < ca.not_before {
        (format!("is not valid before {}", ca.not_before), "check the clock of this machine")
    } else if now >= ca.not_after {
        (format!("expired at {}", ca.not_after), "create a new CA and issue all certificates again")
    } else if !ca.x509.key_usage().is_some_and(|usage| usage.contains(X509KeyUsage::KEY_CERT_SIGN)) {
        ("may not sign certificates".to_owned(), "create a CA with `nanite certs init`")
    } else {
        let name = ca.domain.as_ref().map_or_else(|| ca.subject.clone(), |domain| format!("of {domain}"));
        return Ok(format!("CA {name}, valid until {}", ca.not_after));
    };
    Err(CliError::new(Exit::Security, format!("the CA {} {message}", ca.subject)).help(help))
}

/// Whether a revocation list is current.
pub(in crate::cli) fn revocation_list(list: &X509CrlRef, now: Timestamp) -> Result<String, CliError> {
    let issuer = distinguished_name(list.issuer_name());
    match list.next_update().and_then(timestamp) {
        Some(until) if now < until => Ok(format!("revocation list of {issuer}, valid until {until}")),
        _ => Err(CliError::new(Exit::Security, format!("the revocation list of {issuer} is out of date"))
            .help(remedy::trust(&TrustError::StaleCrl))),
    }
}

/// Checks a key file if it exists: the keys of other machines are not here.
fn key(path: &Path, certificate: &Path, name: &str, matches: impl FnOnce(&PrivateKey) -> bool) -> Option<Finding> {
    let result = match PrivateKey::from_file(path, None) {
        Err(KeyError::Unreadable { source, .. }) if source.kind() == ErrorKind::NotFound => return None,
        // A passphrase is not a fault, but then the key cannot be compared with the certificate.
        Err(KeyError::NeedsPassphrase) => Ok(format!("{name}, encrypted, readable only by its owner")),
        Err(error) => Err(key_error(name, path, &error)),
        Ok(key) if matches(&key) => Ok(format!("{name}, readable only by its owner")),
        Ok(_) => Err(CliError::new(Exit::Security, format!("{name} does not belong to {}", certificate.display()))
            .help("use the two files that were created together, or issue both again")),
    };
    Some(Finding::new(path, result))
}

fn print(finding: &Finding) -> Result<(), CliError> {
    let paint = output::stdout_paint();
    let mark = if finding.ok { paint.green("ok  ") } else { paint.red("bad ") };
    output::line(&format!("{mark}  {}: {}", finding.file.display(), finding.message))?;
    finding.remedy.iter().try_for_each(|remedy| output::line(&format!("      {remedy}")))
}
