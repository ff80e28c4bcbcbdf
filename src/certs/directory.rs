//! A store that reads a directory of certificates, and reads it again when it changes.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use super::fixed::{Peer, Peers};
use super::node::{CA_FILE, CRL_FILE, Content, identity_of};
use super::{
    Certificate, CertificateDirectory, CertificateStore, DirectoryError, RecipientQuery, SignerQuery, StoreError, Trust,
};
use crate::clock::Timestamp;

/// How often the directory is looked at without being told of a change.
const LOOK: Duration = Duration::from_secs(5);
/// How long a certificate stays known after another has taken its place: its owner may not have read the new one yet, and
/// messages that it signed are on their way.
const OVERLAP: Duration = Duration::from_secs(3600);
/// How long a certificate stays known after its file has become unreadable: it may be in the middle of being written.
const BROKEN: Duration = Duration::from_secs(60);

/// A certificate store that reads `agent-NAME.pem` and `mapper-NAME.pem` from a directory, as `nanite certs` makes them, and
/// `ca.pem` for its [`Trust`].
///
/// * It follows the directory: new, changed and removed files take effect by themselves, within milliseconds where the system
///   tells of changes, and within 5 s where it does not.
/// * A certificate that is replaced by another of the same identity stays known for an hour, so that a rotation loses no message.
///   One whose file is removed is unknown at once.
/// * A file that cannot be used is reported (in the log and by [`errors`](Self::errors)), and does not take the others down. When
///   the directory itself cannot be read, every question is answered by an error.
/// * It reads only certificates; keys are not looked at.
pub struct DirectoryCertificateStore {
    directory: CertificateDirectory,
    state: RwLock<Arc<State>>,
    trust: Option<Arc<Trust>>,
    /// Counts what the system told of.
    told: Arc<AtomicU64>,
    /// Counts the states.
    published: AtomicU64,
    upkeep: Mutex<Upkeep>,
}

/// What was read.
#[derive(Debug, Default)]
struct State {
    peers: Peers,
    errors: Vec<String>,
    /// The directory cannot be read.
    gone: Option<io::ErrorKind>,
}

/// What is needed to follow the directory.
#[derive(Default)]
struct Upkeep {
    looked_at: Option<Timestamp>,
    told: u64,
    files: BTreeMap<String, KnownFile>,
    watcher: Option<RecommendedWatcher>,
    watched: Option<u64>,
}

impl DirectoryCertificateStore {
    /// Reads a directory, and follows it from then on.
    ///
    /// # Errors
    /// [`DirectoryError`] when the directory cannot be read, or its `ca.pem` is there and cannot be used.
    pub fn open(path: impl Into<PathBuf>, now: Timestamp) -> Result<Self, DirectoryError> {
        let directory = CertificateDirectory::new(path);
        let trust = match directory.trust() {
            Ok(trust) => Some(Arc::new(trust)),
            Err(DirectoryError::NoAuthority(_)) => None,
            Err(error) => return Err(error),
        };
        let store = Self {
            directory,
            state: RwLock::default(),
            trust,
            told: Arc::default(),
            published: AtomicU64::new(0),
            upkeep: Mutex::default(),
        };
        store.reload(now)?;
        Ok(store)
    }

    /// The trust in the CAs of `ca.pem`, if there was one when the store was opened, with the revocation lists of `crl.pem`. It
    /// follows the files; when one is removed or cannot be used any more, it stays as it was, and the store reports that.
    pub fn trust(&self) -> Option<Arc<Trust>> {
        self.trust.clone()
    }

    /// Every certificate that is known now, those that others have replaced included.
    pub fn certificates(&self) -> Vec<Arc<Certificate>> {
        self.state().peers.all().map(|peer| peer.certificate.clone()).collect()
    }

    /// What is wrong with the files of the directory, one message each.
    pub fn errors(&self) -> Vec<String> {
        self.state().errors.clone()
    }

    /// Reads what has changed in the directory now, without waiting to be told.
    ///
    /// # Errors
    /// [`DirectoryError`] when the directory cannot be read.
    pub fn reload(&self, now: Timestamp) -> Result<(), DirectoryError> {
        self.load(&mut self.upkeep.lock().unwrap_or_else(PoisonError::into_inner), now)
    }

