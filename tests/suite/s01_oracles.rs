//! s01: programs that share no code with nanite read and write the same envelope, in both suites.

use nanite::certs::KeyType;
use nanite::packet::{Advertise, MessageId, Outcome, Packet, Payload, Register, Request, Status, Token};
use nanite::serializer::{
    Audience, Codec, InboundQueue, Json, MessageClass, OpenContext, OpenErrorKind, SealRequest, Serializer,
    Verification,
};
use serde_json::{Value, json};

use crate::harness::oracle::{Files, openssl, oracle};
use crate::harness::pki::{Pki, STARTED, T0, agent, at, mapper};

const SUITES: [KeyType; 2] = [KeyType::P256, KeyType::Rsa2048];

fn request() -> Packet {
    Packet::Request(Request::new("/simple/echo".parse().unwrap(), Payload::from("grüße")))
}

fn register() -> Packet {
    Packet::Register(Register::new(agent("fred"), ["/simple/echo".parse().unwrap()]).with_status(Status::new(0.5)))
}

fn body(packet: &Packet) -> Value {
    serde_json::from_slice(&Json.encode(packet).unwrap()).unwrap()
}

#[test]
fn s01_independent_reader_opens_sealed_messages() {
    for key_type in SUITES {
        let (pki, files) = (Pki::new(key_type), Files::new());
        let (m1, fred, bob) = (mapper("m1"), agent("fred"), agent("bob"));
        for (name, identity) in [("m1", &m1), ("fred", &fred), ("bob", &bob)] {
            files.put(name, &pki.credentials(identity));
        }
        let serializer = |identity| pki.builder(identity).codec(Json).build().unwrap();
        let (by_mapper, by_agent) = (serializer(&m1), serializer(&fred));
        let outcome =
            Outcome::new(Token::random().unwrap(), m1.clone(), fred.clone(), Ok(Payload::from(json!({"a": [1, 2]}))));
        let both = Audience::Many(vec![fred.clone(), bob.clone()]);
        let to_mapper = Audience::One(m1.clone());
        let reply = MessageId::from_bytes([0xab; 16]);
        let cases = [
            (&by_mapper, "m1", "fred", request(), Audience::One(fred), json!(["nanite-fred"]), "request"),
            (&by_mapper, "m1", "bob", request(), both, json!(["nanite-fred", "nanite-bob"]), "request"),
            (&by_mapper, "m1", "bob", Advertise::default().into(), Audience::Agents, json!("agents"), "advertise"),
            (&by_agent, "fred", "m1", register(), Audience::Mappers, json!("mappers"), "register"),
            (&by_agent, "fred", "m1", outcome.into(), to_mapper, json!(["mapper-m1"]), "result"),
        ];
        for (number, (serializer, signer, reader, packet, audience, to, kind)) in cases.into_iter().enumerate() {
            let mut options = SealRequest::new(&audience, at(5));
            options.in_reply_to = (number % 2 == 0).then_some(reply);
            options.instances = match &audience {
                Audience::One(_) if number % 2 == 0 => &[7],
                Audience::Many(_) | Audience::Mappers => &[5, u64::MAX],
                _ => &[],
            };
            let sealed = serializer.seal(&packet, &options).unwrap();
            let [signer_pem, reader_pem] = [signer, reader].map(|name| files.path(&format!("{name}.pem")));
            let key = files.path(&format!("{reader}-key.pem"));
            let read = oracle(&["read", &signer_pem, &reader_pem, &key], &sealed.bytes).unwrap();
            let read: Value = serde_json::from_slice(&read).unwrap();
            assert_eq!(serde_json::from_str::<Value>(read["body"].as_str().unwrap()).unwrap(), body(&packet));
            let header = &read["header"];
            let expected = json!({
                "version": 2,
                "kind": kind,
                "from": serializer.identity().as_str(),
                "instance": STARTED.as_micros(),
                "sequence": header["sequence"],
                "to": to,
                "instances": options.instances,
                "id": sealed.id.to_string(),
                "issued_at": at(5).as_micros(),
                "expires_at": at(65).as_micros(),
                "class": "live",
                "in_reply_to": options.in_reply_to.map(|id| id.to_string()),
                "codec": "json",
            });
            assert_eq!(*header, expected);
            let mut changed = sealed.bytes.clone();
            *changed.last_mut().unwrap() ^= 1;
            oracle(&["read", &signer_pem, &reader_pem, &key], &changed).unwrap_err();
        }
    }
}

