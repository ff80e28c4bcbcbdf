//! Passwords: kept as the outcome of scrypt (RFC 7914), which makes guessing expensive.

use std::fmt;
use std::str::FromStr;

use openssl::base64;
use openssl::memcmp;
use openssl::pkcs5::scrypt;
use openssl::rand::rand_bytes;
use zeroize::Zeroizing;

/// The logarithm of the cost of a new hash: 2^15 rounds of 8 * 128 bytes are 32 MiB.
const LOG_COST: u32 = 15;
/// The block size, in units of 128 bytes; no other is used.
const BLOCK: u64 = 8;
/// How often in a row, for a new hash.
const TIMES: u64 = 3;
/// The costs that are accepted. More than the upper one takes more than 128 MiB for each try.
const LOG_COSTS: std::ops::RangeInclusive<u32> = 14..=17;
const TIMES_ACCEPTED: std::ops::RangeInclusive<u64> = 1..=16;
/// What OpenSSL may use, in bytes: that of the highest cost, and some room.
const MEMORY: u64 = 160 << 20;
const SALT: usize = 16;
const KEY: usize = 32;

/// What is kept of a password: `$scrypt$ln=15,r=8,p=3$SALT$KEY`, salt and key in base64.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash {
    log_cost: u32,
    times: u64,
    salt: [u8; SALT],
    key: [u8; KEY],
}

/// A text is no password hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a password hash is $scrypt$ln=14..17,r=8,p=1..16$SALT$KEY")]
pub struct InvalidHash;

/// Why there is no hash of a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PasswordError {
    /// Too short to be of use, or too long to be a password.
    #[error("a password has {} to {} bytes", PasswordHash::SHORTEST, PasswordHash::LONGEST)]
    Length,
    /// OpenSSL failed.
    #[error("the hash of the password could not be made")]
    Crypto,
}

impl PasswordHash {
    /// The shortest password, in bytes.
    pub const SHORTEST: usize = 8;
    /// The longest password, in bytes.
    pub const LONGEST: usize = 1024;

    /// The hash of a password, with a new salt. It takes some tenths of a second, and 32 MiB.
    ///
    /// # Errors
    /// [`PasswordError`] when the password cannot be used, or OpenSSL fails.
    pub fn of(password: &str) -> Result<Self, PasswordError> {
        if !(Self::SHORTEST..=Self::LONGEST).contains(&password.len()) {
            return Err(PasswordError::Length);
        }
        let mut salt = [0; SALT];
        rand_bytes(&mut salt).map_err(|_| PasswordError::Crypto)?;
        let mut hash = Self { log_cost: LOG_COST, times: TIMES, salt, key: [0; KEY] };
        hash.key = *hash.derive(password)?;
        Ok(hash)
    }

    /// Whether this is the hash of `password`. It blocks as long as [`PasswordHash::of`], whatever the answer.
    ///
    /// # Errors
    /// [`PasswordError::Crypto`] when OpenSSL fails.
    pub fn matches(&self, password: &str) -> Result<bool, PasswordError> {
        if password.len() > Self::LONGEST {
            return Ok(false);
        }
        Ok(memcmp::eq(self.derive(password)?.as_slice(), &self.key))
    }

    fn derive(&self, password: &str) -> Result<Zeroizing<[u8; KEY]>, PasswordError> {
        let mut key = Zeroizing::new([0; KEY]);
        scrypt(password.as_bytes(), &self.salt, 1 << self.log_cost, BLOCK, self.times, MEMORY, key.as_mut_slice())
            .map_err(|_| PasswordError::Crypto)?;
        Ok(key)
    }
}

impl fmt::Display for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { log_cost, times, salt, key } = self;
        let (salt, key) = (base64::encode_block(salt), base64::encode_block(key));
        write!(f, "$scrypt$ln={log_cost},r={BLOCK},p={times}${salt}${key}")
    }
}

impl FromStr for PasswordHash {
    type Err = InvalidHash;

    fn from_str(text: &str) -> Result<Self, InvalidHash> {
        let parts: Vec<&str> = text.split('$').collect();
        let ["", "scrypt", costs, salt, key] = parts.as_slice() else { return Err(InvalidHash) };
        let costs: Vec<&str> = costs.split(',').collect();
        let [log_cost, "r=8", times] = costs.as_slice() else { return Err(InvalidHash) };
        let number = |text: &str, name| text.strip_prefix(name)?.parse::<u32>().ok();
        let log_cost = number(log_cost, "ln=").filter(|cost| LOG_COSTS.contains(cost)).ok_or(InvalidHash)?;
        let times = number(times, "p=").map(u64::from).filter(|t| TIMES_ACCEPTED.contains(t)).ok_or(InvalidHash)?;
        let hash = Self { log_cost, times, salt: bytes(salt)?, key: bytes(key)? };
        // One way to write it, so that nothing unread hides in it.
        if hash.to_string() == text { Ok(hash) } else { Err(InvalidHash) }
    }
}

fn bytes<const N: usize>(text: &str) -> Result<[u8; N], InvalidHash> {
    base64::decode_block(text).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(InvalidHash)
}

impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordHash")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n20_a_password_is_known_by_its_hash() {
        let hash = PasswordHash::of("correct horse").unwrap();
        assert!(hash.matches("correct horse").unwrap());
        assert!(!hash.matches("correct horsf").unwrap() && !hash.matches("").unwrap());
        assert!(!hash.matches(&"x".repeat(2000)).unwrap());
        let read: PasswordHash = hash.to_string().parse().unwrap();
        assert_eq!(read, hash);
        assert_ne!(PasswordHash::of("correct horse").unwrap(), hash, "every hash has its own salt");
        assert_eq!(PasswordHash::of("short").unwrap_err(), PasswordError::Length);
    }

    /// RFC 7914, section 12, has vectors with other sizes; this one is of Python's hashlib.scrypt.
    #[test]
    fn n20_the_hash_is_that_of_other_programs() {
        let hash = "$scrypt$ln=14,r=8,p=1$AAAAAAAAAAAAAAAAAAAAAA==$cvKDSIR8vA/24EQVf1tBGSj9VimKoCjA7Ny1Asw1kK8=";
        let hash: PasswordHash = hash.parse().unwrap();
        assert!(hash.matches("correct horse").unwrap());
    }

    #[test]
    fn n20_what_is_no_hash_is_refused() {
        let good = PasswordHash { log_cost: 14, times: 1, salt: [1; SALT], key: [2; KEY] }.to_string();
        assert!(good.parse::<PasswordHash>().is_ok());
        for bad in [
            "",
            "$scrypt$",
            &good.replace("ln=14", "ln=13"),
            &good.replace("ln=14", "ln=40"),
            &good.replace("ln=14", "ln=014"),
            &good.replace("r=8", "r=1"),
            &good.replace("p=1", "p=0"),
            &good.replace("p=1", "p=17"),
            &good.replace("scrypt", "argon2id"),
            &format!("{good} "),
            &format!("{good}$"),
            &good.replace('=', ""),
        ] {
            assert_eq!(bad.parse::<PasswordHash>(), Err(InvalidHash), "{bad}");
        }
    }
}
