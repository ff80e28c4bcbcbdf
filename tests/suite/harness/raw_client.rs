//! A publisher that writes AMQP frames itself, with properties that no client library would write.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::WAIT_TIMEOUT;
use super::fake_broker::{CONTENT_HEADER, METHOD, content_header, frame, long, method, short};

/// The largest frame that RabbitMQ accepts by default.
pub const FRAME_MAX: usize = 128 * 1024;

/// A connection as guest, with one channel whose publishes are confirmed.
#[derive(Debug)]
pub struct RawClient(TcpStream);

impl RawClient {
    pub fn connect(port: u16, vhost: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut client = Self(stream);
        client.0.write_all(b"AMQP\0\0\x09\x01").unwrap();
        client.expect(10, 10);
        client.send(0, 10, 11, &[long(&[]), short("PLAIN"), long(b"\0guest\0guest"), short("en_US")].concat());
        client.expect(10, 30);
        let frame_max = u32::try_from(FRAME_MAX).unwrap();
        client.send(0, 10, 31, &[&[0, 16][..], &frame_max.to_be_bytes(), &[0, 0]].concat());
        client.send(0, 10, 40, &[short(vhost), vec![0, 0]].concat());
        client.expect(10, 41);
        client.send(1, 20, 10, &[0]);
        client.expect(20, 11);
        client.send(1, 85, 10, &[0]);
        client.expect(85, 11);
        client
    }

    fn send(&mut self, channel: u16, class: u16, number: u16, fields: &[u8]) {
        self.0.write_all(&frame(METHOD, channel, &method(class, number, fields))).unwrap();
    }

    fn expect(&mut self, class: u16, number: u16) {
        let mut header = [0; 7];
        self.0.read_exact(&mut header).unwrap();
        let length = u32::from_be_bytes([header[3], header[4], header[5], header[6]]);
        let mut payload = vec![0; usize::try_from(length).unwrap() + 1];
        self.0.read_exact(&mut payload).unwrap();
        let expected = [class.to_be_bytes(), number.to_be_bytes()].concat();
        assert_eq!(payload[..4], expected, "{}", String::from_utf8_lossy(&payload));
    }

    /// Publishes a message without a body, and waits until it is confirmed.
    pub fn publish(&mut self, exchange: &str, routing_key: &[u8], flags: u16, properties: &[u8]) {
        let mut fields = [vec![0, 0], short(exchange)].concat();
        fields.push(u8::try_from(routing_key.len()).unwrap());
        fields.extend(routing_key);
        fields.push(0);
        self.send(1, 60, 40, &fields);
        self.0.write_all(&frame(CONTENT_HEADER, 1, &content_header(0, flags, properties))).unwrap();
        self.expect(60, 80);
    }
}
