//! A node of this process: who it is, how it speaks, and its way to the broker.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use zeroize::Zeroizing;

use super::config::Config;
use super::error::{CliError, Exit};
use super::reload::Reload;
use super::{Global, broker, kept, output, passphrase, remedy};
use crate::certs::{CertificateDirectory, CertificateStore, DirectoryCertificateStore, TrustStore};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Role};
use crate::security::SecureSerializer;
use crate::serializer::{Json, MsgPack, PlainSerializer, Serializer, Yaml};
use crate::transport::{AmqpOptions, AmqpTransport, Transport};

/// Who the node is, by a certificate.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub(super) struct Who {
    /// The NAME in its certificate; not needed when the directory holds one key of the role [also: NANITE_TOKEN]
    #[arg(long, value_name = "NAME", help_heading = "Identity")]
    token: Option<String>,
    /// The directory of certificates and keys that `nanite certs` made [also: NANITE_CERTS]
    #[arg(long, value_name = "DIR", help_heading = "Identity")]
    certs: Option<PathBuf>,
    /// Believe only the nodes whose certificates are in the directory, beside being issued by its CA; others are not learned
    #[arg(long, help_heading = "Identity")]
    pinned: bool,
    #[command(flatten)]
    passphrase: passphrase::Args,
}

/// Who the node is, how it speaks, and where the broker is.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    #[command(flatten)]
    who: Who,
    #[command(flatten)]
    broker: broker::Args,
    /// Neither sign nor encrypt: everybody who reaches the broker can read, forge and replay all messages
    #[arg(long, conflicts_with = "certs", help_heading = "Connection")]
    insecure_plaintext: bool,
    /// The format of plain messages
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
    /// Until when its certificate is valid; none when it speaks in plain.
    pub valid_until: Option<Timestamp>,
    /// What follows its certificate files; none when it speaks in plain.
    pub reload: Option<Reload>,
    options: AmqpOptions,
}

/// A node's certificate and key, and those of the others.
pub(super) struct Secure {
    pub identity: Identity,
    pub serializer: Arc<SecureSerializer>,
    pub valid_until: Timestamp,
    pub reload: Reload,
}

impl Args {
    /// Finds out who the node is and reads its certificates. The network is not touched yet, so that what is wrong here is said
    /// at once.
    ///
    /// # Errors
    /// [`CliError`] with what is missing or wrong.
    pub(super) fn node(&self, global: &Global, role: Role) -> Result<Node, CliError> {
        let config = &global.config;
        let (identity, serializer, valid_until, reload): (_, Arc<dyn Serializer>, _, _) = if self.insecure_plaintext {
            warn_of_plaintext();
            let identity = self.who.plain_identity(config, role)?;
            (identity.clone(), Arc::new(self.format.serializer(identity)), None, None)
        } else {
            let secure = self.who.secure(config, role, None)?;
            (secure.identity, secure.serializer, Some(secure.valid_until), Some(secure.reload))
        };
        let options = broker_options(&self.broker, config)?;
        Ok(Node { options: options.connection_name(identity.as_str()), identity, serializer, valid_until, reload })
    }
}

/// How to connect to the broker that the command line, the environment and the file name.
///
/// # Errors
/// [`CliError`] with what is wrong with the address or the files for it.
pub(super) fn broker_options(broker: &broker::Args, config: &Config) -> Result<AmqpOptions, CliError> {
    let broker = broker.resolve(config)?;
    let mut options = AmqpOptions::new(&broker.url).map_err(|error| remedy::transport(&error, None))?;
    if let Some(password) = &broker.password {
        options = options.password(password.as_str());
    }
    if let Some(tls) = broker.tls {
        options = options.tls(tls);
    }
    Ok(options)
}

impl Node {
    /// A node with these certificates, at this broker.
    pub(super) fn of(secure: Secure, options: AmqpOptions) -> Self {
        let Secure { identity, serializer, valid_until, reload } = secure;
        Self { identity, serializer, valid_until: Some(valid_until), reload: Some(reload), options }
    }

    /// Connects to the broker.
    ///
    /// # Errors
    /// [`CliError`] when it cannot be reached, or refuses.
    pub(super) async fn connect(&self) -> Result<Arc<dyn Transport>, CliError> {
        match AmqpTransport::connect(self.options.clone()).await {
            Ok(transport) => Ok(Arc::new(transport)),
            Err(error) => Err(remedy::transport(&error, Some(&self.broker()))),
        }
    }

    /// The broker's URL, without a password.
    pub(super) fn broker(&self) -> String {
        self.options.to_string()
    }

    /// What a node says of itself when it is ready.
    pub(super) fn describe(&self) -> String {
        match self.valid_until {
            Some(until) => format!("broker {}, certificate valid until {until}", self.broker()),
            None => format!("broker {}, NOT SECURE: plain messages", self.broker()),
        }
    }
}

