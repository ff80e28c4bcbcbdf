//! Files that hold a policy, whatever its language.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The largest file of rules, in bytes.
const MAX_FILE: u64 = 1024 * 1024;
/// How many rules one file may hold.
pub(super) const MAX_RULES: usize = 4096;

/// Why rules cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RulesError {
    /// The file cannot be read.
    #[error("cannot read the policy {path}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no set of rules.
    #[error("{0}")]
    Invalid(String),
}

/// Reads a file of at most 1 MiB. Blocks.
pub(super) fn read(path: &Path) -> Result<String, RulesError> {
    let unreadable = |source| RulesError::Unreadable { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(unreadable)?;
    let length = file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(unreadable)?;
    if length as u64 > MAX_FILE {
        return Err(RulesError::Invalid("the file is larger than 1 MiB".into()));
    }
    Ok(text)
}
