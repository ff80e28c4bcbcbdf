//! Options for the shared state in Redis, and why it cannot be used.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::serializer::Serializer;

/// Options for [`RedisState::connect`](super::RedisState::connect).
///
/// ```
/// use std::time::Duration;
/// use nanite::mapper::RedisOptions;
/// # use nanite::serializer::Serializer;
///
/// # fn options(serializer: std::sync::Arc<dyn Serializer>) -> RedisOptions {
/// RedisOptions::new(serializer)
///     .prefix("staging")
///     .password("open sesame")
///     .timeout(Duration::from_secs(5))
/// # }
/// ```
pub struct RedisOptions {
    pub(super) serializer: Arc<dyn Serializer>,
    pub(super) prefix: String,
    pub(super) password: Option<Zeroizing<String>>,
    pub(super) ca_certificates: Option<Vec<u8>>,
    pub(super) timeout: Duration,
    pub(super) refresh_interval: Duration,
    pub(super) accept_unsigned: bool,
}

impl RedisOptions {
    /// The defaults. `serializer` verifies registrations and heartbeats: pass the one that the mapper uses.
    pub fn new(serializer: impl Serializer + 'static) -> Self {
        Self {
            serializer: Arc::new(serializer),
            prefix: "nanite".to_owned(),
            password: None,
            ca_certificates: None,
            timeout: Duration::from_secs(2),
            refresh_interval: Duration::from_secs(1),
            accept_unsigned: false,
        }
    }

    /// The prefix of all keys; `nanite` by default. Mappers with different prefixes share nothing. 1 to 64 letters, digits, '.', '-'
    /// and '_'.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// The password, instead of one in the URL.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.password = Some(Zeroizing::new(password.into()));
        self
    }

    /// The PEM certificates of the authorities that may issue the Redis server's certificate; required for `rediss://` URLs. The
    /// system's certificate authorities are not trusted.
    #[must_use]
    pub fn ca_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.ca_certificates = Some(pem.into());
        self
    }

    /// How long to wait for a reply; 2 s by default. After that the connection is given up.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How often this mapper reads the changes of others and writes the heartbeats it received; every second by default.
    #[must_use]
    pub fn refresh_interval(mut self, interval: Duration) -> Self {
        self.refresh_interval = interval;
        self
    }

    /// Options that weaken security.
    #[must_use]
    pub fn dangerous(self) -> DangerousRedisOptions {
        DangerousRedisOptions(self)
    }
}

impl fmt::Debug for RedisOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisOptions").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// Options that weaken security; see [`RedisOptions::dangerous`].
#[derive(Debug)]
pub struct DangerousRedisOptions(RedisOptions);

impl DangerousRedisOptions {
    /// Reads and writes unsigned registrations and heartbeats, as plain formats have them. An attacker who can write to Redis can then
    /// invent agents.
    #[must_use]
    pub fn accept_unsigned(mut self) -> RedisOptions {
        self.0.accept_unsigned = true;
        self.0
    }
}

/// Why the shared state in Redis cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RedisError {
    /// The URL is invalid.
    #[error("invalid Redis URL: expected redis://HOST:PORT/DATABASE, rediss:// for TLS, or unix:///PATH")]
    InvalidUrl,
    /// The prefix is too short or too long, or has other characters.
    #[error("invalid key prefix: expected 1 to 64 letters, digits, '.', '-' and '_'")]
    InvalidPrefix,
    /// The URL is `rediss://`, but no CA certificate is given.
    #[error("TLS requires the CA certificate of the Redis server")]
    MissingCa,
    /// The CA certificate is not valid PEM.
    #[error("the CA certificate of the Redis server is not a PEM certificate")]
    InvalidCa,
    /// The serializer does not sign, so other mappers could not verify what is shared.
    #[error("plain formats do not sign registrations, so they are not shared")]
    NotSigned,
    /// Redis cannot be reached, or refuses access.
    #[error("cannot use the Redis at {address}: {why}")]
    Unreachable {
        /// The address, without the password.
        address: String,
        /// The reason.
        why: String,
    },
}
