//! Programs as actors: every executable `DIR/PREFIX/NAME` is the service `/PREFIX/NAME`, in any language.
//!
//! A new process is started for every request, in its own directory `DIR/PREFIX`. Its interface:
//!
//! | | |
//! |---|---|
//! | standard input | the payload as one line of JSON, then end of file; the program need not read it |
//! | standard output | the result: JSON if it parses, else text, without the last line break; no output is null |
//! | descriptor 3 | intermediate results, sent as they arrive: lines of JSON, `{"key":"k","value":..}`; the key is optional |
//! | exit code | 0 is success; any other code, or a signal, is a failure whose message is the end of standard error |
//! | arguments | none: no part of a message is ever passed as an argument or to a shell |
//! | environment | `PATH`, `HOME`, `LANG`, `LC_*`, `TZ`, `TMPDIR`, `USER` of the agent, and the variables below |
//! | `NANITE_SERVICE` | the service's name |
//! | `NANITE_CALLER` | the identity of the caller |
//! | `NANITE_TOKEN` | the token of the request, if it has one |
//! | `NANITE_DEADLINE` | the deadline of the request, in whole seconds since the Unix epoch, if it has one |
//!
//! A program is the leader of its own process group. When the deadline passes, the request is cancelled or a limit is exceeded, the
//! group gets SIGTERM, and SIGKILL after the [grace period](ProgramLimits::grace_period). Processes that remain in the group when
//! the program exits are killed. Child processes that moved to another group or session are not.
//!
//! Anyone who can write a program decides what runs. So the directory, everything in it that leads to a program, and the directories
//! above it must belong to root or the user of the agent, and must not be writable by others. Otherwise the program is
//! [skipped](ProgramActors::skipped), or the directory rejected. This is checked again before every run.

mod permissions;
mod process;
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher};
use parking_lot::Mutex;
use tokio::sync::watch;

use permissions::ProgramRoot;
use run::Program;

use super::actor::{Actor, Context, HandlerResult};
use crate::packet::{Failure, FailureCode, Payload, Register, Service};

pub use permissions::{ProgramError, SkipReason, Skipped};
pub use run::ProgramLimits;

/// How often the directory is scanned even if no change was reported.
const RESCAN_INTERVAL: Duration = Duration::from_secs(10);
/// Changes come in bursts: the directory is scanned this long after the first one.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// The most directory entries looked at in one scan.
const MAX_ENTRIES: usize = 16_384;

/// The programs of a directory, as an [`Actor`]. A thread watches the directory while this exists; changes are advertised.
///
/// ```no_run
/// use std::time::Duration;
/// use nanite::agent::{ProgramActors, ProgramLimits};
///
/// let programs = ProgramActors::open("examples/actors")?.limits(ProgramLimits::new().timeout(Duration::from_secs(60)));
/// for skipped in programs.skipped() {
///     eprintln!("{}: {}", skipped.path.display(), skipped.reason);
/// }
/// # Ok::<(), nanite::agent::ProgramError>(())
/// ```
#[derive(Debug)]
pub struct ProgramActors {
    shared: Arc<Shared>,
    /// Has seen the first listing; so have its clones.
    changes: watch::Receiver<u64>,
    wake: SyncSender<()>,
    limits: ProgramLimits,
}

impl ProgramActors {
    /// All programs in `dir`.
    ///
    /// Blocks on the file system, so call it before the agent starts. It needs no runtime; calls of the actor need a Tokio runtime
    /// with IO and time enabled.
    ///
    /// # Errors
    /// [`ProgramError`] says what is wrong with the directory.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ProgramError> {
        Self::open_prefixes(dir, [""; 0])
    }

    /// Only the programs in the directories `dir/PREFIX` of these prefixes; all if there are no prefixes. Otherwise as
    /// [`ProgramActors::open`].
    ///
    /// # Errors
    /// [`ProgramError`] says what is wrong with the directory or a prefix.
    pub fn open_prefixes(
        dir: impl AsRef<Path>,
        prefixes: impl IntoIterator<Item = impl Into<String>>,
    ) -> Result<Self, ProgramError> {
        let directory = Directory::open(dir.as_ref(), prefixes.into_iter().map(Into::into).collect())?;
        let listing = directory.scan();
        listing.log_newly_skipped(&Listing::default());
        let (changed, changes) = watch::channel(0);
        let shared = Arc::new(Shared {
            directory,
            listing: Mutex::new(Arc::new(listing)),
            changed,
            closed: AtomicBool::new(false),
        });
        // Capacity 1: if a wake-up is already waiting, the directory will be scanned anyway.
        let (wake, woken) = sync_channel(1);
        let thread = thread::Builder::new().name("nanite-programs".to_owned());
        let (watching, waking) = (shared.clone(), wake.clone());
        thread.spawn(move || watching.watch(&woken, waking)).map_err(ProgramError::Watch)?;
        Ok(Self { shared, changes, wake, limits: ProgramLimits::new() })
    }

    /// Sets the limits of every run.
    #[must_use]
    pub fn limits(mut self, limits: ProgramLimits) -> Self {
        self.limits = limits;
        self
    }

    /// The entries of the directory that are not offered, and why. Hidden files and other prefixes are not listed.
    pub fn skipped(&self) -> Vec<Skipped> {
        self.shared.listing().skipped.values().cloned().collect()
    }
}

