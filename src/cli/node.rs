//! A node of this process: its identity, by a certificate and key from a directory; its connection to the broker, policy and audit log.
//! A running node reads certificate and key again when they change, and at SIGHUP.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use tokio::signal::unix::SignalKind;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};
use zeroize::Zeroizing;

use super::args::Passphrase;
use super::config::Config;
use super::connection::BrokerArgs;
use super::error::{CliError, Exit, Result};
use super::runtime::Global;
use super::{offline, output, remedy, runtime, state_dir};
use crate::audit::{AuditLog, AuditOptions, Overflow};
use crate::certs::{CertificateDirectory, CertificateStore, DirectoryCertificateStore, Trust, TrustError, TrustStore};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Role};
use crate::policy::Policy;
use crate::security::SecureSerializer;
use crate::serializer::{Json, MsgPack, PlainSerializer, Serializer, Yaml};
use crate::transport::{AmqpOptions, AmqpTransport};

/// How often the files are checked for changes. A check takes microseconds.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// The identity of the node, and its certificates.
#[derive(Debug, Default, clap::Args)]
pub(super) struct IdentityArgs {
    /// The NAME in its certificate; not needed when the directory holds one key of the role [also: NANITE_TOKEN]
    #[arg(long, value_name = "NAME", help_heading = "Identity")]
    token: Option<String>,
    /// The directory of certificates and keys that `nanite certs` made [also: NANITE_CERTS]
    #[arg(long, value_name = "DIR", help_heading = "Identity")]
    certs: Option<PathBuf>,
    /// Trust only certificates that are in the directory, besides being issued by its CA; others are not learned
    #[arg(long, help_heading = "Identity")]
    pinned: bool,
    #[command(flatten)]
    passphrase: Passphrase,
}

impl IdentityArgs {
    /// Reads the certificates of this node. `started_at`: see
    /// [`Builder::started_at`](crate::security::SecureSerializerBuilder::started_at).
    pub(super) fn secure(&self, config: &Config, role: Role, started_at: Option<Timestamp>) -> Result<SecureNode> {
        let now = SystemClock.now();
        let directory = self.directory(config, role)?;
        let failed = |error| remedy::directory(&error, &directory);
        let trust = directory.trust().map_err(failed)?;
        let identity = match self.token(config, role) {
            Some(name) => named(role, &name)?,
            None => only_identity(&directory, role)?,
        };
        let passphrase = self.passphrase()?;
        let secret = passphrase.as_ref().map(|passphrase| passphrase.as_slice());
        let credentials = directory.credentials(&identity, secret, now).map_err(failed)?;
        let older = directory.previous_credentials(&identity, secret, now).map_err(failed)?;
        trust.verify(credentials.certificate(), credentials.intermediates(), now).map_err(|error| {
            CliError::of(Exit::Security, &error)
                .context(format!("the certificate of {identity} is not trusted"))
                .help(remedy::trust(&error))
        })?;
        let files = Arc::new(DirectoryCertificateStore::open(directory.path(), now).map_err(failed)?);
        let trust = files.trust().unwrap_or_else(|| Arc::new(trust));
        let mut store: Arc<dyn CertificateStore> = files.clone();
        if !self.pinned {
            store = Arc::new(TrustStore::new(trust.clone()).with_store(store));
        }
        let mut builder = SecureSerializer::builder(credentials, store, trust.clone());
        if let Some(older) = older {
            builder = builder.previous_credentials(older);
        }
        if let Some(started_at) = started_at {
            builder = builder.started_at(started_at);
        }
        let serializer = Arc::new(builder.build().map_err(|error| CliError::of(Exit::Security, &error))?);
        Ok(SecureNode { directory, identity, passphrase, serializer, store: files, trust })
    }

    /// The passphrase of the node's key, if one is given.
    pub(super) fn passphrase(&self) -> Result<Option<Zeroizing<Vec<u8>>>> {
        self.passphrase.read()
    }

    /// Whether a directory of certificates is given.
    pub(super) fn has_certs(&self, config: &Config) -> bool {
        config.certs(self.certs.as_deref()).is_some()
    }

    /// The directory of certificates. It is not read yet.
    pub(super) fn directory(&self, config: &Config, role: Role) -> Result<CertificateDirectory> {
        let directory = config.certs(self.certs.as_deref()).ok_or_else(|| {
            CliError::usage("no certificates: messages are signed and encrypted, so each node needs its own")
                .help(format!(
                    "give the directory with `--certs DIR`, NANITE_CERTS or nanite.toml; make one with `nanite certs init \
                     --dir DIR` and `nanite certs issue {role} NAME --dir DIR`"
                ))
        })?;
        Ok(CertificateDirectory::new(directory))
    }

