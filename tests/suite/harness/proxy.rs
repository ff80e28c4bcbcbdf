//! A TCP proxy between a client and a broker, with which a test interrupts the network.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the network does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Network {
    Up,
    /// Connections stay open, and nothing passes.
    Silent,
    /// Connections are closed, new ones too.
    Down,
}

/// A proxy on a free port.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    network: watch::Sender<Network>,
    accepted: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// A proxy to a port on this machine.
    pub async fn to(target: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (network, observed) = watch::channel(Network::Up);
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let network = observed.clone();
                tokio::spawn(async move {
                    if *network.borrow() == Network::Down {
                        return;
                    }
                    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
                    client.set_nodelay(true).unwrap();
                    server.set_nodelay(true).unwrap();
                    let (client_in, client_out) = client.into_split();
                    let (server_in, server_out) = server.into_split();
                    let mut down = network.clone();
                    tokio::select! {
                        () = copy(client_in, server_out, network.clone()) => {}
                        () = copy(server_in, client_out, network) => {}
                        _ = down.wait_for(|network| *network == Network::Down) => {}
                    }
                });
            }
        });
        Self { port, network, accepted, task }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many connections were accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// From now on nothing passes, but connections stay open.
    pub fn silence(&self) {
        self.network.send_replace(Network::Silent);
    }

    /// Closes all connections, and new ones.
    pub fn disconnect(&self) {
        self.network.send_replace(Network::Down);
    }

    /// Makes the network work again.
    pub fn restore(&self) {
        self.network.send_replace(Network::Up);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.disconnect();
    }
}

async fn copy(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut network: watch::Receiver<Network>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(length @ 1..) = from.read(&mut buffer).await else { return };
        if network.wait_for(|network| *network != Network::Silent).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
