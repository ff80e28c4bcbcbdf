//! The Control Tower: pages that show a mapper's agents as they are now, and send requests through it.
//!
//! Pages are made here, by templates that escape everything; a small script keeps them up to date by server-sent events, and they
//! work without it. Who looks at them has proved a [password](Access::Password) or had an [invitation](Access::Invited).
//!
//! ```text
//! browser -> server (connections, time limits) -> guard (Host, headers, size) -> router -> session -> a page
//!            mapper -> fleet (once a second) -> history and snapshot -> agents: pages and events
//!            a page's form -> ask -> runs -> answers: pages and events
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
mod agents;
mod answers;
mod ask;
mod assets;
mod attempts;
mod chart;
mod fleet;
mod form;
mod guard;
mod history;
mod live;
mod login;
mod origin;
mod page;
mod password;
mod router;
mod runs;
mod secret;
mod server;
mod session;
mod text;
mod view;

use std::future::Future;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::clock::{Clock, SystemClock};
use crate::mapper::Mapper;

pub use access::{Access, Invitations};
pub use history::History;
pub use origin::{InvalidUrl, PublicUrl};
pub use password::{InvalidHash, PasswordError, PasswordHash};

use origin::Origins;
use router::Tower;

/// The pages of one mapper, before they are served.
#[derive(Debug)]
pub struct ControlTower {
    mapper: Mapper,
    history: History,
    access: Access,
    clock: Arc<dyn Clock>,
    public: Option<PublicUrl>,
    allow_requests: bool,
}

/// Why pages cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// Others than this machine could reach the address, and it is not said by which URL they do.
    #[error("{0} can be reached from other machines: their browsers' URL has to be given")]
    NoPublicUrl(std::net::SocketAddr),
    /// The address cannot be used.
    #[error("cannot listen")]
    Listen(#[from] std::io::Error),
}

impl ControlTower {
    /// The pages of this mapper, for those who have access. `history` is what the mapper was built with
    /// ([`History::hook`]); without that the pages know only what the mapper knows at the moment.
    pub fn new(mapper: Mapper, history: History, access: Access) -> Self {
        Self { mapper, history, access, clock: Arc::new(SystemClock), public: None, allow_requests: false }
    }

    /// Whether the pages send requests; they only show what is there by default.
    #[must_use]
    pub fn allow_requests(mut self, allow: bool) -> Self {
        self.allow_requests = allow;
        self
    }

    /// The URL that browsers use, where it is not the address that is listened at: behind a proxy that speaks TLS, say. With an
    /// https URL the cookies are for TLS only.
    #[must_use]
    pub fn public_url(mut self, url: PublicUrl) -> Self {
        self.public = Some(url);
        self
    }

    /// The clock; the system's by default. It should be the mapper's.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Serves the pages until `shutdown` ends; then what is open is closed.
    ///
    /// # Errors
    /// [`AdminError`] when the address cannot be used, or can be reached from other machines and no public URL is given.
    pub async fn serve(self, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<(), AdminError> {
        let origins = Origins::of(listener.local_addr()?, self.public.as_ref())?;
        let tower = Arc::new(Tower::new(self, origins));
        server::serve(tower, listener, shutdown).await;
        Ok(())
    }
}
