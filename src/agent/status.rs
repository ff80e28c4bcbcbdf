//! How loaded an agent is.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::packet::Status;

/// Where an agent's status comes from: any number that can be compared with that of other agents, lower is less loaded.
///
/// It is called anew for every heartbeat, on a thread that may block. A panic or a number that is not finite counts as 'no
/// status', and such an agent is chosen last by `least_loaded`.
pub trait StatusSource: Send + Sync + 'static {
    /// How loaded the agent is now.
    fn status(&self) -> f64;
}

impl<F: Fn() -> f64 + Send + Sync + 'static> StatusSource for F {
    fn status(&self) -> f64 {
        self()
    }
}

/// The system's load average over one minute; not a number where the system does not tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadAverage;

impl StatusSource for LoadAverage {
    fn status(&self) -> f64 {
        std::fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|text| text.split_whitespace().next()?.parse().ok())
            .unwrap_or(f64::NAN)
    }
}

/// A source that is shared with the threads it is called on.
#[derive(Clone)]
pub(super) struct SharedStatus(pub Arc<dyn StatusSource>);

impl SharedStatus {
    /// Asks the source, on a thread that may block.
    pub async fn read(&self) -> Status {
        let source = self.0.clone();
        let read = move || catch_unwind(AssertUnwindSafe(|| source.status())).unwrap_or(f64::NAN);
        Status::new(tokio::task::spawn_blocking(read).await.unwrap_or(f64::NAN))
    }
}

impl fmt::Debug for SharedStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StatusSource")
    }
}
