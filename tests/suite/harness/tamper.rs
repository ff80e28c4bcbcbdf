//! An attacker's tools: split messages into their DER values, change them, and sign them again.

use nanite::certs::{Credentials, Suite};
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Padding;
use openssl::sha::sha256;
use openssl::sign::{RsaPssSaltlen, Signer};

/// A DER value.
#[derive(Clone, Debug, PartialEq)]
pub enum Der {
    Leaf(u8, Vec<u8>),
    Node(u8, Vec<Der>),
}

impl Der {
    /// Parses exactly one value.
    pub fn parse(bytes: &[u8]) -> Der {
        let (value, rest) = Self::first(bytes);
        assert!(rest.is_empty());
        value
    }

    fn first(bytes: &[u8]) -> (Der, &[u8]) {
        let (tag, first) = (bytes[0], usize::from(bytes[1]));
        let (length, start) = if first < 0x80 {
            (first, 2)
        } else {
            let octets = first & 0x7f;
            (bytes[2..2 + octets].iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), 2 + octets)
        };
        let (mut content, rest) = bytes[start..].split_at(length);
        if tag & 0x20 == 0 {
            return (Der::Leaf(tag, content.to_vec()), rest);
        }
        let mut children = Vec::new();
        while !content.is_empty() {
            let (child, after) = Self::first(content);
            children.push(child);
            content = after;
        }
        (Der::Node(tag, children), rest)
    }

    /// Encodes it.
    pub fn bytes(&self) -> Vec<u8> {
        let (tag, content) = match self {
            Der::Leaf(tag, content) => (*tag, content.clone()),
            Der::Node(tag, children) => (*tag, children.iter().flat_map(Der::bytes).collect()),
        };
        let mut out = vec![tag];
        let length = content.len().to_be_bytes();
        let octets = length.iter().skip_while(|byte| **byte == 0).copied().collect::<Vec<u8>>();
        if content.len() >= 0x80 {
            out.push(0x80 | octets.len() as u8);
            out.extend(octets);
        } else {
            out.push(content.len() as u8);
        }
        out.extend(content);
        out
    }

    /// The values inside.
    pub fn children(&mut self) -> &mut Vec<Der> {
        match self {
            Der::Node(_, children) => children,
            Der::Leaf(..) => panic!("a primitive value has no children"),
        }
    }

    /// The value at this path of indices.
    pub fn at(&mut self, path: &[usize]) -> &mut Der {
        path.iter().fold(self, |at, index| &mut at.children()[*index])
    }

    /// The content of a primitive value.
    pub fn leaf(&mut self) -> &mut Vec<u8> {
        match self {
            Der::Leaf(_, bytes) => bytes,
            Der::Node(..) => panic!("not a primitive value"),
        }
    }

    /// Replaces the first occurrence of these bytes in every primitive value; they must occur.
    pub fn replace(&mut self, from: &[u8], to: &[u8]) {
        assert!(self.replaced(from, to) > 0, "{from:02x?} does not occur");
    }

    fn replaced(&mut self, from: &[u8], to: &[u8]) -> usize {
        match self {
            Der::Node(_, children) => children.iter_mut().map(|child| child.replaced(from, to)).sum(),
            Der::Leaf(_, bytes) => match bytes.windows(from.len()).position(|window| window == from) {
                Some(at) => {
                    bytes.splice(at..at + from.len(), to.iter().copied());
                    1
                }
                None => 0,
            },
        }
    }
}

/// A message, split into its parts.
#[derive(Clone)]
pub struct Forged {
    /// The whole message.
    pub outer: Der,
    /// The signed content: an AuthEnvelopedData.
    pub content: Der,
    /// The header.
    pub header: Der,
}

/// Indices of the fields in a header.
pub mod field {
    pub const KIND: usize = 1;
    pub const FROM: usize = 2;
    pub const TO: usize = 5;
    pub const INSTANCES: usize = 6;
    pub const ISSUED_AT: usize = 8;
    pub const EXPIRES_AT: usize = 9;
    pub const CLASS: usize = 10;
    pub const CODEC: usize = 12;
}

impl Forged {
    pub fn new(message: &[u8]) -> Self {
        let mut outer = Der::parse(message);
        let content = Der::parse(outer.at(&[1, 0, 2, 1, 0]).leaf());
        let header = Der::parse(attribute(&mut outer, 2).leaf());
        Self { outer, content, header }
    }

    /// The SignedData.
    pub fn signed(&mut self) -> &mut Der {
        self.outer.at(&[1, 0])
    }

    /// The SignerInfo.
    pub fn signer(&mut self) -> &mut Der {
        let last = self.signed().children().len() - 1;
        self.signed().at(&[last, 0])
    }

    /// Encodes it with the old signature.
    pub fn bytes(mut self) -> Vec<u8> {
        let (content, header) = (self.content.bytes(), self.header.bytes());
        *self.outer.at(&[1, 0, 2, 1, 0]).leaf() = content;
        *attribute(&mut self.outer, 2).leaf() = header;
        self.outer.bytes()
    }

    /// Encodes it with a new signature of this node.
    pub fn signed_by(mut self, credentials: &Credentials) -> Vec<u8> {
        *attribute(&mut self.outer, 1).leaf() = sha256(&self.content.bytes()).to_vec();
        *attribute(&mut self.outer, 2).leaf() = self.header.bytes();
        *self.signer().at(&[1]).leaf() = credentials.certificate().key_id().as_bytes().to_vec();
        let Der::Node(_, attributes) = self.signer().at(&[3]).clone() else { panic!("no attributes") };
        let signature = sign(credentials, &Der::Node(0x31, attributes).bytes());
        *self.signer().at(&[5]).leaf() = signature;
        self.bytes()
    }
}

/// The value of a signed attribute, by its index.
fn attribute(outer: &mut Der, index: usize) -> &mut Der {
    let signed = outer.at(&[1, 0]);
    let last = signed.children().len() - 1;
    signed.at(&[last, 0, 3, index, 1, 0])
}

fn sign(credentials: &Credentials, data: &[u8]) -> Vec<u8> {
    let key: PKey<Private> = PKey::private_key_from_pem(&credentials.key().to_pem().unwrap()).unwrap();
    let mut signer = Signer::new(MessageDigest::sha256(), &key).unwrap();
    if credentials.key().suite() == Suite::Rsa {
        signer.set_rsa_padding(Padding::PKCS1_PSS).unwrap();
        signer.set_rsa_pss_saltlen(RsaPssSaltlen::custom(32)).unwrap();
    }
    signer.sign_oneshot_to_vec(data).unwrap()
}
