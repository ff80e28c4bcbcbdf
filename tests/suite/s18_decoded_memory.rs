//! Decoding a hostile message takes bounded memory, in every codec. Each message is decoded in a process of its own.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use nanite::packet::{Packet, Payload, Request};
use nanite::serializer::{Codec, CodecError, Json, MAX_DECODED_BYTES, MsgPack, Yaml};

/// The longest message.
const LONGEST: usize = 16 * 1024 * 1024;
/// Says to the process how to decode what it reads from standard input.
const CODEC: &str = "NANITE_TEST_CODEC";

fn codec(name: &str) -> Box<dyn Codec> {
    match name {
        "json" => Box::new(Json),
        "msgpack" => Box::new(MsgPack),
        "yaml" => Box::new(Yaml),
        other => panic!("{other}"),
    }
}

/// The peak memory of this process, in bytes.
fn peak() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
}

/// Decodes standard input and reports what came of it, and by how much the peak memory grew.
#[test]
#[ignore = "a process that the tests below start"]
fn decode_standard_input() {
    let codec = codec(&std::env::var(CODEC).unwrap());
    let mut bytes = Vec::with_capacity(LONGEST + 1);
    std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes).unwrap();
    let before = peak();
    let decoded = codec.decode(&bytes);
    let grown = peak() - before;
    println!("\ndecoded={} grown={grown}", decoded.is_ok());
}

/// Whether a message is accepted, and by how many bytes decoding it grew the memory of a process.
fn decode_elsewhere(codec: &str, bytes: &[u8]) -> (bool, usize) {
    let name = format!("{}::decode_standard_input", module_path!().split_once("::").unwrap().1);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--ignored", "--nocapture"])
        .env(CODEC, codec)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("decoded=")).unwrap_or_else(|| panic!("{text}"));
    let (decoded, grown) = line.split_once(" grown=").unwrap();
    (decoded == "true", grown.parse().unwrap())
}

/// A request whose payload is `head`, then `element` as often as fits, then `tail`; with its content before the name of its kind, so
/// that it has to be buffered, or behind it.
fn json_request(head: &str, element: &str, tail: &str, buffered: bool) -> Vec<u8> {
    let (start, end) = if buffered {
        (r#"{"data":{"type":"/a/b","payload":"#, r#"},"json_class":"Nanite::Request"}"#)
    } else {
        (r#"{"json_class":"Nanite::Request","data":{"type":"/a/b","payload":"#, "}}")
    };
    let count = (LONGEST - start.len() - end.len() - head.len() - tail.len()) / element.len();
    format!("{start}{head}{}{tail}{end}", element.repeat(count)).into_bytes()
}

/// The same in MessagePack: a list of as many elements as fit.
fn msgpack_request(element: &[u8], buffered: bool) -> Vec<u8> {
    fn text(bytes: &mut Vec<u8>, text: &str) {
        bytes.push(0xa0 | u8::try_from(text.len()).unwrap());
        bytes.extend(text.as_bytes());
    }
    let count = (LONGEST - 100) / element.len();
    let mut bytes = vec![0x82];
    let class = |bytes: &mut Vec<u8>| {
        text(bytes, "json_class");
        text(bytes, "Nanite::Request");
    };
    if !buffered {
        class(&mut bytes);
    }
    text(&mut bytes, "data");
    bytes.push(0x82);
    text(&mut bytes, "type");
    text(&mut bytes, "/a/b");
    text(&mut bytes, "payload");
    bytes.push(0xdd);
    bytes.extend(u32::try_from(count).unwrap().to_be_bytes());
    bytes.extend(element.repeat(count));
    if buffered {
        class(&mut bytes);
    }
    bytes
}

fn assert_bounded(codec: &str, what: &str, bytes: &[u8], accepted: bool) {
    assert!(bytes.len() <= LONGEST, "{what}");
    let (decoded, grown) = decode_elsewhere(codec, bytes);
    assert_eq!(decoded, accepted, "{codec}: {what}");
    assert!(grown < 2 * MAX_DECODED_BYTES, "{codec}: {what}: {grown} bytes");
}

#[test]
fn s18_long_messagepack_takes_bounded_memory_when_decoded() {
    for buffered in [false, true] {
        for (what, element) in [
            ("null", &[0xc0][..]),
            ("small numbers", &[0x01]),
            ("empty strings", &[0xa0]),
            ("strings of one byte", &[0xa1, b'x']),
            ("empty lists", &[0x90]),
            ("lists of one value", &[0x91, 0xc0]),
            ("maps of one entry", &[0x81, 0xa0, 0xc0]),
            ("maps of maps", &[0x81, 0xa0, 0x81, 0xa0, 0x80]),
        ] {
            assert_bounded("msgpack", what, &msgpack_request(element, buffered), false);
        }
        let long = [&[0xda, 0xff, 0xff][..], &[b'x'; 0xffff]].concat();
        assert_bounded("msgpack", "long strings", &msgpack_request(&long, buffered), true);
    }
    let text = Packet::Request(Request::new("/a/b".parse().unwrap(), Payload("x".repeat(LONGEST - 1000).into())));
    assert_bounded("msgpack", "one string", &MsgPack.encode(&text).unwrap(), true);
}

#[test]
fn s18_long_json_takes_bounded_memory_when_decoded() {
    for buffered in [false, true] {
        for (what, head, element, tail) in [
            ("numbers", "[0", ",0", "]"),
            ("empty strings", "[\"\"", ",\"\"", "]"),
            ("empty lists", "[[]", ",[]", "]"),
            ("lists of one value", "[[0]", ",[0]", "]"),
            ("maps of one entry", "[{}", ",{\"\":0}", "]"),
            ("no end", "[", "[],", ""),
        ] {
            assert_bounded("json", what, &json_request(head, element, tail, buffered), false);
        }
        assert_bounded("json", "a string", &json_request("\"", "[{,", "\"", buffered), true);
        assert_bounded("json", "escapes", &json_request("\"", "\\\"", "\"", buffered), true);
    }
}

#[test]
fn s18_long_yaml_takes_bounded_memory_when_decoded() {
    for buffered in [false, true] {
        for (what, head, element, tail) in [
            ("numbers", "[0", ",0", "]"),
            ("maps of one entry", "[{}", ",{a: 0}", "]"),
            ("repeated text", &*format!("[&a \"{}\"", "x".repeat(100_000)), ",*a", "]"),
        ] {
            assert_bounded("yaml", what, &json_request(head, element, tail, buffered), false);
        }
    }
}

#[test]
fn s18_packets_near_the_limit_of_values_are_accepted_and_beyond_it_are_not_sent() {
    let packet = |values: usize| {
        let payload = Payload(serde_json::Value::Array(vec![serde_json::Value::Null; values]));
        Packet::Request(Request::new("/a/b".parse().unwrap(), payload))
    };
    let refused = |codec: &dyn Codec| -> CodecError { codec.encode(&packet(3_000_000)).unwrap_err() };
    assert_eq!(refused(&MsgPack).to_string(), "msgpack: the values would take too much memory");
    assert_eq!(refused(&Json).to_string(), "json: the values would take too much memory");
    let most = packet(1_800_000);
    for (name, bytes) in [("msgpack", MsgPack.encode(&most).unwrap()), ("json", Json.encode(&most).unwrap())] {
        assert_bounded(name, "close to the limit", &bytes, true);
    }
}
