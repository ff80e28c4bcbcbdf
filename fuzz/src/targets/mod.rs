//! The targets: functions that take any bytes, and panic when a property does not hold.

pub mod certificate;
pub mod cms;
pub mod codecs;
pub mod crl;
pub mod der;
pub mod envelope;
pub mod insider;
pub mod policy;
pub mod replay;
pub mod world;

/// One target.
#[derive(Clone, Copy)]
pub struct Target {
    /// The name of the target, of its program, and of its folder in `seeds`.
    pub name: &'static str,
    /// Runs the target with one input.
    pub run: fn(&[u8]),
    /// A folder with more seeds, relative to the project's root.
    pub vectors: Option<&'static str>,
}

const MESSAGES: Option<&str> = Some("tests/vectors/envelope/messages");

/// All targets.
pub const ALL: [Target; 8] = [
    Target { name: "certificate", run: certificate::run, vectors: None },
    Target { name: "cms", run: cms::run, vectors: MESSAGES },
    Target { name: "codecs", run: codecs::run, vectors: Some("tests/vectors/json-packets") },
    Target { name: "crl", run: crl::run, vectors: None },
    Target { name: "envelope", run: envelope::run, vectors: MESSAGES },
    Target { name: "insider", run: insider::run, vectors: None },
    Target { name: "policy", run: policy::run, vectors: None },
    Target { name: "replay", run: replay::run, vectors: None },
];
