//! The guard of a connection: it splits the bytes in both directions into frames, has `accounts` check and count them, and passes on
//! what the client library may read.

use super::accounts::{Accounts, MAX_DROPPED_BYTES, Violation};
use super::frames::{
    BODY, CONTENT_HEADER, FRAME_END, FRAME_HEADER_BYTES, FRAME_OVERHEAD_BYTES, FrameHeader, HEARTBEAT, METHOD,
    PartialContentHeader, Reader, write_frame,
};

/// The state of one connection.
#[derive(Debug)]
pub(super) struct Guard {
    pub(super) accounts: Accounts,
    received: Received,
    has_received_frame: bool,
    sent: Sent,
}

/// The part of a frame that the next byte from the broker belongs to.
#[derive(Debug)]
enum Received {
    Header {
        bytes: Vec<u8>,
    },
    /// The payload of a method or a heartbeat, and the last byte.
    Whole {
        frame: FrameHeader,
        bytes: Vec<u8>,
    },
    ContentHeader {
        frame: FrameHeader,
        header: PartialContentHeader,
        remaining: u64,
    },
    Body {
        remaining: u64,
        is_withheld: bool,
    },
    End {
        is_withheld: bool,
    },
    /// The broker's answer to another version of the protocol. lapin reports it.
    OtherVersion,
}

/// The same for bytes to the broker.
#[derive(Debug)]
enum Sent {
    /// The protocol header.
    ProtocolHeader {
        remaining: usize,
    },
    Header {
        bytes: Vec<u8>,
    },
    /// The first bytes of a method.
    Method {
        channel: u16,
        bytes: Vec<u8>,
        remaining: u64,
    },
    Other {
        remaining: u64,
    },
}

/// How much of a method that is sent is read: its class, its number, and the fields that matter.
const SENT_METHOD_BYTES: usize = 16;

impl Guard {
    pub(super) fn new() -> Self {
        Self {
            accounts: Accounts::new(),
            received: Received::Header { bytes: Vec::new() },
            has_received_frame: false,
            sent: Sent::ProtocolHeader { remaining: 8 },
        }
    }

    /// Takes bytes from the broker, and appends what the client may read of them.
    pub(super) fn receive(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Violation> {
        while !bytes.is_empty() {
            let state = std::mem::replace(&mut self.received, Received::Header { bytes: Vec::new() });
            (self.received, bytes) = self.receive_part(state, bytes, out)?;
        }
        Ok(())
    }

    fn receive_part<'a>(
        &mut self,
        state: Received,
        bytes: &'a [u8],
        out: &mut Vec<u8>,
    ) -> Result<(Received, &'a [u8]), Violation> {
        let next = Received::Header { bytes: Vec::new() };
        match state {
            Received::Header { bytes: mut header } => {
                let rest = fill(&mut header, FRAME_HEADER_BYTES, bytes);
                if header.len() < FRAME_HEADER_BYTES {
                    return Ok((Received::Header { bytes: header }, rest));
                }
                if !self.has_received_frame && header.starts_with(b"AMQP") {
                    out.extend(header);
                    return Ok((Received::OtherVersion, rest));
                }
                let state = FrameHeader::read(&header).map(|frame| self.begin_frame(frame, out));
                self.has_received_frame = true;
                Ok((state.unwrap_or(Ok(next))?, rest))
            }
            Received::Whole { frame, bytes: mut whole } => {
                let length = usize::try_from(frame.length).unwrap_or(usize::MAX).saturating_add(1);
                let rest = fill(&mut whole, length, bytes);
                if whole.len() < length {
                    return Ok((Received::Whole { frame, bytes: whole }, rest));
                }
                check_end(whole.pop())?;
                if frame.kind == HEARTBEAT {
                    write_frame(out, HEARTBEAT, frame.channel, &whole);
                } else {
                    self.accounts.receive_method(frame.channel, &whole, out)?;
                }
                Ok((next, rest))
            }
            Received::ContentHeader { frame, mut header, remaining } => {
                let (part, rest) = split(bytes, remaining);
                header.push(part);
                match remaining - part.len() as u64 {
                    0 => {
                        let [end, rest @ ..] = rest else {
                            return Ok((Received::ContentHeader { frame, header, remaining: 0 }, rest));
                        };
                        check_end(Some(*end))?;
                        let header = header.finish().ok_or(Violation::OutOfOrder("a content header without fields"))?;
                        self.accounts.receive_content_header(frame.channel, header, out)?;
                        Ok((next, rest))
                    }
                    remaining => Ok((Received::ContentHeader { frame, header, remaining }, rest)),
                }
            }
            Received::Body { remaining, is_withheld } => {
                let (part, rest) = split(bytes, remaining);
                if !is_withheld {
                    out.extend(part);
                }
                match remaining - part.len() as u64 {
                    0 => Ok((Received::End { is_withheld }, rest)),
                    remaining => Ok((Received::Body { remaining, is_withheld }, rest)),
                }
            }
            Received::End { is_withheld } => {
                let (end, rest) = split(bytes, 1);
                check_end(end.first().copied())?;
                if !is_withheld {
                    out.push(FRAME_END);
                }
                Ok((next, rest))
            }
            Received::OtherVersion => {
                out.extend(bytes);
                Ok((Received::OtherVersion, &[]))
            }
        }
    }

