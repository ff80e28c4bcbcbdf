//! AMQP 0-9-1 frames, as far as the guard of a connection reads and writes them: numbers and short strings of a payload, and the
//! properties of a message.

/// The types of frames.
pub(super) const METHOD: u8 = 1;
pub(super) const CONTENT_HEADER: u8 = 2;
pub(super) const BODY: u8 = 3;
pub(super) const HEARTBEAT: u8 = 8;
/// The last byte of each frame.
pub(super) const FRAME_END: u8 = 0xCE;
/// Type, channel and length of the payload.
pub(super) const FRAME_HEADER_BYTES: usize = 7;
/// What a frame has in addition to its payload.
pub(super) const FRAME_OVERHEAD_BYTES: u64 = FRAME_HEADER_BYTES as u64 + 1;

/// The class of `basic` methods, the only one whose methods have content.
pub(super) const BASIC: u16 = 60;

/// The bits of the properties in a content header.
const CONTENT_TYPE_BIT: u16 = 1 << 15;
const CONTENT_ENCODING_BIT: u16 = 1 << 14;
const HEADERS_BIT: u16 = 1 << 13;
const DELIVERY_MODE_BIT: u16 = 1 << 12;
const PRIORITY_BIT: u16 = 1 << 11;
const CORRELATION_ID_BIT: u16 = 1 << 10;
const TYPE_BIT: u16 = 1 << 5;

/// How much of a content header is kept, apart from its table of headers. All other properties are shorter than this.
const MAX_KEPT_BYTES: usize = 4 * 1024;
/// Class, weight and size of the body.
const CONTENT_HEADER_BYTES: usize = 12;

/// The first bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameHeader {
    pub(super) kind: u8,
    pub(super) channel: u16,
    /// The length of the payload.
    pub(super) length: u32,
}

impl FrameHeader {
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        Some(Self { kind: reader.u8()?, channel: reader.u16()?, length: reader.u32()? })
    }

    pub(super) fn bytes(self) -> [u8; FRAME_HEADER_BYTES] {
        let ([a, b], [c, d, e, f]) = (self.channel.to_be_bytes(), self.length.to_be_bytes());
        [self.kind, a, b, c, d, e, f]
    }
}

/// Appends a complete frame.
pub(super) fn write_frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    out.extend(FrameHeader { kind, channel, length }.bytes());
    out.extend(payload);
    out.push(FRAME_END);
}

/// Reads a payload. Each call returns `None` if the payload ends too early.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn short_string(&mut self) -> Option<&'a [u8]> {
        let length = self.u8()?;
        self.take(length.into())
    }
}

/// Appends a short string; nothing that is longer than one can be.
pub(super) fn write_short_string(out: &mut Vec<u8>, text: &[u8]) {
    let text = if text.len() > 255 { &[] } else { text };
    out.push(u8::try_from(text.len()).unwrap_or(0));
    out.extend(text);
}

/// A content header while it arrives. The table of headers is left out, so that neither its length nor its depth matters.
#[derive(Debug, Default)]
pub(super) struct PartialContentHeader {
    kept: Vec<u8>,
    /// How many bytes of the table are still to come.
    skip: usize,
    is_table_passed: bool,
}

/// What a node reads of a content header.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ContentHeader {
    pub(super) class: u16,
    pub(super) body_size: u64,
    pub(super) content_type: Option<Vec<u8>>,
    pub(super) correlation_id: Option<Vec<u8>>,
    /// The property `type`. It is written and not read.
    pub(super) kind: Option<Vec<u8>>,
}

impl PartialContentHeader {
    /// Takes the next bytes of the payload.
    pub(super) fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (skipped, rest) = bytes.split_at(self.skip.min(bytes.len()));
            self.skip -= skipped.len();
            let (kept, rest) = rest.split_at(MAX_KEPT_BYTES.saturating_sub(self.kept.len()).min(rest.len()));
            if skipped.is_empty() && kept.is_empty() {
                return;
            }
            self.kept.extend(kept);
            bytes = rest;
            if !self.is_table_passed {
                self.remove_table();
            }
        }
    }

    /// Removes the table of headers, if enough has arrived to know where it is.
    fn remove_table(&mut self) {
        let mut reader = Reader(&self.kept);
        let Some((_, flags)) = reader.take(CONTENT_HEADER_BYTES).zip(reader.u16()) else { return };
        for bit in [CONTENT_TYPE_BIT, CONTENT_ENCODING_BIT] {
            if flags & bit != 0 && reader.short_string().is_none() {
                return;
            }
        }
        if flags & HEADERS_BIT != 0 {
            let Some(length) = reader.u32() else { return };
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let arrived = reader.0.len().min(length);
            let start = self.kept.len() - reader.0.len();
            self.kept.drain(start..start + arrived);
            self.skip = length - arrived;
        }
        self.is_table_passed = true;
    }

    /// The header, when all of it has arrived; `None` if it is too short. Properties that cannot be read count as absent: anyone who
    /// may publish can write anything there, and the broker does not check it.
    pub(super) fn finish(self) -> Option<ContentHeader> {
        let mut reader = Reader(&self.kept);
        let (class, _weight, body_size) = (reader.u16()?, reader.u16()?, reader.u64()?);
        let mut header = ContentHeader { class, body_size, ..ContentHeader::default() };
        let _ = header.read_properties(reader);
        Some(header)
    }
}

