//! Commands that need neither a node nor a broker: `nanite policy`, `nanite audit`, `nanite completions` and `nanite man`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap_complete::Shell;
use clap_mangen::Man;
use serde_json::json;

use super::error::{CliError, Exit, Result, chain};
use super::output;
use super::output::counted;
use super::runtime::Global;
use crate::audit::{Problem, verify, verify_with_head};
use crate::packet::{Identity, Payload, Request, SelectorName, Service, Tag};
#[cfg(feature = "cedar")]
use crate::policy::CedarPolicy;
use crate::policy::{Caller, Policy, PolicyError, Rules};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check whether a node would accept a file of rules.
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Say whether a caller may request a service, and by which rule.
    ///
    /// Exit codes: 0 the request is allowed, 5 it is denied.
    Explain(Explain),
}

#[derive(Debug, clap::Args)]
pub(super) struct Explain {
    /// The caller: nanite-NAME or mapper-NAME.
    caller: Identity,
    /// The service that is requested.
    service: Service,
    /// The file of rules.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// The mapper that forwards the request, as an agent sees it.
    #[arg(long, value_name = "MAPPER")]
    through: Option<Identity>,
    /// The selector of the request.
    #[arg(long, value_name = "NAME", default_value = "least_loaded")]
    selector: SelectorName,
    /// A tag of the request; can be repeated.
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<Tag>,
}

pub(super) fn run(command: Command) -> Result<Exit> {
    match command {
        Command::Check { file } => {
            let names = names(&file)?;
            output::line(&format!("{}: {}", file.display(), counted(names.len(), "rule")))?;
            if names.is_empty() {
                output::note("without rules, everything is denied");
            }
            Ok(Exit::Success)
        }
        Command::Explain(args) => args.run(),
    }
}

impl Explain {
    fn run(self) -> Result<Exit> {
        let PolicyFile { policy, rules, .. } = read(&self.policy)?;
        let mut request = Request::new(self.service, Payload::default());
        (request.selector, request.tags) = (self.selector, self.tags);
        let mut caller = Caller::new(self.through.as_ref().unwrap_or(&self.caller), None);
        caller.on_behalf_of = self.through.as_ref().map(|_| &self.caller);
        let paint = output::stdout_paint();
        let decision = policy.authorize_request(&caller, &request);
        let result = if decision.allowed { paint.green("allowed") } else { paint.red("denied") };
        match &decision.rule {
            Some(rule) => output::line(&format!("{result} by the rule {rule}"))?,
            None => output::line(&format!("{result}: no rule allows it"))?,
        }
        for explanation in rules.map(|rules| rules.explain(&caller, &request)).unwrap_or_default() {
            let result = match explanation.mismatches.as_slice() {
                [] => "matches".to_owned(),
                mismatches => format!("does not match: {}", mismatches.join(", ")),
            };
            output::line(&format!("  {}  {result}", explanation.rule))?;
        }
        Ok(if decision.allowed { Exit::Success } else { Exit::Denied })
    }
}

struct PolicyFile {
    policy: Arc<dyn Policy>,
    names: Vec<String>,
    /// The rules one by one; none for Cedar.
    rules: Option<Arc<Rules>>,
}

/// Loads the policy of a node.
///
/// # Errors
/// [`CliError`] when the file cannot be read or is not a policy.
pub(super) fn load(file: &Path) -> Result<Arc<dyn Policy>> {
    Ok(read(file)?.policy)
}

/// The names of the rules in a file.
pub(super) fn names(file: &Path) -> Result<Vec<String>> {
    Ok(read(file)?.names)
}

/// Reads Cedar from a file that ends in `.cedar`, TOML from any other.
fn read(file: &Path) -> Result<PolicyFile> {
    if file.extension().is_some_and(|extension| extension == "cedar") {
        #[cfg(not(feature = "cedar"))]
        return Err(CliError::new(Exit::Usage, "this nanite was built without Cedar")
            .help("build it with `cargo build --release --features cedar`, or write the rules in TOML"));
        #[cfg(feature = "cedar")]
        {
            let policy = CedarPolicy::from_file(file).map_err(|error| invalid(file, &error))?;
            return Ok(PolicyFile { names: policy.names(), policy: Arc::new(policy), rules: None });
        }
    }
    let rules = Arc::new(Rules::from_file(file).map_err(|error| invalid(file, &error))?);
    Ok(PolicyFile { names: rules.names(), policy: rules.clone(), rules: Some(rules) })
}

