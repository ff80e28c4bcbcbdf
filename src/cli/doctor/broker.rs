//! Checks that need the broker: the connection, the node's queues, a round trip, and the agents that a mapper sees.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::finding::Finding;
use crate::cli::error::{CliError, Exit};
use crate::cli::fleet::{self, Fleet};
use crate::cli::node::Node;
use crate::cli::output::counted;
use crate::cli::remedy;
use crate::clock::{Clock, SystemClock};
use crate::packet::{Identity, Role};
use crate::serializer::OpenErrorKind;
use crate::transport::{
    AmqpOptions, AmqpTransport, Consumer, Destination, PublishRequest, Transport, TransportError, topology,
};

const ROUND_TRIP_TIMEOUT: Duration = Duration::from_secs(10);
/// More waiting messages than this mean that an agent does not keep up, or does not run.
const MAX_INBOX_MESSAGES: u64 = 100;
/// At most this many agents are asked for an answer.
const MAX_PINGED_AGENTS: usize = 20;

/// Whether the connection is protected. Messages are signed and encrypted in any case; the password and the identities are not.
pub(super) fn protection(options: &AmqpOptions) -> Finding {
    if options.uses_tls() {
        return Finding::ok("protection", "TLS with a private CA");
    }
    if options.is_loopback() {
        return Finding::ok("protection", "plain TCP, on this machine only");
    }
    Finding::warn(
        "protection",
        format!(
            "{options}: plain TCP shows the password, and which nodes talk to each other, to everyone on the network"
        ),
        "use `--broker amqps://HOST/VHOST --broker-ca FILE`",
    )
}

/// Connects, and uses the broker as the node does.
pub(super) async fn connection(identity: &Identity, options: &AmqpOptions) -> Vec<Finding> {
    let broker = options.to_string();
    let failed = |check, error: &TransportError| Finding::fail(check, &remedy::transport(error, Some(&broker)));
    let transport: Arc<dyn Transport> = match AmqpTransport::connect(options.clone()).await {
        Ok(transport) => Arc::new(transport),
        Err(error) => return vec![failed("broker", &error), Finding::skip("queues", "no connection")],
    };
    let mut findings = vec![Finding::ok("broker", format!("{broker} accepts the user and the virtual host"))];
    let queues = match identity.role() {
        Role::Agent => {
            let inbox = topology::agent_inbox(identity.as_str());
            match transport.declare(&inbox).await {
                Ok(()) => {
                    findings.push(Finding::ok("queues", format!("{} can be declared", inbox.name)));
                    vec![(inbox.name, MAX_INBOX_MESSAGES, "start the agent, or give it more time: `nanite agent`")]
                }
                Err(error) => {
                    findings.push(failed("queues", &error));
                    vec![]
                }
            }
        }
        Role::Mapper => vec![
            (topology::REQUEST.to_owned(), 0, "no mapper takes them: start one with `nanite mapper`"),
            (
                topology::OFFLINE.to_owned(),
                0,
                "they wait for an agent that offers their service, and a `nanite mapper` to deliver them",
            ),
        ],
    };
    let inbox_declared = identity.role() == Role::Agent && !queues.is_empty();
    for (queue, limit, help) in queues {
        findings.push(match transport.depth(&queue).await {
            Ok(None) => Finding::ok("waiting", format!("there is no queue {queue} yet")),
            Ok(Some(count)) => {
                let message =
                    format!("{} in {queue}", counted(usize::try_from(count).unwrap_or(usize::MAX), "message"));
                if count > limit { Finding::warn("waiting", message, help) } else { Finding::ok("waiting", message) }
            }
            Err(error) => failed("waiting", &error),
        });
    }
    if inbox_declared {
        findings.push(match round_trip(identity, &transport).await {
            Ok(elapsed) => Finding::ok("round trip", format!("{elapsed:.1?} through the broker and back")),
            Err(error) => failed("round trip", &error),
        });
    }
    fleet::close(transport.close()).await;
    findings
}

