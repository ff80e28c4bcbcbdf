//! Secrets: random tokens and their digests, and password hashes. All comparisons take constant time.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use data_encoding::HEXLOWER;
use openssl::base64;
use openssl::memcmp;
use openssl::pkcs5::scrypt;
use openssl::rand::rand_bytes;
use openssl::sha::sha256;
use zeroize::Zeroizing;

use crate::packet::RandomnessError;

const TOKEN_BYTES: usize = 32;

/// The binary logarithm of scrypt's cost N for a new hash: 2^15 blocks of 8 * 128 bytes take 32 MiB.
const LOG_COST: u32 = 15;
/// scrypt's block size r, in units of 128 bytes. No other value is accepted.
const BLOCK_SIZE: u64 = 8;
/// scrypt's parallelization p for a new hash.
const PARALLELIZATION: u64 = 3;
/// The costs that are accepted. A higher cost would take more than 128 MiB per login attempt.
const ACCEPTED_LOG_COSTS: RangeInclusive<u32> = 14..=17;
const ACCEPTED_PARALLELIZATIONS: RangeInclusive<u64> = 1..=16;
/// OpenSSL's memory limit: enough for the highest accepted cost.
const MAX_SCRYPT_MEMORY_BYTES: u64 = 160 << 20;
const SALT_BYTES: usize = 16;
const KEY_BYTES: usize = 32;

/// A new random token: 256 bits as 64 hexadecimal digits.
pub(super) fn random_token() -> Result<Zeroizing<String>, RandomnessError> {
    let mut bytes = Zeroizing::new([0; TOKEN_BYTES]);
    rand_bytes(bytes.as_mut_slice()).map_err(|_| RandomnessError)?;
    Ok(Zeroizing::new(HEXLOWER.encode(bytes.as_slice())))
}

/// The SHA-256 of a token: stored in its place, because it verifies a token but cannot be used as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TokenDigest([u8; 32]);

impl TokenDigest {
    pub fn new(token: &str) -> Self {
        Self(sha256(token.as_bytes()))
    }

    /// Whether `token` has this digest. Takes constant time.
    pub fn verify(&self, token: &str) -> bool {
        memcmp::eq(&self.0, &sha256(token.as_bytes()))
    }
}

/// A password, hashed with scrypt (RFC 7914): `$scrypt$ln=15,r=8,p=3$SALT$KEY`, salt and key in base64.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash {
    log_cost: u32,
    parallelization: u64,
    salt: [u8; SALT_BYTES],
    key: [u8; KEY_BYTES],
}

/// The text is not a password hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a password hash has the form $scrypt$ln=14..17,r=8,p=1..16$SALT$KEY")]
pub struct InvalidHash;

/// Why a password was not hashed or verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PasswordError {
    /// The password is too short or too long.
    #[error("a password must have {} to {} bytes", PasswordHash::MIN_PASSWORD_BYTES, PasswordHash::MAX_PASSWORD_BYTES)]
    Length,
    /// OpenSSL failed.
    #[error("failed to compute the password hash")]
    Crypto,
}

impl PasswordHash {
    /// The shortest accepted password, in bytes.
    pub const MIN_PASSWORD_BYTES: usize = 8;
    /// The longest accepted password, in bytes.
    pub const MAX_PASSWORD_BYTES: usize = 1024;

    /// Hashes a password with a new random salt. Blocks for some tenths of a second and uses 32 MiB.
    ///
    /// # Errors
    /// [`PasswordError`] if the password is too short or too long, or if OpenSSL fails.
    pub fn new(password: &str) -> Result<Self, PasswordError> {
        if !(Self::MIN_PASSWORD_BYTES..=Self::MAX_PASSWORD_BYTES).contains(&password.len()) {
            return Err(PasswordError::Length);
        }
        let mut salt = [0; SALT_BYTES];
        rand_bytes(&mut salt).map_err(|_| PasswordError::Crypto)?;
        let mut hash = Self { log_cost: LOG_COST, parallelization: PARALLELIZATION, salt, key: [0; KEY_BYTES] };
        hash.key = *hash.derive_key(password)?;
        Ok(hash)
    }

