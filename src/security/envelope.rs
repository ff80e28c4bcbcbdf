//! The header of a secure message: what the sender signs about it, in DER, exact to the byte.
//!
//! It is a signed attribute and is not encrypted: a receiver can refuse a message by its header before it uses a private key. Nothing else
//! relies on the header before the signature has been verified.

use std::time::Duration;

use der::{Result, Tag, TagNumber};

use super::crypto::sha256;
use super::fields::{Fields, constructed, field, primitive, put, put_number};
use crate::clock::Timestamp;
use crate::packet::{Identity, Kind, MessageId};
use crate::serializer::{Audience, MessageClass};

/// How far clocks may differ.
pub(super) const MAX_CLOCK_SKEW: Duration = Duration::from_secs(30);
/// The plaintext starts with the salt (32 bytes) and the digest of the header (32 bytes); the body follows.
pub(super) const PREFIX: usize = 64;
/// The version of the format.
pub(super) const VERSION: u64 = 2;
/// The longest name of a codec, in bytes.
pub(super) const MAX_CODEC_NAME_BYTES: usize = 32;

const IDENTITIES: Tag = constructed(TagNumber::N0);
const GROUP: Tag = primitive(TagNumber::N1);
const MAPPERS: &str = "mappers";
const AGENTS: &str = "agents";

/// The header of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// The kind of packet in the body.
    pub kind: Kind,
    /// The sender.
    pub from: Identity,
    /// The instance of the sender: the start of its process, in microseconds since the Unix epoch.
    pub instance: u64,
    /// The sequence number within the instance.
    pub sequence: u64,
    /// The audience.
    pub to: Audience,
    /// The instances of the processes that it is for, as far as the sender knows them: ascending, at most [`Audience::MAX`], and at most
    /// one for each identity in `to`.
    pub instances: Vec<u64>,
    /// The message id.
    pub id: MessageId,
    /// When it was issued, by the sender's clock.
    pub issued_at: Timestamp,
    /// When it expires.
    pub expires_at: Timestamp,
    /// Live or stored.
    pub class: MessageClass,
    /// The message it answers.
    pub in_reply_to: Option<MessageId>,
    /// The codec of the body.
    pub codec: String,
    /// The digest of the recipients' key ids (`recipients_digest`).
    pub recipients: [u8; 32],
    /// The digest of the salt and the body (`commitment`).
    pub commitment: [u8; 32],
}

/// Why a header is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderFault {
    /// It is not DER of this form.
    Malformed(&'static str),
    /// Another version, or an unknown kind.
    Unsupported(&'static str),
}

impl From<der::Error> for HeaderFault {
    fn from(_: der::Error) -> Self {
        HeaderFault::Malformed("the header is not well formed")
    }
}

/// SHA-256 over the key ids of the recipients in ascending order, each preceded by its length as one byte.
pub(super) fn recipients_digest<'a>(key_ids: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut key_ids: Vec<&[u8]> = key_ids.into_iter().collect();
    key_ids.sort_unstable();
    let mut sha = openssl::sha::Sha256::new();
    for id in key_ids {
        sha.update(&[u8::try_from(id.len()).unwrap_or(u8::MAX)]);
        sha.update(id);
    }
    sha.finish()
}

/// Binds the signer to one body: SHA-256("nanite/2 commitment" || salt || body).
pub(super) fn commitment(salt: &[u8; 32], body: &[u8]) -> [u8; 32] {
    sha256(&[b"nanite/2 commitment", salt, body])
}

