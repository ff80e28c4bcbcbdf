//! Which agents a page shows, and in which order: searched, sorted, and a hundred at a time.

use std::cmp::Ordering;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::fleet::{Seen, Snapshot};
use super::form::Fields;

/// How many agents stand on a page.
pub(super) const ROWS: usize = 100;
/// The longest text that is searched for, in characters.
const MAX_SEARCH: usize = 200;

/// What agents are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Column {
    #[default]
    Name,
    Load,
    Services,
    InFlight,
    Failures,
    LastPing,
}

impl Column {
    pub const ALL: [Column; 6] =
        [Column::Name, Column::Load, Column::Services, Column::InFlight, Column::Failures, Column::LastPing];

    /// The name in a query.
    pub fn key(self) -> &'static str {
        match self {
            Column::Name => "name",
            Column::Load => "load",
            Column::Services => "services",
            Column::InFlight => "in_flight",
            Column::Failures => "failures",
            Column::LastPing => "last_ping",
        }
    }

    /// The name for people.
    pub fn title(self) -> &'static str {
        match self {
            Column::Name => "Agent",
            Column::Load => "Load",
            Column::Services => "Services",
            Column::InFlight => "In flight",
            Column::Failures => "Failures",
            Column::LastPing => "Last ping",
        }
    }

    /// What its column holds is a number.
    pub fn is_number(self) -> bool {
        matches!(self, Column::InFlight | Column::Failures)
    }

    fn compare(self, a: &Seen, b: &Seen) -> Ordering {
        match self {
            Column::Name => Ordering::Equal,
            // Those that do not say are behind all that do.
            Column::Load => {
                let load = |seen: &Seen| seen.record.status.load().unwrap_or(f64::INFINITY);
                load(a).total_cmp(&load(b))
            }
            Column::Services => a.record.services.len().cmp(&b.record.services.len()),
            Column::InFlight => a.work.in_flight.cmp(&b.work.in_flight),
            Column::Failures => a.work.failed.cmp(&b.work.failed),
            Column::LastPing => b.record.last_seen.cmp(&a.record.last_seen),
        }
    }
}

/// What a page was asked to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    pub search: String,
    pub sort: Column,
    pub descending: bool,
    /// From 1.
    pub page: usize,
}

/// The agents that a view shows, and how many there are.
pub(super) struct Shown<'a> {
    pub agents: Vec<&'a Seen>,
    /// How many the search finds.
    pub found: usize,
    pub pages: usize,
    /// The page that is shown, from 1.
    pub page: usize,
}

impl View {
    /// Reads a query; what it does not understand is as if it were not there.
    pub fn read(query: &Fields) -> Self {
        let sort = Column::ALL.into_iter().find(|column| column.key() == query.text("sort")).unwrap_or_default();
        Self {
            search: query.text("q").trim().chars().take(MAX_SEARCH).collect(),
            sort,
            descending: query.text("dir") == "desc",
            page: query.text("page").parse().unwrap_or(1).max(1),
        }
    }

    /// The agents to show.
    pub fn of<'a>(&self, snapshot: &'a Snapshot) -> Shown<'a> {
        let wanted = self.search.to_lowercase();
        let mut agents: Vec<&Seen> = snapshot.agents.iter().filter(|seen| matches(seen, &wanted)).collect();
        // The agents come in the order of their names, which this keeps among equals.
        agents.sort_by(|a, b| {
            let order = self.sort.compare(a, b);
            if self.descending { order.reverse() } else { order }
        });
        if self.descending && self.sort == Column::Name {
            agents.reverse();
        }
        let found = agents.len();
        let pages = found.div_ceil(ROWS).max(1);
        let page = self.page.min(pages);
        Shown { agents: agents.into_iter().skip((page - 1) * ROWS).take(ROWS).collect(), found, pages, page }
    }

    /// The query of this view.
    pub fn query(&self) -> String {
        let mut query = format!("?sort={}&dir={}", self.sort.key(), if self.descending { "desc" } else { "asc" });
        if !self.search.is_empty() {
            query.push_str(&format!("&q={}", utf8_percent_encode(&self.search, NON_ALPHANUMERIC)));
        }
        if self.page > 1 {
            query.push_str(&format!("&page={}", self.page));
        }
        query
    }

    /// The same view, on another page.
    pub fn on_page(&self, page: usize) -> Self {
        Self { page, ..self.clone() }
    }

    /// The view sorted by this column; the other way round if it is already.
    pub fn sorted_by(&self, column: Column) -> Self {
        let descending = match column {
            _ if column == self.sort => !self.descending,
            // Most first is what is looked for in numbers.
            Column::Name | Column::LastPing => false,
            _ => true,
        };
        Self { sort: column, descending, page: 1, search: self.search.clone() }
    }
}

