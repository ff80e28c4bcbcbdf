//! `nanite policy`: looks at rules before a node uses them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{CliError, Exit};
use super::output;
use super::output::counted;
use crate::packet::{Identity, Payload, Request, SelectorName, Service, Tag};
#[cfg(feature = "cedar")]
use crate::policy::CedarPolicy;
use crate::policy::{Caller, Explanation, Policy, PolicyError, Rules};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check a file of rules: whether a node would take it.
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Say whether a caller may request a service, and by which rule.
    ///
    /// Ends with 0 when it may, with 5 when it is denied.
    Explain(Explain),
}

#[derive(Debug, clap::Args)]
pub(super) struct Explain {
    /// Who asks: nanite-NAME or mapper-NAME.
    caller: Identity,
    /// For what.
    service: Service,
    /// The file of rules.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// The mapper that asks in the caller's name, as an agent sees it.
    #[arg(long, value_name = "MAPPER")]
    through: Option<Identity>,
    /// How the agent is chosen.
    #[arg(long, value_name = "NAME", default_value = "least_loaded")]
    selector: SelectorName,
    /// A tag that is asked for; can be given several times.
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<Tag>,
}

pub(super) fn run(command: Command) -> Result<Exit, CliError> {
    match command {
        Command::Check { file } => {
            let names = names(&file)?;
            output::line(&format!("{}: {}", file.display(), counted(names.len(), "rule")))?;
            if names.is_empty() {
                output::note("it has no rules, so it denies everything");
            }
            Ok(Exit::Success)
        }
        Command::Explain(asked) => explain(&asked),
    }
}

fn explain(asked: &Explain) -> Result<Exit, CliError> {
    let written = read(&asked.policy)?;
    let mut request = Request::new(asked.service.clone(), Payload::default());
    request.selector = asked.selector;
    request.tags.clone_from(&asked.tags);
    let mut caller = Caller::new(asked.through.as_ref().unwrap_or(&asked.caller), None);
    caller.on_behalf_of = asked.through.as_ref().map(|_| &asked.caller);
    let paint = output::stdout_paint();
    let decision = written.policy().authorize_request(&caller, &request);
    let decided = if decision.allowed { paint.green("allowed") } else { paint.red("denied") };
    match &decision.rule {
        Some(rule) => output::line(&format!("{decided} by the rule {rule}"))?,
        None => output::line(&format!("{decided}: no rule allows it"))?,
    }
    for explanation in written.explain(&caller, &request) {
        let fits = match explanation.mismatches.as_slice() {
            [] => "fits".to_owned(),
            mismatches => format!("does not fit in: {}", mismatches.join(", ")),
        };
        output::line(&format!("  {}  {fits}", explanation.rule))?;
    }
    Ok(if decision.allowed { Exit::Success } else { Exit::Denied })
}

/// A policy, in the language that its file's name tells.
enum Written {
    Toml(Rules),
    #[cfg(feature = "cedar")]
    Cedar(Box<CedarPolicy>),
}

impl Written {
    fn names(&self) -> Vec<String> {
        match self {
            Written::Toml(rules) => rules.names(),
            #[cfg(feature = "cedar")]
            Written::Cedar(policy) => policy.names(),
        }
    }

    fn policy(&self) -> &dyn Policy {
        match self {
            Written::Toml(rules) => rules,
            #[cfg(feature = "cedar")]
            Written::Cedar(policy) => policy.as_ref(),
        }
    }

    /// Rule by rule, where the language can tell.
    fn explain(&self, caller: &Caller<'_>, request: &Request) -> Vec<Explanation> {
        match self {
            Written::Toml(rules) => rules.explain(caller, request),
            #[cfg(feature = "cedar")]
            Written::Cedar(_) => Vec::new(),
        }
    }
}

/// Reads the policy of a node.
///
/// # Errors
/// [`CliError`] with what is wrong with it.
pub(super) fn load(file: &Path) -> Result<Arc<dyn Policy>, CliError> {
    Ok(match read(file)? {
        Written::Toml(rules) => Arc::new(rules),
        #[cfg(feature = "cedar")]
        Written::Cedar(policy) => Arc::new(*policy),
    })
}

/// The names of the rules of a file.
pub(super) fn names(file: &Path) -> Result<Vec<String>, CliError> {
    Ok(read(file)?.names())
}

/// A file that ends in `.cedar` is in that language, any other is TOML.
fn read(file: &Path) -> Result<Written, CliError> {
    let read = match file.extension() {
        #[cfg(feature = "cedar")]
        Some(ending) if ending == "cedar" => {
            CedarPolicy::from_file(file).map(|policy| Written::Cedar(Box::new(policy)))
        }
        #[cfg(not(feature = "cedar"))]
        Some(ending) if ending == "cedar" => {
            return Err(CliError::new(Exit::Usage, "this nanite was built without Cedar")
                .help("build it with `cargo build --release --features cedar`, or write the rules in TOML"));
        }
        _ => Rules::from_file(file).map(Written::Toml),
    };
    read.map_err(|error| {
        let invalid = matches!(error, PolicyError::Invalid(_));
        let failure = CliError::of(Exit::Usage, &error);
        if invalid {
            failure.context(file.display()).help("docs/guide/policy.md shows what a rule can say")
        } else {
            failure.help("without its policy a node does not start: make the file readable, or leave --policy out")
        }
    })
}
