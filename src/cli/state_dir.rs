//! The state directory: generated node names, and the round-robin state of `nanite request`, from one run to the next.
//!
//! It is `$XDG_STATE_HOME/nanite` (`~/.local/state/nanite`), accessible to its owner only. It holds nothing secret.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::error::{CliError, Result};
use crate::certs::files;
use crate::packet::{Identity, Role, Service, Token};

/// For how many services the round-robin state is saved.
const MAX_SERVICES: usize = 256;

/// The directory; none if the environment names neither it nor a home directory.
pub(super) fn directory() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
    Some(state.join("nanite"))
}

/// Opens a file, neither through a link nor waiting for the other end of a pipe.
pub(super) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed()).open(path)
}

/// The generated name of this user's node of a role. It is saved: a new name at every start would leave a queue behind each time.
pub(super) fn generated_name(role: Role) -> Result<Identity> {
    let result = match directory() {
        Some(directory) => generated_name_in(&directory, role),
        None => Err("neither XDG_STATE_HOME nor HOME is set".to_owned()),
    };
    result.map_err(|why| {
        CliError::usage(format!("no `--token` is given, and a generated name cannot be saved: {why}"))
            .help("give a name: `--token NAME`")
    })
}

fn generated_name_in(directory: &Path, role: Role) -> Result<Identity, String> {
    let path = directory.join(format!("{role}-token"));
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let identity = |text: String| {
        let identity = Identity::new(role, text.trim_end());
        identity.map_err(|error| format!("{} does not hold a name: {error}", path.display()))
    };
    match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        text => return identity(text.map_err(failed)?),
    }
    let token = Token::random().map_err(|error| error.to_string())?.to_string();
    let name: String = token.chars().take(16).collect();
    let written = files::create_directory(directory)
        .and_then(|()| files::write(&path, format!("{name}\n").as_bytes(), files::SECRET, false));
    match written {
        // Another process has just written its name.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            identity(std::fs::read_to_string(&path).map_err(failed)?)
        }
        written => written.map_err(failed).and_then(|()| identity(name)),
    }
}

/// The last agent of each service, so that round robin continues from one run to the next.
pub(super) struct RoundRobinState {
    path: Option<PathBuf>,
    last: BTreeMap<Service, Identity>,
}

impl RoundRobinState {
    /// Reads the state. If it cannot be read, each service starts with its first agent.
    pub(super) fn load() -> Self {
        Self::at(directory().map(|directory| directory.join("turns.json")))
    }

    fn at(path: Option<PathBuf>) -> Self {
        let text = path.as_ref().and_then(|path| std::fs::read(path).ok());
        let last = text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { path, last }
    }

    /// The last agent of a service.
    pub(super) fn last(&self, service: &Service) -> Option<&Identity> {
        self.last.get(&service.resolved())
    }

    /// Saves the last agent of a service.
    pub(super) fn save(mut self, service: &Service, agent: &Identity) {
        let service = service.resolved();
        if self.last.len() >= MAX_SERVICES && !self.last.contains_key(&service) {
            self.last.pop_first();
        }
        self.last.insert(service, agent.clone());
        let Some(path) = &self.path else { return };
        let saved = serde_json::to_vec(&self.last).map_err(io::Error::other).and_then(|text| {
            files::create_directory(path.parent().unwrap_or(path))?;
            files::write(path, &text, files::SECRET, true)
        });
        if let Err(error) = saved {
            tracing::info!(path = %path.display(), %error, "failed to save round-robin state");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn n16_generated_name_is_saved() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("deep/nanite");
        let agent = generated_name_in(&directory, Role::Agent).unwrap();
        assert_eq!(generated_name_in(&directory, Role::Agent).unwrap(), agent);
        assert_ne!(generated_name_in(&directory, Role::Mapper).unwrap().name(), agent.name());
        let path = directory.join("agent-token");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "../x").unwrap();
        assert!(generated_name_in(&directory, Role::Agent).unwrap_err().contains("does not hold a name"));
    }

    #[test]
    fn n05_round_robin_state_is_saved_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nanite/turns.json");
        let state = || RoundRobinState::at(Some(path.clone()));
        let service: Service = "/simple".parse().unwrap();
        let fred = Identity::agent("fred").unwrap();
        assert_eq!(state().last(&service), None);
        state().save(&service, &fred);
        assert_eq!(state().last(&"/simple/index".parse().unwrap()), Some(&fred));
        for n in 0..MAX_SERVICES + 10 {
            state().save(&format!("/many/s{n}").parse().unwrap(), &fred);
        }
        assert_eq!(state().last.len(), MAX_SERVICES);
        std::fs::write(&path, "rubbish").unwrap();
        assert_eq!(state().last(&service), None);
    }
}
