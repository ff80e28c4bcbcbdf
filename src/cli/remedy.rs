//! The exit code and the remedy of each error: of certificates and keys, of the broker, of messages and nodes.

use std::path::Path;

use super::error::{CliError, Exit};
use crate::agent::{AgentError, ProgramError};
use crate::certs::{AuthorityError, CertificateDirectory, DirectoryError, IssueError, KeyError, TrustError};
use crate::files::{BroadcastError, FileRootError};
use crate::link::SendError;
use crate::mapper::MapperError;
use crate::packet::{FailureCode, Identity};
use crate::request::RequestError;
use crate::serializer::SealError;
use crate::transport::TransportError;

const SEND_LESS: &str = "send less: put large data elsewhere, and send its location as the payload";

/// A directory of certificates.
pub(super) fn directory(error: &DirectoryError, directory: &CertificateDirectory) -> CliError {
    use DirectoryError as E;
    let dir = directory.path().display();
    let issue = |identity: &Identity| format!("nanite certs issue {} {} --dir {dir}", identity.role(), identity.name());
    let reissue = |path: &Path| match path.file_name().and_then(|name| name.to_str()).and_then(file_identity) {
        Some((role, name)) => format!("issue a new one with `nanite certs issue {role} {name} --dir {dir} --force`"),
        None => "replace it with a certificate that `nanite certs issue` made".to_owned(),
    };
    let check_access = |path: &Path| format!("check who may read {}", path.display());
    let failure = CliError::of(Exit::Security, error);
    let help = match error {
        E::Key { path, source, .. } => return key(failure, path, source),
        E::NoDirectory(path) => format!("create it, with a CA in it: `nanite certs init --dir {}`", path.display()),
        E::NoAuthority(_) => format!(
            "copy ca.pem from the machine that issues your certificates, or make a new CA with `nanite certs init --dir {dir}`"
        ),
        E::NoCertificate { identity, .. } => format!("issue one with `{}`", issue(identity)),
        E::NoKey { identity, .. } => {
            format!(
                "copy the key to this machine, or issue a new certificate and key with `{} --force`",
                issue(identity)
            )
        }
        E::AmbiguousName(_) => "choose a name that does not end in '-key'".to_owned(),
        E::Mismatch { certificate: path, .. } | E::Expired { path, .. } | E::Invalid { path, .. } => reissue(path),
        E::NotYetValid { .. } => "check the clocks of this machine and of the CA's machine".to_owned(),
        E::OtherIdentity { found, .. } => format!("name the file after {found}, or start as {found}"),
        E::FileName { path } => format!("rename {}", path.display()),
        E::Unreadable { path, .. }
        | E::Revocation { path, source: AuthorityError::Unreadable { .. } }
        | E::Authority { path, source: AuthorityError::Unreadable { .. } } => check_access(path),
        E::Revocation { path, .. } => format!(
            "make {} again with `nanite certs crl` on the machine with the CA's key, and copy it here",
            path.display()
        ),
        E::Authority { path, .. } => format!("{} must hold the PEM of CA certificates only", path.display()),
    };
    failure.help(help)
}

/// A key file.
pub(super) fn key(failure: CliError, path: &Path, error: &KeyError) -> CliError {
    match error {
        KeyError::TooOpen { .. } => failure.help(key_mode(path)),
        KeyError::Unreadable { .. } => failure.help(format!("check the owner and the mode of {}", path.display())),
        KeyError::NeedsPassphrase => failure.help(
            "write the passphrase into a file of mode 0600, and name it with `--passphrase-file` or NANITE_KEY_PASSPHRASE_FILE (the \
             CA's with `--ca-passphrase-file` or NANITE_CA_PASSPHRASE_FILE)",
        ),
        KeyError::Malformed => failure.help("a key file holds one private key in PEM; is it the right file?"),
        KeyError::KeyType => failure.help("make a key of the type p256, rsa2048, rsa3072 or rsa4096"),
        _ => failure,
    }
}

fn key_mode(path: &Path) -> String {
    let path = path.display();
    format!("if no other user has read it: `chmod 600 {path}`; otherwise make a new key and certificate")
}

/// Issuing a certificate.
pub(super) fn issue(error: &IssueError) -> CliError {
    use IssueError as E;
    let (exit, help) = match error {
        E::Domain(_) => (Exit::Usage, "give a domain such as `--domain example.org`"),
        E::Validity => (Exit::Usage, "give a time such as `--valid-for 30d`"),
        E::OutlivesAuthority(_) => (Exit::Security, "give a shorter time with `--valid-for`, or make a new CA"),
        E::AuthorityNotValid(..) => {
            (Exit::Security, "check the clock of this machine; if the CA has expired, make a new one")
        }
        E::MalformedList => (
            Exit::Security,
            "restore the last good list, or remove the file: the certificates that it revoked are then trusted",
        ),
        E::NoProofOfPossession | E::MalformedRequest => (Exit::Security, "make a request with `nanite certs csr`"),
        E::NoDomain => (Exit::Security, "use a CA that `nanite certs init` made"),
        E::AuthorityKeyUsage(_) => (Exit::Security, trust(&TrustError::AuthorityKeyUsage)),
        _ => return CliError::of(Exit::Security, error),
    };
    CliError::of(exit, error).help(help)
}