    fn state(&self) -> Arc<State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The state, after a look at whether it is still that of the directory.
    fn current(&self, now: Timestamp) -> Result<Arc<State>, StoreError> {
        if let Some(mut upkeep) = self.due(now) {
            // A failure is kept in the state.
            let _ = self.load(&mut upkeep, now);
        }
        let state = self.state();
        match state.gone {
            Some(kind) => Err(StoreError::Unreadable { path: self.directory.path().to_owned(), source: kind.into() }),
            None => Ok(state),
        }
    }

    /// The means to look at the directory, if it is time to. While one looks, the others do not wait: they use what there is.
    fn due(&self, now: Timestamp) -> Option<MutexGuard<'_, Upkeep>> {
        let upkeep = match self.upkeep.try_lock() {
            Ok(upkeep) => upkeep,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let told = self.told.load(Ordering::Acquire) != upkeep.told;
        // The clock may have gone back.
        let due = told || upkeep.looked_at.is_none_or(|at| now.since(at).max(at.since(now)) >= LOOK);
        due.then_some(upkeep)
    }

    fn load(&self, upkeep: &mut Upkeep, now: Timestamp) -> Result<(), DirectoryError> {
        upkeep.looked_at = Some(now);
        // Before reading: what changes in between is told of again.
        self.watch(upkeep);
        upkeep.told = self.told.load(Ordering::Acquire);
        let before = self.state();
        match self.read_changes(upkeep) {
            Ok(false) if before.gone.is_none() => Ok(()),
            Ok(_) => {
                self.publish(self.rebuild(upkeep, &before, now));
                Ok(())
            }
            Err(error) => {
                let kind = match &error {
                    DirectoryError::Unreadable { source, .. } => source.kind(),
                    _ => io::ErrorKind::NotFound,
                };
                if before.gone != Some(kind) {
                    tracing::error!("no certificates are known: {}", message(&error));
                    // The peers are kept for when it comes back; until then nothing is answered from them.
                    self.publish(State {
                        peers: before.peers.clone(),
                        errors: vec![message(&error)],
                        gone: Some(kind),
                    });
                }
                Err(error)
            }
        }
    }

