//! The keys in Redis, and the scripts that write them.
//!
//! Every key begins with `{PREFIX}:`. The prefix contains neither braces nor colons, so a key of one prefix is never a key of another.
//! The rest is a single letter for data about all agents (the fields of hashes and the members of sorted sets are agents), or `s:` and
//! a service, or `t:` and a tag. So no agent, service or tag can be named such that it addresses another key. The braces put all keys
//! into one slot of a Redis cluster.
//!
//! | key | type | content |
//! |---|---|---|
//! | `e` | string | the epoch: a random value, created with the first key; if it changes, Redis has lost its data |
//! | `n` | number | the revision: incremented with every change |
//! | `l` | sorted set | the registered agents, by the revision of their last change |
//! | `d` | sorted set | the agents that were removed most recently, by the revision of the removal |
//! | `v` | hash | the version of each agent's registration as 32 hexadecimal digits: instance, sequence |
//! | `r` | hash | each agent's registration, with its proof ([`super::verify`]) |
//! | `b` | hash | each agent's last heartbeat: its version, then the heartbeat with its proof |
//! | `m` | hash | the sets below that each agent is a member of, one per line |
//! | `s:SERVICE` | set | the agents that offer the service |
//! | `t:TAG` | set | the agents that have the tag |

use crate::mapper::state::{AgentQuery, AgentRecord};
use crate::packet::{Identity, Role};

/// The longest prefix, in bytes.
const MAX_PREFIX_BYTES: usize = 64;

/// The names of keys.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    base: String,
}

/// Orders the registrations and heartbeats of one agent: first by process, then within the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version {
    pub instance: u64,
    pub sequence: u64,
}

impl Version {
    /// The length of its text form.
    pub const TEXT_LENGTH: usize = 32;

    pub fn new(instance: u64, sequence: u64) -> Self {
        Self { instance, sequence }
    }

    pub fn of(record: &AgentRecord) -> Self {
        Self::new(record.instance, record.sequence)
    }

    /// The text form, which sorts like the version.
    pub fn text(self) -> String {
        format!("{:016x}{:016x}", self.instance, self.sequence)
    }

    /// Parses the text form.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let is_digit = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
        if text.len() != Self::TEXT_LENGTH || !text.iter().all(is_digit) {
            return None;
        }
        let (instance, sequence) = std::str::from_utf8(text).ok()?.split_at_checked(16)?;
        Some(Self::new(u64::from_str_radix(instance, 16).ok()?, u64::from_str_radix(sequence, 16).ok()?))
    }
}

impl Keys {
    /// `None` if the prefix is empty, too long, or has other characters than letters, digits, '.', '-' and '_'.
    pub fn new(prefix: &str) -> Option<Self> {
        let valid = prefix.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        let fits = (1..=MAX_PREFIX_BYTES).contains(&prefix.len());
        (valid && fits).then(|| Self { base: format!("{{{prefix}}}:") })
    }

    /// The beginning of every key.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The key of data about all agents, by its letter.
    pub fn key(&self, letter: char) -> String {
        format!("{}{letter}", self.base)
    }

    /// The sets whose intersection are the agents that fit a query.
    pub fn sets(&self, query: &AgentQuery) -> Vec<String> {
        let tags = query.tags.iter().map(|tag| format!("{}t:{}", self.base, tag.as_str()));
        std::iter::once(format!("{}s:{}", self.base, query.service.as_str())).chain(tags).collect()
    }

    /// The sets that an agent is a member of, without the prefix, one per line. Services and tags contain no control characters.
    pub fn memberships(record: &AgentRecord) -> String {
        let services = record.services.iter().map(|service| format!("s:{service}"));
        let tags = record.tags.iter().map(|tag| format!("t:{tag}"));
        services.chain(tags).collect::<Vec<_>>().join("\n")
    }
}

/// Parses the identity of an agent, from a field of a hash or a member of a set.
pub(super) fn agent(text: &[u8]) -> Option<Identity> {
    let identity: Identity = std::str::from_utf8(text).ok()?.parse().ok()?;
    (identity.role() == Role::Agent).then_some(identity)
}

/// The common beginning of the scripts: a function that checks whether a string is a version.
macro_rules! script {
    ($text:literal) => {
        concat!(
            "local base = KEYS[1]\n",
            "local function good(v) return v and #v == 32 and not string.find(v, '[^0-9a-f]') end\n",
            $text
        )
    };
}

/// Writes a registration, unless a newer one is stored. `KEYS[1]` is the beginning of all keys; the arguments are ID VERSION RECORD
/// MEMBERSHIPS REPAIR. With REPAIR, the registration is written even if it is stored already, and not if the agent was removed: another
/// mapper may have removed it since it was read.
///
/// Returns 0 if a newer one is stored, 1 if this one is, and otherwise 2 plus the number of keys that should be sets and are not.
pub(super) const REGISTER_SCRIPT: &str = script!(
    r"
local id, version, record, names, repair = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local known = redis.call('HGET', base .. 'v', id)
if good(known) then
  if known > version then return 0 end
  if known == version and repair == '0' and redis.call('HEXISTS', base .. 'r', id) == 1 then return 1 end
elseif repair == '1' and redis.call('ZSCORE', base .. 'd', id) then
  return 1
end
local wrong = 0
local function change(command, name)
  local done = redis.pcall(command, base .. name, id)
  if type(done) == 'table' and done.err then wrong = wrong + 1 end
end
local before = redis.call('HGET', base .. 'm', id) or ''
redis.call('HSET', base .. 'm', id, names)
redis.call('HSET', base .. 'r', id, record)
redis.call('HSET', base .. 'v', id, version)
local keep = {}
for name in string.gmatch(names, '[^\n]+') do
  keep[name] = true
  change('SADD', name)
end
for name in string.gmatch(before, '[^\n]+') do
  if not keep[name] and string.find(name, '^[st]:') then change('SREM', name) end
end
redis.call('ZADD', base .. 'l', redis.call('INCR', base .. 'n'), id)
redis.call('ZREM', base .. 'd', id)
return 2 + wrong
"
);

