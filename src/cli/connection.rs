//! How to reach the broker, and the Redis that mappers share: URL, password and TLS, from the command line, the environment or the file.

use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::args::{password_of, read_password};
use super::config::{Config, File};
use super::error::{CliError, Result};
use super::{output, remedy};
use crate::transport::{AmqpOptions, Tls};

const DEFAULT_BROKER: &str = "amqp://localhost";

/// The broker's options on the command line.
#[derive(Debug, Default, clap::Args)]
pub(super) struct BrokerArgs {
    /// The broker: amqp://USER@HOST:PORT/VHOST [also: NANITE_BROKER, `broker` in nanite.toml; default: amqp://localhost]
    #[arg(long, value_name = "URL", help_heading = "Connection")]
    broker: Option<String>,
    /// A file with the broker's password [also: NANITE_BROKER_PASSWORD, `broker-password-file` in nanite.toml]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    broker_password_file: Option<PathBuf>,
    /// For amqps://: the CA of the broker's certificate; no other is trusted [also: `broker-ca` in nanite.toml]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    broker_ca: Option<PathBuf>,
    /// For amqps://: this node's client certificate, which names the user unless the URL does [also: `broker-cert` in nanite.toml]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    broker_cert: Option<PathBuf>,
    /// The key of that certificate, mode 0600 [also: `broker-key` in nanite.toml]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    broker_key: Option<PathBuf>,
}

impl BrokerArgs {
    /// How to connect to the broker.
    pub(super) fn options(&self, config: &Config) -> Result<AmqpOptions> {
        if self.broker.as_deref().is_some_and(|url| password_of(url).is_some()) {
            output::note(&format!(
                "{} a password on the command line can be read by every user of this machine; give it by \
                 NANITE_BROKER_PASSWORD, by `--broker-password-file FILE`, or in nanite.toml",
                output::stderr_paint().yellow("warning:")
            ));
        }
        let (url, password) = self.server(config);
        let password = password.map(Password::read).transpose()?;
        let mut options = AmqpOptions::new(url).map_err(|error| remedy::transport(&error, None))?;
        if let Some(password) = &password {
            options = options.password(password.as_str());
        }
        if let Some(tls) = self.tls(url, &config.file)? {
            options = options.tls(tls);
        }
        Ok(options)
    }

    fn server<'a>(&'a self, Config { environment, file }: &'a Config) -> (&'a str, Option<Password<'a>>) {
        let (url, password) = resolve([
            (self.broker.as_ref(), self.broker_password_file.as_deref().map(Password::File)),
            (environment.broker.as_deref(), environment.broker_password.as_ref().map(Password::Text)),
            (file.broker.as_deref(), file.broker_password_file.as_deref().map(Password::File)),
        ]);
        (url.unwrap_or(DEFAULT_BROKER), password)
    }

    /// TLS for an amqps URL, and only for that.
    fn tls(&self, url: &str, file: &File) -> Result<Option<Tls>> {
        let usage = |message: &str, help: &str| Err(CliError::usage(message).help(help));
        if !url.starts_with("amqps://") {
            return match (&self.broker_ca, &self.broker_cert, &self.broker_key) {
                (None, None, None) => Ok(None),
                _ => usage(
                    "certificates for the broker need a URL that begins with amqps://",
                    "give `--broker amqps://...`, or leave out --broker-ca, --broker-cert and --broker-key",
                ),
            };
        }
        let Some(ca) = self.broker_ca.as_ref().or(file.broker_ca.as_ref()) else {
            return usage(
                "amqps needs the CA of the broker's certificate: the system's CAs are not trusted",
                "give its certificate in PEM with `--broker-ca FILE`, or as broker-ca in nanite.toml",
            );
        };
        let certificate = self.broker_cert.as_ref().or(file.broker_cert.as_ref());
        match (certificate, self.broker_key.as_ref().or(file.broker_key.as_ref())) {
            (None, None) => Ok(Some(Tls::new(ca))),
            (Some(certificate), Some(key)) => Ok(Some(Tls::new(ca).client_certificate(certificate, key))),
            _ => usage(
                "a client certificate for the broker and its key go together",
                "give both: `--broker-cert FILE --broker-key FILE`",
            ),
        }
    }
}

/// The Redis in which a mapper shares its agents, if one is given.
#[cfg(feature = "redis")]
pub(super) async fn redis(
    given: &super::options::MapperOptions,
    Config { environment, file }: &Config,
    serializer: &std::sync::Arc<dyn crate::serializer::Serializer>,
) -> Result<Option<crate::mapper::RedisState>> {
    use super::error::Exit;
    use crate::mapper::{RedisOptions, RedisState};
    let file = &file.mapper;
    if given.redis.as_deref().is_some_and(|url| password_of(url).is_some() || url.contains("pass=")) {
        return Err(CliError::usage("a password on the command line can be read by every user")
            .help("leave it out of the URL: give it by NANITE_REDIS_PASSWORD or by `--redis-password-file FILE`"));
    }
    let (Some(url), password) = resolve([
        (given.redis.as_deref(), given.redis_password_file.as_deref().map(Password::File)),
        (environment.redis.as_deref(), environment.redis_password.as_ref().map(Password::Text)),
        (file.redis.as_deref(), file.redis_password_file.as_deref().map(Password::File)),
    ]) else {
        return Ok(None);
    };
    let mut options = RedisOptions::new(serializer.clone());
    if let Some(password) = password {
        options = options.password(password.read()?.as_str());
    }
    if let Some(prefix) = given.redis_prefix.as_ref().or(file.redis_prefix.as_ref()) {
        options = options.prefix(prefix);
    }
    if let Some(path) = given.redis_ca.as_ref().or(file.redis_ca.as_ref()) {
        let unreadable = CliError::failed(Exit::Usage, format!("cannot read the CA of the Redis, {}", path.display()));
        options = options.ca_certificates(std::fs::read(path).map_err(unreadable)?);
    }
    RedisState::connect(url, options).await.map(Some).map_err(|error| remedy::redis(&error))
}

