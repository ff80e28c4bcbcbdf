//! Program actors: every executable `DIR/PREFIX/NAME` is the service `/PREFIX/NAME`, in any language.
//!
//! A program is run anew for every request, in its own directory `DIR/PREFIX`, and speaks by what every language has:
//!
//! | | |
//! |---|---|
//! | standard input | the payload, one line of JSON, then the end of the file; it need not be read |
//! | standard output | the result: JSON where it parses, else text, without the last line break; nothing: null |
//! | descriptor 3 | intermediate results, as they come: lines of JSON, `{"key":"k","value":..}`; the key may be left out |
//! | exit code | 0: done; anything else, or a signal: a failure whose message is the end of standard error |
//! | arguments | none: nothing of a message ever stands in arguments or reaches a shell |
//! | environment | `PATH`, `HOME`, `LANG`, `LC_*`, `TZ`, `TMPDIR`, `USER` of the agent, and no more of it |
//! | `NANITE_SERVICE` | the service's name |
//! | `NANITE_CALLER` | the identity of who wants it done |
//! | `NANITE_TOKEN` | the token of the request, where it has one |
//! | `NANITE_DEADLINE` | when the answer is no longer wanted, in whole seconds since the Unix epoch, where there is a deadline |
//!
//! A program leads a process group of its own. When the deadline passes, the request is cancelled or a limit is exceeded, the
//! group gets SIGTERM, and SIGKILL after [`ProgramLimits::grace`]; what a program leaves behind in its group when it ends is
//! killed as well. A program that moves its children into other groups or sessions keeps them.
//!
//! Who can write a program decides what runs. So the directory, everything in it that leads to a program, and the directories
//! above it must belong to root or the user of the agent, and be writable for nobody else; else the program is
//! [skipped](ProgramActors::skipped), or the directory refused. This is looked at again before every run.

mod directory;
mod process;
mod run;
mod watch;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch as channel;

pub use directory::{SkipReason, Skipped};

use super::{Actor, Context, HandlerResult};
use crate::packet::{Failure, FailureCode, Payload, Service};
use watch::Watched;

/// What a program may use.
#[derive(Clone, Copy, Debug)]
pub struct ProgramLimits {
    /// Bytes on its standard output; with more it is ended, which is a failure. 8 MiB by default.
    pub stdout: usize,
    /// How many of the last bytes of its standard error are kept; it may write any number. 4 KiB by default.
    pub stderr: usize,
    /// Bytes in one line on descriptor 3; with more it is ended, which is a failure. 1 MiB by default.
    pub part: usize,
    /// How long it may run, beside the deadline of the request; as long as it likes by default.
    pub run_time: Option<Duration>,
    /// How long it has between SIGTERM and SIGKILL. 2 s by default.
    pub grace: Duration,
}

impl Default for ProgramLimits {
    fn default() -> Self {
        Self { stdout: 8 << 20, stderr: 4 << 10, part: 1 << 20, run_time: None, grace: Duration::from_secs(2) }
    }
}

/// Why a directory cannot be used as a directory of programs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// It is no directory that this process can read.
    #[error("cannot read the directory of programs {}", path.display())]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else can decide what it holds.
    #[error("{} is no safe place for programs: {reason}", path.display())]
    Unsafe {
        /// The directory, or one above it.
        path: PathBuf,
        /// What is wrong with it.
        reason: SkipReason,
    },
    /// A prefix to pick cannot be part of a service's name.
    #[error("{0:?} is no prefix of services")]
    Prefix(String),
    /// A prefix to pick does not exist.
    #[error("there is no directory {prefix} in {}", path.display())]
    NoSuchPrefix {
        /// The prefix.
        prefix: String,
        /// The directory of programs.
        path: PathBuf,
    },
    /// The thread that watches the directory cannot be started.
    #[error("cannot watch the directory of programs")]
    Watch(#[source] io::Error),
}

/// The programs of a directory, as an [`Actor`]. Changes in the directory are found, and advertised, while it lives.
#[derive(Debug)]
pub struct ProgramActors {
    watched: Watched,
    limits: ProgramLimits,
}

impl ProgramActors {
    /// The programs in `dir`; only those under the prefixes in `only`, unless that is empty. Blocks on the file system, so call
    /// it before there is work; needs no runtime, but the calls of the actor need one of Tokio's with IO and time.
    ///
    /// # Errors
    /// [`ProgramError`] says what is wrong with the directory, or the prefixes.
    pub fn open(dir: impl AsRef<Path>, only: Vec<String>) -> Result<Self, ProgramError> {
        let directory = directory::Directory::open(dir.as_ref(), only)?;
        Ok(Self { watched: Watched::start(directory)?, limits: ProgramLimits::default() })
    }

    /// What every program may use.
    #[must_use]
    pub fn limits(mut self, limits: ProgramLimits) -> Self {
        self.limits = limits;
        self
    }

    /// What the directory holds and is not offered, and why. Hidden files, and prefixes that were not picked, are left out.
    pub fn skipped(&self) -> Vec<Skipped> {
        self.watched.listing().skipped.values().cloned().collect()
    }
}

#[async_trait]
impl Actor for ProgramActors {
    fn services(&self) -> Vec<Service> {
        self.watched.listing().programs.keys().cloned().collect()
    }

    async fn call(&self, service: &Service, payload: Payload, context: Context) -> HandlerResult<Payload> {
        let Some(program) = self.watched.listing().programs.get(service).cloned() else {
            return Err(Failure::new(FailureCode::NoSuchService, format!("no service {service} here")));
        };
        run::run(self.watched.directory(), program, payload, context, self.limits).await
    }

    fn changes(&self) -> Option<channel::Receiver<u64>> {
        Some(self.watched.changes())
    }
}