#[async_trait]
impl Actor for ProgramActors {
    fn services(&self) -> Vec<Service> {
        self.shared.listing().programs.keys().cloned().collect()
    }

    async fn call(&self, service: &Service, payload: Payload, context: Context) -> HandlerResult<Payload> {
        let Some(program) = self.shared.listing().programs.get(service).cloned() else {
            return Err(Failure::new(FailureCode::NoSuchService, format!("no service {service} here")));
        };
        run::run(self.shared.directory.root.clone(), program, payload, context, self.limits).await
    }

    fn changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.changes.clone())
    }
}

impl Drop for ProgramActors {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        let _ = self.wake.try_send(());
    }
}

/// What the actor and its watching thread share.
#[derive(Debug)]
struct Shared {
    directory: Directory,
    listing: Mutex<Arc<Listing>>,
    /// Counts the changes of the offered services.
    changed: watch::Sender<u64>,
    closed: AtomicBool,
}

impl Shared {
    fn listing(&self) -> Arc<Listing> {
        self.listing.lock().clone()
    }

    /// Scans the directory whenever it may have changed, until the actor is dropped.
    fn watch(&self, woken: &Receiver<()>, wake: SyncSender<()>) {
        let mut notifications = Notifications::new(wake);
        while !self.closed.load(Ordering::Acquire) {
            self.scan();
            if notifications.watch_only(&self.listing().directories) {
                // A new directory may have changed before it was watched: scan again.
                continue;
            }
            match woken.recv_timeout(RESCAN_INTERVAL) {
                Ok(()) => thread::sleep(DEBOUNCE),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn scan(&self) {
        let listing = self.directory.scan();
        let previous = self.listing();
        if listing == *previous {
            return;
        }
        listing.log_newly_skipped(&previous);
        let services_changed = listing.programs != previous.programs;
        *self.listing.lock() = Arc::new(listing);
        if services_changed {
            tracing::info!("the offered programs have changed");
            self.changed.send_modify(|count| *count = count.wrapping_add(1));
        }
    }
}

/// File system notifications for a set of directories.
struct Notifications {
    watcher: Option<notify::RecommendedWatcher>,
    watched: BTreeSet<PathBuf>,
}

impl Notifications {
    fn new(wake: SyncSender<()>) -> Self {
        let on_event = move |event: notify::Result<notify::Event>| {
            // Reads change nothing, and a scan reads.
            let is_read =
                |kind| matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write));
            if !event.is_ok_and(|event| is_read(event.kind)) {
                let _ = wake.try_send(());
            }
        };
        let watcher = notify::recommended_watcher(on_event);
        if let Err(error) = &watcher {
            tracing::warn!(%error, interval = ?RESCAN_INTERVAL, "no file system notifications; polling the program directory");
        }
        Self { watcher: watcher.ok(), watched: BTreeSet::new() }
    }

    /// Watches these directories and no others. Returns whether a new one is watched.
    fn watch_only(&mut self, directories: &BTreeSet<PathBuf>) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        for removed in self.watched.difference(directories) {
            // Fails if the directory was deleted, which also ended the watch.
            let _ = watcher.unwatch(removed);
        }
        self.watched.retain(|path| directories.contains(path));
        let mut any_new = false;
        for path in directories {
            // Remembered even if it cannot be watched, so that the warning is logged once.
            if self.watched.insert(path.clone()) {
                match watcher.watch(path, RecursiveMode::NonRecursive) {
                    Ok(()) => any_new = true,
                    Err(error) => {
                        tracing::warn!(?path, %error, interval = ?RESCAN_INTERVAL, "no notifications; polling");
                    }
                }
            }
        }
        any_new
    }
}

/// The result of a scan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Listing {
    programs: BTreeMap<Service, Program>,
    /// By directory entry.
    skipped: BTreeMap<PathBuf, Skipped>,
    /// The directories that were read.
    directories: BTreeSet<PathBuf>,
}

impl Listing {
    fn skip(&mut self, entry: PathBuf, skipped: Skipped) {
        self.skipped.insert(entry, skipped);
    }

    /// Logs entries that were not skipped before, or for another reason.
    fn log_newly_skipped(&self, previous: &Listing) {
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
struct Directory {
    root: Arc<ProgramRoot>,
    /// The offered prefixes; all if empty.
    prefixes: BTreeSet<String>,
}

impl Directory {
    /// Checks the directory and the prefixes. Blocks on the file system.
    fn open(dir: &Path, prefixes: BTreeSet<String>) -> Result<Self, ProgramError> {
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
    fn scan(&self) -> Listing {
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

    use super::permissions::tests::{SCRIPT, program_dir, set_mode, write};
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
