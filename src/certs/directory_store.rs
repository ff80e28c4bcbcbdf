//! A store that reads the certificates of a directory, and follows its changes.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use parking_lot::{Mutex, MutexGuard, RwLock};

use super::certificate::Certificate;
use super::certificate_directory::{CA_FILE, CRL_FILE, CertificateDirectory, Content, identity_of_file};
use super::files::DirectoryError;
use super::store::{CertificateSet, CertificateStore, Entry, RecipientQuery, SignerQuery, StoreError};
use super::trust::Trust;
use crate::clock::Timestamp;

/// The time between two scans of the directory without a change notification.
const RESCAN_INTERVAL: Duration = Duration::from_secs(5);
/// How long a replaced certificate stays known: its owner may not use the new one yet, and messages that it signed may still arrive.
const REPLACED_LIFETIME: Duration = Duration::from_secs(3600);
/// How long a certificate stays known after its file became unreadable: another program may be writing it.
const UNREADABLE_LIFETIME: Duration = Duration::from_secs(60);
/// The age in seconds from which a file's change time is reliable: timestamps of file systems are coarse and could hide another change.
const SETTLED_AGE_SECS: i64 = 2;

/// A certificate store that reads `agent-NAME.pem` and `mapper-NAME.pem` from a directory, as `nanite certs` creates them, and `ca.pem`
/// for its [`Trust`].
///
/// * It follows the directory: new, changed and removed files take effect within milliseconds where the system notifies of changes, and
///   within 5 s elsewhere.
/// * A certificate that another one of the same identity replaces stays known for an hour, so that no message is lost during a rotation. A
///   certificate whose file is removed is unknown at once.
/// * A file that cannot be used is reported in the log and by [`errors`](Self::errors), and does not affect the others. While the directory
///   itself cannot be read, every query fails.
/// * It reads certificates only, not keys.
///
/// ```
/// use nanite::certs::{CertificateAuthority, DirectoryCertificateStore, KeyType};
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let now = SystemClock.now();
/// # let directory = tempfile::tempdir()?;
/// # let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// # let fred = ca.issue(&Identity::agent("fred")?, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
/// # std::fs::write(directory.path().join("ca.pem"), ca.certificate().to_pem()?)?;
/// # std::fs::write(directory.path().join("agent-fred.pem"), fred.certificate().to_pem())?;
/// let store = DirectoryCertificateStore::open(directory.path(), now)?;
/// assert_eq!(store.certificates().len(), 1);
/// assert!(store.errors().is_empty() && store.trust().is_some());
/// # Ok(())
/// # }
/// ```
pub struct DirectoryCertificateStore {
    directory: CertificateDirectory,
    state: RwLock<Arc<State>>,
    trust: Option<Arc<Trust>>,
    /// Counts the change notifications.
    notifications: Arc<AtomicU64>,
    /// Counts the states.
    published: AtomicU64,
    scanner: Mutex<Scanner>,
}

/// The certificates and errors of the latest scan.
#[derive(Debug, Default)]
struct State {
    certificates: CertificateSet,
    errors: Vec<String>,
    /// Why the directory cannot be read.
    unreadable: Option<io::ErrorKind>,
}

/// What the next scan builds on.
#[derive(Default)]
struct Scanner {
    scanned_at: Option<Timestamp>,
    notifications: u64,
    files: BTreeMap<String, ScannedFile>,
    watcher: Option<RecommendedWatcher>,
    watched_inode: Option<u64>,
}

