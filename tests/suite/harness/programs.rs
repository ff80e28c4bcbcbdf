//! A directory of programs, an agent that runs them, and what becomes of their processes.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nanite::agent::{Agent, ProgramActors, actor};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, FailureCode, Identity, Payload};
use nanite::request::{Event, Events};
use serde::Serialize;
use tempfile::TempDir;

use super::WAIT_TIMEOUT;
use super::system::{System, wait_until_known};

/// A program directory that only this user can write, whatever the umask is.
pub struct Programs(pub TempDir);

impl Programs {
    pub fn new(programs: &[(&str, &str)]) -> Self {
        let directory = Self(TempDir::new().unwrap());
        mode(directory.0.path(), 0o755);
        for (name, text) in programs {
            directory.install(name, text);
        }
        directory
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Installs a program atomically.
    pub fn install(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        let prefix = path.parent().unwrap();
        if !prefix.exists() {
            fs::create_dir(prefix).unwrap();
            mode(prefix, 0o755);
        }
        let new = prefix.join(".new");
        fs::write(&new, text).unwrap();
        mode(&new, 0o755);
        fs::rename(&new, &path).unwrap();
        path
    }

    pub fn actors(&self) -> ProgramActors {
        ProgramActors::open(self.0.path()).unwrap()
    }
}

pub fn mode(path: &Path, bits: u32) {
    fs::set_permissions(path, Permissions::from_mode(bits)).unwrap();
}

/// An agent that runs programs, and a mapper.
pub struct TestSystem {
    pub agent: Agent,
    pub mapper: Mapper,
    _system: System,
}

impl TestSystem {
    pub async fn new(system: System, actors: ProgramActors) -> Self {
        let alive = actor("test").expose("alive", |(): ()| async { Ok::<_, Failure>("yes") });
        let agent = system.agent("fred").actor(actors).actor(alive).drain(Duration::ZERO).start().await.unwrap();
        let mapper = system.mapper("m1").request_timeout(WAIT_TIMEOUT).start().await.unwrap();
        wait_until_known(&mapper, &["fred"]).await;
        Self { agent, mapper, _system: system }
    }

    pub async fn with(programs: &Programs) -> Self {
        Self::new(System::plain(), programs.actors()).await
    }

    /// The result of a program. The agent must still answer afterwards, whatever the result is.
    pub async fn request(&self, service: &str, payload: impl Serialize) -> Result<Payload, Failure> {
        let result = only(self.mapper.request(service, payload).await.unwrap().outcomes);
        assert_eq!(only(self.mapper.request("/test/alive", ()).await.unwrap().outcomes), Ok("yes".into()));
        result
    }

    pub async fn events(&self, service: &str, payload: impl Serialize, timeout: Duration) -> Events {
        self.mapper.request(service, payload).timeout(timeout).events().await.unwrap()
    }

    /// Waits until the mapper knows exactly these programs.
    pub async fn wait_for_services(&self, expected: &[&str]) {
        let offered = async || {
            let agents = self.mapper.agents().await.unwrap();
            let services = agents[0].services.iter().map(|service| service.to_string());
            services.filter(|service| service != "/test/alive").collect::<Vec<_>>()
        };
        let known = async {
            while offered().await != expected {
                let _ = tokio::time::timeout(Duration::from_millis(10), self.mapper.agent_registered()).await;
            }
        };
        if tokio::time::timeout(WAIT_TIMEOUT, known).await.is_err() {
            panic!("expected {expected:?}, offered are {:?}", offered().await);
        }
    }
}

pub fn only(outcomes: BTreeMap<Identity, Result<Payload, Failure>>) -> Result<Payload, Failure> {
    assert_eq!(outcomes.len(), 1);
    outcomes.into_values().next().unwrap()
}

pub fn failure(code: FailureCode, message: &str) -> Result<Payload, Failure> {
    Err(Failure::new(code, message))
}

/// The next intermediate result, as a process id.
pub async fn pid(events: &mut Events) -> u32 {
    match events.next().await {
        Some(Event::Intermediate { value, .. }) => value.parse().unwrap(),
        other => panic!("{other:?}"),
    }
}

pub async fn outcome(events: &mut Events) -> Result<Payload, Failure> {
    loop {
        match events.next().await {
            Some(Event::Outcome { result, .. }) => return result,
            Some(Event::Intermediate { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Waits until a process has ended. A zombie counts as ended unless it is our child, which must be reaped.
pub async fn wait_until_ended(pid: u32) {
    let ended = async {
        while let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) {
            let (_, rest) = stat.rsplit_once(") ").unwrap();
            let mut fields = rest.split(' ');
            let (state, parent) = (fields.next().unwrap(), fields.next().unwrap());
            if state == "Z" && parent != std::process::id().to_string() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let still_running = format!("process {pid} still runs");
    tokio::time::timeout(WAIT_TIMEOUT, ended).await.expect(&still_running);
}
