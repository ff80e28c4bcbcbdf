//! What a handler is told beside the payload, and its way to answer before it is done.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;

use super::HandlerResult;
use crate::clock::Timestamp;
use crate::packet::{Failure, FailureCode, Identity, Intermediate, Payload, Service, Tag, Token};
use crate::policy::Caller;
use crate::proxy::MapperProxy;
use crate::serializer::Verified;

/// What a handler is told of the request, and its way to send intermediate results. Cloning it is cheap.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

pub(super) struct Inner {
    pub service: Service,
    pub token: Option<Token>,
    pub tags: Vec<Tag>,
    pub sender: Identity,
    pub signer: Option<Verified>,
    pub on_behalf_of: Option<Identity>,
    pub deadline: Option<Timestamp>,
    pub now: Timestamp,
    pub proxy: MapperProxy,
    /// Where intermediate results go; none for a push.
    pub emitter: Option<mpsc::Sender<Emitted>>,
}

/// An intermediate result on its way out of a handler.
pub(super) struct Emitted {
    pub key: String,
    pub value: Payload,
}

impl Context {
    pub(super) fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    /// The service that was asked for.
    pub fn service(&self) -> &Service {
        &self.0.service
    }

    /// Who wants it done: the agent that asked through a mapper, or else the mapper itself.
    pub fn caller(&self) -> &Identity {
        self.0.on_behalf_of.as_ref().unwrap_or(&self.0.sender)
    }

    /// The mapper that sent the request.
    pub fn sender(&self) -> &Identity {
        &self.0.sender
    }

    /// What was verified of the sender; none with a plain serializer.
    pub fn signer(&self) -> Option<&Verified> {
        self.0.signer.as_ref()
    }

    /// The token of the request.
    pub fn token(&self) -> Option<Token> {
        self.0.token
    }

    /// The tags that the request asked for.
    pub fn tags(&self) -> &[Tag] {
        &self.0.tags
    }

    /// When the answer is no longer wanted; the handler is dropped then.
    pub fn deadline(&self) -> Option<Timestamp> {
        self.0.deadline
    }

    /// How much time there was when the handler began.
    pub fn time_allowed(&self) -> Option<Duration> {
        self.0.deadline.map(|deadline| deadline.since(self.0.now))
    }

    /// Has other agents do something, through a mapper, in this agent's name.
    pub fn proxy(&self) -> &MapperProxy {
        &self.0.proxy
    }

    /// Whether somebody waits for an answer: false for a push.
    pub fn wants_answer(&self) -> bool {
        self.0.emitter.is_some()
    }

    /// Sends an intermediate result about `key` to the caller, in order. Waits while earlier ones are still on their way. For a
    /// push, where nobody waits, it does nothing.
    ///
    /// # Errors
    /// A [`Failure`] when the value cannot be expressed, or the request has ended.
    pub async fn emit(&self, key: impl Into<String>, value: impl Serialize) -> HandlerResult<()> {
        let emitted = Self::emitted(key.into(), value)?;
        match &self.0.emitter {
            Some(emitter) => emitter.send(emitted).await.map_err(|_| Self::ended()),
            None => Ok(()),
        }
    }

    /// Sends an intermediate result without a key of its own.
    ///
    /// # Errors
    /// As [`Context::emit`].
    pub async fn emit_value(&self, value: impl Serialize) -> HandlerResult<()> {
        self.emit(Intermediate::DEFAULT_KEY, value).await
    }

    /// The same as [`Context::emit`], for handlers that block.
    ///
    /// # Errors
    /// As [`Context::emit`].
    pub fn emit_blocking(&self, key: impl Into<String>, value: impl Serialize) -> HandlerResult<()> {
        let emitted = Self::emitted(key.into(), value)?;
        match &self.0.emitter {
            Some(emitter) => emitter.blocking_send(emitted).map_err(|_| Self::ended()),
            None => Ok(()),
        }
    }

    /// The caller, as a policy sees it.
    pub(super) fn as_caller(&self) -> Caller<'_> {
        let mut caller = Caller::new(&self.0.sender, self.0.signer.as_ref());
        caller.on_behalf_of = self.0.on_behalf_of.as_ref();
        caller
    }

    fn emitted(key: String, value: impl Serialize) -> HandlerResult<Emitted> {
        let value = Payload::new(value).map_err(|error| Failure::new(FailureCode::BadAnswer, error.to_string()))?;
        Ok(Emitted { key, value })
    }

    fn ended() -> Failure {
        Failure::new(FailureCode::TimedOut, "the request has ended")
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("service", &self.0.service)
            .field("caller", self.caller())
            .field("token", &self.0.token)
            .finish_non_exhaustive()
    }
}
