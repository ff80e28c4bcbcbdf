//! The agents, as a mapper sees them: who is there, who answers, and what was refused meanwhile.

use std::time::Duration;

use super::Finding;
use crate::cli::error::{CliError, Exit};
use crate::cli::fleet::Fleet;
use crate::cli::node::Node;
use crate::cli::output::counted;
use crate::serializer::OpenErrorKind;

/// How many agents are asked for an answer.
const ASKED: usize = 20;

/// Asks all agents to register, and some of them once more.
pub(super) async fn check(node: &Node, patience: Duration) -> Vec<Finding> {
    let mut fleet = match Fleet::start(node).await {
        Ok(fleet) => fleet,
        Err(error) => return vec![Finding::fail("queues", &error), Finding::skip("agents", "the mapper cannot start")],
    };
    let mut findings = vec![Finding::ok("queues", "a mapper's can be declared")];
    match fleet.discover(1, patience, |_| true).await {
        Ok((_, 0)) => findings.push(Finding::warn(
            "agents",
            format!("none has registered within {patience:?}"),
            "start one with `nanite agent`, at the same broker and virtual host, with a certificate of the same CA",
        )),
        Ok((mut agents, _)) => {
            findings.push(Finding::ok("agents", format!("{} here", counted(agents.len(), "agent"))));
            agents.truncate(ASKED);
            for (agent, result) in fleet.ping(&agents, patience).await {
                findings.push(match result {
                    Ok(took) => Finding::ok("round trip", format!("{agent} answers within {took:.1?}")),
                    Err(failure) => {
                        let failure = CliError::new(Exit::Incomplete, format!("{agent}: {failure}"));
                        Finding::fail(
                            "round trip",
                            &failure.help("look at the log of that agent, and at its machine's load"),
                        )
                    }
                });
            }
        }
        Err(error) => findings.push(Finding::fail("agents", &error)),
    }
    let refused = fleet.mapper.refusals();
    findings.extend(refused.into_iter().filter(|(_, count)| *count > 0).map(|(kind, count)| refusal(kind, count)));
    fleet.close().await;
    findings
}

/// Messages of others that this node refuses.
fn refusal(kind: OpenErrorKind, count: u64) -> Finding {
    let count = counted(usize::try_from(count).unwrap_or(usize::MAX), "message");
    let help = match kind {
        OpenErrorKind::NotFresh => "compare the clocks: `timedatectl` here and on the agents' machines",
        OpenErrorKind::UnknownSigner => "put the senders' certificates into the directory of certificates",
        OpenErrorKind::BadCertificate => "see what is wrong with `nanite certs verify`, here and at the senders",
        _ => "catch one of them and look at it with `nanite inspect`",
    };
    // What others send is not this node's failure, but may well be why nobody seems to be there.
    Finding::warn("refused", format!("{count} from others: {kind}"), help)
}
