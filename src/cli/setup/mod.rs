//! `nanite broker setup`: a virtual host at RabbitMQ in which every node may do what it needs, and no more.

mod http;
mod passwords;
mod wanted;

use std::collections::BTreeSet;
use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::error::{CliError, Exit};
use super::output::printable;
use super::{Global, args, identity, output};
use crate::packet::{Identity, Role};
use crate::transport::segment;
use http::{Api, ApiError, ApiUrl};
use wanted::Permissions;

/// The environment variable of the administrator's password.
const PASSWORD: &str = "NANITE_MANAGEMENT_PASSWORD";
/// The longest password that is read from stdin, in bytes.
const LONGEST: u64 = 4096;

/// Set a broker up.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Make a virtual host at RabbitMQ, and a user with its permissions for each node.
    ///
    /// It makes the virtual host, the exchanges and queues that all nodes share, and for each --agent and --mapper a user named as its
    /// identity, nanite-NAME or mapper-NAME. A user may declare and read its own queues only; an agent cannot read another's queue,
    /// nor what agents say to mappers. What is there already and right is left as it is: run it again to add nodes, or to see
    /// whether all is in order. The password of a new user goes into DIR/ID.password, mode 0600.
    ///
    /// It speaks to the management API of RabbitMQ as an administrator, whose password comes from --password-file, from
    /// NANITE_MANAGEMENT_PASSWORD, or from stdin (`--password-file -`). Each step is a line on stdout. Exit codes: 0 all is as it has to
    /// be, 1 something is there with other properties, 5 not an administrator, 7 the API cannot be reached or refuses the password.
    Setup(Args),
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The virtual host.
    #[arg(long, value_name = "NAME", default_value = "nanite")]
    vhost: String,
    /// An agent; can be given several times.
    #[arg(long = "agent", value_name = "NAME")]
    agents: Vec<String>,
    /// A mapper, or a program that is one, such as `nanite request`; can be given several times.
    #[arg(long = "mapper", value_name = "NAME")]
    mappers: Vec<String>,
    /// Where the passwords of new users go.
    #[arg(long, value_name = "DIR", default_value = "broker-passwords")]
    dir: PathBuf,
    /// Give users that are there new passwords, too; nodes that run have to be started again with them.
    #[arg(long)]
    renew_passwords: bool,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// The management API.
    #[arg(long, value_name = "URL", default_value = "http://localhost:15672", help_heading = "Administrator")]
    management: String,
    /// The file with the CA that the API's certificate is from, for https.
    #[arg(long, value_name = "FILE", help_heading = "Administrator")]
    ca: Option<PathBuf>,
    /// The administrator.
    #[arg(long, value_name = "NAME", default_value = "guest", help_heading = "Administrator")]
    user: String,
    /// The file with the administrator's password; `-` reads it from stdin [also: NANITE_MANAGEMENT_PASSWORD; default: guest's own].
    #[arg(long, value_name = "FILE", help_heading = "Administrator")]
    password_file: Option<PathBuf>,
}

pub(super) fn run(global: &Global, command: &Command) -> Result<Exit, CliError> {
    let Command::Setup(args) = command;
    let nodes = args.nodes()?;
    let url = ApiUrl::parse(&args.management).map_err(|why| CliError::new(Exit::Usage, why))?;
    let tls = match (&args.ca, url.tls) {
        (Some(ca), true) => Some(http::tls(ca).map_err(|why| {
            CliError::new(Exit::Usage, why)
                .help("`--ca FILE` holds the PEM of the CA that issued the API's certificate")
        })?),
        (None, false) => None,
        (Some(_), false) => {
            return Err(
                CliError::new(Exit::Usage, "a CA is of use with https only").help("`--management https://HOST:PORT`")
            );
        }
        (None, true) => {
            return Err(CliError::new(Exit::Usage, "which CA is the API's certificate from?")
                .help("name its file: `--ca FILE`; the system's CAs are not believed"));
        }
    };
    let shown = url.to_string();
    let api = Api::new(url, args.user.clone(), args.password(global)?, tls);
    let setup = Setup { global, args, api, vhost: segment(&args.vhost) };
    setup.all(&nodes).map_err(|failure| failure.told(&shown))
}

