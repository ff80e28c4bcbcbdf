//! Just enough HTTP to speak to RabbitMQ's management API: one request a connection, answers within bounds.
//!
//! Without TLS it speaks to this machine only, since the administrator's password goes with every request. With TLS it believes the
//! CA that it was given, and no other.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

use openssl::ssl::{SslConnector, SslMethod, SslVersion};
use openssl::x509::X509;
use openssl::x509::store::X509StoreBuilder;
use serde_json::Value;
use zeroize::Zeroizing;

/// How long one call of the system may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The longest answer, in bytes.
const MAX: u64 = 16 * 1024 * 1024;

/// Where a management API is: `http://HOST:PORT` or `https://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiUrl {
    pub tls: bool,
    host: String,
    port: u16,
}

impl ApiUrl {
    /// Reads it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("the URL of the management API {why}; give one such as http://localhost:15672");
        let (tls, rest) = match text.split_once("://") {
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            _ => return Err(wrong("begins with neither http:// nor https://")),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains('@') {
            return Err(wrong("holds a user: name it with `--user`, and its password with `--password-file`"));
        }
        if authority.contains(['/', '?', '#']) {
            return Err(wrong("holds more than host and port"));
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(|| wrong("has a [ without a ]"))?;
                (host, port.strip_prefix(':'))
            }
            None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
        };
        if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(wrong("names no host"));
        }
        let port = match port {
            None if tls => Some(15671),
            None => Some(15672),
            Some(port) => port.parse().ok().filter(|port| *port != 0),
        };
        Ok(Self { tls, host: host.to_owned(), port: port.ok_or_else(|| wrong("has no port from 1 to 65535"))? })
    }
}

impl fmt::Display for ApiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        let Self { host, port, .. } = self;
        if host.contains(':') { write!(f, "{scheme}://[{host}]:{port}") } else { write!(f, "{scheme}://{host}:{port}") }
    }
}

/// Why the API could not be asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("without TLS the password would go to another machine as it is")]
    NotHere,
    #[error("cannot be reached")]
    Unreachable(#[source] io::Error),
    #[error("TLS failed: {0}")]
    Tls(String),
    #[error("does not answer as a management API does")]
    NoApi,
    #[error("refuses the user {0} and its password")]
    Credentials(String),
    #[error("does not let the user {0} do this: it has to be an administrator")]
    Forbidden(String),
    #[error("{status} at {what}: {why}")]
    Refused { what: String, status: u16, why: String },
}

/// A management API, and who asks it.
pub(super) struct Api {
    url: ApiUrl,
    user: String,
    password: Zeroizing<String>,
    tls: Option<SslConnector>,
}

impl Api {
    /// An API at this place.
    pub(super) fn new(url: ApiUrl, user: String, password: Zeroizing<String>, tls: Option<SslConnector>) -> Self {
        Self { url, user, password, tls }
    }

    /// What is at a path; none when nothing is there.
    pub(super) fn get(&self, path: &str) -> Result<Option<Value>, ApiError> {
        match self.call("GET", path, None)? {
            (200, body) => serde_json::from_str(&body).map(Some).map_err(|_| ApiError::NoApi),
            (404, _) => Ok(None),
            (status, body) => Err(self.refused("GET", path, status, &body)),
        }
    }

    /// Puts something at a path, or posts it there.
    pub(super) fn send(&self, method: &str, path: &str, body: &Value) -> Result<(), ApiError> {
        match self.call(method, path, Some(body))? {
            (200..=299, _) => Ok(()),
            (status, body) => Err(self.refused(method, path, status, &body)),
        }
    }

    /// Deletes what is at a path, if anything is.
    pub(super) fn delete(&self, path: &str) -> Result<(), ApiError> {
        match self.call("DELETE", path, None)? {
            (200..=299 | 404, _) => Ok(()),
            (status, body) => Err(self.refused("DELETE", path, status, &body)),
        }
    }

