//! `nanite certs list`, `show` and `verify`: the certificates of a directory or a file, and whether they would be accepted.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::Args;
use data_encoding::HEXLOWER;
use openssl::pkey::Id;
use openssl::x509::{X509, X509CrlRef, X509KeyUsage, X509Ref};
use serde::Serialize;

use super::files::{DirectoryArgs, key_error};
use crate::certs::distinguished_name as name;
use crate::certs::{
    CaCertificate, Certificate, CertificateDirectory, Content, Credentials, KeyError, KeyId, PrivateKey, Trust,
    TrustError, allows_nodes, distinguished_name, purposes, read_certificates, timestamp,
};
use crate::cli::error::{CliError, Exit, Result, chain};
use crate::cli::{output, remedy};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::Identity;

const SECONDS_PER_DAY: i64 = 86_400;
/// From this many days on, the remaining time is not highlighted.
const EXPIRES_SOON_DAYS: i64 = 7;

#[derive(Debug, Args)]
pub(in crate::cli) struct List {
    #[command(flatten)]
    directory: DirectoryArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Show {
    /// A file with certificates in PEM.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A node's or CA's certificate, or a revocation list.
#[derive(Serialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<Identity>,
    /// The subject of a CA, or the issuer of a revocation list.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<String>,
    domain: Option<String>,
    /// For a revocation list: its number of entries.
    #[serde(skip_serializing_if = "Option::is_none")]
    revokes: Option<usize>,
    revoked: bool,
    expires: String,
    days_left: i64,
    file: PathBuf,
}

#[derive(Serialize)]
struct FileError {
    file: PathBuf,
    message: String,
}

#[derive(Serialize)]
struct Listing {
    certificates: Vec<Row>,
    errors: Vec<FileError>,
    revocation_checked: bool,
}

impl List {
    pub(super) fn run(self) -> Result<Exit> {
        let directory = self.directory.open();
        let now = SystemClock.now();
        let trust = directory.trust().ok();
        let revocation_checked = trust.as_ref().is_some_and(Trust::checks_revocation);
        let is_revoked = |certificate: &Certificate| {
            let result = trust.as_ref().map(|trust| trust.verify(certificate, &[], now));
            matches!(result, Some(Err(TrustError::Revoked | TrustError::AuthorityRevoked)))
        };
        let mut listing = Listing { certificates: Vec::new(), errors: Vec::new(), revocation_checked };
        for entry in directory.entries().map_err(|error| remedy::directory(&error, &directory))? {
            let file = entry.path;
            let row = |domain, not_after: Timestamp| Row {
                identity: None,
                ca: None,
                domain,
                revokes: None,
                revoked: false,
                expires: not_after.to_string(),
                days_left: days_left(not_after, now),
                file: file.clone(),
            };
            let rows = &mut listing.certificates;
            match entry.content {
                Ok(Content::Authorities(authorities)) => rows.extend(
                    authorities.into_iter().map(|ca| Row { ca: Some(ca.subject), ..row(ca.domain, ca.not_after) }),
                ),
                Ok(Content::Revocations(lists)) => rows.extend(lists.iter().filter_map(|list| {
                    let revokes = Some(list.get_revoked().map_or(0, |revoked| revoked.len()));
                    let next_update = list.next_update().and_then(timestamp)?;
                    Some(Row { ca: Some(name(list.issuer_name())), revokes, ..row(None, next_update) })
                })),
                Ok(Content::Node(identity, held)) => rows.extend(held.certificates.iter().map(|certificate| Row {
                    identity: Some(identity.clone()),
                    revoked: is_revoked(certificate),
                    ..row(Some(certificate.domain().to_owned()), certificate.not_after())
                })),
                Err(error) => listing.errors.push(FileError { message: chain(&error), file }),
            }
        }
        output::json_or(self.json, &listing, |listing| listing.print(directory.path()))?;
        Ok(Exit::Success)
    }
}

impl Row {
    fn title(&self) -> String {
        match (&self.identity, &self.domain, self.revokes) {
            (Some(identity), ..) => identity.to_string(),
            (None, _, Some(count)) => format!("revoked: {count}"),
            (None, Some(domain), None) => format!("CA of {domain}"),
            (None, None, None) => format!("CA {}", self.ca.as_deref().unwrap_or_default()),
        }
    }

