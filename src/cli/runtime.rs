//! The asynchronous runtime, for the commands that need one: the others start faster without.

use std::future::Future;
use std::time::Duration;

use super::error::{CliError, Exit};

/// How long what still runs may take to end, once the command has its result.
const END: Duration = Duration::from_millis(500);

/// Runs a command to its end. What it has left running is dropped then.
pub(super) fn run<T>(command: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::of(Exit::Failure, &error).context("cannot start"))?;
    let result = runtime.block_on(command);
    runtime.shutdown_timeout(END);
    result
}
