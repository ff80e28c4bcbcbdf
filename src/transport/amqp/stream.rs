//! The stream of a connection, with the guard between the broker and lapin.

use std::io::{Error, ErrorKind};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::io::{AsyncRead, AsyncWrite};
use futures_util::{Stream, TryFutureExt};
use lapin::AsyncTcpStream;
use tokio::sync::watch;

use super::accounts::Violation;
use super::guard::Guard;

/// How much is read at a time, in bytes.
const READ_BYTES: usize = 32 * 1024;

/// What a stream has seen.
#[derive(Clone, Debug, Default)]
pub(super) struct StreamState {
    /// Why the broker accepts no messages at the moment.
    pub(super) blocked: Option<String>,
    /// The bytes of unsettled messages.
    pub(super) held_bytes: u64,
    /// Why the stream has ended the connection.
    pub(super) violation: Option<Violation>,
    pub(super) is_closed: bool,
}

type Inner = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// A stream with a guard, plain or with TLS.
pub(super) struct GuardedStream {
    inner: Inner,
    guard: Guard,
    state: watch::Sender<StreamState>,
    read: Box<[u8]>,
    /// What lapin may read, from this position.
    passed: Vec<u8>,
    position: usize,
}

impl GuardedStream {
    pub(super) fn new(inner: Inner, state: watch::Sender<StreamState>) -> Self {
        let read = vec![0; READ_BYTES].into_boxed_slice();
        Self { inner, guard: Guard::new(), state, read, passed: Vec::new(), position: 0 }
    }

    /// Tells the others what has changed.
    fn update_state(&self, violation: Option<&Violation>) {
        let accounts = &self.guard.accounts;
        self.state.send_if_modified(|state| {
            state.held_bytes = accounts.held_bytes();
            let is_new = state.blocked.as_deref() != accounts.blocked() || violation.is_some();
            if is_new {
                state.blocked = accounts.blocked().map(str::to_owned);
                state.violation = violation.cloned();
            }
            is_new
        });
    }
}

impl AsyncRead for GuardedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<Result<usize, Error>> {
        let this = &mut *self;
        while this.position >= this.passed.len() {
            this.passed.clear();
            this.position = 0;
            if let Some(violation) = &this.state.borrow().violation {
                return Poll::Ready(Err(Error::new(ErrorKind::InvalidData, violation.clone())));
            }
            let length = ready!(Pin::new(&mut this.inner).poll_read(cx, &mut this.read))?;
            if length == 0 {
                return Poll::Ready(Ok(0));
            }
            let result = this.guard.receive(this.read.get(..length).unwrap_or_default(), &mut this.passed);
            this.update_state(result.as_ref().err());
            if result.is_err() {
                this.passed.clear();
            }
        }
        let available = this.passed.get(this.position..).unwrap_or_default();
        let length = available.len().min(buffer.len());
        if let Some((to, from)) = buffer.get_mut(..length).zip(available.get(..length)) {
            to.copy_from_slice(from);
        }
        this.position += length;
        Poll::Ready(Ok(length))
    }
}

impl AsyncWrite for GuardedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Error>> {
        let length = ready!(Pin::new(&mut self.inner).poll_write(cx, bytes))?;
        self.guard.sent(bytes.get(..length).unwrap_or_default());
        self.update_state(None);
        Poll::Ready(Ok(length))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

impl Drop for GuardedStream {
    fn drop(&mut self) {
        self.state.send_modify(|state| {
            state.held_bytes = 0;
            state.is_closed = true;
        });
    }
}

/// The runtime that makes lapin use guarded streams: Tokio's, with another type of stream.
pub(super) type GuardedRuntime = RuntimeParts<Tokio, GuardedReactor>;

pub(super) fn guarded_runtime() -> Runtime<GuardedRuntime> {
    Runtime::new(RuntimeParts::new(Tokio::current(), GuardedReactor(Tokio::current())))
}

#[derive(Clone, Debug)]
pub(super) struct GuardedReactor(Tokio);

impl Reactor for GuardedReactor {
    type TcpStream = GuardedStream;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: std::io::Read + std::io::Write + std::os::fd::AsFd + std::os::fd::AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> std::io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = std::io::Result<GuardedStream>> + Send + 'static {
        let (state, _) = watch::channel(StreamState::default());
        self.0.tcp_connect_addr(address).map_ok(|stream| GuardedStream::new(AsyncTcpStream::Plain(stream), state))
    }
}
