//! Actors: what an agent can do, as services with handlers.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{Future, ready};
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::Context;
use crate::packet::{Failure, FailureCode, Payload, Service};

/// What a handler returns. [`reply`] makes the successful one.
pub type HandlerResult<T> = Result<T, Failure>;

/// The successful result of a handler: `Ok(value)`, with the error type named, so that closures need no annotation.
///
/// ```
/// use nanite::agent::{actor, reply};
///
/// let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
/// # drop(text);
/// ```
pub fn reply<T>(value: T) -> HandlerResult<T> {
    Ok(value)
}

/// Something that offers services: the plug-in point behind [`actor`] and the program actors.
///
/// `call` is only called for services that `services` lists; its payload comes from a caller who was verified and authorised, but
/// is otherwise any value. A panic in it is caught and becomes a failure. It is dropped when the deadline passes.
#[async_trait]
pub trait Actor: fmt::Debug + Send + Sync {
    /// The services it offers now, such as `/simple/echo`.
    fn services(&self) -> Vec<Service>;

    /// Does the work.
    async fn call(&self, service: &Service, payload: Payload, context: Context) -> HandlerResult<Payload>;

    /// Told of every failure of a call, panics included, before it is sent to the caller.
    fn on_exception(&self, _service: &Service, _failure: &Failure) {}

    /// Changes whenever `services` does; none if it never does.
    fn changes(&self) -> Option<watch::Receiver<u64>> {
        None
    }

    /// What makes the actor unusable; reported when the agent starts.
    ///
    /// # Errors
    /// [`ExposeError`] is the first mistake in what it exposes.
    fn check(&self) -> Result<(), ExposeError> {
        Ok(())
    }
}

/// An actor made of handlers, under one prefix: `actor("simple").expose("echo", ..)` offers `/simple/echo`.
///
/// Mistakes (a name that is no path segment, a name exposed twice) are kept and reported by
/// [`AgentBuilder::start`](super::AgentBuilder::start).
pub fn actor(prefix: &str) -> Handlers {
    Handlers { prefix: prefix.to_owned(), handlers: BTreeMap::new(), on_exception: None, mistake: None }
}

type Call = Arc<dyn Fn(Payload, Context) -> BoxFuture<'static, HandlerResult<Payload>> + Send + Sync>;
type Hook = Box<dyn Fn(&Service, &Failure) + Send + Sync>;

/// See [`actor`].
pub struct Handlers {
    prefix: String,
    handlers: BTreeMap<Service, Call>,
    on_exception: Option<Hook>,
    mistake: Option<ExposeError>,
}

/// Why a handler cannot be exposed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExposeError {
    /// The name exists already.
    #[error("{0} is exposed twice")]
    Twice(Service),
    /// The prefix and the name make no service name.
    #[error("/{0} is no service name")]
    Name(String),
}

impl Handlers {
    /// Exposes a handler: `async |payload|` or `async |payload, context|`, where the payload is any type that can be
    /// deserialised; it returns a `Result` of anything serialisable. The name `index` also answers to the prefix alone.
    #[must_use]
    pub fn expose<Args>(self, name: &str, handler: impl Handler<Args>) -> Self {
        self.add(name, Arc::new(move |payload, context| handler.call(payload, context)))
    }

    /// Exposes a handler that blocks or computes for long: it runs on a thread of its own, off the reactor.
    #[must_use]
    pub fn expose_blocking<Args>(self, name: &str, handler: impl BlockingHandler<Args>) -> Self {
        let handler = Arc::new(handler);
        let call = move |payload, context| -> BoxFuture<'static, HandlerResult<Payload>> {
            let handler = handler.clone();
            Box::pin(async move {
                match tokio::task::spawn_blocking(move || handler.call(payload, context)).await {
                    Ok(result) => result,
                    Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    Err(_) => Err(Failure::new(FailureCode::Lost, "the agent is stopping")),
                }
            })
        };
        self.add(name, Arc::new(call))
    }

    /// Has this called with every failure of a handler, panics included, before it is sent to the caller.
    #[must_use]
    pub fn on_exception(mut self, hook: impl Fn(&Service, &Failure) + Send + Sync + 'static) -> Self {
        self.on_exception = Some(Box::new(hook));
        self
    }

    fn add(mut self, name: &str, handler: Call) -> Self {
        let path = format!("{}/{name}", self.prefix);
        match format!("/{path}").parse::<Service>() {
            Ok(service) => {
                if self.handlers.insert(service.clone(), handler).is_some() {
                    self.mistake.get_or_insert(ExposeError::Twice(service));
                }
            }
            Err(_) => {
                self.mistake.get_or_insert(ExposeError::Name(path));
            }
        }
        self
    }
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handlers").field("services", &self.handlers.keys()).finish_non_exhaustive()
    }
}

