//! What criterion measured, read back, so that a benchmark can end with ratios of numbers from one run.

use std::path::{Path, PathBuf};

/// The median of a measurement in nanoseconds; none when it was not run.
pub fn median(group: &str, what: &str) -> Option<f64> {
    let folder = std::env::var_os("CRITERION_HOME").map(PathBuf::from).unwrap_or_else(|| {
        let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
        target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target")).join("criterion")
    });
    let text = std::fs::read_to_string(folder.join(group).join(what).join("new/estimates.json")).ok()?;
    let estimates: serde_json::Value = serde_json::from_str(&text).ok()?;
    estimates.pointer("/median/point_estimate")?.as_f64()
}

/// A time in nanoseconds as microseconds; a dash where there is none.
pub fn micros(nanos: Option<f64>) -> String {
    nanos.map_or("-".to_owned(), |nanos| format!("{:.2}", nanos / 1000.0))
}

/// One over the other; a dash where one is missing.
pub fn ratio(a: Option<f64>, b: Option<f64>) -> String {
    a.zip(b).map_or("-".to_owned(), |(a, b)| format!("{:.2}", a / b))
}