    fn remaining(&self) -> String {
        let paint = output::stdout_paint();
        match self.days_left {
            _ if self.revoked => paint.red(&format!("{:>9}", "revoked")),
            ..0 => paint.red(&format!("{:>9}", "expired")),
            days @ 0..EXPIRES_SOON_DAYS => paint.yellow(&format!("{days:>9}")),
            days => format!("{days:>9}"),
        }
    }
}

impl Listing {
    fn print(&self, directory: &Path) -> Result<()> {
        if self.certificates.is_empty() {
            output::note(&format!("no certificates in {}", directory.display()));
        } else {
            let width = self.certificates.iter().map(|row| row.title().chars().count()).max().unwrap_or(0);
            let head = format!("{:<width$}  {:<20}  {:>9}  {}", "IDENTITY", "EXPIRES", "DAYS LEFT", "FILE");
            output::line(&output::stdout_paint().bold(&head))?;
            for row in &self.certificates {
                let (title, file) = (row.title(), row.file.display());
                output::line(&format!("{title:<width$}  {:<20}  {}  {file}", row.expires, row.remaining()))?;
            }
            if !self.revocation_checked {
                output::line("no crl.pem: nothing is checked for revocation")?;
            }
        }
        for error in &self.errors {
            output::note(&format!("{} {}", output::stderr_paint().yellow("warning:"), error.message));
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct CertificateInfo {
    /// `ca`, `agent`, `mapper`, or `other`: a certificate that nanite cannot use.
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<Identity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    unusable: Option<String>,
    subject: String,
    issuer: String,
    not_before: String,
    not_after: String,
    days_left: i64,
    key: String,
    key_id: String,
    usage: Vec<&'static str>,
    /// The extended key usage, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    purposes: Option<Vec<String>>,
    /// Whether the extended key usage allows what nodes do.
    allows_nodes: bool,
    serial: String,
    sha256: String,
}

impl Show {
    pub(super) fn run(self) -> Result<Exit> {
        let certificates = read_certificates(&self.file).map_err(|error| {
            CliError::of(Exit::Security, &error)
                .help("give a file with certificates in PEM; keys and signing requests are not shown")
        })?;
        let now = SystemClock.now();
        let infos: Vec<_> = certificates.iter().map(|x509| CertificateInfo::new(x509, now)).collect();
        output::json_or(self.json, &infos, |infos| {
            infos.iter().enumerate().try_for_each(|(index, info)| info.print(index > 0))
        })?;
        let all_usable = infos.iter().all(|info| info.unusable.is_none());
        Ok(if all_usable { Exit::Success } else { Exit::Security })
    }
}

impl CertificateInfo {
    fn new(x509: &X509, now: Timestamp) -> Self {
        let mut info = Self {
            kind: "other",
            identity: None,
            domain: None,
            unusable: None,
            subject: name(x509.subject_name()),
            issuer: name(x509.issuer_name()),
            not_before: x509.not_before().to_string(),
            not_after: x509.not_after().to_string(),
            days_left: 0,
            key: key_type(x509),
            key_id: x509
                .subject_key_id()
                .and_then(|id| KeyId::new(id.as_slice()))
                .map_or_else(String::new, |id| id.to_string()),
            usage: key_usage(x509),
            purposes: purposes(x509),
            allows_nodes: allows_nodes(x509),
            serial: x509.serial_number().to_bn().map_or_else(|_| String::new(), |bn| HEXLOWER.encode(&bn.to_vec())),
            sha256: x509.to_der().map_or_else(|_| String::new(), |der| HEXLOWER.encode(&openssl::sha::sha256(&der))),
        };
        let (not_before, not_after) = if let Ok(ca) = CaCertificate::new(x509.clone()) {
            (info.kind, info.domain) = ("ca", ca.domain);
            (ca.not_before, ca.not_after)
        } else {
            match Certificate::from_x509(x509.clone()) {
                Ok(certificate) => {
                    info.kind = certificate.identity().role().as_str();
                    info.identity = Some(certificate.identity().clone());
                    info.domain = Some(certificate.domain().to_owned());
                    (certificate.not_before(), certificate.not_after())
                }
                Err(error) => return Self { unusable: Some(error.to_string()), ..info },
            }
        };
        let (not_before, not_after, days_left) =
            (not_before.to_string(), not_after.to_string(), days_left(not_after, now));
        Self { not_before, not_after, days_left, ..info }
    }

    fn print(&self, after_another: bool) -> Result<()> {
        let paint = output::stdout_paint();
        let separator = if after_another { "\n" } else { "" };
        let domain = self.domain.as_deref().unwrap_or("an unnamed domain");
        let title = match (&self.identity, &self.unusable) {
            (Some(identity), _) => format!("{identity}, {} of {domain}", self.kind),
            (None, None) => format!("CA of {domain}"),
            (None, Some(_)) => "not the certificate of an agent, mapper or CA".to_owned(),
        };
        output::line(&format!("{separator}{}", paint.bold(&title)))?;
        if let Some(reason) = &self.unusable {
            output::line(&format!("  {}", paint.red(&format!("cannot be used: {reason}"))))?;
        }
        let left = match self.days_left {
            _ if self.unusable.is_some() => String::new(),
            ..0 => paint.red(" (expired)"),
            days => format!(" ({days} days left)"),
        };
        let usage = if self.usage.is_empty() { "not stated".to_owned() } else { self.usage.join(", ") };
        let purposes = match (&self.purposes, self.allows_nodes) {
            (None, true) => "any".to_owned(),
            (None, false) => paint.red("not readable"),
            (Some(names), true) => names.join(", "),
            (Some(names), false) => paint.red(&format!("{} (not for nodes)", names.join(", "))),
        };
        for (label, value) in [
            ("valid", &format!("{} to {}{left}", self.not_before, self.not_after)),
            ("subject", &self.subject),
            ("issued by", &self.issuer),
            ("key", &self.key),
            ("key id", &self.key_id),
            ("usage", &usage),
            ("purposes", &purposes),
            ("serial", &self.serial),
            ("SHA-256", &self.sha256),
        ] {
            output::line(&format!("  {label:<9}  {value}"))?;
        }
        Ok(())
    }
}

fn key_type(x509: &X509Ref) -> String {
    let Ok(key) = x509.public_key() else { return "not readable".to_owned() };
    if key.id() == Id::RSA {
        return format!("RSA, {} bits", key.bits());
    }
    let curve = key.ec_key().ok().and_then(|key| key.group().curve_name());
    match curve.and_then(|curve| curve.short_name().ok()) {
        Some("prime256v1") => "P-256".to_owned(),
        Some(curve) => curve.to_owned(),
        None => "another type".to_owned(),
    }
}

fn key_usage(x509: &X509Ref) -> Vec<&'static str> {
    // The names of RFC 5280, section 4.2.1.3.
    let usage = x509.key_usage().unwrap_or(X509KeyUsage::empty());
    let names = [
        (X509KeyUsage::DIGITAL_SIGNATURE, "digitalSignature"),
        (X509KeyUsage::NON_REPUDIATION, "contentCommitment"),
        (X509KeyUsage::KEY_ENCIPHERMENT, "keyEncipherment"),
        (X509KeyUsage::DATA_ENCIPHERMENT, "dataEncipherment"),
        (X509KeyUsage::KEY_AGREEMENT, "keyAgreement"),
        (X509KeyUsage::KEY_CERT_SIGN, "keyCertSign"),
        (X509KeyUsage::CRL_SIGN, "cRLSign"),
        (X509KeyUsage::ENCIPHER_ONLY, "encipherOnly"),
        (X509KeyUsage::DECIPHER_ONLY, "decipherOnly"),
    ];
    names.into_iter().filter(|(flag, _)| usage.contains(*flag)).map(|(_, name)| name).collect()
}

/// Whole days until expiry; negative after it.
fn days_left(not_after: Timestamp, now: Timestamp) -> i64 {
    let (end, now) = (not_after.as_secs().cast_signed(), now.as_secs().cast_signed());
    end.saturating_sub(now).div_euclid(SECONDS_PER_DAY)
}

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
    fn new(file: &Path, result: Result<String>) -> Self {
        let (ok, message, remedy) = match result {
            Ok(message) => (true, message, None),
            Err(error) => (false, error.message().to_owned(), error.remedy().map(str::to_owned)),
        };
        Self { file: file.to_owned(), ok, message, remedy }
    }
}

impl Verify {
    pub(super) fn run(self) -> Result<Exit> {
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

fn verify(directory: &CertificateDirectory, now: Timestamp) -> Result<Vec<Finding>> {
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
pub(in crate::cli) fn authority(ca: &CaCertificate, now: Timestamp) -> Result<String> {
    let (message, help) = if now < ca.not_before {
        (format!("is not valid before {}", ca.not_before), "check the clock of this machine")
    } else if now >= ca.not_after {
        (format!("expired at {}", ca.not_after), "create a new CA and issue all certificates again")
    } else if !ca.x509.key_usage().is_some_and(|usage| usage.contains(X509KeyUsage::KEY_CERT_SIGN)) {
        ("may not sign certificates".to_owned(), "create a CA with `nanite certs init`")
    } else if !allows_nodes(&ca.x509) {
        let why = "is limited to other purposes: its extended key usage allows neither clientAuth nor emailProtection";
        (why.to_owned(), remedy::trust(&TrustError::AuthorityKeyUsage))
    } else {
        let name = ca.domain.as_ref().map_or_else(|| ca.subject.clone(), |domain| format!("of {domain}"));
        return Ok(format!("CA {name}, valid until {}", ca.not_after));
    };
    Err(CliError::new(Exit::Security, format!("the CA {} {message}", ca.subject)).help(help))
}

/// Whether a revocation list is current.
pub(in crate::cli) fn revocation_list(list: &X509CrlRef, now: Timestamp) -> Result<String> {
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

fn print(finding: &Finding) -> Result<()> {
    let paint = output::stdout_paint();
    let mark = if finding.ok { paint.green("ok  ") } else { paint.red("bad ") };
    output::line(&format!("{mark}  {}: {}", finding.file.display(), finding.message))?;
    finding.remedy.iter().try_for_each(|remedy| output::line(&format!("      {remedy}")))
}