    /// The name of the node, if one is given.
    pub(super) fn token(&self, config: &Config, role: Role) -> Option<String> {
        config.token(self.token.as_deref(), role)
    }
}

/// The identity with this name.
pub(super) fn named(role: Role, name: &str) -> Result<Identity> {
    let article = if role == Role::Agent { "an" } else { "a" };
    let context = format!("'{}' cannot be the name of {article} {role}", name.escape_debug());
    Identity::new(role, name).map_err(CliError::failed(Exit::Usage, context))
}

/// The only identity of this role with a key in the directory.
fn only_identity(directory: &CertificateDirectory, role: Role) -> Result<Identity> {
    let path = directory.path().display();
    let names = names_with_keys(directory.path(), role);
    let (why, help) = match names.as_slice() {
        [only] => return named(role, only),
        [] => (
            format!("{path} holds no {role}'s key"),
            format!("make one with `nanite certs issue {role} NAME --dir {path}`"),
        ),
        [first, ..] => (format!("there are several: {}", names.join(", ")), format!("choose one: `--token {first}`")),
    };
    Err(CliError::usage(format!("which {role}? `--token` is not given, and {why}")).help(help))
}

/// The names in `ROLE-NAME-key.pem`, sorted. None if the directory cannot be read, which is reported when it is used.
pub(super) fn names_with_keys(directory: &Path, role: Role) -> Vec<String> {
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let name = |file: std::fs::DirEntry| {
        let file = file.file_name().into_string().ok()?;
        let name = file.strip_prefix(role.as_str())?.strip_prefix('-')?.strip_suffix("-key.pem")?;
        Identity::new(role, name).ok().map(|identity| identity.name().to_owned())
    };
    let mut names: Vec<String> = files.filter_map(name).collect();
    names.sort();
    names
}

/// The identity and the serializer of a node, and what it needs to read its certificate again.
#[derive(Clone)]
pub(super) struct SecureNode {
    directory: CertificateDirectory,
    pub identity: Identity,
    passphrase: Option<Zeroizing<Vec<u8>>>,
    pub serializer: Arc<SecureSerializer>,
    pub store: Arc<DirectoryCertificateStore>,
    trust: Arc<Trust>,
}

/// The state of the node's own certificate.
#[derive(PartialEq, Eq)]
enum CertificateState {
    Valid,
    /// Less than a third of its lifetime is left.
    RenewalDue,
    /// Other nodes refuse it.
    Invalid(TrustError),
}

/// Watches the files until it is dropped.
pub(super) struct Watcher(AbortHandle);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Changes with the file: inode, size, and the times of its content and of its metadata.
type FileVersion = Option<(u64, u64, i64, i64, i64, i64)>;

fn file_version(path: &Path) -> FileVersion {
    let file = std::fs::metadata(path).ok()?;
    Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()))
}

