//! `nanite broker setup`: a virtual host at RabbitMQ in which every node has the permissions it needs, and no others.
//!
//! This file is the command: its arguments, and what is created in which order.

mod api;
mod resources;

use std::collections::BTreeSet;
use std::io::{BufRead, ErrorKind, IsTerminal, Read};
use std::path::{Path, PathBuf};

use api::{Api, ApiUrl};
use resources::{NewPassword, Permissions, difference, password_path, topology};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::error::{CliError, Exit, Result};
use super::output::printable;
use super::runtime::Global;
use super::{args, node, output, runtime};
use crate::packet::{Identity, Role};
use crate::transport::percent_encode;

const PASSWORD_VARIABLE: &str = "NANITE_MANAGEMENT_PASSWORD";
/// The longest line that is read from stdin as a password.
const MAX_PASSWORD_BYTES: u64 = 4096;

/// Set up a broker.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Create a virtual host at RabbitMQ, and a user with its permissions for each node.
    ///
    /// Creates the virtual host, the exchanges and queues that all nodes share, and for each --agent and --mapper a user named like
    /// its identity, nanite-NAME or mapper-NAME. A user may declare and read only its own queues; an agent can read neither the
    /// queues of another agent nor what agents send to mappers. Resources that exist and are correct are not changed: run it again to
    /// add nodes or to check the setup. The password of a new user is written to DIR/ID.password, mode 0600.
    ///
    /// Uses the management API of RabbitMQ as an administrator, whose password comes from --password-file,
    /// NANITE_MANAGEMENT_PASSWORD or stdin (`--password-file -`). Prints one line per step. Exit codes: 0 the setup is complete, 1 a
    /// resource exists with other properties, 5 the user is not an administrator, 7 the API cannot be reached or refuses the password.
    Setup(Args),
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The virtual host.
    #[arg(long, value_name = "NAME", default_value = "nanite")]
    vhost: String,
    /// An agent; can be repeated.
    #[arg(long = "agent", value_name = "NAME")]
    agents: Vec<String>,
    /// A mapper, or a program that acts as one, such as `nanite request`; can be repeated.
    #[arg(long = "mapper", value_name = "NAME")]
    mappers: Vec<String>,
    /// The directory for the passwords of new users.
    #[arg(long, value_name = "DIR", default_value = "broker-passwords")]
    dir: PathBuf,
    /// Give existing users new passwords as well; restart running nodes with them.
    #[arg(long)]
    renew_passwords: bool,
    /// Print what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// The management API.
    #[arg(long, value_name = "URL", default_value = "http://localhost:15672", help_heading = "Administrator")]
    management: String,
    /// For https: the CA that issued the API's certificate.
    #[arg(long, value_name = "FILE", help_heading = "Administrator")]
    ca: Option<PathBuf>,
    /// The administrator.
    #[arg(long, value_name = "NAME", default_value = "guest", help_heading = "Administrator")]
    user: String,
    /// The file with the administrator's password; `-` for stdin [also: NANITE_MANAGEMENT_PASSWORD; default: guest's own].
    #[arg(long, value_name = "FILE", help_heading = "Administrator")]
    password_file: Option<PathBuf>,
}

pub(super) fn run(global: &Global, command: &Command) -> Result<Exit> {
    let Command::Setup(args) = command;
    let usage = |message: &str, help: &str| Err(CliError::new(Exit::Usage, message).help(help));
    let nodes = args.nodes()?;
    let url = ApiUrl::parse(&args.management).map_err(|why| CliError::new(Exit::Usage, why))?;
    let tls = match (&args.ca, url.tls) {
        (Some(ca), true) => Some(api::tls(ca).map_err(|why| {
            CliError::new(Exit::Usage, why)
                .help("`--ca FILE` is the PEM certificate of the CA that issued the API's certificate")
        })?),
        (None, false) => None,
        (Some(_), false) => return usage("`--ca` requires https", "use `--management https://HOST:PORT`"),
        (None, true) => return usage("https requires `--ca FILE`", "name the CA; the system's CAs are not trusted"),
    };
    let api = Api::new(url, args.user.clone(), args.password(global)?, tls);
    let vhost = percent_encode(&args.vhost);
    runtime::run(Setup { global, args, api, vhost }.run(&nodes))
}

impl Args {
    fn nodes(&self) -> Result<Vec<Identity>> {
        let agents = self.agents.iter().map(|name| node::named(Role::Agent, name));
        let mappers = self.mappers.iter().map(|name| node::named(Role::Mapper, name));
        let nodes: BTreeSet<Identity> = agents.chain(mappers).collect::<Result<_, _>>()?;
        if nodes.is_empty() {
            return Err(CliError::new(Exit::Usage, "no node is named")
                .help("name each by the NAME in its certificate: `--agent fred --agent bob --mapper ctl`"));
        }
        if self.vhost.is_empty() || self.vhost.len() > 255 || self.vhost.chars().any(char::is_control) {
            let message = "the name of a virtual host is 1 to 255 bytes, without control characters";
            return Err(CliError::new(Exit::Usage, message));
        }
        Ok(nodes.into_iter().collect())
    }

