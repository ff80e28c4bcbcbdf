//! What tests share.
pub mod system;
