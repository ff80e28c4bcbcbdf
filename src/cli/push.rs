//! `nanite push`: gives agents work without waiting for an answer.

use std::time::Duration;

use serde::Serialize;

use super::error::{CliError, Exit};
use super::way::Way;
use super::{Global, ask, node, output, runtime};
use crate::packet::{Identity, Role};

/// How long a target is looked for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Give agents work, without an answer.
///
/// The broker has confirmed the message when the command ends: it is in the queue of each agent that is named on stderr, or in that of
/// the mappers.
#[derive(Debug, clap::Args)]
pub(super) struct Command {
    #[command(flatten)]
    args: Args,
    #[command(flatten)]
    node: node::Args,
}

/// What is to be done, and by whom.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    #[command(flatten)]
    pub ask: ask::Args,
    /// One JSON object on stdout: {"sent": [ID]}; empty where a mapper chooses.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Sent<'a> {
    sent: &'a [Identity],
}

pub(super) fn run(global: &Global, command: &Command) -> Result<Exit, CliError> {
    let Command { args, node } = command;
    let node = node.node(global, Role::Mapper)?;
    let payload = args.ask.payload(global)?;
    runtime::run(async {
        let mut way = Way::open(&node, &args.ask).await?;
        let sent = way.push(&args.ask, payload, PATIENCE).await;
        way.close().await;
        given(global, args, sent)
    })
}

/// Pushes on a way that stays open.
///
/// # Errors
/// [`CliError`] when nobody got it.
pub(super) async fn send(global: &Global, args: &Args, way: &mut Way) -> Result<Exit, CliError> {
    let payload = args.ask.payload(global)?;
    let sent = way.push(&args.ask, payload, PATIENCE).await;
    given(global, args, sent)
}

fn given(global: &Global, args: &Args, sent: Result<Vec<Identity>, CliError>) -> Result<Exit, CliError> {
    let sent = match sent {
        Err(error) if args.json && error.exit() == Exit::NotOffered => {
            output::json(&Sent { sent: &[] })?;
            return Err(error);
        }
        sent => sent?,
    };
    if args.json {
        output::json(&Sent { sent: &sent })?;
    }
    if let [agent] = &sent[..] {
        args.ask.took_turn(agent);
    }
    let names: Vec<&str> = sent.iter().map(Identity::as_str).collect();
    match (names.is_empty(), args.ask.via_mapper) {
        (false, _) => global.note(&format!("given to {}", names.join(", "))),
        (true, true) => global.note("given to the mappers"),
        (true, false) => global.note("nobody offers it: it waits in the offline queue, for a mapper that runs"),
    }
    Ok(Exit::Success)
}
