//! The files of a node: certificates, keys, revocation lists, rules and the audit log.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use openssl::asn1::{Asn1Time, Asn1TimeRef};
use openssl::x509::X509Crl;

use super::Finding;
use crate::audit;
use crate::certs::{Authority, CertificateDirectory, DirectoryCertificateStore, DirectoryError, KeyError, PrivateKey};
use crate::cli::error::{CliError, Exit};
use crate::cli::output::counted;
use crate::cli::{policy as rules, remedy};
use crate::clock::Timestamp;
use crate::packet::Identity;

const DAY: Duration = Duration::from_secs(86_400);
/// When a CA's end is near: everybody's certificates have to be made anew before.
const CA_SOON: Duration = DAY.saturating_mul(30);
/// The longest list of revoked certificates that is looked at, in bytes.
const MAX_CRL: u64 = 64 * 1024 * 1024;

/// Who can put files into the directory decides whom the node believes.
pub(super) fn directory(directory: &CertificateDirectory) -> Vec<Finding> {
    let path = directory.path();
    let finding = match std::fs::metadata(path).map(|metadata| metadata.permissions().mode() & 0o7777) {
        Ok(mode) if mode & 0o022 != 0 => Finding::fail(
            "directory",
            &CliError::new(
                Exit::Security,
                format!("{} has mode {mode:04o}: others than its owner can put another CA into it", path.display()),
            )
            .help(format!("run `chmod go-w {}`, and look at what is in it", path.display())),
        ),
        Ok(_) => Finding::ok("directory", path.display().to_string()),
        Err(error) => Finding::fail(
            "directory",
            &CliError::of(Exit::Security, &error)
                .context(path.display())
                .help(format!("make it with `nanite certs init --dir {}`", path.display())),
        ),
    };
    vec![finding]
}

