//! The options of the commands that nodes run with, which the configuration file has in sections of their own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};
use zeroize::Zeroizing;

use super::args;
use crate::packet::Tag;

/// Options of `nanite agent`, which the file has under [agent].
#[derive(Debug, Default, clap::Args, Deserialize)]
#[command(next_help_heading = "Agent")]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct AgentOptions {
    #[arg(skip)]
    pub token: Option<String>,
    /// The directory of programs: DIR/PREFIX/NAME is the service /PREFIX/NAME.
    #[arg(long, value_name = "DIR")]
    pub actors_dir: Option<PathBuf>,
    /// Only these PREFIXes of the directory.
    #[arg(long, value_name = "PREFIX,..", value_delimiter = ',', requires = "actors_dir")]
    pub actors: Option<Vec<String>>,
    /// A tag that requests can select; can be given several times.
    #[arg(long = "tag", value_name = "TAG")]
    pub tags: Option<Vec<Tag>>,
    /// The heartbeat interval [default: 15s].
    #[arg(long, value_name = "TIME", value_parser = args::duration)]
    #[serde(deserialize_with = "duration")]
    pub ping_time: Option<Duration>,
    /// How many jobs run at a time; 1: strictly one after the other [default: 16].
    #[arg(long, value_name = "N")]
    pub concurrency: Option<usize>,
    /// How many requests the broker hands out ahead [default: twice the concurrency].
    #[arg(long, value_name = "N")]
    pub prefetch: Option<u16>,
    /// How long running jobs may take when the agent is stopped [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = args::duration)]
    #[serde(deserialize_with = "duration")]
    pub drain: Option<Duration>,
    /// If another process of this agent is running, end with exit code 8 instead of replacing it.
    #[arg(long)]
    pub give_way: bool,
    /// The directory for files that mappers send.
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub files_dir: Option<PathBuf>,
    /// A domain of files to receive; can be given several times.
    #[arg(long = "files-domain", value_name = "D", help_heading = "Files")]
    pub files_domains: Option<Vec<Tag>>,
    /// The largest file to receive, such as 100MiB [default: 16GiB].
    #[arg(long, value_name = "SIZE", value_parser = args::size, help_heading = "Files")]
    #[serde(deserialize_with = "size")]
    pub files_max: Option<u64>,
    /// Refuse files whose name exists in the directory, instead of replacing them.
    #[arg(long, help_heading = "Files")]
    pub files_never_replace: bool,
}

/// Options of `nanite mapper`, which the file has under [mapper]. The other commands that are mappers use some of them, too.
#[derive(Debug, Default, clap::Args, Deserialize)]
#[command(next_help_heading = "Mapper")]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct MapperOptions {
    #[arg(skip)]
    pub token: Option<String>,
    /// After how long without a heartbeat an agent is removed [default: 60s].
    #[arg(long, value_name = "TIME", value_parser = args::duration)]
    #[serde(deserialize_with = "duration")]
    pub agent_timeout: Option<Duration>,
    /// Let requests and pushes of others wait in the offline queue while no agent offers their service.
    #[arg(long)]
    pub offline_failsafe: bool,
    /// How often to retry what waits in the offline queue, besides when an agent registers [default: 10s].
    #[arg(long, value_name = "TIME", value_parser = args::duration)]
    #[serde(deserialize_with = "duration")]
    pub offline_redelivery_frequency: Option<Duration>,
    /// Share the known agents with other mappers, in the Redis redis://HOST:PORT/DATABASE, rediss:// or unix:///PATH
    /// [also: NANITE_REDIS, `redis` in nanite.toml].
    #[cfg(feature = "redis")]
    #[arg(long, value_name = "URL", help_heading = "Shared state")]
    #[serde(deserialize_with = "secret")]
    pub redis: Option<Zeroizing<String>>,
    /// A file with its password [also: NANITE_REDIS_PASSWORD, `redis-password-file` in nanite.toml].
    #[cfg(feature = "redis")]
    #[arg(long, value_name = "FILE", help_heading = "Shared state")]
    pub redis_password_file: Option<PathBuf>,
    /// A PEM file with the CA of its certificate, for rediss:// [also: `redis-ca` in nanite.toml].
    #[cfg(feature = "redis")]
    #[arg(long, value_name = "FILE", help_heading = "Shared state")]
    pub redis_ca: Option<PathBuf>,
    /// The prefix of its keys [also: `redis-prefix` in nanite.toml; default: nanite].
    #[cfg(feature = "redis")]
    #[arg(long, value_name = "NAME", help_heading = "Shared state")]
    pub redis_prefix: Option<String>,
}

/// Options of `nanite admin`, which the file has under [admin].
#[derive(Debug, Default, clap::Args, Deserialize)]
#[command(next_help_heading = "Pages")]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
#[cfg_attr(not(feature = "admin"), allow(dead_code, reason = "the same file for programs with and without it"))]
pub(super) struct AdminOptions {
    /// The address to listen on [also: `listen` in nanite.toml; default: 127.0.0.1:4000].
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// The URL that browsers use, if it is another, such as that of a TLS proxy [also: `public-url` in nanite.toml].
    #[arg(long, value_name = "URL")]
    pub public_url: Option<String>,
    /// A reverse proxy whose X-Forwarded-For header is believed, as an address or a network; can be given several times [also:
    /// `trusted-proxies` in nanite.toml].
    #[arg(long = "trusted-proxy", value_name = "ADDRESS[/BITS]")]
    pub trusted_proxies: Option<Vec<String>>,
    /// A file with the hash of the password, by `nanite admin hash-password` [also: `password-hash-file` in nanite.toml].
    #[arg(long, value_name = "FILE")]
    pub password_hash_file: Option<PathBuf>,
}

/// Gives options a method `or`, which takes what is not given from a lower layer.
macro_rules! layered {
    ($($options:ident { $($(#[$cfg:meta])* $field:ident),* $(,)? })*) => {$(
        impl $options {
            pub(super) fn or(&self, lower: &Self) -> Self {
                Self { $($(#[$cfg])* $field: self.$field.clone().or(lower.$field.clone())),* }
            }
        }
    )*};
}

/// For flags, what `Option::or` is for options.
trait Flag {
    fn or(self, lower: Self) -> Self;
}

impl Flag for bool {
    fn or(self, lower: bool) -> bool {
        self || lower
    }
}

layered! {
    AgentOptions {
        token, actors_dir, actors, tags, ping_time, concurrency, prefetch, drain, give_way, files_dir, files_domains, files_max,
        files_never_replace,
    }
    MapperOptions {
        token, agent_timeout, offline_failsafe, offline_redelivery_frequency,
        #[cfg(feature = "redis")] redis,
        #[cfg(feature = "redis")] redis_password_file,
        #[cfg(feature = "redis")] redis_ca,
        #[cfg(feature = "redis")] redis_prefix,
    }
}
#[cfg(feature = "admin")]
layered! { AdminOptions { listen, public_url, trusted_proxies, password_hash_file } }

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    args::duration(&String::deserialize(deserializer)?).map(Some).map_err(de::Error::custom)
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    args::size(&String::deserialize(deserializer)?).map(Some).map_err(de::Error::custom)
}

/// A text that is wiped from memory.
pub(super) fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Zeroizing<String>>, D::Error> {
    String::deserialize(deserializer).map(|text| Some(Zeroizing::new(text)))
}
