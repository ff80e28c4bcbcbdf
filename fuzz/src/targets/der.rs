//! Splits DER into values and encodes it again, without checking its meaning. Independent of the parsers that are fuzzed, and good enough
//! to change one value without breaking the enclosing lengths.

/// The nesting depth to which values are split.
const MAX_DEPTH: usize = 24;

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum Der {
    /// A primitive value: tag and content.
    Leaf(u8, Vec<u8>),
    /// A value that contains values: tag, the bytes before them (none, or the number of unused bits of a BIT STRING), the values.
    Node(u8, Vec<u8>, Vec<Der>),
}

impl Der {
    /// Consecutive values, and the bytes after them.
    pub fn all(bytes: &[u8]) -> (Vec<Der>, &[u8]) {
        Self::all_within(bytes, MAX_DEPTH)
    }

    /// The value, if these bytes are exactly one value.
    pub fn one(bytes: &[u8]) -> Option<Der> {
        match Self::first(bytes, MAX_DEPTH)? {
            (value, []) => Some(value),
            _ => None,
        }
    }

    fn all_within(bytes: &[u8], depth: usize) -> (Vec<Der>, &[u8]) {
        let (mut values, mut rest) = (Vec::new(), bytes);
        while let Some((value, after)) = Self::first(rest, depth) {
            values.push(value);
            rest = after;
        }
        (values, rest)
    }

    fn first(bytes: &[u8], depth: usize) -> Option<(Der, &[u8])> {
        let (content, rest) = content(bytes)?;
        let tag = bytes[0];
        let inside = |content: &[u8]| match Self::all_within(content, depth.checked_sub(1)?) {
            (values, []) => Some(values),
            _ => None,
        };
        // OCTET STRINGs and BIT STRINGs often wrap other values. Only a SEQUENCE or SET counts: any short content could parse by chance.
        let node = match (tag, content) {
            (0x04, [0x30 | 0x31, ..]) => inside(content).map(|values| (Vec::new(), values)),
            (0x03, [unused, within @ ..]) if within.first() == Some(&0x30) => {
                inside(within).map(|values| (vec![*unused], values))
            }
            _ if tag & 0x20 != 0 => inside(content).map(|values| (Vec::new(), values)),
            _ => None,
        };
        // A value that would be encoded differently stays unsplit.
        let same = |(prefix, values): &(Vec<u8>, Vec<Der>)| {
            let written: Vec<u8> = prefix.iter().copied().chain(values.iter().flat_map(Der::bytes)).collect();
            written == content
        };
        let value = match node.filter(same) {
            Some((prefix, values)) => Der::Node(tag, prefix, values),
            None => Der::Leaf(tag, content.to_vec()),
        };
        Some((value, rest))
    }

    /// Its encoding.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Der::Leaf(tag, content) => encoded(*tag, content),
            Der::Node(tag, prefix, values) => {
                let mut content = prefix.clone();
                values.iter().for_each(|value| content.extend(value.bytes()));
                encoded(*tag, &content)
            }
        }
    }

    /// The values inside; empty for a value with bytes.
    pub fn inside(&self) -> &[Der] {
        match self {
            Der::Leaf(..) => &[],
            Der::Node(_, _, values) => values,
        }
    }

    /// The value at this place.
    pub fn at(&mut self, path: &[usize]) -> Option<&mut Der> {
        path.iter().try_fold(self, |value, index| match value {
            Der::Leaf(..) => None,
            Der::Node(_, _, values) => values.get_mut(*index),
        })
    }
}

/// The content of the first value of these bytes, and what follows it.
pub fn content(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (tag, first, rest) = match bytes {
        [tag, first, rest @ ..] => (*tag, usize::from(*first), rest),
        _ => return None,
    };
    if tag & 0x1f == 0x1f {
        return None;
    }
    let octets = if first < 0x80 { 0 } else { first & 0x7f };
    if octets > 4 || first == 0x80 || rest.len() < octets {
        return None;
    }
    let (length, rest) = rest.split_at(octets);
    let length = if first < 0x80 { first } else { length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)) };
    rest.split_at_checked(length)
}

/// A value of this tag and content.
pub fn encoded(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let length = content.len().to_be_bytes();
    if content.len() < 0x80 {
        out.push(length[length.len() - 1]);
    } else {
        let octets: Vec<u8> = length.into_iter().skip_while(|byte| *byte == 0).collect();
        out.push(0x80 | octets.len() as u8);
        out.extend(octets);
    }
    out.extend_from_slice(content);
    out
}

/// What was signed in a certificate or revocation list, which is its first value; with the bytes behind the list in the second place.
pub fn signed_part(bytes: &[u8]) -> Option<Vec<u8>> {
    let (inside, _) = content(bytes)?;
    let (_, rest) = content(inside)?;
    Some(inside[..inside.len() - rest.len()].to_vec())
}

/// A certificate or revocation list whose signed part is this one: ECDSA with SHA-256 by this key, honestly signed.
pub fn signed(part: &[u8], key: &openssl::pkey::PKeyRef<openssl::pkey::Private>) -> Vec<u8> {
    const ECDSA_SHA256: [u8; 12] = [0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    let mut signer = openssl::sign::Signer::new(openssl::hash::MessageDigest::sha256(), key).unwrap();
    let mut bits = vec![0];
    bits.extend(signer.sign_oneshot_to_vec(part).unwrap());
    encoded(0x30, &[part, &ECDSA_SHA256, &encoded(0x03, &bits)].concat())
}
