//! Small checked texts: service names, tags, tokens and message ids.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Reads a string and parses it; the error names what is wrong, not the value.
pub(super) fn parsed<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
    T::Err: fmt::Display,
{
    let text = Cow::<'de, str>::deserialize(deserializer)?;
    text.parse().map_err(de::Error::custom)
}

/// The longest service name, in bytes.
pub const MAX_SERVICE: usize = 255;
/// The longest tag, in bytes.
pub const MAX_TAG: usize = 128;

/// The name of a service: `/PREFIX/METHOD`, such as `/simple/echo`.
///
/// It is 2 to 255 bytes: segments of ASCII letters, digits, `-`, `_` and `.`, each behind a `/`; no segment is `.` or `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service(Arc<str>);

/// Why a text is no service name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a service is /PREFIX/METHOD: segments of letters, digits, '-', '_' and '.', at most 255 bytes")]
pub struct InvalidService;

impl Service {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The service that is meant: a name of one segment, `/simple`, means `/simple/index`.
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
        if text.len() > MAX_SERVICE || !segments.split('/').all(good) {
            return Err(InvalidService);
        }
        Ok(Self(text.into()))
    }
}

/// A tag that an agent carries and a request can ask for: 1 to 128 bytes, no control characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(Arc<str>);

/// Why a text is no tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
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
        if text.is_empty() || text.len() > MAX_TAG || text.chars().any(char::is_control) {
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
                parsed(deserializer)
            }
        }
    )*};
}

text_type!(Service, Tag);

/// Sixteen random bytes, written as 32 hexadecimal digits.
macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// A new random one, from the system's cryptographic generator.
            ///
            /// # Errors
            /// When the generator fails.
            pub fn random() -> Result<Self, RandomnessError> {
                let mut bytes = [0; 16];
                openssl::rand::rand_bytes(&mut bytes).map_err(|_| RandomnessError)?;
                Ok(Self(bytes))
            }

            /// The one with these bytes.
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
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
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
                let mut bytes = [0; 16];
                if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(InvalidId($what));
                }
                for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
                    let digits = std::str::from_utf8(digits).map_err(|_| InvalidId($what))?;
                    *byte = u8::from_str_radix(digits, 16).map_err(|_| InvalidId($what))?;
                }
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                parsed(deserializer)
            }
        }
    };
}

/// Why a text is no token or message id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a {0} is 32 hexadecimal digits")]
pub struct InvalidId(&'static str);

/// The system's random generator failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system's random generator failed")]
pub struct RandomnessError;

random_id! {
    /// What ties the answers to a request together: chosen by whoever asks.
    Token, "token"
}

random_id! {
    /// The id of one message, chosen by its sender; part of the signed header.
    MessageId, "message id"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_paths_of_plain_segments() {
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
    fn tokens_read_back() {
        let token = Token::random().unwrap();
        assert_eq!(token.to_string().parse::<Token>().unwrap(), token);
        assert!("+1".repeat(16).parse::<Token>().is_err());
    }
}
