//! `nanite admin`: the Control Tower, and the hash of its password.

use std::future::Future;
use std::io::{BufRead, IsTerminal};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::net::TcpListener;
use zeroize::Zeroizing;

use super::error::{CliError, Exit};
use super::{Global, broker, guard, node, output, remedy, runtime, signals};
use crate::admin::{Access, AdminError, ControlTower, History, Invitations, PasswordError, PasswordHash, PublicUrl};
use crate::mapper::Mapper;
use crate::packet::{RandomnessError, Role};

/// Where it listens, when nothing else is said.
const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 4000);

/// Serve the Control Tower: pages that show the agents as they are now.
///
/// It is a mapper for itself, which takes no work of others. Without a password it prints a link that lets one browser in. It runs
/// until SIGINT or SIGTERM.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    other: Option<Other>,
    #[command(flatten)]
    node: node::Args,
    /// Where it listens [also: `listen` in nanite.toml; default: 127.0.0.1:4000].
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = "Pages")]
    listen: Option<SocketAddr>,
    /// The URL that browsers use, when it is not that address: that of a proxy with TLS, say [also: `public-url` in nanite.toml].
    #[arg(long, value_name = "URL", help_heading = "Pages")]
    public_url: Option<PublicUrl>,
    /// A file with the hash of the password, by `nanite admin hash-password` [also: `password-hash-file` in nanite.toml].
    #[arg(long, value_name = "FILE", help_heading = "Pages")]
    password_hash_file: Option<PathBuf>,
    /// Let requests be sent from the pages; they only show otherwise.
    #[arg(long, help_heading = "Pages")]
    allow_requests: bool,
    #[command(flatten)]
    guard: guard::Args,
}

