//! Options of a node from the file `nanite.toml`, the environment and the command line; later ones win.
//!
//! The file is the one that `--config` or NANITE_CONFIG names, or else `nanite.toml` in the working directory, if there is one.
//! Paths in it are relative to it. What weakens security is not an option of the file: it has to be said each time.

use std::ffi::OsString;
use std::fs::{File as OpenFile, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};
use zeroize::Zeroizing;

use super::error::{CliError, Exit};
use super::text::without_passwords;
use super::{broker, duration, size};
use crate::packet::Tag;

/// The name of the file in the working directory.
const NAME: &str = "nanite.toml";
/// The longest file that is read, in bytes.
const MAX: u64 = 1024 * 1024;

/// What the file can say.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct File {
    pub token: Option<String>,
    pub certs: Option<PathBuf>,
    #[serde(deserialize_with = "secret")]
    pub broker: Option<Zeroizing<String>>,
    pub broker_password_file: Option<PathBuf>,
    pub broker_ca: Option<PathBuf>,
    pub broker_cert: Option<PathBuf>,
    pub broker_key: Option<PathBuf>,
    pub policy: Option<PathBuf>,
    pub audit: Option<PathBuf>,
    pub log: Option<String>,
    pub log_format: Option<super::logging::Format>,
    pub log_dir: Option<PathBuf>,
    pub pid_dir: Option<PathBuf>,
    pub agent: AgentSection,
    pub mapper: MapperSection,
    #[cfg_attr(not(feature = "admin"), allow(dead_code, reason = "one file for programs with and without it"))]
    pub admin: AdminSection,
}

/// What the file can say for agents alone.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct AgentSection {
    pub token: Option<String>,
    pub actors_dir: Option<PathBuf>,
    pub actors: Option<Vec<String>>,
    pub tags: Option<Vec<Tag>>,
    #[serde(deserialize_with = "time")]
    pub ping_time: Option<Duration>,
    #[serde(deserialize_with = "time")]
    pub drain: Option<Duration>,
    pub concurrency: Option<usize>,
    pub prefetch: Option<u16>,
    pub give_way: Option<bool>,
    pub files_dir: Option<PathBuf>,
    pub files_domains: Option<Vec<Tag>>,
    #[serde(deserialize_with = "bytes")]
    pub files_max: Option<u64>,
}

/// What the file can say for mappers alone: `nanite mapper`, and the commands that are a mapper for a short time.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct MapperSection {
    pub token: Option<String>,
    #[serde(deserialize_with = "time")]
    pub agent_timeout: Option<Duration>,
    pub offline_failsafe: Option<bool>,
    #[serde(deserialize_with = "time")]
    pub offline_redelivery_frequency: Option<Duration>,
    #[cfg(feature = "redis")]
    #[serde(deserialize_with = "secret")]
    pub redis: Option<Zeroizing<String>>,
    #[cfg(feature = "redis")]
    pub redis_password_file: Option<PathBuf>,
    #[cfg(feature = "redis")]
    pub redis_ca: Option<PathBuf>,
    #[cfg(feature = "redis")]
    pub redis_prefix: Option<String>,
}

/// What the file can say for the Control Tower. That requests are sent from it has to be said each time.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
#[cfg_attr(not(feature = "admin"), allow(dead_code, reason = "one file for programs with and without it"))]
pub(super) struct AdminSection {
    pub listen: Option<std::net::SocketAddr>,
    pub public_url: Option<String>,
    pub password_hash_file: Option<PathBuf>,
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Zeroizing<String>>, D::Error> {
    String::deserialize(deserializer).map(|text| Some(Zeroizing::new(text)))
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    duration::parse(&text).map(Some).map_err(de::Error::custom)
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    size::parse(&text).map(Some).map_err(de::Error::custom)
}

/// What the environment can say. An empty variable says nothing.
#[derive(Default)]
pub(super) struct Environment {
    pub config: Option<PathBuf>,
    pub token: Option<String>,
    pub certs: Option<PathBuf>,
    pub broker: Option<Zeroizing<String>>,
    pub broker_password: Option<Zeroizing<String>>,
    #[cfg(feature = "redis")]
    pub redis: Option<Zeroizing<String>>,
    #[cfg(feature = "redis")]
    pub redis_password: Option<Zeroizing<String>>,
    pub log: Option<String>,
}

impl Environment {
    /// Of this process.
    pub(super) fn of_process() -> Result<Self, CliError> {
        Self::read(|name| std::env::var_os(name))
    }

    fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, CliError> {
        let raw = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| match raw(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(text)) => Ok(Some(text)),
            Some(Err(_)) => Err(CliError::new(Exit::Usage, format!("{name} is not UTF-8"))),
        };
        Ok(Self {
            config: raw("NANITE_CONFIG").map(PathBuf::from),
            token: text("NANITE_TOKEN")?,
            certs: raw("NANITE_CERTS").map(PathBuf::from),
            broker: text("NANITE_BROKER")?.map(Zeroizing::new),
            broker_password: text("NANITE_BROKER_PASSWORD")?.map(Zeroizing::new),
            #[cfg(feature = "redis")]
            redis: text("NANITE_REDIS")?.map(Zeroizing::new),
            #[cfg(feature = "redis")]
            redis_password: text("NANITE_REDIS_PASSWORD")?.map(Zeroizing::new),
            log: text("NANITE_LOG")?,
        })
    }
}

/// File and environment: what a command asks for what its own arguments leave open.
#[derive(Default)]
pub(super) struct Config {
    pub file: File,
    pub environment: Environment,
}

impl Config {
    /// Reads the file that `--config` names, or else the one of the environment or the working directory.
    ///
    /// # Errors
    /// [`CliError`] when a file that was named is not there, or the file cannot be used.
    pub(super) fn load(named: Option<&Path>) -> Result<Self, CliError> {
        let environment = Environment::of_process()?;
        let file = match named.or(environment.config.as_deref()) {
            Some(path) => read(path, false)?,
            None if Path::new(NAME).exists() => read(Path::new(NAME), true)?,
            None => File::default(),
        };
        Ok(Self { file, environment })
    }

    /// The directory of certificates.
    pub(super) fn certs(&self, given: Option<&Path>) -> Option<PathBuf> {
        given.or(self.environment.certs.as_deref()).or(self.file.certs.as_deref()).map(Path::to_owned)
    }

    /// The name of the node; `section` is what the file says for its role.
    pub(super) fn token(&self, given: Option<&str>, section: Option<&str>) -> Option<String> {
        given.or(self.environment.token.as_deref()).or(section).or(self.file.token.as_deref()).map(str::to_owned)
    }
}

