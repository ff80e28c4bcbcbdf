//! Which keys there are in Redis, and the scripts that write them.
//!
//! Every key begins with `{PREFIX}:`, where the prefix has neither braces nor colons, so that no prefix can reach into another's
//! keys. Behind it stands one message for what belongs to all agents, whose parts are fields of hashes and members of sorted sets;
//! or `s:` and a service, or `t:` and a tag, up to the end of the key. So no name of an agent, service or tag, whatever it is, can
//! be another key. (The braces keep all keys in one slot of a Redis cluster.)
//!
//! | key | type | what |
//! |---|---|---|
//! | `e` | text | the epoch: random, made with the first key; another one means that Redis has lost what it held |
//! | `n` | number | the revision: counts up with every change |
//! | `l` | sorted set | the agents that are listed, by the revision of their last change |
//! | `d` | sorted set | the agents that were last removed, by the revision of that |
//! | `v` | hash | version of each agent's registration, as 32 hexadecimal digits: instance, sequence |
//! | `r` | hash | the registration, with its proof ([`super::entry`]) |
//! | `b` | hash | the last heartbeat: its version, and the heartbeat with its proof |
//! | `m` | hash | in which of the sets below the agent is, one name to a line |
//! | `s:SERVICE` | set | the agents that offer the service |
//! | `t:TAG` | set | the agents that carry the tag |

use crate::mapper::state::{AgentQuery, AgentRecord};

/// The longest prefix, in bytes.
const MAX_PREFIX: usize = 64;

/// Names of keys.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    base: String,
}

/// Where a registration or heartbeat stands in the order of what its agent says: instance, sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub u64, pub u64);

impl Version {
    /// The length of its text.
    pub const LENGTH: usize = 32;

    pub fn of(record: &AgentRecord) -> Self {
        Self(record.instance, record.sequence)
    }

    /// As it stands in Redis: sorted like the numbers.
    pub fn text(self) -> String {
        format!("{:016x}{:016x}", self.0, self.1)
    }

    /// Reads its text.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let digits = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
        if text.len() != Self::LENGTH || !text.iter().all(digits) {
            return None;
        }
        let (instance, sequence) = std::str::from_utf8(text).ok()?.split_at_checked(16)?;
        Some(Self(u64::from_str_radix(instance, 16).ok()?, u64::from_str_radix(sequence, 16).ok()?))
    }
}

impl Keys {
    /// The keys under a prefix; none when it is empty, too long, or has other characters than letters, digits, '.', '-' and '_'.
    pub fn new(prefix: &str) -> Option<Self> {
        let good = prefix.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        let fits = (1..=MAX_PREFIX).contains(&prefix.len());
        (good && fits).then(|| Self { base: format!("{{{prefix}}}:") })
    }

    /// What every key begins with.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The key of what belongs to all agents.
    pub fn of(&self, message: char) -> String {
        format!("{}{message}", self.base)
    }

    /// The sets whose intersection is whom a query means.
    pub fn sets(&self, query: &AgentQuery) -> Vec<String> {
        let tags = query.tags.iter().map(|tag| format!("{}t:{}", self.base, tag.as_str()));
        std::iter::once(format!("{}s:{}", self.base, query.service.as_str())).chain(tags).collect()
    }

    /// The names of the sets that an agent is in, one to a line. (No service and no tag has a control character.)
    pub fn memberships(record: &AgentRecord) -> String {
        let services = record.services.iter().map(|service| format!("s:{service}"));
        let tags = record.tags.iter().map(|tag| format!("t:{tag}"));
        services.chain(tags).collect::<Vec<_>>().join("\n")
    }
}

/// What the scripts share: whether a text is a version.
macro_rules! script {
    ($text:literal) => {
        concat!(
            "local base = KEYS[1]\n",
            "local function good(v) return v and #v == 32 and not string.find(v, '[^0-9a-f]') end\n",
            $text
        )
    };
}

/// Writes a registration, unless a later one is there: `KEYS[1]` what keys begin with; ID VERSION RECORD MEMBERSHIPS REPAIR.
///
/// Gives 0 when a later one is there, 1 when this one is, and else 2 plus the number of sets that are of a wrong type.
pub(super) const REGISTER: &str = script!(
    r"
local id, version, record, names, repair = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local known = redis.call('HGET', base .. 'v', id)
if good(known) then
  if known > version then return 0 end
  if known == version and repair == '0' and redis.call('HEXISTS', base .. 'r', id) == 1 then return 1 end
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

/// Removes an agent, unless a registration later than VERSION, or a heartbeat later than BEAT (where it is not empty), is there:
/// ID VERSION BEAT.
pub(super) const REMOVE: &str = script!(
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

/// Writes heartbeats that are later than those there, of agents whose registration is of the same instance: ID VERSION BEAT, any
/// number of times. Gives the ids that have no registration.
pub(super) const BEATS: &str = script!(
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

    /// Every key that a prefix, a service and tags lead to.
    fn all(prefix: &str, service: &Service, tags: &[Tag]) -> Vec<String> {
        let keys = Keys::new(prefix).unwrap();
        let query = AgentQuery::new(service.clone(), tags.to_vec());
        keys.sets(&query).into_iter().chain("enldvrbm".chars().map(|message| keys.of(message))).collect()
    }

    #[test]
    fn n14_a_prefix_cannot_leave_its_place() {
        for bad in ["", "a:b", "{a}", "a}", "a b", "ä", "a\n", "a/b", "*", &"x".repeat(65)] {
            assert!(Keys::new(bad).is_none(), "{bad:?}");
        }
        assert_eq!(Keys::new("nanite").unwrap().of('e'), "{nanite}:e");
    }

    #[test]
    fn n14_versions_are_ordered_as_text() {
        let versions = [Version(0, 0), Version(0, 9), Version(0, 10), Version(1, 0), Version(u64::MAX, u64::MAX)];
        for pair in versions.windows(2) {
            assert!(pair[0] < pair[1] && pair[0].text() < pair[1].text());
        }
        for version in versions {
            assert_eq!(Version::parse(version.text().as_bytes()), Some(version));
        }
        for bad in ["", "00", &"0".repeat(33), &"g".repeat(32), &"F".repeat(32), &"+".repeat(32), &"ä".repeat(16)] {
            assert_eq!(Version::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    proptest! {
        /// Different services, tags and prefixes lead to different keys, whatever they are.
        #[test]
        fn n14_no_name_touches_the_key_of_another(
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
                    found.extend(all(prefix, service, &tags));
                }
            }
            prop_assert!(services.is_empty() || found.len() == expected, "{found:?}");
        }
    }
}
