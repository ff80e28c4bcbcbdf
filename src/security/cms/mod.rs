//! The only place that knows CMS (RFC 5652, RFC 5083, RFC 5753): the one shape of a message, written and read.
//!
//! Whatever the shape leaves open in CMS is closed here. Algorithm identifiers are compared as whole encodings, so that no parameter
//! goes unread.

mod read;
mod write;

use crate::certs::Suite;

pub(super) use read::{Content, Enveloped, Message, Recipient, attributes_header, read};
pub(super) use write::{agreement, enveloped, shared_info, signed_attributes_for, signed_data, transport};

/// The most recipients of one message.
pub(super) const MAX_RECIPIENTS: usize = 64;
/// The most certificates in one message.
pub(super) const MAX_CERTIFICATES: usize = 4;
/// The longest user keying material that is read, in bytes.
pub(super) const MAX_UKM: usize = 64;
/// The length of a content encryption key under AES-256 key wrap (RFC 3394), in bytes.
pub(super) const WRAPPED: usize = 40;
/// The length of a P-256 point, not compressed, in bytes.
pub(super) const POINT: usize = 65;
/// The length of the nonce of AES-GCM, in bytes.
pub(super) const NONCE: usize = 12;
/// The length of the tag of AES-GCM, in bytes.
pub(super) const TAG: usize = 16;

/// Object identifiers, as the content of their encoding.
mod oid {
    use der::asn1::ObjectIdentifier;

    const fn oid(text: &str) -> ObjectIdentifier {
        ObjectIdentifier::new_unwrap(text)
    }

    pub const DATA: ObjectIdentifier = oid("1.2.840.113549.1.7.1");
    pub const SIGNED_DATA: ObjectIdentifier = oid("1.2.840.113549.1.7.2");
    pub const AUTH_ENVELOPED_DATA: ObjectIdentifier = oid("1.2.840.113549.1.9.16.1.23");
    pub const CONTENT_TYPE: ObjectIdentifier = oid("1.2.840.113549.1.9.3");
    pub const MESSAGE_DIGEST: ObjectIdentifier = oid("1.2.840.113549.1.9.4");
    /// The header, as a signed attribute. It lies under the arc that is reserved for documentation, until the project holds one.
    pub const HEADER: ObjectIdentifier = oid("1.3.6.1.4.1.32473.2.1");
    pub const AES_256_GCM: ObjectIdentifier = oid("2.16.840.1.101.3.4.1.46");
}

/// Whole encodings of algorithm identifiers.
mod algorithm {
    /// SHA-256, without parameters (RFC 5754, section 2).
    pub const SHA256: &[u8] = &[0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01];
    /// ECDSA with SHA-256 (RFC 5754, section 3.3).
    pub const ECDSA_SHA256: &[u8] = &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    /// RSASSA-PSS with SHA-256, MGF1 with SHA-256 and a salt of 32 bytes (RFC 4056); SHA-256 with NULL parameters.
    pub const PSS_SHA256: &[u8] = &[
        0x30, 0x41, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a, 0x30, 0x34, 0xa0, 0x0f, 0x30,
        0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0xa1, 0x1c, 0x30, 0x1a,
        0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48,
        0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0xa2, 0x03, 0x02, 0x01, 0x20,
    ];
    /// RSAES-OAEP with SHA-256 and MGF1 with SHA-256 (RFC 3560); SHA-256 without parameters.
    pub const OAEP_SHA256: &[u8] = &[
        0x30, 0x38, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x07, 0x30, 0x2b, 0xa0, 0x0d, 0x30,
        0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0xa1, 0x1a, 0x30, 0x18, 0x06, 0x09,
        0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08, 0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65,
        0x03, 0x04, 0x02, 0x01,
    ];
    /// The type of the originator's key: an EC key, its curve being the recipient's (RFC 5753, section 3.1.1).
    pub const EC_PUBLIC_KEY: &[u8] = &[0x30, 0x09, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
    /// AES-256 key wrap (RFC 3565), without parameters.
    pub const AES_256_WRAP: &[u8] = &[0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x01, 0x2d];
    /// dhSinglePass-stdDH-sha256kdf-scheme with AES-256 key wrap (RFC 5753, section 7.1.4).
    pub const ECDH_SHA256_WRAP: &[u8] = &[
        0x30, 0x15, 0x06, 0x06, 0x2b, 0x81, 0x04, 0x01, 0x0b, 0x01, 0x30, 0x0b, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01,
        0x65, 0x03, 0x04, 0x01, 0x2d,
    ];
}

/// How a signature of this suite is named.
fn signature_algorithm(suite: Suite) -> &'static [u8] {
    match suite {
        Suite::P256 => algorithm::ECDSA_SHA256,
        Suite::Rsa => algorithm::PSS_SHA256,
    }
}
