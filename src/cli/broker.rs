//! Which broker, and its password: from the command line, the environment or the file, never shown.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::config::{self, Config};
use super::error::{CliError, Exit};
use super::output;
use crate::transport::Tls;

/// The broker when none is named.
const DEFAULT: &str = "amqp://localhost";
/// The longest password file, in bytes.
const MAX: u64 = 4096;

/// Which broker, as the command line says it.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// The broker: amqp://USER@HOST:PORT/VHOST [also: NANITE_BROKER, `broker` in nanite.toml; default: amqp://localhost]
    #[arg(long, value_name = "URL", help_heading = "Connection")]
    broker: Option<String>,
    /// A file with the broker's password [also: NANITE_BROKER_PASSWORD, `broker-password-file` in nanite.toml]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    broker_password_file: Option<PathBuf>,
    /// For amqps://: the CA that the broker's certificate is of; no other is trusted [also: `broker-ca` in nanite.toml]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    broker_ca: Option<PathBuf>,
    /// For amqps://: this node's certificate towards the broker, which names the user where the URL does not
    /// [also: `broker-cert` in nanite.toml]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    broker_cert: Option<PathBuf>,
    /// The key of that certificate, mode 0600 [also: `broker-key` in nanite.toml]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    broker_key: Option<PathBuf>,
}

/// The URL of a broker, the password where it is not the URL's own, and how TLS is spoken with it.
pub(super) struct Broker {
    pub url: Zeroizing<String>,
    pub password: Option<Zeroizing<String>>,
    pub tls: Option<Tls>,
}

impl Args {
    /// Joins the layers. A password in a URL goes only where that URL leads; one that stands for itself goes with any URL.
    ///
    /// # Errors
    /// [`CliError`] when the password file cannot be used, or what is given for TLS does not fit the URL.
    pub(super) fn resolve(&self, config: &Config) -> Result<Broker, CliError> {
        let (environment, file) = (&config.environment, &config.file);
        if self.broker.as_deref().is_some_and(|url| password_of(url).is_some()) {
            let paint = output::stderr_paint();
            output::note(&format!(
                "{} a password on the command line can be read by every user of this machine; give it by \
                 NANITE_BROKER_PASSWORD, by `--broker-password-file FILE`, or in nanite.toml",
                paint.yellow("warning:")
            ));
        }
        let layers = Layers {
            given: (self.broker.as_deref(), self.broker_password_file.as_deref()),
            environment: (environment.broker.as_ref(), environment.broker_password.as_ref()),
            file: (file.broker.as_ref(), file.broker_password_file.as_deref()),
        };
        let none = || Broker { url: Zeroizing::new(DEFAULT.to_owned()), password: None, tls: None };
        let mut broker = layers.join(Some(DEFAULT))?.unwrap_or_else(none);
        broker.tls = self.tls(&broker.url, file)?;
        Ok(broker)
    }

    /// TLS for an amqps URL, and only for that.
    fn tls(&self, url: &str, file: &config::File) -> Result<Option<Tls>, CliError> {
        let usage = |message: &str| CliError::new(Exit::Usage, message);
        let is_secure = url.starts_with("amqps://");
        let own = self.broker_ca.is_some() || self.broker_cert.is_some() || self.broker_key.is_some();
        if !is_secure && own {
            return Err(usage("certificates for the broker are given, and its URL does not begin with amqps://")
                .help("write `--broker amqps://...`, or leave --broker-ca, --broker-cert and --broker-key out"));
        }
        if !is_secure {
            return Ok(None);
        }
        let Some(ca) = self.broker_ca.as_ref().or(file.broker_ca.as_ref()) else {
            return Err(usage("amqps needs the CA of the broker's certificate: the system's CAs are not trusted")
                .help("give its certificate in PEM with `--broker-ca FILE`, or as broker-ca in nanite.toml"));
        };
        let tls = Tls::new(ca);
        let certificate = self.broker_cert.as_ref().or(file.broker_cert.as_ref());
        match (certificate, self.broker_key.as_ref().or(file.broker_key.as_ref())) {
            (None, None) => Ok(Some(tls)),
            (Some(certificate), Some(key)) => Ok(Some(tls.client_certificate(certificate, key))),
            _ => Err(usage("a certificate towards the broker and its key go together")
                .help("give both: `--broker-cert FILE --broker-key FILE`")),
        }
    }
}

