//! n23: codecs: the Ruby nanite's JSON packets, MessagePack, YAML, and a custom codec.

use std::sync::Arc;

use nanite::clock::Timestamp;
use nanite::packet::{
    Advertise, DuplicateInstance, Failure, FailureCode, FileChunk, FileEnd, FileStart, Identity, Intermediate, Kind,
    Outcome, Packet, Payload, Ping, Register, Request, SelectorName, Status, Token, Unregister,
};
use nanite::serializer::{
    Audience, Codec, CodecError, Inbound, InboundQueue, Json, MsgPack, OpenContext, OpenErrorKind, PlainSerializer,
    SealRequest, Serializer, Yaml,
};

use crate::harness::system::json;

fn vector(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/vectors/json-packets/{name}.json", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(path).unwrap()
}

fn token() -> Token {
    "27d2a73b2a680e5ee00d296068a8907f".parse().unwrap()
}

fn fred() -> Identity {
    Identity::agent("fred").unwrap()
}

fn mapper_a() -> Identity {
    Identity::mapper("a").unwrap()
}

/// One packet of each kind, with the values of the vectors that the Ruby nanite wrote.
fn ruby_packets() -> Vec<(&'static str, Packet)> {
    let register = Register::new(fred(), ["/simple/echo".parse().unwrap(), "/simple/time".parse().unwrap()])
        .with_status(Status::new(0.42))
        .with_tags(["eu".parse().unwrap(), "gpu".parse().unwrap()]);
    let string_status = Register::new(fred(), ["/simple/echo".parse().unwrap()]).with_status(Status::new(f64::NAN));
    let mut request = Request::new("/simple/echo".parse().unwrap(), json(r#"{"text":"héllo","n":[1,2.5,null,true]}"#));
    request.from = Some(mapper_a());
    request.token = Some(token());
    request.reply_to = Some("mapper-a".into());
    request.selector = SelectorName::Random;
    request.target = Some(fred());
    request.persistent = Some(true);
    request.tags = register.tags.clone();
    let mut push = Request::new("/log/write".parse().unwrap(), "line".into());
    push.from = Some(mapper_a());
    push.token = Some(token());
    push.target = Some(fred());
    let outcome = Outcome::new(token(), mapper_a(), fred(), Ok(json(r#"{"ok":[1,2]}"#)));
    let nil = Outcome::new(token(), Identity::agent("bob").unwrap(), mapper_a(), Ok(Payload::default()));
    let intermediate = Intermediate::new(token(), mapper_a(), fred(), "defaultkey", json(r#"{"pct":40}"#));
    let start = FileStart::new(token(), "a.bin", "a.bin");
    vec![
        ("advertise", Advertise::default().with_target(fred()).into()),
        ("register", register.into()),
        ("register_string_status", string_status.into()),
        ("ping", Ping::new(fred(), Status::new(1.25)).into()),
        ("unregister", Unregister::new(fred()).into()),
        ("request", request.into()),
        ("request_minimal", Request::new("/simple/echo".parse().unwrap(), "hi".into()).into()),
        ("push", Packet::Push(push)),
        ("result", outcome.into()),
        ("result_nil", nil.into()),
        ("intermediate", intermediate.into()),
        ("file_start", start.into()),
        ("file_chunk", FileChunk::new(token(), b"chunk text".to_vec()).into()),
        ("file_end", FileEnd::new(token()).with_meta(json(r#"{"from":"fred"}"#).0).into()),
    ]
}

#[test]
fn n23_ruby_json_packets_are_read_and_written() {
    for (name, packet) in ruby_packets() {
        let bytes = vector(name);
        assert_eq!(Json.decode(&bytes).unwrap(), packet, "{name}");
        // The Ruby nanite also writes sizes and nulls, which readers ignore.
        let strip = |bytes: &[u8]| {
            fn without(value: &mut serde_json::Value) {
                if let Some(map) = value.as_object_mut() {
                    map.retain(|key, value| key != "size" && !value.is_null());
                    map.values_mut().for_each(without);
                }
            }
            let mut value: serde_json::Value = serde_json::from_slice(bytes).unwrap();
            without(&mut value);
            value
        };
        let written = Json.encode(&packet).unwrap();
        if name != "register_string_status" {
            assert_eq!(strip(&written), strip(&bytes), "{name}");
        }
    }
}

#[test]
fn n23_every_codec_round_trips_every_kind() {
    let codecs: [&dyn Codec; 3] = [&Json, &MsgPack, &Yaml];
    let mut kinds = std::collections::BTreeSet::new();
    let mut packets: Vec<Packet> = ruby_packets().into_iter().map(|(_, packet)| packet).collect();
    packets.push(FileChunk::new(token(), vec![0, 255, 128, 10]).with_sequence(7).into());
    packets.push(
        Outcome::new(token(), mapper_a(), fred(), Err(Failure::new(FailureCode::Denied, "Denied: \"yes\" # no")))
            .into(),
    );
    packets.push(Request::new("/a/b".parse().unwrap(), json(r#"["yes","1","null","~","",{"a: b":"- x\n"}]"#)).into());
    for packet in packets {
        kinds.insert(packet.kind());
        for codec in codecs {
            let bytes = codec.encode(&packet).unwrap();
            assert_eq!(codec.decode(&bytes).unwrap(), packet, "{}", codec.name());
        }
    }
    assert_eq!(kinds.len(), Kind::ALL.len());
}

#[test]
fn n23_advertise_keeps_its_serialized_names() {
    let advertise = Advertise::default()
        .with_target(fred())
        .with_duplicate(DuplicateInstance::new(7, true))
        .with_serves_requests(true);
    let packet = Packet::from(advertise);
    let data = r#"{"target":"nanite-fred","twin":{"instance":7,"replaced":true},"serves":true}"#;
    let expected = format!(r#"{{"json_class":"Nanite::Advertise","data":{data}}}"#);
    assert_eq!(String::from_utf8(Json.encode(&packet).unwrap()).unwrap(), expected);
    let expected = [
        &b"\x82\xaajson_class\xb1Nanite::Advertise\xa4data\x83\xa6target\xabnanite-fred"[..],
        b"\xa4twin\x82\xa8instance\x07\xa8replaced\xc3\xa6serves\xc3",
    ];
    assert_eq!(MsgPack.encode(&packet).unwrap(), expected.concat());
}

#[test]
fn n23_numbers_round_trip_exactly() {
    let numbers = [7.532_784_696_383_645_5e-121, 0.1 + 0.2, f64::MIN_POSITIVE, f64::MAX, -1.0 / 3.0, 5e-324];
    for number in numbers {
        let mut request = Request::new("/simple/echo".parse().unwrap(), Payload::new(number).unwrap());
        request.from = Some(mapper_a());
        for packet in [Packet::Ping(Ping::new(fred(), Status::new(number))), Packet::Request(request)] {
            for codec in [&Json as &dyn Codec, &MsgPack, &Yaml] {
                let encoded = codec.encode(&packet).unwrap();
                assert_eq!(codec.decode(&encoded).unwrap(), packet, "{number:e} in {}", codec.name());
            }
        }
    }
}

#[test]
fn n23_every_codec_rejects_invalid_packets() {
    let codecs: [&dyn Codec; 3] = [&Json, &MsgPack, &Yaml];
    let deep = "[".repeat(10_000);
    let bomb = format!("a: &a [x,x]\n{}", (0..40).map(|i| format!("b{i}: &b{i} [*a,*a]\n")).collect::<String>());
    let twice = r#"{"json_class":"Nanite::Push","data":{"type":"/a/b","payload":{"k":1,"k":2}}}"#;
    let selector = r#"{"json_class":"Nanite::Push","data":{"type":"/a/b","selector":"system"}}"#;
    let trailing = r#"{"json_class":"Nanite::Advertise","data":{}} {}"#;
    let nested = format!(
        r#"{{"json_class":"Nanite::Push","data":{{"type":"/a/b","payload":{}1{}}}}}"#,
        "[".repeat(90),
        "]".repeat(90)
    );
    for codec in codecs {
        for text in
            [deep.as_str(), &bomb, twice, selector, trailing, &nested, "", "null", "[]", "--- !ruby/object:Foo {}"]
        {
            assert!(codec.decode(text.as_bytes()).is_err(), "{}: {text:.60}", codec.name());
        }
        assert!(codec.decode(&[0xdd, 0xff, 0xff, 0xff, 0xff]).is_err(), "a list that claims 4 billion items");
    }
}

#[test]
fn n23_plain_serializer_refuses_wrong_queue_codec_and_size() {
    let plain = PlainSerializer::new(fred(), MsgPack);
    let packet = Packet::from(Ping::new(fred(), Status::new(1.0)));
    let now = Timestamp::from_secs(1);
    let sealed = plain.seal(&packet, &SealRequest::new(&Audience::Mappers, now)).unwrap();
    let opened = plain.open(&sealed.bytes, &OpenContext::new(InboundQueue::Presence, now)).unwrap();
    assert_eq!(opened.packet, packet);
    assert!(opened.signer().is_none(), "a plain message has no signer");
    let elsewhere = plain.open(&sealed.bytes, &OpenContext::new(InboundQueue::AgentInbox, now)).unwrap_err();
    assert_eq!(elsewhere.kind, OpenErrorKind::WrongDestination);
    let other =
        PlainSerializer::json(fred()).open(&sealed.bytes, &OpenContext::new(InboundQueue::Presence, now)).unwrap_err();
    assert_eq!(other.kind, OpenErrorKind::BadBody);
    let long = PlainSerializer::json(fred())
        .open(&vec![b' '; 3 << 20], &OpenContext::new(InboundQueue::Presence, now))
        .unwrap_err();
    assert_eq!(long.kind, OpenErrorKind::TooLarge);
}

/// A custom codec: JSON with its bytes reversed.
#[derive(Debug)]
struct ReversedJson;

impl Codec for ReversedJson {
    fn name(&self) -> &'static str {
        "reversed-json"
    }

    fn content_type(&self) -> &'static str {
        "application/x-reversed-json"
    }

    fn encode(&self, packet: &Packet) -> Result<Vec<u8>, CodecError> {
        Json.encode(packet).map(|mut bytes| {
            bytes.reverse();
            bytes
        })
    }

    fn decode(&self, bytes: &[u8]) -> Result<Packet, CodecError> {
        Json.decode(&bytes.iter().rev().copied().collect::<Vec<u8>>())
    }
}

#[test]
fn n23_custom_codec_is_used_by_the_serializer() {
    let serializer: Arc<dyn Serializer> = Arc::new(PlainSerializer::new(fred(), ReversedJson));
    let packet = Packet::from(Advertise::default());
    let now = Timestamp::from_secs(1);
    let sealed = serializer.seal(&packet, &SealRequest::new(&Audience::Agents, now)).unwrap();
    assert_eq!(sealed.bytes.first(), Some(&b'}'));
    let Inbound { packet: opened, .. } =
        serializer.open(&sealed.bytes, &OpenContext::new(InboundQueue::AgentControl, now)).unwrap();
    assert_eq!(opened, packet);
}
