//! What setup creates at the broker: users with their permissions and passwords, exchanges and queues.
//!
//! RabbitMQ grants a user three patterns for each virtual host. *Configure* covers declaring and deleting queues and exchanges,
//! *write* publishing to an exchange and binding a queue, *read* consuming from a queue and binding to an exchange. A message to a
//! queue by its name goes through the default exchange, named `amq.default` here; who may write to it may write to every queue.

use std::io::{Error, ErrorKind, Write};
use std::path::{Path, PathBuf};

use data_encoding::BASE64URL_NOPAD;
use openssl::base64::encode_block;
use openssl::error::ErrorStack;
use openssl::rand::rand_bytes;
use openssl::sha::sha256;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use zeroize::Zeroizing;

use crate::certs::files::create_directory;
use crate::packet::{Identity, Role};
use crate::transport::{Queue, QueueKind, topology};

const PASSWORD_BYTES: usize = 32;

/// A user's permissions in a virtual host, as patterns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Permissions {
    pub configure: String,
    pub write: String,
    pub read: String,
}

impl Permissions {
    /// Everything that a node needs, and nothing else.
    pub(super) fn of(node: &Identity) -> Self {
        use topology::{ADVERTISE, HEARTBEAT, OFFLINE, REGISTRATION, REQUEST};
        const DEFAULT_EXCHANGE: &str = r"amq\.default";
        let pattern = |names: &[&str]| format!("^({})$", names.join("|"));
        // A name needs no escaping: letters, digits, '-' and '_'.
        let name = node.as_str();
        match node.role() {
            // Its inbox and its process queues. It registers, sends heartbeats, answers mappers and receives their questions.
            Role::Agent => {
                let own = &*format!(r"{name}(\.[0-9]+)?");
                Self {
                    configure: pattern(&[own]),
                    write: pattern(&[own, REGISTRATION, HEARTBEAT, DEFAULT_EXCHANGE]),
                    read: pattern(&[own, ADVERTISE]),
                }
            }
            // Its process queues. It receives from agents, asks them and sends them work, reads the queues of all mappers, and
            // makes its certificate known to other mappers.
            Role::Mapper => {
                let own = &*format!(r"{name}\.[0-9]+(\.presence)?");
                Self {
                    configure: pattern(&[own]),
                    write: pattern(&[own, ADVERTISE, REGISTRATION, DEFAULT_EXCHANGE]),
                    read: pattern(&[own, REGISTRATION, HEARTBEAT, REQUEST, OFFLINE]),
                }
            }
        }
    }

    /// As the management API represents them.
    pub(super) fn json(&self) -> Value {
        json!({"configure": self.configure, "write": self.write, "read": self.read})
    }

    /// Whether the API's answer grants exactly these.
    pub(super) fn matches(&self, found: &Value) -> bool {
        difference(&self.json(), found).is_none()
    }
}

/// The shared exchanges and queues, each with its kind, as the management API imports them.
pub(super) fn topology() -> Vec<(&'static str, Value)> {
    let exchange = |name: &str| json!({"name": name, "type": "fanout", "durable": true, "auto_delete": false, "internal": false, "arguments": {}});
    let queue = |queue: &Queue| json!({"name": queue.name, "durable": true, "auto_delete": false, "arguments": arguments(queue.kind)});
    let exchanges = topology::EXCHANGES.iter().map(|name| ("exchange", exchange(name)));
    exchanges.chain(topology::shared_queues().iter().map(|shared| ("queue", queue(shared)))).collect()
}

/// The arguments of a queue, as the transport declares it.
fn arguments(kind: QueueKind) -> Value {
    let QueueKind::Durable(options) = kind else { return json!({"x-queue-type": "classic"}) };
    let queue_type = if options.quorum { "quorum" } else { "classic" };
    match options.ordered {
        true => json!({"x-queue-type": queue_type, "x-single-active-consumer": true}),
        false => json!({"x-queue-type": queue_type}),
    }
}

/// The first property in which a resource differs from the expected one.
pub(super) fn difference(expected: &Value, found: &Value) -> Option<String> {
    let (key, value) = expected.as_object()?.iter().find(|(key, value)| found.get(key) != Some(*value))?;
    Some(format!("its {key} is {}, but must be {value}", found.get(key).unwrap_or(&Value::Null)))
}

/// The file with the password of a node's user.
pub(super) fn password_path(directory: &Path, node: &Identity) -> PathBuf {
    directory.join(format!("{node}.password"))
}

