//! Checks of files: certificates, keys, revocation lists, the policy and the audit log.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use openssl::x509::X509Crl;

use super::finding::Finding;
use crate::certs::{
    CaCertificate, CertificateDirectory, Content, DirectoryCertificateStore, DirectoryError, KeyError, PrivateKey,
    TrustError,
};
use crate::cli::error::{CliError, Exit, Result};
use crate::cli::offline as rules;
use crate::cli::output::counted;
use crate::cli::{certs, node, remedy};
use crate::clock::Timestamp;
use crate::packet::{Identity, Role};

const DAY: Duration = Duration::from_secs(86_400);
/// A CA that expires within this time is a warning: all certificates must be issued again before that.
const CA_EXPIRES_SOON: Duration = DAY.saturating_mul(30);

/// The node to check: the named one, or the only one with a key in the directory.
pub(super) fn identity(directory: &CertificateDirectory, roles: &[Role], named: &[Identity]) -> Result<Identity> {
    let path = directory.path();
    if !path.is_dir() {
        return Err(remedy::directory(&DirectoryError::NoDirectory(path.to_owned()), directory));
    }
    let has_files = |identity: &Identity| {
        let paths = [directory.certificate_path(identity), directory.key_path(identity)];
        paths.iter().flatten().any(|path| path.exists())
    };
    let mut found = Vec::new();
    for role in roles {
        match named.iter().find(|identity| identity.role() == *role) {
            Some(identity) => found.extend(has_files(identity).then(|| identity.clone())),
            None => found
                .extend(node::names_with_keys(path, *role).iter().filter_map(|name| Identity::new(*role, name).ok())),
        }
    }
    let dir = path.display();
    Err(match (found.as_slice(), named) {
        ([only], _) | ([], [only]) => return Ok(only.clone()),
        ([], []) => CliError::new(Exit::Security, format!("{dir} contains no key of an agent or mapper"))
            .help(format!("issue one with `nanite certs issue agent NAME --dir {dir}`")),
        ([], [first, ..]) => {
            CliError::new(Exit::Security, format!("{dir} contains no files of an agent or mapper {}", first.name()))
                .help(format!("issue one with `nanite certs issue {} {} --dir {dir}`", first.role(), first.name()))
        }
        (several, _) => {
            let names: Vec<&str> = several.iter().map(Identity::as_str).collect();
            CliError::new(Exit::Usage, format!("which node? {dir} contains keys of {}", names.join(", ")))
                .help("choose one with `--token NAME`, and `--role agent` or `--role mapper`")
        }
    })
}

/// Write access to the directory decides which certificates the node trusts.
pub(super) fn directory(directory: &CertificateDirectory) -> Finding {
    let path = directory.path().display();
    match std::fs::metadata(directory.path()).map(|metadata| metadata.permissions().mode() & 0o7777) {
        Ok(mode) if mode & 0o022 != 0 => Finding::insecure(
            "directory",
            format!("{path} has mode {mode:04o}: users other than its owner can put another CA into it"),
            format!("run `chmod go-w {path}`, and check its contents"),
        ),
        Ok(_) => Finding::ok("directory", path.to_string()),
        Err(error) => Finding::insecure(
            "directory",
            format!("{path}: {error}"),
            format!("create it with `nanite certs init --dir {path}`"),
        ),
    }
}

/// The CA certificates, and by their validity the clock of this machine.
pub(super) fn authorities(directory: &CertificateDirectory, now: Timestamp) -> Vec<Finding> {
    let trust = match directory.trust() {
        Ok(trust) => trust,
        Err(error) => {
            let failure = remedy::directory(&error, directory);
            return vec![Finding::fail("ca", &failure), Finding::skip("clock", "there is no CA to compare with")];
        }
    };
    let all: Vec<CaCertificate> =
        trust.certificates().into_iter().filter_map(|x509| CaCertificate::new(x509).ok()).collect();
    let mut findings: Vec<Finding> = all.iter().map(|ca| authority(ca, now)).collect();
    let key = directory.ca_key_path();
    match PrivateKey::from_file(&key, None) {
        Err(KeyError::Unreadable { source, .. }) if source.kind() == ErrorKind::NotFound => {}
        Err(error @ KeyError::TooOpen { .. }) => {
            let failure = CliError::of(Exit::Security, &error);
            findings.push(Finding::fail("ca key", &remedy::key(failure, &key, &error)));
        }
        _ => findings.push(Finding::warn(
            "ca key",
            format!("{} is on this machine: with it, anyone can impersonate every node", key.display()),
            "a node does not need it: keep it only where certificates are issued",
        )),
    }
    findings.push(match all.iter().map(|ca| ca.not_before).max() {
        Some(created) if now < created => Finding::insecure(
            "clock",
            format!("this machine's clock says {now}, before the CA was created ({created})"),
            "set the clock: `timedatectl set-ntp true`, or `date --set`",
        ),
        _ => Finding::ok("clock", format!("{now}: plausible, by the CA's certificate")),
    });
    findings
}

fn authority(ca: &CaCertificate, now: Timestamp) -> Finding {
    match certs::authority(ca, now) {
        Err(error) => Finding::fail("ca", &error),
        Ok(message) if ca.not_after.since(now) < CA_EXPIRES_SOON => {
            let help = "create a new CA with `nanite certs init`, add its certificate to every ca.pem, and issue all certificates again";
            Finding::warn("ca", format!("{message}: it expires soon"), help)
        }
        Ok(message) => Finding::ok("ca", message),
    }
}

