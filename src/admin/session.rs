//! Sessions: a bounded table, keyed by the digest of the session cookie. Each session has its own CSRF token.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use zeroize::Zeroizing;

use super::secret::{TokenDigest, random_token};
use crate::clock::Timestamp;
use crate::packet::RandomnessError;

/// The names of the cookies, before [`Origins::cookie_name`](super::origin::Origins::cookie_name).
pub(super) const SESSION_COOKIE: &str = "nanite";
pub(super) const LOGIN_COOKIE: &str = "nanite-login";

/// How long a session is valid.
pub(super) const SESSION_LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// The most sessions at a time; a new session replaces the oldest.
const MAX_SESSIONS: usize = 64;

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