    fn publish(&self, state: State) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(state);
        self.published.fetch_add(1, Ordering::AcqRel);
    }

    /// Reads the files that are new or have changed; says whether any were, or have gone.
    fn read_changes(&self, upkeep: &mut Upkeep) -> Result<bool, DirectoryError> {
        let mut files = BTreeMap::new();
        let mut changed = false;
        for name in self.directory.file_names()? {
            let signature = Signature::of(&self.directory.path().join(&name));
            let known = upkeep.files.remove(&name);
            if let Some(known) = known.as_ref().filter(|known| known.settled && known.signature == signature) {
                let content = known.content.clone();
                files.insert(name, KnownFile { signature, settled: true, content });
                continue;
            }
            let settled = signature.is_some_and(|signature| signature.is_settled());
            let content = self.directory.read_file(&name).map_err(|error| message(&error));
            let file = KnownFile { signature, settled, content: content.and_then(|content| self.take(content)) };
            if known.is_none_or(|known| !known.holds_the_same(&file)) {
                changed = true;
                if let Err(why) = &file.content {
                    tracing::warn!("{why}");
                }
            }
            files.insert(name, file);
        }
        changed |= !upkeep.files.is_empty();
        upkeep.files = files;
        Ok(changed)
    }

    /// Puts what a file holds where it belongs: CA certificates into the trust, those of nodes among the files.
    fn take(&self, content: Content) -> Result<Vec<Arc<Certificate>>, String> {
        match content {
            Content::Node(_, file) => Ok(file.nodes),
            Content::Authorities(_) | Content::Revocations(_) => {
                if let Some(trust) = &self.trust {
                    let new = self.directory.trust().map_err(|error| message(&error))?;
                    // Lists that were in use do not cease to count because their file is gone: that is reported below.
                    if new.checks_revocation() || !trust.checks_revocation() {
                        trust.replace_authorities(&new);
                    }
                }
                Ok(Vec::new())
            }
        }
    }

    /// The state that follows from the files, and from what was known before: what has been replaced is kept for a while.
    fn rebuild(&self, upkeep: &Upkeep, before: &State, now: Timestamp) -> State {
        let mut state = State::default();
        for (name, file) in &upkeep.files {
            let overlap = match &file.content {
                Ok(certificates) => {
                    for certificate in certificates {
                        state.peers.insert(Peer { certificate: certificate.clone(), until: None });
                    }
                    OVERLAP
                }
                Err(why) => {
                    state.errors.push(why.clone());
                    BROKEN
                }
            };
            let end = now.saturating_add(overlap);
            for peer in identity_of(name).iter().flat_map(|identity| before.peers.of(identity)) {
                let until = peer.until.map_or(end, |until| until.min(end));
                if now < until {
                    state.peers.insert(Peer { certificate: peer.certificate.clone(), until: Some(until) });
                }
            }
        }
        if self.trust.is_some() && !upkeep.files.contains_key(CA_FILE) {
            state.errors.push(message(&DirectoryError::NoAuthority(self.directory.ca_path())));
        }
        let revoking = self.trust.as_ref().is_some_and(|trust| trust.checks_revocation());
        if revoking && !upkeep.files.contains_key(CRL_FILE) {
            let path = self.directory.crl_path();
            state.errors.push(format!("there are no revocation lists any more: no file {}", path.display()));
        }
        state
    }

    /// Asks the system to tell of changes. Where it cannot, looking every few seconds has to do.
    fn watch(&self, upkeep: &mut Upkeep) {
        let inode = std::fs::metadata(self.directory.path()).ok().map(|metadata| metadata.ino());
        if inode.is_some() && inode == upkeep.watched {
            return;
        }
        let count = self.told.clone();
        let told = move |event: notify::Result<notify::Event>| {
            // Reading a file is an event, too: ours would never end.
            let read_only = matches!(
                &event,
                Ok(event) if matches!(event.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write))
            );
            if !read_only {
                count.fetch_add(1, Ordering::AcqRel);
            }
        };
        let watcher = notify::recommended_watcher(told).and_then(|mut watcher| {
            watcher.watch(self.directory.path(), RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => (upkeep.watcher, upkeep.watched) = (Some(watcher), inode),
            Err(error) => {
                tracing::warn!("changes of certificates are noticed within {LOOK:?} only: {error}");
                (upkeep.watcher, upkeep.watched) = (None, None);
            }
        }
    }
}

impl CertificateStore for DirectoryCertificateStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        Ok(self.current(query.now)?.peers.signer(query))
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        Ok(self.current(query.now)?.peers.recipients(query))
    }

    fn may_block(&self, now: Timestamp) -> bool {
        self.due(now).is_some()
    }

    /// Counts up when the system tells of a change, and when one has been read. Where the system does not tell, a change is
    /// noticed when one of the questions is asked.
    fn generation(&self) -> Option<u64> {
        Some(self.told.load(Ordering::Acquire).saturating_add(self.published.load(Ordering::Acquire)))
    }
}

impl fmt::Debug for DirectoryCertificateStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectoryCertificateStore").field("path", &self.directory.path()).finish_non_exhaustive()
    }
}

fn message(error: &DirectoryError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// A file as it was read.
#[derive(Debug)]
struct KnownFile {
    signature: Option<Signature>,
    /// It was not changed just before it was read: clocks of file systems are coarse, and could hide another change.
    settled: bool,
    content: Result<Vec<Arc<Certificate>>, String>,
}

impl KnownFile {
    fn holds_the_same(&self, other: &KnownFile) -> bool {
        match (&self.content, &other.content) {
            (Ok(ours), Ok(theirs)) => ours.iter().map(|c| c.fingerprint()).eq(theirs.iter().map(|c| c.fingerprint())),
            (Err(ours), Err(theirs)) => ours == theirs,
            _ => false,
        }
    }
}

/// What changes when a file does: inode, size, and the times of its content and of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signature {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Signature {
    fn of(path: &Path) -> Option<Self> {
        // Of what a link leads to.
        let file = std::fs::metadata(path).ok()?;
        let (modified, changed) = ((file.mtime(), file.mtime_nsec()), (file.ctime(), file.ctime_nsec()));
        Some(Self { inode: file.ino(), size: file.len(), modified, changed })
    }

    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().cast_signed();
        now.saturating_sub(self.changed.0) >= 2
    }
}
