//! Search, order and pagination of the table of agents.

use std::cmp::Ordering;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use crate::admin::http::FormFields;
use crate::admin::state::{AgentSnapshot, Snapshot};

const ROWS_PER_PAGE: usize = 100;
const MAX_SEARCH_CHARS: usize = 200;

/// A column of the table that can be sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Column {
    #[default]
    Name,
    Load,
    Services,
    InFlight,
    Failures,
    LastHeartbeat,
}

impl Column {
    pub const ALL: [Column; 6] =
        [Column::Name, Column::Load, Column::Services, Column::InFlight, Column::Failures, Column::LastHeartbeat];

    /// The value of `sort` in a query.
    pub fn key(self) -> &'static str {
        match self {
            Column::Name => "name",
            Column::Load => "load",
            Column::Services => "services",
            Column::InFlight => "in_flight",
            Column::Failures => "failures",
            Column::LastHeartbeat => "last_ping",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Column::Name => "Agent",
            Column::Load => "Load",
            Column::Services => "Services",
            Column::InFlight => "In flight",
            Column::Failures => "Failures",
            Column::LastHeartbeat => "Last heartbeat",
        }
    }

    /// Whether the column is aligned as a number.
    pub fn is_number(self) -> bool {
        matches!(self, Column::InFlight | Column::Failures)
    }

    fn compare(self, a: &AgentSnapshot, b: &AgentSnapshot) -> Ordering {
        match self {
            Column::Name => Ordering::Equal,
            // Agents without a load sort as the most loaded.
            Column::Load => {
                let load = |agent: &AgentSnapshot| agent.record.status.load().unwrap_or(f64::INFINITY);
                load(a).total_cmp(&load(b))
            }
            Column::Services => a.record.services.len().cmp(&b.record.services.len()),
            Column::InFlight => a.workload.in_flight.cmp(&b.workload.in_flight),
            Column::Failures => a.workload.failed.cmp(&b.workload.failed),
            Column::LastHeartbeat => b.record.last_seen.cmp(&a.record.last_seen),
        }
    }
}

/// The part of the table that a page shows, as its query says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TableQuery {
    pub search: String,
    pub sort: Column,
    pub descending: bool,
    /// From 1.
    pub page: usize,
}

/// The rows of one page.
pub(super) struct TablePage<'a> {
    pub agents: Vec<&'a AgentSnapshot>,
    /// The number of agents that match the search, on all pages.
    pub matching: usize,
    pub page_count: usize,
    /// The number of this page, from 1.
    pub page: usize,
}

impl TableQuery {
    /// Parses the query of a URL. Invalid values count as missing.
    pub fn parse(query: Option<&str>) -> Self {
        let fields = FormFields::from_query(query);
        let sort = Column::ALL.into_iter().find(|column| column.key() == fields.get("sort")).unwrap_or_default();
        Self {
            search: fields.get("q").trim().chars().take(MAX_SEARCH_CHARS).collect(),
            sort,
            descending: fields.get("dir") == "desc",
            page: fields.get("page").parse().unwrap_or(1).max(1),
        }
    }

    /// Selects the rows of the page.
    pub fn select<'a>(&self, snapshot: &'a Snapshot) -> TablePage<'a> {
        let search = self.search.to_lowercase();
        let mut agents: Vec<&AgentSnapshot> = snapshot.agents.iter().filter(|agent| matches(agent, &search)).collect();
        // The snapshot is sorted by name, and the sort is stable: equal agents stay sorted by name.
        agents.sort_by(|a, b| {
            let order = self.sort.compare(a, b);
            if self.descending { order.reverse() } else { order }
        });
        if self.descending && self.sort == Column::Name {
            agents.reverse();
        }
        let matching = agents.len();
        let page_count = matching.div_ceil(ROWS_PER_PAGE).max(1);
        let page = self.page.min(page_count);
        let agents = agents.into_iter().skip((page - 1) * ROWS_PER_PAGE).take(ROWS_PER_PAGE).collect();
        TablePage { agents, matching, page_count, page }
    }

    /// The query as text, with its question mark.
    pub fn to_query_string(&self) -> String {
        let mut query = format!("?sort={}&dir={}", self.sort.key(), if self.descending { "desc" } else { "asc" });
        if !self.search.is_empty() {
            query.push_str(&format!("&q={}", utf8_percent_encode(&self.search, NON_ALPHANUMERIC)));
        }
        if self.page > 1 {
            query.push_str(&format!("&page={}", self.page));
        }
        query
    }

    pub fn with_page(&self, page: usize) -> Self {
        Self { page, ..self.clone() }
    }

    /// The query for the table sorted by this column, or in reverse if it is sorted by it already.
    pub fn sorted_by(&self, column: Column) -> Self {
        let descending = match column {
            _ if column == self.sort => !self.descending,
            Column::Name | Column::LastHeartbeat => false,
            // For numbers, the highest first.
            _ => true,
        };
        Self { sort: column, descending, page: 1, search: self.search.clone() }
    }
}

