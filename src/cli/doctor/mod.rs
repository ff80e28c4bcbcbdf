//! `nanite doctor`: looks at everything that a node needs, and says what is wrong and how it is mended.
//!
//! It goes on after a failure, as far as what follows makes sense, so that all that is wrong is seen at once. It changes nothing but
//! what the node itself would do at its start: it declares the node's own queue.

mod broker;
mod files;
mod fleet;
mod who;

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use super::error::{CliError, Exit};
use super::identity::IdentityArgs;
use super::node::Node;
use super::output::{counted, printable};
use super::{Global, args, output, remedy, runtime};
use crate::clock::{Clock, SystemClock};
use crate::packet::{Identity, Role};

/// Check everything that a node needs: files, certificates, clock, broker and the others; say what is wrong and what mends it.
///
/// Ends with 0 when nothing fails (a warning is no failure), with 6 when certificates, keys or rules fail, with 7 when the broker
/// does, with 4 when an agent does not answer.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    who: IdentityArgs,
    #[command(flatten)]
    broker: super::connection::BrokerArgs,
    /// The role of the node, where the directory has keys for both.
    #[arg(long, value_name = "agent|mapper")]
    role: Option<RoleName>,
    /// The rules that the node is started with.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// The audit log that the node is started with.
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,
    /// How long agents may take to be there and to answer.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = args::duration)]
    timeout: Duration,
    /// One JSON object on stdout: {"node": ID, "ok": BOOL, "checks": [{"check": .., "state": .., "message": .., "remedy": ..}]}.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleName {
    Agent,
    Mapper,
}

impl From<RoleName> for Role {
    fn from(name: RoleName) -> Role {
        match name {
            RoleName::Agent => Role::Agent,
            RoleName::Mapper => Role::Mapper,
        }
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warn,
    Fail,
    /// It could not be made, because another has failed.
    Skip,
}

/// What a check has found.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
    #[serde(skip)]
    exit: Exit,
}

impl Finding {
    fn new(check: &'static str, state: State, message: impl Into<String>) -> Self {
        Self { check, state, message: message.into(), remedy: None, exit: Exit::Success }
    }

    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self::new(check, State::Ok, message)
    }

    fn warn(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(check, State::Warn, message) }
    }

    fn fail(check: &'static str, error: &CliError) -> Self {
        let remedy = error.remedy().map(str::to_owned);
        Self { remedy, exit: error.exit(), ..Self::new(check, State::Fail, error.message()) }
    }

    fn skip(check: &'static str, why: impl Into<String>) -> Self {
        Self::new(check, State::Skip, format!("not checked: {}", why.into()))
    }
}

#[derive(Serialize)]
struct Report<'a> {
    node: Option<&'a Identity>,
    ok: bool,
    checks: &'a [Finding],
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let mut findings = Vec::new();
    let identity = examine(global, args, &mut findings)?;
    let exit = worst(&findings);
    if args.json {
        output::json(&Report { node: identity.as_ref(), ok: exit == Exit::Success, checks: &findings })?;
    } else {
        findings.iter().try_for_each(print)?;
        let count = |state| findings.iter().filter(|finding| finding.state == state).count();
        global.note(&format!("{}, {}", counted(count(State::Fail), "failure"), counted(count(State::Warn), "warning")));
    }
    Ok(exit)
}

