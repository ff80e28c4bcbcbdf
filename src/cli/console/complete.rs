//! What can stand where the cursor is: commands, services, agents, tags and options.

use std::sync::Arc;

use crate::cli::text::printable;
use crate::mapper::AgentRecord;
use crate::packet::{SelectorName, Tag};

/// The commands.
pub(super) const COMMANDS: [&str; 7] = ["agents", "help", "ping", "push", "quit", "request", "services"];
const OPTIONS: [&str; 7] = ["--json", "--offline", "--persistent", "--selector", "--tag", "--target", "--timeout"];

/// Where the word at the cursor begins, and what it can be made, sorted.
pub(super) fn candidates(line: &str, cursor: usize, agents: &[Arc<AgentRecord>]) -> (usize, Vec<String>) {
    let before = line.get(..cursor).unwrap_or(line);
    let start = before.rfind(char::is_whitespace).map_or(0, |blank| blank + 1);
    let (earlier, word) = before.split_at_checked(start).unwrap_or(("", before));
    let earlier: Vec<&str> = earlier.split_whitespace().collect();
    let mut all = match earlier.as_slice() {
        [] if word.starts_with('/') => services(agents),
        [] | ["help", ..] => COMMANDS.map(str::to_owned).to_vec(),
        [.., "--target"] => names(agents),
        [.., "--selector"] => SelectorName::ALL.map(|name| name.as_str().to_owned()).to_vec(),
        [.., "--tag"] => tags(agents),
        ["ping"] => names(agents).into_iter().chain(["all".to_owned()]).collect(),
        ["request" | "push", ..] if word.starts_with('-') => OPTIONS.map(str::to_owned).to_vec(),
        [first, ..] if first.starts_with('/') && word.starts_with('-') => OPTIONS.map(str::to_owned).to_vec(),
        ["request" | "push"] => services(agents),
        _ => Vec::new(),
    };
    all.retain(|candidate| candidate.starts_with(word));
    all.sort();
    all.dedup();
    (start, all)
}

fn services(agents: &[Arc<AgentRecord>]) -> Vec<String> {
    agents.iter().flat_map(|agent| &agent.services).map(ToString::to_string).collect()
}

fn names(agents: &[Arc<AgentRecord>]) -> Vec<String> {
    agents.iter().map(|agent| agent.identity.name().to_owned()).collect()
}

/// Tags that are one word, and harmless on a terminal: agents choose them.
fn tags(agents: &[Arc<AgentRecord>]) -> Vec<String> {
    let tags = agents.iter().flat_map(|agent| &agent.tags).map(Tag::as_str);
    let plain = |tag: &&str| printable(tag, false) == *tag && !tag.contains(char::is_whitespace);
    tags.filter(plain).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::packet::{Identity, Register, Status};

    fn agent(name: &str, services: &[&str], tags: &[&str]) -> Arc<AgentRecord> {
        let register = Register {
            identity: Identity::agent(name).unwrap(),
            services: services.iter().map(|service| service.parse().unwrap()).collect(),
            status: Status::default(),
            tags: tags.iter().map(|tag| tag.parse().unwrap()).collect(),
            files: Vec::new(),
            instance: None,
        };
        Arc::new(AgentRecord::new(register, 0, Timestamp::from_secs(0), None))
    }

    #[test]
    fn n21_what_can_stand_there_is_offered() {
        let agents = [
            agent("fred", &["/simple/echo", "/simple/time"], &["big", "two words", "evil\u{202e}gpj"]),
            agent("frida", &["/simple/echo"], &["big"]),
        ];
        let offered = |line: &str| candidates(line, line.len(), &agents).1;
        assert_eq!(offered("r"), ["request"]);
        assert_eq!(offered("").len(), COMMANDS.len());
        assert_eq!(offered("help se"), ["services"]);
        assert_eq!(offered("request /si"), ["/simple/echo", "/simple/time"]);
        assert_eq!(offered("push /simple/t"), ["/simple/time"]);
        assert_eq!(offered("/simple/e"), ["/simple/echo"]);
        assert_eq!(offered("request /simple/echo --target fr"), ["fred", "frida"]);
        assert_eq!(offered("ping fri"), ["frida"]);
        assert_eq!(offered("ping a"), ["all"]);
        assert_eq!(offered("request /a/b --tag "), ["big"], "what is not one harmless word is not offered");
        assert_eq!(offered("/a/b x --selector r"), ["random", "rr"]);
        assert_eq!(offered("request /a/b --t"), ["--tag", "--target", "--timeout"]);
        assert!(offered("request /a/b x").is_empty() && offered("nonsense x").is_empty());
        assert_eq!(candidates("request /si more", 11, &agents).0, 8, "the word at the cursor");
        assert!(candidates("ü", 1, &agents).1.is_empty(), "a cursor within a character");
    }
}
