//! A broker that speaks just enough AMQP 0-9-1 for the nodes to use it, and then does to them what a test wants. It stores no messages.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long a connection may be silent, so that no thread outlives its test for long.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(120);

pub const METHOD: u8 = 1;
pub const CONTENT_HEADER: u8 = 2;
pub const BODY: u8 = 3;

/// A frame that a client has sent.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub channel: u16,
    pub payload: Vec<u8>,
}

impl Frame {
    /// Class and method of a method frame.
    pub fn method(&self) -> Option<(u16, u16)> {
        let number = |at: usize| u16::from_be_bytes([self.payload[at], self.payload[at + 1]]);
        (self.kind == METHOD).then(|| (number(0), number(2)))
    }

    /// The short string at this position of the payload.
    pub fn text(&self, at: usize) -> String {
        let length = usize::from(self.payload[at]);
        String::from_utf8(self.payload[at + 1..at + 1 + length].to_vec()).unwrap()
    }
}

/// One connection of a client.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    /// Counts the connections, from 0.
    pub number: usize,
    /// The last tag that was delivered.
    pub tag: u64,
    /// Whether publishes are confirmed.
    pub confirms: bool,
    published: u64,
}

/// A method with these fields.
pub fn method(class: u16, method: u16, fields: &[u8]) -> Vec<u8> {
    [&class.to_be_bytes()[..], &method.to_be_bytes(), fields].concat()
}

pub fn short(text: &str) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()][..], text.as_bytes()].concat()
}

pub fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

pub fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    [&[kind][..], &channel.to_be_bytes(), &long(payload), &[0xCE]].concat()
}

/// A content header with these flags and properties.
pub fn content_header(body: u64, flags: u16, properties: &[u8]) -> Vec<u8> {
    [&60_u16.to_be_bytes()[..], &[0, 0], &body.to_be_bytes(), &flags.to_be_bytes(), properties].concat()
}

impl Client {
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    pub fn send_method(&mut self, channel: u16, class: u16, number: u16, fields: &[u8]) -> io::Result<()> {
        self.send(&frame(METHOD, channel, &method(class, number, fields)))
    }

    /// The method of the next delivery to a consumer.
    pub fn deliver(&mut self, channel: u16) -> Vec<u8> {
        self.tag += 1;
        let fields = [short("consumer"), self.tag.to_be_bytes().to_vec(), vec![0], short(""), short("key")].concat();
        frame(METHOD, channel, &method(60, 60, &fields))
    }

    /// How many messages were published on the channel with confirms.
    pub fn published(&self) -> u64 {
        self.published
    }

    /// Closes the connection.
    pub fn disconnect(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    fn read(&mut self) -> io::Result<Frame> {
        let mut header = [0; 7];
        self.stream.read_exact(&mut header)?;
        let length = u32::from_be_bytes([header[3], header[4], header[5], header[6]]);
        let mut payload = vec![0; usize::try_from(length).unwrap() + 1];
        self.stream.read_exact(&mut payload)?;
        assert_eq!(payload.pop(), Some(0xCE));
        Ok(Frame { kind: header[0], channel: u16::from_be_bytes([header[1], header[2]]), payload })
    }

    /// Answers as an honest broker does.
    fn answer(&mut self, frame: &Frame) -> io::Result<()> {
        let channel = frame.channel;
        match frame.method() {
            Some((10, 11)) => self.send_method(0, 10, 30, &[0, 0, 0, 2, 0, 0, 0, 0]),
            Some((10, 40)) => self.send_method(0, 10, 41, &[0]),
            Some((10, 50)) => self.send_method(0, 10, 51, &[]),
            Some((20, 10)) => self.send_method(channel, 20, 11, &[0; 4]),
            Some((20, 40)) => self.send_method(channel, 20, 41, &[]),
            Some((40, 10)) => self.send_method(channel, 40, 11, &[]),
            Some((50, 10)) => self.send_method(channel, 50, 11, &[short(&frame.text(6)), vec![0; 8]].concat()),
            Some((50, 20)) => self.send_method(channel, 50, 21, &[]),
            Some((60, 10)) => self.send_method(channel, 60, 11, &[]),
            Some((60, 20)) => self.send_method(channel, 60, 21, &short("consumer")),
            Some((60, 30)) => self.send_method(channel, 60, 31, &short("consumer")),
            Some((60, 40)) => {
                self.published += 1;
                if !self.confirms {
                    return Ok(());
                }
                self.send_method(channel, 60, 80, &[&self.published.to_be_bytes()[..], &[0]].concat())
            }
            Some((85, 10)) => {
                self.published = 0;
                self.send_method(channel, 85, 11, &[])
            }
            _ => Ok(()),
        }
    }
}

/// What a broker does after its own answer to a frame. An error ends the connection.
pub type Attack = dyn Fn(&mut Client, &Frame) -> io::Result<()> + Send + Sync;

/// A broker on a free port.
pub struct FakeBroker {
    port: u16,
    connected: Arc<Mutex<Vec<Instant>>>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    is_hostile: Arc<AtomicBool>,
    is_stopped: Arc<AtomicBool>,
}

impl FakeBroker {
    /// A broker that does this after each frame of a client, once it [attacks](Self::attack).
    pub fn start(attack: impl Fn(&mut Client, &Frame) -> io::Result<()> + Send + Sync + 'static) -> Self {
        let start = [vec![0, 9], long(&[]), long(b"PLAIN"), long(b"en_US")].concat();
        Self::start_with(&start, attack)
    }