impl DirectoryCertificateStore {
    /// Reads a directory, and follows it from then on.
    ///
    /// # Errors
    /// [`DirectoryError`] when the directory cannot be read, or its `ca.pem` exists and cannot be used.
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
            notifications: Arc::default(),
            published: AtomicU64::new(0),
            scanner: Mutex::default(),
        };
        store.reload(now)?;
        Ok(store)
    }

    /// The trust in the CA certificates of `ca.pem`, with the revocation lists of `crl.pem`; none when there was no `ca.pem` when the store
    /// was opened. It follows both files. When one is removed or becomes unusable, the trust does not change, and the store reports it.
    pub fn trust(&self) -> Option<Arc<Trust>> {
        self.trust.clone()
    }

    /// Every known certificate, including those that others have replaced.
    pub fn certificates(&self) -> Vec<Arc<Certificate>> {
        self.state().certificates.all().map(|entry| entry.certificate.clone()).collect()
    }

    /// The problems with the files of the directory, one message each.
    pub fn errors(&self) -> Vec<String> {
        self.state().errors.clone()
    }

    /// Reads the changes of the directory now, without a notification.
    ///
    /// # Errors
    /// [`DirectoryError`] when the directory cannot be read.
    pub fn reload(&self, now: Timestamp) -> Result<(), DirectoryError> {
        self.scan(&mut self.scanner.lock(), now)
    }

    fn state(&self) -> Arc<State> {
        self.state.read().clone()
    }

    /// The state, after a scan if one is due.
    fn current_state(&self, now: Timestamp) -> Result<Arc<State>, StoreError> {
        if let Some(mut scanner) = self.scanner_if_due(now) {
            // The state records a failure.
            let _ = self.scan(&mut scanner, now);
        }
        let state = self.state();
        match state.unreadable {
            Some(kind) => Err(StoreError::Unreadable { path: self.directory.path().to_owned(), source: kind.into() }),
            None => Ok(state),
        }
    }

    /// The scanner, if a scan is due. While one thread scans, the others do not wait but use the current state.
    fn scanner_if_due(&self, now: Timestamp) -> Option<MutexGuard<'_, Scanner>> {
        let scanner = self.scanner.try_lock()?;
        let notified = self.notifications.load(Ordering::Acquire) != scanner.notifications;
        // The clock may have gone back.
        let due = notified || scanner.scanned_at.is_none_or(|at| now.since(at).max(at.since(now)) >= RESCAN_INTERVAL);
        due.then_some(scanner)
    }

    fn scan(&self, scanner: &mut Scanner, now: Timestamp) -> Result<(), DirectoryError> {
        scanner.scanned_at = Some(now);
        // Before reading, so that a change meanwhile causes another scan.
        self.watch(scanner);
        scanner.notifications = self.notifications.load(Ordering::Acquire);
        let before = self.state();
        match self.read_changes(scanner) {
            Ok(false) if before.unreadable.is_none() => Ok(()),
            Ok(_) => {
                self.publish(self.next_state(scanner, &before, now));
                Ok(())
            }
            Err(error) => {
                let kind = match &error {
                    DirectoryError::Unreadable { source, .. } => source.kind(),
                    _ => io::ErrorKind::NotFound,
                };
                if before.unreadable != Some(kind) {
                    tracing::error!("cannot read the certificates: {}", message(&error));
                    // The certificates are kept until the directory is back; meanwhile queries fail.
                    self.publish(State {
                        certificates: before.certificates.clone(),
                        errors: vec![message(&error)],
                        unreadable: Some(kind),
                    });
                }
                Err(error)
            }
        }
    }

    fn publish(&self, state: State) {
        *self.state.write() = Arc::new(state);
        self.published.fetch_add(1, Ordering::AcqRel);
    }

    /// Reads new and changed files. Returns whether the contents of the directory have changed.
    fn read_changes(&self, scanner: &mut Scanner) -> Result<bool, DirectoryError> {
        let mut files = BTreeMap::new();
        let mut changed = false;
        for name in self.directory.file_names()? {
            let version = FileVersion::of(&self.directory.path().join(&name));
            let before = scanner.files.remove(&name);
            if let Some(before) = before.as_ref().filter(|before| before.settled && before.version == version) {
                let content = before.content.clone();
                files.insert(name, ScannedFile { version, settled: true, content });
                continue;
            }
            let settled = version.is_some_and(|version| version.is_settled());
            let content = self.directory.read_file(&name).map_err(|error| message(&error));
            let file = ScannedFile { version, settled, content: content.and_then(|content| self.apply(content)) };
            if before.is_none_or(|before| !before.has_content_of(&file)) {
                changed = true;
                if let Err(why) = &file.content {
                    tracing::warn!("{why}");
                }
            }
            files.insert(name, file);
        }
        changed |= !scanner.files.is_empty();
        scanner.files = files;
        Ok(changed)
    }

    /// Updates the trust from CA certificates and revocation lists; returns the certificates of nodes.
    fn apply(&self, content: Content) -> Result<Vec<Arc<Certificate>>, String> {
        match content {
            Content::Node(_, file) => Ok(file.certificates),
            Content::Authorities(_) | Content::Revocations(_) => {
                if let Some(trust) = &self.trust {
                    let new = self.directory.trust().map_err(|error| message(&error))?;
                    // Removing the file of the lists in use does not turn revocation off; `next_state` reports it.
                    if new.checks_revocation() || !trust.checks_revocation() {
                        trust.replace_authorities(&new);
                    }
                }
                Ok(Vec::new())
            }
        }
    }

    /// The state after a scan: the certificates of the files, and for some time those that they have replaced.
    fn next_state(&self, scanner: &Scanner, before: &State, now: Timestamp) -> State {
        let mut state = State::default();
        for (name, file) in &scanner.files {
            let lifetime = match &file.content {
                Ok(certificates) => {
                    for certificate in certificates {
                        state.certificates.insert(Entry { certificate: certificate.clone(), until: None });
                    }
                    REPLACED_LIFETIME
                }
                Err(why) => {
                    state.errors.push(why.clone());
                    UNREADABLE_LIFETIME
                }
            };
            let end = now.saturating_add(lifetime);
            for entry in identity_of_file(name).iter().flat_map(|identity| before.certificates.of(identity)) {
                let until = entry.until.map_or(end, |until| until.min(end));
                if now < until {
                    state.certificates.insert(Entry { certificate: entry.certificate.clone(), until: Some(until) });
                }
            }
        }
        if self.trust.is_some() && !scanner.files.contains_key(CA_FILE) {
            state.errors.push(message(&DirectoryError::NoAuthority(self.directory.ca_path())));
        }
        let checks_revocation = self.trust.as_ref().is_some_and(|trust| trust.checks_revocation());
        if checks_revocation && !scanner.files.contains_key(CRL_FILE) {
            let path = self.directory.crl_path();
            state.errors.push(format!("the revocation lists have been removed: no file {}", path.display()));
        }
        state
    }

    /// Subscribes to change notifications. Where the system has none, only the regular scans notice changes.
    fn watch(&self, scanner: &mut Scanner) {
        let inode = std::fs::metadata(self.directory.path()).ok().map(|metadata| metadata.ino());
        if inode.is_some() && inode == scanner.watched_inode {
            return;
        }
        let notifications = self.notifications.clone();
        let on_event = move |event: notify::Result<notify::Event>| {
            // The scans themselves read files, and must not cause more scans.
            let only_reads = matches!(
                &event,
                Ok(event) if matches!(event.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write))
            );
            if !only_reads {
                notifications.fetch_add(1, Ordering::AcqRel);
            }
        };
        let watcher = notify::recommended_watcher(on_event).and_then(|mut watcher| {
            watcher.watch(self.directory.path(), RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => (scanner.watcher, scanner.watched_inode) = (Some(watcher), inode),
            Err(error) => {
                tracing::warn!("changes of certificates are noticed only every {RESCAN_INTERVAL:?}: {error}");
                (scanner.watcher, scanner.watched_inode) = (None, None);
            }
        }
    }
}

