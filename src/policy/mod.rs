//! Who may do what: the plug-in point that mappers ask about registrations and requests, and agents about requests.

#[cfg(feature = "cedar")]
mod cedar;
#[cfg(feature = "policy")]
mod file;
#[cfg(feature = "policy")]
mod rules;

use std::fmt;
use std::sync::Arc;

use crate::packet::{Identity, Register, Request};
use crate::serializer::Verified;

#[cfg(feature = "cedar")]
pub use cedar::CedarPolicy;
#[cfg(feature = "policy")]
pub use file::RulesError;
#[cfg(feature = "policy")]
pub use rules::{Explanation, Pattern, Rules};

/// Decides who may register what and request what.
///
/// It is asked after the message has been verified; `signer` is none only with a plain serializer, where the identity is
/// merely claimed. It is asked on the path of every request: it must not block. An error in it must be a denial.
pub trait Policy: fmt::Debug + Send + Sync {
    /// At a mapper: may this agent register so? Also asked, with no services, when it unregisters.
    fn authorize_registration(&self, caller: &Caller<'_>, register: &Register) -> Decision;

    /// At a mapper, for requests that other nodes ask it to dispatch, and at an agent, for every request and push: may this
    /// caller have it done?
    fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision;
}

impl<P: Policy + ?Sized> Policy for Arc<P> {
    fn authorize_registration(&self, caller: &Caller<'_>, register: &Register) -> Decision {
        (**self).authorize_registration(caller, register)
    }

    fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision {
        (**self).authorize_request(caller, request)
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Caller<'a> {
    /// Who sent the message.
    pub identity: &'a Identity,
    /// What was verified of the sender; none with a plain serializer.
    pub signer: Option<&'a Verified>,
    /// At an agent: for whom the mapper asks, when it asks for another node. The mapper vouches for it.
    pub on_behalf_of: Option<&'a Identity>,
}

impl<'a> Caller<'a> {
    /// The sender `identity`, of whom this was verified.
    pub fn new(identity: &'a Identity, signer: Option<&'a Verified>) -> Self {
        Self { identity, signer, on_behalf_of: None }
    }

    /// Who wants it done: the node that the mapper asks for, or else the sender.
    pub fn origin(&self) -> &'a Identity {
        self.on_behalf_of.unwrap_or(self.identity)
    }
}

/// What a policy decides.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Decision {
    /// Whether it may.
    pub allowed: bool,
    /// What a refused caller is told: let it say no more than the caller may know.
    pub why: String,
    /// The rule that decided, for the audit log.
    pub rule: Option<String>,
}

impl Decision {
    /// It may.
    pub fn allow() -> Self {
        Self { allowed: true, why: String::new(), rule: None }
    }

    /// It may not; the caller is told this.
    pub fn deny(why: impl Into<String>) -> Self {
        Self { allowed: false, why: why.into(), rule: None }
    }

    /// The refusal that says no more than 'Denied'.
    pub fn denied() -> Self {
        Self::deny("Denied")
    }

    /// The same, by this rule.
    #[must_use]
    pub fn by(mut self, rule: impl Into<String>) -> Self {
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
}