impl Header {
    /// The header as DER.
    pub(super) fn to_der(&self) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(320);
        put_number(&mut out, Tag::Integer, VERSION)?;
        put_number(&mut out, Tag::Enumerated, self.kind as u64)?;
        put(&mut out, Tag::Utf8String, &[self.from.as_str().as_bytes()])?;
        put_number(&mut out, Tag::Integer, self.instance)?;
        put_number(&mut out, Tag::Integer, self.sequence)?;
        let identities: &[Identity] = match &self.to {
            Audience::One(identity) => std::slice::from_ref(identity),
            Audience::Many(identities) => identities,
            Audience::Mappers | Audience::Agents => &[],
        };
        match &self.to {
            Audience::One(_) | Audience::Many(_) => {
                let mut list = Vec::new();
                for identity in identities {
                    put(&mut list, Tag::Utf8String, &[identity.as_str().as_bytes()])?;
                }
                put(&mut out, IDENTITIES, &[&list])?;
            }
            Audience::Mappers => put(&mut out, GROUP, &[MAPPERS.as_bytes()])?,
            Audience::Agents => put(&mut out, GROUP, &[AGENTS.as_bytes()])?,
        }
        let mut list = Vec::new();
        for instance in &self.instances {
            put_number(&mut list, Tag::Integer, *instance)?;
        }
        put(&mut out, Tag::Sequence, &[&list])?;
        put(&mut out, Tag::OctetString, &[self.id.as_bytes()])?;
        put_number(&mut out, Tag::Integer, self.issued_at.as_micros())?;
        put_number(&mut out, Tag::Integer, self.expires_at.as_micros())?;
        put_number(&mut out, Tag::Enumerated, class_number(self.class))?;
        match &self.in_reply_to {
            None => put(&mut out, Tag::Null, &[])?,
            Some(id) => put(&mut out, Tag::OctetString, &[id.as_bytes()])?,
        }
        put(&mut out, Tag::Utf8String, &[self.codec.as_bytes()])?;
        put(&mut out, Tag::OctetString, &[&self.recipients])?;
        put(&mut out, Tag::OctetString, &[&self.commitment])?;
        field(Tag::Sequence, &[&out])
    }

    /// Parses a header. Each has exactly one encoding, and nothing may follow it.
    pub(super) fn from_der(bytes: &[u8]) -> std::result::Result<Self, HeaderFault> {
        let mut outer = Fields::new(bytes)?;
        let mut fields = outer.inside(Tag::Sequence)?;
        outer.end()?;
        if fields.number(Tag::Integer)? != VERSION {
            return Err(HeaderFault::Unsupported("another version"));
        }
        let kind = fields.number(Tag::Enumerated)?;
        let from = identity(fields.value(Tag::Utf8String)?)?;
        let instance = fields.number(Tag::Integer)?;
        let sequence = fields.number(Tag::Integer)?;
        let to = audience(&mut fields)?;
        let instances = instances(&mut fields)?;
        let id = MessageId::from_bytes(*fields.octets()?);
        let issued_at = Timestamp::from_micros(fields.number(Tag::Integer)?);
        let expires_at = Timestamp::from_micros(fields.number(Tag::Integer)?);
        let class = match fields.number(Tag::Enumerated)? {
            0 => MessageClass::Live,
            1 => MessageClass::Stored,
            _ => return Err(HeaderFault::Malformed("no such class")),
        };
        let in_reply_to = if fields.next_is(Tag::Null) {
            let none = fields.value(Tag::Null)?;
            if !none.is_empty() {
                return Err(HeaderFault::Malformed("a null that is not empty"));
            }
            None
        } else {
            Some(MessageId::from_bytes(*fields.octets()?))
        };
        let codec = codec(fields.value(Tag::Utf8String)?)?;
        let recipients = *fields.octets()?;
        let commitment = *fields.octets()?;
        fields.end()?;
        let kind =
            u8::try_from(kind).ok().and_then(Kind::from_number).ok_or(HeaderFault::Unsupported("an unknown kind"))?;
        let header = Header {
            kind,
            from,
            instance,
            sequence,
            to,
            instances,
            id,
            issued_at,
            expires_at,
            class,
            in_reply_to,
            codec,
            recipients,
            commitment,
        };
        header.consistent()?;
        Ok(header)
    }

    /// Checks the combinations of fields.
    fn consistent(&self) -> std::result::Result<(), HeaderFault> {
        if self.class == MessageClass::Stored && !may_be_stored(self.kind, &self.to) {
            return Err(HeaderFault::Malformed("only requests and pushes to the mappers can be stored"));
        }
        if self.to == Audience::Agents && self.kind != Kind::Advertise {
            return Err(HeaderFault::Malformed("only an advertise is for all agents"));
        }
        if self.instances.len() > max_instances(&self.to) {
            return Err(HeaderFault::Malformed("more processes than nodes"));
        }
        Ok(())
    }

    /// Whether the message is for this node.
    pub(super) fn is_for(&self, me: &Identity) -> bool {
        match &self.to {
            Audience::One(identity) => identity == me,
            Audience::Many(identities) => identities.contains(me),
            Audience::Mappers => me.role() == crate::packet::Role::Mapper,
            Audience::Agents => me.role() == crate::packet::Role::Agent,
        }
    }

    /// Which process of this node it is for. Only a message for named nodes can exclude a process: of a group, the sender may not know
    /// all processes.
    pub(super) fn addressee(&self, own_instance: u64) -> Addressee {
        let nodes = match &self.to {
            Audience::One(_) => 1,
            Audience::Many(identities) => identities.len(),
            Audience::Mappers | Audience::Agents => usize::MAX,
        };
        if self.instances.contains(&own_instance) {
            Addressee::ThisProcess
        } else if self.instances.len() >= nodes {
            Addressee::AnotherProcess
        } else {
            Addressee::Unknown
        }
    }
}