fn invalid(file: &Path, error: &PolicyError) -> CliError {
    // The report of the TOML parser ends with a line end.
    let failure = CliError::new(Exit::Usage, chain(error).trim_end());
    match error {
        PolicyError::Invalid(_) => {
            failure.context(file.display()).help("docs/guide/policy.md shows what a rule can contain")
        }
        _ => failure.help("a node does not start without its policy: make the file readable, or leave out --policy"),
    }
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum AuditCommand {
    /// Check that no line of a log was changed, removed or moved.
    ///
    /// Rotated files (FILE.1, FILE.2, ...) are included. Exit codes: 0 the log is intact, 6 it is not.
    Verify {
        /// The log.
        file: PathBuf,
        /// A copy of FILE.head from elsewhere: the line that it names must be in the log.
        #[arg(long, value_name = "FILE")]
        head: Option<PathBuf>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run_audit(command: AuditCommand) -> Result<Exit> {
    let AuditCommand::Verify { file, head, json } = command;
    let report = match &head {
        Some(head) => verify_with_head(&file, head),
        None => verify(&file),
    };
    let report = report
        .map_err(|error| CliError::of(Exit::Security, &error).context(format!("cannot read {}", file.display())))?;
    if json {
        let problem = |problem: &Problem| json!({ "file": problem.file, "line": problem.line, "why": problem.reason });
        output::json(&json!({
            "files": report.files,
            "lines": report.lines,
            "first": report.first_seq,
            "last_hash": report.last_hash,
            "problems": report.problems.iter().map(problem).collect::<Vec<_>>(),
        }))?;
    } else {
        for Problem { file, line, reason, .. } in &report.problems {
            let line = if *line == 0 { String::new() } else { format!(":{line}") };
            output::line(&format!("{} {}{line}: {reason}", output::stdout_paint().red("broken"), file.display()))?;
        }
        let lines = counted(usize::try_from(report.lines).unwrap_or(usize::MAX), "line");
        output::line(&format!("{lines} in {}, last {}", counted(report.files.len(), "file"), report.last_hash))?;
        if report.first_seq > 1 {
            output::note(&format!("the first line is number {}: older lines were removed", report.first_seq));
        }
    }
    Ok(if report.problems.is_empty() { Exit::Success } else { Exit::Security })
}

/// Print a script that completes the command line in a shell.
#[derive(Debug, clap::Args)]
pub(super) struct Completions {
    /// The shell.
    shell: Shell,
}

/// Write the manual: one page per command into a directory, or the main page to stdout.
#[derive(Debug, clap::Args)]
pub(super) struct Manual {
    /// The directory; created if it does not exist.
    directory: Option<PathBuf>,
}

pub(super) fn completions(mut program: clap::Command, args: &Completions) -> Result<Exit, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut program, "nanite", &mut script);
    output::write(&script)?;
    Ok(Exit::Success)
}

pub(super) fn manual(global: &Global, mut root: clap::Command, args: &Manual) -> Result<Exit, CliError> {
    root.build();
    let Some(directory) = &args.directory else {
        output::write(&page(&root)?.1)?;
        return Ok(Exit::Success);
    };
    let failed = |error: std::io::Error| {
        CliError::of(Exit::Failure, &error).context(format!("cannot write to {}", directory.display()))
    };
    std::fs::create_dir_all(directory).map_err(failed)?;
    let (mut pages, mut commands) = (0, vec![&root]);
    while let Some(command) = commands.pop() {
        let (name, text) = page(command)?;
        std::fs::write(directory.join(name), text).map_err(failed)?;
        pages += 1;
        commands.extend(command.get_subcommands().filter(|command| !command.is_hide_set()));
    }
    global.note(&format!("{pages} pages in {}", directory.display()));
    Ok(Exit::Success)
}

/// The file name and the content of a command's page.
fn page(command: &clap::Command) -> Result<(String, Vec<u8>), CliError> {
    let man = Man::new(command.clone());
    let mut text = Vec::new();
    man.render(&mut text).map_err(|error| CliError::of(Exit::Failure, &error))?;
    Ok((man.get_filename(), text))
}
