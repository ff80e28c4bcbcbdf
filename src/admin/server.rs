//! Connections: how many, how long each may take, and how they end.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::fleet;
use super::router::{Tower, router, stopped};

/// How many connections are open at a time; further ones wait to be taken.
const CONNECTIONS: usize = 256;
/// How long a request's head may take to arrive, counted from the connection or the last answer.
const HEAD_TIME: Duration = Duration::from_secs(20);
/// The longest head of a request, in bytes.
const HEAD_BYTES: usize = 16 * 1024;
/// How many headers a request may have.
const HEADERS: usize = 64;
/// How long a connection lasts, whatever it does: also one whose reader has stopped reading.
const LASTS: Duration = Duration::from_secs(900);
/// How long open connections may take to end when all stops.
const END: Duration = Duration::from_secs(2);
/// How long to wait when no connection can be taken, for want of file descriptors, say.
const PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub SocketAddr);

/// Serves the pages until `shutdown` ends.
pub(super) async fn serve(tower: Arc<Tower>, listener: TcpListener, shutdown: impl Future<Output = ()>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let pages = router(tower.clone());
    let mut open = JoinSet::new();
    let taking = async {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            while open.try_join_next().is_some() {}
            match listener.accept().await {
                Ok((stream, peer)) => {
                    open.spawn(connection(tower.clone(), pages.clone(), stream, Peer(peer), slot));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection was not taken");
                    sleep(PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = fleet::watch(tower.clone()) => {}
        () = taking => {}
        () = shutdown => {}
    }
    tower.stopping.send_replace(true);
    let ended = async { while open.join_next().await.is_some() {} };
    // What is left is dropped with the set.
    let _ = timeout(END, ended).await;
}

async fn connection(tower: Arc<Tower>, pages: Router, stream: TcpStream, peer: Peer, _slot: OwnedSemaphorePermit) {
    let mut stopping = tower.stopping.subscribe();
    let service = TowerToHyperService::new(pages.layer(Extension(peer)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_headers(HEADERS)
        .max_header_size(HEAD_BYTES)
        .max_buf_size(HEAD_BYTES * 4)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = sleep(LASTS) => return,
        () = stopped(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(peer = %peer.0, %error, "a connection broke");
    }
}
