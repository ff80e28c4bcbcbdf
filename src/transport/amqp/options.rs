//! Where the broker is and who connects to it: the URL, and what goes beside it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use zeroize::Zeroizing;

use super::tls::Tls;
use crate::transport::TransportError;

/// The user whom RabbitMQ knows from the beginning, for connections from the same machine.
const GUEST: &str = "guest";

/// How to connect to RabbitMQ.
///
/// Made from a URL, `amqp://USER:PASSWORD@HOST:PORT/VHOST`, of which only the host is needed: user and password are `guest`, as
/// RabbitMQ has them for connections from the same machine, the port is 5672 (5671 for `amqps`), the virtual host is `/`. User,
/// password and virtual host are percent-encoded. The password is in no output of this type. An `amqps` URL goes with
/// [`tls`](AmqpOptions::tls), and no other does.
#[derive(Clone)]
pub struct AmqpOptions {
    pub(super) host: String,
    pub(super) port: u16,
    /// None: whom the broker takes this for is the certificate's matter, or `guest`.
    pub(super) user: Option<String>,
    pub(super) password: Zeroizing<String>,
    pub(super) vhost: String,
    pub(super) name: String,
    pub(super) heartbeat: Duration,
    pub(super) connect_timeout: Duration,
    is_secure: bool,
    tls: Option<Tls>,
}

impl AmqpOptions {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`TransportError::Address`], which says what is wrong with it and does not repeat it.
    pub fn new(url: &str) -> Result<Self, TransportError> {
        let wrong = |why: &str| Err(TransportError::Address(why.to_owned()));
        let Some((scheme, rest)) = url.split_once("://") else {
            return wrong("it must look like amqp://user:password@host:port/vhost");
        };
        let is_secure = match scheme {
            "amqp" => false,
            "amqps" => true,
            _ => return wrong("it must begin with amqp:// or amqps://"),
        };
        if rest.contains(['?', '#']) {
            return wrong("it has a query or a fragment; write ? and # in a password as %3F and %23");
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user_info, address) = authority.rsplit_once('@').map_or((None, authority), |(u, a)| (Some(u), a));
        let (user, password) = match user_info {
            None => (None, "guest".to_owned()),
            Some(info) => {
                let (user, password) = info.split_once(':').unwrap_or((info, ""));
                (Some(decode(user, "the user name")?), decode(password, "the password")?)
            }
        };
        let (host, port) = host_and_port(address, if is_secure { 5671 } else { 5672 })?;
        let vhost = decode(path, "the virtual host")?;
        if user.as_ref().is_some_and(|user| user.len() > 255) || vhost.len() > 255 {
            return wrong("the user name or the virtual host is longer than 255 bytes");
        }
        Ok(Self {
            host,
            port,
            user,
            password: Zeroizing::new(password),
            vhost: if vhost.is_empty() { "/".to_owned() } else { vhost },
            name: "nanite".to_owned(),
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            is_secure,
            tls: None,
        })
    }

    /// Whether the URL says `amqps`.
    pub fn is_secure(&self) -> bool {
        self.is_secure
    }

    /// Whether the host is this machine, by an address or a name that is always it.
    pub fn is_loopback(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        address.map_or_else(|_| self.host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
    }

    /// Speaks TLS, in this way.
    #[must_use]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// How to speak TLS; none: plain TCP. That is what both the URL and the options say, or an error: nobody is to believe that
    /// a connection is protected when it is not.
    pub(super) fn protection(&self) -> Result<Option<&Tls>, TransportError> {
        match (&self.tls, self.is_secure) {
            (Some(tls), true) => Ok(Some(tls)),
            (None, false) => Ok(None),
            (None, true) => Err(TransportError::Address("amqps needs the certificate of the broker's CA".to_owned())),
            (Some(_), false) => Err(TransportError::Address("a CA is given, and the URL is not amqps://".to_owned())),
        }
    }

    /// The user and the password; none when the broker takes the user from the certificate.
    pub(super) fn login(&self) -> Option<(&str, &Zeroizing<String>)> {
        match &self.user {
            None if self.tls.as_ref().is_some_and(Tls::has_client) => None,
            user => Some((user.as_deref().unwrap_or(GUEST), &self.password)),
        }
    }

    /// The password, in place of the URL's.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.password = Zeroizing::new(password.into());
        self
    }

    /// The name that the broker's tools show for the connection; cut to 255 bytes.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        let end = (0..=name.len().min(255)).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
        self.name = name.get(..end).unwrap_or_default().to_owned();
        self
    }

    /// How often both sides show that they live, in whole seconds, at least one; 10 s by default. A connection on which nothing
    /// was heard for twice as long is given up.
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
        let scheme = if self.is_secure { "amqps" } else { "amqp" };
        let user = self.login().map(|(user, _)| format!("{}@", segment(user))).unwrap_or_default();
        write!(f, "{scheme}://{user}{host}:{}/{}", self.port, segment(&self.vhost))
    }
}

