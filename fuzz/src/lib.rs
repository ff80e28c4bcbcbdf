//! The fuzz targets, and the mutator for DER. The targets are plain functions: the test suite runs them too, over every file in
//! `seeds`, so that a bug that was found once cannot come back unnoticed. See CONTRIBUTING.md.

pub mod mutator;
pub mod targets;
