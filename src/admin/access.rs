//! Who may look: whoever knows the password, or was invited. Both are checked in constant time, after a limit of attempts.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Notify, Semaphore};
use zeroize::Zeroizing;

use super::password::{PasswordError, PasswordHash};
use super::secret::{Digest, random};
use crate::packet::RandomnessError;

/// How many passwords are checked at a time: each check takes memory and time.
const CHECKS: usize = 1;

/// Who may look at the pages.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Access {
    /// Whoever knows the password.
    Password(PasswordHash),
    /// Whoever has an invitation that nobody used yet.
    Invited(Invitations),
}

/// Invitations: random tokens that each let one browser in. It is a handle: cloning it is cheap.
#[derive(Clone, Debug, Default)]
pub struct Invitations(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// The one that can be used.
    open: Mutex<Option<Digest>>,
    used: Notify,
}

impl Invitations {
    /// Makes a new invitation in place of the last one; gives the path that lets its reader in, `/login?token=...`.
    ///
    /// # Errors
    /// When the system's random generator fails.
    pub fn issue(&self) -> Result<Zeroizing<String>, RandomnessError> {
        let token = random()?;
        *self.0.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(Digest::of(&token));
        Ok(Zeroizing::new(format!("/login?token={}", token.as_str())))
    }

    /// Waits until an invitation is used. Cancel safe.
    pub async fn used(&self) {
        self.0.used.notified().await;
    }

    /// Takes the invitation, if this is it.
    fn take(&self, token: &str) -> bool {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        let good = open.is_some_and(|open| open.is_of(token));
        if good {
            *open = None;
            self.0.used.notify_one();
        }
        good
    }
}

/// Checks what somebody gives.
#[derive(Debug)]
pub(super) struct Door {
    access: Access,
    checks: Arc<Semaphore>,
}

impl Door {
    pub fn new(access: Access) -> Self {
        Self { access, checks: Arc::new(Semaphore::new(CHECKS)) }
    }

    /// Whether invitations are used, and no password.
    pub fn takes_invitations(&self) -> bool {
        matches!(self.access, Access::Invited(_))
    }

    /// Whether this opens.
    pub async fn opens(&self, secret: Zeroizing<String>) -> Result<bool, PasswordError> {
        match &self.access {
            Access::Invited(invitations) => Ok(invitations.take(&secret)),
            Access::Password(hash) => {
                let permit = self.checks.clone().acquire_owned().await.map_err(|_| PasswordError::Crypto)?;
                let hash = hash.clone();
                let check = move || {
                    // Kept to the end: a caller who goes away does not end the work.
                    let _permit = permit;
                    hash.matches(&secret)
                };
                tokio::task::spawn_blocking(check).await.map_err(|_| PasswordError::Crypto)?
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(path: &str) -> &str {
        path.split_once("token=").unwrap().1
    }

    #[tokio::test]
    async fn n20_an_invitation_opens_once_and_a_new_one_takes_its_place() {
        let invitations = Invitations::default();
        let door = Door::new(Access::Invited(invitations.clone()));
        let opens = async |token: &str| door.opens(Zeroizing::new(token.to_owned())).await.unwrap();
        assert!(!opens("").await, "nobody was invited");
        let first = invitations.issue().unwrap();
        assert!(!opens("x").await && !opens("").await);
        assert!(opens(token(&first)).await);
        invitations.used().await;
        assert!(!opens(token(&first)).await, "it was used");
        let second = invitations.issue().unwrap();
        let third = invitations.issue().unwrap();
        assert!(!opens(token(&second)).await, "a later one took its place");
        assert!(opens(token(&third)).await);
    }
}