/// What each layer says of one server: its URL, and a password that stands for itself.
pub(super) struct Layers<'a> {
    pub given: (Option<&'a str>, Option<&'a Path>),
    pub environment: (Option<&'a Zeroizing<String>>, Option<&'a Zeroizing<String>>),
    pub file: (Option<&'a Zeroizing<String>>, Option<&'a Path>),
}

impl Layers<'_> {
    /// Joins them; none when no layer names a server, and there is no default.
    ///
    /// # Errors
    /// [`CliError`] when a password file cannot be used.
    pub(super) fn join(&self, default: Option<&str>) -> Result<Option<Broker>, CliError> {
        let (url, layer) = match (self.given.0, self.environment.0, self.file.0, default) {
            (Some(url), ..) => (url, 2),
            (None, Some(url), ..) => (url.as_str(), 1),
            (None, None, Some(url), _) => (url.as_str(), 0),
            (None, None, None, Some(url)) => (url, 0),
            (None, None, None, None) => return Ok(None),
        };
        let own = |of: u8| (layer == of && password_of(url).is_some()).then_some(None);
        // From the last layer to the first: `Some(None)` is the URL's own password.
        let password = match self.given.1 {
            Some(path) => Some(Some(read_password(path)?)),
            None => own(2).or_else(|| self.environment.1.cloned().map(Some)).or_else(|| own(1)),
        };
        let password = match (password, self.file.1) {
            (Some(found), _) => found,
            (None, Some(path)) => Some(read_password(path)?),
            (None, None) => None,
        };
        Ok(Some(Broker { url: Zeroizing::new(url.to_owned()), password, tls: None }))
    }
}

/// The password in a URL, as it stands there.
pub(super) fn password_of(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("://").unwrap_or(("", url));
    // Generous: what an address that is not understood has before its last @ may be a password.
    let (info, _) = rest.rsplit_once('@')?;
    let (_, password) = info.split_once(':')?;
    Some(password)
}

