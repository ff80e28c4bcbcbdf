//! What to do about failures: of certificates and keys, of the broker, of messages and nodes.

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

/// A failure of what a directory of certificates holds.
pub(super) fn directory(error: &DirectoryError, directory: &CertificateDirectory) -> CliError {
    use DirectoryError as E;
    let dir = directory.path().display();
    let issue = |identity: &Identity| format!("nanite certs issue {} {} --dir {dir}", identity.role(), identity.name());
    let again = |path: &Path| match path.file_name().and_then(|name| name.to_str()).and_then(file_identity) {
        Some((role, name)) => format!("issue a new one with `nanite certs issue {role} {name} --dir {dir} --force`"),
        None => "put a certificate that `nanite certs issue` made in its place".to_owned(),
    };
    let failure = CliError::of(Exit::Security, error);
    match error {
        E::NoDirectory(path) => {
            failure.help(format!("make it, and a CA in it, with `nanite certs init --dir {}`", path.display()))
        }
        E::NoAuthority(_) => failure.help(format!(
            "copy ca.pem from where your certificates are issued, or make a new CA with `nanite certs init --dir {dir}`"
        )),
        E::NoCertificate { identity, .. } => failure.help(format!("issue one with `{}`", issue(identity))),
        E::NoKey { identity, .. } => {
            failure.help(format!("copy the key to this machine, or issue both anew with `{} --force`", issue(identity)))
        }
        E::AmbiguousName(_) => failure.help("choose a name that does not end in '-key'"),
        E::Key { path, source, .. } => key(failure, path, source),
        E::Mismatch { certificate, .. } => failure.help(again(certificate)),
        E::Expired { path, .. } => failure.help(again(path)),
        E::NotYetValid { .. } => failure.help("check the clock of this machine, and that of the CA's"),
        E::OtherIdentity { found, .. } => failure.help(format!("name the file after {found}, or start as {found}")),
        E::Unreadable { path, .. } => failure.help(format!("check who may read {}", path.display())),
        E::Invalid { path, .. } => failure.help(again(path)),
        E::FileName { path } => failure.help(format!("rename {}", path.display())),
        E::Revocation { path, source } => match source {
            AuthorityError::Unreadable { .. } => failure.help(format!("check who may read {}", path.display())),
            _ => failure.help(format!(
                "make {} anew with `nanite certs crl` where the CA's key is, and copy it here",
                path.display()
            )),
        },
        E::Authority { path, source } => match source {
            AuthorityError::Unreadable { .. } => failure.help(format!("check who may read {}", path.display())),
            _ => failure.help(format!("{} has to hold the PEM of CA certificates only", path.display())),
        },
    }
}