    fn begin_frame(&mut self, frame: FrameHeader, out: &mut Vec<u8>) -> Result<Received, Violation> {
        let length = u64::from(frame.length);
        let limit = match frame.kind {
            METHOD | HEARTBEAT | BODY => u64::from(self.accounts.frame_max()),
            CONTENT_HEADER => MAX_DROPPED_BYTES,
            _ if self.has_received_frame => return Err(Violation::OutOfOrder("a frame of an unknown type")),
            _ => return Err(Violation::NotAmqp),
        };
        if length.saturating_add(FRAME_OVERHEAD_BYTES) > limit {
            return Err(Violation::FrameTooLong { length: length.saturating_add(FRAME_OVERHEAD_BYTES), limit });
        }
        match frame.kind {
            CONTENT_HEADER => {
                Ok(Received::ContentHeader { frame, header: PartialContentHeader::default(), remaining: length })
            }
            BODY => {
                let is_withheld = self.accounts.receive_body(frame.channel, length)?;
                if !is_withheld {
                    out.extend(frame.bytes());
                }
                let part = Received::Body { remaining: length, is_withheld };
                Ok(if length == 0 { Received::End { is_withheld } } else { part })
            }
            _ => Ok(Received::Whole { frame, bytes: Vec::new() }),
        }
    }

    /// Takes bytes that the client has sent.
    pub(super) fn sent(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let state = std::mem::replace(&mut self.sent, Sent::Header { bytes: Vec::new() });
            (self.sent, bytes) = self.sent_part(state, bytes);
        }
    }

    fn sent_part<'a>(&mut self, state: Sent, bytes: &'a [u8]) -> (Sent, &'a [u8]) {
        let next = Sent::Header { bytes: Vec::new() };
        match state {
            Sent::ProtocolHeader { remaining } => {
                let (part, rest) = split(bytes, remaining as u64);
                match remaining - part.len() {
                    0 => (next, rest),
                    remaining => (Sent::ProtocolHeader { remaining }, rest),
                }
            }
            Sent::Header { bytes: mut header } => {
                let rest = fill(&mut header, FRAME_HEADER_BYTES, bytes);
                let frame = FrameHeader::read(&header);
                let state = frame.map_or(Sent::Header { bytes: header }, |FrameHeader { kind, channel, length }| {
                    let remaining = u64::from(length) + 1;
                    if kind == METHOD {
                        Sent::Method { channel, bytes: Vec::new(), remaining }
                    } else {
                        Sent::Other { remaining }
                    }
                });
                (state, rest)
            }
            Sent::Method { channel, bytes: mut method, remaining } => {
                let (part, rest) = split(bytes, remaining);
                fill(&mut method, SENT_METHOD_BYTES, part);
                match remaining - part.len() as u64 {
                    0 => {
                        self.accounts.sent_method(channel, Reader(&method));
                        (next, rest)
                    }
                    remaining => (Sent::Method { channel, bytes: method, remaining }, rest),
                }
            }
            Sent::Other { remaining } => {
                let (part, rest) = split(bytes, remaining);
                match remaining - part.len() as u64 {
                    0 => (next, rest),
                    remaining => (Sent::Other { remaining }, rest),
                }
            }
        }
    }
}

fn check_end(end: Option<u8>) -> Result<(), Violation> {
    if end == Some(FRAME_END) { Ok(()) } else { Err(Violation::OutOfOrder("a frame without its last byte")) }
}

/// Moves bytes to the end of `to` until that has this length; returns the rest.
fn fill<'a>(to: &mut Vec<u8>, length: usize, bytes: &'a [u8]) -> &'a [u8] {
    let (part, rest) = bytes.split_at(length.saturating_sub(to.len()).min(bytes.len()));
    to.extend(part);
    rest
}

