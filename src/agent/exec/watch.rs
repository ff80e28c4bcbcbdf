//! Keeps what is known of the directory of programs up to date, on a thread of its own.
//!
//! The system tells of changes; where it cannot, or forgets one, a look every few seconds finds it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher};
use tokio::sync::watch;

use super::ProgramError;
use super::directory::{Directory, Listing};

/// How often the directory is looked at, whatever the system tells.
const RESCAN: Duration = Duration::from_secs(10);
/// How long after a change it is looked at: changes come in bursts.
const SETTLE: Duration = Duration::from_millis(20);

/// A directory of programs, and what it holds now.
#[derive(Debug)]
pub(super) struct Watched {
    shared: Arc<Shared>,
    /// Has seen the first listing; its clones have as well, and no later one.
    changes: watch::Receiver<u64>,
    wake: SyncSender<()>,
}

#[derive(Debug)]
struct Shared {
    directory: Arc<Directory>,
    listing: Mutex<Arc<Listing>>,
    /// Counts the changes of what is offered.
    changes: watch::Sender<u64>,
    ended: AtomicBool,
}

impl Watched {
    /// Looks at the directory, and begins to watch it.
    pub fn start(directory: Directory) -> Result<Self, ProgramError> {
        let (changed, changes) = watch::channel(0);
        let listing = directory.scan();
        listing.log_news(&Listing::default());
        let shared = Arc::new(Shared {
            directory: Arc::new(directory),
            listing: Mutex::new(Arc::new(listing)),
            changes: changed,
            ended: AtomicBool::new(false),
        });
        // One place: who finds it taken knows that the directory will be looked at.
        let (wake, woken) = sync_channel(1);
        let thread = thread::Builder::new().name("nanite-programs".to_owned());
        let (watching, waking) = (shared.clone(), wake.clone());
        thread.spawn(move || watching.keep(&woken, waking)).map_err(ProgramError::Watch)?;
        Ok(Self { shared, changes, wake })
    }

    /// What the directory holds.
    pub fn listing(&self) -> Arc<Listing> {
        self.shared.listing()
    }

    pub fn directory(&self) -> Arc<Directory> {
        self.shared.directory.clone()
    }

    /// Changes whenever the offered services do, the first time after the watching began.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        let _ = self.wake.try_send(());
    }
}

impl Shared {
    fn listing(&self) -> Arc<Listing> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks at the directory whenever it may have changed, until the actors are dropped.
    fn keep(&self, woken: &Receiver<()>, wake: SyncSender<()>) {
        let mut watches = Watches::new(wake);
        while !self.ended.load(Ordering::Acquire) {
            self.scan();
            if watches.follow(&self.listing().directories) {
                // What came into a new directory before it was watched is found by looking again.
                continue;
            }
            match woken.recv_timeout(RESCAN) {
                Ok(()) => thread::sleep(SETTLE),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn scan(&self) {
        let listing = self.directory.scan();
        let before = self.listing();
        if listing == *before {
            return;
        }
        listing.log_news(&before);
        let offered = listing.programs != before.programs;
        *self.listing.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(listing);
        if offered {
            tracing::info!("the programs that are offered have changed");
            self.changes.send_modify(|count| *count = count.wrapping_add(1));
        }
    }
}

/// The directories of which the system tells changes.
struct Watches {
    watcher: Option<notify::RecommendedWatcher>,
    watched: BTreeSet<PathBuf>,
}

impl Watches {
    fn new(wake: SyncSender<()>) -> Self {
        let told = move |event: notify::Result<notify::Event>| {
            // Reading, as a scan itself does, changes nothing.
            let is_read =
                |kind| matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write));
            if !event.is_ok_and(|event| is_read(event.kind)) {
                let _ = wake.try_send(());
            }
        };
        let watcher = notify::recommended_watcher(told);
        if let Err(error) = &watcher {
            tracing::warn!(%error, every = ?RESCAN, "changes of the directory of programs are found by looking, not at once");
        }
        Self { watcher: watcher.ok(), watched: BTreeSet::new() }
    }

    /// Watches these directories and no others. True when one is new.
    fn follow(&mut self, directories: &BTreeSet<PathBuf>) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        for gone in self.watched.difference(directories) {
            // A directory that was removed is watched no more anyway.
            let _ = watcher.unwatch(gone);
        }
        self.watched.retain(|path| directories.contains(path));
        let mut any = false;
        for path in directories {
            if !self.watched.contains(path) {
                any |= watch(watcher, path);
                // Also when it cannot be watched: that is said once.
                self.watched.insert(path.clone());
            }
        }
        any
    }
}

fn watch(watcher: &mut notify::RecommendedWatcher, path: &Path) -> bool {
    match watcher.watch(path, RecursiveMode::NonRecursive) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(?path, %error, every = ?RESCAN, "cannot be watched: its changes are found by looking");
            false
        }
    }
}
