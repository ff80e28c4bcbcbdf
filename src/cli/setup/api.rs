//! A client for RabbitMQ's management API: HTTP by hyper, TLS by OpenSSL.
//!
//! The administrator's password goes with every request: without TLS it is sent to this machine only, and with TLS only to a server
//! whose certificate was issued by the given CA for the host of the URL. There are no proxies, and redirects are not followed.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use openssl::base64::encode_block;
use openssl::error::ErrorStack;
use openssl::ssl::{SslConnector, SslMethod, SslVersion};
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::{X509, X509VerifyResult};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_openssl::SslStream;
use zeroize::Zeroizing;

use crate::cli::error::{CliError, Exit, Result};

const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_RESPONSE_BYTES: usize = 16 * 1024 * 1024;
/// How much of the broker's reason for a refusal is shown.
const MAX_REASON_CHARS: usize = 300;

/// The address of a management API: `http://HOST:PORT` or `https://HOST:PORT`.
pub(super) struct ApiUrl {
    pub tls: bool,
    host: String,
    /// Host and port.
    authority: String,
}

impl ApiUrl {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let invalid = |why: &str| format!("the management URL {why}; use one such as http://localhost:15672");
        if text.contains('@') {
            return Err(invalid("contains a user: use `--user` and `--password-file` instead"));
        }
        let uri: Uri = text.parse().map_err(|_| invalid("is not valid"))?;
        let (tls, default_port) = match uri.scheme_str() {
            Some("http") => (false, 15672),
            Some("https") => (true, 15671),
            _ => return Err(invalid("begins with neither http:// nor https://")),
        };
        // The parser drops a fragment.
        if uri.path() != "/" || uri.query().is_some() || text.contains('#') {
            return Err(invalid("contains more than host and port"));
        }
        let (host, authority) = (uri.host().unwrap_or_default(), uri.authority().map_or("", |all| all.as_str()));
        let authority = match uri.port_u16() {
            Some(1..) => authority.to_owned(),
            None if host == authority => format!("{host}:{default_port}"),
            _ => return Err(invalid("has no port from 1 to 65535")),
        };
        // An IPv6 address is in brackets only in URLs.
        Ok(Self { tls, host: host.trim_matches(['[', ']']).to_owned(), authority })
    }
}

impl fmt::Display for ApiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.authority)
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("without TLS, the password would be sent to another machine in clear text")]
    NotLocal,
    #[error("cannot be reached")]
    Unreachable(#[source] Box<dyn Error + Send + Sync>),
    #[error("TLS failed: {0}")]
    Tls(String),
    #[error("the answer is not that of a management API")]
    NotAnApi,
    #[error("refuses the user {0} or its password")]
    Credentials(String),
    #[error("the user {0} is not an administrator")]
    Forbidden(String),
    #[error("{0} does not exist")]
    Missing(String),
    #[error("{request} failed with status {status}: {reason}")]
    Refused { request: String, status: u16, reason: String },
}

impl From<io::Error> for ApiError {
    fn from(error: io::Error) -> Self {
        Self::Unreachable(error.into())
    }
}

impl From<hyper::Error> for ApiError {
    fn from(error: hyper::Error) -> Self {
        if error.is_parse() || error.is_incomplete_message() { Self::NotAnApi } else { Self::Unreachable(error.into()) }
    }
}

/// A management API and the administrator who uses it.
pub(super) struct Api {
    url: ApiUrl,
    user: String,
    password: Zeroizing<String>,
    tls: Option<SslConnector>,
}

impl Api {
    /// Without `tls`, only this machine is connected to.
    pub(super) fn new(url: ApiUrl, user: String, password: Zeroizing<String>, tls: Option<SslConnector>) -> Self {
        Self { url, user, password, tls }
    }

    /// The resource at this path, if it exists.
    pub(super) async fn get(&self, path: &str) -> Result<Option<Value>> {
        let body = self.call("GET", path, None).await.and_then(|body| {
            body.map(|body| serde_json::from_slice(&body).map_err(|_| ApiError::NotAnApi)).transpose()
        });
        body.map_err(|error| self.explain(&error))
    }