/// The first bytes, at most `length`, and the rest.
fn split(bytes: &[u8], length: u64) -> (&[u8], &[u8]) {
    bytes.split_at(usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::super::accounts::{MAX_FRAME_BYTES, MAX_HELD_BYTES, Withheld};
    use super::super::frames::{BASIC, ContentHeader, write_short_string};
    use super::*;
    use crate::transport::MAX_BODY_BYTES;

    fn method(class: u16, number: u16, fields: &[u8]) -> Vec<u8> {
        [&class.to_be_bytes()[..], &number.to_be_bytes(), fields].concat()
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        write_frame(&mut frame, kind, 1, payload);
        frame
    }

    fn delivery(tag: u64) -> Vec<u8> {
        frame(METHOD, &method(BASIC, 60, &[&[1, b'c'][..], &tag.to_be_bytes(), &[0, 0, 3, 0xFF, 0xFF, 0xFF]].concat()))
    }

    fn content_header(body_size: u64) -> Vec<u8> {
        let mut frame = Vec::new();
        ContentHeader { class: BASIC, body_size, ..ContentHeader::default() }.write_frame(&mut frame, 1);
        frame
    }

    /// A guard whose client consumes on channel 1 with this prefetch.
    fn consuming(prefetch: u16) -> Guard {
        let mut guard = Guard::new();
        let qos = method(BASIC, 10, &[&[0; 4][..], &prefetch.to_be_bytes(), &[0]].concat());
        let sent = [
            b"AMQP\0\0\x09\x01".to_vec(),
            frame(METHOD, &method(20, 10, &[0])),
            frame(METHOD, &qos),
            frame(METHOD, &method(BASIC, 20, &[0; 10])),
        ];
        // In pieces, as the socket takes them.
        sent.concat().chunks(5).for_each(|piece| guard.sent(piece));
        guard
    }

    fn receive(guard: &mut Guard, bytes: &[u8]) -> Result<Vec<u8>, Violation> {
        let mut out = Vec::new();
        bytes.chunks(7).try_for_each(|piece| guard.receive(piece, &mut out))?;
        Ok(out)
    }

    /// Receives a message without its body, and says why it is withheld.
    fn deliver(guard: &mut Guard, tag: u64, length: u64) -> Option<Withheld> {
        receive(guard, &delivery(tag)).unwrap();
        let header = receive(guard, &content_header(length)).unwrap();
        let mut fields = Reader(&header[FRAME_HEADER_BYTES + 4..]);
        let (body_size, flags) = (fields.u64().unwrap(), fields.u16().unwrap());
        let kind = (flags != 0).then(|| Withheld::read(std::str::from_utf8(fields.short_string().unwrap()).unwrap()));
        let size = u64::from(MAX_FRAME_BYTES) - 8;
        let bodies = (0..length.div_ceil(size)).map(|n| size.min(length - n * size));
        for size in bodies {
            let mut out = Vec::new();
            guard.receive(&frame(BODY, &vec![0; usize::try_from(size).unwrap()]), &mut out).unwrap();
            assert_eq!(out.is_empty(), body_size == 0);
        }
        kind
    }

    fn ack(guard: &mut Guard, tag: u64) {
        guard.sent(&frame(METHOD, &method(BASIC, 80, &[&tag.to_be_bytes()[..], &[0]].concat())));
    }

    #[test]
    fn deliveries_are_bounded_by_the_prefetch_and_by_bytes() {
        let mut guard = consuming(10);
        let limit = 10 + 16;
        for tag in 1..=limit {
            assert_eq!(deliver(&mut guard, tag, 1), None);
        }
        ack(&mut guard, 3);
        assert_eq!(guard.accounts.held_bytes(), limit - 1);
        assert_eq!(deliver(&mut guard, 100, 1), None);
        let error = receive(&mut guard, &delivery(101)).unwrap_err();
        assert_eq!(error, Violation::TooManyDeliveries { limit: 26 });

        let mut guard = consuming(100);
        let largest = MAX_BODY_BYTES as u64;
        let count = MAX_HELD_BYTES / largest;
        for tag in 1..=count {
            assert_eq!(deliver(&mut guard, tag, largest), None);
        }
        assert_eq!(deliver(&mut guard, 90, 1), Some(Withheld::NoCapacity));
        assert_eq!(deliver(&mut guard, 91, largest + 1), Some(Withheld::TooLarge(largest + 1)));
        ack(&mut guard, 90);
        ack(&mut guard, 1);
        assert_eq!(deliver(&mut guard, 92, 1), None);
    }

    #[test]
    fn texts_that_are_not_used_are_not_passed_on() {
        let mut guard = consuming(1);
        let passed = receive(&mut guard, &delivery(1)).unwrap();
        let mut expected = vec![0, 60, 0, 60];
        write_short_string(&mut expected, b"c");
        expected.extend([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(passed, frame(METHOD, &expected));
    }

    #[test]
    fn frames_out_of_order_are_violations() {
        let body = frame(BODY, b"x");
        for frames in [
            body.clone(),
            content_header(1),
            [delivery(1), delivery(2)].concat(),
            [delivery(1), content_header(1), delivery(2)].concat(),
            [delivery(1), content_header(1), body.clone(), body.clone()].concat(),
            [delivery(1), content_header(1), frame(BODY, b"xx")].concat(),
            [delivery(1), delivery(1)].concat(),
            frame(METHOD, &method(BASIC, 71, &[0; 20])),
            frame(METHOD, &[0]),
            frame(7, b"x"),
        ] {
            let mut guard = consuming(10);
            receive(&mut guard, &frame(HEARTBEAT, &[])).unwrap();
            let error = receive(&mut guard, &frames).unwrap_err();
            assert!(matches!(error, Violation::OutOfOrder(_)), "{error}");
        }
        let mut no_end = delivery(1);
        *no_end.last_mut().unwrap() = 0;
        assert!(receive(&mut consuming(1), &no_end).is_err());
    }
}
