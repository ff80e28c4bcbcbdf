//! Who may log in: users who know the password, or who have an invitation. Login attempts are rate-limited per client network.
//! And the sessions of those who have logged in: a bounded table, keyed by the digest of the session cookie.

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore};
use zeroize::Zeroizing;

use super::secret::{PasswordError, PasswordHash, TokenDigest, random_token};
use crate::clock::Timestamp;
use crate::limits::nonzero;
use crate::packet::RandomnessError;

/// The most password checks at a time: each needs much memory and CPU time.
const MAX_CONCURRENT_PASSWORD_CHECKS: usize = 1;
/// The login attempts that a client may make at once.
const LOGIN_ATTEMPT_BURST: u32 = 5;
/// How long until a client may make one more attempt.
const LOGIN_ATTEMPT_INTERVAL: Duration = Duration::from_secs(10);
/// The most client networks that are remembered. A client that is forgotten has its full burst again.
const MAX_TRACKED_CLIENTS: NonZeroUsize = nonzero(4096);

/// The names of the cookies, before [`Origins::cookie_name`](super::origin::Origins::cookie_name).
pub(super) const SESSION_COOKIE: &str = "nanite";
pub(super) const LOGIN_COOKIE: &str = "nanite-login";

/// How long a session is valid.
pub(super) const SESSION_LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// The most sessions at a time; a new session replaces the oldest.
const MAX_SESSIONS: usize = 64;

/// Who may log in.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Access {
    /// Everybody who knows the password.
    Password(PasswordHash),
    /// Everybody who has an unused invitation.
    Invited(Invitations),
}

/// Invitations: random tokens, each for one login. A cheap handle to clone.
#[derive(Clone, Debug, Default)]
pub struct Invitations(Arc<InvitationState>);

#[derive(Debug, Default)]
struct InvitationState {
    current: Mutex<Option<TokenDigest>>,
    used: Notify,
}

impl Invitations {
    /// Creates an invitation, which replaces the previous one. Returns the path that its user opens: `/login?token=...`.
    ///
    /// # Errors
    /// If the system's random number generator fails.
    pub fn issue(&self) -> Result<Zeroizing<String>, RandomnessError> {
        let token = random_token()?;
        *self.0.current.lock() = Some(TokenDigest::new(&token));
        Ok(Zeroizing::new(format!("/login?token={}", token.as_str())))
    }

    /// Waits until an invitation is used. Cancel safe.
    pub async fn used(&self) {
        self.0.used.notified().await;
    }

    /// Uses up the current invitation if `token` is its token.
    fn redeem(&self, token: &str) -> bool {
        let mut current = self.0.current.lock();
        let valid = current.is_some_and(|digest| digest.verify(token));
        if valid {
            *current = None;
            self.0.used.notify_one();
        }
        valid
    }
}

/// Checks passwords and invitation tokens.
#[derive(Debug)]
pub(super) struct Authenticator {
    access: Access,
    password_checks: Arc<Semaphore>,
}

impl Authenticator {
    pub fn new(access: Access) -> Self {
        Self { access, password_checks: Arc::new(Semaphore::new(MAX_CONCURRENT_PASSWORD_CHECKS)) }
    }

    /// Whether users log in with invitations, not with a password.
    pub fn uses_invitations(&self) -> bool {
        matches!(self.access, Access::Invited(_))
    }

    /// Whether `secret` is the password or a valid invitation token.
    pub async fn verify(&self, secret: Zeroizing<String>) -> Result<bool, PasswordError> {
        match &self.access {
            Access::Invited(invitations) => Ok(invitations.redeem(&secret)),
            Access::Password(hash) => {
                let permit = self.password_checks.clone().acquire_owned().await.map_err(|_| PasswordError::Crypto)?;
                let hash = hash.clone();
                let check = move || {
                    // Held until the end: the check continues even if the client disconnects.
                    let _permit = permit;
                    hash.verify(&secret)
                };
                tokio::task::spawn_blocking(check).await.map_err(|_| PasswordError::Crypto)?
            }
        }
    }
}