/// The remedy for a certificate that is not trusted.
pub(super) fn trust(error: &TrustError) -> &'static str {
    use TrustError as E;
    match error {
        E::NotYetValid(_) | E::AuthorityNotYetValid => "check the clocks of this machine and of the CA's machine",
        E::UnknownIssuer => "its CA is not in ca.pem: issue it again with this CA, or add its CA to ca.pem",
        E::AuthorityExpired => "make a new CA, and issue all certificates again",
        E::Domain { .. } => "nodes that talk to each other need certificates of one domain",
        E::AuthorityKeyUsage => "use a CA without an extended key usage, such as one that `nanite certs init` made",
        E::Revoked | E::AuthorityRevoked => "issue a new one, with a new key",
        E::NoCrl | E::StaleCrl => {
            "make a current list with `nanite certs crl` on the machine with the CA's key, and copy crl.pem here"
        }
        _ => "issue a new one with `nanite certs issue ... --force`",
    }
}

/// The broker, or the connection to it; `broker` is its URL without a password, where it is known.
pub(super) fn transport(error: &TransportError, broker: Option<&str>) -> CliError {
    use TransportError as E;
    let failure = |exit| match broker {
        Some(broker) => CliError::of(exit, error).context(broker),
        None => CliError::of(exit, error),
    };
    match error {
        E::Address(_) => failure(Exit::Usage).help("give a URL such as `--broker amqp://USER@HOST:5672/VHOST`"),
        E::Unreachable(_) => failure(Exit::Unreachable)
            .help("is RabbitMQ running there? Name another with `--broker URL`, NANITE_BROKER or nanite.toml"),
        E::Tls(_) => failure(Exit::Unreachable).help(
            "`--broker-ca` must be the CA of the broker's certificate, the host of the URL must be a name in that certificate, \
             and a certificate given with `--broker-cert` must be valid and of a CA that the broker trusts; look at one with \
             `openssl x509 -in FILE -noout -text`",
        ),
        E::TlsFile { path, .. } => failure(Exit::Security)
            .help(format!("check the owner, the mode and the content of {}: it must be PEM", path.display())),
        E::TlsKeyMode { path, .. } => failure(Exit::Security).help(key_mode(path)),
        E::Credentials => failure(Exit::Unreachable).help(
            "put the user into the URL, and the password into NANITE_BROKER_PASSWORD, a file named by \
             `--broker-password-file`, or nanite.toml",
        ),
        E::VirtualHost(_) => failure(Exit::Unreachable).help(
            "the last part of the URL names the virtual host; the broker's administrator makes one with `rabbitmqctl \
             add_vhost VHOST` and lets a user in with `rabbitmqctl set_permissions -p VHOST USER '.*' '.*' '.*'`",
        ),
        E::Forbidden(_) => failure(Exit::Unreachable).help(
            "the broker's administrator permits it with `nanite broker setup`, or `rabbitmqctl set_permissions -p VHOST USER \
             CONFIGURE WRITE READ`",
        ),
        E::QueueConflict { queue, .. } => failure(Exit::Failure)
            .help(format!("another program uses the queue {queue}: stop it, or delete the queue at the broker")),
        E::TooLarge { .. } => failure(Exit::Usage).help(SEND_LESS),
        E::Unroutable(_) => failure(Exit::NotOffered).help("it has just stopped; list the agents with `nanite agents`"),
        E::Nacked | E::TimedOut(_) | E::Disconnected | E::Closed | E::Broker(_) => {
            failure(Exit::Unreachable).help("check the state and the log of the broker, then try again")
        }
        E::Name(_) => failure(Exit::Failure),
    }
}

/// Sealing a message.
pub(super) fn seal(error: &SealError) -> CliError {
    use SealError as E;
    let failure = |exit| CliError::of(exit, error);
    match error {
        E::NoRecipient(recipient) => failure(Exit::Security).help(format!(
            "{recipient} announces its certificate when it runs; with `--pinned` put it into the directory of certificates (its \
             key stays with {recipient})"
        )),
        E::OwnCertificate(_) => {
            failure(Exit::Security).help("check it with `nanite certs verify`, and issue a new one")
        }
        E::Store(_) => failure(Exit::Security).help("check the certificates with `nanite certs verify`"),
        E::TooLarge(..) => failure(Exit::Usage).help(SEND_LESS),
        _ => failure(Exit::Failure),
    }
}

