//! The lines of earlier consoles: in `$XDG_STATE_HOME/nanite/console-history`, for their owner only.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::certs::files;

/// How many lines are kept.
pub(super) const KEPT: usize = 1000;
/// The longest line that is kept, in bytes.
const LONGEST: usize = 4096;
/// How much of the file is read, in bytes.
const MAX: u64 = 8 * 1024 * 1024;

/// Where lines are kept; nowhere when there is no place.
#[derive(Debug)]
pub(super) struct History(Option<PathBuf>);

impl History {
    /// In this directory.
    pub(super) fn within(directory: Option<PathBuf>) -> Self {
        Self(directory.map(|directory| directory.join("console-history")))
    }

    /// The lines that are kept, the oldest first. A file that has grown long is cut.
    pub(super) fn load(&self) -> Vec<String> {
        let Some(path) = &self.0 else { return Vec::new() };
        let mut text = Vec::new();
        let read = open(path, OpenOptions::new().read(true)).and_then(|file| file.take(MAX).read_to_end(&mut text));
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the history cannot be read");
                return Vec::new();
            }
        }
        let text = String::from_utf8_lossy(&text);
        // What a terminal could take for more than text never came from a line that was typed.
        let mut lines: Vec<String> =
            text.lines().filter(|line| !line.contains(char::is_control)).map(str::to_owned).collect();
        if lines.len() > KEPT {
            lines.drain(..lines.len() - KEPT);
            let cut = lines.join("\n") + "\n";
            if let Err(error) = files::write(path, cut.as_bytes(), files::SECRET, true) {
                tracing::warn!(path = %path.display(), %error, "the history cannot be cut");
            }
        }
        lines
    }

    /// Keeps a line; one that begins with a blank is not meant to be kept.
    pub(super) fn keep(&self, line: &str) {
        let Some(path) = &self.0 else { return };
        if line.starts_with(' ') || line.len() > LONGEST || line.contains(char::is_control) {
            return;
        }
        let kept = files::create_directory(path.parent().unwrap_or(path)).and_then(|()| {
            let mut file = open(path, OpenOptions::new().append(true).create(true).mode(files::SECRET))?;
            file.write_all(format!("{line}\n").as_bytes())
        });
        if let Err(error) = kept {
            tracing::warn!(path = %path.display(), %error, "the line cannot be kept in the history");
        }
    }
}

fn open(path: &Path, options: &mut OpenOptions) -> io::Result<std::fs::File> {
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed()).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn n21_lines_are_kept_for_their_owner_only_and_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::within(Some(dir.path().join("nanite")));
        assert!(history.load().is_empty());
        history.keep("agents");
        history.keep(" request /secret/thing");
        history.keep(&"x".repeat(LONGEST + 1));
        history.keep("a\u{1b}[2J");
        history.keep("services");
        assert_eq!(history.load(), ["agents", "services"]);
        let path = dir.path().join("nanite/console-history");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for n in 0..2 * KEPT {
            history.keep(&format!("ping {n}"));
        }
        let lines = history.load();
        assert_eq!((lines.len(), lines[KEPT - 1].as_str()), (KEPT, "ping 1999"));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), KEPT);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        History::within(None).keep("nowhere");
    }

    #[test]
    fn n21_a_link_in_the_place_of_the_history_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "precious\n").unwrap();
        symlink(&victim, dir.path().join("console-history")).unwrap();
        let history = History::within(Some(dir.path().to_owned()));
        history.keep("agents");
        assert!(history.load().is_empty());
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious\n");
    }
}
