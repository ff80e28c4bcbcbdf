//! Actors: services with handlers, what a handler gets and what it returns.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{Future, ready};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

use crate::clock::Timestamp;
use crate::packet::{Failure, FailureCode, Identity, Intermediate, Payload, Service, Tag, Token};
use crate::policy::Caller;
use crate::proxy::MapperProxy;
use crate::serializer::Verified;

/// What a handler returns; [`reply`] makes a successful one.
pub type HandlerResult<T> = Result<T, Failure>;

/// A successful [`HandlerResult`]: `Ok(value)` with a fixed error type, so that closures need no type annotation.
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

/// The request that a handler works on, and a way to send intermediate results. Cloning it is cheap.
///
/// ```
/// use nanite::agent::{Context, HandlerResult, reply};
///
/// /// Offered by `actor("count").expose("to", count_to)`.
/// async fn count_to(last: u32, context: Context) -> HandlerResult<String> {
///     for number in 1..=last {
///         context.emit("counted", number).await?;
///     }
///     reply(format!("done for {}", context.caller()))
/// }
/// # let _ = nanite::agent::actor("count").expose("to", count_to);
/// ```
#[derive(Clone)]
pub struct Context(Arc<RequestContext>);

pub(super) struct RequestContext {
    pub service: Service,
    pub token: Option<Token>,
    pub tags: Vec<Tag>,
    pub sender: Identity,
    pub signer: Option<Verified>,
    pub on_behalf_of: Option<Identity>,
    pub deadline: Option<Timestamp>,
    pub started_at: Timestamp,
    pub proxy: MapperProxy,
    /// Takes intermediate results; none for a push.
    pub intermediates: Option<mpsc::Sender<IntermediateResult>>,
}

/// An intermediate result to be sent.
pub(super) struct IntermediateResult {
    pub key: String,
    pub value: Payload,
}

impl Context {
    pub(super) fn new(request: RequestContext) -> Self {
        Self(Arc::new(request))
    }

    /// The requested service.
    pub fn service(&self) -> &Service {
        &self.0.service
    }

    /// The node that made the request: an agent that sent it through a mapper, or else the mapper itself.
    pub fn caller(&self) -> &Identity {
        self.0.on_behalf_of.as_ref().unwrap_or(&self.0.sender)
    }

    /// The mapper that sent the request to this agent.
    pub fn sender(&self) -> &Identity {
        &self.0.sender
    }

    /// What was verified about the sender; `None` with a plain serializer.
    pub fn signer(&self) -> Option<&Verified> {
        self.0.signer.as_ref()
    }

    /// The token of the request.
    pub fn token(&self) -> Option<Token> {
        self.0.token
    }

    /// The tags in the request.
    pub fn tags(&self) -> &[Tag] {
        &self.0.tags
    }

    /// When the caller stops waiting; the handler is dropped then.
    pub fn deadline(&self) -> Option<Timestamp> {
        self.0.deadline
    }

    /// The time between the start of the handler and the deadline.
    pub fn time_allowed(&self) -> Option<Duration> {
        self.0.deadline.map(|deadline| deadline.since(self.0.started_at))
    }

    /// Sends requests to other agents, through a mapper, in this agent's name.
    ///
    /// ```
    /// use nanite::agent::{Context, HandlerResult, reply};
    ///
    /// /// How many other agents answer.
    /// async fn count_agents((): (), context: Context) -> HandlerResult<usize> {
    ///     let answers = context.proxy().request("/agent/echo", "hello").await?;
    ///     reply(answers.results().count())
    /// }
    /// # let _ = nanite::agent::actor("fleet").expose("count", count_agents);
    /// ```
    pub fn proxy(&self) -> &MapperProxy {
        &self.0.proxy
    }

    /// Whether the caller waits for an answer: false for a push.
    pub fn wants_answer(&self) -> bool {
        self.0.intermediates.is_some()
    }

    /// Sends an intermediate result with a key to the caller. They arrive in order. Waits while earlier ones are being sent. Does
    /// nothing for a push.
    ///
    /// # Errors
    /// A [`Failure`] if the value cannot be encoded, or the request has ended.
    pub async fn emit(&self, key: impl Into<String>, value: impl Serialize) -> HandlerResult<()> {
        let result = Self::intermediate(key, value)?;
        match &self.0.intermediates {
            Some(intermediates) => intermediates.send(result).await.map_err(|_| Self::request_ended()),
            None => Ok(()),
        }
    }

