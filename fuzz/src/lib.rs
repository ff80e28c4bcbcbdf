//! What is fuzzed, and how inputs are changed. The targets are plain functions: the test suite runs them too, over every file in
//! `seeds`, so that what was found once stays found. See CONTRIBUTING.md.

pub mod mutator;
pub mod targets;
