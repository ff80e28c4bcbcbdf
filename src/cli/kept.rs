//! What the program remembers from one run to the next: names that nobody chose, and whose turn it is.
//!
//! It is kept in `$XDG_STATE_HOME/nanite` (`~/.local/state/nanite`), for its owner only. Nothing that is secret is kept there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::error::{CliError, Exit};
use crate::certs::files;
use crate::packet::{Identity, Role, Service, Token};

/// For how many services it is remembered whose turn it is.
const TURNS: usize = 256;

/// The directory; none when the environment says no place.
pub(super) fn directory() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
    Some(state.join("nanite"))
}

/// The name of this user's node of a role, for those who gave none: made once, and kept.
///
/// # Errors
/// [`CliError`] when it cannot be kept: a name that changes at every start would leave a queue behind each time.
pub(super) fn token(role: Role) -> Result<Identity, CliError> {
    let failed = |why: String| {
        CliError::new(Exit::Usage, format!("no `--token` is given, and a name cannot be kept: {why}"))
            .help("give one: `--token NAME`")
    };
    let directory = directory().ok_or_else(|| failed("neither XDG_STATE_HOME nor HOME says where".into()))?;
    token_in(&directory, role).map_err(failed)
}

fn token_in(directory: &Path, role: Role) -> Result<Identity, String> {
    let path = directory.join(format!("{role}-token"));
    let read = || -> std::io::Result<String> { std::fs::read_to_string(&path) };
    let of_file = |text: String| {
        Identity::new(role, text.trim_end()).map_err(|error| format!("{} holds no name: {error}", path.display()))
    };
    match read() {
        Ok(text) => return of_file(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(format!("{}: {error}", path.display())),
    }
    let made = Token::random().map_err(|error| error.to_string())?.to_string();
    let short: String = made.chars().take(16).collect();
    let written = files::create_directory(directory)
        .and_then(|()| files::write(&path, format!("{short}\n").as_bytes(), files::SECRET, false));
    match written {
        Ok(()) => Identity::new(role, &short).map_err(|error| error.to_string()),
        // Another process was faster: its name counts.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            read().map_err(|error| error.to_string()).and_then(of_file)
        }
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// Whose turn it was, service by service: so that round robin goes on from one run to the next.
pub(super) struct Turns {
    path: Option<PathBuf>,
    last: BTreeMap<Service, Identity>,
}

impl Turns {
    /// Reads them. What cannot be read counts as nothing: then a service begins with its first agent.
    pub(super) fn load() -> Self {
        Self::at(directory().map(|directory| directory.join("turns.json")))
    }

    fn at(path: Option<PathBuf>) -> Self {
        let text = path.as_ref().and_then(|path| std::fs::read(path).ok());
        let last = text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { path, last }
    }

    /// Who had the last turn.
    pub(super) fn last(&self, service: &Service) -> Option<&Identity> {
        self.last.get(&service.resolved())
    }

    /// Notes who had a turn.
    pub(super) fn took(mut self, service: &Service, agent: &Identity) {
        let service = service.resolved();
        if self.last.len() >= TURNS && !self.last.contains_key(&service) {
            self.last.pop_first();
        }
        self.last.insert(service, agent.clone());
        let Some(path) = &self.path else { return };
        let kept = serde_json::to_vec(&self.last).map_err(std::io::Error::other).and_then(|text| {
            files::create_directory(path.parent().unwrap_or(path))?;
            files::write(path, &text, files::SECRET, true)
        });
        if let Err(error) = kept {
            tracing::info!(path = %path.display(), %error, "whose turn it was cannot be kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn n16_a_name_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("deep/nanite");
        let agent = token_in(&directory, Role::Agent).unwrap();
        assert_eq!(token_in(&directory, Role::Agent).unwrap(), agent);
        assert_ne!(token_in(&directory, Role::Mapper).unwrap().name(), agent.name());
        let path = directory.join("agent-token");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "../x").unwrap();
        assert!(token_in(&directory, Role::Agent).unwrap_err().contains("holds no name"));
    }

    #[test]
    fn n05_whose_turn_it_was_is_kept_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nanite/turns.json");
        let turns = || Turns::at(Some(path.clone()));
        let service: Service = "/simple".parse().unwrap();
        let fred = Identity::agent("fred").unwrap();
        assert_eq!(turns().last(&service), None);
        turns().took(&service, &fred);
        assert_eq!(turns().last(&"/simple/index".parse().unwrap()), Some(&fred));
        for n in 0..TURNS + 10 {
            turns().took(&format!("/many/s{n}").parse().unwrap(), &fred);
        }
        assert_eq!(turns().last.len(), TURNS);
        std::fs::write(&path, "rubbish").unwrap();
        assert_eq!(turns().last(&service), None);
    }
}
