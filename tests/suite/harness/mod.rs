//! What tests share.
pub mod pki;
pub mod system;
