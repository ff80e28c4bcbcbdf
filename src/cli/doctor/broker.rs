//! The broker: whether it is reached and takes the node, and what waits in the node's queues.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::{Finding, broker_failure};
use crate::cli::output::counted;
use crate::clock::{Clock, SystemClock};
use crate::packet::{Identity, Role};
use crate::transport::{
    AmqpOptions, AmqpTransport, Consumer, Destination, PublishRequest, Transport, TransportError, topology,
};

/// How long a message to oneself may take.
const LOOP_WITHIN: Duration = Duration::from_secs(10);
/// More than this in an inbox is a sign that nobody works on it.
const MANY: u64 = 100;

/// Whether the way to the broker is protected. The messages are so in any case; the password and who talks to whom are not.
pub(super) fn protection(options: &AmqpOptions) -> Finding {
    if options.is_secure() {
        return Finding::ok("protection", "TLS, by a CA of its own");
    }
    if options.is_loopback() {
        return Finding::ok("protection", "plain TCP, on this machine only");
    }
    Finding::warn(
        "protection",
        format!("{options}: plain TCP shows the password, and who talks to whom, to everybody on the way"),
        "use `--broker amqps://HOST/VHOST --broker-ca FILE`",
    )
}

/// Connects, and does at the broker what the node does there.
pub(super) async fn check(identity: &Identity, options: &AmqpOptions) -> Vec<Finding> {
    let broker = options.to_string();
    let transport: Arc<dyn Transport> = match AmqpTransport::connect(options.clone()).await {
        Ok(transport) => Arc::new(transport),
        Err(error) => return vec![broker_failure("broker", &error, &broker), Finding::skip("queues", "no connection")],
    };
    let mut findings = vec![Finding::ok("broker", format!("{broker} takes the user and the virtual host"))];
    match identity.role() {
        Role::Agent => findings.extend(agent(identity, &transport, &broker).await),
        Role::Mapper => findings.extend(mapper(&transport, &broker).await),
    }
    crate::cli::fleet::close(transport.close()).await;
    findings
}

async fn agent(identity: &Identity, transport: &Arc<dyn Transport>, broker: &str) -> Vec<Finding> {
    let inbox = topology::agent_inbox(identity.as_str());
    if let Err(error) = transport.declare(&inbox).await {
        return vec![broker_failure("queues", &error, broker)];
    }
    let mut findings = vec![Finding::ok("queues", format!("{} can be declared", inbox.name))];
    findings.push(
        waiting(transport, &inbox.name, MANY, "start the agent, or give it more time: `nanite agent`", broker).await,
    );
    findings.push(match to_oneself(identity, transport).await {
        Ok(took) => Finding::ok("round trip", format!("{took:.1?} through the broker and back")),
        Err(error) => broker_failure("round trip", &error, broker),
    });
    findings
}

async fn mapper(transport: &Arc<dyn Transport>, broker: &str) -> Vec<Finding> {
    let nobody = "no mapper takes them: start one with `nanite mapper`";
    let requests = waiting(transport, topology::REQUEST, 0, nobody, broker).await;
    let offline = "they wait for an agent that offers what they ask for, and for a `nanite mapper` to deliver them";
    vec![requests, waiting(transport, topology::OFFLINE, 0, offline, broker).await]
}

/// How many messages wait in a queue: more than so many are a warning.
async fn waiting(transport: &Arc<dyn Transport>, queue: &str, most: u64, help: &str, broker: &str) -> Finding {
    match transport.depth(queue).await {
        Ok(None) => Finding::ok("waiting", format!("there is no queue {queue} yet")),
        Ok(Some(count)) if count > most => {
            let count = counted(usize::try_from(count).unwrap_or(usize::MAX), "message");
            Finding::warn("waiting", format!("{count} in {queue}"), help)
        }
        Ok(Some(count)) => Finding::ok("waiting", format!("{count} in {queue}")),
        Err(error) => broker_failure("waiting", &error, broker),
    }
}

/// Sends a message to a queue of this process and takes it from there, as an agent does with its own.
async fn to_oneself(identity: &Identity, transport: &Arc<dyn Transport>) -> Result<Duration, TransportError> {
    let began = tokio::time::Instant::now();
    let queue = topology::agent_control(identity.as_str(), SystemClock.now().as_micros());
    let consumer = transport.consume(&queue, 1).await?;
    // The name of this process's queue is in no other message.
    let body: Arc<[u8]> = queue.name.as_bytes().into();
    let message = PublishRequest {
        destination: Destination::Queue(queue.name.clone()),
        body: body.clone(),
        content_type: "text/plain".to_owned(),
        message_id: "doctor".to_owned(),
        expires_in: Some(LOOP_WITHIN),
        persistent: false,
    };
    transport.publish(message, LOOP_WITHIN).await?;
    match timeout(LOOP_WITHIN, arrival(consumer, &body)).await {
        Ok(result) => result.map(|()| began.elapsed()),
        Err(_) => Err(TransportError::TimedOut(LOOP_WITHIN)),
    }
}

/// Waits for this message. Others are questions of mappers, which are not for this process.
async fn arrival(mut consumer: Consumer, body: &[u8]) -> Result<(), TransportError> {
    while let Some(delivery) = consumer.next().await {
        let is_it = *delivery.body == *body;
        delivery.acker.ack().await?;
        if is_it {
            return Ok(());
        }
    }
    Err(TransportError::Disconnected)
}
