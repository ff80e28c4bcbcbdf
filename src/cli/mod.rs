//! The command line: a file for each command or group of commands. Data goes to stdout, everything else to stderr.

#[cfg(feature = "admin")]
mod admin;
mod agent;
mod args;
mod certs;
mod config;
mod connection;
mod console;
mod daemon;
mod demo;
mod dispatch;
mod doctor;
mod error;
mod fleet;

mod inspect;
mod mapper;
mod node;
mod offline;
mod options;
mod output;

mod remedy;
mod request;
mod runtime;
mod seal;
mod send_file;
mod setup;
mod state_dir;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use config::Config;
use error::{Exit, Result};
use node::WithNode;
use runtime::DefaultLevel;
use runtime::Global;

/// Security-first messaging: agents, mappers and requests over an untrusted broker.
///
/// Options of a node can also be set in nanite.toml in the working directory, and in NANITE_CERTS, NANITE_TOKEN and NANITE_BROKER.
/// The environment overrides the file, the command line overrides both.
#[derive(Debug, Parser)]
#[command(name = "nanite", version, propagate_version = true, disable_help_subcommand = true)]
struct Cli {
    /// The file with options, instead of nanite.toml in the working directory [also: NANITE_CONFIG].
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    #[command(flatten)]
    log: runtime::Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make, show and check certificates.
    #[command(subcommand)]
    Certs(certs::Command),
    Agent(agent::Args),
    Mapper(mapper::Args),
    Request(WithNode<request::RequestArgs>),
    Push(WithNode<request::PushArgs>),
    SendFile(send_file::Args),
    /// List the registered agents, with their load, services and tags.
    Agents(fleet::Args),
    /// List the services that agents offer, and the agents that offer them.
    Services(fleet::Args),
    Ping(WithNode<fleet::PingArgs>),
    Console(console::Args),
    #[cfg(feature = "admin")]
    Admin(admin::Args),
    Seal(seal::Seal),
    Open(seal::Open),
    Inspect(inspect::Args),
    Doctor(doctor::Args),
    /// Run a whole system in this process: it needs no broker, and leaves nothing behind.
    Demo(demo::Args),
    /// Check the rules for who may do what, and show what they decide.
    #[command(subcommand)]
    Policy(offline::Command),
    /// Check an audit log.
    #[command(subcommand)]
    Audit(offline::AuditCommand),
    /// Set up a broker.
    #[command(subcommand)]
    Broker(setup::Command),
    Completions(offline::Completions),
    Man(offline::Manual),
}

/// Runs the program with these arguments, starting with its own name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            // Also for help and version. A failure to print is ignored: there is nowhere to report it.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { Exit::Success.into() };
        }
    };
    match cli.run(args) {
        Ok(exit) => exit.into(),
        Err(error) => output::report(&error),
    }
}

impl Cli {
    fn run(self, args: Vec<OsString>) -> Result<Exit> {
        let config = match &self.command {
            // They have no options in the file, and may be needed to correct it.
            Command::Certs(_)
            | Command::Demo(_)
            | Command::Policy(_)
            | Command::Audit(_)
            | Command::Broker(_)
            | Command::Completions(_)
            | Command::Man(_) => Config::default(),
            _ => Config::load(self.config.as_deref())?,
        };
        let (level, log_dir) = match &self.command {
            Command::Agent(args) => (DefaultLevel::Info, args.daemon.log_dir(&config)),
            Command::Mapper(args) => (DefaultLevel::Info, args.daemon.log_dir(&config)),
            // The demo provokes warnings, and the console would print them where the user types.
            Command::Demo(_) | Command::Console(_) => (DefaultLevel::Error, None),
            _ => (DefaultLevel::Warn, None),
        };
        self.log.init(&config, level, log_dir.is_some())?;
        let global = &Global { config, quiet: self.log.quiet, args };
        match self.command {
            Command::Certs(command) => certs::run(command),
            Command::Agent(args) => agent::run(global, &args),
            Command::Mapper(args) => mapper::run(global, &args),
            Command::Request(args) => request::request(global, &args),
            Command::Push(args) => request::push(global, &args),
            Command::SendFile(args) => send_file::run(global, &args),
            Command::Agents(args) => fleet::list(global, &args, fleet::show_agents),
            Command::Services(args) => fleet::list(global, &args, fleet::show_services),
            Command::Ping(args) => fleet::ping(global, &args),
            Command::Console(args) => console::run(global, &args),
            #[cfg(feature = "admin")]
            Command::Admin(args) => admin::run(global, &args),
            Command::Seal(args) => seal::seal(global, &args),
            Command::Open(args) => seal::open(global, &args),
            Command::Inspect(args) => inspect::run(global, &args),
            Command::Doctor(args) => doctor::run(global, &args),
            Command::Demo(args) => args.run(),
            Command::Policy(command) => offline::run(command),
            Command::Audit(command) => offline::run_audit(command),
            Command::Broker(command) => setup::run(global, &command),
            Command::Completions(args) => offline::completions(Self::command(), &args),
            Command::Man(args) => offline::manual(global, Self::command(), &args),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u02_clap_definition_is_valid() {
        Cli::command().debug_assert();
    }
}