impl Who {
    /// A serializer with the certificate of this node. `started_at`: see
    /// [`Builder::started_at`](crate::security::SecureSerializerBuilder::started_at).
    ///
    /// # Errors
    /// [`CliError`] with what is missing or wrong.
    pub(super) fn secure(
        &self,
        config: &Config,
        role: Role,
        started_at: Option<Timestamp>,
    ) -> Result<Secure, CliError> {
        let now = SystemClock.now();
        let directory = self.directory(config, role)?;
        let failed = |error| remedy::directory(&error, &directory);
        let trust = directory.trust().map_err(failed)?;
        let identity = match self.token(config, role) {
            Some(name) => identity(role, &name)?,
            None => only_identity(&directory, role)?,
        };
        let passphrase = self.passphrase.read()?;
        let secret = passphrase.as_ref().map(|passphrase| passphrase.as_slice());
        let credentials = directory.credentials(&identity, secret, now).map_err(failed)?;
        let older = directory.previous_credentials(&identity, secret, now).map_err(failed)?;
        let certificate = credentials.certificate().clone();
        trust.verify(&certificate, credentials.intermediates(), now).map_err(|error| {
            CliError::of(Exit::Security, &error)
                .context(format!("the certificate of {identity} is of no use"))
                .help(remedy::trust(&error))
        })?;
        let store = DirectoryCertificateStore::open(directory.path(), now).map_err(failed)?;
        let trust = store.trust().unwrap_or_else(|| Arc::new(trust));
        let files = Arc::new(store);
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
        let serializer = builder.build().map_err(|error| CliError::of(Exit::Security, &error))?;
        let serializer = Arc::new(serializer);
        let reload = Reload {
            directory,
            identity: identity.clone(),
            passphrase,
            serializer: serializer.clone(),
            store: files,
            trust,
        };
        Ok(Secure { identity, serializer, valid_until: certificate.not_after(), reload })
    }

    /// The passphrase of the node's key, where one is given.
    ///
    /// # Errors
    /// [`CliError`] when its file cannot be used.
    pub(super) fn passphrase(&self) -> Result<Option<Zeroizing<Vec<u8>>>, CliError> {
        self.passphrase.read()
    }

    /// Whether a directory of certificates is named anywhere.
    pub(super) fn has_certs(&self, config: &Config) -> bool {
        config.certs(self.certs.as_deref()).is_some()
    }

    /// The directory of certificates. Nothing is read yet.
    ///
    /// # Errors
    /// [`CliError`] when none is named.
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

    /// The name of the node, where one is given.
    pub(super) fn token(&self, config: &Config, role: Role) -> Option<String> {
        let section = match role {
            Role::Agent => config.file.agent.token.as_deref(),
            Role::Mapper => config.file.mapper.token.as_deref(),
        };
        config.token(self.token.as_deref(), section)
    }

    /// Without certificates anybody can take any name; one that nobody chose is made once and kept.
    fn plain_identity(&self, config: &Config, role: Role) -> Result<Identity, CliError> {
        match self.token(config, role) {
            Some(name) => identity(role, &name),
            None => kept::token(role),
        }
    }
}

/// The identity of this name.
pub(super) fn identity(role: Role, name: &str) -> Result<Identity, CliError> {
    Identity::new(role, name).map_err(|error| {
        CliError::of(Exit::Usage, &error)
            .context(format!("'{}' cannot be the name of an {role}", name.escape_debug()).replace("an m", "a m"))
    })
}

/// The one identity of this role that the directory holds a key of.
fn only_identity(directory: &CertificateDirectory, role: Role) -> Result<Identity, CliError> {
    let names = names_with_keys(directory.path(), role);
    match names.as_slice() {
        [only] => identity(role, only),
        [] => Err(CliError::new(
            Exit::Usage,
            format!("which {role}? `--token` is not given, and {} holds no {role}'s key", directory.path().display()),
        )
        .help(format!("make one with `nanite certs issue {role} NAME --dir {}`", directory.path().display()))),
        several => Err(CliError::new(
            Exit::Usage,
            format!("which {role}? `--token` is not given, and there are several: {}", several.join(", ")),
        )
        .help(format!("choose one: `--token {}`", several.first().map_or("NAME", String::as_str)))),
    }
}

/// The names in `ROLE-NAME-key.pem`, sorted; none when the directory cannot be read, which is reported when it is used.
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

impl Format {
    fn serializer(self, identity: Identity) -> PlainSerializer {
        match self {
            Format::Json => PlainSerializer::new(identity, Json),
            Format::MsgPack => PlainSerializer::new(identity, MsgPack),
            Format::Yaml => PlainSerializer::new(identity, Yaml),
        }
    }
}

fn warn_of_plaintext() {
    let paint = output::stderr_paint();
    output::note(&paint.red(
        "WARNING: --insecure-plaintext: messages are neither signed nor encrypted. Everybody who reaches the broker can read \
         them, forge them, and have this node do their work.",
    ));
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