#[async_trait]
impl Actor for Handlers {
    fn services(&self) -> Vec<Service> {
        self.handlers.keys().cloned().collect()
    }

    async fn call(&self, service: &Service, payload: Payload, context: Context) -> HandlerResult<Payload> {
        match self.handlers.get(service) {
            Some(handler) => handler(payload, context).await,
            None => Err(Failure::new(FailureCode::NoSuchService, format!("no service {service} here"))),
        }
    }

    fn on_exception(&self, service: &Service, failure: &Failure) {
        if let Some(hook) = &self.on_exception {
            hook(service, failure);
        }
    }

    fn check(&self) -> Result<(), ExposeError> {
        self.mistake.clone().map_or(Ok(()), Err)
    }
}

/// An asynchronous handler: a closure of `(payload)` or `(payload, Context)`.
#[diagnostic::on_unimplemented(
    message = "this is no handler",
    label = "not a handler",
    note = "a handler is `|payload: T| async {{ .. }}` or `|payload: T, context: Context| async {{ .. }}`; T implements \
            Deserialize, and it returns Result<R, E> where R: Serialize and E: Into<Failure> (any error type)"
)]
pub trait Handler<Args>: Send + Sync + 'static {
    /// Does the work.
    fn call(&self, payload: Payload, context: Context) -> BoxFuture<'static, HandlerResult<Payload>>;
}

impl<F, P, Fut, R, E> Handler<(P,)> for F
where
    F: Fn(P) -> Fut + Send + Sync + 'static,
    P: DeserializeOwned,
    Fut: Future<Output = Result<R, E>> + Send + 'static,
    R: Serialize,
    E: Into<Failure>,
{
    fn call(&self, payload: Payload, _: Context) -> BoxFuture<'static, HandlerResult<Payload>> {
        running(parse(payload).map(self))
    }
}

impl<F, P, Fut, R, E> Handler<(P, Context)> for F
where
    F: Fn(P, Context) -> Fut + Send + Sync + 'static,
    P: DeserializeOwned,
    Fut: Future<Output = Result<R, E>> + Send + 'static,
    R: Serialize,
    E: Into<Failure>,
{
    fn call(&self, payload: Payload, context: Context) -> BoxFuture<'static, HandlerResult<Payload>> {
        running(parse(payload).map(|payload| self(payload, context)))
    }
}

fn running<Fut, R, E>(work: HandlerResult<Fut>) -> BoxFuture<'static, HandlerResult<Payload>>
where
    Fut: Future<Output = Result<R, E>> + Send + 'static,
    R: Serialize,
    E: Into<Failure>,
{
    match work {
        Ok(work) => Box::pin(async move { encode(work.await) }),
        Err(failure) => Box::pin(ready(Err(failure))),
    }
}

/// A handler that blocks: a closure of `(payload)` or `(payload, Context)`.
#[diagnostic::on_unimplemented(
    message = "this is no blocking handler",
    label = "not a blocking handler",
    note = "a blocking handler is `|payload: T| ..` or `|payload: T, context: Context| ..`; T implements Deserialize, and it \
            returns Result<R, E> where R: Serialize and E: Into<Failure> (any error type)"
)]
pub trait BlockingHandler<Args>: Send + Sync + 'static {
    /// Does the work; may block.
    fn call(&self, payload: Payload, context: Context) -> HandlerResult<Payload>;
}

impl<F, P, R, E> BlockingHandler<(P,)> for F
where
    F: Fn(P) -> Result<R, E> + Send + Sync + 'static,
    P: DeserializeOwned,
    R: Serialize,
    E: Into<Failure>,
{
    fn call(&self, payload: Payload, _: Context) -> HandlerResult<Payload> {
        encode(self(parse(payload)?))
    }
}

impl<F, P, R, E> BlockingHandler<(P, Context)> for F
where
    F: Fn(P, Context) -> Result<R, E> + Send + Sync + 'static,
    P: DeserializeOwned,
    R: Serialize,
    E: Into<Failure>,
{
    fn call(&self, payload: Payload, context: Context) -> HandlerResult<Payload> {
        encode(self(parse(payload)?, context))
    }
}

fn parse<P: DeserializeOwned>(payload: Payload) -> HandlerResult<P> {
    payload.parse().map_err(|error| Failure::new(FailureCode::BadPayload, error.to_string()))
}

fn encode<R: Serialize, E: Into<Failure>>(result: Result<R, E>) -> HandlerResult<Payload> {
    let value = result.map_err(Into::into)?;
    Payload::new(value).map_err(|error| Failure::new(FailureCode::BadAnswer, error.to_string()))
}
