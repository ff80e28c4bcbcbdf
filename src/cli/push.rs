//! `nanite push`: gives agents work without waiting for an answer.

use std::time::Duration;

use serde::Serialize;

use super::error::{CliError, Exit};
use super::fleet::Fleet;
use super::{Global, ask, output, remedy, runtime};
use crate::packet::{Identity, Payload, Role};

/// How long a target is looked for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Give agents work, without an answer.
///
/// The broker has confirmed the message when the command ends: it is in the queue of each agent that is named on stderr.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    ask: ask::Args,
    /// One JSON object on stdout: {"sent": [ID]}.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Sent<'a> {
    sent: &'a [Identity],
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let node = args.ask.node.node(global, Role::Mapper)?;
    let payload = args.ask.payload(global)?;
    runtime::run(async {
        let mut fleet = Fleet::start(&node).await?;
        let sent = push(args, &mut fleet, payload).await;
        fleet.close().await;
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
        let names: Vec<&str> = sent.iter().map(Identity::as_str).collect();
        global.note(&format!("given to {}", names.join(", ")));
        Ok(Exit::Success)
    })
}

async fn push(args: &Args, fleet: &mut Fleet, payload: Payload) -> Result<Vec<Identity>, CliError> {
    let push = args.ask.address(fleet, payload, PATIENCE).await?;
    let sent = push.push().await.map_err(|error| remedy::request(&error, fleet.broker()))?;
    if let Some(agent) = sent.first() {
        args.ask.took_turn(agent);
    }
    Ok(sent)
}
