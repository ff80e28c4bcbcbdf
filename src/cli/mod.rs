//! The command line: a file for each command. Commands put data on stdout and everything else on stderr.

mod args;
mod certs;
mod duration;
mod error;
mod logging;
mod output;
mod remedy;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use error::Exit;

/// Security-first messaging: agents, mappers and requests over a broker that nobody has to trust.
#[derive(Debug, Parser)]
#[command(name = "nanite", version, propagate_version = true, disable_help_subcommand = true)]
struct Cli {
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
}

/// Runs the program with these arguments, the first of which is its own name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way, too. When they cannot be printed there is nobody to tell.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { Exit::Success.into() };
        }
    };
    let outcome = cli.log.init().and_then(|()| match cli.command {
        Command::Certs(command) => certs::run(command),
    });
    match outcome {
        Ok(exit) => exit.into(),
        Err(error) => error.report(),
    }
}
