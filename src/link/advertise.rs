//! Advertising a node to the mappers, and waiting for theirs.

use std::time::Duration;

use tokio::sync::watch;

use super::context::Link;
use super::send::{Outbound, SendError};
use crate::packet::Advertise;
use crate::serializer::Audience;
use crate::transport::{Destination, topology};

/// How long to wait for further mappers after one has answered.
const FURTHER_MAPPERS_TIMEOUT: Duration = Duration::from_millis(200);

impl Link {
    /// Advertises this node to the mappers, which answer with an advertise of their own. It contains no secret and needs no known peer.
    /// Does nothing when this node does not learn peers from messages.
    ///
    /// # Errors
    /// [`SendError`] when it could not be sent: [`Unroutable`](crate::transport::TransportError::Unroutable) when no mapper runs.
    pub async fn announce_to_mappers(&self) -> Result<(), SendError> {
        if self.learns_peers() { self.advertise_to_mappers().await } else { Ok(()) }
    }

    /// Advertises this node to the mappers, also when it does not learn peers from messages: the mappers answer in any case.
    ///
    /// # Errors
    /// As [`announce_to_mappers`](Self::announce_to_mappers).
    pub(crate) async fn advertise_to_mappers(&self) -> Result<(), SendError> {
        let advertise = Advertise { serves_requests: self.serves_requests(), ..Advertise::default() };
        let registration = Destination::exchange(topology::REGISTRATION);
        self.send(Outbound::new(advertise, Audience::Mappers), registration).await?;
        Ok(())
    }
}

/// Waits until a mapper has advertised itself and others have had a moment to do so, at most until `limit` has passed: messages to the
/// mappers are encrypted for the known ones. `advertised` counts the advertises received.
pub(crate) async fn wait_for_mappers(mut advertised: watch::Receiver<u64>, limit: Duration) {
    let heard = async {
        if advertised.wait_for(|count| *count > 0).await.is_ok() {
            while matches!(tokio::time::timeout(FURTHER_MAPPERS_TIMEOUT, advertised.changed()).await, Ok(Ok(()))) {}
        }
    };
    if tokio::time::timeout(limit, heard).await.is_err() {
        tracing::debug!("no mapper has advertised itself");
    }
}
