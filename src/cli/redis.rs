//! Which Redis a mapper shares its agents in, and its password: from the command line, the environment or the file.

use std::path::PathBuf;
use std::sync::Arc;

use super::broker::{Layers, password_of};
use super::config::Config;
use super::error::{CliError, Exit};
use crate::mapper::{RedisError, RedisOptions, RedisState};
use crate::serializer::Serializer;

/// Which Redis, as the command line says it.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// Share what is known of agents with other mappers, in the Redis redis://HOST:PORT/DATABASE, rediss:// or unix:///PATH
    /// [also: NANITE_REDIS, `redis` in nanite.toml].
    #[arg(long, value_name = "URL", help_heading = "Shared state")]
    redis: Option<String>,
    /// A file with its password [also: NANITE_REDIS_PASSWORD, `redis-password-file` in nanite.toml].
    #[arg(long, value_name = "FILE", help_heading = "Shared state")]
    redis_password_file: Option<PathBuf>,
    /// A PEM file with the CA of its certificate, for rediss:// [also: `redis-ca` in nanite.toml].
    #[arg(long, value_name = "FILE", help_heading = "Shared state")]
    redis_ca: Option<PathBuf>,
    /// What the names of its keys begin with [also: `redis-prefix` in nanite.toml; default: nanite].
    #[arg(long, value_name = "NAME", help_heading = "Shared state")]
    redis_prefix: Option<String>,
}

impl Args {
    /// Connects, where a Redis is named.
    ///
    /// # Errors
    /// [`CliError`] when it cannot be used.
    pub(super) async fn connect(
        &self,
        config: &Config,
        serializer: &Arc<dyn Serializer>,
    ) -> Result<Option<RedisState>, CliError> {
        let (environment, file) = (&config.environment, &config.file.mapper);
        if self.redis.as_deref().is_some_and(|url| password_of(url).is_some() || url.contains("pass=")) {
            return Err(CliError::new(Exit::Usage, "a password on the command line can be read by every user")
                .help("leave it out of the URL: give it by NANITE_REDIS_PASSWORD or by `--redis-password-file FILE`"));
        }
        let layers = Layers {
            given: (self.redis.as_deref(), self.redis_password_file.as_deref()),
            environment: (environment.redis.as_ref(), environment.redis_password.as_ref()),
            file: (file.redis.as_ref(), file.redis_password_file.as_deref()),
        };
        let Some(server) = layers.join(None)? else { return Ok(None) };
        let mut options = RedisOptions::new(serializer.clone());
        if let Some(password) = &server.password {
            options = options.password(password.as_str());
        }
        if let Some(prefix) = self.redis_prefix.as_ref().or(file.redis_prefix.as_ref()) {
            options = options.prefix(prefix);
        }
        if let Some(path) = self.redis_ca.as_ref().or(file.redis_ca.as_ref()) {
            let pem = std::fs::read(path).map_err(|error| {
                CliError::new(Exit::Usage, format!("the CA of the Redis, {}, cannot be read: {error}", path.display()))
            })?;
            options = options.ca_certificates(pem);
        }
        RedisState::connect(&server.url, options).await.map(Some).map_err(|error| remedy(&error))
    }
}

fn remedy(error: &RedisError) -> CliError {
    let failure = |exit| CliError::of(exit, error);
    match error {
        RedisError::Unreachable { .. } => failure(Exit::Unreachable).help(
            "check that it runs and that the URL is right; its password is given by NANITE_REDIS_PASSWORD or \
             `--redis-password-file FILE`",
        ),
        RedisError::MissingCa | RedisError::InvalidCa => {
            failure(Exit::Usage).help("name the PEM file of the CA that issued its certificate: `--redis-ca FILE`")
        }
        RedisError::NotSigned => failure(Exit::Usage).help("leave `--redis` or `--insecure-plaintext` out"),
        _ => failure(Exit::Usage),
    }
}
