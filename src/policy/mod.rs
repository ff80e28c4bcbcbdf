//! Authorization: what agents may register, and what callers may request.
//!
//! A valid certificate says who a node is. A [`Policy`] says what that node may do. Mappers ask it about registrations and about
//! requests that other nodes ask them to dispatch; agents ask it about every request. The policies here: [`AllowVerified`] (the
//! default), [`Rules`] from a TOML file, and [`CedarPolicy`] (feature `cedar`).
//!
//! Your own policy is a type with two functions:
//!
//! ```
//! use nanite::packet::{Identity, Register, Request};
//! use nanite::policy::{Caller, Decision, Policy};
//!
//! /// Only the agent `boss` may request anything under /admin.
//! #[derive(Debug)]
//! struct AdminOnly;
//!
//! impl Policy for AdminOnly {
//!     fn authorize_registration(&self, _: &Caller<'_>, _: &Register) -> Decision {
//!         Decision::allow()
//!     }
//!
//!     fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision {
//!         if request.service.as_str().starts_with("/admin/") && caller.origin().name() != "boss" {
//!             return Decision::denied().by_rule("admin-only");
//!         }
//!         Decision::allow()
//!     }
//! }
//!
//! // A unit test of it needs no broker and no certificates.
//! let (fred, request) = (Identity::agent("fred")?, Request::new("/admin/stop".parse()?, Default::default()));
//! assert!(!AdminOnly.authorize_request(&Caller::new(&fred, None), &request).allowed);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg(feature = "cedar")]
mod cedar;
mod decision;
#[cfg(feature = "policy")]
mod rules;

#[cfg(feature = "cedar")]
pub use cedar::CedarPolicy;
pub use decision::{AllowVerified, Caller, Decision, Policy};
#[cfg(feature = "policy")]
pub use rules::{Explanation, Pattern, PolicyError, Rules};