/// A new random password in a temporary file, which becomes the node's password file once the broker has accepted the password.
pub(super) struct NewPassword {
    text: Zeroizing<String>,
    file: NamedTempFile,
    path: PathBuf,
}

impl NewPassword {
    /// Writes a new password, readable only by its owner; fails if the password file exists and `replace` is not set.
    pub(super) fn create(path: &Path, replace: bool) -> Result<Self, Error> {
        if !replace && path.symlink_metadata().is_ok() {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let mut bytes = Zeroizing::new([0; PASSWORD_BYTES]);
        rand_bytes(bytes.as_mut_slice())?;
        // Safe in a URL as well.
        let text = Zeroizing::new(BASE64URL_NOPAD.encode(bytes.as_slice()));
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        create_directory(directory)?;
        // Temporary files have mode 0600.
        let mut file = NamedTempFile::new_in(directory)?;
        writeln!(file, "{}", text.as_str())?;
        file.as_file().sync_all()?;
        Ok(Self { text, file, path: path.to_owned() })
    }

    /// The user as the management API stores it, with a salted hash of the password.
    pub(super) fn user(&self) -> Result<Value, ErrorStack> {
        let mut salt = [0; 4];
        rand_bytes(&mut salt)?;
        let hash = salted_hash(salt, &self.text);
        Ok(json!({"password_hash": hash, "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": ""}))
    }

    /// Replaces the password file.
    pub(super) fn commit(self) -> Result<(), Error> {
        self.file.persist(&self.path)?;
        Ok(())
    }
}

/// Four bytes of salt, and the SHA-256 of salt and password.
fn salted_hash(salt: [u8; 4], password: &str) -> String {
    let salted = Zeroizing::new([&salt, password.as_bytes()].concat());
    encode_block(&[&salt[..], &sha256(&salted)].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn n22_permissions_are_limited_to_what_a_node_needs() {
        let fred = Permissions::of(&Identity::agent("fred").unwrap());
        assert_eq!(fred.configure, r"^(nanite-fred(\.[0-9]+)?)$");
        assert_eq!(fred.write, r"^(nanite-fred(\.[0-9]+)?|registration|heartbeat|amq\.default)$");
        assert_eq!(fred.read, r"^(nanite-fred(\.[0-9]+)?|advertise)$");
        let m1 = Permissions::of(&Identity::mapper("m1").unwrap());
        assert_eq!(m1.configure, r"^(mapper-m1\.[0-9]+(\.presence)?)$");
        assert_eq!(m1.write, r"^(mapper-m1\.[0-9]+(\.presence)?|advertise|registration|amq\.default)$");
        assert_eq!(m1.read, r"^(mapper-m1\.[0-9]+(\.presence)?|registration|heartbeat|request|mapper-offline)$");
        assert!(m1.matches(&m1.json()) && !m1.matches(&fred.json()));
    }

    #[test]
    fn n22_difference_names_the_property() {
        let all = topology();
        let (_, offline) = all.iter().find(|(_, resource)| resource["name"] == "mapper-offline").unwrap();
        assert_eq!(offline["arguments"], json!({"x-queue-type": "classic", "x-single-active-consumer": true}));
        assert_eq!(difference(offline, offline), None);
        let mut other = offline.clone();
        other["durable"] = false.into();
        other["messages"] = 3.into();
        assert_eq!(difference(offline, &other).unwrap(), "its durable is false, but must be true");
    }

    #[test]
    fn n22_password_is_random_private_and_not_replaced_by_accident() {
        let dir = tempfile::tempdir().unwrap();
        let path = password_path(&dir.path().join("deep"), &Identity::agent("fred").unwrap());
        drop(NewPassword::create(&path, false).unwrap());
        assert!(!path.exists() && std::fs::read_dir(path.parent().unwrap()).unwrap().next().is_none());
        let first = NewPassword::create(&path, false).unwrap();
        let text = first.text.to_string();
        first.commit().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{text}\n"));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(text.len() == 43 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
        assert_eq!(NewPassword::create(&path, false).err().unwrap().kind(), ErrorKind::AlreadyExists);
        let second = NewPassword::create(&path, true).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{text}\n"), "the old one stays until then");
        assert_ne!(*second.text, text);
        second.commit().unwrap();
        assert_ne!(std::fs::read_to_string(&path).unwrap(), format!("{text}\n"));
    }

    #[test]
    fn n22_password_hash_is_that_of_rabbitmq() {
        // The example in RabbitMQ's guide to passwords.
        assert_eq!(salted_hash([0x90, 0x8d, 0xc6, 0x0a], "test12"), "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR");
    }
}