/// Sends a message to a queue of this process and receives it, as an agent does.
async fn round_trip(identity: &Identity, transport: &Arc<dyn Transport>) -> Result<Duration, TransportError> {
    let start = Instant::now();
    let queue = topology::agent_control(identity.as_str(), SystemClock.now().as_micros());
    let consumer = transport.consume(&queue, 1).await?;
    // The queue name of this process is unique, so no other message has this body.
    let body: Arc<[u8]> = queue.name.as_bytes().into();
    let message = PublishRequest {
        destination: Destination::Queue(queue.name.clone()),
        body: body.clone(),
        content_type: "text/plain".to_owned(),
        message_id: "doctor".to_owned(),
        expires_in: Some(ROUND_TRIP_TIMEOUT),
        persistent: false,
    };
    transport.publish(message, ROUND_TRIP_TIMEOUT).await?;
    match timeout(ROUND_TRIP_TIMEOUT, receive(consumer, &body)).await {
        Ok(result) => result.map(|()| start.elapsed()),
        Err(_) => Err(TransportError::TimedOut(ROUND_TRIP_TIMEOUT)),
    }
}

/// Waits for a message with this body. Others are questions of mappers, and are dropped.
async fn receive(mut consumer: Consumer, body: &[u8]) -> Result<(), TransportError> {
    while let Some(delivery) = consumer.next().await {
        let found = *delivery.body == *body;
        delivery.acker.ack().await?;
        if found {
            return Ok(());
        }
    }
    Err(TransportError::Disconnected)
}

/// Starts a mapper, waits for the agents to register, and asks some of them to register again.
pub(super) async fn agents(node: &Node, limit: Duration) -> Vec<Finding> {
    let mut fleet = match Fleet::start(node).await {
        Ok(fleet) => fleet,
        Err(error) => return vec![Finding::fail("queues", &error), Finding::skip("agents", "the mapper cannot start")],
    };
    let mut findings = vec![Finding::ok("queues", "a mapper's queues can be declared")];
    match fleet.discover(1, limit, |_| true).await {
        Ok((_, 0)) => findings.push(Finding::warn(
            "agents",
            format!("no agent has registered within {limit:?}"),
            "start one with `nanite agent`, at the same broker and virtual host, with a certificate of the same CA",
        )),
        Ok((mut agents, _)) => {
            findings.push(Finding::ok("agents", format!("{} registered", counted(agents.len(), "agent"))));
            agents.truncate(MAX_PINGED_AGENTS);
            for (agent, result) in fleet.ping(&agents, limit).await {
                findings.push(match result {
                    Ok(elapsed) => Finding::ok("round trip", format!("{agent} answers within {elapsed:.1?}")),
                    Err(failure) => {
                        let failure = CliError::new(Exit::Incomplete, format!("{agent}: {failure}"));
                        let help = "look at the log of that agent, and at the load of its machine";
                        Finding::fail("round trip", &failure.help(help))
                    }
                });
            }
        }
        Err(error) => findings.push(Finding::fail("agents", &error)),
    }
    for (kind, count) in fleet.mapper.refusals().into_iter().filter(|(_, count)| *count > 0) {
        let help = match kind {
            OpenErrorKind::NotFresh => "compare the clocks: run `timedatectl` here and on the agents' machines",
            OpenErrorKind::UnknownSigner => "put the senders' certificates into the certificate directory",
            OpenErrorKind::BadCertificate => "run `nanite certs verify`, here and on the senders' machines",
            _ => "capture one of them and run `nanite inspect` on it",
        };
        let count = counted(usize::try_from(count).unwrap_or(usize::MAX), "message");
        // Not a failure of this node, but it may explain missing agents.
        findings.push(Finding::warn("refused", format!("{count} from others: {kind}"), help));
    }
    fleet.close().await;
    findings
}
