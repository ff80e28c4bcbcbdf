//! A node of this process: its identity and certificates, its serializer, its connection, its policy and audit log.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use zeroize::Zeroizing;

use super::args::Passphrase;
use super::config::Config;
use super::connection::BrokerArgs;
use super::error::{CliError, Exit};
use super::reload::Reload;
use super::runtime::Global;
use super::{output, policy, remedy, state_dir};
use crate::audit::{AuditLog, AuditOptions, Overflow};
use crate::certs::{CertificateDirectory, CertificateStore, DirectoryCertificateStore, TrustStore};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Role};
use crate::policy::Policy;
use crate::security::SecureSerializer;
use crate::serializer::{Json, MsgPack, PlainSerializer, Serializer, Yaml};
use crate::transport::{AmqpOptions, AmqpTransport};

/// The identity of the node, and its certificates.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
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

/// The identity of the node, its message format, and its broker.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
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
    /// When its certificate expires; none with plaintext.
    expires: Option<Timestamp>,
    /// How to read its certificate again; none with plaintext.
    pub reload: Option<Reload>,
    options: AmqpOptions,
}

/// A node's identity and its secure serializer.
pub(super) struct SecureNode {
    pub identity: Identity,
    pub serializer: Arc<SecureSerializer>,
    pub reload: Reload,
}

impl NodeArgs {
    /// Finds the identity and reads the certificates. The network is not used yet, so that mistakes here are reported at once.
    pub(super) fn node(&self, global: &Global, role: Role) -> Result<Node, CliError> {
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
            Some(name) => identity(role, &name)?,
            None => state_dir::generated_name(role)?,
        };
        let serializer = match self.format {
            Format::Json => PlainSerializer::new(identity.clone(), Json),
            Format::MsgPack => PlainSerializer::new(identity.clone(), MsgPack),
            Format::Yaml => PlainSerializer::new(identity.clone(), Yaml),
        };
        let options = self.broker.options(config)?.name(identity.as_str());
        Ok(Node { options, identity, serializer: Arc::new(serializer), expires: None, reload: None })
    }
}

impl Node {
    /// A node with these certificates and this broker.
    pub(super) fn new(SecureNode { identity, serializer, reload }: SecureNode, options: AmqpOptions) -> Self {
        let expires = Some(serializer.certificate().not_after());
        Self { options: options.name(identity.as_str()), identity, serializer, expires, reload: Some(reload) }
    }

    /// Connects to the broker.
    pub(super) async fn connect(&self) -> Result<crate::Node, CliError> {
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
        match self.expires {
            Some(expires) => format!("broker {}, certificate valid until {expires}", self.broker()),
            None => format!("broker {}, NOT SECURE: plaintext messages", self.broker()),
        }
    }
}

impl IdentityArgs {
    /// Reads the certificates of this node. `started_at`: see
    /// [`Builder::started_at`](crate::security::SecureSerializerBuilder::started_at).
    pub(super) fn secure(
        &self,
        config: &Config,
        role: Role,
        started_at: Option<Timestamp>,
    ) -> Result<SecureNode, CliError> {
        let now = SystemClock.now();
        let directory = self.directory(config, role)?;
        let failed = |error| remedy::directory(&error, &directory);
        let trust = directory.trust().map_err(failed)?;
        let identity = match self.token(config, role) {
            Some(name) => identity(role, &name)?,
            None => only_identity(&directory, role)?,
        };
        let passphrase = self.passphrase()?;
        let secret = passphrase.as_ref().map(|passphrase| passphrase.as_slice());
        let credentials = directory.credentials(&identity, secret, now).map_err(failed)?;
        let older = directory.older_credentials(&identity, secret, now).map_err(failed)?;
        trust.verify(credentials.certificate(), credentials.intermediates(), now).map_err(|error| {
            CliError::of(Exit::Security, &error)
                .context(format!("the certificate of {identity} is not trusted"))
                .help(remedy::trust(&error))
        })?;
        let files = Arc::new(DirectoryCertificateStore::open(directory.path(), now).map_err(failed)?);
        let trust = files.trust().unwrap_or_else(|| Arc::new(trust));
        let mut store: Arc<dyn CertificateStore> = files.clone();
        if !self.pinned {
            store = Arc::new(TrustStore::new(trust.clone()).with_known(store));
        }
        let mut builder = SecureSerializer::builder(credentials, store, trust.clone());
        if let Some(older) = older {
            builder = builder.older_credentials(older);
        }
        if let Some(started_at) = started_at {
            builder = builder.started_at(started_at);
        }
        let serializer = Arc::new(builder.build().map_err(|error| CliError::of(Exit::Security, &error))?);
        let reload = Reload {
            directory,
            identity: identity.clone(),
            passphrase,
            serializer: serializer.clone(),
            store: files,
            trust,
        };
        Ok(SecureNode { identity, serializer, reload })
    }