/// The CA certificates, and by their validity the clock: it cannot be earlier than the CA's beginning.
pub(super) fn authorities(directory: &CertificateDirectory, now: Timestamp) -> Vec<Finding> {
    let trust = match directory.trust() {
        Ok(trust) => trust,
        Err(error) => {
            let failure = remedy::directory(&error, directory);
            return vec![Finding::fail("ca", &failure), Finding::skip("clock", "there is no CA to compare with")];
        }
    };
    let all: Vec<Authority> = trust.certificates().into_iter().filter_map(|x509| Authority::new(x509).ok()).collect();
    let mut findings: Vec<Finding> = all.iter().map(|ca| authority(ca, now)).collect();
    let key = directory.ca_key_path();
    match PrivateKey::from_file(&key, None) {
        Err(KeyError::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
        Err(error @ KeyError::TooOpen { .. }) => {
            let failure = CliError::of(Exit::Security, &error).context("the CA's key");
            findings.push(Finding::fail("ca key", &remedy::key(failure, &key, &error)));
        }
        _ => findings.push(Finding::warn(
            "ca key",
            format!("{} is on this machine: who has it can be everybody", key.display()),
            "a node does not need it: keep it where certificates are issued, and nowhere else",
        )),
    }
    findings.push(clock(&all, now));
    findings
}

fn authority(ca: &Authority, now: Timestamp) -> Finding {
    let name = ca.domain.as_ref().map_or_else(|| ca.subject.clone(), |domain| format!("of {domain}"));
    if now >= ca.not_after {
        let failure = CliError::new(Exit::Security, format!("the CA {name} expired at {}", ca.not_after))
            .help("make a new CA with `nanite certs init`, and issue all certificates anew");
        return Finding::fail("ca", &failure);
    }
    if ca.not_after.since(now) < CA_SOON {
        return Finding::warn(
            "ca",
            format!("the CA {name} expires at {}", ca.not_after),
            "make a new CA with `nanite certs init`, add its certificate to every ca.pem, and issue the certificates anew",
        );
    }
    Finding::ok("ca", format!("{name}, valid until {}", ca.not_after))
}

fn clock(all: &[Authority], now: Timestamp) -> Finding {
    match all.iter().map(|ca| ca.not_before).max() {
        Some(begin) if now < begin => {
            let failure = CliError::new(
                Exit::Security,
                format!("this machine says it is {now}, before the CA was made ({begin})"),
            )
            .help("set the clock: `timedatectl set-ntp true`, or `date --set`");
            Finding::fail("clock", &failure)
        }
        _ => Finding::ok("clock", format!("{now}: plausible, by the CA's certificate")),
    }
}

/// The node's own key and certificate.
pub(super) fn own(
    directory: &CertificateDirectory,
    identity: &Identity,
    passphrase: Option<&[u8]>,
    now: Timestamp,
) -> Vec<Finding> {
    let credentials = match directory.credentials(identity, passphrase, now) {
        Ok(credentials) => credentials,
        Err(error) => {
            let failure = remedy::directory(&error, directory);
            let is_key = matches!(error, DirectoryError::Key { .. } | DirectoryError::NoKey { .. });
            return if is_key {
                vec![Finding::fail("key", &failure), Finding::skip("certificate", "its key cannot be used")]
            } else {
                vec![Finding::fail("certificate", &failure)]
            };
        }
    };
    let certificate = credentials.certificate();
    let key = directory.key_path(identity).map(|path| path.display().to_string()).unwrap_or_default();
    let mut findings = vec![
        Finding::ok("key", format!("{key}, for its owner only")),
        Finding::ok("certificate", format!("{identity} of {}, belongs to the key", certificate.domain())),
    ];
    findings.push(match directory.trust().map(|trust| trust.verify(certificate, credentials.intermediates(), now)) {
        Ok(Ok(())) => Finding::ok("chain", "leads to the CA"),
        Ok(Err(error)) => {
            let failure = CliError::of(Exit::Security, &error).context(format!("the certificate of {identity}"));
            Finding::fail("chain", &failure.help(remedy::trust(&error)))
        }
        Err(_) => Finding::skip("chain", "there is no CA"),
    });
    let (left, lifetime) =
        (certificate.not_after().since(now), certificate.not_after().since(certificate.not_before()));
    findings.push(if left < lifetime / 3 {
        Finding::warn(
            "expiry",
            format!("the certificate expires at {}", certificate.not_after()),
            format!(
                "renew it with `nanite certs renew {} {} --dir {}`, where the CA's key is",
                identity.role(),
                identity.name(),
                directory.path().display()
            ),
        )
    } else {
        Finding::ok("expiry", format!("{} days left", left.as_secs() / DAY.as_secs()))
    });
    findings
}

/// The lists of what the CAs have revoked.
pub(super) fn revocation(path: &Path, now: Timestamp) -> Vec<Finding> {
    let failed = |why: String| {
        let failure = CliError::new(Exit::Security, format!("{}: {why}", path.display()));
        let help = "make a current list with `nanite certs crl` where the CA's key is, and copy it here as crl.pem";
        Finding::fail("revocation", &failure.help(help))
    };
    if !path.exists() {
        return vec![Finding::ok("revocation", format!("no {}: nothing is checked for revocation", path.display()))];
    }
    let crls = match crls(path) {
        Ok(crls) if crls.is_empty() => return vec![failed("it holds no revocation list in PEM".to_owned())],
        Ok(crls) => crls,
        Err(why) => return vec![failed(why)],
    };
    crls.iter()
        .map(|crl| {
            match crl.next_update().map(|next| (next, is_over(next, now), is_over(next, now.saturating_add(DAY)))) {
                Some((next, Some(true), _)) => {
                    failed(format!("the list is out of date since {next}: everybody is refused"))
                }
                Some((next, _, Some(true))) => Finding::warn(
                    "revocation",
                    format!("{}: the list is out of date at {next}, and everybody is refused then", path.display()),
                    "make a new one with `nanite certs crl` where the CA's key is, and copy it here",
                ),
                Some((next, Some(false), Some(false))) => {
                    Finding::ok("revocation", format!("list current until {next}"))
                }
                _ => failed("the list does not say until when it is current".to_owned()),
            }
        })
        .collect()
}

fn crls(path: &Path) -> Result<Vec<X509Crl>, String> {
    const BEGIN: &str = "-----BEGIN X509 CRL-----";
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.len() > MAX_CRL) {
        return Err(format!("it is longer than {MAX_CRL} bytes"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("it cannot be read: {error}"))?;
    let one = |rest: &str| {
        X509Crl::from_pem(format!("{BEGIN}{rest}").as_bytes())
            .map_err(|_| "it holds a list that cannot be read".to_owned())
    };
    text.split(BEGIN).skip(1).map(one).collect()
}

/// Whether a moment has come; none when it cannot be told.
fn is_over(moment: &Asn1TimeRef, now: Timestamp) -> Option<bool> {
    let now = Asn1Time::from_unix(i64::try_from(now.as_secs()).ok()?).ok()?;
    moment.compare(&now).ok().map(std::cmp::Ordering::is_le)
}

/// The other certificates in the directory.
pub(super) fn peers(directory: &CertificateDirectory, now: Timestamp) -> Vec<Finding> {
    // What is wrong with the directory itself is said elsewhere.
    let Ok(store) = DirectoryCertificateStore::open(directory.path(), now) else { return Vec::new() };
    let wrong = store.errors();
    if wrong.is_empty() {
        let known = counted(store.certificates().len(), "certificate");
        return vec![Finding::ok("peers", format!("{known} in the directory"))];
    }
    let help = format!("see all with `nanite certs verify --dir {}`", directory.path().display());
    wrong.into_iter().map(|error| Finding::warn("peers", error, help.clone())).collect()
}

/// The rules: without its policy a node does not start.
pub(super) fn policy(path: &Path) -> Finding {
    match rules::names(path) {
        Ok(names) if names.is_empty() => Finding::warn(
            "policy",
            format!("{} has no rules, so it denies everything", path.display()),
            "write rules, and try them with `nanite policy explain CALLER SERVICE --policy FILE`",
        ),
        Ok(names) => Finding::ok("policy", format!("{}: {}", path.display(), counted(names.len(), "rule"))),
        Err(error) => {
            let failure = CliError::new(Exit::Security, error.message()).help(error.remedy().unwrap_or_default());
            Finding::fail("policy", &failure)
        }
    }
}

/// The audit log: unbroken, where there is one.
pub(super) fn audit(path: &Path) -> Finding {
    let check = format!("see all with `nanite audit verify {}`", path.display());
    let failed = |why: String| Finding::fail("audit", &CliError::new(Exit::Security, why).help(check.clone()));
    if !path.exists() {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        return if parent.is_dir() {
            Finding::ok("audit", format!("{} is not there yet", path.display()))
        } else {
            let why = format!("the directory of {} is not there", path.display());
            let help = format!("make it with `mkdir -p {}`", parent.display());
            Finding::fail("audit", &CliError::new(Exit::Security, why).help(help))
        };
    }
    match audit::verify(path) {
        Ok(report) => match report.problems.first() {
            None => {
                Finding::ok("audit", format!("{}: {} in their places", path.display(), counted_lines(report.lines)))
            }
            Some(problem) => failed(format!("{}:{}: {}", problem.file.display(), problem.line, problem.reason)),
        },
        Err(error) => failed(format!("cannot read {}: {error}", path.display())),
    }
}

fn counted_lines(lines: u64) -> String {
    counted(usize::try_from(lines).unwrap_or(usize::MAX), "line")
}
