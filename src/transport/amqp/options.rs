//! The options of a connection: the broker's URL, and what is not in it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use zeroize::Zeroizing;

use super::tls::Tls;
use crate::transport::TransportError;

/// RabbitMQ's predefined user, for connections from the same machine.
const GUEST: &str = "guest";
/// The longest name of a connection, in bytes.
const MAX_CONNECTION_NAME_BYTES: usize = 255;

/// How to connect to RabbitMQ.
///
/// The URL is `amqp://USER:PASSWORD@HOST:PORT/VHOST`. Only the host is required. Defaults: user and password `guest`, which
/// RabbitMQ accepts from the same machine; port 5672 (5671 for `amqps`); virtual host `/`. User, password and virtual host are
/// percent-encoded. An `amqps` URL requires [`tls`](AmqpOptions::tls), and an `amqp` URL does not allow it. The password is never
/// shown by `Debug` or `Display`.
///
/// ```
/// use nanite::transport::AmqpOptions;
/// use std::time::Duration;
///
/// # fn main() -> Result<(), nanite::transport::TransportError> {
/// let options = AmqpOptions::new("amqp://fred@broker.example.org/production")?
///     .password("secret")
///     .heartbeat(Duration::from_secs(30));
/// assert_eq!(options.to_string(), "amqp://fred@broker.example.org:5672/production");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct AmqpOptions {
    pub(super) host: String,
    pub(super) port: u16,
    /// `None`: the broker takes the user from the client's certificate, or it is `guest`.
    pub(super) user: Option<String>,
    pub(super) password: Zeroizing<String>,
    pub(super) vhost: String,
    pub(super) connection_name: String,
    pub(super) heartbeat: Duration,
    pub(super) connect_timeout: Duration,
    uses_tls: bool,
    tls: Option<Tls>,
}

impl AmqpOptions {
    /// Options for the broker at this URL.
    ///
    /// # Errors
    /// [`TransportError::Address`] if the URL is invalid. The error does not repeat it.
    pub fn new(url: &str) -> Result<Self, TransportError> {
        let invalid = |reason: &str| Err(TransportError::Address(reason.to_owned()));
        let Some((scheme, rest)) = url.split_once("://") else {
            return invalid("it must look like amqp://user:password@host:port/vhost");
        };
        let uses_tls = match scheme {
            "amqp" => false,
            "amqps" => true,
            _ => return invalid("it must begin with amqp:// or amqps://"),
        };
        if rest.contains(['?', '#']) {
            return invalid("it has a query or a fragment; write ? and # in a password as %3F and %23");
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user_info, address) = authority.rsplit_once('@').map_or((None, authority), |(u, a)| (Some(u), a));
        let (user, password) = match user_info {
            None => (None, GUEST.to_owned()),
            Some(info) => {
                let (user, password) = info.split_once(':').unwrap_or((info, ""));
                (Some(decode(user, "the user name")?), decode(password, "the password")?)
            }
        };
        let (host, port) = host_and_port(address, if uses_tls { 5671 } else { 5672 })?;
        let vhost = decode(path, "the virtual host")?;
        if user.as_ref().is_some_and(|user| user.len() > 255) || vhost.len() > 255 {
            return invalid("the user name or the virtual host is longer than 255 bytes");
        }
        Ok(Self {
            host,
            port,
            user,
            password: Zeroizing::new(password),
            vhost: if vhost.is_empty() { "/".to_owned() } else { vhost },
            connection_name: "nanite".to_owned(),
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            uses_tls,
            tls: None,
        })
    }

    /// Whether the URL is `amqps`.
    pub fn uses_tls(&self) -> bool {
        self.uses_tls
    }

