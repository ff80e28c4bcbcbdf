//! A node of this process: its serializer, its connection to the broker, its policy and its audit log.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;

use super::connection::BrokerArgs;
use super::error::{CliError, Exit, Result};
use super::identity::{self, IdentityArgs, SecureNode};
use super::runtime::Global;
use super::{output, policy, remedy, state_dir};
use crate::audit::{AuditLog, AuditOptions, Overflow};
use crate::packet::{Identity, Role};
use crate::policy::Policy;
use crate::serializer::{Json, MsgPack, PlainSerializer, Serializer, Yaml};
use crate::transport::{AmqpOptions, AmqpTransport};

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
            Some(name) => identity::named(role, &name)?,
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
        self.policy.as_ref().or(global.config.file.policy.as_ref()).map(|path| policy::load(path)).transpose()
    }

    /// Opens the audit log, if one is given.
    pub(super) fn audit(&self, global: &Global) -> Result<Option<AuditLog>> {
        let overflow = match self.audit_overflow {
            AuditOverflow::Block => Overflow::Block,
            AuditOverflow::Drop => Overflow::Drop,
        };
        let open = |path| AuditLog::open(path, AuditOptions::new().overflow(overflow));
        self.audit.as_ref().or(global.config.file.audit.as_ref()).map(open).transpose().map_err(|error| {
            CliError::of(Exit::Failure, &error).help("check it with `nanite audit verify FILE`, or give another file")
        })
    }
}
