//! Random secrets, and comparing what somebody gives with what is expected without telling how much of it was right.

use openssl::memcmp;
use openssl::rand::rand_bytes;
use openssl::sha::sha256;
use zeroize::Zeroizing;

use crate::packet::RandomnessError;

/// Bytes of a secret: nobody guesses 256 bits.
const LENGTH: usize = 32;

/// What is kept of a secret: enough to know it again, useless to whoever reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Digest([u8; 32]);

impl Digest {
    pub fn of(secret: &str) -> Self {
        Self(sha256(secret.as_bytes()))
    }

    /// Whether this is the digest of `given`, in a time that does not depend on the difference.
    pub fn is_of(&self, given: &str) -> bool {
        memcmp::eq(&self.0, &sha256(given.as_bytes()))
    }
}

/// A new secret of 64 hexadecimal digits.
pub(super) fn random() -> Result<Zeroizing<String>, RandomnessError> {
    let mut bytes = Zeroizing::new([0; LENGTH]);
    rand_bytes(bytes.as_mut_slice()).map_err(|_| RandomnessError)?;
    Ok(Zeroizing::new(hex(bytes.as_slice())))
}

/// Bytes as hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(nibble.into(), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n20_secrets_are_long_differ_and_are_known_again() {
        let (one, other) = (random().unwrap(), random().unwrap());
        assert_eq!((one.len(), one == other), (64, false));
        let digest = Digest::of(&one);
        assert!(digest.is_of(&one) && !digest.is_of(&other) && !digest.is_of(""));
        assert_eq!(hex(&[0, 15, 16, 255]), "000f10ff");
    }
}