    /// A broker with these fields in its first method.
    pub fn start_with(
        start: &[u8],
        attack: impl Fn(&mut Client, &Frame) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let broker = Self {
            port: listener.local_addr().unwrap().port(),
            connected: Arc::default(),
            streams: Arc::default(),
            is_hostile: Arc::default(),
            is_stopped: Arc::default(),
        };
        let attack: Arc<Attack> = Arc::new(attack);
        let start = start.to_vec();
        let (connected, streams) = (Arc::clone(&broker.connected), Arc::clone(&broker.streams));
        let (is_hostile, is_stopped) = (Arc::clone(&broker.is_hostile), Arc::clone(&broker.is_stopped));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if is_stopped.load(Ordering::SeqCst) {
                    return;
                }
                let stream = stream.unwrap();
                let number = connected.lock().len();
                connected.lock().push(Instant::now());
                streams.lock().push(stream.try_clone().unwrap());
                let client = Client { stream, number, tag: 0, confirms: true, published: 0 };
                let (attack, start, is_hostile) = (Arc::clone(&attack), start.clone(), Arc::clone(&is_hostile));
                // Its end is of no interest: the client has disconnected, or the attack has ended the connection.
                std::thread::spawn(move || {
                    let mut client = client;
                    let _ = serve(&mut client, &start, &*attack, &is_hostile);
                    client.stream.shutdown(Shutdown::Both)
                });
            }
        });
        broker
    }

    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}", self.port)
    }

    /// When each connection was accepted.
    pub fn connected(&self) -> Vec<Instant> {
        self.connected.lock().clone()
    }

    /// From now on it is hostile, and it closes all connections.
    pub fn attack(&self) {
        self.is_hostile.store(true, Ordering::SeqCst);
        self.disconnect();
    }

    /// From now on it is honest again.
    pub fn behave(&self) {
        self.is_hostile.store(false, Ordering::SeqCst);
    }

    /// Closes all connections.
    pub fn disconnect(&self) {
        for stream in self.streams.lock().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(client: &mut Client, start: &[u8], attack: &Attack, is_hostile: &AtomicBool) -> io::Result<()> {
    client.stream.set_nodelay(true)?;
    client.stream.set_read_timeout(Some(SILENCE_TIMEOUT))?;
    client.stream.set_write_timeout(Some(SILENCE_TIMEOUT))?;
    let mut protocol = [0; 8];
    client.stream.read_exact(&mut protocol)?;
    assert_eq!(&protocol, b"AMQP\0\0\x09\x01");
    client.send_method(0, 10, 10, start)?;
    loop {
        let frame = client.read()?;
        client.answer(&frame)?;
        if is_hostile.load(Ordering::SeqCst) {
            attack(client, &frame)?;
        }
    }
}