/// Rate limit of login attempts, per client network.
#[derive(Debug)]
pub(super) struct LoginAttempts(Mutex<LruCache<IpAddr, Timestamp>>);

impl Default for LoginAttempts {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(MAX_TRACKED_CLIENTS)))
    }
}

impl LoginAttempts {
    /// Counts an attempt. If there were too many, it is not counted, and the error is the time to wait.
    pub fn check(&self, client: IpAddr, now: Timestamp) -> Result<(), Duration> {
        let mut clients = self.0.lock();
        // When all attempts so far would have been allowed at one per interval (generic cell rate algorithm).
        let allowed_at = clients.get_or_insert_mut(network(client), || now);
        let next = (*allowed_at).max(now).saturating_add(LOGIN_ATTEMPT_INTERVAL);
        let earliest = next.saturating_sub(LOGIN_ATTEMPT_INTERVAL * LOGIN_ATTEMPT_BURST);
        if earliest > now {
            return Err(earliest.since(now));
        }
        *allowed_at = next;
        Ok(())
    }

    /// Forgets the attempts of a client after a successful login.
    pub fn reset(&self, client: IpAddr) {
        self.0.lock().pop(&network(client));
    }
}

/// The part of an address that identifies a client: all of IPv4, the first 64 bits of IPv6.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

/// The token that every form carries; a page of another site cannot know it.
#[derive(Clone)]
pub(super) struct CsrfToken(Arc<Zeroizing<String>>);

impl CsrfToken {
    pub fn random() -> Result<Self, RandomnessError> {
        Ok(Self(Arc::new(random_token()?)))
    }

    /// The token of a login page, which has no session yet.
    pub fn from_cookie(value: &str) -> Self {
        Self(Arc::new(Zeroizing::new(value.to_owned())))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a form has this token. Takes constant time.
    pub fn verify(&self, given: &str) -> bool {
        TokenDigest::new(&self.0).verify(given)
    }
}

impl std::fmt::Debug for CsrfToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CsrfToken")
    }
}

/// A user who is logged in.
#[derive(Clone, Debug)]
pub(super) struct Session {
    id: TokenDigest,
    pub csrf: CsrfToken,
}

/// All sessions.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<HashMap<TokenDigest, StoredSession>>);

#[derive(Debug)]
struct StoredSession {
    created: Timestamp,
    csrf: CsrfToken,
}

impl Sessions {
    /// Creates a session. Returns the value of its cookie.
    pub fn create(&self, now: Timestamp) -> Result<Zeroizing<String>, RandomnessError> {
        let (cookie, csrf) = (random_token()?, CsrfToken::random()?);
        let mut sessions = self.lock(now);
        if sessions.len() >= MAX_SESSIONS {
            let oldest = sessions.iter().min_by_key(|(_, session)| session.created).map(|(id, _)| *id);
            oldest.and_then(|id| sessions.remove(&id));
        }
        sessions.insert(TokenDigest::new(&cookie), StoredSession { created: now, csrf });
        Ok(cookie)
    }

    /// The session of a cookie. The lookup is by digest, so its timing reveals nothing about the stored cookies.
    pub fn find(&self, cookie: &str, now: Timestamp) -> Option<Session> {
        let id = TokenDigest::new(cookie);
        self.lock(now).get(&id).map(|session| Session { id, csrf: session.csrf.clone() })
    }

    /// Whether a session is still valid.
    pub fn is_valid(&self, session: &Session, now: Timestamp) -> bool {
        self.lock(now).contains_key(&session.id)
    }

    pub fn remove(&self, session: &Session, now: Timestamp) {
        self.lock(now).remove(&session.id);
    }

    /// Locks the table and removes expired sessions.
    fn lock(&self, now: Timestamp) -> MutexGuard<'_, HashMap<TokenDigest, StoredSession>> {
        let mut sessions = self.0.lock();
        sessions.retain(|_, session| now.since(session.created) < SESSION_LIFETIME);
        sessions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(path: &str) -> &str {
        path.split_once("token=").unwrap().1
    }