    /// The passphrase of the node's key, if one is given.
    pub(super) fn passphrase(&self) -> Result<Option<Zeroizing<Vec<u8>>>, CliError> {
        self.passphrase.read()
    }

    /// Whether a directory of certificates is given.
    pub(super) fn has_certs(&self, config: &Config) -> bool {
        config.certs(self.certs.as_deref()).is_some()
    }

    /// The directory of certificates. It is not read yet.
    pub(super) fn directory(&self, config: &Config, role: Role) -> Result<CertificateDirectory, CliError> {
        let directory = config.certs(self.certs.as_deref()).ok_or_else(|| {
            CliError::new(Exit::Usage, "no certificates: messages are signed and encrypted, so each node needs its own")
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

/// The identity with this name.
pub(super) fn identity(role: Role, name: &str) -> Result<Identity, CliError> {
    let article = if role == Role::Agent { "an" } else { "a" };
    let context = format!("'{}' cannot be the name of {article} {role}", name.escape_debug());
    Identity::new(role, name).map_err(CliError::failed(Exit::Usage, context))
}

/// The only identity of this role with a key in the directory.
fn only_identity(directory: &CertificateDirectory, role: Role) -> Result<Identity, CliError> {
    let path = directory.path().display();
    let names = names_with_keys(directory.path(), role);
    let (why, help) = match names.as_slice() {
        [only] => return identity(role, only),
        [] => (
            format!("{path} holds no {role}'s key"),
            format!("make one with `nanite certs issue {role} NAME --dir {path}`"),
        ),
        [first, ..] => (format!("there are several: {}", names.join(", ")), format!("choose one: `--token {first}`")),
    };
    Err(CliError::new(Exit::Usage, format!("which {role}? `--token` is not given, and {why}")).help(help))
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

/// The policy and the audit log of a node that runs for long.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Policy and audit")]
#[group(skip)]
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
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum AuditOverflow {
    #[default]
    Block,
    Drop,
}

impl PolicyArgs {
    /// Reads the rules, if any are given. A file that cannot be used is an error, never an empty policy.
    pub(super) fn policy(&self, global: &Global) -> Result<Option<Arc<dyn Policy>>, CliError> {
        self.policy.as_ref().or(global.config.file.policy.as_ref()).map(|path| policy::load(path)).transpose()
    }

    /// Opens the audit log, if one is given.
    pub(super) fn audit(&self, global: &Global) -> Result<Option<AuditLog>, CliError> {
        let overflow = match self.audit_overflow {
            AuditOverflow::Block => Overflow::Block,
            AuditOverflow::Drop => Overflow::Drop,
        };
        let open = |path| AuditLog::open(path, AuditOptions { overflow, ..AuditOptions::default() });
        self.audit.as_ref().or(global.config.file.audit.as_ref()).map(open).transpose().map_err(|error| {
            CliError::of(Exit::Failure, &error).help("check it with `nanite audit verify FILE`, or give another file")
        })
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
    fn n16_the_only_key_of_a_role_says_who_a_node_is() {
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
    fn n16_what_cannot_be_a_name_is_refused() {
        let error = identity(Role::Agent, "a b").unwrap_err();
        assert!(error.message().starts_with("'a b' cannot be the name of an agent: "), "{error:?}");
        assert!(identity(Role::Mapper, "").unwrap_err().message().contains("of a mapper"));
    }
}
