//! `nanite completions` and `nanite man`: generated from the definition of the command line.

use std::path::PathBuf;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use super::error::{CliError, Exit, Result};
use super::output;
use super::runtime::Global;

/// Print a script that completes the command line in a shell.
#[derive(Debug, clap::Args)]
pub(super) struct Completions {
    /// The shell.
    shell: Shell,
}

/// Write the manual: one page per command into a directory, or the main page to stdout.
#[derive(Debug, clap::Args)]
pub(super) struct Manual {
    /// The directory; created if it does not exist.
    directory: Option<PathBuf>,
}

pub(super) fn completions(mut program: Command, args: &Completions) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut program, "nanite", &mut script);
    output::write(&script)?;
    Ok(Exit::Success)
}

pub(super) fn manual(global: &Global, mut root: Command, args: &Manual) -> Result<Exit> {
    root.build();
    let Some(directory) = &args.directory else {
        output::write(&page(&root)?.1)?;
        return Ok(Exit::Success);
    };
    let failed = |error: std::io::Error| {
        CliError::of(Exit::Failure, &error).context(format!("cannot write to {}", directory.display()))
    };
    std::fs::create_dir_all(directory).map_err(failed)?;
    let (mut pages, mut commands) = (0, vec![&root]);
    while let Some(command) = commands.pop() {
        let (name, text) = page(command)?;
        std::fs::write(directory.join(name), text).map_err(failed)?;
        pages += 1;
        commands.extend(command.get_subcommands().filter(|command| !command.is_hide_set()));
    }
    global.note(&format!("{pages} pages in {}", directory.display()));
    Ok(Exit::Success)
}

/// The file name and the content of a command's page.
fn page(command: &Command) -> Result<(String, Vec<u8>)> {
    let man = Man::new(command.clone());
    let mut text = Vec::new();
    man.render(&mut text).map_err(|error| CliError::of(Exit::Failure, &error))?;
    Ok((man.get_filename(), text))
}
