//! Who is logged in: a bounded table of sessions, known by a cookie, each with a secret of its own that its forms carry.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use zeroize::Zeroizing;

use super::guard;
use super::page::Refusal;
use super::router::Tower;
use super::secret::{Digest, random};
use crate::clock::Timestamp;
use crate::packet::RandomnessError;

/// How long a session lasts.
pub(super) const LASTS: Duration = Duration::from_secs(12 * 3600);
/// How many there are; a new one takes the place of the oldest.
const SESSIONS: usize = 64;

/// All sessions, by the digest of what their cookie holds.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<HashMap<Digest, Open>>);

#[derive(Debug)]
struct Open {
    since: Timestamp,
    csrf: Arc<Zeroizing<String>>,
}

/// Somebody who is logged in.
#[derive(Clone, Debug)]
pub(super) struct Session {
    id: Digest,
    /// What every form of this session carries: another site's page cannot know it.
    pub csrf: Arc<Zeroizing<String>>,
}

impl Session {
    /// Whether a form is one of this session.
    pub fn wrote(&self, csrf: &str) -> bool {
        Digest::of(&self.csrf).is_of(csrf)
    }
}

impl Sessions {
    /// Begins a session; gives what its cookie holds.
    pub fn begin(&self, now: Timestamp) -> Result<Zeroizing<String>, RandomnessError> {
        let (cookie, csrf) = (random()?, Arc::new(random()?));
        let mut open = self.lock(now);
        if open.len() >= SESSIONS {
            let oldest = open.iter().min_by_key(|(_, session)| session.since).map(|(id, _)| *id);
            oldest.and_then(|id| open.remove(&id));
        }
        open.insert(Digest::of(&cookie), Open { since: now, csrf });
        Ok(cookie)
    }

    /// The session of a cookie. Looking its digest up tells nothing of the cookies that are kept.
    pub fn find(&self, cookie: &str, now: Timestamp) -> Option<Session> {
        let id = Digest::of(cookie);
        self.lock(now).get(&id).map(|open| Session { id, csrf: open.csrf.clone() })
    }

    /// Whether it still lasts.
    pub fn lasts(&self, session: &Session, now: Timestamp) -> bool {
        self.lock(now).contains_key(&session.id)
    }

    /// Ends a session.
    pub fn end(&self, session: &Session, now: Timestamp) {
        self.lock(now).remove(&session.id);
    }

    fn lock(&self, now: Timestamp) -> MutexGuard<'_, HashMap<Digest, Open>> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, session| now.since(session.since) < LASTS);
        open
    }
}

/// The value of a cookie that a browser sent; none when it sent it twice: somebody may have put one beside ours.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut found =
        all.flat_map(|text| text.split(';')).filter_map(|pair| pair.trim().strip_prefix(name)?.strip_prefix('='));
    found.next().filter(|_| found.next().is_none())
}

impl FromRequestParts<Arc<Tower>> for Session {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, tower: &Arc<Tower>) -> Result<Self, Refusal> {
        let cookie = cookie(&parts.headers, &tower.origins.cookie(guard::SESSION));
        let session = cookie.and_then(|cookie| tower.sessions.find(cookie, tower.clock.now()));
        session.ok_or_else(|| guard::login_first(parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_secs(seconds)
    }

    #[test]
    fn n20_a_session_lasts_until_it_ends_or_its_time_is_over() {
        let sessions = Sessions::default();
        let cookie = sessions.begin(at(0)).unwrap();
        let session = sessions.find(&cookie, at(1)).unwrap();
        assert!(session.wrote(&session.csrf) && !session.wrote("") && !session.wrote(&cookie));
        assert!(sessions.find("x", at(1)).is_none() && sessions.find("", at(1)).is_none());
        assert!(sessions.lasts(&session, at(LASTS.as_secs() - 1)));
        assert!(!sessions.lasts(&session, at(LASTS.as_secs())));
        let other = sessions.begin(at(0)).unwrap();
        let other = sessions.find(&other, at(0)).unwrap();
        sessions.end(&other, at(0));
        assert!(!sessions.lasts(&other, at(0)));
    }

    #[test]
    fn n20_the_table_of_sessions_is_bounded_and_the_oldest_goes() {
        let sessions = Sessions::default();
        let cookies: Vec<_> = (0..=SESSIONS as u64).map(|second| sessions.begin(at(second)).unwrap()).collect();
        let now = at(100);
        assert!(sessions.find(&cookies[0], now).is_none());
        assert!(cookies[1..].iter().all(|cookie| sessions.find(cookie, now).is_some()));
    }

    #[test]
    fn n20_a_cookie_that_comes_twice_is_none() {
        let sent = |text: &'static str| HeaderMap::from_iter([(header::COOKIE, text.parse().unwrap())]);
        assert_eq!(cookie(&sent("a=1; nanite=xyz; b=2"), "nanite"), Some("xyz"));
        assert_eq!(cookie(&sent("nanite2=xyz"), "nanite"), None);
        assert_eq!(cookie(&sent("nanite=x; nanite=y"), "nanite"), None);
    }
}