    /// Sends an intermediate result with the default key. As [`Context::emit`] otherwise.
    ///
    /// # Errors
    /// As [`Context::emit`].
    pub async fn emit_value(&self, value: impl Serialize) -> HandlerResult<()> {
        self.emit(Intermediate::DEFAULT_KEY, value).await
    }

    /// [`Context::emit`] for blocking handlers.
    ///
    /// # Errors
    /// As [`Context::emit`].
    pub fn emit_blocking(&self, key: impl Into<String>, value: impl Serialize) -> HandlerResult<()> {
        let result = Self::intermediate(key, value)?;
        match &self.0.intermediates {
            Some(intermediates) => intermediates.blocking_send(result).map_err(|_| Self::request_ended()),
            None => Ok(()),
        }
    }

    pub(super) fn started_at(&self) -> Timestamp {
        self.0.started_at
    }

    pub(super) fn policy_caller(&self) -> Caller<'_> {
        Caller::new(&self.0.sender, self.0.signer.as_ref()).on_behalf_of(self.0.on_behalf_of.as_ref())
    }

    fn intermediate(key: impl Into<String>, value: impl Serialize) -> HandlerResult<IntermediateResult> {
        Ok(IntermediateResult { key: key.into(), value: encode(value)? })
    }

    fn request_ended() -> Failure {
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

/// Something that offers services. The plug-in point behind [`actor`] and [`ProgramActors`](super::ProgramActors).
///
/// `call` is called only for services that `services` lists. The caller was verified and authorized, but the payload can be any
/// value. The future is dropped when the deadline passes. A panic is caught and becomes a failure.
///
/// ```
/// use nanite::agent::{Actor, Context, HandlerResult};
/// use nanite::packet::{Payload, Service};
///
/// /// Offers /mirror/NAME for every NAME; each returns its payload.
/// #[derive(Debug)]
/// struct Mirror(Vec<Service>);
///
/// #[async_trait::async_trait]
/// impl Actor for Mirror {
///     fn services(&self) -> Vec<Service> {
///         self.0.clone()
///     }
///
///     async fn call(&self, _service: &Service, payload: Payload, _context: Context) -> HandlerResult<Payload> {
///         Ok(payload)
///     }
/// }
/// ```
#[async_trait]
pub trait Actor: fmt::Debug + Send + Sync {
    /// The services it offers now, such as `/simple/echo`.
    fn services(&self) -> Vec<Service>;

    /// Handles one request.
    async fn call(&self, service: &Service, payload: Payload, context: Context) -> HandlerResult<Payload>;

    /// Called for every failure, including panics, before it is sent to the caller.
    fn on_exception(&self, _service: &Service, _failure: &Failure) {}

    /// Changes whenever `services` does; `None` if it never does.
    fn changes(&self) -> Option<watch::Receiver<u64>> {
        None
    }

    /// Checks the actor when the agent starts.
    ///
    /// # Errors
    /// [`ExposeError`] for the first service that cannot be exposed.
    fn check(&self) -> Result<(), ExposeError> {
        Ok(())
    }
}

#[async_trait]
impl<A: Actor + ?Sized> Actor for Arc<A> {
    fn services(&self) -> Vec<Service> {
        (**self).services()
    }

    async fn call(&self, service: &Service, payload: Payload, context: Context) -> HandlerResult<Payload> {
        (**self).call(service, payload, context).await
    }

    fn on_exception(&self, service: &Service, failure: &Failure) {
        (**self).on_exception(service, failure);
    }

    fn changes(&self) -> Option<watch::Receiver<u64>> {
        (**self).changes()
    }

    fn check(&self) -> Result<(), ExposeError> {
        (**self).check()
    }
}

/// An actor made of handlers with a common prefix: `actor("simple").expose("echo", ..)` offers `/simple/echo`.
///
/// An invalid or duplicate name is reported by [`AgentBuilder::start`](super::AgentBuilder::start).
///
/// ```
/// use nanite::agent::{actor, reply};
///
/// let math = actor("math")
///     .expose("sum", |numbers: Vec<i64>| async move { reply(numbers.iter().sum::<i64>()) })
///     .expose_blocking("square", |number: u64| reply(number * number))
///     .on_exception(|service, failure| eprintln!("{service}: {failure}"));
/// # drop(math);
/// ```
pub fn actor(prefix: impl Into<String>) -> Handlers {
    Handlers { prefix: prefix.into(), handlers: BTreeMap::new(), on_exception: None, error: None }
}

type BoxedHandler = Arc<dyn Fn(Payload, Context) -> BoxFuture<'static, HandlerResult<Payload>> + Send + Sync>;
type ExceptionHook = Box<dyn Fn(&Service, &Failure) + Send + Sync>;

/// Handlers with a common prefix, as an [`Actor`]. See [`actor`].
pub struct Handlers {
    prefix: String,
    handlers: BTreeMap<Service, BoxedHandler>,
    on_exception: Option<ExceptionHook>,
    error: Option<ExposeError>,
}

/// Why a handler cannot be exposed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExposeError {
    /// Two handlers have the same service name.
    #[error("{0} is exposed twice")]
    Duplicate(Service),
    /// The prefix and the name do not form a service name.
    #[error("/{0} is not a valid service name")]
    InvalidName(String),
}