/// Whether every word stands in the name, a service or a tag.
fn matches(seen: &Seen, wanted: &str) -> bool {
    let record = &seen.record;
    wanted.split_whitespace().all(|word| {
        let has = |text: &str| text.to_lowercase().contains(word);
        has(record.identity.as_str())
            || record.services.iter().any(|service| has(service.as_str()))
            || record.tags.iter().any(|tag| has(tag.as_str()))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::Timestamp;
    use crate::mapper::AgentRecord;
    use crate::packet::{Identity, Register, Status};
    use crate::request::AgentWorkload;

    fn snapshot(agents: &[(&str, f64, &str)]) -> Snapshot {
        let seen = |(name, load, tag): &(&str, f64, &str)| {
            let register = Register {
                identity: Identity::agent(name).unwrap(),
                services: vec!["/simple/echo".parse().unwrap()],
                status: Status::new(*load),
                tags: vec![tag.parse().unwrap()],
                files: Vec::new(),
                instance: None,
            };
            let record = AgentRecord::new(register, 1, Timestamp::from_secs(*load as u64), None);
            Seen { record: Arc::new(record), work: AgentWorkload { failed: *load as u64, ..AgentWorkload::default() } }
        };
        Snapshot { agents: agents.iter().map(seen).collect(), ..Snapshot::nothing(Timestamp::from_secs(0)) }
    }

    fn shown(view: &str, snapshot: &Snapshot) -> Vec<String> {
        let view = View::read(&Fields::read(view.as_bytes()).unwrap());
        view.of(snapshot).agents.iter().map(|seen| seen.record.identity.name().to_owned()).collect()
    }

    #[test]
    fn n20_agents_are_searched_and_sorted() {
        let fleet = snapshot(&[("anna", 2.0, "eu"), ("bob", f64::NAN, "US West"), ("carl", 1.0, "eu")]);
        assert_eq!(shown("", &fleet), ["anna", "bob", "carl"]);
        assert_eq!(shown("dir=desc", &fleet), ["carl", "bob", "anna"]);
        assert_eq!(shown("sort=load", &fleet), ["carl", "anna", "bob"]);
        assert_eq!(shown("sort=failures&dir=desc", &fleet), ["anna", "carl", "bob"]);
        assert_eq!(shown("sort=last_ping", &fleet), ["anna", "carl", "bob"], "the latest first");
        assert_eq!(shown("sort=nonsense&page=x", &fleet), ["anna", "bob", "carl"]);
        assert_eq!(shown("q=EU", &fleet), ["anna", "carl"]);
        assert_eq!(shown("q=echo+west", &fleet), ["bob"], "all words, anywhere");
        assert_eq!(shown("q=nanite-c", &fleet), ["carl"]);
        assert!(shown("q=nobody", &fleet).is_empty());
    }

    #[test]
    fn n20_a_page_holds_a_hundred_and_there_is_always_one() {
        let names: Vec<String> = (0..250).map(|n| format!("a{n:03}")).collect();
        let fleet: Vec<(&str, f64, &str)> = names.iter().map(|name| (name.as_str(), 1.0, "x")).collect();
        let fleet = snapshot(&fleet);
        assert_eq!(shown("page=2", &fleet).first().unwrap(), "a100");
        assert_eq!(shown("page=3", &fleet).len(), 50);
        assert_eq!(shown("page=99", &fleet).first().unwrap(), "a200", "the last there is");
        assert_eq!(shown("page=0", &fleet).first().unwrap(), "a000");
        assert!(shown("page=5", &snapshot(&[])).is_empty());
    }

    #[test]
    fn n20_a_view_is_read_back_from_its_query() {
        let view = View { search: "a&b=\u{e4} <".into(), sort: Column::InFlight, descending: true, page: 3 };
        let query = view.query();
        assert_eq!(View::read(&Fields::read(query.trim_start_matches('?').as_bytes()).unwrap()), view);
        assert!(!view.sorted_by(Column::InFlight).descending && view.sorted_by(Column::Load).descending);
    }
}