#[derive(Debug, clap::Subcommand)]
enum Other {
    /// Read a password from the terminal or stdin, and print what --password-hash-file takes.
    HashPassword,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit, CliError> {
    match args.other {
        Some(Other::HashPassword) => hash_password(),
        None => serve(global, args),
    }
}

fn serve(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let node = args.node.node(global, Role::Mapper)?;
    let guard = args.guard.guard(global)?;
    let file = &global.config.file.admin;
    let hash = args.password_hash_file.as_ref().or(file.password_hash_file.as_ref());
    let hash = hash.map(|path| read_hash(path)).transpose()?;
    let public = match (&args.public_url, &file.public_url) {
        (Some(url), _) => Some(url.clone()),
        (None, Some(text)) => Some(text.parse().map_err(|error| {
            CliError::of(Exit::Usage, &error).context("public-url in nanite.toml").help("mend it, or give --public-url")
        })?),
        (None, None) => None,
    };
    runtime::run(async {
        // Before the broker: what is wrong here is said at once.
        let listener = listen(args.listen.or(file.listen).unwrap_or(LISTEN)).await?;
        let address = listener.local_addr().map_err(|error| CliError::of(Exit::Failure, &error))?;
        let transport = node.connect().await?;
        let history = History::default();
        let mut mapper = Mapper::builder(node.serializer.clone(), transport.clone());
        if let Some(timeout) = global.config.file.mapper.agent_timeout {
            mapper = mapper.agent_timeout(timeout);
        }
        if let Some(rules) = guard.rules {
            mapper = mapper.policy(rules);
        }
        if let Some(audit) = guard.audit {
            mapper = mapper.audit(audit);
        }
        // It asks and is answered, and leaves the requests of others to others.
        let mapper = mapper.short_lived().on_agent(history.hook());
        signals::run(global, async |stopped| {
            let mapper = mapper.start().await.map_err(|error| remedy::mapper(&error, &node.broker()))?;
            let base = public.as_ref().map_or_else(|| format!("http://{address}"), PublicUrl::to_string);
            output::note(&format!("{} is ready: {}", node.identity, node.describe()));
            let invitations = Invitations::default();
            let access = match hash {
                Some(hash) => {
                    output::note(&format!("the Control Tower is at {base}: log in with the password"));
                    Access::Password(hash)
                }
                None => Access::Invited(invitations.clone()),
            };
            let invited = matches!(access, Access::Invited(_));
            let mut tower = ControlTower::new(mapper, history, access).allow_requests(args.allow_requests);
            if let Some(url) = public {
                if !url.is_tls() {
                    let paint = output::stderr_paint();
                    output::note(
                        &paint.red("WARNING: the pages go unencrypted: whoever is on the way can read and change them"),
                    );
                }
                tower = tower.public_url(url);
            }
            let served = tower.serve(listener, stopped.wait());
            let result =
                if invited { with_invitations(served, &invitations, &base).await } else { served.await.map_err(of) };
            transport.close().await;
            result.map(|()| Exit::Success)
        })
        .await
    })
}

/// Serves, and prints a link. When it was used, another follows, where somebody sees it and no file keeps it.
async fn with_invitations(
    served: impl Future<Output = Result<(), AdminError>>,
    invitations: &Invitations,
    base: &str,
) -> Result<(), CliError> {
    let inviting = async {
        loop {
            let path = invitations.issue()?;
            output::note(&format!(
                "the Control Tower is at {base}{}\nthis link lets one browser in, once",
                path.as_str()
            ));
            invitations.used().await;
            if !std::io::stderr().is_terminal() {
                return std::future::pending::<Result<(), RandomnessError>>().await;
            }
        }
    };
    tokio::select! {
        result = served => result.map_err(of),
        result = inviting => result.map_err(|error| CliError::of(Exit::Failure, &error)),
    }
}

fn of(error: AdminError) -> CliError {
    match error {
        AdminError::NoPublicUrl(_) => CliError::of(Exit::Usage, &error).help(
            "put a proxy with TLS in front and give its URL, `--public-url https://NAME`; or listen at 127.0.0.1 and come by \
             `ssh -L 4000:127.0.0.1:4000 HOST`",
        ),
        _ => CliError::of(Exit::Failure, &error),
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, CliError> {
    TcpListener::bind(address).await.map_err(|error| {
        CliError::of(Exit::Failure, &error)
            .context(format!("cannot listen at {address}"))
            .help("another program may be there: give another with `--listen 127.0.0.1:PORT`")
    })
}

fn read_hash(path: &Path) -> Result<PasswordHash, CliError> {
    broker::read_password(path)?.parse().map_err(|error| {
        CliError::of(Exit::Usage, &error)
            .context(format!("the password file {}", path.display()))
            .help("make it with `nanite admin hash-password > FILE`; it holds a hash, not the password")
    })
}

fn hash_password() -> Result<Exit, CliError> {
    let password = if std::io::stdin().is_terminal() {
        let password = typed("password: ")?;
        if typed("again: ")? != password {
            return Err(CliError::new(Exit::Usage, "the passwords differ").help("try again"));
        }
        password
    } else {
        line()?
    };
    let hash = PasswordHash::new(&password).map_err(|error| match error {
        PasswordError::Length => CliError::of(Exit::Usage, &error).help("choose a longer one"),
        _ => CliError::of(Exit::Failure, &error),
    })?;
    output::line(&hash.to_string())?;
    if std::io::stdin().is_terminal() {
        output::note("keep it in a file of mode 0600, for `nanite admin --password-hash-file FILE`");
    }
    Ok(Exit::Success)
}

/// Reads a line from the terminal, which does not show it.
fn typed(prompt: &str) -> Result<Zeroizing<String>, CliError> {
    let failed = |error: rustix::io::Errno| CliError::of(Exit::Failure, &error).context("cannot use the terminal");
    let stdin = std::io::stdin();
    let before = tcgetattr(&stdin).map_err(failed)?;
    let mut silent = before.clone();
    silent.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&stdin, OptionalActions::Flush, &silent).map_err(failed)?;
    let _restored = Restored(before);
    output::prompt(prompt);
    let text = line();
    // The line end that was typed is not shown either.
    output::note("");
    text
}

/// Gives the terminal back as it was.
struct Restored(Termios);

impl Drop for Restored {
    fn drop(&mut self) {
        // When it cannot be done, the terminal is gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// A line of stdin, without its end.
fn line() -> Result<Zeroizing<String>, CliError> {
    let failed = |error: std::io::Error| CliError::of(Exit::Usage, &error).context("cannot read the password");
    let mut text = Zeroizing::new(String::with_capacity(PasswordHash::MAX_PASSWORD_BYTES + 2));
    let limit = PasswordHash::MAX_PASSWORD_BYTES as u64 + 2;
    std::io::Read::take(std::io::stdin().lock(), limit).read_line(&mut text).map_err(failed)?;
    let end = text.trim_end_matches(['\r', '\n']).len();
    text.truncate(end);
    Ok(text)
}
