//! What `nanite request` and `nanite push` have in common: what is asked, of whom, and waiting until somebody can be asked.

use std::sync::Arc;
use std::time::Duration;

use super::error::{CliError, Exit};
use super::fleet::Fleet;
use super::kept::Turns;
use super::text::counted;
use super::{Global, duration, payload};
use crate::mapper::{AgentRecord, MapperDispatch, RoundRobin};
use crate::packet::{Identity, Payload, Role, SelectorName, Service, Tag};
use crate::proxy::MapperProxy;
use crate::request::{Dispatch, RequestBuilder};

/// What is asked, and of whom.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// The service, such as /simple/echo.
    service: Service,
    /// What it works on: JSON where it parses, else text; `-` reads it from stdin; null when there is none.
    #[arg(allow_hyphen_values = true)]
    payload: Option<String>,
    /// Which of the agents that offer it.
    #[arg(long, value_name = "NAME", default_value = "least_loaded", help_heading = "Whom")]
    selector: SelectorName,
    /// This one agent: its name, or nanite-NAME.
    #[arg(long, value_name = "NAME", value_parser = agent, help_heading = "Whom")]
    target: Option<Identity>,
    /// Only agents with this tag; given several times, with all of them.
    #[arg(long = "tag", value_name = "TAG", help_heading = "Whom")]
    tags: Vec<Tag>,
    /// How many agents have to offer it before one is chosen; to be sure that `--selector all` means all.
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "target", help_heading = "Whom")]
    at_least: usize,
    /// How long to look for agents that offer it; for a target as long as answers may take.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration::parse, help_heading = "Whom")]
    look: Duration,
    /// Have one of the running mappers dispatch it, instead of being a mapper.
    #[arg(long, conflicts_with_all = ["at_least", "look"], help_heading = "Delivery")]
    pub via_mapper: bool,
    /// Let it wait in the offline queue, for a running mapper to deliver, when nobody offers it.
    #[arg(long, conflicts_with = "at_least", help_heading = "Delivery")]
    offline: bool,
    /// Have the broker keep it over a restart.
    #[arg(long, help_heading = "Delivery")]
    persistent: bool,
}

/// An agent by its name or by its identity.
pub(super) fn agent(text: &str) -> Result<Identity, String> {
    let identity = match text.parse::<Identity>() {
        Ok(mapper) if mapper.role() == Role::Mapper => Identity::agent(text),
        Ok(agent) => Ok(agent),
        Err(_) => Identity::agent(text),
    };
    identity.map_err(|error| error.to_string())
}

impl Args {
    /// Reads the payload.
    ///
    /// # Errors
    /// [`CliError`] when what stdin holds is no payload.
    pub(super) fn payload(&self, global: &Global) -> Result<Payload, CliError> {
        payload::read(self.payload.as_deref(), global)
    }

    /// Whether it can be asked on a line of the console, where stdin is taken and this process is the mapper.
    ///
    /// # Errors
    /// [`CliError`] when it cannot.
    pub(super) fn check_in_console(&self) -> Result<(), CliError> {
        if self.payload.as_deref() == Some("-") {
            return Err(CliError::new(
                Exit::Usage,
                "`-` reads a payload from stdin, which the console's lines come from",
            )
            .help("write the payload into the line; JSON keeps its blanks, text stands in single quotes"));
        }
        if self.via_mapper {
            return Err(CliError::new(Exit::Usage, "the console is a mapper itself")
                .help("use `nanite request --via-mapper` in the shell"));
        }
        Ok(())
    }

    /// The request, for one of the running mappers to dispatch.
    pub(super) fn through(&self, proxy: &MapperProxy, payload: Payload) -> RequestBuilder<MapperProxy> {
        self.address(proxy.request(self.service.as_str(), payload))
    }

    /// Looks for somebody who offers it; gives the request, ready to be sent.
    ///
    /// # Errors
    /// [`CliError`] when nobody offers it, or the target is not there, and it may not wait.
    pub(super) async fn to_agents(
        &self,
        fleet: &mut Fleet,
        payload: Payload,
        limit: Duration,
    ) -> Result<RequestBuilder<MapperDispatch>, CliError> {
        match self.look_around(fleet, limit).await {
            Err(error) if error.exit() != Exit::NotOffered || !self.offline => return Err(error),
            _ => {}
        }
        let mut request = self.address(fleet.mapper.request(self.service.as_str(), payload));
        let service = self.service.resolved();
        if let Some(last) = self.turns().and_then(|turns| turns.last(&service).cloned()) {
            request = request.custom_selector(Arc::new(RoundRobin::default().after(&service, last)));
        }
        Ok(request)
    }

