//! A running node follows its own certificate and key: after a renewal it uses the new ones without a pause.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};
use zeroize::Zeroizing;

use super::error::{CliError, Exit};
use super::{output, remedy};
use crate::certs::{CertificateDirectory, DirectoryCertificateStore, Trust, TrustError};
use crate::clock::{Clock, SystemClock};
use crate::packet::Identity;
use crate::security::SecureSerializer;

/// How often the files are looked at. Looking costs microseconds.
const LOOK: Duration = Duration::from_secs(2);

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

/// How it stands with the node's own certificate.
#[derive(PartialEq, Eq)]
enum Standing {
    Good,
    /// Less than a third of its time is left.
    Ending,
    /// Others refuse it.
    Bad(TrustError),
}

/// Follows the files until it is dropped.
pub(super) struct Follower(AbortHandle);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What tells that a file has changed: inode, size, and the times of its content and of itself.
type Signature = Option<(u64, u64, i64, i64, i64, i64)>;

fn signature(path: &Path) -> Signature {
    let file = std::fs::metadata(path).ok()?;
    Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()))
}

impl Reload {
    /// Reads certificate and key again at SIGHUP and when their files have changed, and calls `announce` when there is a new
    /// certificate. What cannot be used is reported, and the node goes on with what it has. Takes SIGHUP from the first call on.
    ///
    /// # Errors
    /// [`CliError`] when signals cannot be taken.
    pub(super) fn follow(self, announce: impl Fn() + Send + 'static) -> Result<Follower, CliError> {
        let failed = |error: std::io::Error| CliError::of(Exit::Failure, &error).context("cannot take signals");
        let mut hangups = signal(SignalKind::hangup()).map_err(failed)?;
        let task = tokio::spawn(async move {
            let mut ticks = interval(LOOK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut seen = self.signatures();
            let mut standing = Standing::Good;
            loop {
                let told = tokio::select! {
                    _ = hangups.recv() => true,
                    _ = ticks.tick() => false,
                };
                let before = std::mem::replace(&mut standing, self.standing());
                if standing != before {
                    self.say(&standing);
                }
                let now = self.signatures();
                if !told && now == seen {
                    continue;
                }
                seen = now;
                let files = self.clone();
                match tokio::task::spawn_blocking(move || files.read()).await {
                    Ok(Ok(true)) => announce(),
                    Ok(Ok(false)) => {}
                    Ok(Err(error)) => {
                        tracing::error!(
                            remedy = error.remedy(),
                            "the certificate of {} stays as it is: {}",
                            self.identity,
                            error.message()
                        );
                    }
                    Err(_) => return,
                }
            }
        });
        Ok(Follower(task.abort_handle()))
    }

    fn standing(&self) -> Standing {
        let (now, certificate) = (SystemClock.now(), self.serializer.certificate());
        let (from, to) = (certificate.not_before(), certificate.not_after());
        match self.serializer.check_own_certificate(now) {
            Err(error) => Standing::Bad(error),
            Ok(()) if to.since(now) < to.since(from) / 3 => Standing::Ending,
            Ok(()) => Standing::Good,
        }
    }

    fn say(&self, standing: &Standing) {
        match standing {
            Standing::Good => tracing::info!("the certificate of {} is good", self.identity),
            Standing::Ending => tracing::warn!(
                remedy = format!("nanite certs renew {} {}", self.identity.role(), self.identity.name()),
                "the certificate of {} has to be renewed: it is valid until {}",
                self.identity,
                self.serializer.certificate().not_after()
            ),
            Standing::Bad(error) => tracing::error!(
                remedy = remedy::trust(error),
                "others refuse what {} sends: of its certificate, {error}",
                self.identity
            ),
        }
    }

    fn signatures(&self) -> [Signature; 2] {
        let paths = [self.directory.certificate_path(&self.identity), self.directory.key_path(&self.identity)];
        paths.map(|path| path.ok().and_then(|path| signature(&path)))
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
            CliError::of(Exit::Security, &error).context("the new certificate is of no use").help(remedy::trust(&error))
        })?;
        let older = self.directory.previous_credentials(&self.identity, secret, now).map_err(failed)?;
        let taken = self.serializer.replace_credentials(new, older.into_iter().collect(), now);
        taken.map_err(|error| CliError::of(Exit::Security, &error))?;
        output::note(&format!("{} has a new certificate, valid until {}", self.identity, certificate.not_after()));
        Ok(true)
    }
}