impl Handlers {
    /// Exposes an asynchronous [`Handler`]. The service `/PREFIX/index` is also called `/PREFIX`.
    #[must_use]
    pub fn expose<Args>(self, name: &str, handler: impl Handler<Args>) -> Self {
        self.add(name, Arc::new(move |payload, context| handler.call(payload, context)))
    }

    /// Exposes a [`BlockingHandler`], for work that blocks or computes for long: it runs on a worker thread.
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

    /// Sets a function that is called for every failure, including panics, before it is sent to the caller.
    #[must_use]
    pub fn on_exception(mut self, hook: impl Fn(&Service, &Failure) + Send + Sync + 'static) -> Self {
        self.on_exception = Some(Box::new(hook));
        self
    }

    fn add(mut self, name: &str, handler: BoxedHandler) -> Self {
        let path = format!("{}/{name}", self.prefix);
        match format!("/{path}").parse::<Service>() {
            Ok(service) => {
                if self.handlers.insert(service.clone(), handler).is_some() {
                    self.error.get_or_insert(ExposeError::Duplicate(service));
                }
            }
            Err(_) => {
                self.error.get_or_insert(ExposeError::InvalidName(path));
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
        self.error.clone().map_or(Ok(()), Err)
    }
}

/// An asynchronous handler: a function or closure of `(payload)` or `(payload, Context)`. The payload is any type that implements
/// `Deserialize`. It returns a `Result` of anything that implements `Serialize`, with any error type or [`Failure`].
#[diagnostic::on_unimplemented(
    message = "this is not a handler",
    label = "not a handler",
    note = "a handler is `|payload: T| async {{ .. }}` or `|payload: T, context: Context| async {{ .. }}`; T implements \
            Deserialize, and it returns Result<R, E> where R: Serialize and E: Into<Failure> (any error type)"
)]
pub trait Handler<Args>: Send + Sync + 'static {
    /// Handles one request.
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
        boxed(parse(payload).map(self))
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
        boxed(parse(payload).map(|payload| self(payload, context)))
    }
}

fn boxed<Fut, R, E>(future: HandlerResult<Fut>) -> BoxFuture<'static, HandlerResult<Payload>>
where
    Fut: Future<Output = Result<R, E>> + Send + 'static,
    R: Serialize,
    E: Into<Failure>,
{
    match future {
        Ok(future) => Box::pin(async move { encode_result(future.await) }),
        Err(failure) => Box::pin(ready(Err(failure))),
    }
}

/// A blocking handler: a function or closure of `(payload)` or `(payload, Context)`, with types as in [`Handler`].
#[diagnostic::on_unimplemented(
    message = "this is not a blocking handler",
    label = "not a blocking handler",
    note = "a blocking handler is `|payload: T| ..` or `|payload: T, context: Context| ..`; T implements Deserialize, and it \
            returns Result<R, E> where R: Serialize and E: Into<Failure> (any error type)"
)]
pub trait BlockingHandler<Args>: Send + Sync + 'static {
    /// Handles one request; may block.
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
        encode_result(self(parse(payload)?))
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
        encode_result(self(parse(payload)?, context))
    }
}

fn parse<P: DeserializeOwned>(payload: Payload) -> HandlerResult<P> {
    payload.parse().map_err(|error| Failure::new(FailureCode::BadPayload, error.to_string()))
}

fn encode_result<R: Serialize, E: Into<Failure>>(result: Result<R, E>) -> HandlerResult<Payload> {
    encode(result.map_err(Into::into)?)
}

fn encode(value: impl Serialize) -> HandlerResult<Payload> {
    Payload::new(value).map_err(|error| Failure::new(FailureCode::BadAnswer, error.to_string()))
}