/// Which process of a node a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Addressee {
    /// The sender named this process.
    ThisProcess,
    /// The sender named a process for every node in the audience, and not this one.
    AnotherProcess,
    /// The sender did not know the process of every node.
    Unknown,
}

/// How many instances a message for this audience can name.
pub(super) fn max_instances(to: &Audience) -> usize {
    match to {
        Audience::One(_) => 1,
        Audience::Many(identities) => identities.len(),
        Audience::Mappers => Audience::MAX,
        Audience::Agents => 0,
    }
}

/// Whether a message may be stored: requests and pushes to the mappers.
pub(super) fn may_be_stored(kind: Kind, to: &Audience) -> bool {
    matches!(kind, Kind::Request | Kind::Push) && *to == Audience::Mappers
}

fn class_number(class: MessageClass) -> u64 {
    match class {
        MessageClass::Live => 0,
        MessageClass::Stored => 1,
    }
}

fn text(bytes: &[u8]) -> std::result::Result<&str, HeaderFault> {
    std::str::from_utf8(bytes).map_err(|_| HeaderFault::Malformed("a text is not UTF-8"))
}

fn identity(bytes: &[u8]) -> std::result::Result<Identity, HeaderFault> {
    text(bytes)?.parse().map_err(|_| HeaderFault::Malformed("not an identity"))
}

fn audience(fields: &mut Fields<'_>) -> std::result::Result<Audience, HeaderFault> {
    if fields.next_is(GROUP) {
        return match text(fields.value(GROUP)?)? {
            MAPPERS => Ok(Audience::Mappers),
            AGENTS => Ok(Audience::Agents),
            _ => Err(HeaderFault::Malformed("no such group")),
        };
    }
    let mut list = fields.inside(IDENTITIES)?;
    let mut identities: Vec<Identity> = Vec::with_capacity(1);
    while !list.is_empty() {
        let next = identity(list.value(Tag::Utf8String)?)?;
        if identities.len() == Audience::MAX {
            return Err(HeaderFault::Malformed("for more than 64 nodes"));
        }
        if identities.contains(&next) {
            return Err(HeaderFault::Malformed("the same node twice"));
        }
        identities.push(next);
    }
    match identities.len() {
        0 => Err(HeaderFault::Malformed("no recipient")),
        1 => identities.pop().map(Audience::One).ok_or(HeaderFault::Malformed("no recipient")),
        _ => Ok(Audience::Many(identities)),
    }
}

fn instances(fields: &mut Fields<'_>) -> std::result::Result<Vec<u64>, HeaderFault> {
    let mut list = fields.inside(Tag::Sequence)?;
    let mut instances: Vec<u64> = Vec::new();
    while !list.is_empty() {
        let next = list.number(Tag::Integer)?;
        if instances.len() == Audience::MAX {
            return Err(HeaderFault::Malformed("for more than 64 processes"));
        }
        if instances.last().is_some_and(|last| *last >= next) {
            return Err(HeaderFault::Malformed("instances that do not ascend"));
        }
        instances.push(next);
    }
    Ok(instances)
}

/// Whether this is a valid name of a codec.
pub(super) fn is_codec_name(name: &str) -> bool {
    (1..=MAX_CODEC_NAME_BYTES).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-'))
}

fn codec(bytes: &[u8]) -> std::result::Result<String, HeaderFault> {
    let name = text(bytes)?;
    if !is_codec_name(name) {
        return Err(HeaderFault::Malformed("not a codec name"));
    }
    Ok(name.to_owned())
}

/// Whether a message may carry certificates: those from which peers learn them, and stored messages, whose sender may be unknown by the
/// time they are opened.
pub(super) fn may_carry_certificates(kind: Kind, class: MessageClass) -> bool {
    announces_certificate(kind) || class == MessageClass::Stored
}

