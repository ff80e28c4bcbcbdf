//! A web program with a mapper: HTTP in front, agents behind. `POST /text/upper` with a JSON body becomes a request to that service,
//! and the HTTP response is its result.
//!
//!     cargo run --features admin --example http_front          prints the address, and serves until it is stopped
//!     curl --data '"hello"' http://127.0.0.1:PORT/text/upper
//!
//! It listens on 127.0.0.1 only, and every local user may request every service: put your own authentication in front.

mod common;

use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::routing::post;
use axum::{Json, Router};
use nanite::agent::{actor, reply};
use nanite::mapper::Mapper;
use nanite::packet::FailureCode;
use nanite::request::RequestError;
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> common::Result<()> {
    let world = common::World::new()?;
    let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
    let agent = world.agent("worker").await?.actor(text).start().await?;
    let mapper = world.mapper("web").await?.request_timeout(Duration::from_secs(10)).start().await?;
    common::wait_for_agents(&mapper, 1).await?;
    let app = Router::new().fallback_service(post(ask).with_state(mapper));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("http://{}", listener.local_addr()?);
    let stopped = async { drop(tokio::signal::ctrl_c().await) };
    axum::serve(listener, app).with_graceful_shutdown(stopped).await?;
    agent.stop().await?;
    Ok(())
}

/// One HTTP request becomes one request to an agent: the path is the service.
async fn ask(State(mapper): State<Mapper>, uri: Uri, Json(payload): Json<Value>) -> (StatusCode, Json<Value>) {
    let outcome = match mapper.request(uri.path(), payload).await {
        Ok(answers) => answers.outcomes.into_values().next(),
        Err(RequestError::NoTarget(_) | RequestError::Service(_)) => {
            return (StatusCode::NOT_FOUND, Json(json!({ "error": "no such service" })));
        }
        Err(_) => None,
    };
    match outcome {
        Some(Ok(value)) => (StatusCode::OK, Json(value.0)),
        Some(Err(failure)) => {
            let status = match failure.code {
                FailureCode::Denied => StatusCode::FORBIDDEN,
                FailureCode::BadPayload => StatusCode::UNPROCESSABLE_ENTITY,
                FailureCode::TimedOut | FailureCode::Lost => StatusCode::GATEWAY_TIMEOUT,
                _ => StatusCode::BAD_GATEWAY,
            };
            (status, Json(json!({ "error": failure.message, "code": failure.code })))
        }
        None => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "error": "the agents cannot be reached" }))),
    }
}