    /// Sends JSON with this method.
    pub(super) async fn send(&self, method: &str, path: &str, body: Value) -> Result<()> {
        let body =
            self.call(method, path, Some(body)).await.and_then(|body| body.ok_or(ApiError::Missing(path.into())));
        body.map(|_| ()).map_err(|error| self.explain(&error))
    }

    /// Deletes the resource at this path, if it exists.
    pub(super) async fn delete(&self, path: &str) -> Result<()> {
        self.call("DELETE", path, None).await.map(|_| ()).map_err(|error| self.explain(&error))
    }

    /// The error of a user who is not an administrator.
    pub(super) fn not_administrator(&self) -> CliError {
        self.explain(&ApiError::Forbidden(self.user.clone()))
    }

    fn explain(&self, error: &ApiError) -> CliError {
        let (exit, help) = match error {
            ApiError::NotLocal => {
                (Exit::Usage, "use `--management https://HOST:15671 --ca FILE`, or run this on the broker's machine")
            }
            ApiError::Unreachable(_) | ApiError::NotAnApi => (
                Exit::Unreachable,
                "the broker needs its management plugin: `rabbitmq-plugins enable rabbitmq_management`; its address is \
                 `--management URL`",
            ),
            ApiError::Tls(_) => (
                Exit::Unreachable,
                "`--ca` must be the CA that issued the API's certificate, and the certificate must contain the host name",
            ),
            ApiError::Credentials(_) => (
                Exit::Unreachable,
                "name an administrator with `--user NAME`, and the file with the password with `--password-file FILE`",
            ),
            ApiError::Forbidden(user) => {
                let failure = CliError::of(Exit::Denied, error).context(&self.url);
                return failure.help(format!("make it one with `rabbitmqctl set_user_tags {user} administrator`"));
            }
            ApiError::Missing(_) | ApiError::Refused { .. } => (Exit::Failure, "look at the log of the broker"),
        };
        CliError::of(exit, error).context(&self.url).help(help)
    }

    /// The body of a successful answer; none if the resource does not exist.
    async fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<Option<Bytes>, ApiError> {
        let invalid = |error: hyper::http::Error| ApiError::Unreachable(error.into());
        let secret = Zeroizing::new(format!("{}:{}", self.user, self.password.as_str()));
        let authorization = Zeroizing::new(format!("Basic {}", encode_block(secret.as_bytes())));
        let mut authorization = HeaderValue::from_str(&authorization).map_err(|error| invalid(error.into()))?;
        authorization.set_sensitive(true);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.url.authority)
            .header(AUTHORIZATION, authorization)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body.map(|body| body.to_string()).unwrap_or_default()))
            .map_err(invalid)?;
        let answer = timeout(REQUEST_TIMEOUT, self.connect_and_send(request)).await;
        let (status, body) = answer.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))?;
        let error: Value = match status {
            status if status.is_success() => return Ok(Some(body)),
            StatusCode::NOT_FOUND => return Ok(None),
            _ => serde_json::from_slice(&body).unwrap_or_default(),
        };
        let reason = error.get("reason").and_then(Value::as_str).unwrap_or("no reason given");
        Err(match status {
            // RabbitMQ checks the password first.
            StatusCode::UNAUTHORIZED if reason == "Not management user" => ApiError::Forbidden(self.user.clone()),
            StatusCode::UNAUTHORIZED => ApiError::Credentials(self.user.clone()),
            StatusCode::FORBIDDEN => ApiError::Forbidden(self.user.clone()),
            _ => {
                let reason = reason.chars().take(MAX_REASON_CHARS).collect();
                ApiError::Refused { request: format!("{method} {path}"), status: status.as_u16(), reason }
            }
        })
    }

    async fn connect_and_send(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), ApiError> {
        let addresses: Vec<SocketAddr> = lookup_host(&self.url.authority).await?.collect();
        if self.tls.is_none() && !addresses.iter().all(|address| address.ip().is_loopback()) {
            return Err(ApiError::NotLocal);
        }
        let stream = TcpStream::connect(addresses.as_slice()).await?;
        let Some(tls) = &self.tls else { return send(stream, request).await };
        let ssl = tls.configure().and_then(|tls| tls.into_ssl(&self.url.host));
        let stream = ssl.and_then(|ssl| SslStream::new(ssl, stream));
        let mut stream = stream.map_err(|error| ApiError::Tls(error.to_string()))?;
        match Pin::new(&mut stream).connect().await {
            Ok(()) => send(stream, request).await,
            Err(error) => match stream.ssl().verify_result() {
                X509VerifyResult::OK => Err(ApiError::Tls(error.to_string())),
                reason => Err(ApiError::Tls(format!("the certificate is not accepted: {reason}"))),
            },
        }
    }
}