/// Why it did not come to its end.
enum Failed {
    Api(ApiError),
    Told(CliError),
}

impl From<ApiError> for Failed {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

impl From<CliError> for Failed {
    fn from(error: CliError) -> Self {
        Self::Told(error)
    }
}

impl Failed {
    fn told(self, api: &str) -> CliError {
        let error = match self {
            Failed::Told(error) => return error,
            Failed::Api(error) => error,
        };
        let failure = |exit| CliError::of(exit, &error).context(api);
        match &error {
            ApiError::NotHere => {
                failure(Exit::Usage).help("use `--management https://HOST:15671 --ca FILE`, or run this on the broker's machine")
            }
            ApiError::Unreachable(_) | ApiError::NoApi => failure(Exit::Unreachable).help(
                "the broker needs its management plugin: `rabbitmq-plugins enable rabbitmq_management`; name another place with \
                 `--management URL`",
            ),
            ApiError::Tls(_) => failure(Exit::Unreachable).help(
                "`--ca` names the CA that issued the API's certificate, which has to hold the host's name",
            ),
            ApiError::Credentials(_) => failure(Exit::Unreachable)
                .help("name an administrator with `--user NAME`, and the password's file with `--password-file FILE`"),
            ApiError::Forbidden(user) => {
                failure(Exit::Denied).help(format!("`rabbitmqctl set_user_tags {user} administrator` makes it one"))
            }
            ApiError::Refused { .. } => failure(Exit::Failure).help("look at the log of the broker"),
        }
    }
}

impl Args {
    fn nodes(&self) -> Result<Vec<Identity>, CliError> {
        let agents = self.agents.iter().map(|name| identity::named(Role::Agent, name));
        let mappers = self.mappers.iter().map(|name| identity::named(Role::Mapper, name));
        let nodes: BTreeSet<Identity> = agents.chain(mappers).collect::<Result<_, _>>()?;
        if nodes.is_empty() {
            return Err(CliError::new(Exit::Usage, "for whom? No node is named")
                .help("name each by its certificate's NAME: `--agent fred --agent bob --mapper ctl`"));
        }
        if self.vhost.is_empty() || self.vhost.len() > 255 || self.vhost.chars().any(char::is_control) {
            return Err(CliError::new(
                Exit::Usage,
                "a virtual host has a name of 1 to 255 bytes, without control characters",
            ));
        }
        Ok(nodes.into_iter().collect())
    }

    /// The administrator's password.
    fn password(&self, global: &Global) -> Result<Zeroizing<String>, CliError> {
        match &self.password_file {
            Some(path) if path == Path::new("-") => {
                let stdin = std::io::stdin().lock();
                if stdin.is_terminal() {
                    global.note("the password is shown while it is typed; better give it by a pipe or a file");
                }
                let mut line = Zeroizing::new(String::new());
                std::io::Read::take(stdin, LONGEST).read_line(&mut line).map_err(|error| {
                    CliError::of(Exit::Usage, &error).context("cannot read the password from stdin")
                })?;
                let length = line.trim_end_matches(['\r', '\n']).len();
                line.truncate(length);
                Ok(line)
            }
            Some(path) => args::read_password(path),
            None => match std::env::var(PASSWORD) {
                Ok(password) if !password.is_empty() => Ok(Zeroizing::new(password)),
                // RabbitMQ makes this user, and lets it in from the same machine only.
                _ if self.user == "guest" => Ok(Zeroizing::new("guest".into())),
                _ => Err(CliError::new(Exit::Usage, format!("no password for {}", printable(&self.user, false)))
                    .help(format!("`--password-file FILE`, `--password-file -` for stdin, or {PASSWORD}"))),
            },
        }
    }
}

struct Setup<'a> {
    global: &'a Global,
    args: &'a Args,
    api: Api,
    /// The virtual host, as a segment of a path.
    vhost: String,
}