    /// Whether `password` has this hash. Blocks as long as [`PasswordHash::new`], whatever the result.
    ///
    /// # Errors
    /// [`PasswordError::Crypto`] if OpenSSL fails.
    pub fn verify(&self, password: &str) -> Result<bool, PasswordError> {
        if password.len() > Self::MAX_PASSWORD_BYTES {
            return Ok(false);
        }
        Ok(memcmp::eq(self.derive_key(password)?.as_slice(), &self.key))
    }

    fn derive_key(&self, password: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, PasswordError> {
        let Self { log_cost, parallelization, salt, .. } = self;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        scrypt(
            password.as_bytes(),
            salt,
            1 << log_cost,
            BLOCK_SIZE,
            *parallelization,
            MAX_SCRYPT_MEMORY_BYTES,
            key.as_mut_slice(),
        )
        .map_err(|_| PasswordError::Crypto)?;
        Ok(key)
    }
}

impl fmt::Display for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { log_cost, parallelization, salt, key } = self;
        let (salt, key) = (base64::encode_block(salt), base64::encode_block(key));
        write!(f, "$scrypt$ln={log_cost},r={BLOCK_SIZE},p={parallelization}${salt}${key}")
    }
}

impl FromStr for PasswordHash {
    type Err = InvalidHash;

    fn from_str(text: &str) -> Result<Self, InvalidHash> {
        let parts: Vec<&str> = text.split('$').collect();
        let ["", "scrypt", parameters, salt, key] = parts.as_slice() else { return Err(InvalidHash) };
        let parameters: Vec<&str> = parameters.split(',').collect();
        let [log_cost, "r=8", parallelization] = parameters.as_slice() else { return Err(InvalidHash) };
        let number = |text: &str, name| text.strip_prefix(name)?.parse::<u32>().ok();
        let log_cost = number(log_cost, "ln=").filter(|cost| ACCEPTED_LOG_COSTS.contains(cost)).ok_or(InvalidHash)?;
        let parallelization = number(parallelization, "p=")
            .map(u64::from)
            .filter(|p| ACCEPTED_PARALLELIZATIONS.contains(p))
            .ok_or(InvalidHash)?;
        let hash = Self { log_cost, parallelization, salt: decode_base64(salt)?, key: decode_base64(key)? };
        // Only the canonical form is accepted, so that no part of the text is ignored.
        if hash.to_string() == text { Ok(hash) } else { Err(InvalidHash) }
    }
}

fn decode_base64<const N: usize>(text: &str) -> Result<[u8; N], InvalidHash> {
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
    fn n20_tokens_are_random_and_match_only_their_digest() {
        let (first, second) = (random_token().unwrap(), random_token().unwrap());
        assert_eq!((first.len(), first == second), (64, false));
        assert!(first.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')));
        let digest = TokenDigest::new(&first);
        assert!(digest.verify(&first) && !digest.verify(&second) && !digest.verify(""));
    }

    #[test]
    fn n20_password_hash_verifies_only_its_password() {
        let hash = PasswordHash::new("correct horse").unwrap();
        assert!(hash.verify("correct horse").unwrap());
        assert!(!hash.verify("correct horsf").unwrap() && !hash.verify("").unwrap());
        assert!(!hash.verify(&"x".repeat(2000)).unwrap());
        let parsed: PasswordHash = hash.to_string().parse().unwrap();
        assert_eq!(parsed, hash);
        assert_ne!(PasswordHash::new("correct horse").unwrap(), hash, "every hash has its own salt");
        assert_eq!(PasswordHash::new("short").unwrap_err(), PasswordError::Length);
    }

    /// The vectors of RFC 7914, section 12, use other sizes. Python's `hashlib.scrypt` computed this one.
    #[test]
    fn n20_password_hash_is_compatible_with_python_scrypt() {
        let hash = "$scrypt$ln=14,r=8,p=1$AAAAAAAAAAAAAAAAAAAAAA==$cvKDSIR8vA/24EQVf1tBGSj9VimKoCjA7Ny1Asw1kK8=";
        let hash: PasswordHash = hash.parse().unwrap();
        assert!(hash.verify("correct horse").unwrap());
    }

    #[test]
    fn n20_rejects_invalid_password_hashes() {
        let good = PasswordHash { log_cost: 14, parallelization: 1, salt: [1; SALT_BYTES], key: [2; KEY_BYTES] };
        let good = good.to_string();
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