impl CertificateStore for DirectoryCertificateStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        Ok(self.current_state(query.now)?.certificates.signer(query))
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        Ok(self.current_state(query.now)?.certificates.recipients(query))
    }

    fn may_block(&self, now: Timestamp) -> bool {
        self.scanner_if_due(now).is_some()
    }

    /// Increases with every change notification, and with every scan that found changes. Without notifications, only a query notices a
    /// change.
    fn generation(&self) -> Option<u64> {
        Some(self.notifications.load(Ordering::Acquire).saturating_add(self.published.load(Ordering::Acquire)))
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

/// A file of the latest scan.
#[derive(Debug)]
struct ScannedFile {
    version: Option<FileVersion>,
    /// Whether the version identifies the content.
    settled: bool,
    content: Result<Vec<Arc<Certificate>>, String>,
}

impl ScannedFile {
    fn has_content_of(&self, other: &ScannedFile) -> bool {
        match (&self.content, &other.content) {
            (Ok(ours), Ok(theirs)) => ours.iter().map(|c| c.fingerprint()).eq(theirs.iter().map(|c| c.fingerprint())),
            (Err(ours), Err(theirs)) => ours == theirs,
            _ => false,
        }
    }
}

/// The metadata by which a change of a file is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileVersion {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileVersion {
    /// Follows symbolic links.
    fn of(path: &Path) -> Option<Self> {
        let file = std::fs::metadata(path).ok()?;
        let (modified, changed) = ((file.mtime(), file.mtime_nsec()), (file.ctime(), file.ctime_nsec()));
        Some(Self { inode: file.ino(), size: file.len(), modified, changed })
    }

    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().cast_signed();
        now.saturating_sub(self.changed.0) >= SETTLED_AGE_SECS
    }
}
