//! What there has to be at the broker: names, properties, and who may do what.
//!
//! RabbitMQ grants a user three patterns for each virtual host. *Configure* covers declaring and deleting queues and exchanges,
//! *write* publishing to an exchange and binding a queue, *read* consuming from a queue and binding to an exchange. Messages to a
//! queue by its name go through the default exchange, whose name is `amq.default` here; who may write to it may write to every queue.

use serde_json::{Value, json};

use crate::packet::{Identity, Role};
use crate::transport::{Queue, QueueKind, topology};

/// The permissions of a user, as patterns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Permissions {
    pub configure: String,
    pub write: String,
    pub read: String,
}

/// The name of the default exchange in permissions.
const DEFAULT_EXCHANGE: &str = r"amq\.default";

impl Permissions {
    /// What a node needs, and no more.
    pub(super) fn of(node: &Identity) -> Self {
        // A name holds nothing that means something in a pattern: letters, digits, '-' and '_'.
        let name = node.as_str();
        match node.role() {
            // Its inbox and the queues of its processes. It says that it lives, answers mappers, and hears their questions.
            Role::Agent => {
                let own = format!(r"{name}(\.[0-9]+)?");
                Self {
                    configure: pattern(&[&own]),
                    write: pattern(&[&own, topology::REGISTRATION, topology::HEARTBEAT, DEFAULT_EXCHANGE]),
                    read: pattern(&[&own, topology::ADVERTISE]),
                }
            }
            // The queues of its processes. It hears agents, asks them, gives them work, takes what waits for any mapper, and makes
            // itself known to the others.
            Role::Mapper => {
                let own = format!(r"{name}\.[0-9]+(\.presence)?");
                Self {
                    configure: pattern(&[&own]),
                    write: pattern(&[&own, topology::ADVERTISE, topology::REGISTRATION, DEFAULT_EXCHANGE]),
                    read: pattern(&[
                        &own,
                        topology::REGISTRATION,
                        topology::HEARTBEAT,
                        topology::REQUEST,
                        topology::OFFLINE,
                    ]),
                }
            }
        }
    }

    /// As the API has them.
    pub(super) fn json(&self) -> Value {
        json!({"configure": self.configure, "write": self.write, "read": self.read})
    }

    /// Whether what the API says is this.
    pub(super) fn is(&self, found: &Value) -> bool {
        let Value::Object(wanted) = self.json() else { return false };
        wanted.iter().all(|(key, value)| found.get(key) == Some(value))
    }
}

fn pattern(names: &[&str]) -> String {
    format!("^({})$", names.join("|"))
}

/// The exchanges and queues that are nobody's own, as the API has them: those of an import.
pub(super) fn topology() -> Value {
    let exchange = |name: &str| json!({"name": name, "type": "fanout", "durable": true, "auto_delete": false, "internal": false, "arguments": {}});
    let queue = |queue: &Queue| json!({"name": queue.name, "durable": true, "auto_delete": false, "arguments": arguments(queue.kind)});
    let queues: Vec<Value> = topology::shared_queues().iter().map(queue).collect();
    json!({"exchanges": topology::EXCHANGES.map(exchange), "queues": queues})
}

/// The arguments of a queue, as the transport declares it.
fn arguments(kind: QueueKind) -> Value {
    let (quorum, ordered) = match kind {
        QueueKind::Durable(options) => (options.quorum, options.ordered),
        QueueKind::Exclusive => (false, false),
    };
    let queue_type = if quorum { "quorum" } else { "classic" };
    if ordered {
        json!({"x-queue-type": queue_type, "x-single-active-consumer": true})
    } else {
        json!({"x-queue-type": queue_type})
    }
}

/// In what a thing at the broker differs from what is wanted; none when it does not.
pub(super) fn difference(wanted: &Value, found: &Value) -> Option<String> {
    let wanted = wanted.as_object()?;
    let differs = |(key, value): &(&String, &Value)| found.get(*key) != Some(*value);
    let (key, value) = wanted.iter().find(differs)?;
    let found = found.get(key).unwrap_or(&Value::Null);
    Some(format!("its {key} is {found}, and has to be {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n22_a_node_may_use_what_is_its_own_and_no_more() {
        let fred = Permissions::of(&Identity::agent("fred").unwrap());
        assert_eq!(fred.configure, r"^(nanite-fred(\.[0-9]+)?)$");
        assert_eq!(fred.write, r"^(nanite-fred(\.[0-9]+)?|registration|heartbeat|amq\.default)$");
        assert_eq!(fred.read, r"^(nanite-fred(\.[0-9]+)?|advertise)$");
        let m1 = Permissions::of(&Identity::mapper("m1").unwrap());
        assert_eq!(m1.configure, r"^(mapper-m1\.[0-9]+(\.presence)?)$");
        assert_eq!(m1.write, r"^(mapper-m1\.[0-9]+(\.presence)?|advertise|registration|amq\.default)$");
        assert_eq!(m1.read, r"^(mapper-m1\.[0-9]+(\.presence)?|registration|heartbeat|request|mapper-offline)$");
        assert!(m1.is(&m1.json()) && !m1.is(&fred.json()));
    }

    #[test]
    fn n22_a_difference_is_named() {
        let all = topology();
        let offline = all["queues"].as_array().unwrap().iter().find(|queue| queue["name"] == "mapper-offline").unwrap();
        assert_eq!(offline["arguments"], json!({"x-queue-type": "classic", "x-single-active-consumer": true}));
        assert_eq!(difference(offline, offline), None);
        let mut other = offline.clone();
        other["durable"] = false.into();
        other["messages"] = 3.into();
        assert_eq!(difference(offline, &other).unwrap(), "its durable is false, and has to be true");
    }
}