    /// The administrator's password.
    fn password(&self, global: &Global) -> Result<Zeroizing<String>> {
        match &self.password_file {
            Some(path) if path == Path::new("-") => {
                let stdin = std::io::stdin().lock();
                if stdin.is_terminal() {
                    global.note("the password will be visible while you type; use a pipe or a file instead");
                }
                let mut line = Zeroizing::new(String::new());
                stdin.take(MAX_PASSWORD_BYTES).read_line(&mut line).map_err(|error| {
                    CliError::of(Exit::Usage, &error).context("cannot read the password from stdin")
                })?;
                let length = line.trim_end_matches(['\r', '\n']).len();
                line.truncate(length);
                Ok(line)
            }
            Some(path) => args::read_password(path),
            None => match std::env::var(PASSWORD_VARIABLE) {
                Ok(password) if !password.is_empty() => Ok(Zeroizing::new(password)),
                // RabbitMQ creates this user, and accepts it from the same machine only.
                _ if self.user == "guest" => Ok(Zeroizing::new("guest".into())),
                _ => Err(CliError::new(Exit::Usage, format!("no password for {}", printable(&self.user, false))).help(
                    format!("use `--password-file FILE`, `--password-file -` for stdin, or {PASSWORD_VARIABLE}"),
                )),
            },
        }
    }
}

struct Setup<'a> {
    global: &'a Global,
    args: &'a Args,
    api: Api,
    /// The virtual host, percent-encoded.
    vhost: String,
}

