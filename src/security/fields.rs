//! DER, field by field: a reader that expects a given tag for each field and skips nothing, and a writer.
//!
//! The `der` crate checks the encoding (shortest lengths, no indefinite lengths). This reader also checks that each field is the expected
//! one; the derived readers of the crate skip lower context-specific tags.

use der::asn1::AnyRef;
use der::{Decode, Encode, Header, Length, Reader, Result, SliceReader, Tag, TagNumber, Tagged};

/// The tag `[number]` of a constructed value.
pub(super) const fn constructed(number: TagNumber) -> Tag {
    Tag::ContextSpecific { constructed: true, number }
}

/// The tag `[number]` of a primitive value.
pub(super) const fn primitive(number: TagNumber) -> Tag {
    Tag::ContextSpecific { constructed: false, number }
}

/// Reads the fields of a constructed value in order.
pub(super) struct Fields<'a>(SliceReader<'a>);

impl<'a> Fields<'a> {
    /// A reader over these bytes.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        SliceReader::new(bytes).map(Self)
    }

    /// The content of the next field, which must have this tag.
    pub fn value(&mut self, tag: Tag) -> Result<&'a [u8]> {
        let any = AnyRef::decode(&mut self.0)?;
        any.tag().assert_eq(tag)?;
        Ok(any.value())
    }

    /// A reader for the next field, which must have this tag.
    pub fn inside(&mut self, tag: Tag) -> Result<Fields<'a>> {
        Fields::new(self.value(tag)?)
    }

    /// The content of the next field, an OCTET STRING of exactly this many bytes.
    pub fn octets<const N: usize>(&mut self) -> Result<&'a [u8; N]> {
        self.value(Tag::OctetString)?.try_into().map_err(|_| Tag::OctetString.length_error())
    }

    /// The whole next field, tag and length included.
    pub fn element(&mut self) -> Result<&'a [u8]> {
        self.0.tlv_bytes()
    }

    /// The next field as a type of the `der` crate.
    pub fn typed<T: Decode<'a>>(&mut self) -> Result<T> {
        T::decode(&mut self.0)
    }

    /// The next field as an INTEGER or ENUMERATED that is not negative.
    pub fn number(&mut self, tag: Tag) -> Result<u64> {
        let content = self.value(tag)?;
        <u64 as der::DecodeValue>::decode_value(
            &mut SliceReader::new(content)?,
            Header::new(Tag::Integer, content.len())?,
        )
    }

    /// Whether the next field has this tag.
    pub fn next_is(&self, tag: Tag) -> bool {
        self.0.peek_tag().is_ok_and(|next| next == tag)
    }

    /// Whether all fields have been read.
    pub fn is_empty(&self) -> bool {
        self.0.is_finished()
    }

    /// Fails unless all fields have been read.
    pub fn end(self) -> Result<()> {
        self.0.finish(())
    }
}

/// Appends a tag and a length.
pub(super) fn put_header(out: &mut Vec<u8>, tag: Tag, length: usize) -> Result<()> {
    Header::new(tag, length)?.encode(out)
}

/// Appends a field: tag, length, and the parts of its content.
pub(super) fn put(out: &mut Vec<u8>, tag: Tag, parts: &[&[u8]]) -> Result<()> {
    put_header(out, tag, parts.iter().map(|part| part.len()).sum())?;
    parts.iter().for_each(|part| out.extend_from_slice(part));
    Ok(())
}

/// A field on its own.
pub(super) fn field(tag: Tag, parts: &[&[u8]]) -> Result<Vec<u8>> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = Vec::with_capacity(length.saturating_add(6));
    put(&mut out, tag, parts)?;
    Ok(out)
}

/// Appends a number as an INTEGER or ENUMERATED.
pub(super) fn put_number(out: &mut Vec<u8>, tag: Tag, number: u64) -> Result<()> {
    use der::EncodeValue;
    put_header(out, tag, number.value_len()?.try_into()?)?;
    number.encode_value(out)
}

/// The length of a field with a content of this length.
pub(super) fn field_len(length: usize) -> Result<usize> {
    Length::try_from(length)?.for_tlv()?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_order_and_to_the_end() {
        let mut out = Vec::new();
        put_number(&mut out, Tag::Integer, 300).unwrap();
        put(&mut out, Tag::OctetString, &[b"ab", b"c"]).unwrap();
        let mut fields = Fields::new(&out).unwrap();
        assert_eq!(fields.number(Tag::Integer).unwrap(), 300);
        assert_eq!(fields.octets::<3>().unwrap(), b"abc");
        fields.end().unwrap();
        assert!(Fields::new(&out).unwrap().end().is_err());
        assert!(Fields::new(&out).unwrap().value(Tag::OctetString).is_err());
    }

    #[test]
    fn other_encodings_of_the_same_value_are_refused() {
        for (bad, why) in [
            (&[0x04, 0x81, 0x01, 0x00][..], "a longer length than needed"),
            (&[0x24, 0x80, 0x00, 0x00], "an indefinite length"),
            (&[0x04, 0x02, 0x00], "an end before the end"),
        ] {
            assert!(Fields::new(bad).unwrap().value(Tag::OctetString).is_err(), "{why}");
        }
        for bad in [&[0x02, 0x02, 0x00, 0x01][..], &[0x02, 0x01, 0xff], &[0x02, 0x00]] {
            assert!(Fields::new(bad).unwrap().number(Tag::Integer).is_err(), "{bad:?}");
        }
        assert_eq!(Fields::new(&[0x02, 0x02, 0x00, 0xff]).unwrap().number(Tag::Integer).unwrap(), 255);
    }

    #[test]
    fn lengths_are_as_written() {
        for length in [0, 1, 127, 128, 255, 256, 65535, 65536, 1 << 24] {
            assert_eq!(field_len(length).unwrap(), field(Tag::OctetString, &[&vec![0; length]]).unwrap().len());
        }
        assert!(field_len(1 << 28).is_err());
    }
}