/// A password outside a URL.
#[derive(Debug)]
enum Password<'a> {
    Text(&'a Zeroizing<String>),
    File(&'a Path),
}

impl Password<'_> {
    fn read(self) -> Result<Zeroizing<String>> {
        match self {
            Password::Text(text) => Ok(text.clone()),
            Password::File(path) => read_password(path),
        }
    }
}

/// The URL and the password of a server in one layer of options.
type Layer<'a> = (Option<&'a String>, Option<Password<'a>>);

/// Chooses the URL and the password from the command line, the environment and the file, in this order. A password in a URL is for
/// that URL only, and then there is no other; a separate one goes with any URL.
fn resolve<'a>(layers: [Layer<'a>; 3]) -> (Option<&'a str>, Option<Password<'a>>) {
    let url_layer = layers.iter().position(|(url, _)| url.is_some());
    let url = layers.iter().find_map(|(url, _)| url.map(String::as_str));
    let has_own_password = url.is_some_and(|url| password_of(url).is_some());
    let password = layers.into_iter().enumerate().find_map(|(n, (_, password))| match password {
        Some(password) => Some(Some(password)),
        None => (has_own_password && Some(n) == url_layer).then_some(None),
    });
    (url, password.flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The URL and the password, of a URL and a password (or its file) in each layer; an empty text is not given.
    fn server(given: [&str; 2], environment: [&str; 2], file: [&str; 2]) -> (String, String) {
        let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        let secret = |secret| text(secret).map(Zeroizing::new);
        let [broker, broker_password_file] = given.map(text);
        let broker_password_file = broker_password_file.map(PathBuf::from);
        let args = BrokerArgs { broker, broker_password_file, ..BrokerArgs::default() };
        let mut config = Config::default();
        [config.environment.broker, config.environment.broker_password] = environment.map(secret);
        config.file.broker = secret(file[0]);
        config.file.broker_password_file = text(file[1]).map(PathBuf::from);
        let (url, password) = args.server(&config);
        let password = password.map(|password| match password {
            Password::Text(text) => text.to_string(),
            Password::File(path) => path.display().to_string(),
        });
        (url.to_owned(), password.unwrap_or_default())
    }

    #[test]
    fn n16_broker_url_precedence() {
        let url = |given, environment, file| server([given, ""], [environment, ""], [file, ""]).0;
        assert_eq!(url("amqp://given", "amqp://environment", "amqp://file"), "amqp://given");
        assert_eq!(url("", "amqp://environment", "amqp://file"), "amqp://environment");
        assert_eq!(url("", "", "amqp://file"), "amqp://file");
        assert_eq!(server(["", ""], ["", ""], ["", ""]), ("amqp://localhost".into(), String::new()));
    }

    #[test]
    fn s14_broker_password_precedence() {
        for (given, environment, file, password) in [
            // A password in the URL that is used excludes others.
            (["", ""], ["", ""], ["amqp://u:in-url@file", ""], ""),
            (["amqp://u:in-url@given", ""], ["", "from-env"], ["amqp://u@file", "one"], ""),
            (["", ""], ["amqp://u:in-url@env", ""], ["", "one"], ""),
            // It is for that URL only.
            (["amqp://u@other", ""], ["", ""], ["amqp://u:in-url@file", ""], ""),
            (["", ""], ["", "from-env"], ["amqp://u:in-url@file", ""], "from-env"),
            // A separate password goes with any URL.
            (["", ""], ["", ""], ["amqp://u@file", "one"], "one"),
            (["", ""], ["", "from-env"], ["amqp://u@file", "one"], "from-env"),
            (["", "two"], ["", "from-env"], ["amqp://u@file", "one"], "two"),
        ] {
            assert_eq!(server(given, environment, file).1, password, "{given:?} {environment:?} {file:?}");
        }
    }

    #[test]
    fn s14_tls_options_must_be_complete_and_match_the_url() {
        let tls = |url: &str, files: [Option<&str>; 3], config: &Config| {
            let [broker_ca, broker_cert, broker_key] = files.map(|file| file.map(PathBuf::from));
            let args = BrokerArgs { broker_ca, broker_cert, broker_key, ..BrokerArgs::default() };
            args.tls(url, &config.file)
        };
        let none = Config::default();
        assert!(tls("amqp://h", [None; 3], &none).unwrap().is_none());
        assert!(tls("amqps://h", [Some("ca"), None, None], &none).unwrap().is_some());
        assert!(tls("amqps://h", [Some("ca"), Some("cert"), Some("key")], &none).unwrap().is_some());
        for (url, files, message) in [
            ("amqps://h", [None; 3], "needs the CA"),
            ("amqps://h", [Some("ca"), Some("cert"), None], "go together"),
            ("amqps://h", [Some("ca"), None, Some("key")], "go together"),
            ("amqp://h", [Some("ca"), None, None], "begins with amqps://"),
            ("amqp://h", [None, Some("cert"), Some("key")], "begins with amqps://"),
        ] {
            let error = tls(url, files, &none).unwrap_err();
            assert!(error.message().contains(message) && error.remedy().is_some(), "{error:?}");
        }
        let mut config = Config::default();
        config.file.broker_ca = Some("ca".into());
        assert!(tls("amqps://h", [None; 3], &config).unwrap().is_some());
        assert!(tls("amqp://h", [None; 3], &config).unwrap().is_none(), "the file may be for several brokers");
    }
}
