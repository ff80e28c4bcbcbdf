//! Scanning the program directory: which files are offered as which services, and which are skipped.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::permissions::{ProgramError, ProgramRoot, SkipReason, Skipped};
use crate::packet::{Register, Service};

/// The most directory entries looked at in one scan.
const MAX_ENTRIES: usize = 16_384;

/// A program that may be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    /// DIR/PREFIX/NAME, not resolved: a program may behave differently by the name it is called with.
    pub path: PathBuf,
    /// DIR/PREFIX, its working directory.
    pub directory: PathBuf,
}

/// The result of a scan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Listing {
    pub programs: BTreeMap<Service, Program>,
    /// By directory entry.
    pub skipped: BTreeMap<PathBuf, Skipped>,
    /// The directories that were read.
    pub directories: BTreeSet<PathBuf>,
}

impl Listing {
    fn skip(&mut self, entry: PathBuf, skipped: Skipped) {
        self.skipped.insert(entry, skipped);
    }

    /// Logs entries that were not skipped before, or for another reason.
    pub fn log_newly_skipped(&self, previous: &Listing) {
        for (entry, skipped) in &self.skipped {
            if previous.skipped.get(entry) == Some(skipped) {
                continue;
            }
            let Skipped { path, reason } = skipped;
            if reason.is_expected() {
                tracing::debug!(?entry, %reason, "not a program");
            } else {
                tracing::warn!(?entry, ?path, %reason, "not offered as a service");
            }
        }
    }
}

/// A program directory, and which part of it is offered.
#[derive(Debug)]
pub(super) struct Directory {
    pub root: Arc<ProgramRoot>,
    /// The offered prefixes; all if empty.
    prefixes: BTreeSet<String>,
}

impl Directory {
    /// Checks the directory and the prefixes. Blocks on the file system.
    pub fn open(dir: &Path, prefixes: BTreeSet<String>) -> Result<Self, ProgramError> {
        let root = ProgramRoot::open(dir)?;
        for prefix in &prefixes {
            if format!("/{prefix}").parse::<Service>().is_err() || prefix.contains('/') {
                return Err(ProgramError::InvalidPrefix(prefix.clone()));
            }
            if !root.path.join(prefix).is_dir() {
                return Err(ProgramError::NoSuchPrefix { prefix: prefix.clone(), path: root.path });
            }
        }
        Ok(Self { root: Arc::new(root), prefixes })
    }

    /// Finds the programs. Blocks on the file system.
    pub fn scan(&self) -> Listing {
        let mut listing = Listing::default();
        let mut entries_seen = 0;
        for prefix in read_entries(&self.root.path, &mut listing, &mut entries_seen) {
            if !self.prefixes.is_empty() && !prefix.to_str().is_some_and(|prefix| self.prefixes.contains(prefix)) {
                continue;
            }
            let directory = self.root.path.join(&prefix);
            match self.root.resolve_directory(&directory) {
                Ok(real) => {
                    for name in read_entries(&real, &mut listing, &mut entries_seen) {
                        self.add_program(&directory, &prefix, &name, &mut listing);
                    }
                }
                Err(skipped) => listing.skip(directory, skipped),
            }
        }
        listing
    }

    fn add_program(&self, directory: &Path, prefix: &OsStr, name: &OsStr, listing: &mut Listing) {
        let path = directory.join(name);
        let service = match (prefix.to_str(), name.to_str()) {
            (Some(prefix), Some(name)) => format!("/{prefix}/{name}").parse::<Service>().ok(),
            _ => None,
        };
        // The name of a file that is not a program does not matter.
        let checked = self.root.check_program(&path).and_then(|()| match service {
            None => Err(Skipped::new(&path, SkipReason::InvalidName)),
            Some(_) if listing.programs.len() >= Register::MAX_SERVICES => {
                Err(Skipped::new(&path, SkipReason::TooMany))
            }
            Some(service) => Ok(service),
        });
        match checked {
            Ok(service) => {
                listing.programs.insert(service, Program { path, directory: directory.to_owned() });
            }
            Err(skipped) => listing.skip(path, skipped),
        }
    }
}