/// The node's own key and certificate.
pub(super) fn credentials(
    directory: &CertificateDirectory,
    identity: &Identity,
    passphrase: Option<&[u8]>,
    now: Timestamp,
) -> Vec<Finding> {
    let credentials = match directory.credentials(identity, passphrase, now) {
        Ok(credentials) => credentials,
        Err(error) => {
            let failure = remedy::directory(&error, directory);
            return match error {
                DirectoryError::Key { .. } | DirectoryError::NoKey { .. } => {
                    vec![Finding::fail("key", &failure), Finding::skip("certificate", "its key cannot be used")]
                }
                _ => vec![Finding::fail("certificate", &failure)],
            };
        }
    };
    let certificate = credentials.certificate();
    let key = directory.key_path(identity).map(|path| path.display().to_string()).unwrap_or_default();
    let chain = match directory.trust().map(|trust| trust.verify(certificate, credentials.intermediates(), now)) {
        Ok(Ok(())) => Finding::ok("chain", "leads to the CA"),
        Ok(Err(error)) => {
            Finding::insecure("chain", format!("the certificate of {identity}: {error}"), remedy::trust(&error))
        }
        Err(_) => Finding::skip("chain", "there is no CA"),
    };
    let not_after = certificate.not_after();
    let left = not_after.since(now);
    let expiry = if left < not_after.since(certificate.not_before()) / 3 {
        let (role, name, dir) = (identity.role(), identity.name(), directory.path().display());
        Finding::warn(
            "expiry",
            format!("the certificate expires at {not_after}"),
            format!("renew it with `nanite certs renew {role} {name} --dir {dir}` on the machine with the CA key"),
        )
    } else {
        Finding::ok("expiry", format!("{} days left", left.as_secs() / DAY.as_secs()))
    };
    vec![
        Finding::ok("key", format!("{key}, readable only by its owner")),
        Finding::ok("certificate", format!("{identity} of {}, matches the key", certificate.domain())),
        chain,
        expiry,
    ]
}

/// The revocation lists of the CAs.
pub(super) fn revocation(directory: &CertificateDirectory, now: Timestamp) -> Vec<Finding> {
    let path = directory.crl_path();
    if !path.exists() {
        return vec![Finding::ok("revocation", format!("no {}: nothing is checked for revocation", path.display()))];
    }
    let lists = match directory.read_file("crl.pem") {
        Ok(Content::Revocations(lists)) => lists,
        Ok(_) => Vec::new(),
        Err(error) => return vec![Finding::fail("revocation", &remedy::directory(&error, directory))],
    };
    let is_current = |list: &X509Crl, at| certs::revocation_list(list, at);
    let finding = |list| match (is_current(list, now), is_current(list, now.saturating_add(DAY))) {
        (Err(error), _) => Finding::fail("revocation", &error),
        (Ok(message), Err(_)) => Finding::warn(
            "revocation",
            format!("{message}: without a newer one, all certificates are refused then"),
            remedy::trust(&TrustError::StaleCrl),
        ),
        (Ok(message), Ok(_)) => Finding::ok("revocation", message),
    };
    lists.iter().map(finding).collect()
}

/// The other certificates in the directory.
pub(super) fn peers(directory: &CertificateDirectory, now: Timestamp) -> Vec<Finding> {
    // Errors of the directory itself are reported by other checks.
    let Ok(store) = DirectoryCertificateStore::open(directory.path(), now) else { return Vec::new() };
    let errors = store.errors();
    if errors.is_empty() {
        let count = counted(store.certificates().len(), "certificate");
        return vec![Finding::ok("peers", format!("{count} in the directory"))];
    }
    let help = format!("run `nanite certs verify --dir {}`", directory.path().display());
    errors.into_iter().map(|error| Finding::warn("peers", error, help.clone())).collect()
}

/// The rules: a node does not start with a policy file that cannot be used.
pub(super) fn policy(path: &Path) -> Finding {
    let path_shown = path.display();
    match rules::names(path) {
        Ok(names) if names.is_empty() => Finding::warn(
            "policy",
            format!("{path_shown} has no rules: it denies everything"),
            "write rules, and test them with `nanite policy explain CALLER SERVICE --policy FILE`",
        ),
        Ok(names) => Finding::ok("policy", format!("{path_shown}: {}", counted(names.len(), "rule"))),
        Err(error) => Finding::insecure("policy", error.message(), error.remedy().unwrap_or_default()),
    }
}

/// The audit log: its chain is intact, if it exists.
pub(super) fn audit(path: &Path) -> Finding {
    let shown = path.display();
    if !path.exists() {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        return if parent.is_dir() {
            Finding::ok("audit", format!("{shown} does not exist yet"))
        } else {
            let help = format!("create it with `mkdir -p {}`", parent.display());
            Finding::insecure("audit", format!("the directory of {shown} does not exist"), help)
        };
    }
    let problem = match crate::audit::verify(path) {
        Ok(report) => match report.problems.first() {
            None => {
                let lines = counted(usize::try_from(report.lines).unwrap_or(usize::MAX), "line");
                return Finding::ok("audit", format!("{shown}: {lines}, none changed, missing or moved"));
            }
            Some(problem) => format!("{}:{}: {}", problem.file.display(), problem.line, problem.reason),
        },
        Err(error) => format!("cannot read {shown}: {error}"),
    };
    Finding::insecure("audit", problem, format!("run `nanite audit verify {shown}`"))
}