impl ContentHeader {
    fn read_properties(&mut self, mut reader: Reader<'_>) -> Option<()> {
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).is_ok().then(|| bytes.to_vec());
        let flags = reader.u16()?;
        if flags & CONTENT_TYPE_BIT != 0 {
            self.content_type = text(reader.short_string()?);
        }
        if flags & CONTENT_ENCODING_BIT != 0 {
            reader.short_string()?;
        }
        if flags & HEADERS_BIT != 0 {
            // Its content was left out.
            reader.u32()?;
        }
        for bit in [DELIVERY_MODE_BIT, PRIORITY_BIT] {
            if flags & bit != 0 {
                reader.u8()?;
            }
        }
        if flags & CORRELATION_ID_BIT != 0 {
            self.correlation_id = text(reader.short_string()?);
        }
        Some(())
    }

    /// Appends a content header frame with these values only.
    pub(super) fn write_frame(&self, out: &mut Vec<u8>, channel: u16) {
        let texts = [
            (CONTENT_TYPE_BIT, &self.content_type),
            (CORRELATION_ID_BIT, &self.correlation_id),
            (TYPE_BIT, &self.kind),
        ];
        let mut payload = Vec::with_capacity(64);
        payload.extend(self.class.to_be_bytes());
        payload.extend(0_u16.to_be_bytes());
        payload.extend(self.body_size.to_be_bytes());
        let flags = texts.iter().filter(|(_, text)| text.is_some()).fold(0, |flags, (bit, _)| flags | bit);
        payload.extend(flags.to_be_bytes());
        for text in texts.iter().filter_map(|(_, text)| text.as_ref()) {
            write_short_string(&mut payload, text);
        }
        write_frame(out, CONTENT_HEADER, channel, &payload);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A content header with every property at its longest, and a table of this length.
    fn payload(table: usize, text: &[u8]) -> Vec<u8> {
        let mut payload =
            [&BASIC.to_be_bytes()[..], &[0, 0], &77_u64.to_be_bytes(), &0xFFFC_u16.to_be_bytes()].concat();
        let short = |payload: &mut Vec<u8>| write_short_string(payload, text);
        short(&mut payload);
        short(&mut payload);
        payload.extend(u32::try_from(table).unwrap().to_be_bytes());
        payload.extend(vec![0xFF; table]);
        payload.extend([2, 9]);
        for _ in 0..4 {
            short(&mut payload);
        }
        payload.extend([7; 8]);
        for _ in 0..4 {
            short(&mut payload);
        }
        payload
    }

    #[test]
    fn reads_properties_around_a_table_of_any_length_in_pieces_of_any_size() {
        let text = [b'x'; 255];
        for table in [0, 1, 100, 4_000, 5_000, 200_000] {
            for piece in [1, 3, 1_000, 1_000_000] {
                let mut partial = PartialContentHeader::default();
                payload(table, &text).chunks(piece).for_each(|piece| partial.push(piece));
                assert!(partial.kept.len() <= MAX_KEPT_BYTES);
                let header = partial.finish().unwrap();
                assert_eq!((header.class, header.body_size), (BASIC, 77));
                assert_eq!(header.content_type.as_deref(), Some(&text[..]), "{table} {piece}");
                assert_eq!(header.correlation_id.as_deref(), Some(&text[..]), "{table} {piece}");
            }
        }
    }

    #[test]
    fn properties_that_cannot_be_read_are_absent() {
        let header = |bytes: &[u8]| {
            let mut partial = PartialContentHeader::default();
            partial.push(bytes);
            partial.finish()
        };
        assert_eq!(header(&payload(10, &[0xFF; 9])).unwrap().content_type, None, "not UTF-8");
        let whole = payload(300, b"text");
        for length in 0..whole.len() {
            assert_eq!(header(&whole[..length]).is_some(), length >= CONTENT_HEADER_BYTES);
        }
        let mut endless = payload(0, b"text");
        endless[24..28].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(header(&endless).unwrap().correlation_id, None);
    }
}