#[test]
fn s01_messages_of_an_independent_writer_open() {
    for key_type in SUITES {
        let (pki, files) = (Pki::new(key_type), Files::new());
        let nodes = [("m1", mapper("m1")), ("m2", mapper("m2")), ("fred", agent("fred")), ("bob", agent("bob"))];
        for (name, identity) in &nodes {
            files.put(name, &pki.credentials(identity));
        }
        let header = |kind: &str, sequence: u64, to: Value, class: &str| {
            json!({
                "kind": kind, "instance": T0.as_micros(), "sequence": sequence, "to": to, "class": class,
                "issued_at": at(1).as_micros(), "expires_at": at(50).as_micros(),
            })
        };
        let reply = json!({"in_reply_to": "ab".repeat(16)});
        type Case<'a> = (&'a str, &'a [&'a str], Value, Packet, Value, InboundQueue);
        let cases: Vec<Case<'_>> = vec![
            (
                "m1",
                &["fred"],
                header("request", 1, json!(["nanite-fred"]), "live"),
                request(),
                json!({}),
                InboundQueue::AgentInbox,
            ),
            (
                "m1",
                &["bob", "fred"],
                header("request", 2, json!(["nanite-bob", "nanite-fred"]), "live"),
                request(),
                // Parameters of SHA-256 as NULL, and no user keying material: variants that the RFCs allow.
                json!({"null": true, "how": {"ukm": null}}),
                InboundQueue::AgentInbox,
            ),
            (
                "m1",
                &[],
                header("advertise", 3, json!("agents"), "live"),
                Advertise::default().into(),
                json!({"encrypt": false, "certificates": true}),
                InboundQueue::AgentControl,
            ),
            (
                "fred",
                &["m1"],
                header("register", 4, json!("mappers"), "live"),
                register(),
                json!({"certificates": true}),
                InboundQueue::Presence,
            ),
            (
                "m1",
                &["m2"],
                header("request", 5, json!("mappers"), "stored"),
                request(),
                json!({}),
                InboundQueue::Offline,
            ),
        ];
        for (signer, recipients, mut header, packet, options, channel) in cases {
            if header["sequence"] == 2 {
                header.as_object_mut().unwrap().extend(reply.as_object().unwrap().clone());
            }
            let spec = json!({"header": header, "body": body(&packet).to_string(), "options": options}).to_string();
            let mut arguments = vec!["write".to_owned()];
            arguments.extend([files.path(&format!("{signer}.pem")), files.path(&format!("{signer}-key.pem"))]);
            arguments.extend(recipients.iter().map(|name| files.path(&format!("{name}.pem"))));
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let bytes = oracle(&arguments, spec.as_bytes()).unwrap();

            let node = |name: &str| &nodes.iter().find(|(known, _)| *known == name).unwrap().1;
            let reader = pki.serializer(node(recipients.last().unwrap_or(&"fred")));
            let context = OpenContext::new(channel, at(2));
            let inbound = reader.open(&bytes, &context).unwrap_or_else(|error| panic!("{spec}: {error}"));
            assert_eq!(inbound.packet, packet);
            let verified = inbound.signer().unwrap();
            assert_eq!(verified.signer(), node(signer));
            assert_eq!(verified.sequence(), header["sequence"].as_u64().unwrap());
            assert_eq!(verified.class() == MessageClass::Stored, header["class"] == "stored");
            assert_eq!(verified.in_reply_to().is_some(), header["sequence"] == 2);
            if channel == InboundQueue::Offline {
                // Such a message is remembered when its work is done, not when it is opened.
                reader.mark_completed(verified, at(2));
            }
            assert_eq!(reader.open(&bytes, &context).unwrap_err().kind, OpenErrorKind::Replayed);
        }
    }
}

/// Wraps the output of `openssl cms -verify` in a ContentInfo, which `-decrypt` needs.
fn content_info(enveloped: &[u8]) -> Vec<u8> {
    let field = |tag: u8, content: &[u8]| {
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        [&[tag, 0x82][..], &length, content].concat()
    };
    let oid = [0x06, 0x0b, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x10, 0x01, 0x17];
    field(0x30, &[&oid[..], &field(0xa0, enveloped)].concat())
}

#[test]
fn s01_openssl_verifies_and_decrypts_sealed_messages() {
    for key_type in SUITES {
        let (pki, files) = (Pki::new(key_type), Files::new());
        let (m1, fred) = (mapper("m1"), agent("fred"));
        files.put("m1", &pki.credentials(&m1));
        files.put("fred", &pki.credentials(&fred));
        let sealed = pki
            .builder(&m1)
            .codec(Json)
            .build()
            .unwrap()
            .seal(&request(), &SealRequest::new(&Audience::One(fred), at(5)))
            .unwrap();
        std::fs::write(files.path("message.der"), &sealed.bytes).unwrap();
        let verify = "cms -verify -inform DER -in message.der -certfile m1.pem -noverify -nointern -binary";
        openssl(files.dir(), &format!("{verify} -out enveloped"));
        let enveloped = std::fs::read(files.path("enveloped")).unwrap();
        std::fs::write(files.path("enveloped.der"), content_info(&enveloped)).unwrap();
        let decrypt = "cms -decrypt -inform DER -in enveloped.der -inkey fred-key.pem -recip fred.pem -binary";
        openssl(files.dir(), &format!("{decrypt} -out plaintext"));
        let plaintext = std::fs::read(files.path("plaintext")).unwrap();
        assert_eq!(Json.decode(&plaintext[64..]).unwrap(), request());
    }
}