/// Removes an agent, unless its registration is newer than VERSION, or its heartbeat is newer than BEAT (if not empty). The arguments
/// are ID VERSION BEAT.
pub(super) const REMOVE_SCRIPT: &str = script!(
    r"
local id, version, limit = ARGV[1], ARGV[2], ARGV[3]
local known = redis.call('HGET', base .. 'v', id)
if good(known) and known > version then return 0 end
if limit ~= '' then
  local beat = string.sub(redis.call('HGET', base .. 'b', id) or '', 1, 32)
  if good(beat) and beat > limit then return 0 end
end
for name in string.gmatch(redis.call('HGET', base .. 'm', id) or '', '[^\n]+') do
  if string.find(name, '^[st]:') then redis.pcall('SREM', base .. name, id) end
end
for message in string.gmatch('vrbm', '.') do redis.call('HDEL', base .. message, id) end
if redis.call('ZREM', base .. 'l', id) == 1 then
  redis.call('ZADD', base .. 'd', redis.call('INCR', base .. 'n'), id)
  redis.call('ZREMRANGEBYRANK', base .. 'd', 0, -10001)
end
return 1
"
);

/// Writes heartbeats that are newer than the stored ones and belong to the registered instance. The arguments are ID VERSION BEAT, for
/// any number of agents. Returns the agents that are not registered.
pub(super) const HEARTBEAT_SCRIPT: &str = script!(
    r"
local missing = {}
for i = 1, #ARGV, 3 do
  local id, version = ARGV[i], ARGV[i + 1]
  local known = redis.call('HGET', base .. 'v', id)
  if good(known) and redis.call('HEXISTS', base .. 'r', id) == 1 then
    local before = string.sub(redis.call('HGET', base .. 'b', id) or '', 1, 32)
    local later = not good(before) or before < version
    if later and string.sub(known, 1, 16) == string.sub(version, 1, 16) then
      redis.call('HSET', base .. 'b', id, version .. ARGV[i + 2])
      redis.call('ZADD', base .. 'l', redis.call('INCR', base .. 'n'), id)
    end
  else
    missing[#missing + 1] = id
  end
end
return missing
"
);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::packet::{Service, Tag};

    /// All keys for a prefix, a service and tags.
    fn all_keys(prefix: &str, service: &Service, tags: &[Tag]) -> Vec<String> {
        let keys = Keys::new(prefix).unwrap();
        let query = AgentQuery::new(service.clone(), tags.to_vec());
        keys.sets(&query).into_iter().chain("enldvrbm".chars().map(|letter| keys.key(letter))).collect()
    }

    #[test]
    fn n14_invalid_prefixes_are_rejected() {
        for invalid in ["", "a:b", "{a}", "a}", "a b", "ä", "a\n", "a/b", "*", &"x".repeat(65)] {
            assert!(Keys::new(invalid).is_none(), "{invalid:?}");
        }
        assert_eq!(Keys::new("nanite").unwrap().key('e'), "{nanite}:e");
    }

    #[test]
    fn n14_version_text_sorts_like_the_version() {
        let versions = [(0, 0), (0, 9), (0, 10), (1, 0), (u64::MAX, u64::MAX)];
        let versions = versions.map(|(instance, sequence)| Version::new(instance, sequence));
        for pair in versions.windows(2) {
            assert!(pair[0] < pair[1] && pair[0].text() < pair[1].text());
        }
        for version in versions {
            assert_eq!(Version::parse(version.text().as_bytes()), Some(version));
        }
        for invalid in ["", "00", &"0".repeat(33), &"g".repeat(32), &"F".repeat(32), &"+".repeat(32), &"ä".repeat(16)]
        {
            assert_eq!(Version::parse(invalid.as_bytes()), None, "{invalid}");
        }
    }

    proptest! {
        /// Different services, tags and prefixes have different keys.
        #[test]
        fn n14_keys_of_different_names_never_collide(
            services in prop::collection::btree_set("(/[a-zA-Z0-9._-]{1,4}){1,3}", 2..4),
            tags in prop::collection::btree_set("[ -~]{1,8}|[es]:/a/b|[nldvrbmt]|\\}:[s-t]:/a|\\{a\\}:e|/a/b|t:[a-z]", 2..6),
            prefixes in prop::collection::btree_set("[a-z.:_-]{1,3}", 2..4),
        ) {
            let services: Vec<Service> = services.iter().filter_map(|text| text.parse().ok()).collect();
            let tags: Vec<Tag> = tags.iter().filter_map(|text| text.parse().ok()).collect();
            let prefixes: Vec<&String> = prefixes.iter().filter(|prefix| Keys::new(prefix).is_some()).collect();
            let mut found = BTreeSet::new();
            let mut expected = 0;
            for prefix in &prefixes {
                expected += services.len() + tags.len() + 8;
                for service in &services {
                    found.extend(all_keys(prefix, service, &tags));
                }
            }
            prop_assert!(services.is_empty() || found.len() == expected, "{found:?}");
        }
    }
}
