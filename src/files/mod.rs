//! File broadcast: a file is sent to every agent that subscribed to its domain.
//!
//! The sender announces the file (name, length, SHA-256), sends chunks no faster than every receiver confirms them, and gets an outcome
//! from each receiver. A receiver writes only below its root directory, under a temporary name, and renames the file when it is
//! complete and its digest is right. A failed transfer leaves nothing.

mod receive;
mod send;

pub(crate) use receive::FileReceiver;
pub use receive::{FileRoot, FileRootError, ReceivedFile};
pub use send::{Broadcast, BroadcastError, Progress};
pub(crate) use send::{OutgoingTransfer, Receiver};

/// The size of a chunk, in bytes.
pub(crate) const CHUNK_BYTES: usize = 256 * 1024;
/// The most chunks that may be sent to a receiver without its confirmation.
pub(crate) const MAX_UNCONFIRMED_CHUNKS: u64 = 16;
/// A receiver confirms each time it has received this many chunks.
pub(crate) const CONFIRM_EVERY_CHUNKS: u64 = 4;
/// The key of the intermediate results in which a receiver confirms the number of chunks that it has.
pub(crate) const CONFIRMED_KEY: &str = "received";

/// How the names of unfinished files begin. A file with such a name cannot be sent.
const TEMPORARY_PREFIX: &str = ".nanite-";

/// Whether a text is a plain file name: one path component of at most 255 bytes, not hidden, without control characters.
pub(crate) fn is_file_name(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && !name.starts_with('.')
        && !name.chars().any(|c| c == '/' || c == '\\' || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n19_file_name_is_one_path_component() {
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
