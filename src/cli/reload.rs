//! A running node reads its certificate and key again when they change, and at SIGHUP, without a restart.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::SignalKind;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};
use zeroize::Zeroizing;

use super::error::{CliError, Exit};
use super::{output, remedy, runtime};
use crate::certs::{CertificateDirectory, DirectoryCertificateStore, Trust, TrustError};
use crate::clock::{Clock, SystemClock};
use crate::packet::Identity;
use crate::security::SecureSerializer;

/// How often the files are checked for changes. A check takes microseconds.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// What a node needs to read its certificate again.
#[derive(Clone)]
pub(super) struct Reload {
    pub directory: CertificateDirectory,
    pub identity: Identity,
    pub passphrase: Option<Zeroizing<Vec<u8>>>,
    pub serializer: Arc<SecureSerializer>,
    pub store: Arc<DirectoryCertificateStore>,
    pub trust: Arc<Trust>,
}

/// The state of the node's own certificate.
#[derive(PartialEq, Eq)]
enum CertificateState {
    Valid,
    /// Less than a third of its lifetime is left.
    RenewalDue,
    /// Other nodes refuse it.
    Invalid(TrustError),
}

/// Watches the files until it is dropped.
pub(super) struct Watcher(AbortHandle);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Changes with the file: inode, size, and the times of its content and of its metadata.
type FileVersion = Option<(u64, u64, i64, i64, i64, i64)>;

fn file_version(path: &Path) -> FileVersion {
    let file = std::fs::metadata(path).ok()?;
    Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()))
}

impl Reload {
    /// Reads certificate and key again at SIGHUP and when their files change, and calls `announce` when there is a new certificate.
    /// If they cannot be used, that is logged and the node keeps what it has.
    pub(super) fn watch(self, announce: impl Fn() + Send + 'static) -> Result<Watcher, CliError> {
        let mut hangups = runtime::handle(SignalKind::hangup())?;
        let task = tokio::spawn(async move {
            let mut ticks = interval(CHECK_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut seen = self.file_versions();
            let mut state = CertificateState::Valid;
            loop {
                let requested = tokio::select! {
                    _ = hangups.recv() => true,
                    _ = ticks.tick() => false,
                };
                let before = std::mem::replace(&mut state, self.state());
                if state != before {
                    self.log_state(&state);
                }
                let now = self.file_versions();
                if !requested && now == seen {
                    continue;
                }
                seen = now;
                let files = self.clone();
                match tokio::task::spawn_blocking(move || files.read()).await {
                    Ok(Ok(true)) => announce(),
                    Ok(Ok(false)) => {}
                    Ok(Err(error)) => tracing::error!(
                        remedy = error.remedy(),
                        "the certificate of {} stays as it is: {}",
                        self.identity,
                        error.message()
                    ),
                    Err(_) => return,
                }
            }
        });
        Ok(Watcher(task.abort_handle()))
    }

    fn state(&self) -> CertificateState {
        let (now, certificate) = (SystemClock.now(), self.serializer.certificate());
        let (from, to) = (certificate.not_before(), certificate.not_after());
        match self.serializer.check_own_certificate(now) {
            Err(error) => CertificateState::Invalid(error),
            Ok(()) if to.since(now) < to.since(from) / 3 => CertificateState::RenewalDue,
            Ok(()) => CertificateState::Valid,
        }
    }

    fn log_state(&self, state: &CertificateState) {
        let identity = &self.identity;
        match state {
            CertificateState::Valid => tracing::info!("the certificate of {identity} is valid"),
            CertificateState::RenewalDue => tracing::warn!(
                remedy = format!("nanite certs renew {} {}", identity.role(), identity.name()),
                "the certificate of {identity} is due for renewal: it is valid until {}",
                self.serializer.certificate().not_after()
            ),
            CertificateState::Invalid(error) => tracing::error!(
                remedy = remedy::trust(error),
                "other nodes refuse messages of {identity}, because of its certificate: {error}"
            ),
        }
    }

    fn file_versions(&self) -> [FileVersion; 2] {
        let paths = [self.directory.certificate_path(&self.identity), self.directory.key_path(&self.identity)];
        paths.map(|path| path.ok().and_then(|path| file_version(&path)))
    }

    /// Reads the files; whether there is a new certificate in use.
    fn read(&self) -> Result<bool, CliError> {
        let now = SystemClock.now();
        let failed = |error| remedy::directory(&error, &self.directory);
        self.store.reload(now).map_err(failed)?;
        let secret = self.passphrase.as_ref().map(|passphrase| passphrase.as_slice());
        let new = self.directory.credentials(&self.identity, secret, now).map_err(failed)?;
        let certificate = new.certificate().clone();
        if certificate.fingerprint() == self.serializer.certificate().fingerprint() {
            return Ok(false);
        }
        self.trust.verify(&certificate, new.intermediates(), now).map_err(|error| {
            let failure = CliError::of(Exit::Security, &error).context("the new certificate is not trusted");
            failure.help(remedy::trust(&error))
        })?;
        let older = self.directory.older_credentials(&self.identity, secret, now).map_err(failed)?;
        let replaced = self.serializer.replace_credentials(new, older.into_iter().collect(), now);
        replaced.map_err(|error| CliError::of(Exit::Security, &error))?;
        output::note(&format!("{} has a new certificate, valid until {}", self.identity, certificate.not_after()));
        Ok(true)
    }
}