/// Sends one request over a connection of its own.
async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), ApiError> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_RESPONSE_BYTES).collect().await;
    Ok((status, body.map_err(ApiError::Unreachable)?.to_bytes()))
}

/// TLS that trusts the CAs in a file, and no others.
pub(super) fn tls(ca: &Path) -> Result<SslConnector, String> {
    let failed = |error: &dyn fmt::Display| format!("{}: {error}", ca.display());
    let pem = std::fs::read(ca).map_err(|error| failed(&error))?;
    let certificates = X509::stack_from_pem(&pem).map_err(|error| failed(&error))?;
    if certificates.is_empty() {
        return Err(failed(&"the file contains no certificate"));
    }
    let build = || -> Result<SslConnector, ErrorStack> {
        let mut store = X509StoreBuilder::new()?;
        certificates.into_iter().try_for_each(|certificate| store.add_cert(certificate))?;
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        builder.set_cert_store(store.build());
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        Ok(builder.build())
    };
    build().map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[test]
    fn n22_management_url_is_scheme_host_and_port_only() {
        let url = |text: &str| ApiUrl::parse(text).map(|url| url.to_string());
        assert_eq!(url("http://localhost").unwrap(), "http://localhost:15672");
        assert_eq!(url("https://broker.example/").unwrap(), "https://broker.example:15671");
        assert_eq!(url("http://[::1]:1").unwrap(), "http://[::1]:1");
        let bad = "localhost amqp://h http:// http://h:0 http://h:x http://h: http://h:65536 http://h/api http://h?x http://h#x http://[::1";
        for bad in bad.split(' ').chain(["http://h h"]) {
            assert!(url(bad).is_err(), "{bad}");
        }
        let error = url("http://admin:secret@h").unwrap_err();
        assert!(error.contains("--password-file") && !error.contains("secret"), "{error}");
    }

    async fn call(url: &str) -> Result<Option<Bytes>, ApiError> {
        let api = Api::new(ApiUrl::parse(url).unwrap(), "admin".into(), Zeroizing::new("secret".into()), None);
        api.call("GET", "/api/overview", None).await
    }

    #[tokio::test]
    async fn n22_management_answers_are_bounded_and_garbage_is_an_error() {
        for (answer, expected) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "Ok(Some(b\"{}\"))"),
            ("HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}", "Ok(None)"),
            ("HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", "Err(Refused"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n", "Err(Unreachable"),
            ("", "Err(NotAnApi)"),
            ("AMQP\0\0\x09\x01", "Err(NotAnApi)"),
            ("HTTP/1.1 abc\r\n\r\n", "Err(NotAnApi)"),
            ("HTTP/1.1 200 OK\r\n", "Err(NotAnApi)"),
            ("\u{ff}\u{ff}", "Err(NotAnApi)"),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let server = async {
                let (mut stream, mut request) = (listener.accept().await.unwrap().0, [0; 1024]);
                let length = stream.read(&mut request).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
                String::from_utf8_lossy(&request[..length]).into_owned()
            };
            let (result, request) = tokio::join!(call(&url), server);
            assert!(format!("{result:?}").starts_with(expected), "{answer:?}: {result:?}");
            assert!(request.starts_with("GET /api/overview HTTP/1.1\r\n"), "{request}");
            assert!(request.contains("authorization: Basic YWRtaW46c2VjcmV0\r\n"), "{request}");
        }
    }

    #[tokio::test]
    async fn n22_password_is_not_sent_to_another_machine_without_tls() {
        assert!(matches!(call("http://192.0.2.1:15672").await, Err(ApiError::NotLocal)));
    }
}
