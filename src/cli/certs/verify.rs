//! `nanite certs verify`: whether the certificates and keys of a directory would be accepted, file by file.

use std::path::{Path, PathBuf};

use clap::Args;
use openssl::x509::{X509CrlRef, X509KeyUsage};
use serde::Serialize;

use super::Place;
use crate::certs::{
    CaCertificate, CertificateDirectory, CertificateFile, Content, Credentials, KeyError, PrivateKey, Trust,
    TrustError, distinguished_name, timestamp,
};
use crate::cli::error::{CliError, Exit};
use crate::cli::{output, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::Identity;

#[derive(Debug, Args)]
pub(in crate::cli) struct Verify {
    #[command(flatten)]
    place: Place,
    /// Only these files of the directory; all when none is given.
    files: Vec<PathBuf>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// What is to be said of a file.
#[derive(Serialize)]
struct Finding {
    file: PathBuf,
    ok: bool,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn good(file: &Path, message: String) -> Self {
        Self { file: file.to_owned(), ok: true, message, remedy: None }
    }

    fn bad(file: &Path, error: &CliError) -> Self {
        let remedy = error.remedy().map(str::to_owned);
        Self { file: file.to_owned(), ok: false, message: error.message().to_owned(), remedy }
    }
}

impl Verify {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let directory = self.place.directory();
        let now = SystemClock.now();
        let failed = |error| remedy::directory(&error, &directory);
        let trust = directory.trust().map_err(failed)?;
        let mut findings = Vec::new();
        for entry in directory.entries().map_err(failed)? {
            match entry.content {
                Ok(Content::Authorities(all)) => findings.extend(authorities(&entry.path, &all, &directory, now)),
                Ok(Content::Revocations(lists)) => {
                    findings.extend(lists.iter().map(|list| revocations(&entry.path, list, now)))
                }
                Ok(Content::Node(identity, held)) => {
                    findings.extend(node(&entry.path, &identity, &held, &directory, &trust, now));
                }
                Err(error) => findings.push(Finding::bad(&entry.path, &failed(error))),
            }
        }
        if !self.files.is_empty() {
            let canonical = |path: &PathBuf| path.canonicalize().ok();
            let wanted: Vec<_> = self.files.iter().map(canonical).collect();
            findings.retain(|finding| wanted.contains(&canonical(&finding.file)));
            if let Some(missing) =
                self.files.iter().find(|file| !findings.iter().any(|f| canonical(&f.file) == canonical(file)))
            {
                return Err(CliError::new(
                    Exit::Usage,
                    format!("{} is no certificate or key file of {}", missing.display(), directory.path().display()),
                )
                .help("name files of that directory, or put another one with `--dir`"));
            }
        }
        let all_good = findings.iter().all(|finding| finding.ok);
        if self.json {
            output::json(&findings)?
        } else {
            print(&findings)?
        }
        Ok(if all_good { Exit::Success } else { Exit::Security })
    }
}

fn authorities(path: &Path, all: &[CaCertificate], directory: &CertificateDirectory, now: Timestamp) -> Vec<Finding> {
    let mut findings = Vec::new();
    for ca in all {
        let problem = if now < ca.not_before {
            Some((
                format!("the CA {} is not valid before {}", ca.subject, ca.not_before),
                "check the clock of this machine",
            ))
        } else if now >= ca.not_after {
            Some((
                format!("the CA {} expired at {}", ca.subject, ca.not_after),
                "make a new CA, and issue the certificates anew",
            ))
        } else if !ca.x509.key_usage().is_some_and(|usage| usage.contains(X509KeyUsage::KEY_CERT_SIGN)) {
            Some((format!("the CA {} may not sign certificates", ca.subject), "make a CA with `nanite certs init`"))
        } else {
            None
        };
        findings.push(match problem {
            Some((message, help)) => Finding::bad(path, &CliError::new(Exit::Security, message).help(help)),
            None => {
                let name = ca.domain.as_ref().map_or_else(|| ca.subject.clone(), |domain| format!("of {domain}"));
                Finding::good(path, format!("CA {name}, valid until {}", ca.not_after))
            }
        });
    }
    let key_path = directory.ca_key_path();
    let matches =
        |key: &PrivateKey| all.iter().any(|ca| ca.x509.public_key().is_ok_and(|public| public.public_eq(key.pkey())));
    findings.extend(key(&key_path, path, matches, "the CA's key"));
    findings
}

fn node(
    path: &Path,
    identity: &Identity,
    held: &CertificateFile,
    directory: &CertificateDirectory,
    trust: &Trust,
    now: Timestamp,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for certificate in &held.certificates {
        findings.push(match trust.verify(certificate, &held.intermediates, now) {
            Ok(()) => Finding::good(path, format!("{identity}, valid until {}", certificate.not_after())),
            Err(error) => {
                let failure = CliError::of(Exit::Security, &error).context(format!("the certificate of {identity}"));
                Finding::bad(path, &failure.help(remedy::trust(&error)))
            }
        });
    }
    if let Ok(key_path) = directory.key_path(identity) {
        let matches = |key: &PrivateKey| {
            held.certificates.iter().any(|certificate| Credentials::new(certificate.clone(), key.clone()).is_ok())
        };
        findings.extend(key(&key_path, path, matches, &format!("the key of {identity}")));
    }
    findings
}

fn revocations(path: &Path, list: &X509CrlRef, now: Timestamp) -> Finding {
    let issuer = distinguished_name(list.issuer_name());
    match list.next_update().and_then(timestamp) {
        Some(until) if now < until => Finding::good(path, format!("revocation list of {issuer}, valid until {until}")),
        _ => Finding::bad(
            path,
            &CliError::new(Exit::Security, format!("the revocation list of {issuer} is out of date"))
                .help(remedy::trust(&TrustError::StaleCrl)),
        ),
    }
}

/// A key file is looked at where there is one: other machines' keys are not here.
fn key(path: &Path, certificate: &Path, matches: impl Fn(&PrivateKey) -> bool, whose: &str) -> Option<Finding> {
    let failure = match PrivateKey::from_file(path, None) {
        Err(KeyError::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return None,
        // That it is under a passphrase is no fault; whose it is cannot be seen.
        Err(KeyError::NeedsPassphrase) => {
            return Some(Finding::good(path, format!("{whose}, under a passphrase, for its owner only")));
        }
        Err(error) => remedy::key(CliError::of(Exit::Security, &error).context(whose), path, &error),
        Ok(key) if matches(&key) => return Some(Finding::good(path, format!("{whose}, for its owner only"))),
        Ok(_) => CliError::new(Exit::Security, format!("{whose} does not belong to {}", certificate.display()))
            .help("put the two files that were made together in one place, or issue both anew"),
    };
    Some(Finding::bad(path, &failure))
}

fn print(findings: &[Finding]) -> Result<(), CliError> {
    let paint = output::stdout_paint();
    for finding in findings {
        let mark = if finding.ok { paint.green("ok  ") } else { paint.red("bad ") };
        output::line(&format!("{mark}  {}: {}", finding.file.display(), finding.message))?;
        if let Some(remedy) = &finding.remedy {
            output::line(&format!("      {remedy}"))?;
        }
    }
    Ok(())
}
