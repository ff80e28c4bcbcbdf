//! What `nanite request` and `nanite push` send, and to which agents: by the short-lived mapper of the command, or by a running one.

use std::sync::Arc;
use std::time::Duration;

use super::error::{CliError, Exit, Result};
use super::fleet::{DiscoveryArgs, Fleet, close, listed};
use super::node::{NodeArgs, WithOption};
use super::output::counted;
use super::runtime::{self, Global};
use super::state_dir::RoundRobinState;
use super::{args, remedy};
use crate::mapper::{AgentRecord, MapperDispatch, RoundRobin};
use crate::packet::{Identity, Payload, Role, SelectorName, Service, Tag};
use crate::proxy::{MapperProxy, ProxyError};
use crate::request::{Dispatch, Events, RequestBuilder};

/// How long a push waits for its target to register, unless `--look` is longer.
const PUSH_TARGET_TIMEOUT: Duration = Duration::from_secs(5);
const LIST_AGENTS: &str = "list the agents with `nanite agents`";

/// The service, the payload and the agents.
#[derive(Debug, clap::Args)]
pub(super) struct DispatchArgs {
    /// The service, such as /simple/echo.
    service: Service,
    /// Its payload: JSON where it parses, else text; `-` reads it from stdin; null if left out.
    #[arg(allow_hyphen_values = true)]
    payload: Option<String>,
    /// How to select among the agents that offer it.
    #[arg(long, value_name = "NAME", default_value = "least_loaded", help_heading = "Agents")]
    selector: SelectorName,
    /// Only this agent: its name, or nanite-NAME.
    #[arg(long, value_name = "NAME", value_parser = args::agent, conflicts_with = "at_least", help_heading = "Agents")]
    target: Option<Identity>,
    /// Only agents with this tag; given several times, with all of them.
    #[arg(long = "tag", value_name = "TAG", help_heading = "Agents")]
    tags: Vec<Tag>,
    #[command(flatten)]
    discovery: DiscoveryArgs,
    /// Have a running mapper dispatch it, instead of being a mapper.
    #[arg(long, conflicts_with_all = ["at_least", "look"], help_heading = "Delivery")]
    pub via_mapper: bool,
    /// If no agent offers it, let it wait in the offline queue until a running mapper delivers it.
    #[arg(long, conflicts_with = "at_least", help_heading = "Delivery")]
    offline: bool,
    /// Let the message survive a restart of the broker.
    #[arg(long, help_heading = "Delivery")]
    persistent: bool,
}

/// How requests reach agents.
pub(super) enum Route<'a> {
    /// The mapper of this process dispatches them.
    Direct(&'a mut Fleet),
    /// A running mapper dispatches them.
    ViaMapper { proxy: MapperProxy, broker: String },
}

impl Route<'_> {
    /// Sends a request.
    pub(super) async fn request(&mut self, args: &DispatchArgs, payload: Payload, timeout: Duration) -> Result<Events> {
        let sent = match self {
            Self::Direct(fleet) => args.direct(fleet, payload, timeout).await?.timeout(timeout).events().await,
            Self::ViaMapper { proxy, .. } => args.via_mapper(proxy, payload).timeout(timeout).events().await,
        };
        sent.map_err(|error| remedy::request(&error, self.broker()))
    }

    /// Sends a push; returns the agents that got it, unless a running mapper selects them.
    pub(super) async fn push(&mut self, args: &DispatchArgs, payload: Payload) -> Result<Vec<Identity>> {
        let sent = match self {
            Self::Direct(fleet) => {
                let limit = args.discovery.look.max(PUSH_TARGET_TIMEOUT);
                args.direct(fleet, payload, limit).await?.push().await
            }
            Self::ViaMapper { proxy, .. } => args.via_mapper(proxy, payload).push().await,
        };
        sent.map_err(|error| remedy::request(&error, self.broker()))
    }

    /// The broker's URL, without a password.
    pub(super) fn broker(&self) -> &str {
        match self {
            Self::Direct(fleet) => &fleet.broker,
            Self::ViaMapper { broker, .. } => broker,
        }
    }
}

