//! Options from the command line, the environment and `nanite.toml`; the first that has an option wins.
//!
//! The file is the one that `--config` or NANITE_CONFIG names, or else `nanite.toml` in the working directory, if it exists. Paths in
//! it are relative to it. Options that weaken security are not read from it: they must be given each time.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::args::password_of;
use super::error::{CliError, Result};
use super::options::{AdminOptions, AgentOptions, MapperOptions, secret};
use super::output::without_passwords;
use crate::packet::Role;

/// The file in the working directory.
const FILE_NAME: &str = "nanite.toml";
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// The options in the file.
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
    pub log_format: Option<LogFormat>,
    pub log_dir: Option<PathBuf>,
    pub pid_dir: Option<PathBuf>,
    pub agent: AgentOptions,
    pub mapper: MapperOptions,
    #[cfg_attr(not(feature = "admin"), allow(dead_code, reason = "the same file for programs with and without it"))]
    pub admin: AdminOptions,
}

/// The format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

/// The options in the environment. Empty variables count as not set.
#[derive(Default)]
pub(super) struct Environment {
    config: Option<PathBuf>,
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
    fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let text = |name: &str| {
            let text = path(name).map(|value| value.into_os_string().into_string()).transpose();
            text.map_err(|_| CliError::usage(format!("{name} is not UTF-8")))
        };
        let secret = |name: &str| text(name).map(|text| text.map(Zeroizing::new));
        Ok(Self {
            config: path("NANITE_CONFIG"),
            token: text("NANITE_TOKEN")?,
            certs: path("NANITE_CERTS"),
            broker: secret("NANITE_BROKER")?,
            broker_password: secret("NANITE_BROKER_PASSWORD")?,
            #[cfg(feature = "redis")]
            redis: secret("NANITE_REDIS")?,
            #[cfg(feature = "redis")]
            redis_password: secret("NANITE_REDIS_PASSWORD")?,
            log: text("NANITE_LOG")?,
        })
    }
}

/// The file and the environment, for the options that are not given on the command line.
#[derive(Default)]
pub(super) struct Config {
    pub file: File,
    pub environment: Environment,
}

impl Config {
    /// Reads the environment, and the file that `named` or else the environment names, or else the one in the working directory.
    pub(super) fn load(named: Option<&Path>) -> Result<Self> {
        let environment = Environment::read(|name| std::env::var_os(name))?;
        let file = match named.or(environment.config.as_deref()) {
            Some(path) => read(path, true)?,
            None if Path::new(FILE_NAME).exists() => read(Path::new(FILE_NAME), false)?,
            None => File::default(),
        };
        Ok(Self { file, environment })
    }

    /// The directory of certificates.
    pub(super) fn certs(&self, given: Option<&Path>) -> Option<PathBuf> {
        given.or(self.environment.certs.as_deref()).or(self.file.certs.as_deref()).map(Path::to_owned)
    }

    /// The name of the node.
    pub(super) fn token(&self, given: Option<&str>, role: Role) -> Option<String> {
        let section = match role {
            Role::Agent => &self.file.agent.token,
            Role::Mapper => &self.file.mapper.token,
        };
        let layers = [&self.environment.token, section, &self.file.token];
        given.map(str::to_owned).or_else(|| layers.into_iter().flatten().next().cloned())
    }
}

/// Reads a file. One that was not named, but only found, must belong to the user: it says which programs run.
fn read(path: &Path, named: bool) -> Result<File> {
    let shown = path.display();
    let unreadable = |error: std::io::Error| {
        CliError::usage(format!("cannot read the configuration {shown}: {error}"))
            .help("name a readable file with `--config FILE` or NANITE_CONFIG")
    };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    let is_own = [0, geteuid().as_raw()].contains(&metadata.uid()) && metadata.mode() & 0o002 == 0;
    if !named && !is_own {
        return Err(CliError::usage(format!("{shown} belongs to another user, or is world-writable"))
            .help(format!("if you trust it, name it: `--config {shown}`")));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(unreadable(std::io::Error::other(format!("longer than {MAX_FILE_BYTES} bytes"))));
    }
    let mut read = parse(&text, path)?;
    let mode = metadata.mode() & 0o7777;
    if read.has_password() && mode & 0o077 != 0 {
        let message = format!("{shown} holds a password and has mode {mode:04o}: others than its owner can use it");
        return Err(CliError::usage(message)
            .help(format!("run `chmod 600 {shown}`, or put the password into a separate file: broker-password-file")));
    }
    let base = path.parent().unwrap_or(Path::new(""));
    for path in read.paths() {
        *path = base.join(&*path);
    }
    Ok(read)
}

impl File {
    fn has_password(&self) -> bool {
        let urls = self.broker.iter();
        #[cfg(feature = "redis")]
        let urls = urls.chain(&self.mapper.redis);
        urls.into_iter().any(|url| password_of(url).is_some() || url.contains("pass="))
    }

    fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let paths = [
            &mut self.certs,
            &mut self.broker_password_file,
            &mut self.broker_ca,
            &mut self.broker_cert,
            &mut self.broker_key,
            &mut self.policy,
            &mut self.audit,
            &mut self.log_dir,
            &mut self.pid_dir,
            &mut self.agent.actors_dir,
            &mut self.agent.files_dir,
            &mut self.admin.password_hash_file,
        ];
        #[cfg(feature = "redis")]
        let paths = paths.into_iter().chain([&mut self.mapper.redis_password_file, &mut self.mapper.redis_ca]);
        paths.into_iter().flatten()
    }
}