/// Reads a file. One that nobody named is believed only when it can be the user's own: it says what programs to run.
fn read(path: &Path, found: bool) -> Result<File, CliError> {
    let shown = path.display();
    let unreadable = |error: std::io::Error| {
        CliError::new(Exit::Usage, format!("cannot read the configuration {shown}: {error}"))
            .help("name a file that can be read with `--config FILE` or NANITE_CONFIG")
    };
    let mut file = OpenFile::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if found && !may_be_ours(&metadata) {
        return Err(CliError::new(Exit::Usage, format!("{shown} belongs to another user, or everybody can write it"))
            .help(format!("if you trust it, name it: `--config {shown}`")));
    }
    let mut text = Zeroizing::new(String::new());
    (&mut file).take(MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX {
        return Err(unreadable(std::io::Error::other(format!("longer than {MAX} bytes"))));
    }
    let mut read = parse(&text, path)?;
    #[cfg(feature = "redis")]
    let redis = read.mapper.redis.as_ref();
    #[cfg(not(feature = "redis"))]
    let redis: Option<&Zeroizing<String>> = None;
    let has_password = |url: &Zeroizing<String>| broker::password_of(url).is_some() || url.contains("pass=");
    if read.broker.iter().chain(redis).any(has_password) && metadata.mode() & 0o077 != 0 {
        let mode = metadata.mode() & 0o7777;
        return Err(CliError::new(
            Exit::Usage,
            format!("{shown} holds a password and has mode {mode:04o}: others than its owner can use it"),
        )
        .help(format!("run `chmod 600 {shown}`, or keep the password in a file of its own: broker-password-file")));
    }
    let base = path.parent().unwrap_or(Path::new(""));
    let paths = [
        &mut read.certs,
        &mut read.broker_password_file,
        &mut read.broker_ca,
        &mut read.broker_cert,
        &mut read.broker_key,
        &mut read.policy,
        &mut read.audit,
        &mut read.agent.actors_dir,
        &mut read.admin.password_hash_file,
        &mut read.log_dir,
        &mut read.pid_dir,
        &mut read.agent.files_dir,
    ];
    #[cfg(feature = "redis")]
    let paths = paths.into_iter().chain([&mut read.mapper.redis_password_file, &mut read.mapper.redis_ca]);
    for path in paths.into_iter().flatten() {
        *path = base.join(&*path);
    }
    Ok(read)
}

fn may_be_ours(metadata: &Metadata) -> bool {
    // The owner of a process's own entry is its effective user.
    let own = std::fs::metadata("/proc/self").map(|process| process.uid()).ok();
    let owned = metadata.uid() == 0 || own.is_none_or(|own| own == metadata.uid());
    owned && metadata.mode() & 0o002 == 0
}

fn parse(text: &str, path: &Path) -> Result<File, CliError> {
    toml::from_str(text).map_err(|error| {
        // The parser's own report shows the line, which may hold a password.
        let start = error.span().map_or(0, |span| span.start);
        let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
        let message = error.message();
        CliError::new(Exit::Usage, format!("{}:{line}: {}", path.display(), without_passwords(message)))
            .help("mend that line; `nanite help` tells where the options are described")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn refused(text: &str) -> String {
        match parse(text, Path::new("nanite.toml")) {
            Ok(_) => panic!("read: {text}"),
            Err(error) => error.message().to_owned(),
        }
    }

    #[test]
    fn n16_every_option_of_the_file_is_read() {
        let text = r#"
            token = "fred"
            certs = "certs"
            broker = "amqp://localhost"
            broker-password-file = "password"
            broker-ca = "ca.pem"
            broker-cert = "cert.pem"
            broker-key = "key.pem"
            log = "debug"
            log-format = "json"
            log-dir = "log"
            pid-dir = "run"
            [agent]
            token = "worker"
            actors-dir = "actors"
            actors = ["a", "b"]
            tags = ["big"]
            ping-time = "15s"
            drain = "1m"
            concurrency = 4
            prefetch = 8
            files-dir = "files"
            files-domains = ["photos"]
            files-max = "100MiB"
            [mapper]
            token = "control"
            agent-timeout = "30s"
            offline-failsafe = true
            offline-redelivery-frequency = "1m"
            [admin]
            listen = "127.0.0.1:4001"
            public-url = "https://tower.example.org"
            password-hash-file = "tower.hash"
        "#;
        let file = parse(text, Path::new("x")).unwrap();
        assert_eq!(file.agent.ping_time, Some(Duration::from_secs(15)));
        assert_eq!(file.agent.drain, Some(Duration::from_secs(60)));
        assert_eq!(file.agent.tags, Some(vec!["big".parse().unwrap()]));
        assert_eq!((file.agent.concurrency, file.agent.prefetch), (Some(4), Some(8)));
        assert_eq!(file.agent.files_domains, Some(vec!["photos".parse().unwrap()]));
        assert_eq!((file.agent.files_dir, file.agent.files_max), (Some("files".into()), Some(100 << 20)));
        assert_eq!(file.mapper.agent_timeout, Some(Duration::from_secs(30)));
        assert_eq!(file.mapper.offline_failsafe, Some(true));
        assert_eq!(file.mapper.offline_redelivery_frequency, Some(Duration::from_secs(60)));
        assert_eq!(file.mapper.token.as_deref(), Some("control"));
        assert_eq!(file.admin.listen, Some(([127, 0, 0, 1], 4001).into()));
        assert_eq!(file.admin.public_url.as_deref(), Some("https://tower.example.org"));
        assert_eq!(file.admin.password_hash_file.as_deref(), Some(Path::new("tower.hash")));
    }

    #[test]
    fn n16_unknown_keys_and_bad_values_are_errors_with_their_line() {
        assert!(refused("certs = \"a\"\ntokn = \"b\"").starts_with("nanite.toml:2: unknown field `tokn`"));
        assert!(refused("[agent]\nagent-timeout = \"1s\"").starts_with("nanite.toml:2: unknown field"));
        assert!(refused("\n\n[agents]").starts_with("nanite.toml:3: unknown field `agents`"));
        assert!(refused("[agent]\nping-time = \"15\"").contains(":2: '15' is no duration"));
        assert!(refused("[agent]\nping-time = 15").contains(":2: "));
        assert!(refused("[agent]\n\ntags = [\"\"]").contains(":3: a tag is"));
        assert!(refused("[admin]\nallow-requests = true").contains("unknown field"), "it has to be said each time");
        assert!(refused("insecure-plaintext = true").contains("unknown field"), "it has to be said each time");
        assert!(refused("token = \"a\"\ntoken = \"b\"").starts_with("nanite.toml:2: duplicate key"));
    }

    #[test]
    fn s14_no_error_of_the_file_repeats_a_password() {
        for text in [
            "[agent]\nconcurrency = \"amqp://user:secret@host\"",
            "broker = \"amqp://user:secret@host\" trailing",
            "log-format = \"amqp://user:secret@host\"",
            "broker = amqp://user:secret@host",
        ] {
            let message = refused(text);
            assert!(!message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn n16_later_layers_win_and_empty_variables_say_nothing() {
        let file = parse("token = \"file\"\ncerts = \"file\"\n[agent]\ntoken = \"section\"", Path::new("x")).unwrap();
        let environment = |value: &'static str| Environment::read(move |_| Some(value.into())).unwrap();
        let mut config = Config { file, environment: environment("") };
        assert_eq!(config.token(None, config.file.agent.token.as_deref()).as_deref(), Some("section"));
        assert_eq!(config.token(None, config.file.mapper.token.as_deref()).as_deref(), Some("file"));
        assert_eq!(config.certs(None), Some("file".into()));
        config.environment = environment("environment");
        assert_eq!(config.token(None, Some("section")).as_deref(), Some("environment"));
        assert_eq!(config.certs(None), Some("environment".into()));
        assert_eq!(config.token(Some("given"), Some("section")).as_deref(), Some("given"));
        assert_eq!(config.certs(Some(Path::new("given"))), Some("given".into()));
    }

    #[test]
    fn n16_paths_in_the_file_are_relative_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n.toml");
        std::fs::write(&path, "certs = \"certs\"\n[agent]\nactors-dir = \"/actors\"").unwrap();
        let file = read(&path, false).unwrap();
        assert_eq!(file.certs, Some(dir.path().join("certs")));
        assert_eq!(file.agent.actors_dir, Some("/actors".into()));
    }

    #[test]
    fn s14_a_file_with_a_password_is_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n.toml");
        std::fs::write(&path, "broker = \"amqp://user:secret@host\"").unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o640);
        let error = read(&path, false).err().unwrap();
        assert!(error.message().contains("mode 0640") && error.remedy().unwrap().contains("chmod 600"), "{error:?}");
        mode(0o600);
        assert!(read(&path, false).is_ok());
        std::fs::write(&path, "broker = \"amqp://user@host\"").unwrap();
        mode(0o644);
        assert!(read(&path, false).is_ok());
    }

    #[test]
    fn n16_a_file_that_everybody_can_write_is_used_only_when_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nanite.toml");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(read(&path, true).is_err());
        assert!(read(&path, false).is_ok());
        assert!(read(&dir.path().join("none.toml"), false).err().unwrap().message().contains("cannot read"));
    }
}