/// A failure of a key file.
pub(super) fn key(failure: CliError, path: &Path, error: &KeyError) -> CliError {
    match error {
        KeyError::TooOpen { .. } => failure.help(format!(
            "if nobody else has read it: `chmod 600 {}`; otherwise make a new key and certificate",
            path.display()
        )),
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

/// A certificate could not be issued.
pub(super) fn issue(error: &IssueError) -> CliError {
    use IssueError as E;
    match error {
        E::Domain(_) => CliError::of(Exit::Usage, error).help("give a domain such as `--domain example.org`"),
        E::Validity => CliError::of(Exit::Usage, error).help("give a time such as `--valid-for 30d`"),
        _ => {
            let failure = CliError::of(Exit::Security, error);
            match error {
                E::OutlivesAuthority(_) => failure.help("give a shorter time with `--valid-for`, or make a new CA"),
                E::AuthorityNotValid(..) => {
                    failure.help("check the clock of this machine; a CA that has expired has to be made anew")
                }
                E::MalformedList => {
                    failure.help("put the last good list there, or remove the file: what it revoked is then believed")
                }
                E::NoProofOfPossession | E::MalformedRequest => failure.help("make a request with `nanite certs csr`"),
                E::NoDomain => failure.help("use a CA that `nanite certs init` made"),
                _ => failure,
            }
        }
    }
}

/// What to do when a certificate is not believed.
pub(super) fn trust(error: &TrustError) -> &'static str {
    use TrustError as E;
    match error {
        E::Expired(_) => "issue a new one with `nanite certs issue ... --force`",
        E::NotYetValid(_) | E::AuthorityNotYetValid => "check the clock of this machine, and that of the CA's",
        E::UnknownIssuer => "it is of another CA than ca.pem: issue it again here, or add its CA to ca.pem",
        E::AuthorityExpired => "make a new CA, and issue the certificates anew",
        E::Domain { .. } => "all nodes that talk to each other need certificates of one domain",
        E::Revoked | E::AuthorityRevoked => "issue a new one, with a new key",
        E::NoCrl | E::StaleCrl => {
            "make a current list with `nanite certs crl` where the CA's key is, and copy crl.pem here"
        }
        _ => "issue a new one with `nanite certs issue ... --force`",
    }
}

/// A failure of the broker, or on the way to it; `broker` is its URL without a password, where it is known.
pub(super) fn transport(error: &TransportError, broker: Option<&str>) -> CliError {
    use TransportError as E;
    let failure = |exit| {
        let failure = CliError::of(exit, error);
        match broker {
            Some(broker) => failure.context(broker),
            None => failure,
        }
    };
    match error {
        E::Address(_) => failure(Exit::Usage).help("give a URL such as `--broker amqp://USER@HOST:5672/VHOST`"),
        E::Unreachable(_) => failure(Exit::Unreachable)
            .help("is RabbitMQ running there? Name another with `--broker URL`, NANITE_BROKER or nanite.toml"),
        E::Tls(_) => failure(Exit::Unreachable).help(
            "`--broker-ca` has to be the CA of the broker's certificate, the host of the URL has to be a name in that certificate, \
             and a certificate given with `--broker-cert` has to be valid and of a CA that the broker trusts; look at one with \
             `openssl x509 -in FILE -noout -text`",
        ),
        E::TlsFile { path, .. } => failure(Exit::Security)
            .help(format!("check the owner, the mode and the content of {}: it has to be PEM", path.display())),
        E::TlsKeyMode { path, .. } => failure(Exit::Security).help(format!(
            "if nobody else has read it: `chmod 600 {}`; otherwise make a new key and certificate",
            path.display()
        )),
        E::Credentials => failure(Exit::Unreachable).help(
            "put the user in the URL, and the password in NANITE_BROKER_PASSWORD, a file named by \
             `--broker-password-file`, or nanite.toml",
        ),
        E::VirtualHost(_) => failure(Exit::Unreachable).help(
            "the last part of the URL names the virtual host; the broker's administrator makes one with `rabbitmqctl \
             add_vhost VHOST` and lets a user in with `rabbitmqctl set_permissions -p VHOST USER '.*' '.*' '.*'`",
        ),
        E::Forbidden(_) => failure(Exit::Unreachable).help(
            "the broker's administrator permits it with `nanite broker setup`, or `rabbitmqctl set_permissions -p VHOST USER CONFIGURE WRITE READ`",
        ),
        E::QueueConflict { queue, .. } => failure(Exit::Failure)
            .help(format!("another program uses the queue {queue}: stop it, or delete the queue at the broker")),
        E::TooLarge { .. } => failure(Exit::Usage).help("send less: put large data elsewhere, and its place in the payload"),
        E::Unroutable(_) => failure(Exit::NotOffered).help("it has just gone; see who is there with `nanite agents`"),
        E::Nacked | E::TimedOut(_) | E::Disconnected | E::Closed | E::Broker(_) => {
            failure(Exit::Unreachable).help("look at the state and the log of the broker, then try again")
        }
        E::Name(_) => failure(Exit::Failure),
    }
}

/// A message could not be sealed.
pub(super) fn seal(error: &SealError) -> CliError {
    use SealError as E;
    match error {
        E::NoRecipient(whom) => CliError::of(Exit::Security, error).help(format!(
            "{whom} makes its certificate known when it runs; with `--pinned` put it into the directory of certificates (its key \
             stays with {whom})"
        )),
        E::OwnCertificate(_) => CliError::of(Exit::Security, error)
            .help("see what is wrong with `nanite certs verify`, and issue a new one"),
        E::Store(_) => CliError::of(Exit::Security, error).help("see what is wrong with `nanite certs verify`"),
        E::TooLarge(..) => {
            CliError::of(Exit::Usage, error).help("send less: put large data elsewhere, and its place in the payload")
        }
        _ => CliError::of(Exit::Failure, error),
    }
}

/// A message could not be sent.
pub(super) fn send(error: &SendError, broker: &str) -> CliError {
    match error {
        SendError::Seal(error) => seal(error),
        SendError::Transport(error) => transport(error, Some(broker)),
        _ => CliError::of(Exit::Failure, error),
    }
}

/// A request was not given to anybody.
pub(super) fn request(error: &RequestError, broker: &str) -> CliError {
    match error {
        RequestError::Send(error) => send(error, broker),
        RequestError::NoTarget(_) => {
            CliError::of(Exit::NotOffered, error).help("see what is offered with `nanite services`")
        }
        RequestError::NoMapper => {
            CliError::of(Exit::NotOffered, error).help("start one with `nanite mapper`, or ask without `--via-mapper`")
        }
        RequestError::Refused(failure) if matches!(failure.code, FailureCode::TimedOut | FailureCode::Lost) => {
            CliError::of(Exit::Incomplete, error).help("give it more time with `--timeout`")
        }
        RequestError::Denied(_) => CliError::of(Exit::Denied, error),
        RequestError::Service(_) | RequestError::Payload(_) => CliError::of(Exit::Usage, error),
        _ => CliError::of(Exit::Failure, error),
    }
}

/// A file was sent to nobody.
pub(super) fn broadcast(error: &BroadcastError, broker: &str) -> CliError {
    match error {
        BroadcastError::Send(error) => send(error, broker),
        BroadcastError::Name(_) => CliError::of(Exit::Usage, error)
            .help("give the name that it has at the receivers, without a directory: `--dest NAME`"),
        BroadcastError::Unreadable { .. } => CliError::of(Exit::Usage, error),
        BroadcastError::NoSubscribers(domain) => CliError::of(Exit::NotOffered, error)
            .help(format!("start one with `nanite agent --files-dir DIR --files-domain {domain}`")),
        BroadcastError::State(_) => CliError::of(Exit::Failure, error),
    }
}

/// A directory cannot take files.
pub(super) fn file_root(error: &FileRootError) -> CliError {
    CliError::of(Exit::Usage, error).help(format!(
        "`--files-dir` names a directory that exists and can be written: `mkdir -p {}`",
        error.path.display()
    ))
}

/// A mapper could not start.
pub(super) fn mapper(error: &MapperError, broker: &str) -> CliError {
    match error {
        MapperError::Transport(error) => transport(error, Some(broker)),
        MapperError::Role(_) => CliError::of(Exit::Usage, error),
        MapperError::State(_) => CliError::of(Exit::Unreachable, error),
    }
}

/// A directory of programs cannot be used.
pub(super) fn programs(error: &ProgramError) -> CliError {
    let failure = CliError::of(Exit::Usage, error);
    match error {
        ProgramError::Unsafe { path, .. } => failure.help(format!(
            "whoever can write there decides what runs: let {} belong to you or root, and run `chmod go-w` on it",
            path.display()
        )),
        ProgramError::InvalidPrefix(_) | ProgramError::NoSuchPrefix { .. } => {
            failure.help("`--actors` picks directories of `--actors-dir` by name; without it all are offered")
        }
        _ => failure.help("`--actors-dir DIR` names a directory with the programs DIR/PREFIX/NAME"),
    }
}

/// An agent has stopped by itself.
pub(super) fn agent(error: &AgentError, broker: &str) -> CliError {
    match error {
        AgentError::Role(_) | AgentError::Expose(_) | AgentError::Option(_) => CliError::of(Exit::Usage, error),
        AgentError::Transport(error) => transport(error, Some(broker)),
        AgentError::Replaced(_) => CliError::of(Exit::Replaced, error)
            .help("each agent has a name and a certificate of its own; `--give-way` has one that is started later end instead"),
        AgentError::RunsAlready(_) => CliError::of(Exit::Replaced, error)
            .help("stop the other one, or start this one without `--give-way`: it takes the other's place then"),
        _ => CliError::of(Exit::Unreachable, error).context(broker),
    }
}

fn file_identity(name: &str) -> Option<(&str, &str)> {
    let (role, name) = name.strip_suffix(".pem")?.split_once('-')?;
    matches!(role, "agent" | "mapper").then_some((role, name))
}