impl Setup<'_> {
    async fn run(&self, nodes: &[Identity]) -> Result<Exit> {
        // All checks come before the first change.
        let administrator = self.api.get("/api/whoami").await?;
        if !administrator.is_some_and(|user| tags(&user).iter().any(|tag| tag == "administrator")) {
            return Err(self.api.not_administrator());
        }
        let mut users = Vec::new();
        for node in nodes {
            users.push((node, self.user_exists(node).await?));
        }
        let vhost_path = format!("/api/vhosts/{}", self.vhost);
        let vhost_exists = self.api.get(&vhost_path).await?.is_some();
        let mut resources = Vec::new();
        for (kind, resource) in topology() {
            let exists = vhost_exists && self.resource_exists(kind, &resource).await?;
            resources.push((kind, resource, exists));
        }

        let vhost = format!("virtual host {}", printable(&self.args.vhost, false));
        self.create(vhost_exists, &vhost, self.api.send("PUT", &vhost_path, json!({}))).await?;
        for (_, resource, exists) in &resources {
            step(if *exists { "exists" } else { self.verb("created", "would create") }, text(resource, "name"))?;
        }
        let missing = |kind: &str| -> Vec<&Value> {
            resources.iter().filter(|(of, _, exists)| *of == kind && !exists).map(|(_, resource, _)| resource).collect()
        };
        let missing = json!({"exchanges": missing("exchange"), "queues": missing("queue")});
        if !self.args.dry_run && resources.iter().any(|(_, _, exists)| !exists) {
            // An import needs no permissions in the virtual host.
            self.api.send("POST", &format!("/api/definitions/{}", self.vhost), missing).await?;
        }
        for (node, exists) in users {
            self.create_user(node, exists).await?;
            let path = format!("/api/permissions/{}/{node}", self.vhost);
            let permissions = Permissions::of(node);
            let exists = self.api.get(&path).await?.is_some_and(|found| permissions.matches(&found));
            let Permissions { configure, write, read } = &permissions;
            let what = format!("permissions of {node}: configure {configure}, write {write}, read {read}");
            self.create(exists, &what, self.api.send("PUT", &path, permissions.json())).await?;
        }
        if !vhost_exists {
            // RabbitMQ gives the creator of a virtual host all permissions in it; the administrator does not need them.
            let path = format!("/api/permissions/{}/{}", self.vhost, percent_encode(&self.args.user));
            if !self.args.dry_run {
                self.api.delete(&path).await?;
            }
            let user = printable(&self.args.user, false);
            let verb = self.verb("removed", "would remove");
            step(verb, &format!("permissions of {user}, which came with the virtual host"))?;
        }
        self.report_other_users(nodes).await?;
        if let Some(node) = nodes.first() {
            let (role, name, vhost) = (node.role(), node.name(), &self.vhost);
            let password_file = password_path(&self.args.dir, node);
            self.global.note(&format!(
                "start a node with: nanite {role} --token {name} --broker amqp://{node}@HOST:5672/{vhost} \
                 --broker-password-file {}",
                password_file.display()
            ));
        }
        Ok(Exit::Success)
    }

    /// Whether a node's user exists. One with tags was not created by setup, and is an error.
    async fn user_exists(&self, node: &Identity) -> Result<bool> {
        let Some(user) = self.api.get(&format!("/api/users/{node}")).await? else { return Ok(false) };
        if tags(&user).is_empty() {
            return Ok(true);
        }
        let message = format!("the user {node} has tags: it has more rights than a node may have");
        Err(CliError::new(Exit::Failure, message)
            .help(format!("if only the node uses it, run `rabbitmqctl set_user_tags {node}`")))
    }

    /// Whether a shared exchange or queue exists. One with other properties is an error.
    async fn resource_exists(&self, kind: &str, expected: &Value) -> Result<bool> {
        let name = text(expected, "name");
        let found = self.api.get(&format!("/api/{kind}s/{}/{}", self.vhost, percent_encode(name))).await?;
        let Some(difference) = found.as_ref().and_then(|found| difference(expected, found)) else {
            return Ok(found.is_some());
        };
        let vhost = printable(&self.args.vhost, false);
        let message = format!("the {kind} {name} exists with other properties: {difference}");
        Err(CliError::new(Exit::Failure, message).help(format!(
            "delete it if it is not used, `rabbitmqctl delete_{kind} -p {vhost} {name}`, or use another `--vhost`"
        )))
    }

    async fn create_user(&self, node: &Identity, exists: bool) -> Result<()> {
        if exists && !self.args.renew_passwords {
            return step("exists", &format!("user {node}"));
        }
        let path = password_path(&self.args.dir, node);
        if !self.args.dry_run {
            let failed = |error: std::io::Error| {
                let help = match error.kind() {
                    ErrorKind::AlreadyExists => {
                        "it may be the password of a user at another broker: move it, or use another directory with `--dir`"
                    }
                    _ => "use a directory that can be written: `--dir DIR`",
                };
                CliError::of(Exit::Failure, &error).context(format!("cannot write {}", path.display())).help(help)
            };
            // The file is written first, so that no user has an unknown password; an old file is replaced once the broker has
            // accepted the new password.
            let password = NewPassword::create(&path, exists).map_err(failed)?;
            let user = password.user().map_err(|error| CliError::of(Exit::Failure, &error))?;
            self.api.send("PUT", &format!("/api/users/{node}"), user).await?;
            password.commit().map_err(failed)?;
        }
        let verb = if exists { self.verb("renewed", "would renew") } else { self.verb("created", "would create") };
        step(verb, &format!("user {node}, its password in {}", path.display()))
    }

    /// Reports users with other permissions in the virtual host.
    async fn report_other_users(&self, nodes: &[Identity]) -> Result<()> {
        let all = self.api.get(&format!("/api/vhosts/{}/permissions", self.vhost)).await?.unwrap_or_default();
        for found in all.as_array().into_iter().flatten() {
            let user = text(found, "user");
            let node = user.parse::<Identity>();
            if node.is_ok_and(|node| nodes.contains(&node) || Permissions::of(&node).matches(found)) {
                continue;
            }
            let [configure, write, read] = ["configure", "write", "read"].map(|key| text(found, key));
            let vhost = &self.args.vhost;
            let message = format!(
                "user {user}: configure {configure:?}, write {write:?}, read {read:?}; if it needs no access here: \
                 `rabbitmqctl clear_permissions -p {vhost} {user}`"
            );
            let label = output::stderr_paint().yellow("also has permissions:");
            self.global.note(&format!("{label} {}", printable(&message, false)));
        }
        Ok(())
    }

    /// Creates a resource unless it exists or this is a dry run, and prints the step.
    async fn create(&self, exists: bool, what: &str, request: impl Future<Output = Result<()>>) -> Result<()> {
        if exists {
            return step("exists", what);
        }
        if !self.args.dry_run {
            request.await?;
        }
        step(self.verb("created", "would create"), what)
    }

    fn verb(&self, done: &'static str, dry_run: &'static str) -> &'static str {
        if self.args.dry_run { dry_run } else { done }
    }
}

fn step(verb: &str, what: &str) -> Result<()> {
    output::line(&format!("{verb:<12}  {what}"))
}

/// The string with this key, or an empty one.
fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// The tags of a user: a list, or with older brokers a text with commas.
fn tags(user: &Value) -> Vec<String> {
    match user.get("tags") {
        Some(Value::Array(tags)) => tags.iter().filter_map(|tag| Some(tag.as_str()?.to_owned())).collect(),
        Some(Value::String(tags)) => {
            tags.split(',').map(|tag| tag.trim().to_owned()).filter(|tag| !tag.is_empty()).collect()
        }
        _ => Vec::new(),
    }
}
