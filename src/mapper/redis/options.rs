//! How a shared state in Redis is set up, and why it cannot be.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::serializer::Serializer;

/// How to use a Redis; see [`RedisState::connect`](super::RedisState::connect).
pub struct RedisOptions {
    pub(super) serializer: Arc<dyn Serializer>,
    pub(super) prefix: String,
    pub(super) password: Option<Zeroizing<String>>,
    pub(super) authority: Option<Vec<u8>>,
    pub(super) timeout: Duration,
    pub(super) refresh: Duration,
    pub(super) unsigned: bool,
}

impl RedisOptions {
    /// The defaults, with what verifies registrations: the serializer that the mapper itself speaks through.
    pub fn new(serializer: Arc<dyn Serializer>) -> Self {
        Self {
            serializer,
            prefix: "nanite".to_owned(),
            password: None,
            authority: None,
            timeout: Duration::from_secs(2),
            refresh: Duration::from_secs(1),
            unsigned: false,
        }
    }

    /// What the names of all keys begin with, in braces; `nanite` by default. Mappers with different prefixes share nothing. 1 to 64
    /// letters, digits, '.', '-' and '_'.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// The password, in place of one in the URL.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.password = Some(Zeroizing::new(password.into()));
        self
    }

    /// The PEM of the CAs that Redis's certificate may be issued by, for `rediss://` URLs. The system's CAs do not count.
    #[must_use]
    pub fn authority(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.authority = Some(pem.into());
        self
    }

    /// How long Redis may take for an answer; 2 s by default. A later one counts as none.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How often this mapper reads what others changed, and writes what it heard; 1 s by default.
    #[must_use]
    pub fn refresh(mut self, every: Duration) -> Self {
        self.refresh = every;
        self
    }

    /// What weakens.
    #[must_use]
    pub fn dangerous(self) -> DangerousRedis {
        DangerousRedis(self)
    }
}

impl fmt::Debug for RedisOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisOptions").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// Options that weaken what a shared state promises; see [`RedisOptions::dangerous`].
#[derive(Debug)]
pub struct DangerousRedis(RedisOptions);

impl DangerousRedis {
    /// Takes and writes registrations that nothing proves, as those in plain formats are: whoever reaches Redis can invent agents.
    #[must_use]
    pub fn accept_unsigned(mut self) -> RedisOptions {
        self.0.unsigned = true;
        self.0
    }
}

/// Why a Redis cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RedisError {
    /// The URL is not understood.
    #[error("a Redis is redis://HOST:PORT/DATABASE, rediss:// for TLS, or unix:///PATH")]
    Url,
    /// The prefix has characters that it may not have, or is too short or too long.
    #[error("a prefix is 1 to 64 letters, digits, '.', '-' and '_'")]
    Prefix,
    /// A `rediss://` URL, without the CA that Redis's certificate may be issued by.
    #[error("TLS needs the CA of the Redis")]
    NoAuthority,
    /// The CA of the Redis is not given in PEM.
    #[error("the CA of the Redis is no certificate in PEM")]
    Authority,
    /// The serializer signs nothing, so that nobody could verify what is shared.
    #[error("registrations in a plain format prove nothing: they are not shared")]
    NotSigned,
    /// It cannot be reached, or does not let this mapper in.
    #[error("cannot use the Redis at {address}: {why}")]
    Unreachable {
        /// Where, without the password.
        address: String,
        /// Why.
        why: String,
    },
}
