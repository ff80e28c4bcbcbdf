//! Time of day as an argument.
//!
//! Everything that depends on the time of day (expiry, replay detection, removing silent agents) takes a [`Timestamp`] or a [`Clock`],
//! so that tests need not wait.
//!
//! ```
//! use std::time::Duration;
//! use nanite::clock::{Clock, ManualClock, Timestamp};
//!
//! let clock = ManualClock::new(Timestamp::from_secs(1_800_000_000));
//! clock.advance(Duration::from_secs(60));
//! assert_eq!(clock.now().to_string(), "2027-01-15T08:01:00Z");
//! ```

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A time of day: microseconds since the Unix epoch. Displayed as RFC 3339, in UTC and whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The time `micros` microseconds after the Unix epoch.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// The time `seconds` seconds after the Unix epoch.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(seconds.saturating_mul(1_000_000))
    }

    /// Microseconds since the Unix epoch.
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// Whole seconds since the Unix epoch.
    pub const fn as_secs(self) -> u64 {
        self.0 / 1_000_000
    }

    /// This time plus `duration`; the largest timestamp instead of an overflow.
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(micros(duration)))
    }

    /// This time minus `duration`; the epoch instead of an underflow.
    pub fn saturating_sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(micros(duration)))
    }

    /// The time elapsed since `earlier`; zero when this time is not later.
    ///
    /// ```
    /// use std::time::Duration;
    /// use nanite::clock::Timestamp;
    ///
    /// let (start, end) = (Timestamp::from_secs(10), Timestamp::from_secs(12));
    /// assert_eq!(end.since(start), Duration::from_secs(2));
    /// assert_eq!(start.since(end), Duration::ZERO);
    /// ```
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = i64::try_from(self.as_secs()).ok().and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok());
        match at.and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok()) {
            Some(text) => f.write_str(&text),
            None => write!(f, "{} s after the epoch", self.as_secs()),
        }
    }
}

/// A source of the time of day.
pub trait Clock: fmt::Debug + Send + Sync {
    /// The current time. Must not block.
    fn now(&self) -> Timestamp;
}

impl<T: Clock + ?Sized> Clock for std::sync::Arc<T> {
    fn now(&self) -> Timestamp {
        (**self).now()
    }
}

/// The system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp(micros(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()))
    }
}

/// A clock for tests: it moves only when it is told to.
#[derive(Debug)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// A clock at this time.
    pub fn new(at: Timestamp) -> Self {
        Self(AtomicU64::new(at.as_micros()))
    }

    /// Moves the clock forward by a duration.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(micros(by), Ordering::SeqCst);
    }

    /// Sets the clock to this time.
    pub fn set(&self, at: Timestamp) {
        self.0.store(at.as_micros(), Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.load(Ordering::SeqCst))
    }
}