    /// Waits until somebody offers it.
    async fn look_around(&self, fleet: &mut Fleet, limit: Duration) -> Result<(), CliError> {
        let service = self.service.resolved();
        let fits = |record: &AgentRecord| record.offers(&service) && record.carries(&self.tags);
        if let Some(target) = &self.target {
            return match fleet.present(target, limit).await? {
                Some(record) if fits(&record) => Ok(()),
                record => Err(self.not_there(target, record.as_deref(), fleet)),
            };
        }
        let offering = |agents: &[Arc<AgentRecord>]| agents.iter().filter(|record| fits(record)).count();
        let enough = |agents: &[Arc<AgentRecord>]| offering(agents) >= self.at_least.max(1);
        let agents = fleet.settle(self.look.min(limit), enough).await?;
        match offering(&agents) {
            0 => Err(self.not_offered(&agents, fleet)),
            few if few < self.at_least => {
                let offer = if few == 1 { "offers it" } else { "offer it" };
                let what = format!("{} {offer}, not {}", counted(few, "agent"), self.at_least);
                let failure = CliError::new(Exit::NotOffered, what);
                Err(with_refusals(failure, fleet, "see who is there with `nanite agents`"))
            }
            _ => Ok(()),
        }
    }

    fn address<D: Dispatch>(&self, request: RequestBuilder<D>) -> RequestBuilder<D> {
        let mut request = request.selector(self.selector);
        if let Some(target) = &self.target {
            request = request.target(target.clone());
        }
        for tag in &self.tags {
            request = request.tag(tag.clone());
        }
        if self.offline {
            request = request.offline_failsafe(true);
        }
        if self.persistent {
            request = request.persistent(true);
        }
        request
    }

    /// Notes who had a turn in round robin, for the next run.
    pub(super) fn took_turn(&self, agent: &Identity) {
        if let Some(turns) = self.turns() {
            turns.took(&self.service, agent);
        }
    }

    fn turns(&self) -> Option<Turns> {
        (self.selector == SelectorName::RoundRobin && self.target.is_none() && !self.via_mapper).then(Turns::load)
    }

    fn not_there(&self, target: &Identity, record: Option<&AgentRecord>, fleet: &Fleet) -> CliError {
        let Some(record) = record else {
            return with_refusals(
                CliError::new(Exit::NotOffered, format!("{target} is not there")),
                fleet,
                "see who is there with `nanite agents`",
            );
        };
        if !record.offers(&self.service.resolved()) {
            let offered = listed(record.services.iter().map(Service::as_str));
            return CliError::new(Exit::NotOffered, format!("{target} does not offer {}", self.service))
                .help(format!("it offers {offered}"));
        }
        let tags = listed(record.tags.iter().map(Tag::as_str));
        CliError::new(Exit::NotOffered, format!("{target} does not carry {}", self.wanted_tags()))
            .help(format!("it carries {tags}"))
    }

    fn not_offered(&self, agents: &[Arc<AgentRecord>], fleet: &Fleet) -> CliError {
        let service = self.service.resolved();
        let failure = |what: String| CliError::new(Exit::NotOffered, what);
        if agents.is_empty() {
            return with_refusals(
                failure(format!("no agent offers {}: none is there", self.service)),
                fleet,
                "agents have to be at the same broker and virtual host, with certificates that know each other",
            );
        }
        if agents.iter().any(|record| record.offers(&service)) {
            return failure(format!("no agent offers {} with {}", self.service, self.wanted_tags()))
                .help("see who carries which tags with `nanite agents`");
        }
        let mut offered: Vec<&str> = agents.iter().flat_map(|agent| &agent.services).map(Service::as_str).collect();
        offered.sort_unstable();
        offered.dedup();
        let help = format!("offered are {}", listed(offered.into_iter()));
        with_refusals(failure(format!("no agent offers {}", self.service)), fleet, &help)
    }

    fn wanted_tags(&self) -> String {
        let tags: Vec<&str> = self.tags.iter().map(Tag::as_str).collect();
        format!("{} {}", if tags.len() == 1 { "the tag" } else { "the tags" }, tags.join(", "))
    }
}