impl SecureNode {
    /// Reads certificate and key again at SIGHUP and when their files change, and calls `announce` when there is a new certificate.
    /// If they cannot be used, that is logged and the node keeps what it has.
    pub(super) fn watch(self, announce: impl Fn() + Send + 'static) -> Result<Watcher> {
        let mut hangups = runtime::handle(SignalKind::hangup())?;
        let task = tokio::spawn(async move {
            let mut ticks = interval(CHECK_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut seen = self.file_versions();
            let mut state = CertificateState::Valid;
            loop {
                let requested = tokio::select! {
                    _ = hangups.recv() => true,
                    _ = ticks.tick() => false,
                };
                let before = std::mem::replace(&mut state, self.state());
                if state != before {
                    self.log_state(&state);
                }
                let now = self.file_versions();
                if !requested && now == seen {
                    continue;
                }
                seen = now;
                let files = self.clone();
                match tokio::task::spawn_blocking(move || files.read()).await {
                    Ok(Ok(true)) => announce(),
                    Ok(Ok(false)) => {}
                    Ok(Err(error)) => tracing::error!(
                        remedy = error.remedy(),
                        "the certificate of {} stays as it is: {}",
                        self.identity,
                        error.message()
                    ),
                    Err(_) => return,
                }
            }
        });
        Ok(Watcher(task.abort_handle()))
    }

    fn state(&self) -> CertificateState {
        let (now, certificate) = (SystemClock.now(), self.serializer.certificate());
        let (from, to) = (certificate.not_before(), certificate.not_after());
        match self.serializer.check_own_certificate(now) {
            Err(error) => CertificateState::Invalid(error),
            Ok(()) if to.since(now) < to.since(from) / 3 => CertificateState::RenewalDue,
            Ok(()) => CertificateState::Valid,
        }
    }

    fn log_state(&self, state: &CertificateState) {
        let identity = &self.identity;
        match state {
            CertificateState::Valid => tracing::info!("the certificate of {identity} is valid"),
            CertificateState::RenewalDue => tracing::warn!(
                remedy = format!("nanite certs renew {} {}", identity.role(), identity.name()),
                "the certificate of {identity} is due for renewal: it is valid until {}",
                self.serializer.certificate().not_after()
            ),
            CertificateState::Invalid(error) => tracing::error!(
                remedy = remedy::trust(error),
                "other nodes refuse messages of {identity}, because of its certificate: {error}"
            ),
        }
    }

    fn file_versions(&self) -> [FileVersion; 2] {
        let paths = [self.directory.certificate_path(&self.identity), self.directory.key_path(&self.identity)];
        paths.map(|path| path.ok().and_then(|path| file_version(&path)))
    }

    /// Reads the files; whether there is a new certificate in use.
    fn read(&self) -> Result<bool> {
        let now = SystemClock.now();
        let failed = |error| remedy::directory(&error, &self.directory);
        self.store.reload(now).map_err(failed)?;
        let secret = self.passphrase.as_ref().map(|passphrase| passphrase.as_slice());
        let new = self.directory.credentials(&self.identity, secret, now).map_err(failed)?;
        let certificate = new.certificate().clone();
        if certificate.fingerprint() == self.serializer.certificate().fingerprint() {
            return Ok(false);
        }
        self.trust.verify(&certificate, new.intermediates(), now).map_err(|error| {
            let failure = CliError::of(Exit::Security, &error).context("the new certificate is not trusted");
            failure.help(remedy::trust(&error))
        })?;
        let older = self.directory.previous_credentials(&self.identity, secret, now).map_err(failed)?;
        let replaced = self.serializer.replace_credentials(new, older.into_iter().collect(), now);
        replaced.map_err(|error| CliError::of(Exit::Security, &error))?;
        output::note(&format!("{} has a new certificate, valid until {}", self.identity, certificate.not_after()));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[&str]) -> (tempfile::TempDir, CertificateDirectory) {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            std::fs::write(dir.path().join(file), "").unwrap();
        }
        let directory = CertificateDirectory::new(dir.path());
        (dir, directory)
    }

    #[test]
    fn n16_identity_defaults_to_only_key_in_directory() {
        let (_dir, one) = directory(&["ca-key.pem", "agent-fred-key.pem", "mapper-m1-key.pem", "agent-bob.pem"]);
        assert_eq!(only_identity(&one, Role::Agent).unwrap(), Identity::agent("fred").unwrap());
        assert_eq!(only_identity(&one, Role::Mapper).unwrap(), Identity::mapper("m1").unwrap());
        let (_dir, two) = directory(&["agent-fred-key.pem", "agent-bob-key.pem", "agent-..-key.pem"]);
        let error = only_identity(&two, Role::Agent).unwrap_err();
        assert!(error.message().contains("several: bob, fred"), "{error:?}");
        let error = only_identity(&two, Role::Mapper).unwrap_err();
        assert!(error.message().contains("holds no mapper's key"), "{error:?}");
    }

    #[test]
    fn n16_rejects_invalid_node_name() {
        let error = named(Role::Agent, "a b").unwrap_err();
        assert!(error.message().starts_with("'a b' cannot be the name of an agent: "), "{error:?}");
        assert!(named(Role::Mapper, "").unwrap_err().message().contains("of a mapper"));
    }
}

/// The identity of the node, its message format, and its broker.
#[derive(Debug, Default, clap::Args)]
pub(super) struct NodeArgs {
    #[command(flatten)]
    identity: IdentityArgs,
    #[command(flatten)]
    broker: BrokerArgs,
    /// Neither sign nor encrypt: everybody who reaches the broker can read, forge and replay all messages
    #[arg(long, conflicts_with = "certs", help_heading = "Connection")]
    insecure_plaintext: bool,
    /// The format of plaintext messages
    #[arg(
        long,
        value_name = "FORMAT",
        requires = "insecure_plaintext",
        default_value = "json",
        help_heading = "Connection"
    )]
    format: Format,
}

