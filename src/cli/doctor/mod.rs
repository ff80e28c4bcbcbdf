//! `nanite doctor`: checks everything that a node needs, and says what is wrong and how to fix it.
//!
//! It goes on after a failure wherever the next check is still meaningful, so that all problems are reported at once. It changes
//! nothing except what the node itself does at its start: it declares the node's queues.

mod broker;
mod files;
mod finding;

use std::path::PathBuf;
use std::time::Duration;

use finding::{Finding, State, exit_code};
use serde::Serialize;

use super::error::{Exit, Result};
use super::node::Node;
use super::output::counted;
use super::runtime::Global;
use super::{args, node, output, runtime};
use crate::clock::{Clock, SystemClock};
use crate::packet::{Identity, Role};

/// Check everything that a node needs: files, certificates, clock, broker and other nodes; say what is wrong and how to fix it.
///
/// Exit codes: 0 no failure (warnings do not count), 6 certificates, keys or rules failed, 7 the broker failed, 4 an agent does not
/// answer.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    who: node::IdentityArgs,
    #[command(flatten)]
    broker: super::connection::BrokerArgs,
    /// The role of the node, if the directory has keys for both.
    #[arg(long, value_name = "agent|mapper")]
    role: Option<Role>,
    /// The rules that the node is started with.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// The audit log that the node is started with.
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,
    /// How long to wait for agents to register and to answer.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = args::duration)]
    timeout: Duration,
    /// Print one JSON object: {"node": ID, "ok": BOOL, "checks": [{"check": .., "state": .., "message": .., "remedy": ..}]}.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    /// None if it could not be determined.
    node: Option<Identity>,
    ok: bool,
    checks: Vec<Finding>,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit> {
    let (node, checks) = check(global, args)?;
    let exit = exit_code(&checks);
    let report = Report { node, ok: exit == Exit::Success, checks };
    output::json_or(args.json, &report, |report| {
        report.checks.iter().try_for_each(Finding::print)?;
        let count = |state| report.checks.iter().filter(|finding| finding.state == state).count();
        global.note(&format!("{}, {}", counted(count(State::Fail), "failure"), counted(count(State::Warn), "warning")));
        Ok(())
    })?;
    Ok(exit)
}

fn check(global: &Global, args: &Args) -> Result<(Option<Identity>, Vec<Finding>)> {
    let (now, config) = (SystemClock.now(), &global.config);
    let roles = args.role.map_or(vec![Role::Agent, Role::Mapper], |role| vec![role]);
    let directory = args.who.directory(config, args.role.unwrap_or(Role::Agent))?;
    let names = roles.iter().filter_map(|role| Some(node::named(*role, &args.who.token(config, *role)?)));
    let names = names.collect::<Result<Vec<_>, _>>()?;
    let options = args.broker.options(config)?;
    let identity = match files::identity(&directory, &roles, &names) {
        Ok(identity) => identity,
        Err(error) => {
            let identity = Finding::fail("identity", &error);
            let broker = Finding::skip("broker", "the identity of the node is unknown");
            return Ok((None, vec![identity, broker::protection(&options), broker]));
        }
    };
    let mut findings = vec![files::directory(&directory)];
    findings.extend(files::authorities(&directory, now));
    match args.who.passphrase() {
        Ok(passphrase) => {
            let passphrase = passphrase.as_deref().map(Vec::as_slice);
            findings.extend(files::credentials(&directory, &identity, passphrase, now));
        }
        Err(error) => findings.push(Finding::fail("key", &error)),
    }
    findings.extend(files::revocation(&directory, now));
    findings.extend(files::peers(&directory, now));
    findings.extend(args.policy.as_ref().or(config.file.policy.as_ref()).map(|path| files::policy(path)));
    findings.extend(args.audit.as_ref().or(config.file.audit.as_ref()).map(|path| files::audit(path)));

    let options = options.connection_name(identity.as_str());
    findings.push(broker::protection(&options));
    let node = match args.who.secure(config, identity.role(), None) {
        Ok(secure) => Some(Node::new(secure, options.clone())),
        Err(error) => {
            if !findings.iter().any(|finding| finding.state == State::Fail) {
                findings.push(Finding::fail("certificates", &error));
            }
            None
        }
    };
    runtime::run(async {
        findings.extend(broker::connection(&identity, &options).await);
        let connected = !findings.iter().any(|finding| finding.check == "broker" && finding.state == State::Fail);
        match (identity.role(), node) {
            (Role::Agent, _) => {}
            (Role::Mapper, Some(node)) if connected => findings.extend(broker::agents(&node, args.timeout).await),
            (Role::Mapper, Some(_)) => findings.push(Finding::skip("agents", "no connection")),
            (Role::Mapper, None) => findings.push(Finding::skip("agents", "the certificates cannot be used")),
        }
        Ok(())
    })?;
    Ok((Some(identity), findings))
}