/// Why nobody is there is often that their messages were refused.
pub(super) fn with_refusals(failure: CliError, fleet: &Fleet, help: &str) -> CliError {
    match fleet.refused() {
        Some(refused) => {
            failure.help(format!("{refused}: their senders' certificates may be unknown here; otherwise {help}"))
        }
        None => failure.help(help),
    }
}

/// The first few of many names.
pub(super) fn listed<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let more = names.len().saturating_sub(SHOWN);
    let shown: Vec<&str> = names.take(SHOWN).collect();
    match (shown.is_empty(), more) {
        (true, _) => "nothing".into(),
        (false, 0) => shown.join(", "),
        (false, more) => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fleet::tests::{agent as start_agent, fleet};
    use super::*;
    use crate::transport::MemoryBroker;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        ask: Args,
    }

    fn ask(line: &[&str]) -> Args {
        Line::try_parse_from(["x"].iter().chain(line)).unwrap_or_else(|error| panic!("{error}")).ask
    }

    #[test]
    fn u02_an_agent_is_named_by_name_or_identity() {
        let fred = Identity::agent("fred").unwrap();
        assert_eq!(agent("fred").unwrap(), fred);
        assert_eq!(agent("nanite-fred").unwrap(), fred);
        assert_eq!(agent("mapper-x").unwrap().as_str(), "nanite-mapper-x");
        assert!(agent("a b").unwrap_err().contains("a name is"));
        assert!(agent("nanite-").is_ok(), "an agent may have that name");
        assert_eq!(ask(&["/a/b", "-5"]).payload.as_deref(), Some("-5"), "a negative number is no option");
    }

    #[tokio::test(start_paused = true)]
    async fn u02_nobody_offers_it_has_a_message_for_each_reason() {
        let broker = MemoryBroker::new();
        let limit = Duration::from_secs(3);
        let refused = async |fleet: &mut Fleet, line: &[&str]| {
            let error = ask(line).to_agents(fleet, Payload::default(), limit).await.unwrap_err();
            assert_eq!(error.exit(), Exit::NotOffered);
            (error.message().to_owned(), error.remedy().unwrap_or_default().to_owned())
        };
        let (message, help) = refused(&mut fleet(&broker).await, &["/x/echo"]).await;
        assert_eq!(message, "no agent offers /x/echo: none is there");
        assert!(help.contains("same broker"), "{help}");

        let _fred = start_agent(&broker, "fred", "x", &["big"]).await;
        let mut fleet = fleet(&broker).await;
        let (message, help) = refused(&mut fleet, &["/y/echo"]).await;
        assert_eq!((message.as_str(), help.as_str()), ("no agent offers /y/echo", "offered are /x/echo, /x/fail"));
        let (message, _) = refused(&mut fleet, &["/x/echo", "--tag", "big", "--tag", "fast"]).await;
        assert_eq!(message, "no agent offers /x/echo with the tags big, fast");
        let (message, _) = refused(&mut fleet, &["/x/echo", "--target", "bob"]).await;
        assert_eq!(message, "nanite-bob is not there");
        let (message, help) = refused(&mut fleet, &["/y/echo", "--target", "nanite-fred"]).await;
        assert_eq!(message, "nanite-fred does not offer /y/echo");
        assert_eq!(help, "it offers /x/echo, /x/fail");
        let (message, help) = refused(&mut fleet, &["/x/echo", "--target", "fred", "--tag", "fast"]).await;
        assert_eq!((message.as_str(), help.as_str()), ("nanite-fred does not carry the tag fast", "it carries big"));
    }

    #[tokio::test(start_paused = true)]
    async fn u02_what_was_asked_reaches_who_was_meant() {
        let broker = MemoryBroker::new();
        let _agents = (start_agent(&broker, "a", "x", &["t"]).await, start_agent(&broker, "b", "x", &[]).await);
        let mut fleet = fleet(&broker).await;
        let payload = Payload::from("hi");
        for (line, expected) in [
            (&["/x/echo", "--selector", "all"][..], &["nanite-a", "nanite-b"][..]),
            (&["/x/echo", "--selector", "all", "--tag", "t"], &["nanite-a"]),
            (&["/x/echo", "--target", "b"], &["nanite-b"]),
        ] {
            let request = ask(line).to_agents(&mut fleet, payload.clone(), Duration::from_secs(1)).await.unwrap();
            let answers = request.await.unwrap();
            let from: Vec<&str> = answers.results().map(|(from, _)| from.as_str()).collect();
            assert_eq!(from, expected);
            assert!(answers.results().all(|(_, value)| *value == payload));
        }
    }
}
