//! Shared test code: brokers, certificates, programs, browsers, and the source code itself.

#![allow(dead_code, reason = "not every feature set uses every helper")]

pub mod attack;
pub mod broker;
pub mod browser;
pub mod counting;
pub mod fake_broker;
pub mod forge;
pub mod hostile;
pub mod hostile_mapper;
mod http;
pub mod oracle;
pub mod pki;
pub mod program;
pub mod programs;
pub mod proxy;
pub mod raw_client;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "redis")]
pub mod sharing;
pub mod site;
pub mod sources;
pub mod system;
pub mod tamper;
pub mod terminal;
pub mod web;

use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

/// How long a test waits for something that must happen: much longer than it takes.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// Waits until a condition is true, and panics with `what` if it never is.
pub async fn wait_until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(WAIT_TIMEOUT, waiting).await.is_ok(), "not within {WAIT_TIMEOUT:?}: {what}");
}

/// The next value from a channel, which must come.
pub async fn recv<T>(channel: &mut UnboundedReceiver<T>) -> T {
    let next = tokio::time::timeout(WAIT_TIMEOUT, channel.recv()).await;
    next.expect("a value in time").expect("an open channel")
}

/// Runs async tests that take a [`system::System`], once with plain JSON and once with the secure envelope.
macro_rules! on_every_format {
    ($($name:ident),* $(,)?) => {
        mod plain {
            $(#[tokio::test] async fn $name() { super::$name(super::System::plain()).await })*
        }
        mod secure {
            $(#[tokio::test] async fn $name() { super::$name(super::System::secure()).await })*
        }
    };
}
pub(crate) use on_every_format;
