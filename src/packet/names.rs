//! Validated names: services, tags, tokens and message ids.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Deserializes a string and parses it. The error says what is wrong and does not repeat the value.
pub(super) fn deserialize_parsed<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
    T::Err: fmt::Display,
{
    let text = Cow::<'de, str>::deserialize(deserializer)?;
    text.parse().map_err(de::Error::custom)
}

/// The longest service name, in bytes.
const MAX_SERVICE_BYTES: usize = 255;
/// The longest tag, in bytes.
const MAX_TAG_BYTES: usize = 128;

/// The name of a service: `/PREFIX/METHOD`, such as `/simple/echo`.
///
/// It is 2 to 255 bytes: segments of ASCII letters, digits, `-`, `_` and `.`, each after a `/`; no segment is `.` or `..`.
///
/// ```
/// use nanite::packet::Service;
///
/// assert!("/simple/echo".parse::<Service>().is_ok());
/// assert!("/simple/../echo".parse::<Service>().is_err());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service(Arc<str>);

/// A text is not a service name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("a service is /PREFIX/METHOD: segments of letters, digits, '-', '_' and '.', at most 255 bytes")]
pub struct InvalidService;

impl Service {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The full name: a name of one segment, `/simple`, is short for `/simple/index`.
    ///
    /// ```
    /// use nanite::packet::Service;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// assert_eq!("/simple".parse::<Service>()?.resolved().as_str(), "/simple/index");
    /// # Ok(())
    /// # }
    /// ```
    pub fn resolved(&self) -> Service {
        if self.0[1..].contains('/') { self.clone() } else { Service(format!("{}/index", self.0).into()) }
    }
}

impl FromStr for Service {
    type Err = InvalidService;

    fn from_str(text: &str) -> Result<Self, InvalidService> {
        let segments = text.strip_prefix('/').ok_or(InvalidService)?;
        let good = |segment: &str| {
            !matches!(segment, "" | "." | "..")
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        };
        if text.len() > MAX_SERVICE_BYTES || !segments.split('/').all(good) {
            return Err(InvalidService);
        }
        Ok(Self(text.into()))
    }
}

/// A tag of an agent, which requests can require: 1 to 128 bytes without control characters.
///
/// ```
/// use nanite::packet::Tag;
///
/// assert!("eu-west".parse::<Tag>().is_ok());
/// assert!("eu\nwest".parse::<Tag>().is_err());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(Arc<str>);

/// A text is not a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("a tag is 1 to 128 bytes without control characters")]
pub struct InvalidTag;

impl Tag {
    /// The tag as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Tag {
    type Err = InvalidTag;

    fn from_str(text: &str) -> Result<Self, InvalidTag> {
        if text.is_empty() || text.len() > MAX_TAG_BYTES || text.chars().any(char::is_control) {
            return Err(InvalidTag);
        }
        Ok(Self(text.into()))
    }
}

macro_rules! text_type {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserialize_parsed(deserializer)
            }
        }
    )*};
}

text_type!(Service, Tag);

/// Defines an id of sixteen random bytes, written as 32 hexadecimal digits.
macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// A new random id, from OpenSSL's cryptographic generator.
            ///
            /// # Errors
            /// [`RandomnessError`] when the generator fails.
            pub fn random() -> Result<Self, RandomnessError> {
                let mut bytes = [0; 16];
                openssl::rand::rand_bytes(&mut bytes).map_err(|_| RandomnessError)?;
                Ok(Self(bytes))
            }

            /// The id with these bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// Its bytes.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let bytes = HEXLOWER_PERMISSIVE.decode(text.as_bytes()).map_err(|_| InvalidId($what))?;
                bytes.try_into().map(Self).map_err(|_| InvalidId($what))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserialize_parsed(deserializer)
            }
        }
    };
}

/// A text is not a token or message id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a {0} is 32 hexadecimal digits")]
pub struct InvalidId(&'static str);

/// The system's random generator failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("the system's random generator failed")]
pub struct RandomnessError;

random_id! {
    /// Links the answers to their request. The caller chooses it.
    ///
    /// ```
    /// use nanite::packet::Token;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let token = Token::random()?;
    /// assert_eq!(token.to_string().parse::<Token>()?, token);
    /// # Ok(())
    /// # }
    /// ```
    Token, "token"
}

random_id! {
    /// The id of one message. The sender chooses it, and it is part of the signed header.
    MessageId, "message id"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_only_services_of_plain_segments() {
        for good in ["/simple/echo", "/simple", "/a.b/c-d_e/F9"] {
            assert_eq!(good.parse::<Service>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "/",
            "simple/echo",
            "/simple/",
            "//echo",
            "/../echo",
            "/a b",
            "/ä",
            "/a\n",
            &format!("/{}", "x".repeat(255)),
        ] {
            assert!(bad.parse::<Service>().is_err(), "{bad:?}");
        }
        assert_eq!("/simple".parse::<Service>().unwrap().resolved().as_str(), "/simple/index");
    }

    #[test]
    fn tokens_round_trip_as_text() {
        let token = Token::random().unwrap();
        assert_eq!(token.to_string().parse::<Token>().unwrap(), token);
        assert_eq!(token.to_string().to_uppercase().parse::<Token>().unwrap(), token);
        for bad in ["+1".repeat(16), "0".repeat(31), "0".repeat(33), "0".repeat(30)] {
            assert!(bad.parse::<Token>().is_err(), "{bad}");
        }
    }
}