impl DispatchArgs {
    /// Reads the payload, connects, and runs a command.
    pub(super) fn run<T>(
        &self,
        global: &Global,
        node: &NodeArgs,
        command: impl AsyncFnOnce(Route<'_>, Payload) -> Result<T>,
    ) -> Result<T> {
        let node = node.node(global, Role::Mapper)?;
        let payload = self.payload(global)?;
        runtime::run(async {
            if !self.via_mapper {
                let mut fleet = Fleet::start(&node).await?;
                let result = command(Route::Direct(&mut fleet), payload).await;
                fleet.close().await;
                return result;
            }
            let (connection, broker) = (node.connect().await?, node.broker());
            let proxy = connection.proxy().start().await;
            let proxy = proxy.map_err(|ProxyError::Transport(error)| remedy::transport(&error, Some(&broker)))?;
            let result = command(Route::ViaMapper { proxy, broker }, payload).await;
            close(connection.close()).await;
            result
        })
    }

    fn payload(&self, global: &Global) -> Result<Payload> {
        args::payload(self.payload.as_deref(), |text| global.note(text))
    }

    /// The payload in the console, which reads its commands from stdin, and is the mapper itself.
    pub(super) fn console_payload(&self, global: &Global) -> Result<Payload> {
        let usage = |message: &str, help: &str| Err(CliError::usage(message).help(help));
        if self.payload.as_deref() == Some("-") {
            return usage(
                "`-` reads a payload from stdin, where the console reads its commands",
                "write the payload into the line: JSON as it is, other text with spaces in single quotes",
            );
        }
        if self.via_mapper {
            return usage("the console is a mapper itself", "use `nanite request --via-mapper` in the shell");
        }
        self.payload(global)
    }

    fn via_mapper(&self, proxy: &MapperProxy, payload: Payload) -> RequestBuilder<MapperProxy> {
        self.apply(proxy.request(self.service.as_str(), payload))
    }

    /// Waits until agents offer the service. With `--offline` the request is sent even if none does.
    async fn direct(
        &self,
        fleet: &mut Fleet,
        payload: Payload,
        limit: Duration,
    ) -> Result<RequestBuilder<MapperDispatch>> {
        match self.wait_until_offered(fleet, limit).await {
            Err(error) if error.exit() != Exit::NotOffered || !self.offline => return Err(error),
            _ => {}
        }
        let mut request = self.apply(fleet.mapper.request(self.service.as_str(), payload));
        let service = self.service.resolved();
        if let Some(last) = self.round_robin().and_then(|state| state.last(&service).cloned()) {
            request = request.custom_selector(Arc::new(RoundRobin::default().after(&service, last)));
        }
        Ok(request)
    }

    async fn wait_until_offered(&self, fleet: &mut Fleet, limit: Duration) -> Result<()> {
        let service = self.service.resolved();
        let matches = |record: &AgentRecord| record.offers(&service) && record.carries(&self.tags);
        let DiscoveryArgs { at_least, look } = self.discovery;
        if let Some(target) = &self.target {
            return match fleet.wait_for(target, limit).await? {
                Some(record) if matches(&record) => Ok(()),
                Some(record) => Err(self.target_does_not_match(&record)),
                None => Err(fleet.not_offered(format!("{target} is not registered"), LIST_AGENTS)),
            };
        }
        match fleet.discover(at_least, look.min(limit), matches).await? {
            (agents, 0) => Err(self.not_offered(&agents, fleet)),
            (_, count) if count < at_least => {
                let offer = if count == 1 { "offers" } else { "offer" };
                let message = format!("{} {offer} it, not {at_least}", counted(count, "agent"));
                Err(fleet.not_offered(message, LIST_AGENTS))
            }
            _ => Ok(()),
        }
    }

    fn apply<D: Dispatch>(&self, request: RequestBuilder<D>) -> RequestBuilder<D> {
        let request = request.with_option(self.target.clone(), RequestBuilder::target);
        let request = self.tags.iter().cloned().fold(request, RequestBuilder::tag);
        request.selector(self.selector).offline_failsafe(self.offline).persistent(self.persistent)
    }

    /// Saves the agent of a round-robin request, for the next run.
    pub(super) fn save_round_robin(&self, agent: &Identity) {
        if let Some(state) = self.round_robin() {
            state.save(&self.service, agent);
        }
    }

    fn round_robin(&self) -> Option<RoundRobinState> {
        let is_round_robin = self.selector == SelectorName::RoundRobin && self.target.is_none() && !self.via_mapper;
        is_round_robin.then(RoundRobinState::load)
    }

    fn target_does_not_match(&self, record: &AgentRecord) -> CliError {
        let identity = &record.identity;
        let (message, help) = if record.offers(&self.service.resolved()) {
            let tags = listed(record.tags.iter().map(Tag::as_str));
            (format!("{identity} does not have {}", self.wanted_tags()), format!("it has {tags}"))
        } else {
            let services = listed(record.services.iter().map(Service::as_str));
            (format!("{identity} does not offer {}", self.service), format!("it offers {services}"))
        };
        CliError::new(Exit::NotOffered, message).help(help)
    }

    fn not_offered(&self, agents: &[Arc<AgentRecord>], fleet: &Fleet) -> CliError {
        let service = self.service.resolved();
        let message = format!("no agent offers {}", self.service);
        if agents.is_empty() {
            return fleet.not_offered(
                format!("{message}: no agent is registered"),
                "agents must use the same broker and virtual host, and certificates that this node trusts",
            );
        }
        if agents.iter().any(|record| record.offers(&service)) {
            return CliError::new(Exit::NotOffered, format!("{message} with {}", self.wanted_tags()))
                .help("list the agents and their tags with `nanite agents`");
        }
        let mut services: Vec<&str> = agents.iter().flat_map(|agent| &agent.services).map(Service::as_str).collect();
        services.sort_unstable();
        services.dedup();
        fleet.not_offered(message, &format!("available services: {}", listed(services)))
    }

    fn wanted_tags(&self) -> String {
        let tags: Vec<&str> = self.tags.iter().map(Tag::as_str).collect();
        format!("{} {}", if tags.len() == 1 { "the tag" } else { "the tags" }, tags.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::fleet::tests::{agent as start_agent, fleet};
    use crate::transport::MemoryBroker;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: DispatchArgs,
    }

    fn parse(line: &[&str]) -> DispatchArgs {
        Line::try_parse_from(["x"].iter().chain(line)).unwrap_or_else(|error| panic!("{error}")).args
    }

    #[test]
    fn u02_a_negative_number_is_a_payload() {
        assert_eq!(parse(&["/a/b", "-5"]).payload.as_deref(), Some("-5"));
    }

    #[tokio::test(start_paused = true)]
    async fn u02_not_offered_error_names_reason() {
        let broker = MemoryBroker::new();
        let limit = Duration::from_secs(3);
        let refused = async |fleet: &mut Fleet, line: &[&str]| {
            let error = parse(line).direct(fleet, Payload::default(), limit).await.unwrap_err();
            assert_eq!(error.exit(), Exit::NotOffered);
            (error.message().to_owned(), error.remedy().unwrap_or_default().to_owned())
        };
        let (message, help) = refused(&mut fleet(&broker).await, &["/x/echo"]).await;
        assert_eq!(message, "no agent offers /x/echo: no agent is registered");
        assert!(help.contains("same broker"), "{help}");

        let _fred = start_agent(&broker, "fred", "x", &["big"]).await;
        let mut fleet = fleet(&broker).await;
        let (message, help) = refused(&mut fleet, &["/y/echo"]).await;
        assert_eq!(
            (message.as_str(), help.as_str()),
            ("no agent offers /y/echo", "available services: /x/echo, /x/fail")
        );
        let (message, _) = refused(&mut fleet, &["/x/echo", "--tag", "big", "--tag", "fast"]).await;
        assert_eq!(message, "no agent offers /x/echo with the tags big, fast");
        let (message, _) = refused(&mut fleet, &["/x/echo", "--target", "bob"]).await;
        assert_eq!(message, "nanite-bob is not registered");
        let (message, help) = refused(&mut fleet, &["/y/echo", "--target", "nanite-fred"]).await;
        assert_eq!(message, "nanite-fred does not offer /y/echo");
        assert_eq!(help, "it offers /x/echo, /x/fail");
        let (message, help) = refused(&mut fleet, &["/x/echo", "--target", "fred", "--tag", "fast"]).await;
        assert_eq!((message.as_str(), help.as_str()), ("nanite-fred does not have the tag fast", "it has big"));
    }

    #[tokio::test(start_paused = true)]
    async fn u02_push_looks_for_agents_as_long_as_told() {
        for line in [&["/x/echo", "--look", "60s"][..], &["/x/echo", "--target", "late", "--look", "60s"]] {
            let broker = MemoryBroker::new();
            let mut fleet = fleet(&broker).await;
            let late = async {
                tokio::time::sleep(PUSH_TARGET_TIMEOUT * 2).await;
                start_agent(&broker, "late", "x", &[]).await
            };
            let args = parse(line);
            let mut route = Route::Direct(&mut fleet);
            let (_late, sent) = tokio::join!(late, route.push(&args, Payload::default()));
            assert_eq!(sent.unwrap(), [Identity::agent("late").unwrap()], "{line:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn u02_request_options_select_targets() {
        let broker = MemoryBroker::new();
        let _agents = (start_agent(&broker, "a", "x", &["t"]).await, start_agent(&broker, "b", "x", &[]).await);
        let mut fleet = fleet(&broker).await;
        let payload = Payload::from("hi");
        for (line, expected) in [
            (&["/x/echo", "--selector", "all"][..], &["nanite-a", "nanite-b"][..]),
            (&["/x/echo", "--selector", "all", "--tag", "t"], &["nanite-a"]),
            (&["/x/echo", "--target", "b"], &["nanite-b"]),
        ] {
            let request = parse(line).direct(&mut fleet, payload.clone(), Duration::from_secs(1)).await.unwrap();
            let answers = request.await.unwrap();
            let from: Vec<&str> = answers.results().map(|(from, _)| from.as_str()).collect();
            assert_eq!(from, expected);
            assert!(answers.results().all(|(_, value)| *value == payload));
        }
    }
}
