//! Passphrases of keys: from files that only their owner can read, never from arguments.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::error::{CliError, Exit};

/// The longest passphrase, in bytes.
const MAX: u64 = 1024;

/// The passphrase of a node's key.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// The file whose first line is the passphrase of the node's key.
    #[arg(long, value_name = "FILE", env = "NANITE_KEY_PASSPHRASE_FILE", hide_env = true)]
    passphrase_file: Option<PathBuf>,
}

/// The passphrase of the CA's key.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub(super) struct CaArgs {
    /// The file whose first line is the passphrase of the CA's key.
    #[arg(long, value_name = "FILE", env = "NANITE_CA_PASSPHRASE_FILE", hide_env = true)]
    ca_passphrase_file: Option<PathBuf>,
}

impl Args {
    /// Reads it, where a file is named.
    pub(super) fn read(&self) -> Result<Option<Zeroizing<Vec<u8>>>, CliError> {
        self.passphrase_file.as_deref().map(read).transpose()
    }
}

impl CaArgs {
    /// Reads it, where a file is named.
    pub(super) fn read(&self) -> Result<Option<Zeroizing<Vec<u8>>>, CliError> {
        self.ca_passphrase_file.as_deref().map(read).transpose()
    }
}

/// The first line of a file that only its owner can read.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let shown = path.display();
    let unreadable = |error: std::io::Error| {
        CliError::of(Exit::Security, &error)
            .context(format!("cannot read the passphrase file {shown}"))
            .help("check the path, and who may read it")
    };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.mode() & 0o7777;
    if mode & 0o177 != 0 {
        let message = format!("the passphrase file {shown} has mode {mode:04o}: others than its owner can use it");
        return Err(CliError::new(Exit::Security, message).help(format!("run `chmod 600 {shown}`")));
    }
    let mut text = Zeroizing::new(Vec::with_capacity(MAX as usize + 1));
    file.take(MAX + 1).read_to_end(&mut text).map_err(unreadable)?;
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.is_empty() || line.len() as u64 > MAX {
        return Err(CliError::new(Exit::Security, format!("the passphrase file {shown} has no usable first line"))
            .help("write the passphrase into its first line: 1 to 1024 bytes"));
    }
    Ok(Zeroizing::new(line.to_vec()))
}
