//! The way a request takes: from a mapper of this process to agents, or to one of the mappers that run.

use std::sync::Arc;
use std::time::Duration;

use super::error::CliError;
use super::fleet::{Fleet, close};
use super::node::Node;
use super::{ask, remedy};
use crate::packet::{Identity, Payload};
use crate::proxy::{MapperProxy, ProxyError};
use crate::request::Events;
use crate::transport::Transport;

/// An open way.
pub(super) enum Way {
    /// This process is the mapper.
    Own(Fleet),
    /// Another is.
    Mappers(Proxy),
}

/// A proxy and its connection.
pub(super) struct Proxy {
    proxy: MapperProxy,
    transport: Arc<dyn Transport>,
    broker: String,
}

impl Way {
    /// Connects.
    ///
    /// # Errors
    /// [`CliError`] when the broker cannot be reached or used.
    pub(super) async fn open(node: &Node, args: &ask::Args) -> Result<Self, CliError> {
        if !args.via_mapper {
            return Fleet::start(node).await.map(Self::Own);
        }
        let (transport, broker) = (node.connect().await?, node.broker());
        let started = MapperProxy::builder(node.serializer.clone(), transport.clone()).start().await;
        let proxy = started.map_err(|ProxyError::Transport(error)| remedy::transport(&error, Some(&broker)))?;
        Ok(Self::Mappers(Proxy { proxy, transport, broker }))
    }

    /// Sends a request; gives what comes of it.
    ///
    /// # Errors
    /// [`CliError`] when nobody got it.
    pub(super) async fn request(
        &mut self,
        args: &ask::Args,
        payload: Payload,
        timeout: Duration,
    ) -> Result<Events, CliError> {
        let sent = match self {
            Self::Own(fleet) => args.to_agents(fleet, payload, timeout).await?.timeout(timeout).events().await,
            Self::Mappers(proxy) => args.through(&proxy.proxy, payload).timeout(timeout).events().await,
        };
        sent.map_err(|error| remedy::request(&error, self.broker()))
    }

    /// Sends a push; gives who got it, as far as that is known.
    ///
    /// # Errors
    /// [`CliError`] when nobody got it.
    pub(super) async fn push(
        &mut self,
        args: &ask::Args,
        payload: Payload,
        limit: Duration,
    ) -> Result<Vec<Identity>, CliError> {
        let sent = match self {
            Self::Own(fleet) => args.to_agents(fleet, payload, limit).await?.push().await,
            Self::Mappers(proxy) => args.through(&proxy.proxy, payload).push().await,
        };
        sent.map_err(|error| remedy::request(&error, self.broker()))
    }

    /// The broker's URL, without a password.
    pub(super) fn broker(&self) -> &str {
        match self {
            Self::Own(fleet) => fleet.broker(),
            Self::Mappers(proxy) => &proxy.broker,
        }
    }

    /// Says goodbye to the broker.
    pub(super) async fn close(self) {
        match self {
            Self::Own(fleet) => fleet.close().await,
            Self::Mappers(proxy) => close(&proxy.transport).await,
        }
    }
}