/// Whether each word of the search is in the name, a service or a tag.
fn matches(agent: &AgentSnapshot, search: &str) -> bool {
    let record = &agent.record;
    search.split_whitespace().all(|word| {
        let contains = |text: &str| text.to_lowercase().contains(word);
        contains(record.identity.as_str())
            || record.services.iter().any(|service| contains(service.as_str()))
            || record.tags.iter().any(|tag| contains(tag.as_str()))
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
        let agent = |(name, load, tag): &(&str, f64, &str)| {
            let register = Register {
                identity: Identity::agent(name).unwrap(),
                services: vec!["/simple/echo".parse().unwrap()],
                status: Status::new(*load),
                tags: vec![tag.parse().unwrap()],
                files: Vec::new(),
                instance: None,
            };
            let record = Arc::new(AgentRecord::new(register, 1, Timestamp::from_secs(*load as u64), None));
            AgentSnapshot { record, workload: AgentWorkload { failed: *load as u64, ..AgentWorkload::default() } }
        };
        Snapshot { agents: agents.iter().map(agent).collect(), ..Snapshot::empty(Timestamp::from_secs(0)) }
    }

    fn names(query: &str, snapshot: &Snapshot) -> Vec<String> {
        let page = TableQuery::parse(Some(query)).select(snapshot);
        page.agents.iter().map(|agent| agent.record.identity.name().to_owned()).collect()
    }

    #[test]
    fn n20_searches_and_sorts_agents() {
        let snapshot = snapshot(&[("anna", 2.0, "eu"), ("bob", f64::NAN, "US West"), ("carl", 1.0, "eu")]);
        assert_eq!(names("", &snapshot), ["anna", "bob", "carl"]);
        assert_eq!(names("dir=desc", &snapshot), ["carl", "bob", "anna"]);
        assert_eq!(names("sort=load", &snapshot), ["carl", "anna", "bob"]);
        assert_eq!(names("sort=failures&dir=desc", &snapshot), ["anna", "carl", "bob"]);
        assert_eq!(names("sort=last_ping", &snapshot), ["anna", "carl", "bob"], "the latest first");
        assert_eq!(names("sort=nonsense&page=x", &snapshot), ["anna", "bob", "carl"]);
        assert_eq!(names("q=EU", &snapshot), ["anna", "carl"]);
        assert_eq!(names("q=echo+west", &snapshot), ["bob"], "all words, in any field");
        assert_eq!(names("q=nanite-c", &snapshot), ["carl"]);
        assert!(names("q=unknown", &snapshot).is_empty());
    }

    #[test]
    fn n20_table_pages_have_at_most_a_hundred_rows() {
        let agents: Vec<String> = (0..250).map(|n| format!("a{n:03}")).collect();
        let agents: Vec<(&str, f64, &str)> = agents.iter().map(|name| (name.as_str(), 1.0, "x")).collect();
        let agents = snapshot(&agents);
        assert_eq!(names("page=2", &agents).first().unwrap(), "a100");
        assert_eq!(names("page=3", &agents).len(), 50);
        assert_eq!(names("page=99", &agents).first().unwrap(), "a200", "the last page");
        assert_eq!(names("page=0", &agents).first().unwrap(), "a000");
        assert!(names("page=5", &snapshot(&[])).is_empty());
    }

    #[test]
    fn n20_table_query_round_trips() {
        let query = TableQuery { search: "a&b=\u{e4} <".into(), sort: Column::InFlight, descending: true, page: 3 };
        assert_eq!(TableQuery::parse(query.to_query_string().strip_prefix('?')), query);
        assert!(!query.sorted_by(Column::InFlight).descending && query.sorted_by(Column::Load).descending);
    }
}