    #[tokio::test]
    async fn n20_invitations_are_single_use_and_replaced() {
        let invitations = Invitations::default();
        let authenticator = Authenticator::new(Access::Invited(invitations.clone()));
        let verify = async |token: &str| authenticator.verify(Zeroizing::new(token.to_owned())).await.unwrap();
        assert!(!verify("").await, "no invitation was issued");
        let first = invitations.issue().unwrap();
        assert!(!verify("x").await && !verify("").await);
        assert!(verify(token(&first)).await);
        invitations.used().await;
        assert!(!verify(token(&first)).await, "already used");
        let second = invitations.issue().unwrap();
        let third = invitations.issue().unwrap();
        assert!(!verify(token(&second)).await, "replaced by a later one");
        assert!(verify(token(&third)).await);
    }

    #[test]
    fn n20_login_attempts_have_burst_and_rate_limit() {
        let attempts = LoginAttempts::default();
        let client: IpAddr = "127.0.0.1".parse().unwrap();
        let mut now = Timestamp::from_secs(1000);
        for _ in 0..LOGIN_ATTEMPT_BURST {
            assert_eq!(attempts.check(client, now), Ok(()));
        }
        assert_eq!(attempts.check(client, now), Err(LOGIN_ATTEMPT_INTERVAL));
        let mapped = "::ffff:127.0.0.1".parse().unwrap();
        assert_eq!(attempts.check(mapped, now), Err(LOGIN_ATTEMPT_INTERVAL), "the same address");
        assert_eq!(attempts.check("10.0.0.1".parse().unwrap(), now), Ok(()), "another client has its own limit");
        now = now.saturating_add(Duration::from_secs(4));
        assert_eq!(attempts.check(client, now), Err(Duration::from_secs(6)), "a rejected attempt is not counted");
        now = now.saturating_add(Duration::from_secs(6));
        assert_eq!(attempts.check(client, now), Ok(()));
        assert_eq!(attempts.check(client, now), Err(LOGIN_ATTEMPT_INTERVAL));
        attempts.reset(client);
        assert_eq!(attempts.check(client, now), Ok(()));
    }

    #[test]
    fn n20_login_rate_limit_groups_ipv6_networks() {
        let attempts = LoginAttempts::default();
        let now = Timestamp::from_secs(1000);
        let allowed = |address: &str| attempts.check(address.parse().unwrap(), now).is_ok();
        for end in 0..LOGIN_ATTEMPT_BURST {
            assert!(allowed(&format!("2001:db8::{end}")));
        }
        assert!(!allowed("2001:db8::ffff") && allowed("2001:db8:0:1::1"));
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_secs(seconds)
    }

    #[test]
    fn n20_sessions_expire_and_can_be_removed() {
        let sessions = Sessions::default();
        let cookie = sessions.create(at(0)).unwrap();
        let session = sessions.find(&cookie, at(1)).unwrap();
        assert!(
            session.csrf.verify(session.csrf.as_str()) && !session.csrf.verify("") && !session.csrf.verify(&cookie)
        );
        assert!(sessions.find("x", at(1)).is_none() && sessions.find("", at(1)).is_none());
        assert!(sessions.is_valid(&session, at(SESSION_LIFETIME.as_secs() - 1)));
        assert!(!sessions.is_valid(&session, at(SESSION_LIFETIME.as_secs())));
        let other = sessions.create(at(0)).unwrap();
        let other = sessions.find(&other, at(0)).unwrap();
        sessions.remove(&other, at(0));
        assert!(!sessions.is_valid(&other, at(0)));
    }

    #[test]
    fn n20_new_session_replaces_the_oldest() {
        let sessions = Sessions::default();
        let cookies: Vec<_> = (0..=MAX_SESSIONS as u64).map(|second| sessions.create(at(second)).unwrap()).collect();
        let now = at(100);
        assert!(sessions.find(&cookies[0], now).is_none());
        assert!(cookies[1..].iter().all(|cookie| sessions.find(cookie, now).is_some()));
    }
}
