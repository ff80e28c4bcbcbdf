//! n20: the Control Tower, over HTTP as an attacker uses it, in a real browser, and as a program.

mod browser;
mod forwarded;
mod http;
mod program;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nanite::admin::{Access, ControlTower, History, Invitations, PasswordHash};
use nanite::agent::{Actor, Context, actor, reply};
use nanite::clock::{Clock, ManualClock, SystemClock, Timestamp};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, FailureCode, Payload};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

use crate::harness::system::System;
use crate::harness::web;

/// A Control Tower with an in-memory broker.
struct Site {
    system: System,
    mapper: Mapper,
    invitations: Invitations,
    clock: Arc<ManualClock>,
    port: u16,
    serving: AbortHandle,
}

impl Drop for Site {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// A clock that the test controls.
#[derive(Debug)]
struct SharedClock(Arc<ManualClock>);

impl Clock for SharedClock {
    fn now(&self) -> Timestamp {
        self.0.now()
    }
}

impl Site {
    /// A tower with invitations that allows requests.
    async fn new() -> Self {
        Self::with(System::secure(), None, true).await
    }

    async fn with(system: System, password: Option<&str>, allow_requests: bool) -> Self {
        Self::configured(system, password, |tower| tower.allow_requests(allow_requests)).await
    }

    async fn configured(
        system: System,
        password: Option<&str>,
        configure: impl FnOnce(ControlTower) -> ControlTower,
    ) -> Self {
        let history = History::default();
        let mapper = system.mapper("tower").on_agent(history.hook()).start().await.unwrap();
        let invitations = Invitations::default();
        let access = match password {
            Some(password) => Access::Password(PasswordHash::new(password).unwrap()),
            None => Access::Invited(invitations.clone()),
        };
        let clock = Arc::new(ManualClock::new(SystemClock.now()));
        let tower = ControlTower::new(mapper.clone(), history, access);
        let tower = configure(tower.clock(SharedClock(clock.clone())));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(tower.serve(listener, std::future::pending())).abort_handle();
        Self { system, mapper, invitations, clock, port, serving }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn get(&self, path: &str, headers: &str) -> web::Answer {
        web::get(self.port, path, headers)
    }

    fn post(&self, path: &str, headers: &str, form: &[(&str, &str)]) -> web::Answer {
        web::post(self.port, path, headers, form)
    }

    /// Logs in with an invitation. Returns the header line with the session cookie.
    fn logged_in(&self) -> String {
        let answer = self.get(&self.invitations.issue().unwrap(), "");
        assert_eq!((answer.status, answer.header("location")), (303, "/"), "{answer:?}");
        format!("Cookie: {}\r\n", answer.cookie("nanite-").unwrap())
    }
}

/// Texts that try to be markup, to end an attribute or a raw element, or to reorder the text around them.
const HOSTILE: [&str; 5] = [
    "<script>window.ran = 1</script>",
    "\"><img src=x onerror='window.ran = 1'>",
    "</textarea></pre></title></style><svg onload=window.ran=1>",
    "'; window.ran = 1; //",
    "a\u{202e}b &lt;b&gt; {{ 7 * 7 }} %3Cb%3E",
];

/// The actor of the agents in these tests. `ran` counts the calls of `echo`.
fn work(ran: &Arc<AtomicUsize>) -> impl Actor + use<> {
    let count = ran.clone();
    let echo = move |value: Payload| {
        count.fetch_add(1, Ordering::SeqCst);
        async move { reply(value) }
    };
    actor("work")
        .expose("echo", echo)
        .expose("steps", async |count: u64, context: Context| {
            for step in 1..=count {
                context.emit("step", step).await?;
            }
            reply(format!("{count} steps"))
        })
        .expose("wait", async |(): ()| {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            reply(())
        })
        .expose("hostile", async |which: usize, context: Context| {
            let text = HOSTILE[which];
            context.emit(text, text).await?;
            context.emit("map", serde_json::json!({text: [text]})).await?;
            Err::<(), _>(Failure::new(FailureCode::Other(text.into()), text))
        })
}

fn counter() -> Arc<AtomicUsize> {
    Arc::default()
}