fn parse(text: &str, path: &Path) -> Result<File> {
    toml::from_str(text).map_err(|error| {
        // Not the parser's own report: it repeats the line, which may hold a password.
        let start = error.span().map_or(0, |span| span.start);
        let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
        let message = without_passwords(error.message());
        CliError::usage(format!("{}:{line}: {message}", path.display())).help("correct that line")
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn refused(text: &str) -> String {
        match parse(text, Path::new("nanite.toml")) {
            Ok(_) => panic!("read: {text}"),
            Err(error) => error.message().to_owned(),
        }
    }

    #[test]
    fn n16_file_accepts_every_option() {
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
            agent = { token = "worker", actors-dir = "actors", actors = ["a", "b"], tags = ["big"], ping-time = "15s", drain = "1m",
                concurrency = 4, prefetch = 8, files-dir = "files", files-domains = ["photos"], files-max = "100MiB",
                files-never-replace = true }
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
        let File { agent, mapper, admin, .. } = parse(text, Path::new("x")).unwrap();
        let seconds = |n| Some(Duration::from_secs(n));
        assert_eq!((agent.ping_time, agent.drain), (seconds(15), seconds(60)));
        assert_eq!((agent.concurrency, agent.prefetch, agent.files_never_replace), (Some(4), Some(8), true));
        let tags = |tag: &str| Some(vec![tag.parse().unwrap()]);
        assert_eq!((agent.tags, agent.files_domains), (tags("big"), tags("photos")));
        assert_eq!((agent.files_dir, agent.files_max), (Some("files".into()), Some(100 << 20)));
        assert_eq!((mapper.agent_timeout, mapper.offline_redelivery_frequency), (seconds(30), seconds(60)));
        assert_eq!((mapper.offline_failsafe, mapper.token.as_deref()), (true, Some("control")));
        assert_eq!(admin.listen, Some(([127, 0, 0, 1], 4001).into()));
        assert_eq!(admin.public_url.as_deref(), Some("https://tower.example.org"));
        assert_eq!(admin.password_hash_file.as_deref(), Some(Path::new("tower.hash")));
    }

    #[test]
    fn n16_invalid_file_error_names_line() {
        for (text, error) in [
            ("certs = \"a\"\ntokn = \"b\"", "nanite.toml:2: unknown field `tokn`"),
            ("[agent]\nagent-timeout = \"1s\"", "nanite.toml:2: unknown field"),
            ("\n\n[agents]", "nanite.toml:3: unknown field `agents`"),
            ("[agent]\nping-time = \"15\"", "nanite.toml:2: '15' is not a duration"),
            ("[agent]\nping-time = 15", "nanite.toml:2: "),
            ("[agent]\n\ntags = [\"\"]", "nanite.toml:3: a tag is"),
            ("token = \"a\"\ntoken = \"b\"", "nanite.toml:2: duplicate key"),
            // Must be given each time.
            ("[admin]\nallow-requests = true", "nanite.toml:2: unknown field"),
            ("insecure-plaintext = true", "nanite.toml:1: unknown field"),
        ] {
            assert!(refused(text).starts_with(error), "{text}: {}", refused(text));
        }
    }

    #[test]
    fn s14_file_errors_do_not_contain_passwords() {
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
    fn n16_command_line_overrides_environment_overrides_file() {
        let file = parse("token = \"file\"\ncerts = \"file\"\n[agent]\ntoken = \"section\"", Path::new("x")).unwrap();
        let environment = |value: &'static str| Environment::read(move |_| Some(value.into())).unwrap();
        let mut config = Config { file, environment: environment("") };
        assert_eq!(config.token(None, Role::Agent).as_deref(), Some("section"));
        assert_eq!(config.token(None, Role::Mapper).as_deref(), Some("file"));
        assert_eq!(config.certs(None), Some("file".into()));
        config.environment = environment("environment");
        assert_eq!(config.token(None, Role::Agent).as_deref(), Some("environment"));
        assert_eq!(config.certs(None), Some("environment".into()));
        assert_eq!(config.token(Some("given"), Role::Agent).as_deref(), Some("given"));
        assert_eq!(config.certs(Some(Path::new("given"))), Some("given".into()));

        let given = AgentOptions { prefetch: Some(1), give_way: true, ..AgentOptions::default() };
        let lower = AgentOptions { prefetch: Some(2), concurrency: Some(3), ..AgentOptions::default() };
        let merged = given.or(&lower);
        assert_eq!((merged.prefetch, merged.concurrency, merged.give_way), (Some(1), Some(3), true));
        assert!(lower.or(&given).give_way);
    }

    /// A file with these contents and permissions.
    fn file(text: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nanite.toml");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn n16_file_paths_are_relative_to_file() {
        let (dir, path) = file("certs = \"certs\"\n[agent]\nactors-dir = \"/actors\"", 0o644);
        let file = read(&path, true).unwrap();
        assert_eq!(file.certs, Some(dir.path().join("certs")));
        assert_eq!(file.agent.actors_dir, Some("/actors".into()));
    }

    #[test]
    fn s14_file_with_password_must_be_private() {
        let (_dir, path) = file("broker = \"amqp://user:secret@host\"", 0o640);
        let error = read(&path, true).err().unwrap();
        assert!(error.message().contains("mode 0640") && error.remedy().unwrap().contains("chmod 600"), "{error:?}");
        for (text, mode) in [("broker = \"amqp://user:secret@host\"", 0o600), ("broker = \"amqp://user@host\"", 0o644)]
        {
            let (_dir, path) = file(text, mode);
            assert!(read(&path, true).is_ok());
        }
    }

    #[test]
    fn n16_world_writable_file_must_be_named() {
        let (dir, path) = file("", 0o666);
        assert!(read(&path, false).is_err());
        assert!(read(&path, true).is_ok());
        assert!(read(&dir.path().join("none.toml"), true).err().unwrap().message().contains("cannot read"));
    }
}
