//! `nanite certs show`: explains the certificates in a file to people.

use std::path::PathBuf;

use clap::Args;
use openssl::pkey::Id;
use openssl::x509::{X509, X509KeyUsage, X509Ref};
use serde::Serialize;

use super::days_left;
use crate::certs::{CaCertificate, Certificate, KeyId, read_certificates};
use crate::cli::error::{CliError, Exit};
use crate::cli::output;
use crate::clock::{Clock, SystemClock, Timestamp};

#[derive(Debug, Args)]
pub(in crate::cli) struct Show {
    /// A file with certificates in PEM.
    file: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// What a certificate says.
#[derive(Serialize)]
struct Explained {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
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
        let all = read_certificates(&self.file).map_err(|error| {
            CliError::of(Exit::Security, &error)
                .context(self.file.display())
                .help("give a file with certificates in PEM; keys and requests are not shown")
        })?;
        let now = SystemClock.now();
        let explained: Vec<Explained> = all.into_iter().map(|x509| explain(x509, now)).collect();
        if self.json {
            output::json(&explained)?;
        } else {
            for (at, one) in explained.iter().enumerate() {
                if at > 0 {
                    output::line("")?;
                }
                print(one)?;
            }
        }
        let usable = explained.iter().all(|one| one.unusable.is_none());
        Ok(if usable { Exit::Success } else { Exit::Security })
    }
}

fn explain(x509: X509, now: Timestamp) -> Explained {
    let (kind, identity, domain, unusable, validity) = match CaCertificate::new(x509.clone()) {
        Ok(ca) => ("ca", None, ca.domain, None, Some((ca.not_before, ca.not_after))),
        Err(_) => match Certificate::from_x509(x509.clone()) {
            Ok(node) => (
                node.identity().role().as_str(),
                Some(node.identity().to_string()),
                Some(node.domain().to_owned()),
                None,
                Some((node.not_before(), node.not_after())),
            ),
            Err(error) => ("other", None, None, Some(error.to_string()), None),
        },
    };
    let (not_before, not_after) = match validity {
        Some((from, to)) => (from.to_string(), to.to_string()),
        None => (x509.not_before().to_string(), x509.not_after().to_string()),
    };
    Explained {
        kind,
        identity,
        domain,
        unusable,
        subject: crate::certs::distinguished_name(x509.subject_name()),
        issuer: crate::certs::distinguished_name(x509.issuer_name()),
        not_before,
        not_after,
        days_left: validity.map_or(0, |(_, to)| days_left(to, now)),
        key: key(&x509),
        key_id: x509
            .subject_key_id()
            .and_then(|id| KeyId::new(id.as_slice()))
            .map(|id| id.to_string())
            .unwrap_or_default(),
        usage: usage(&x509),
        serial: x509.serial_number().to_bn().map(|serial| hex(&serial.to_vec())).unwrap_or_default(),
        sha256: x509.to_der().map(|der| hex(&openssl::sha::sha256(&der))).unwrap_or_default(),
    }
}

fn key(x509: &X509Ref) -> String {
    match x509.public_key() {
        Ok(key) if key.id() == Id::RSA => format!("RSA, {} bits", key.bits()),
        Ok(key) => {
            let curve = key.ec_key().ok().and_then(|key| key.group().curve_name());
            match curve.and_then(|curve| curve.short_name().ok()) {
                Some("prime256v1") => "P-256".to_owned(),
                Some(other) => other.to_owned(),
                None => "another type".to_owned(),
            }
        }
        Err(_) => "not readable".to_owned(),
    }
}

fn usage(x509: &X509Ref) -> Vec<&'static str> {
    const NAMES: [(X509KeyUsage, &str); 9] = [
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
    let usage = x509.key_usage().unwrap_or(X509KeyUsage::empty());
    NAMES.iter().filter(|(flag, _)| usage.contains(*flag)).map(|(_, name)| *name).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn print(one: &Explained) -> Result<(), CliError> {
    let paint = output::stdout_paint();
    let domain = one.domain.as_deref().unwrap_or("an unnamed domain");
    let title = match (&one.identity, &one.unusable) {
        (Some(identity), _) => format!("{identity}, {} of {domain}", one.kind),
        (None, None) => format!("CA of {domain}"),
        (None, Some(_)) => "certificate of no agent, mapper or CA".to_owned(),
    };
    output::line(&paint.bold(&title))?;
    if let Some(why) = &one.unusable {
        output::line(&format!("  {}", paint.red(&format!("cannot be used: {why}"))))?;
    }
    let left = match one.days_left {
        _ if one.unusable.is_some() => String::new(),
        ..0 => paint.red(" (expired)"),
        days => format!(" ({days} days left)"),
    };
    let usage = if one.usage.is_empty() { "not stated".to_owned() } else { one.usage.join(", ") };
    for (label, value) in [
        ("valid", format!("{} to {}{left}", one.not_before, one.not_after)),
        ("subject", one.subject.clone()),
        ("issued by", one.issuer.clone()),
        ("key", one.key.clone()),
        ("key id", one.key_id.clone()),
        ("usage", usage),
        ("serial", one.serial.clone()),
        ("SHA-256", one.sha256.clone()),
    ] {
        output::line(&format!("  {label:<9}  {value}"))?;
    }
    Ok(())
}