    /// Whether the host is a loopback address or `localhost`.
    ///
    /// ```
    /// # fn main() -> Result<(), nanite::transport::TransportError> {
    /// use nanite::transport::AmqpOptions;
    ///
    /// assert!(AmqpOptions::new("amqp://[::1]:5672")?.is_loopback());
    /// assert!(!AmqpOptions::new("amqp://broker.example.org")?.is_loopback());
    /// # Ok(())
    /// # }
    /// ```
    pub fn is_loopback(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        address.map_or_else(|_| self.host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
    }

    /// The certificates for TLS; required for an `amqps` URL.
    #[must_use]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// The options for TLS; `None` for plain TCP. It is an error if the URL and the options disagree, so that a connection is never
    /// less protected than either of them says.
    pub(super) fn tls_options(&self) -> Result<Option<&Tls>, TransportError> {
        match (&self.tls, self.uses_tls) {
            (Some(tls), true) => Ok(Some(tls)),
            (None, false) => Ok(None),
            (None, true) => {
                Err(TransportError::Address("amqps requires the certificate of the broker's CA".to_owned()))
            }
            (Some(_), false) => Err(TransportError::Address("a CA is given, but the URL is not amqps://".to_owned())),
        }
    }

    /// The user and the password; `None` if the broker takes the user from the client's certificate.
    pub(super) fn login(&self) -> Option<(&str, &Zeroizing<String>)> {
        match &self.user {
            None if self.tls.as_ref().is_some_and(Tls::has_client_certificate) => None,
            user => Some((user.as_deref().unwrap_or(GUEST), &self.password)),
        }
    }

    /// The password; replaces that of the URL.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.password = Zeroizing::new(password.into());
        self
    }

    /// The name of the connection in the broker's tools; truncated to 255 bytes; `nanite` by default.
    #[must_use]
    pub fn connection_name(mut self, name: impl Into<String>) -> Self {
        let name = name.into();
        let end = name.len().min(MAX_CONNECTION_NAME_BYTES);
        let end = (0..=end).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
        self.connection_name = name.get(..end).unwrap_or_default().to_owned();
        self
    }

    /// The interval of AMQP heartbeats, in whole seconds, at least one; 10 s by default. A connection is lost if nothing was received
    /// for twice as long.
    #[must_use]
    pub fn heartbeat(mut self, heartbeat: Duration) -> Self {
        self.heartbeat = heartbeat.max(Duration::from_secs(1));
        self
    }

    /// How long one attempt to connect may take; 10 s by default.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }
}

impl FromStr for AmqpOptions {
    type Err = TransportError;

    fn from_str(url: &str) -> Result<Self, TransportError> {
        Self::new(url)
    }
}

impl fmt::Display for AmqpOptions {
    /// The URL without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let scheme = if self.uses_tls { "amqps" } else { "amqp" };
        let user = self.login().map(|(user, _)| format!("{}@", percent_encode(user))).unwrap_or_default();
        write!(f, "{scheme}://{user}{host}:{}/{}", self.port, percent_encode(&self.vhost))
    }
}

impl fmt::Debug for AmqpOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AmqpOptions({self}, name {:?}, heartbeat {:?})", self.connection_name, self.heartbeat)
    }
}

fn host_and_port(address: &str, default_port: u16) -> Result<(String, u16), TransportError> {
    let invalid = |reason: &str| TransportError::Address(reason.to_owned());
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(|| invalid("the host begins with [ and has no ]"))?;
            (host, Some(port).filter(|port| !port.is_empty()).map(|port| port.strip_prefix(':').unwrap_or_default()))
        }
        None => match address.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        },
    };
    if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(invalid("it names no host"));
    }
    let Some(port) = port else { return Ok((host.to_owned(), default_port)) };
    let digits = Some(port).filter(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
    let port = digits.and_then(|port| port.parse().ok()).filter(|port| *port != 0);
    Ok((host.to_owned(), port.ok_or_else(|| invalid("the port is not a number from 1 to 65535"))?))
}

fn decode(text: &str, what: &str) -> Result<String, TransportError> {
    let invalid = || TransportError::Address(format!("{what} is not percent-encoded UTF-8"));
    let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(invalid);
            let value = digit()? * 16 + digit()?;
            decoded.push(u8::try_from(value).map_err(|_| invalid())?);
        } else {
            decoded.push(byte);
        }
    }
    std::str::from_utf8(&decoded).map(str::to_owned).map_err(|_| invalid())
}