    fn refused(&self, method: &str, path: &str, status: u16, body: &str) -> ApiError {
        let said: Value = serde_json::from_str(body).unwrap_or_default();
        let why = said.get("reason").and_then(Value::as_str).unwrap_or("no reason is given");
        match status {
            // The password is right then.
            401 if why == "Not management user" => ApiError::Forbidden(self.user.clone()),
            401 => ApiError::Credentials(self.user.clone()),
            403 => ApiError::Forbidden(self.user.clone()),
            _ => ApiError::Refused { what: format!("{method} {path}"), status, why: why.chars().take(300).collect() },
        }
    }

    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, String), ApiError> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let secret = Zeroizing::new(format!("{}:{}", self.user, self.password.as_str()));
        let credentials = Zeroizing::new(openssl::base64::encode_block(secret.as_bytes()));
        // HTTP/1.0: the answer ends with the connection, and does not come in chunks.
        let request = Zeroizing::new(format!(
            "{method} {path} HTTP/1.0\r\nHost: {}:{}\r\nAuthorization: Basic {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            self.url.host,
            self.url.port,
            credentials.as_str(),
            body.len()
        ));
        let stream = self.connect()?;
        let answer = match &self.tls {
            Some(tls) if self.url.tls => {
                let stream = tls.connect(&self.url.host, stream).map_err(|error| ApiError::Tls(error.to_string()))?;
                exchange(stream, request.as_bytes())
            }
            _ => exchange(stream, request.as_bytes()),
        };
        parse(&answer.map_err(ApiError::Unreachable)?).ok_or(ApiError::NoApi)
    }

    fn connect(&self) -> Result<TcpStream, ApiError> {
        let unreachable = ApiError::Unreachable;
        let addresses: Vec<SocketAddr> =
            (self.url.host.as_str(), self.url.port).to_socket_addrs().map_err(unreachable)?.collect();
        if !self.url.tls && !addresses.iter().all(|address| address.ip().is_loopback()) {
            return Err(ApiError::NotHere);
        }
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match TcpStream::connect_timeout(&address, TIMEOUT) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(TIMEOUT)).map_err(unreachable)?;
                    stream.set_write_timeout(Some(TIMEOUT)).map_err(unreachable)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(unreachable(last))
    }
}

/// TLS that believes the CAs in a file, and no others.
pub(super) fn tls(ca: &Path) -> Result<SslConnector, String> {
    let failed = |error: &dyn fmt::Display| format!("{}: {error}", ca.display());
    let pem = std::fs::read(ca).map_err(|error| failed(&error))?;
    let all = X509::stack_from_pem(&pem).map_err(|error| failed(&error))?;
    if all.is_empty() {
        return Err(failed(&"it holds no certificate"));
    }
    let built = || -> Result<SslConnector, openssl::error::ErrorStack> {
        let mut store = X509StoreBuilder::new()?;
        for certificate in all {
            store.add_cert(certificate)?;
        }
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        builder.set_cert_store(store.build());
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        Ok(builder.build())
    };
    built().map_err(|error| failed(&error))
}

fn exchange(mut stream: impl Read + Write, request: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(request)?;
    stream.flush()?;
    let mut answer = Vec::new();
    stream.take(MAX + 1).read_to_end(&mut answer)?;
    if answer.len() as u64 > MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the answer is longer than {MAX} bytes")));
    }
    Ok(answer)
}

/// The status and the body.
fn parse(answer: &[u8]) -> Option<(u16, String)> {
    let answer = std::str::from_utf8(answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.lines().next()?;
    Some((status.parse().ok()?, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n22_a_url_names_host_and_port_and_nothing_else() {
        let url = |text: &str| ApiUrl::parse(text).map(|url| url.to_string());
        assert_eq!(url("http://localhost").unwrap(), "http://localhost:15672");
        assert_eq!(url("https://broker.example/").unwrap(), "https://broker.example:15671");
        assert_eq!(url("http://[::1]:1").unwrap(), "http://[::1]:1");
        for bad in [
            "localhost",
            "amqp://h",
            "http://",
            "http://h:0",
            "http://h:x",
            "http://h/api",
            "http://h?x",
            "http://[::1",
        ] {
            assert!(url(bad).is_err(), "{bad}");
        }
        let error = url("http://admin:secret@h").unwrap_err();
        assert!(error.contains("--password-file") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn n22_answers_are_read_and_rubbish_is_none() {
        assert_eq!(parse(b"HTTP/1.1 204 No Content\r\nx: y\r\n\r\n"), Some((204, String::new())));
        assert_eq!(parse(b"HTTP/1.0 200\r\n\r\n{}"), Some((200, "{}".into())));
        for bad in [&b""[..], b"AMQP\x00\x00\x09\x01", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"\xff\xff"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn n22_a_password_does_not_leave_the_machine_without_tls() {
        let url = ApiUrl::parse("http://192.0.2.1:15672").unwrap();
        let api = Api::new(url, "admin".into(), Zeroizing::new("secret".into()), None);
        assert!(matches!(api.get("/api/overview"), Err(ApiError::NotHere)));
    }
}