/// Whether peers learn the sender's certificate from this kind of message.
pub(super) fn announces_certificate(kind: Kind) -> bool {
    matches!(kind, Kind::Advertise | Kind::Register)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            kind: Kind::Request,
            from: Identity::mapper("m1").unwrap(),
            instance: 1_795_492_800_000_000,
            sequence: 7,
            to: Audience::One(Identity::agent("fred").unwrap()),
            instances: Vec::new(),
            id: MessageId::from_bytes([0xa5; 16]),
            issued_at: Timestamp::from_secs(1_795_492_801),
            expires_at: Timestamp::from_secs(1_795_492_861),
            class: MessageClass::Live,
            in_reply_to: None,
            codec: "json".into(),
            recipients: [1; 32],
            commitment: [2; 32],
        }
    }

    #[test]
    fn headers_read_back() {
        let bob = Identity::agent("bob").unwrap();
        let mut answer = header();
        answer.in_reply_to = Some(MessageId::from_bytes([9; 16]));
        let mut many = header();
        many.to = Audience::Many(vec![Identity::agent("fred").unwrap(), bob]);
        let mut stored = header();
        (stored.to, stored.class) = (Audience::Mappers, MessageClass::Stored);
        let mut advertise = header();
        (advertise.to, advertise.kind) = (Audience::Agents, Kind::Advertise);
        let mut for_process = header();
        for_process.instances = vec![u64::MAX];
        let mut for_mappers = header();
        (for_mappers.to, for_mappers.instances) = (Audience::Mappers, (0..64).collect());
        for header in [header(), answer, many, stored, advertise, for_process, for_mappers] {
            assert_eq!(Header::from_der(&header.to_der().unwrap()).unwrap(), header);
        }
    }

    #[test]
    fn headers_that_contradict_themselves_are_refused() {
        let mut stored_for_one = header();
        stored_for_one.class = MessageClass::Stored;
        let mut result_for_agents = header();
        (result_for_agents.to, result_for_agents.kind) = (Audience::Agents, Kind::Outcome);
        let mut no_recipient = header();
        no_recipient.to = Audience::Many(Vec::new());
        let mut twice = header();
        twice.to = Audience::Many(vec![Identity::agent("a").unwrap(); 2]);
        let mut crowd = header();
        crowd.to = Audience::Many((0..65).map(|n| Identity::agent(&format!("a{n}")).unwrap()).collect());
        let mut codec = header();
        codec.codec = "JSON".into();
        let with_instances = |to: Audience, instances: Vec<u64>| Header { to, instances, ..header() };
        let one = || header().to;
        let two_processes = with_instances(one(), vec![1, 2]);
        let unsorted = with_instances(Audience::Mappers, vec![2, 1]);
        let repeated = with_instances(Audience::Mappers, vec![1, 1]);
        let many_processes = with_instances(Audience::Mappers, (0..65).collect());
        let mut agents = with_instances(Audience::Agents, vec![1]);
        agents.kind = Kind::Advertise;
        for header in [
            stored_for_one,
            result_for_agents,
            no_recipient,
            twice,
            crowd,
            codec,
            two_processes,
            unsorted,
            repeated,
            many_processes,
            agents,
        ] {
            let read = Header::from_der(&header.to_der().unwrap());
            assert!(matches!(read, Err(HeaderFault::Malformed(_))), "{read:?}");
        }
    }

    #[test]
    fn every_shorter_or_longer_header_is_refused() {
        let der = header().to_der().unwrap();
        for end in 0..der.len() {
            assert!(matches!(Header::from_der(&der[..end]), Err(HeaderFault::Malformed(_))), "{end}");
        }
        assert!(Header::from_der(&[&der[..], &[0]].concat()).is_err());
    }

    #[test]
    fn other_versions_and_kinds_are_not_supported() {
        let mut der = header().to_der().unwrap();
        let at = der.windows(3).position(|w| w == [2, 1, 2]).unwrap() + 2;
        der[at] = 3;
        assert_eq!(Header::from_der(&der), Err(HeaderFault::Unsupported("another version")));
        let mut der = header().to_der().unwrap();
        let at = der.windows(3).position(|w| w == [10, 1, Kind::Request as u8]).unwrap() + 2;
        der[at] = 99;
        assert_eq!(Header::from_der(&der), Err(HeaderFault::Unsupported("an unknown kind")));
    }

    #[test]
    fn the_header_in_the_documentation_is_one() {
        let document = include_str!("../../docs/wire-format.md");
        let lines = document.lines().skip_while(|line| *line != "    30819d").take_while(|line| !line.is_empty());
        // Each line is bytes in one or two groups, and what they are.
        let digits: String = lines
            .flat_map(|line| line.split_whitespace().take_while(|word| word.bytes().all(|b| b.is_ascii_hexdigit())))
            .collect();
        let der: Vec<u8> =
            (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect();
        let header = Header::from_der(&der).unwrap();
        assert_eq!(header.to_der().unwrap(), der);
        assert_eq!((header.kind, header.sequence, &header.to), (Kind::Ping, 3, &Audience::Mappers));
        assert_eq!((header.from.as_str(), header.instance), ("nanite-fred", 1_795_500_000_000_000));
        assert_eq!(header.expires_at.since(header.issued_at).as_secs(), 60);
    }

    #[test]
    fn the_digest_of_the_recipients_does_not_depend_on_their_order() {
        let digest = recipients_digest([&b"b"[..], b"a"]);
        assert_eq!(digest, recipients_digest([&b"a"[..], b"b"]));
        assert_eq!(digest, sha256(&[b"\x01a\x01b"]));
        assert_ne!(digest, recipients_digest([&b"ab"[..]]));
    }
}
