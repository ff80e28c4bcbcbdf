//! Authorization: what agents may register, what callers may request, and which files senders may send.
//!
//! A valid certificate says who a node is. A [`Policy`] says what that node may do. Mappers ask it about registrations and about
//! requests that other nodes ask them to dispatch; agents ask it about every request and every file that is sent to them. The policies here: [`AllowVerified`] (the
//! default), [`Rules`] from a TOML file, and [`CedarPolicy`] (feature `cedar`).
//!
//! Your own policy is a type with two functions, and a third one if its agents receive files:
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
#[cfg(feature = "policy")]
mod rules;

use std::fmt;
use std::sync::Arc;

use crate::packet::{Identity, Register, Request, Tag};
use crate::serializer::Verified;

#[cfg(feature = "cedar")]
pub use cedar::CedarPolicy;
#[cfg(feature = "policy")]
pub use rules::{Explanation, Pattern, PolicyError, Rules};

/// Decides who may register what, request what and send which files. See the [module](self) for an example.
///
/// It is called after the message has been verified. [`Caller::signer`] is `None` only with a plain serializer, where the identity
/// is merely claimed. It is called for every request, so it must not block. An error inside a policy must result in a denial.
pub trait Policy: fmt::Debug + Send + Sync {
    /// At a mapper: may this agent register with these services, tags and file domains? Also called, with no services, when an
    /// agent unregisters.
    fn authorize_registration(&self, caller: &Caller<'_>, register: &Register) -> Decision;

    /// May this caller make this request? Called at an agent for every request and push, and at a mapper for requests that other
    /// nodes ask it to dispatch.
    fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision;

    /// At an agent: may this sender send this file? Called before anything is written, and again at the end of a transfer if another
    /// file has appeared under this name meanwhile; then [`FileTransfer::replaces`] is true. Denies every file unless it is implemented.
    fn authorize_file(&self, sender: &Caller<'_>, file: &FileTransfer<'_>) -> Decision {
        let _ = (sender, file);
        Decision::denied()
    }
}

/// A pointer to a policy is that policy.
macro_rules! delegate_to_policy {
    ($pointer:ident) => {
        impl<P: Policy + ?Sized> Policy for $pointer<P> {
            fn authorize_registration(&self, caller: &Caller<'_>, register: &Register) -> Decision {
                (**self).authorize_registration(caller, register)
            }

            fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision {
                (**self).authorize_request(caller, request)
            }

            fn authorize_file(&self, sender: &Caller<'_>, file: &FileTransfer<'_>) -> Decision {
                (**self).authorize_file(sender, file)
            }
        }
    };
}

delegate_to_policy!(Arc);
delegate_to_policy!(Box);

/// The sender of a message, and the node it acts for.
///
/// ```
/// use nanite::packet::Identity;
/// use nanite::policy::Caller;
///
/// let (mapper, fred) = (Identity::mapper("desk")?, Identity::agent("fred")?);
/// assert_eq!(Caller::new(&mapper, None).origin(), &mapper);
/// assert_eq!(Caller::new(&mapper, None).on_behalf_of(&fred).origin(), &fred);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Caller<'a> {
    /// The sender of the message.
    pub identity: &'a Identity,
    /// What was verified about the sender; `None` with a plain serializer.
    pub signer: Option<&'a Verified>,
    /// At an agent: the node that asked the mapper for this request. The mapper vouches for it.
    pub on_behalf_of: Option<&'a Identity>,
}

impl<'a> Caller<'a> {
    /// The sender `identity`, and what was verified about it.
    pub fn new(identity: &'a Identity, signer: Option<&'a Verified>) -> Self {
        Self { identity, signer, on_behalf_of: None }
    }

    /// Sets the node that the sender acts for.
    #[must_use]
    pub fn on_behalf_of(mut self, origin: impl Into<Option<&'a Identity>>) -> Self {
        self.on_behalf_of = origin.into();
        self
    }

    /// The node that made the request: the one that the mapper acts for, or else the sender.
    pub fn origin(&self) -> &'a Identity {
        self.on_behalf_of.unwrap_or(self.identity)
    }
}

/// A file that a mapper sends to an agent, before it is received.
///
/// ```
/// use nanite::policy::FileTransfer;
///
/// let photos = "photos".parse()?;
/// let file = FileTransfer::new(&photos, "cat.jpg", 4096).replaces(true);
/// assert_eq!((file.name, file.size, file.replaces), ("cat.jpg", 4096, true));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileTransfer<'a> {
    /// The domain that it is sent to; the agent subscribed to it.
    pub domain: &'a Tag,
    /// Its name at the agent: a plain file name.
    pub name: &'a str,
    /// Its length in bytes.
    pub size: u64,
    /// Whether it replaces a file that the agent has.
    pub replaces: bool,
}

impl<'a> FileTransfer<'a> {
    /// A file that replaces none.
    pub fn new(domain: &'a Tag, name: &'a str, size: u64) -> Self {
        Self { domain, name, size, replaces: false }
    }

    /// Sets whether it replaces a file.
    #[must_use]
    pub fn replaces(mut self, replaces: bool) -> Self {
        self.replaces = replaces;
        self
    }
}

/// A policy's decision.
///
/// ```
/// use nanite::policy::Decision;
///
/// assert!(Decision::allow().by_rule("operators").allowed);
/// assert_eq!(Decision::deny("only at night").reason, "only at night");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Decision {
    /// Whether it is allowed.
    pub allowed: bool,
    /// The reason sent to a denied caller: it must not say more than the caller may know.
    pub reason: String,
    /// The rule that decided, for the audit log.
    pub rule: Option<String>,
}

impl Decision {
    /// Allowed.
    pub fn allow() -> Self {
        Self { allowed: true, reason: String::new(), rule: None }
    }

    /// Denied. The caller gets the reason.
    pub fn deny(reason: impl Into<String>) -> Self {
        Self { allowed: false, reason: reason.into(), rule: None }
    }

    /// Denied, with no other reason than `Denied`.
    pub fn denied() -> Self {
        Self::deny("Denied")
    }

    /// Names the rule that decided.
    #[must_use]
    pub fn by_rule(mut self, rule: impl Into<String>) -> Self {
        self.rule = Some(rule.into());
        self
    }
}

/// Allows what the envelope allows: every node with a valid certificate, in its role, under its own name.
#[derive(Clone, Copy, Debug, Default)]
pub struct AllowVerified;

impl Policy for AllowVerified {
    fn authorize_registration(&self, _: &Caller<'_>, _: &Register) -> Decision {
        Decision::allow()
    }

    fn authorize_request(&self, _: &Caller<'_>, _: &Request) -> Decision {
        Decision::allow()
    }

    fn authorize_file(&self, _: &Caller<'_>, _: &FileTransfer<'_>) -> Decision {
        Decision::allow()
    }
}
