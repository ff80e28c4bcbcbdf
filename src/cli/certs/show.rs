//! `nanite certs list` and `show`: the certificates of a directory or a file, for people and as JSON.

use std::path::{Path, PathBuf};

use clap::Args;
use data_encoding::HEXLOWER;
use openssl::pkey::Id;
use openssl::x509::{X509, X509KeyUsage, X509Ref};
use serde::Serialize;

use super::files::DirectoryArgs;
use crate::certs::{
    CaCertificate, Certificate, Content, KeyId, Trust, TrustError, distinguished_name as name, read_certificates,
    timestamp,
};
use crate::cli::error::{CliError, Exit, chain};
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
    pub(super) fn run(self) -> Result<Exit, CliError> {
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
    fn print(&self, directory: &Path) -> Result<(), CliError> {
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
    serial: String,
    sha256: String,
}

impl Show {
    pub(super) fn run(self) -> Result<Exit, CliError> {
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

    fn print(&self, after_another: bool) -> Result<(), CliError> {
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
        for (label, value) in [
            ("valid", &format!("{} to {}{left}", self.not_before, self.not_after)),
            ("subject", &self.subject),
            ("issued by", &self.issuer),
            ("key", &self.key),
            ("key id", &self.key_id),
            ("usage", &usage),
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
