//! The Control Tower: web pages that show a mapper's agents and send requests through the mapper.
//!
//! The server renders the pages from templates that escape all values. A small script updates open pages through server-sent events;
//! without the script the pages work too. Users log in with a [password](Access::Password) or an [invitation](Access::Invited).
//!
//! ```text
//! browser -> server (connection limits) -> guard (host, origin, size) -> routes -> session -> page
//! mapper  -> snapshot (every second) -> agent pages and their event streams
//! form    -> requests -> request pages and their event streams
//! ```
//!
//! ```no_run
//! # async fn example(builder: nanite::mapper::MapperBuilder) -> Result<(), Box<dyn std::error::Error>> {
//! use nanite::admin::{Access, ControlTower, History, Invitations};
//!
//! let history = History::default();
//! let mapper = builder.on_agent(history.hook()).start().await?;
//! let invitations = Invitations::default();
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:4000").await?;
//! println!("http://127.0.0.1:4000{}", invitations.issue()?.as_str());
//! let stop = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
//! ControlTower::new(mapper, history, Access::Invited(invitations)).serve(listener, stop).await?;
//! # Ok(())
//! # }
//! ```

mod access;
mod event_stream;
mod format;
mod forwarded;
mod history;
mod http;
mod origin;
mod pages;
mod requests;
mod secret;
mod server;
mod state;

use std::sync::Arc;

use tokio::net::TcpListener;

use crate::clock::{Clock, SystemClock};
use crate::mapper::Mapper;

pub use access::{Access, Invitations};
pub use forwarded::{InvalidProxy, TrustedProxy};
pub use history::History;
pub use origin::{InvalidUrl, PublicUrl};
pub use secret::{InvalidHash, PasswordError, PasswordHash};

use origin::Origins;
use state::AppState;

/// Builds and serves the pages of a mapper.
#[derive(Debug)]
pub struct ControlTower {
    mapper: Mapper,
    history: History,
    access: Access,
    clock: Arc<dyn Clock>,
    public_url: Option<PublicUrl>,
    trusted_proxies: Vec<TrustedProxy>,
    allow_requests: bool,
}

/// Why the pages cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// Other machines can reach the listener, and there is no public URL.
    #[error("{0} is reachable from other machines: a public URL is required")]
    NoPublicUrl(std::net::SocketAddr),
    /// The listener has no usable address.
    #[error("cannot listen")]
    Listen(#[from] std::io::Error),
}

impl ControlTower {
    /// The pages of `mapper`. `history` must be the one whose [hook](History::hook) the mapper was built with; otherwise the pages
    /// show no events.
    pub fn new(mapper: Mapper, history: History, access: Access) -> Self {
        Self {
            mapper,
            history,
            access,
            clock: Arc::new(SystemClock),
            public_url: None,
            trusted_proxies: Vec::new(),
            allow_requests: false,
        }
    }

    /// Whether users may send requests. The default is false: the pages are read-only.
    #[must_use]
    pub fn allow_requests(mut self, allow: bool) -> Self {
        self.allow_requests = allow;
        self
    }

    /// The URL that browsers use, if it is not the listener's address; for example, that of a TLS proxy. With an https URL, browsers
    /// send the cookies over TLS only.
    #[must_use]
    pub fn public_url(mut self, url: PublicUrl) -> Self {
        self.public_url = Some(url);
        self
    }

    /// The reverse proxies whose header `X-Forwarded-For` is believed. None by default: then all clients behind a proxy have the proxy's
    /// address, and share one limit of login attempts.
    #[must_use]
    pub fn trusted_proxies(mut self, proxies: impl IntoIterator<Item = TrustedProxy>) -> Self {
        self.trusted_proxies = proxies.into_iter().collect();
        self
    }

    /// The clock. The default is the system's. It should be the clock of the mapper.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Serves the pages until `shutdown` completes, then closes open connections.
    ///
    /// # Errors
    /// [`AdminError`] if the listener's address cannot be read, or if other machines can reach it and there is no public URL.
    pub async fn serve(self, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<(), AdminError> {
        let Self { mapper, history, access, clock, public_url, trusted_proxies, allow_requests } = self;
        let address = listener.local_addr()?;
        let origins = Origins::new(address, public_url.as_ref()).ok_or(AdminError::NoPublicUrl(address))?;
        let state = AppState::new(mapper, history, access, clock, origins, trusted_proxies, allow_requests);
        server::serve(Arc::new(state), listener, shutdown).await;
        Ok(())
    }
}
