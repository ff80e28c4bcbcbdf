//! What binds an agent's answer to the request of a node that asked through a mapper: the origin of the request, which the agent signs
//! with its answer, and the agent's proof, which the mapper forwards.

use std::fmt;

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use openssl::sha::Sha256;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

use super::chunk::Chunk;
use super::identity::Identity;
use super::names::{Service, Token};
use super::payload::Payload;

/// A proxied request as the node that made it knows it. An agent signs it with its answer, so that this node recognizes the answer
/// whichever mappers forward it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RequestOrigin {
    /// The node that made the request.
    pub asker: Identity,
    /// The token that it chose.
    pub token: Token,
    /// What the agent was asked to do.
    pub request: RequestDigest,
}

impl RequestOrigin {
    /// The origin of a request of `asker` with this token.
    pub fn new(asker: Identity, token: Token, request: RequestDigest) -> Self {
        Self { asker, token, request }
    }
}

/// The SHA-256 over the service and the payload of a request, in a form that does not depend on the codec.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestDigest([u8; 32]);

impl RequestDigest {
    /// The digest of a request for `service`, as agents resolve it, with this payload.
    pub fn of(service: &Service, payload: &Payload) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"nanite/2 request");
        hash_text(&mut hash, service.resolved().as_str());
        hash_value(&mut hash, &payload.0);
        Self(hash.finish())
    }
}

/// A length or count: 8 bytes, the most significant first.
fn hash_length(hash: &mut Sha256, length: usize) {
    hash.update(&(length as u64).to_be_bytes());
}

fn hash_text(hash: &mut Sha256, text: &str) {
    hash.update(b"s");
    hash_length(hash, text.len());
    hash.update(text.as_bytes());
}

/// Each value has a letter for its type. The keys of a map are in the order of their bytes.
fn hash_value(hash: &mut Sha256, value: &Value) {
    match value {
        Value::Null => hash.update(b"n"),
        Value::Bool(value) => hash.update(if *value { b"t" } else { b"f" }),
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => {
                hash.update(b"u");
                hash.update(&number.to_be_bytes());
            }
            (None, Some(number)) => {
                hash.update(b"i");
                hash.update(&number.to_be_bytes());
            }
            (None, None) => {
                hash.update(b"d");
                hash.update(&number.as_f64().unwrap_or(f64::NAN).to_bits().to_be_bytes());
            }
        },
        Value::String(text) => hash_text(hash, text),
        Value::Array(values) => {
            hash.update(b"a");
            hash_length(hash, values.len());
            values.iter().for_each(|value| hash_value(hash, value));
        }
        Value::Object(fields) => {
            hash.update(b"m");
            hash_length(hash, fields.len());
            let mut sorted: Vec<_> = fields.iter().collect();
            sorted.sort_unstable_by_key(|(name, _)| *name);
            for (name, value) in sorted {
                hash_text(hash, name);
                hash_value(hash, value);
            }
        }
    }
}

impl fmt::Display for RequestDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for RequestDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for RequestDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RequestDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| de::Error::custom("a digest is 64 hexadecimal digits"))
    }
}

/// An agent's signature over its answer, which a mapper forwards. **Nothing is verified**: see
/// [`Verification::verify_proof`](crate::serializer::Verification::verify_proof).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ForwardedProof {
    /// The salt of the commitment, 32 bytes.
    pub salt: Chunk,
    /// The body that the agent signed.
    pub body: Chunk,
    /// The DER of the agent's SignerInfo.
    pub signer_info: Chunk,
    /// The DER of the agent's certificates, its own first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub certificates: Vec<Chunk>,
}

impl ForwardedProof {
    /// A proof from its parts.
    pub fn new(salt: [u8; 32], body: Vec<u8>, signer_info: Vec<u8>, certificates: Vec<Vec<u8>>) -> Self {
        let certificates = certificates.into_iter().map(Chunk).collect();
        Self { salt: Chunk(salt.to_vec()), body: Chunk(body), signer_info: Chunk(signer_info), certificates }
    }

    /// Its length in bytes.
    pub(crate) fn length(&self) -> usize {
        let certificates: usize = self.certificates.iter().map(|certificate| certificate.0.len()).sum();
        self.salt.0.len() + self.body.0.len() + self.signer_info.0.len() + certificates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(service: &str, payload: &str) -> RequestDigest {
        RequestDigest::of(&service.parse().unwrap(), &serde_json::from_str(payload).unwrap())
    }

    #[test]
    fn s17_request_digest_covers_service_and_payload() {
        let all = [
            ("/a/b", "null"),
            ("/a/c", "null"),
            ("/a/b", "true"),
            ("/a/b", "false"),
            ("/a/b", "1"),
            ("/a/b", "-1"),
            ("/a/b", "1.0"),
            ("/a/b", r#""1""#),
            ("/a/b", "[]"),
            ("/a/b", "[[]]"),
            ("/a/b", "[[],[]]"),
            ("/a/b", "{}"),
            ("/a/b", r#"{"a":"bc"}"#),
            ("/a/b", r#"{"ab":"c"}"#),
        ];
        let digests: std::collections::HashSet<_> = all.iter().map(|(s, p)| digest(s, p)).collect();
        assert_eq!(digests.len(), all.len());
        assert_eq!(digest("/a/b", r#"{"x":1,"a":2}"#), digest("/a/b", r#"{"a":2,"x":1}"#));
        assert_eq!(digest("/a", "1"), digest("/a/index", "1"));
        let text = serde_json::to_string(&digest("/a/b", "null")).unwrap();
        assert_eq!(serde_json::from_str::<RequestDigest>(&text).unwrap(), digest("/a/b", "null"));
        assert!(serde_json::from_str::<RequestDigest>(&text.replacen('"', "\"0", 1)).is_err());
    }
}
