//! `nanite admin`: the Control Tower, and the hash of its password.

use std::future::pending;
use std::io::{BufRead, IsTerminal, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use tokio::net::TcpListener;
use zeroize::Zeroizing;

use super::error::{CliError, Exit, Result};
use super::node::{NodeArgs, PolicyArgs, WithOption};
use super::options::AdminOptions;
use super::runtime::{self, Global};
use super::{args, output, remedy};
use crate::admin::{
    Access, AdminError, ControlTower, History, Invitations, PasswordError, PasswordHash, PublicUrl, TrustedProxy,
};
use crate::mapper::MapperBuilder;
use crate::packet::Role;

const DEFAULT_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 4000);

/// Serve the Control Tower: web pages that show the agents.
///
/// It is a mapper, which does not dispatch requests of others. Without a password it prints a link that lets one browser in. It runs
/// until SIGINT or SIGTERM.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    options: AdminOptions,
    /// Let users send requests from the pages; otherwise the pages are read-only.
    #[arg(long, help_heading = "Pages")]
    allow_requests: bool,
    #[command(flatten)]
    policy: PolicyArgs,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Read a password from the terminal or stdin, and print the content of the file for --password-hash-file.
    HashPassword,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit> {
    match args.command {
        Some(Command::HashPassword) => hash_password(),
        None => serve(global, args),
    }
}

fn serve(global: &Global, args: &Args) -> Result<Exit> {
    let node = args.node.node(global, Role::Mapper)?;
    let (policy, audit) = (args.policy.policy(global)?, args.policy.audit(global)?);
    let options = args.options.or(&global.config.file.admin);
    let hash = options.password_hash_file.as_deref().map(read_hash).transpose()?;
    let public_url: Option<PublicUrl> = options.public_url.as_deref().map(str::parse).transpose().map_err(|error| {
        CliError::of(Exit::Usage, &error).help("correct `--public-url`, or public-url in nanite.toml")
    })?;
    let proxies = options.trusted_proxies.iter().flatten().map(|text| text.parse());
    let proxies = proxies.collect::<std::result::Result<Vec<TrustedProxy>, _>>().map_err(|error| {
        CliError::of(Exit::Usage, &error).help("correct `--trusted-proxy`, or trusted-proxies in nanite.toml")
    })?;
    runtime::run(async {
        // Before the connection to the broker, so that a mistake is reported at once.
        let listener = listen(options.listen.unwrap_or(DEFAULT_ADDRESS)).await?;
        let address = listener.local_addr().map_err(|error| CliError::of(Exit::Failure, &error))?;
        let connection = node.connect().await?;
        let history = History::default();
        let mapper = connection
            .mapper()
            .with_option(global.config.file.mapper.agent_timeout, MapperBuilder::agent_timeout)
            .with_option(policy, MapperBuilder::policy)
            .with_option(audit, MapperBuilder::audit)
            .short_lived()
            .on_agent(history.hook());
        runtime::until_stopped(global, async |stop| {
            let mapper = mapper.start().await.map_err(|error| remedy::mapper(&error, &node.broker()))?;
            let base = public_url.as_ref().map_or_else(|| format!("http://{address}"), PublicUrl::to_string);
            output::note(&format!("{} is ready: {}", node.identity, node.describe()));
            if public_url.as_ref().is_some_and(|url| !url.is_tls()) {
                output::note(&output::stderr_paint().red(
                    "WARNING: the pages are not encrypted: everybody on the network path can read and change them",
                ));
            }
            let (access, invitations) = match hash {
                Some(hash) => {
                    output::note(&format!("the Control Tower is at {base}: log in with the password"));
                    (Access::Password(hash), None)
                }
                None => {
                    let invitations = Invitations::default();
                    (Access::Invited(invitations.clone()), Some(invitations))
                }
            };
            let tower =
                ControlTower::new(mapper, history, access).allow_requests(args.allow_requests).trusted_proxies(proxies);
            let served = tower.with_option(public_url, ControlTower::public_url).serve(listener, stop.requested());
            let result = tokio::select! {
                result = served => result.map_err(|error| admin_error(&error)),
                error = invite(invitations, &base) => Err(error),
            };
            connection.close().await;
            result.map(|()| Exit::Success)
        })
        .await
    })
}

