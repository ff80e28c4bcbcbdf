//! Registrations and heartbeats as they are kept in Redis: what an agent said, with what proves it.
//!
//! A value is one byte for its form, 8 bytes for the moment at which its writer heard it (microseconds since the Unix epoch), and
//! for form 1 the proof: salt (32 bytes), body, SignerInfo, the number of certificates (one byte) and the certificates, each behind
//! its length in 4 bytes. Form 2 is what a plain agent said, as JSON: its packet. Numbers are big-endian.
//!
//! Values come from anybody who reaches Redis. Nothing in them is believed before [`super::belief`] has verified it.

use std::sync::Arc;

use crate::clock::Timestamp;
use crate::packet::{Kind, Packet};
use crate::serializer::Proof;

const PROOF: u8 = 1;
const UNSIGNED: u8 = 2;
/// The longest value, in bytes: more than any registration with its proof.
pub(super) const MAX: usize = Kind::Register.max_bytes() + 1024;
/// The most certificates beside a proof.
const MAX_CERTIFICATES: u8 = 8;

/// What is kept of one message.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// When its writer heard it, as the writer says.
    pub heard: Timestamp,
    /// What was said.
    pub said: Said,
}

/// What an agent said.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Said {
    /// With a proof, of which nothing is verified.
    Proven(Arc<Proof>),
    /// In a plain format, by whoever it was.
    Unsigned(Box<Packet>),
}

/// Why a value is no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoEntry {
    TooLarge,
    Malformed,
}

impl Entry {
    /// The value; none when it cannot be expressed.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(1024);
        let form = match self.said {
            Said::Proven(_) => PROOF,
            Said::Unsigned(_) => UNSIGNED,
        };
        out.push(form);
        out.extend_from_slice(&self.heard.as_micros().to_be_bytes());
        match &self.said {
            Said::Proven(proof) => {
                out.extend_from_slice(&proof.salt);
                put(&mut out, &proof.body)?;
                put(&mut out, &proof.signer_info)?;
                out.push(u8::try_from(proof.certificates.len()).ok().filter(|count| *count <= MAX_CERTIFICATES)?);
                proof.certificates.iter().try_for_each(|certificate| put(&mut out, certificate))?;
            }
            Said::Unsigned(packet) => out.extend(serde_json::to_vec(packet).ok()?),
        }
        (out.len() <= MAX).then_some(out)
    }

    /// Reads a value, to its end.
    pub fn decode(value: &[u8]) -> Result<Self, NoEntry> {
        if value.len() > MAX {
            return Err(NoEntry::TooLarge);
        }
        Self::parse(value).ok_or(NoEntry::Malformed)
    }

    fn parse(value: &[u8]) -> Option<Self> {
        let (form, value) = value.split_first()?;
        let (heard, mut value) = value.split_first_chunk::<8>()?;
        let heard = Timestamp::from_micros(u64::from_be_bytes(*heard));
        let said = match *form {
            PROOF => {
                let (salt, rest) = value.split_first_chunk::<32>()?;
                value = rest;
                let (body, signer_info) = (take(&mut value)?.to_vec(), take(&mut value)?.to_vec());
                let (count, rest) = value.split_first()?;
                value = rest;
                if *count > MAX_CERTIFICATES {
                    return None;
                }
                let certificates = (0..*count).map(|_| take(&mut value).map(<[u8]>::to_vec)).collect::<Option<_>>()?;
                if !value.is_empty() {
                    return None;
                }
                Said::Proven(Arc::new(Proof { salt: *salt, body, signer_info, certificates }))
            }
            UNSIGNED => Said::Unsigned(Box::new(serde_json::from_slice(value).ok()?)),
            _ => return None,
        };
        Some(Self { heard, said })
    }
}

fn put(out: &mut Vec<u8>, part: &[u8]) -> Option<()> {
    out.extend_from_slice(&u32::try_from(part.len()).ok()?.to_be_bytes());
    out.extend_from_slice(part);
    Some(())
}

fn take<'a>(value: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, rest) = value.split_first_chunk::<4>()?;
    let (part, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    *value = rest;
    Some(part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{Identity, Ping, Status};

    fn proven() -> Entry {
        let certificates = vec![vec![5; 3], vec![]];
        let proof = Proof { salt: [7; 32], body: b"body".to_vec(), signer_info: b"signature".to_vec(), certificates };
        Entry { heard: Timestamp::from_micros(77), said: Said::Proven(Arc::new(proof)) }
    }

    #[test]
    fn n14_entries_read_back() {
        let ping = Ping { identity: Identity::agent("fred").unwrap(), status: Status::new(0.5), instance: Some(3) };
        let plain = Entry { heard: Timestamp::from_micros(1), said: Said::Unsigned(Box::new(ping.into())) };
        for entry in [proven(), plain] {
            assert_eq!(Entry::decode(&entry.encode().unwrap()), Ok(entry));
        }
    }

    #[test]
    fn n14_cut_longer_and_oversized_values_are_no_entries() {
        let value = proven().encode().unwrap();
        for length in 0..value.len() {
            assert_eq!(Entry::decode(&value[..length]), Err(NoEntry::Malformed), "{length}");
        }
        assert_eq!(Entry::decode(&[&value[..], &[0]].concat()), Err(NoEntry::Malformed));
        assert_eq!(Entry::decode(&vec![1; MAX + 1]), Err(NoEntry::TooLarge));
        let Said::Proven(proof) = proven().said else { panic!() };
        let larger = Proof { body: vec![0; MAX], ..(*proof).clone() };
        assert_eq!(Entry { said: Said::Proven(Arc::new(larger)), ..proven() }.encode(), None);
    }

    proptest! {
        #[test]
        fn n14_any_bytes_are_an_entry_or_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..200), form in 0u8..4) {
            if let Some(first) = bytes.first_mut() {
                *first = form;
            }
            if let Ok(entry) = Entry::decode(&bytes) && matches!(entry.said, Said::Proven(_)) {
                prop_assert_eq!(entry.encode().unwrap(), bytes);
            }
        }
    }
}
