//! An HTTP client that sends exactly the bytes that a test gives, as an attacker could.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// An HTTP response.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case, with values.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    /// The value of a header; empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(header, _)| header == name).map_or("", |(_, value)| value)
    }

    /// The cookie that the response sets whose name begins with this; none if it sets none, or deletes it.
    pub fn cookie(&self, name: &str) -> Option<String> {
        let set = self.headers.iter().filter(|(header, _)| header == "set-cookie").map(|(_, value)| value);
        let pair = set.filter_map(|value| value.split(';').next()).find(|pair| pair.starts_with(name))?;
        (!pair.ends_with('=')).then(|| pair.to_owned())
    }

    /// The CSRF token in the first form of the page.
    pub fn csrf(&self) -> &str {
        let (_, rest) = self.body.split_once("name=\"csrf\" value=\"").expect("a form");
        rest.split_once('"').unwrap().0
    }
}

/// Connects and sends these bytes.
pub fn open(port: u16, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // A server that refuses early may close before it has read everything.
    let _ = stream.write_all(bytes);
    stream
}

/// Sends these bytes and reads the response: as many bytes as its length says, or until the connection ends.
pub fn exchange(port: u16, bytes: &[u8]) -> Answer {
    let mut stream = open(port, bytes);
    let mut answer = Vec::new();
    let mut piece = [0; 16 * 1024];
    while !is_whole(&answer) {
        match stream.read(&mut piece) {
            Ok(read) if read > 0 => answer.extend_from_slice(&piece[..read]),
            // The bytes before a reset are the response.
            _ => break,
        }
    }
    parse(std::str::from_utf8(&answer).unwrap())
}

fn is_whole(answer: &[u8]) -> bool {
    let Some(head) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let text = String::from_utf8_lossy(&answer[..head]).to_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    length.is_some_and(|length| answer.len() >= head + 4 + length)
}

fn parse(text: &str) -> Answer {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("not an answer: {text:?}"));
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let header =
        |line: &str| line.split_once(':').map(|(name, value)| (name.to_lowercase(), value.trim().to_owned())).unwrap();
    Answer { status, headers: lines.map(header).collect(), body: body.to_owned() }
}

/// The `Host` header that a browser sends.
pub fn host(port: u16) -> String {
    format!("Host: 127.0.0.1:{port}\r\n")
}

/// Sends `GET path` with these header lines, each with its line end.
pub fn get(port: u16, path: &str, headers: &str) -> Answer {
    exchange(port, format!("GET {path} HTTP/1.1\r\n{}{headers}Connection: close\r\n\r\n", host(port)).as_bytes())
}

/// Sends `POST path` with a form and these header lines.
pub fn post(port: u16, path: &str, headers: &str, form: &[(&str, &str)]) -> Answer {
    let body: Vec<String> = form.iter().map(|(name, value)| format!("{name}={}", encoded(value))).collect();
    let body = body.join("&");
    let kind = "Content-Type: application/x-www-form-urlencoded\r\n";
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\n{}{kind}{headers}Content-Length: {length}\r\n", host(port));
    exchange(port, format!("{head}Connection: close\r\n\r\n{body}").as_bytes())
}

/// A text in the encoding of forms.
pub fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).into() } else { format!("%{byte:02X}") })
        .collect()
}

/// A stream of events, of which the head has been read.
pub fn events(port: u16, path: &str, cookie: &str) -> (u16, TcpStream) {
    let head = format!("GET {path} HTTP/1.1\r\n{}{cookie}Accept: text/event-stream\r\n\r\n", host(port));
    let mut stream = open(port, head.as_bytes());
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        read.push(byte[0]);
    }
    let status = std::str::from_utf8(&read).unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    (status, stream)
}