/// Makes all checks; who the node is, where that is known.
fn examine(global: &Global, args: &Args, findings: &mut Vec<Finding>) -> Result<Option<Identity>, CliError> {
    let now = SystemClock.now();
    let found = who::find(global, &args.who, args.role.map(Role::from))?;
    let identity = match found {
        Ok(identity) => identity,
        Err(error) => {
            findings.push(Finding::fail("identity", &error));
            let options = args.broker.options(&global.config)?;
            findings.push(broker::protection(&options));
            findings.push(Finding::skip("broker", "it is not known who the node is"));
            return Ok(None);
        }
    };
    let directory = args.who.directory(&global.config, identity.role())?;
    findings.extend(files::directory(&directory));
    findings.extend(files::authorities(&directory, now));
    match args.who.passphrase() {
        Ok(passphrase) => {
            let passphrase = passphrase.as_ref().map(|passphrase| passphrase.as_slice());
            findings.extend(files::own(&directory, &identity, passphrase, now));
        }
        Err(error) => findings.push(Finding::fail("key", &error)),
    }
    findings.extend(files::revocation(&directory.crl_path(), now));
    findings.extend(files::peers(&directory, now));
    let file = &global.config.file;
    findings.extend(args.policy.as_ref().or(file.policy.as_ref()).map(|path| files::policy(path)));
    findings.extend(args.audit.as_ref().or(file.audit.as_ref()).map(|path| files::audit(path)));

    let options = args.broker.options(&global.config)?.name(identity.as_str());
    findings.push(broker::protection(&options));
    let secure = args.who.secure(&global.config, identity.role(), None);
    let has_failed = findings.iter().any(|finding| finding.state == State::Fail);
    let node = match secure {
        Ok(secure) => Some(Node::new(secure, options.clone())),
        Err(error) => {
            if !has_failed {
                findings.push(Finding::fail("certificates", &error));
            }
            None
        }
    };
    runtime::run(async {
        findings.extend(broker::check(&identity, &options).await);
        let connected = !findings.iter().any(|finding| finding.check == "broker" && finding.state == State::Fail);
        match (identity.role(), node, connected) {
            (Role::Agent, ..) => {}
            (Role::Mapper, Some(node), true) => findings.extend(fleet::check(&node, args.timeout).await),
            (Role::Mapper, None, _) => {
                findings.push(Finding::skip("agents", "the node cannot speak without certificates"))
            }
            (Role::Mapper, _, false) => findings.push(Finding::skip("agents", "there is no connection")),
        }
        Ok(())
    })?;
    Ok(Some(identity))
}

/// The exit code of all: what is wrong with security first, then the broker, then the rest.
fn worst(findings: &[Finding]) -> Exit {
    let failed = || findings.iter().filter(|finding| finding.state == State::Fail).map(|finding| finding.exit);
    let first = |exit| failed().find(|other| *other == exit);
    first(Exit::Security).or_else(|| first(Exit::Unreachable)).or_else(|| failed().next()).unwrap_or(Exit::Success)
}

fn print(finding: &Finding) -> Result<(), CliError> {
    let paint = output::stdout_paint();
    let mark = match finding.state {
        State::Ok => paint.green("ok  "),
        State::Warn => paint.yellow("warn"),
        State::Fail => paint.red("FAIL"),
        State::Skip => paint.dim("skip"),
    };
    output::line(&format!("{mark}  {:<12}  {}", finding.check, printable(&finding.message, false)))?;
    match &finding.remedy {
        Some(remedy) => output::line(&format!("{:20}{} {}", "", paint.cyan("help:"), printable(remedy, false))),
        None => Ok(()),
    }
}

/// A finding about the broker that fails.
fn broker_failure(check: &'static str, error: &crate::transport::TransportError, broker: &str) -> Finding {
    Finding::fail(check, &remedy::transport(error, Some(broker)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u03_security_counts_more_than_the_broker_and_that_more_than_the_rest() {
        let failure = |exit| Finding::fail("x", &CliError::new(exit, "y"));
        let warning = || Finding::warn("x", "y", "z");
        assert_eq!(worst(&[warning(), Finding::ok("x", "y")]), Exit::Success);
        assert_eq!(worst(&[failure(Exit::Incomplete), failure(Exit::Unreachable)]), Exit::Unreachable);
        assert_eq!(worst(&[failure(Exit::Unreachable), failure(Exit::Security)]), Exit::Security);
        assert_eq!(worst(&[failure(Exit::Usage), warning()]), Exit::Usage);
    }
}
