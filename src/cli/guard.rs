//! What agents and mappers have in common beside their identity: a policy, and an audit log.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;

use super::error::{CliError, Exit};
use super::{Global, policy};
use crate::audit::{AuditLog, AuditOptions, Overflow};
use crate::policy::Policy;

/// Who may do what, and what is written down of it.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Guard")]
#[group(skip)]
pub(super) struct Args {
    /// The rules about who may do what; what none allows is denied. TOML, or Cedar when its name ends in .cedar.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// The log of all that is accepted, refused, allowed and denied.
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,
    /// What happens when events come faster than the disk takes them: the node waits, or events are dropped and counted.
    #[arg(long, value_name = "block|drop", default_value = "block", requires = "audit")]
    audit_overflow: When,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum When {
    #[default]
    Block,
    Drop,
}

/// What was asked for, ready to be used.
pub(super) struct Guard {
    pub rules: Option<Arc<dyn Policy>>,
    pub audit: Option<AuditLog>,
}

impl Args {
    /// Reads the rules and opens the log. A file that cannot be used is an error, never an empty policy.
    ///
    /// # Errors
    /// [`CliError`] with what is wrong.
    pub(super) fn guard(&self, global: &Global) -> Result<Guard, CliError> {
        let file = &global.config.file;
        let rules = self.policy.as_ref().or(file.policy.as_ref()).map(|path| policy::load(path)).transpose()?;
        let open = |path: &PathBuf| {
            let overflow = match self.audit_overflow {
                When::Block => Overflow::Block,
                When::Drop => Overflow::Drop,
            };
            let options = AuditOptions::new().overflow(overflow);
            AuditLog::open(path, options).map_err(|error| {
                CliError::of(Exit::Failure, &error)
                    .help("check it with `nanite audit verify FILE`, or give another file")
            })
        };
        let audit = self.audit.as_ref().or(file.audit.as_ref()).map(open).transpose()?;
        Ok(Guard { rules, audit })
    }
}