/// The names in a directory that are not hidden, in order.
fn read_entries(directory: &Path, listing: &mut Listing, entries_seen: &mut usize) -> BTreeSet<OsString> {
    let mut names = BTreeSet::new();
    listing.directories.insert(directory.to_owned());
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => {
            listing.skip(directory.to_owned(), Skipped::unreadable(directory, &error));
            return names;
        }
    };
    for entry in entries {
        *entries_seen += 1;
        if *entries_seen > MAX_ENTRIES {
            listing.skip(directory.to_owned(), Skipped::new(directory, SkipReason::TooMany));
            break;
        }
        match entry {
            Ok(entry) if entry.file_name().as_encoded_bytes().starts_with(b".") => {}
            Ok(entry) => {
                names.insert(entry.file_name());
            }
            Err(error) => listing.skip(directory.to_owned(), Skipped::unreadable(directory, &error)),
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::super::permissions::tests::{SCRIPT, program_dir, set_mode, write};
    use super::*;

    fn open(dir: &TempDir) -> Directory {
        Directory::open(dir.path(), BTreeSet::new()).unwrap()
    }

    fn services(listing: &Listing) -> Vec<&str> {
        listing.programs.keys().map(Service::as_str).collect()
    }

    fn reason(listing: &Listing, path: &Path) -> SkipReason {
        listing.skipped[path].reason.clone()
    }

    #[test]
    fn executables_two_levels_down_are_services() {
        let dir = program_dir();
        let upper = write(&dir, "text/upper", SCRIPT, 0o755);
        write(&dir, "disk/usage.sh", SCRIPT, 0o700);
        write(&dir, "text/.hidden", SCRIPT, 0o755);
        write(&dir, ".git/hook", SCRIPT, 0o755);
        let readme = write(&dir, "README.md", "read me", 0o644);
        let notes = write(&dir, "text/notes", "notes", 0o644);
        let deep = write(&dir, "text/deep/er", SCRIPT, 0o755);
        let listing = open(&dir).scan();
        assert_eq!(services(&listing), ["/disk/usage.sh", "/text/upper"]);
        let program = &listing.programs[&"/text/upper".parse().unwrap()];
        assert_eq!((program.path.as_path(), program.directory.as_path()), (&*upper, upper.parent().unwrap()));
        assert_eq!(listing.skipped.len(), 3, "{listing:?}");
        assert_eq!(reason(&listing, &readme), SkipReason::NotADirectory);
        assert_eq!(reason(&listing, &notes), SkipReason::NotExecutable);
        assert_eq!(reason(&listing, deep.parent().unwrap()), SkipReason::NotAFile);
    }

    #[test]
    fn invalid_names_and_formats_are_skipped() {
        let dir = program_dir();
        let mut expected = BTreeMap::new();
        for name in ["text/to upper", "text/upper~", "tëxt/upper"] {
            expected.insert(write(&dir, name, SCRIPT, 0o755), SkipReason::InvalidName);
        }
        for (name, text) in [("text/bare", "echo hello\n"), ("text/empty", "")] {
            expected.insert(write(&dir, name, text, 0o755), SkipReason::UnknownFormat);
        }
        let listing = open(&dir).scan();
        assert!(listing.programs.is_empty());
        for (path, expected) in expected {
            assert_eq!(reason(&listing, &path), expected, "{path:?}");
        }
    }

    #[test]
    fn programs_are_offered_while_only_their_owner_can_write_them() {
        let dir = program_dir();
        let group_writable = write(&dir, "text/group", SCRIPT, 0o775);
        let program = write(&dir, "open/program", SCRIPT, 0o755);
        let prefix = program.parent().unwrap();
        set_mode(prefix, 0o1777);
        let directory = open(&dir);
        let listing = directory.scan();
        assert!(listing.programs.is_empty());
        assert_eq!(reason(&listing, &group_writable), SkipReason::WritableByOthers);
        assert_eq!(reason(&listing, prefix), SkipReason::WritableByOthers);
        set_mode(prefix, 0o755);
        assert_eq!(services(&directory.scan()), ["/open/program"]);
        // Not run even before the next scan.
        set_mode(prefix, 0o777);
        let refused = Skipped::new(prefix, SkipReason::WritableByOthers);
        assert_eq!(directory.root.check_program(&program), Err(refused));
    }

    #[test]
    fn symlinked_programs_and_prefixes_are_offered() {
        let (dir, outside) = (program_dir(), program_dir());
        let upper = write(&dir, "text/upper", SCRIPT, 0o755);
        write(&outside, "text/elsewhere", SCRIPT, 0o755);
        let root = dir.path().canonicalize().unwrap();
        symlink(&upper, root.join("text/link")).unwrap();
        symlink("text", root.join("also")).unwrap();
        symlink(outside.path().join("text"), root.join("away")).unwrap();
        let listing = open(&dir).scan();
        assert_eq!(services(&listing), ["/also/link", "/also/upper", "/text/link", "/text/upper"]);
        assert_eq!(reason(&listing, &root.join("away")), SkipReason::SymlinkOutside);
    }

    #[test]
    fn selected_prefixes_must_be_valid_and_exist() {
        let dir = program_dir();
        for name in ["a/one", "b/two", "c/three"] {
            write(&dir, name, SCRIPT, 0o755);
        }
        let select = |prefixes: &[&str]| Directory::open(dir.path(), prefixes.iter().map(|&p| p.to_owned()).collect());
        assert_eq!(services(&select(&["c", "a"]).unwrap().scan()), ["/a/one", "/c/three"]);
        assert!(matches!(select(&["a", "d"]), Err(ProgramError::NoSuchPrefix { prefix, .. }) if prefix == "d"));
        for invalid in ["", "..", "a/one", "/a", "a b"] {
            assert!(matches!(select(&[invalid]), Err(ProgramError::InvalidPrefix(p)) if p == invalid), "{invalid:?}");
        }
    }

    #[test]
    fn offers_no_more_programs_than_an_agent_may_register() {
        let dir = program_dir();
        for number in 0..=Register::MAX_SERVICES {
            write(&dir, &format!("many/{number:05}"), SCRIPT, 0o755);
        }
        let listing = open(&dir).scan();
        assert_eq!(listing.programs.len(), Register::MAX_SERVICES);
        assert_eq!(listing.skipped.values().map(|skipped| &skipped.reason).collect::<Vec<_>>(), [&SkipReason::TooMany]);
    }
}
