//! The address of a client behind reverse proxies: from the header `X-Forwarded-For`, which is believed of trusted proxies only.

use std::net::IpAddr;
use std::str::FromStr;

use axum::http::{HeaderMap, HeaderName};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The address of a reverse proxy, or a network of them: `10.0.0.7`, `10.0.0.0/8`, `fd00::/8`.
///
/// ```
/// use nanite::admin::TrustedProxy;
///
/// assert!("10.0.0.0/8".parse::<TrustedProxy>().is_ok());
/// assert!("10.0.0.7/8".parse::<TrustedProxy>().is_err(), "bits outside of the network");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrustedProxy {
    network: IpAddr,
    /// How many of its first bits count.
    prefix: u8,
}

/// The text is not an address or a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a trusted proxy is an address or a network, such as 127.0.0.1, 10.0.0.0/8 or fd00::/8")]
pub struct InvalidProxy;

impl FromStr for TrustedProxy {
    type Err = InvalidProxy;

    fn from_str(text: &str) -> Result<Self, InvalidProxy> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let network: IpAddr = address.parse().map_err(|_| InvalidProxy)?;
        let bits = bits_of(network);
        let prefix = match prefix {
            Some(digits) => {
                let prefix: u8 = digits.parse().map_err(|_| InvalidProxy)?;
                if prefix > bits || digits != prefix.to_string() {
                    return Err(InvalidProxy);
                }
                prefix
            }
            None => bits,
        };
        // An IPv4 address in IPv6 form is compared as IPv4: its network would be another.
        let is_mapped = network.to_canonical() != network;
        if is_mapped || masked(network, prefix) != masked(network, bits) {
            return Err(InvalidProxy);
        }
        Ok(Self { network, prefix })
    }
}

impl TrustedProxy {
    fn contains(&self, address: IpAddr) -> bool {
        bits_of(address) == bits_of(self.network) && masked(address, self.prefix) == masked(self.network, self.prefix)
    }
}

const fn bits_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// The first bits of an address, at the top of the number.
fn masked(address: IpAddr, prefix: u8) -> u128 {
    let number = match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    };
    number & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

/// The address of the client: that of the connection, unless it is a trusted proxy. Then the header is read from its end, where the
/// nearest proxy has added the address that it saw; the first address that is not a trusted proxy is the client. An address before
/// it was written by the client, and means nothing. At an entry that is no address, the proxy that added it counts as the client.
pub(super) fn client(connection: IpAddr, headers: &HeaderMap, trusted: &[TrustedProxy]) -> IpAddr {
    let is_trusted = |address: IpAddr| trusted.iter().any(|proxy| proxy.contains(address));
    let mut client = connection.to_canonical();
    let lines = headers.get_all(X_FORWARDED_FOR).iter();
    // In the order in which they were added; a line that is no text has one entry that is no address.
    let entries: Vec<&str> = lines.flat_map(|line| line.to_str().unwrap_or("").split(',')).collect();
    for entry in entries.into_iter().rev() {
        if !is_trusted(client) {
            break;
        }
        match address(entry.trim()) {
            Some(address) => client = address.to_canonical(),
            None => break,
        }
    }
    client
}

/// The address of an entry; some proxies write the port with it.
fn address(entry: &str) -> Option<IpAddr> {
    let in_brackets = entry.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let plain = || in_brackets.unwrap_or(entry).parse().ok();
    plain().or_else(|| Some(entry.parse::<std::net::SocketAddr>().ok()?.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(texts: &[&str]) -> Vec<TrustedProxy> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn client_of(connection: &str, lines: &[&str], trusted: &[&str]) -> String {
        let lines = lines.iter().map(|line| (X_FORWARDED_FOR, line.parse().unwrap()));
        client(connection.parse().unwrap(), &HeaderMap::from_iter(lines), &proxies(trusted)).to_string()
    }

    #[test]
    fn n20_parses_trusted_proxies() {
        for good in ["127.0.0.1", "10.0.0.0/8", "0.0.0.0/0", "::1", "fd00::/8", "::/0", "10.1.2.3/32"] {
            assert!(good.parse::<TrustedProxy>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "x",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0/08",
            "10.0.0.0/",
            "::/129",
            "fd00::1/8",
            "::ffff:10.0.0.0/104",
            "/8",
        ] {
            assert_eq!(bad.parse::<TrustedProxy>(), Err(InvalidProxy), "{bad}");
        }
    }

    #[test]
    fn n20_client_is_the_rightmost_address_that_is_no_trusted_proxy() {
        let local = &["127.0.0.1", "10.0.0.0/8", "fd00::/8"][..];
        for (connection, lines, trusted, client) in [
            ("192.0.2.1", &["192.0.2.9"][..], local, "192.0.2.1"),
            ("127.0.0.1", &["192.0.2.9"], &[], "127.0.0.1"),
            ("127.0.0.1", &[], local, "127.0.0.1"),
            ("127.0.0.1", &["192.0.2.9"], local, "192.0.2.9"),
            ("::ffff:127.0.0.1", &["::ffff:192.0.2.9"], local, "192.0.2.9"),
            ("127.0.0.1", &["198.51.100.1, 192.0.2.9 , 10.1.1.1"], local, "192.0.2.9"),
            ("127.0.0.1", &["198.51.100.1,192.0.2.9", "10.1.1.1"], local, "192.0.2.9"),
            ("127.0.0.1", &["10.2.2.2"], local, "10.2.2.2"),
            ("127.0.0.1", &["192.0.2.9, x, 10.1.1.1"], local, "10.1.1.1"),
            ("127.0.0.1", &["192.0.2.9,"], local, "127.0.0.1"),
            ("127.0.0.1", &["192.0.2.9:4711"], local, "192.0.2.9"),
            ("fd00::1", &["2001:db8::7"], local, "2001:db8::7"),
            ("fd00::1", &["[2001:db8::7]:80"], local, "2001:db8::7"),
            ("fd00::1", &["[2001:db8::7]"], local, "2001:db8::7"),
        ] {
            assert_eq!(client_of(connection, lines, trusted), client, "{connection} {lines:?}");
        }
    }
}