impl Setup<'_> {
    fn all(&self, nodes: &[Identity]) -> Result<Exit, Failed> {
        // Before anything is changed: whoever cannot do all of it does none of it.
        let me = self.api.get("/api/whoami")?.ok_or(ApiError::NoApi)?;
        if !has_tag(&me, "administrator") {
            return Err(ApiError::Forbidden(self.args.user.clone()).into());
        }
        let users: Vec<_> =
            nodes.iter().map(|node| self.user(node).map(|there| (node, there))).collect::<Result<_, _>>()?;
        let is_there = self.api.get(&format!("/api/vhosts/{}", self.vhost))?.is_some();
        let missing = if is_there { self.missing()? } else { wanted::topology() };

        let vhost = printable(&self.args.vhost, false);
        self.step(is_there, &format!("virtual host {vhost}"), || {
            self.api.send("PUT", &format!("/api/vhosts/{}", self.vhost), &json!({}))
        })?;
        self.topology(&missing)?;
        for (node, there) in users {
            if !there || self.args.renew_passwords {
                self.make_user(node, there)?;
            } else {
                self.line("is there", &format!("user {node}"))?;
            }
            self.permit(node)?;
        }
        if !is_there {
            self.step_back()?;
        }
        self.others(nodes)?;
        self.hint(nodes);
        Ok(Exit::Success)
    }

    /// Whether a node's user is there. One that setup cannot have made is left alone.
    fn user(&self, node: &Identity) -> Result<bool, Failed> {
        let Some(user) = self.api.get(&format!("/api/users/{node}"))? else { return Ok(false) };
        let tagged = match user.get("tags") {
            Some(Value::Array(tags)) => !tags.is_empty(),
            Some(Value::String(tags)) => !tags.is_empty(),
            _ => false,
        };
        if tagged {
            return Err(CliError::new(
                Exit::Failure,
                format!("the user {node} has tags: it can do more than a node may"),
            )
            .help(format!("if it is only a node's, run `rabbitmqctl set_user_tags {node}`"))
            .into());
        }
        Ok(true)
    }

    /// What of the shared exchanges and queues is not there; something of another kind in their place is an error.
    fn missing(&self) -> Result<Value, Failed> {
        let mut wanted = wanted::topology();
        for kind in ["exchanges", "queues"] {
            let Some(Value::Array(all)) = wanted.get_mut(kind) else { continue };
            let mut missing = Vec::new();
            for one in all.drain(..) {
                let name = one.get("name").and_then(Value::as_str).unwrap_or_default();
                match self.api.get(&format!("/api/{kind}/{}/{}", self.vhost, segment(name)))? {
                    None => missing.push(one),
                    Some(found) => {
                        if let Some(difference) = wanted::difference(&one, &found) {
                            let thing = kind.trim_end_matches('s');
                            let vhost = printable(&self.args.vhost, false);
                            return Err(CliError::new(Exit::Failure, format!("the {thing} {name} is of another kind: {difference}"))
                                .help(format!(
                                    "delete it when nobody needs it, `rabbitmqctl delete_{thing} -p {vhost} {name}`, or give another \
                                     `--vhost`"
                                ))
                                .into());
                        }
                    }
                }
            }
            *all = missing;
        }
        Ok(wanted)
    }

    /// RabbitMQ lets whoever makes a virtual host do everything in it. Nobody needs that here.
    fn step_back(&self) -> Result<(), Failed> {
        if !self.args.dry_run {
            self.api.delete(&format!("/api/permissions/{}/{}", self.vhost, segment(&self.args.user)))?;
        }
        let how = if self.args.dry_run { "would take" } else { "took" };
        Ok(self.line(
            how,
            &format!("permissions of {}, which came with the virtual host", printable(&self.args.user, false)),
        )?)
    }

    fn topology(&self, missing: &Value) -> Result<(), Failed> {
        let names = |of: &Value| -> Vec<String> {
            let all = ["exchanges", "queues"].into_iter().filter_map(|kind| of.get(kind)?.as_array());
            all.flatten().filter_map(|one| Some(one.get("name")?.as_str()?.to_owned())).collect()
        };
        let (missing_names, all) = (names(missing), names(&wanted::topology()));
        for name in all.iter().filter(|name| !missing_names.contains(name)) {
            self.line("is there", name)?;
        }
        for name in &missing_names {
            self.line(self.make(), name)?;
        }
        if !missing_names.is_empty() && !self.args.dry_run {
            // An import needs no permissions in the virtual host.
            self.api.send("POST", &format!("/api/definitions/{}", self.vhost), missing)?;
        }
        Ok(())
    }

    fn make_user(&self, node: &Identity, there: bool) -> Result<(), Failed> {
        let path = passwords::path(&self.args.dir, node);
        let what = format!("user {node}, its password in {}", path.display());
        let how = if there { self.renew() } else { self.make() };
        if self.args.dry_run {
            return Ok(self.line(how, &what)?);
        }
        let failed = |error: std::io::Error| {
            let failure = CliError::of(Exit::Failure, &error).context(format!("cannot write {}", path.display()));
            match error.kind() {
                std::io::ErrorKind::AlreadyExists => failure.help(
                    "it may be the password of a user of another broker: move it away, or give another directory with `--dir`",
                ),
                _ => failure.help("give a directory that can be written: `--dir DIR`"),
            }
        };
        // The file first, so that there is never a user whose password nobody has; and the old one stays until the broker has the new.
        let password = passwords::make(&path, there).map_err(failed)?;
        let hash = passwords::salted_hash(password.text()).map_err(|error| CliError::of(Exit::Failure, &error))?;
        let user = json!({"password_hash": hash, "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": ""});
        self.api.send("PUT", &format!("/api/users/{node}"), &user)?;
        password.keep().map_err(failed)?;
        Ok(self.line(how, &what)?)
    }

    fn permit(&self, node: &Identity) -> Result<(), Failed> {
        let path = format!("/api/permissions/{}/{node}", self.vhost);
        let wanted = Permissions::of(node);
        let is_right = self.api.get(&path)?.is_some_and(|found| wanted.is(&found));
        let Permissions { configure, write, read } = &wanted;
        let what = format!("permissions of {node}: configure {configure}, write {write}, read {read}");
        self.step(is_right, &what, || self.api.send("PUT", &path, &wanted.json()))
    }

    /// Says who else may do something in the virtual host.
    fn others(&self, nodes: &[Identity]) -> Result<(), Failed> {
        let all = self.api.get(&format!("/api/vhosts/{}/permissions", self.vhost))?.unwrap_or_default();
        let text = |of: &Value, key: &str| of.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        for one in all.as_array().into_iter().flatten() {
            let user = text(one, "user");
            let node = user.parse::<Identity>().ok();
            let right = node.as_ref().is_some_and(|node| nodes.contains(node) || Permissions::of(node).is(one));
            if !right {
                let (configure, write, read) = (text(one, "configure"), text(one, "write"), text(one, "read"));
                let paint = output::stderr_paint();
                let vhost = printable(&self.args.vhost, false);
                self.global.note(&format!(
                    "{} {}",
                    paint.yellow("also there:"),
                    printable(
                        &format!(
                            "user {user}: configure {configure:?}, write {write:?}, read {read:?}; when it needs nothing here: \
                             `rabbitmqctl clear_permissions -p {vhost} {user}`"
                        ),
                        false
                    )
                ));
            }
        }
        Ok(())
    }

    /// Says how a node is started with what was made.
    fn hint(&self, nodes: &[Identity]) {
        let Some(node) = nodes.first() else { return };
        let password = passwords::path(&self.args.dir, node);
        self.global.note(&format!(
            "start a node with: nanite {} --token {} --broker amqp://{node}@HOST:5672/{} --broker-password-file {}",
            node.role(),
            node.name(),
            self.vhost,
            password.display()
        ));
    }

    fn step(&self, is_right: bool, what: &str, make: impl FnOnce() -> Result<(), ApiError>) -> Result<(), Failed> {
        if is_right {
            return Ok(self.line("is there", what)?);
        }
        if !self.args.dry_run {
            make()?;
        }
        Ok(self.line(self.make(), what)?)
    }

    fn make(&self) -> &'static str {
        if self.args.dry_run { "would make" } else { "made" }
    }

    fn renew(&self) -> &'static str {
        if self.args.dry_run { "would renew" } else { "renewed" }
    }

    fn line(&self, how: &str, what: &str) -> Result<(), CliError> {
        output::line(&format!("{how:<12}{what}"))
    }
}

fn has_tag(user: &Value, tag: &str) -> bool {
    match user.get("tags") {
        Some(Value::Array(tags)) => tags.iter().any(|one| one == tag),
        // As older brokers have them.
        Some(Value::String(tags)) => tags.split(',').any(|one| one.trim() == tag),
        _ => false,
    }
}
