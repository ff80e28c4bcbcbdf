//! File broadcast: a file goes to every agent that subscribed to its domain.
//!
//! The sender says what comes (name, length, SHA-256), sends chunks no faster than every receiver confirms them, and gets an
//! outcome from each. A receiver writes under its root only, under a temporary name, and gives the file its name when it is whole
//! and its digest right; of a transfer that breaks nothing is left.

mod receive;
mod send;

pub(crate) use receive::FileBox;
pub use receive::{FileRoot, FileRootError, ReceivedFile};
pub use send::{Broadcast, BroadcastError, Progress};
pub(crate) use send::{Receiver, Transfer};

/// How many bytes of the file one chunk carries.
pub(crate) const CHUNK: usize = 256 * 1024;
/// How many chunks may be on their way to a receiver that has not confirmed them.
pub(crate) const WINDOW: u64 = 16;
/// After how many chunks a receiver says how far it is.
pub(crate) const CONFIRM_EVERY: u64 = 4;
/// The key of the intermediate results by which a receiver says how many chunks it has.
pub(crate) const CONFIRMED: &str = "received";

/// How the names of unfinished files begin; no file can be sent under such a name.
const TEMPORARY: &str = ".nanite-";

/// Whether a text can name a file in a directory, and nothing else: one component, at most 255 bytes, not hidden, no control
/// characters.
pub(crate) fn is_file_name(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && !name.starts_with('.')
        && !name.chars().any(|c| c == '/' || c == '\\' || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n19_a_name_is_one_component() {
        for good in ["a.bin", "Ünïcode name.txt", "a..b", "-rf"] {
            assert!(is_file_name(good), "{good:?}");
        }
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "/etc/passwd",
            "a/b",
            "a\0b",
            "a\nb",
            ".hidden",
            ".nanite-x",
            "a\\b",
            &"x".repeat(256),
        ] {
            assert!(!is_file_name(bad), "{bad:?}");
        }
    }
}
