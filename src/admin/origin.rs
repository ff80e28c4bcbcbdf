//! Under which names browsers come here. A request for any other name comes from a page that has its name lead here (DNS
//! rebinding), and is refused.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use super::AdminError;

/// The URL that browsers use: `https://tower.example.org`, or with a port. There is no path: the pages stand at the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicUrl {
    tls: bool,
    /// Name and port, as browsers send them: small letters, without the port that the scheme has anyway.
    host: String,
}

/// A text is no URL of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the URL of the pages is https://NAME or https://NAME:PORT, without a path; or the same with http")]
pub struct InvalidUrl;

impl FromStr for PublicUrl {
    type Err = InvalidUrl;

    fn from_str(text: &str) -> Result<Self, InvalidUrl> {
        let text = text.to_ascii_lowercase();
        let (scheme, rest) = text.split_once("://").ok_or(InvalidUrl)?;
        let (tls, usual) = match scheme {
            "https" => (true, ":443"),
            "http" => (false, ":80"),
            _ => return Err(InvalidUrl),
        };
        let host = rest.strip_suffix('/').unwrap_or(rest);
        let (name, port) = match host.rsplit_once(':') {
            Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
            _ => (host, None),
        };
        let v6 = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
        let named = (1..=253).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        let addressed = v6.is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
        let numbered = |port: &str| port.parse::<u16>().is_ok_and(|number| number > 0 && number.to_string() == port);
        if !(named || addressed) || !port.is_none_or(numbered) {
            return Err(InvalidUrl);
        }
        Ok(Self { tls, host: host.strip_suffix(usual).unwrap_or(host).to_owned() })
    }
}

impl std::fmt::Display for PublicUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.host)
    }
}

impl PublicUrl {
    /// Whether browsers come by TLS.
    pub fn is_tls(&self) -> bool {
        self.tls
    }
}

/// All names under which browsers come here.
#[derive(Debug)]
pub(super) struct Origins {
    urls: Vec<PublicUrl>,
    /// Tells the cookies of several towers on one machine apart: cookies do not know ports.
    port: u16,
}

impl Origins {
    /// Those of an address that is listened at: the public URL alone, or else the address as a loopback one.
    pub fn of(address: SocketAddr, public: Option<&PublicUrl>) -> Result<Self, AdminError> {
        let port = address.port();
        if let Some(url) = public {
            return Ok(Self { urls: vec![url.clone()], port });
        }
        if !address.ip().is_loopback() {
            return Err(AdminError::NoPublicUrl(address));
        }
        let literal = match address.ip() {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => format!("[{v6}]"),
        };
        let url = |name: &str| {
            let host = if port == 80 { name.to_owned() } else { format!("{name}:{port}") };
            PublicUrl { tls: false, host }
        };
        Ok(Self { urls: vec![url(&literal), url("localhost")], port })
    }

    /// Whether a Host header names us.
    pub fn is_ours(&self, host: &str) -> bool {
        self.urls.iter().any(|url| url.host.eq_ignore_ascii_case(host))
    }

    /// Whether an Origin header names a page of ours.
    pub fn is_our_page(&self, origin: &str) -> bool {
        self.urls.iter().any(|url| url.to_string() == origin)
    }

    /// The name of a cookie of ours.
    pub fn cookie(&self, name: &str) -> String {
        if self.is_tls() { format!("__Host-{name}") } else { format!("{name}-{}", self.port) }
    }

    /// A Set-Cookie header: for this host alone, for no script, and only sent from our own pages.
    pub fn set_cookie(&self, name: &str, value: &str, lasts: std::time::Duration) -> String {
        let name = self.cookie(name);
        let secure = if self.is_tls() { "; Secure" } else { "" };
        format!("{name}={value}; Path=/; Max-Age={}; HttpOnly; SameSite=Strict{secure}", lasts.as_secs())
    }

    fn is_tls(&self) -> bool {
        self.urls.iter().all(PublicUrl::is_tls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n20_a_public_url_is_scheme_name_and_port() {
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
    fn n20_only_our_names_are_ours() {
        let local = Origins::of("127.0.0.1:4000".parse().unwrap(), None).unwrap();
        assert!(local.is_ours("127.0.0.1:4000") && local.is_ours("LOCALHOST:4000"));
        for foreign in
            ["127.0.0.1", "127.0.0.1:4001", "evil.example:4000", "localhost", "", "127.0.0.1:4000.evil.example"]
        {
            assert!(!local.is_ours(foreign), "{foreign}");
        }
        assert!(local.is_our_page("http://localhost:4000") && !local.is_our_page("https://localhost:4000"));
        assert!(!local.is_our_page("null") && !local.is_our_page("http://evil.example"));
        assert!(Origins::of("[::1]:80".parse().unwrap(), None).unwrap().is_ours("[::1]"));

        let url: PublicUrl = "https://tower.example.org".parse().unwrap();
        let public = Origins::of("0.0.0.0:4000".parse().unwrap(), Some(&url)).unwrap();
        assert!(public.is_ours("tower.example.org") && !public.is_ours("127.0.0.1:4000"));
        assert!(
            public.set_cookie("nanite", "x", std::time::Duration::from_secs(5)).ends_with("SameSite=Strict; Secure")
        );
        assert!(public.cookie("nanite").starts_with("__Host-"));
    }

    #[test]
    fn n20_what_others_can_reach_needs_a_public_url() {
        for address in ["0.0.0.0:4000", "10.0.0.1:4000", "[::]:4000"] {
            assert!(
                matches!(Origins::of(address.parse().unwrap(), None), Err(AdminError::NoPublicUrl(_))),
                "{address}"
            );
        }
    }
}