impl fmt::Debug for AmqpOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AmqpOptions({self}, name {:?}, heartbeat {:?})", self.name, self.heartbeat)
    }
}

fn host_and_port(address: &str, usual: u16) -> Result<(String, u16), TransportError> {
    let wrong = |why: &str| TransportError::Address(why.to_owned());
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(|| wrong("the host begins with [ and has no ]"))?;
            (host, Some(port).filter(|port| !port.is_empty()).map(|port| port.strip_prefix(':').unwrap_or_default()))
        }
        None => match address.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        },
    };
    if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(wrong("it names no host"));
    }
    let Some(port) = port else { return Ok((host.to_owned(), usual)) };
    let digits = Some(port).filter(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
    let port = digits.and_then(|port| port.parse().ok()).filter(|port| *port != 0);
    Ok((host.to_owned(), port.ok_or_else(|| wrong("the port is not a number from 1 to 65535"))?))
}

fn decode(text: &str, what: &str) -> Result<String, TransportError> {
    let wrong = || TransportError::Address(format!("{what} is not percent-encoded UTF-8"));
    let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(wrong);
            let value = digit()? * 16 + digit()?;
            decoded.push(u8::try_from(value).map_err(|_| wrong())?);
        } else {
            decoded.push(byte);
        }
    }
    std::str::from_utf8(&decoded).map(str::to_owned).map_err(|_| wrong())
}

/// A name as one segment of a URL's path: all but RFC 3986's unreserved characters is escaped.
pub(crate) fn segment(text: &str) -> String {
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
    fn a_url_is_read_part_by_part() {
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
    fn what_is_not_understood_is_refused_without_repeating_it() {
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
    fn the_password_is_in_no_output() {
        let options = AmqpOptions::new("amqp://user:secret@h/v%2F").unwrap().password("hidden").name("me");
        let shown = format!("{options} {options:?} {options:#?}");
        assert!(!shown.contains("secret") && !shown.contains("hidden"), "{shown}");
        assert!(shown.starts_with("amqp://user@h:5672/v%2F "), "{shown}");
        assert_eq!(options.password.as_str(), "hidden");
    }

    #[test]
    fn s14_an_address_and_its_protection_agree_or_nothing_is_connected() {
        let secure = AmqpOptions::new("amqps://h/v").unwrap();
        assert_eq!((secure.port, secure.to_string().as_str()), (5671, "amqps://guest@h:5671/v"));
        assert!(matches!(secure.protection(), Err(TransportError::Address(_))));
        assert!(secure.tls(Tls::new("ca.pem")).protection().unwrap().is_some());
        let plain = AmqpOptions::new("amqp://h").unwrap();
        assert!(plain.protection().unwrap().is_none());
        assert!(matches!(plain.tls(Tls::new("ca.pem")).protection(), Err(TransportError::Address(_))));
    }

    #[test]
    fn s14_a_certificate_takes_the_place_of_a_user_that_is_not_named() {
        let with = |url: &str| AmqpOptions::new(url).unwrap().tls(Tls::new("ca").client("cert", "key"));
        assert!(with("amqps://h").login().is_none());
        assert_eq!(with("amqps://h").to_string(), "amqps://h:5671/%2F");
        assert_eq!(with("amqps://u@h").login().unwrap().0, "u");
    }

    #[test]
    fn a_long_name_is_cut_between_characters() {
        let options = AmqpOptions::new("amqp://h").unwrap().name(&"é".repeat(200));
        assert_eq!(options.name, "é".repeat(127));
    }
}