// The description of the command is that of `A`, because it is flattened last.
#[derive(Debug, clap::Args)]
pub(super) struct WithNode<A: clap::Args> {
    #[command(flatten)]
    pub node: NodeArgs,
    #[command(flatten)]
    pub args: A,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Format {
    #[default]
    Json,
    #[value(name = "msgpack")]
    MsgPack,
    Yaml,
}

/// A node that is not connected yet.
pub(super) struct Node {
    pub identity: Identity,
    pub serializer: Arc<dyn Serializer>,
    /// None with plaintext.
    pub secure: Option<SecureNode>,
    options: AmqpOptions,
}

impl NodeArgs {
    /// Finds the identity and reads the certificates. The network is not used yet, so that mistakes here are reported at once.
    pub(super) fn node(&self, global: &Global, role: Role) -> Result<Node> {
        let config = &global.config;
        if !self.insecure_plaintext {
            let secure = self.identity.secure(config, role, None)?;
            return Ok(Node::new(secure, self.broker.options(config)?));
        }
        output::note(&output::stderr_paint().red(
            "WARNING: --insecure-plaintext: messages are neither signed nor encrypted. Everybody who reaches the broker can read \
             them, forge them, and have this node run their requests.",
        ));
        let identity = match self.identity.token(config, role) {
            Some(name) => named(role, &name)?,
            None => state_dir::generated_name(role)?,
        };
        let serializer = match self.format {
            Format::Json => PlainSerializer::new(identity.clone(), Json),
            Format::MsgPack => PlainSerializer::new(identity.clone(), MsgPack),
            Format::Yaml => PlainSerializer::new(identity.clone(), Yaml),
        };
        let options = self.broker.options(config)?.connection_name(identity.as_str());
        Ok(Node { options, identity, serializer: Arc::new(serializer), secure: None })
    }
}

impl Node {
    /// A node with these certificates and this broker.
    pub(super) fn new(secure: SecureNode, options: AmqpOptions) -> Self {
        let (identity, serializer) = (secure.identity.clone(), secure.serializer.clone());
        Self { options: options.connection_name(identity.as_str()), identity, serializer, secure: Some(secure) }
    }

    /// Connects to the broker.
    pub(super) async fn connect(&self) -> Result<crate::Node> {
        let transport = AmqpTransport::connect(self.options.clone()).await;
        let transport = transport.map_err(|error| remedy::transport(&error, Some(&self.broker())))?;
        Ok(crate::Node::new(self.serializer.clone(), transport))
    }

    /// The broker's URL, without a password.
    pub(super) fn broker(&self) -> String {
        self.options.to_string()
    }

    /// The broker, and when the certificate expires.
    pub(super) fn describe(&self) -> String {
        match &self.secure {
            Some(secure) => {
                let expires = secure.serializer.certificate().not_after();
                format!("broker {}, certificate valid until {expires}", self.broker())
            }
            None => format!("broker {}, NOT SECURE: plaintext messages", self.broker()),
        }
    }
}

/// Builder steps for options that may not be given.
pub(super) trait WithOption: Sized {
    fn with_option<T>(self, value: Option<T>, step: impl FnOnce(Self, T) -> Self) -> Self {
        match value {
            Some(value) => step(self, value),
            None => self,
        }
    }
}

impl<B> WithOption for B {}

/// The policy and the audit log of a node that runs for long.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Policy and audit")]
pub(super) struct PolicyArgs {
    /// The rules for who may do what; what no rule allows is denied. TOML, or Cedar if the name ends in .cedar.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// The log of all that is accepted, refused, allowed and denied.
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,
    /// When events come faster than they can be written: block the node, or drop and count events.
    #[arg(long, value_name = "block|drop", default_value = "block", requires = "audit")]
    audit_overflow: AuditOverflow,
    /// How many old files of the audit log to keep, of 64 MiB each [default: all].
    #[arg(long, value_name = "N", requires = "audit")]
    audit_keep: Option<usize>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum AuditOverflow {
    #[default]
    Block,
    Drop,
}

impl PolicyArgs {
    /// Reads the rules, if any are given. A file that cannot be used is an error, never an empty policy.
    pub(super) fn policy(&self, global: &Global) -> Result<Option<Arc<dyn Policy>>> {
        self.policy.as_ref().or(global.config.file.policy.as_ref()).map(|path| offline::load(path)).transpose()
    }

    /// Opens the audit log, if one is given.
    pub(super) fn audit(&self, global: &Global) -> Result<Option<AuditLog>> {
        let overflow = match self.audit_overflow {
            AuditOverflow::Block => Overflow::Block,
            AuditOverflow::Drop => Overflow::Drop,
        };
        let options = AuditOptions::new().overflow(overflow).with_option(self.audit_keep, AuditOptions::keep_files);
        let open = |path| AuditLog::open(path, options);
        self.audit.as_ref().or(global.config.file.audit.as_ref()).map(open).transpose().map_err(|error| {
            CliError::of(Exit::Failure, &error).help("check it with `nanite audit verify FILE`, or give another file")
        })
    }
}
