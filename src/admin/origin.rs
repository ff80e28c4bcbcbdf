//! The origins that browsers use for these pages. A request for any other host is rejected: it may come from a page whose host name
//! was made to resolve to this server (DNS rebinding).

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

const MAX_HOST_NAME_BYTES: usize = 253;

/// The URL that browsers use: `https://tower.example.org`, or with a port. It has no path: the pages are at the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicUrl {
    tls: bool,
    /// Name and port in the form that browsers send: lower case, without the scheme's default port.
    host: String,
}

/// The text is not a public URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a public URL is https://NAME or https://NAME:PORT without a path; http:// is accepted too")]
pub struct InvalidUrl;

impl FromStr for PublicUrl {
    type Err = InvalidUrl;

    fn from_str(text: &str) -> Result<Self, InvalidUrl> {
        let text = text.to_ascii_lowercase();
        let (scheme, rest) = text.split_once("://").ok_or(InvalidUrl)?;
        let (tls, default_port) = match scheme {
            "https" => (true, ":443"),
            "http" => (false, ":80"),
            _ => return Err(InvalidUrl),
        };
        let host = rest.strip_suffix('/').unwrap_or(rest);
        let (name, port) = match host.rsplit_once(':') {
            Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
            _ => (host, None),
        };
        let ipv6 = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
        let is_ipv6 = ipv6.is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
        let is_name = (1..=MAX_HOST_NAME_BYTES).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        let is_port = |port: &str| port.parse::<u16>().is_ok_and(|number| number > 0 && number.to_string() == port);
        if !(is_name || is_ipv6) || !port.is_none_or(is_port) {
            return Err(InvalidUrl);
        }
        Ok(Self { tls, host: host.strip_suffix(default_port).unwrap_or(host).to_owned() })
    }
}

impl fmt::Display for PublicUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.host)
    }
}

impl PublicUrl {
    /// Whether browsers connect with TLS.
    pub fn is_tls(&self) -> bool {
        self.tls
    }
}

/// All origins of these pages.
#[derive(Debug)]
pub(super) struct Origins {
    urls: Vec<PublicUrl>,
    /// Part of cookie names without TLS: cookies ignore ports, and one machine may run several towers.
    port: u16,
}

impl Origins {
    /// The origins of a listener: only the public URL if there is one, otherwise the loopback address and `localhost`. None if the
    /// address is reachable from other machines and there is no public URL.
    pub fn new(address: SocketAddr, public_url: Option<&PublicUrl>) -> Option<Self> {
        let port = address.port();
        if let Some(url) = public_url {
            return Some(Self { urls: vec![url.clone()], port });
        }
        if !address.ip().is_loopback() {
            return None;
        }
        let literal = match address.ip() {
            IpAddr::V4(ipv4) => ipv4.to_string(),
            IpAddr::V6(ipv6) => format!("[{ipv6}]"),
        };
        let url = |name: &str| {
            let host = if port == 80 { name.to_owned() } else { format!("{name}:{port}") };
            PublicUrl { tls: false, host }
        };
        Some(Self { urls: vec![url(&literal), url("localhost")], port })
    }

    /// Whether a `Host` header is one of ours.
    pub fn allows_host(&self, host: &str) -> bool {
        self.urls.iter().any(|url| url.host.eq_ignore_ascii_case(host))
    }

    /// Whether an `Origin` header is one of ours.
    pub fn allows_origin(&self, origin: &str) -> bool {
        self.urls.iter().any(|url| url.to_string() == origin)
    }

    /// The full name of a cookie.
    pub fn cookie_name(&self, name: &str) -> String {
        if self.is_tls() { format!("__Host-{name}") } else { format!("{name}-{}", self.port) }
    }

    /// A `Set-Cookie` header: for this host only, hidden from scripts, and sent only with requests from our own pages.
    pub fn set_cookie(&self, name: &str, value: &str, max_age: Duration) -> String {
        let name = self.cookie_name(name);
        let secure = if self.is_tls() { "; Secure" } else { "" };
        format!("{name}={value}; Path=/; Max-Age={}; HttpOnly; SameSite=Strict{secure}", max_age.as_secs())
    }

    fn is_tls(&self) -> bool {
        self.urls.iter().all(PublicUrl::is_tls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(address: &str, public_url: Option<&PublicUrl>) -> Option<Origins> {
        Origins::new(address.parse().unwrap(), public_url)
    }

    #[test]
    fn n20_parses_public_urls() {
        for (text, shown) in [
            ("https://tower.example.org", "https://tower.example.org"),
            ("HTTPS://Tower.Example.org:443/", "https://tower.example.org"),
            ("http://tower:8080", "http://tower:8080"),
            ("https://[::1]:8443", "https://[::1]:8443"),
            ("http://10.0.0.1", "http://10.0.0.1"),
        ] {
            assert_eq!(text.parse::<PublicUrl>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "tower",
            "ftp://tower",
            "https://",
            "https://tower/path",
            "https://tower:0",
            "https://tower:070",
            "https://tower:99999",
            "https://user@tower",
            "https://[::1",
            "https://[tower]",
            "https://a b",
            "https://tower?x",
        ] {
            assert_eq!(text.parse::<PublicUrl>(), Err(InvalidUrl), "{text}");
        }
    }

    #[test]
    fn n20_allows_only_own_hosts_and_origins() {
        let local = origins("127.0.0.1:4000", None).unwrap();
        assert!(local.allows_host("127.0.0.1:4000") && local.allows_host("LOCALHOST:4000"));
        for foreign in
            ["127.0.0.1", "127.0.0.1:4001", "evil.example:4000", "localhost", "", "127.0.0.1:4000.evil.example"]
        {
            assert!(!local.allows_host(foreign), "{foreign}");
        }
        assert!(local.allows_origin("http://localhost:4000") && !local.allows_origin("https://localhost:4000"));
        assert!(!local.allows_origin("null") && !local.allows_origin("http://evil.example"));
        assert!(origins("[::1]:80", None).unwrap().allows_host("[::1]"));

        let url: PublicUrl = "https://tower.example.org".parse().unwrap();
        let public = origins("0.0.0.0:4000", Some(&url)).unwrap();
        assert!(public.allows_host("tower.example.org") && !public.allows_host("127.0.0.1:4000"));
        assert!(public.set_cookie("nanite", "x", Duration::from_secs(5)).ends_with("SameSite=Strict; Secure"));
        assert!(public.cookie_name("nanite").starts_with("__Host-"));
    }

    #[test]
    fn n20_reachable_address_requires_public_url() {
        for address in ["0.0.0.0:4000", "10.0.0.1:4000", "[::]:4000"] {
            assert!(origins(address, None).is_none(), "{address}");
        }
    }
}