/// Sending a message.
pub(super) fn send(error: &SendError, broker: &str) -> CliError {
    match error {
        SendError::Seal(error) => seal(error),
        SendError::Transport(error) => transport(error, Some(broker)),
        _ => CliError::of(Exit::Failure, error),
    }
}

/// A request that reached no agent.
pub(super) fn request(error: &RequestError, broker: &str) -> CliError {
    use RequestError as E;
    let failure = |exit| CliError::of(exit, error);
    match error {
        E::Send(error) => send(error, broker),
        E::NoTarget(_) => failure(Exit::NotOffered).help("list the services with `nanite services`"),
        E::NoMapper => failure(Exit::NotOffered).help("start one with `nanite mapper`, or leave out `--via-mapper`"),
        E::Refused(refusal) if matches!(refusal.code, FailureCode::TimedOut | FailureCode::Lost) => {
            failure(Exit::Incomplete).help("give it more time with `--timeout`")
        }
        E::Denied(_) => failure(Exit::Denied),
        E::Overloaded(_) => failure(Exit::Failure).help("wait until some of the requests of this node have ended"),
        E::Service(_) | E::Payload(_) => failure(Exit::Usage),
        _ => failure(Exit::Failure),
    }
}

/// A file that was sent to no agent.
pub(super) fn broadcast(error: &BroadcastError, broker: &str) -> CliError {
    use BroadcastError as E;
    let failure = |exit| CliError::of(exit, error);
    match error {
        E::Send(error) => send(error, broker),
        E::Name(_) => failure(Exit::Usage).help("give the name for the receivers, without a directory: `--dest NAME`"),
        E::Unreadable { .. } => failure(Exit::Usage),
        E::NoSubscribers(domain) => failure(Exit::NotOffered)
            .help(format!("start an agent with `nanite agent --files-dir DIR --files-domain {domain}`")),
        E::State(_) => failure(Exit::Failure),
    }
}

/// A directory for received files.
pub(super) fn file_root(error: &FileRootError) -> CliError {
    CliError::of(Exit::Usage, error)
        .help(format!("`--files-dir` must name a writable directory: `mkdir -p {}`", error.path.display()))
}

/// Starting a mapper.
pub(super) fn mapper(error: &MapperError, broker: &str) -> CliError {
    match error {
        MapperError::Transport(error) => transport(error, Some(broker)),
        MapperError::Role(_) => CliError::of(Exit::Usage, error),
        MapperError::State(_) => CliError::of(Exit::Unreachable, error),
    }
}

/// Connecting a mapper to Redis.
#[cfg(feature = "redis")]
pub(super) fn redis(error: &crate::mapper::RedisError) -> CliError {
    use crate::mapper::RedisError as E;
    let failure = |exit| CliError::of(exit, error);
    match error {
        E::Unreachable { .. } => failure(Exit::Unreachable).help(
            "check that it runs and that the URL is right; its password is given by NANITE_REDIS_PASSWORD or \
             `--redis-password-file FILE`",
        ),
        E::MissingCa | E::InvalidCa => {
            failure(Exit::Usage).help("name the PEM file of the CA that issued its certificate: `--redis-ca FILE`")
        }
        E::NotSigned => failure(Exit::Usage).help("leave out `--redis` or `--insecure-plaintext`"),
        _ => failure(Exit::Usage),
    }
}

/// A directory of programs.
pub(super) fn programs(error: &ProgramError) -> CliError {
    let failure = CliError::of(Exit::Usage, error);
    match error {
        ProgramError::Unsafe { path, .. } => failure.help(format!(
            "its writers decide what runs: {0} must belong to you or root; run `chmod go-w {0}`",
            path.display()
        )),
        ProgramError::InvalidPrefix(_) | ProgramError::NoSuchPrefix { .. } => {
            failure.help("`--actors` selects directories in `--actors-dir` by name; without it all are offered")
        }
        _ => failure.help("`--actors-dir DIR` names a directory with programs DIR/PREFIX/NAME"),
    }
}

/// An agent that cannot start, or has stopped by itself.
pub(super) fn agent(error: &AgentError, broker: &str) -> CliError {
    match error {
        AgentError::Role(_) | AgentError::Expose(_) | AgentError::Option(_) => CliError::of(Exit::Usage, error),
        AgentError::Transport(error) => transport(error, Some(broker)),
        AgentError::Replaced(_) => CliError::of(Exit::Replaced, error).help(
            "give each agent its own name and certificate; with `--give-way` the process that starts later ends instead",
        ),
        AgentError::RunsAlready(_) => CliError::of(Exit::Replaced, error)
            .help("stop the other process, or start this one without `--give-way` to replace it"),
        _ => CliError::of(Exit::Unreachable, error).context(broker),
    }
}

fn file_identity(name: &str) -> Option<(&str, &str)> {
    let (role, name) = name.strip_suffix(".pem")?.split_once('-')?;
    matches!(role, "agent" | "mapper").then_some((role, name))
}