/// Prints a link that lets one browser in. After it was used another follows, if stderr is a terminal: it must not end up in a log.
/// Completes with an error only.
async fn invite(invitations: Option<Invitations>, base: &str) -> CliError {
    let Some(invitations) = invitations else { return pending().await };
    loop {
        match invitations.issue() {
            Err(error) => return CliError::of(Exit::Failure, &error),
            Ok(path) => output::note(&format!(
                "the Control Tower is at {base}{}\nthis link lets one browser in, once",
                path.as_str()
            )),
        }
        invitations.used().await;
        if !std::io::stderr().is_terminal() {
            return pending().await;
        }
    }
}

fn admin_error(error: &AdminError) -> CliError {
    match error {
        AdminError::NoPublicUrl(_) => CliError::of(Exit::Usage, error).help(
            "put a TLS proxy in front and give its URL, `--public-url https://NAME`; or listen on 127.0.0.1 and connect by \
             `ssh -L 4000:127.0.0.1:4000 HOST`",
        ),
        _ => CliError::of(Exit::Failure, error),
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        CliError::of(Exit::Failure, &error)
            .context(format!("cannot listen on {address}"))
            .help("another program may use it: give another with `--listen 127.0.0.1:PORT`")
    })
}

fn read_hash(path: &Path) -> Result<PasswordHash> {
    args::read_password(path)?.parse().map_err(|error| {
        CliError::of(Exit::Usage, &error)
            .context(format!("the password file {}", path.display()))
            .help("make it with `nanite admin hash-password > FILE`; it holds a hash, not the password")
    })
}

fn hash_password() -> Result<Exit> {
    let interactive = std::io::stdin().is_terminal();
    let password = if interactive { read_hidden_line("password: ")? } else { read_stdin_line()? };
    if interactive && read_hidden_line("again: ")? != password {
        return Err(CliError::usage("the passwords differ").help("try again"));
    }
    let hash = PasswordHash::new(&password).map_err(|error| match error {
        PasswordError::Length => CliError::of(Exit::Usage, &error).help("choose a longer one"),
        _ => CliError::of(Exit::Failure, &error),
    })?;
    output::line(&hash.to_string())?;
    if interactive {
        output::note("store it in a file of mode 0600, for `nanite admin --password-hash-file FILE`");
    }
    Ok(Exit::Success)
}

/// Reads a line from the terminal without echo.
fn read_hidden_line(prompt: &str) -> Result<Zeroizing<String>> {
    let failed = CliError::failed(Exit::Failure, "cannot use the terminal");
    let stdin = std::io::stdin();
    let before = tcgetattr(&stdin).map_err(&failed)?;
    let mut without_echo = before.clone();
    without_echo.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&stdin, OptionalActions::Flush, &without_echo).map_err(&failed)?;
    output::prompt(prompt);
    let text = read_stdin_line();
    // It fails only if the terminal is gone.
    let _ = tcsetattr(&stdin, OptionalActions::Now, &before);
    // The newline is not echoed either.
    output::note("");
    text
}

/// A line of stdin, without its newline.
fn read_stdin_line() -> Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(PasswordHash::MAX_PASSWORD_BYTES + 2));
    let limit = PasswordHash::MAX_PASSWORD_BYTES as u64 + 2;
    let read = std::io::stdin().lock().take(limit).read_line(&mut text);
    read.map_err(CliError::failed(Exit::Usage, "cannot read the password"))?;
    let end = text.trim_end_matches(['\r', '\n']).len();
    text.truncate(end);
    Ok(text)
}