/// Percent-encodes all but the unreserved characters of RFC 3986, for one segment of a URL's path.
pub(crate) fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_the_parts_of_a_url() {
        let all = AmqpOptions::new("amqp://us%65r:p%40ss@host.example:1234/v%2Fh").unwrap();
        assert_eq!((all.user.as_deref(), all.password.as_str()), (Some("user"), "p@ss"));
        assert_eq!((all.host.as_str(), all.port, all.vhost.as_str()), ("host.example", 1234, "v/h"));
        let least = AmqpOptions::new("amqp://host").unwrap();
        assert_eq!((least.login().unwrap().0, least.password.as_str()), ("guest", "guest"));
        assert_eq!((least.host.as_str(), least.port, least.vhost.as_str()), ("host", 5672, "/"));
        assert_eq!(AmqpOptions::new("amqp://host/").unwrap().vhost, "/");
        assert_eq!(AmqpOptions::new("amqp://u:a:b@c@h").unwrap().password.as_str(), "a:b@c");
        let six = AmqpOptions::new("amqp://[::1]:1/").unwrap();
        assert_eq!((six.host.as_str(), six.port), ("::1", 1));
        assert_eq!(AmqpOptions::new("amqp://[::1]").unwrap().port, 5672);
    }

    #[test]
    fn rejects_invalid_urls_without_repeating_them() {
        for url in [
            "",
            "host",
            "http://u:secret@h",
            "amqpss://u:secret@h",
            "amqp://u:secret@",
            "amqp://u:secret@:1",
            "amqp://u:secret@h:",
            "amqp://u:secret@h:0",
            "amqp://u:secret@h:65536",
            "amqp://u:secret@h:+1",
            "amqp://u:secret%@h",
            "amqp://u:secret%zz@h",
            "amqp://u:secret%ff@h",
            "amqp://u:secret@h/v?heartbeat=1",
            "amqp://u:secret?@h",
            "amqp://u:secret@[::1",
            "amqp://u:secret@[::1]x",
            "amqp://u:secret@h:secret",
            "amqp://u:secret@h h",
        ] {
            let error = AmqpOptions::new(url).expect_err(url);
            assert!(matches!(error, TransportError::Address(_)), "{url}: {error}");
            assert!(!format!("{error} {error:?}").contains("secret"), "{url}: {error}");
        }
    }

    #[test]
    fn password_is_never_shown() {
        let options = AmqpOptions::new("amqp://user:secret@h/v%2F").unwrap().password("hidden").connection_name("me");
        let shown = format!("{options} {options:?} {options:#?}");
        assert!(!shown.contains("secret") && !shown.contains("hidden"), "{shown}");
        assert!(shown.starts_with("amqp://user@h:5672/v%2F "), "{shown}");
        assert_eq!(options.password.as_str(), "hidden");
    }

    #[test]
    fn s14_url_scheme_and_tls_options_must_agree() {
        let secure = AmqpOptions::new("amqps://h/v").unwrap();
        assert_eq!((secure.port, secure.to_string().as_str()), (5671, "amqps://guest@h:5671/v"));
        assert!(matches!(secure.tls_options(), Err(TransportError::Address(_))));
        assert!(secure.tls(Tls::new("ca.pem")).tls_options().unwrap().is_some());
        let plain = AmqpOptions::new("amqp://h").unwrap();
        assert!(plain.tls_options().unwrap().is_none());
        assert!(matches!(plain.tls(Tls::new("ca.pem")).tls_options(), Err(TransportError::Address(_))));
    }

    #[test]
    fn s14_client_certificate_replaces_a_missing_user() {
        let with = |url: &str| AmqpOptions::new(url).unwrap().tls(Tls::new("ca").client_certificate("cert", "key"));
        assert!(with("amqps://h").login().is_none());
        assert_eq!(with("amqps://h").to_string(), "amqps://h:5671/%2F");
        assert_eq!(with("amqps://u@h").login().unwrap().0, "u");
    }

    #[test]
    fn truncates_long_names_between_characters() {
        let options = AmqpOptions::new("amqp://h").unwrap().connection_name("é".repeat(200));
        assert_eq!(options.connection_name, "é".repeat(127));
    }
}
