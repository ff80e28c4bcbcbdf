//! Identities: the role and name of an agent or mapper.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest NAME of an agent or mapper, in bytes.
const MAX_NAME_BYTES: usize = 64;
/// The longest trust domain, in bytes.
const MAX_TRUST_DOMAIN_BYTES: usize = 255;

/// The role of a node: agents handle requests, mappers dispatch them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Role {
    /// Offers services and handles requests.
    Agent,
    /// Dispatches requests to agents.
    Mapper,
}

impl Role {
    /// The role as a word: `agent` or `mapper`. It is also the path segment in a certificate's URI.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Agent => "agent",
            Role::Mapper => "mapper",
        }
    }

    /// The prefix of the name on the wire.
    const fn prefix(self) -> &'static str {
        match self {
            Role::Agent => "nanite-",
            Role::Mapper => "mapper-",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, InvalidIdentity> {
        match text {
            "agent" => Ok(Role::Agent),
            "mapper" => Ok(Role::Mapper),
            _ => Err(InvalidIdentity::Role),
        }
    }
}

/// The identity of an agent or mapper: a role and a name.
///
/// On the wire it is `nanite-NAME` or `mapper-NAME`; in a certificate it is the URI `spiffe://DOMAIN/agent/NAME` or
/// `spiffe://DOMAIN/mapper/NAME`. A NAME is 1 to 64 ASCII letters, digits, `-` and `_`, and begins with a letter or digit. Therefore the
/// queue of one identity can never be mistaken for another's.
///
/// ```
/// use nanite::packet::{Identity, Role};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let fred: Identity = "nanite-fred".parse()?;
/// assert_eq!((fred.role(), fred.name()), (Role::Agent, "fred"));
/// assert_eq!(fred, Identity::agent("fred")?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    role: Role,
    /// The wire form: the role's prefix and the name.
    wire: Arc<str>,
}

/// Why a text is not an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidIdentity {
    /// The name is empty, too long, or has a character that is not allowed.
    #[error("a name is 1 to 64 letters, digits, '-' and '_', beginning with a letter or digit")]
    Name,
    /// The text begins with neither `nanite-` nor `mapper-`.
    #[error("an identity is nanite-NAME or mapper-NAME")]
    Prefix,
    /// The role is neither `agent` nor `mapper`.
    #[error("a role is 'agent' or 'mapper'")]
    Role,
    /// The URI is not `spiffe://DOMAIN/agent/NAME` or `spiffe://DOMAIN/mapper/NAME`.
    #[error("an identity URI is spiffe://DOMAIN/agent/NAME or spiffe://DOMAIN/mapper/NAME")]
    Uri,
}

impl Identity {
    /// The identity with this role and name.
    ///
    /// # Errors
    /// [`InvalidIdentity::Name`] when the name is not allowed.
    ///
    /// ```
    /// use nanite::packet::{Identity, InvalidIdentity, Role};
    ///
    /// # fn main() -> Result<(), InvalidIdentity> {
    /// assert_eq!(Identity::new(Role::Mapper, "desk")?.as_str(), "mapper-desk");
    /// assert_eq!(Identity::new(Role::Mapper, "my desk"), Err(InvalidIdentity::Name));
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(role: Role, name: &str) -> Result<Self, InvalidIdentity> {
        let good_start = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        let good_rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !good_start || !good_rest || name.len() > MAX_NAME_BYTES {
            return Err(InvalidIdentity::Name);
        }
        Ok(Self { role, wire: format!("{}{name}", role.prefix()).into() })
    }

    /// The agent with this name.
    ///
    /// # Errors
    /// [`InvalidIdentity::Name`] when the name is not allowed.
    pub fn agent(name: &str) -> Result<Self, InvalidIdentity> {
        Self::new(Role::Agent, name)
    }

    /// The mapper with this name.
    ///
    /// # Errors
    /// [`InvalidIdentity::Name`] when the name is not allowed.
    pub fn mapper(name: &str) -> Result<Self, InvalidIdentity> {
        Self::new(Role::Mapper, name)
    }

    /// Parses `spiffe://DOMAIN/ROLE/NAME` into the trust domain and the identity.
    ///
    /// # Errors
    /// [`InvalidIdentity`] when the URI has another form.
    ///
    /// ```
    /// use nanite::packet::Identity;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (domain, identity) = Identity::from_uri("spiffe://example.org/agent/fred")?;
    /// assert_eq!((domain, identity.as_str()), ("example.org", "nanite-fred"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_uri(uri: &str) -> Result<(&str, Self), InvalidIdentity> {
        let rest = uri.strip_prefix("spiffe://").ok_or(InvalidIdentity::Uri)?;
        let mut parts = rest.split('/');
        let (Some(domain), Some(role), Some(name), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidIdentity::Uri);
        };
        if !is_trust_domain(domain) {
            return Err(InvalidIdentity::Uri);
        }
        Ok((domain, Self::new(role.parse()?, name)?))
    }

    /// The URI of this identity in a certificate of the trust domain `domain`.
    ///
    /// ```
    /// use nanite::packet::Identity;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// assert_eq!(Identity::mapper("desk")?.uri("example.org"), "spiffe://example.org/mapper/desk");
    /// # Ok(())
    /// # }
    /// ```
    pub fn uri(&self, domain: &str) -> String {
        format!("spiffe://{domain}/{}/{}", self.role, self.name())
    }

    /// The role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The name without its prefix.
    pub fn name(&self) -> &str {
        &self.wire[self.role.prefix().len()..]
    }

    /// The wire form, `nanite-NAME` or `mapper-NAME`.
    pub fn as_str(&self) -> &str {
        &self.wire
    }
}

/// Whether a text is a valid trust domain: 1 to 255 of `a-z`, `0-9`, `.`, `-`, `_` (SPIFFE ID, section 2.1).
///
/// ```
/// use nanite::packet::is_trust_domain;
///
/// assert!(is_trust_domain("example.org"));
/// assert!(!is_trust_domain("Example.org"));
/// ```
pub fn is_trust_domain(text: &str) -> bool {
    (1..=MAX_TRUST_DOMAIN_BYTES).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'))
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, InvalidIdentity> {
        for role in [Role::Agent, Role::Mapper] {
            if let Some(name) = text.strip_prefix(role.prefix()) {
                return Self::new(role, name);
            }
        }
        Err(InvalidIdentity::Prefix)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.wire)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.wire)
    }
}

impl Serialize for Identity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.wire)
    }
}

impl<'de> Deserialize<'de> for Identity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        super::names::deserialize_parsed(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_and_uri_forms_round_trip() {
        let fred = Identity::agent("fred").unwrap();
        assert_eq!(fred.to_string(), "nanite-fred");
        assert_eq!("nanite-fred".parse::<Identity>().unwrap(), fred);
        assert_eq!(Identity::from_uri(&fred.uri("example.org")).unwrap(), ("example.org", fred));
    }

    #[test]
    fn rejects_invalid_names_and_uris() {
        for name in ["", "a.b", "a/b", "a b", "ä", "-a", "_a", "a\n", &"x".repeat(65)] {
            assert_eq!(Identity::agent(name), Err(InvalidIdentity::Name), "{name:?}");
        }
        for uri in [
            "spiffe://example.org/agent/a/b",
            "spiffe://example.org/agent/",
            "spiffe:///agent/a",
            "spiffe://Example.org/agent/a",
            "https://example.org/agent/a",
            "spiffe://example.org/root/a",
        ] {
            assert!(Identity::from_uri(uri).is_err(), "{uri}");
        }
    }
}
