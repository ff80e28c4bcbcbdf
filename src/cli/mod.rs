//! The command line: a file for each command. Commands put data on stdout and everything else on stderr.

#[cfg(feature = "admin")]
mod admin;
mod agent;
mod agents;
mod answers;
mod args;
mod ask;
mod audit;
mod broker;
mod certs;
mod config;
mod console;
mod daemon;
mod demo;
mod doctor;
mod duration;
mod error;
mod fleet;
mod generate;
mod guard;
mod inspect;
mod kept;
mod logging;
mod mapper;
mod node;
mod output;
mod passphrase;
mod payload;
mod ping;
mod policy;
mod push;
#[cfg(feature = "redis")]
mod redis;
mod reload;
mod remedy;
mod request;
mod runtime;
mod seal;
mod send_file;
mod setup;
mod signals;
mod size;
mod table;
mod text;
mod way;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use config::Config;
use error::{CliError, Exit};
use logging::Usual;

/// Security-first messaging: agents, mappers and requests over a broker that nobody has to trust.
///
/// Options of a node can also stand in nanite.toml in the working directory, and in NANITE_CERTS, NANITE_TOKEN and NANITE_BROKER;
/// the environment wins over the file, the command line over both.
#[derive(Debug, Parser)]
#[command(name = "nanite", version, propagate_version = true, disable_help_subcommand = true)]
struct Cli {
    /// The file with options, in place of nanite.toml in the working directory [also: NANITE_CONFIG].
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    #[command(flatten)]
    log: logging::Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make, look at and check certificates.
    #[command(subcommand)]
    Certs(certs::Command),
    Agent(agent::Args),
    Mapper(mapper::Args),
    Request(request::Command),
    Push(push::Command),
    SendFile(send_file::Args),
    /// Show the agents that are there, with their load, services and tags.
    Agents(agents::Args),
    /// Show the services that are offered, and by whom.
    Services(agents::Args),
    Ping(ping::Command),
    Console(console::Args),
    #[cfg(feature = "admin")]
    Admin(admin::Args),
    Seal(seal::Seal),
    Open(seal::Open),
    Inspect(inspect::Args),
    Doctor(doctor::Args),
    /// See a whole system work in this process: no broker is needed, and nothing is left behind.
    Demo(demo::Args),
    /// Check rules about who may do what, and see what they decide.
    #[command(subcommand)]
    Policy(policy::Command),
    /// Check an audit log.
    #[command(subcommand)]
    Audit(audit::Command),
    /// Set a broker up.
    #[command(subcommand)]
    Broker(setup::Command),
    Completions(generate::Completions),
    Man(generate::Manual),
}

/// What every command is given beside its own arguments.
struct Global {
    config: Config,
    quiet: bool,
    /// The arguments of this process, its name first.
    args: Vec<OsString>,
}

impl Global {
    /// Says something on stderr, unless only errors are wanted.
    fn note(&self, text: &str) {
        if !self.quiet {
            output::note(text);
        }
    }
}

/// Runs the program with these arguments, the first of which is its own name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way, too. When they cannot be printed there is nobody to tell.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { Exit::Success.into() };
        }
    };
    match command(cli, args) {
        Ok(exit) => exit.into(),
        Err(error) => error.report(),
    }
}

fn command(cli: Cli, args: Vec<OsString>) -> Result<Exit, CliError> {
    let config = match &cli.command {
        // They have no options in the file, and mend what is wrong with it, if need be.
        Command::Certs(_)
        | Command::Demo(_)
        | Command::Policy(_)
        | Command::Audit(_)
        | Command::Broker(_)
        | Command::Completions(_)
        | Command::Man(_) => Config::default(),
        _ => Config::load(cli.config.as_deref())?,
    };
    let usual = match &cli.command {
        Command::Agent(_) | Command::Mapper(_) => Usual::Events,
        // It has messages refused on purpose, and says so itself.
        Command::Demo(_) => Usual::Errors,
        // Somebody types where warnings would appear; what matters shows in the answers.
        Command::Console(_) => Usual::Errors,
        _ => Usual::Warnings,
    };
    let into_file = match &cli.command {
        Command::Agent(args) => args.logs_to_file(&config),
        Command::Mapper(args) => args.logs_to_file(&config),
        _ => false,
    };
    cli.log.init(&config, usual, into_file)?;
    let global = Global { config, quiet: cli.log.is_quiet(), args };
    match cli.command {
        Command::Certs(command) => certs::run(command),
        Command::Agent(args) => agent::run(&global, &args),
        Command::Mapper(args) => mapper::run(&global, &args),
        Command::Request(args) => request::run(&global, &args),
        Command::Push(args) => push::run(&global, &args),
        Command::SendFile(args) => send_file::run(&global, &args),
        Command::Agents(args) => agents::agents(&global, &args),
        Command::Services(args) => agents::services(&global, &args),
        Command::Ping(args) => ping::run(&global, &args),
        Command::Console(args) => console::run(&global, &args),
        #[cfg(feature = "admin")]
        Command::Admin(args) => admin::run(&global, &args),
        Command::Seal(args) => seal::seal(&global, &args),
        Command::Open(args) => seal::open(&global, &args),
        Command::Inspect(args) => inspect::run(&global, &args),
        Command::Doctor(args) => doctor::run(&global, &args),
        Command::Demo(args) => args.run(),
        Command::Policy(command) => policy::run(command),
        Command::Audit(command) => audit::run(command),
        Command::Broker(command) => setup::run(&global, &command),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::manual(&global, &args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn u02_the_description_of_the_arguments_is_sound() {
        Cli::command().debug_assert();
    }
}