/// The first line of a file that only its owner can read.
pub(super) fn read_password(path: &Path) -> Result<Zeroizing<String>, CliError> {
    let shown = path.display();
    let wrong = |why: String| CliError::new(Exit::Usage, format!("the password file {shown} {why}"));
    let unreadable = |error: std::io::Error| wrong(format!("cannot be read: {error}"));
    // Opening anything else, a named pipe for one, could wait for ever.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(wrong("is not a file".into()));
    }
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(wrong(format!("has mode {mode:04o}: others than its owner can use it"))
            .help(format!("run `chmod 600 {shown}`")));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(MAX).read_to_string(&mut text).map_err(unreadable)?;
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(Zeroizing::new(line.to_owned())),
        _ => Err(wrong("is empty".into()).help("its first line is the password")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(environment: (Option<&str>, Option<&str>), file: (Option<&str>, Option<&Path>)) -> Config {
        let secret = |text: &str| Zeroizing::new(text.to_owned());
        Config {
            environment: config::Environment {
                broker: environment.0.map(secret),
                broker_password: environment.1.map(secret),
                ..Default::default()
            },
            file: config::File {
                broker: file.0.map(secret),
                broker_password_file: file.1.map(Path::to_owned),
                ..Default::default()
            },
        }
    }

    fn resolve(broker: Option<&str>, password_file: Option<&Path>, config: &Config) -> (String, Option<String>) {
        let args = Args {
            broker: broker.map(str::to_owned),
            broker_password_file: password_file.map(Path::to_owned),
            ..Args::default()
        };
        let Broker { url, password, .. } = args.resolve(config).map_err(|error| panic!("{error:?}")).unwrap();
        (url.to_string(), password.map(|password| password.to_string()))
    }

    fn secret_file(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    #[test]
    fn n16_the_broker_of_the_later_layer_wins() {
        let all = config((Some("amqp://environment"), None), (Some("amqp://file"), None));
        assert_eq!(resolve(Some("amqp://given"), None, &all).0, "amqp://given");
        assert_eq!(resolve(None, None, &all).0, "amqp://environment");
        assert_eq!(resolve(None, None, &config((None, None), (Some("amqp://file"), None))).0, "amqp://file");
        assert_eq!(resolve(None, None, &Config::default()), ("amqp://localhost".into(), None));
    }

    #[test]
    fn s14_a_password_goes_with_its_url_and_the_later_layer_wins() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (secret_file(&dir, "a", "from-a\nrest"), secret_file(&dir, "b", "from-b"));
        let file = config((None, None), (Some("amqp://u:in-url@file"), None));
        assert_eq!(resolve(None, None, &file).1, None, "the URL's own");
        assert_eq!(resolve(Some("amqp://u@other"), None, &file), ("amqp://u@other".into(), None));
        let file = config((None, None), (Some("amqp://u@file"), Some(&first)));
        assert_eq!(resolve(None, None, &file).1.as_deref(), Some("from-a"));
        let environment = config((None, Some("from-env")), (Some("amqp://u@file"), Some(&first)));
        assert_eq!(resolve(None, None, &environment).1.as_deref(), Some("from-env"));
        assert_eq!(resolve(None, Some(&second), &environment).1.as_deref(), Some("from-b"));
        assert_eq!(resolve(Some("amqp://u:in-url@given"), None, &environment).1, None, "the URL's own");
        let environment = config((None, Some("from-env")), (Some("amqp://u:in-url@file"), None));
        assert_eq!(resolve(None, None, &environment).1.as_deref(), Some("from-env"));
        let environment = config((Some("amqp://u:in-url@env"), None), (None, Some(&first)));
        assert_eq!(resolve(None, None, &environment).1, None, "the URL's own");
    }

    #[test]
    fn s14_what_is_given_for_tls_is_complete_and_used_or_refused() {
        let tls = |url: &str, files: [Option<&str>; 3], config: &Config| {
            let [broker_ca, broker_cert, broker_key] = files.map(|file| file.map(PathBuf::from));
            let args =
                Args { broker: Some(url.to_owned()), broker_password_file: None, broker_ca, broker_cert, broker_key };
            args.resolve(config).map(|broker| broker.tls)
        };
        let none = Config::default();
        assert!(tls("amqp://h", [None; 3], &none).unwrap().is_none());
        assert!(tls("amqps://h", [Some("ca"), None, None], &none).unwrap().is_some());
        assert!(tls("amqps://h", [Some("ca"), Some("cert"), Some("key")], &none).unwrap().is_some());
        for (url, files, says) in [
            ("amqps://h", [None; 3], "needs the CA"),
            ("amqps://h", [Some("ca"), Some("cert"), None], "go together"),
            ("amqps://h", [Some("ca"), None, Some("key")], "go together"),
            ("amqp://h", [Some("ca"), None, None], "does not begin with amqps://"),
            ("amqp://h", [None, Some("cert"), Some("key")], "does not begin with amqps://"),
        ] {
            let error = tls(url, files, &none).unwrap_err();
            assert!(error.message().contains(says) && error.remedy().is_some(), "{error:?}");
        }
        let mut config = Config::default();
        config.file.broker_ca = Some("ca".into());
        assert!(tls("amqps://h", [None; 3], &config).unwrap().is_some());
        assert!(tls("amqp://h", [None; 3], &config).unwrap().is_none(), "the file may know of more brokers than one");
    }

    #[test]
    fn s14_a_password_file_is_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = secret_file(&dir, "a", "secret");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o604)).unwrap();
        let error = read_password(&path).unwrap_err();
        assert!(error.message().contains("mode 0604"), "{error:?}");
        assert!(!format!("{error:?}").contains("secret"));
        assert!(read_password(&secret_file(&dir, "b", "")).unwrap_err().message().contains("is empty"));
        assert!(read_password(dir.path()).unwrap_err().message().contains("not a file"));
        assert!(read_password(&dir.path().join("none")).unwrap_err().message().contains("cannot be read"));
    }

    #[test]
    fn s14_passwords_in_urls_are_seen() {
        for url in ["amqp://u:p@h", "amqp://u:p/@h", "amqp://:p@h", "amqp://u:p@x@h", "u:p@h"] {
            assert!(password_of(url).is_some(), "{url}");
        }
        for url in ["amqp://h:1/v", "amqp://u@h:1", "amqp://h"] {
            assert!(password_of(url).is_none(), "{url}");
        }
    }
}
