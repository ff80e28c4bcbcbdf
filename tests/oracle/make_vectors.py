"""Makes tests/vectors/envelope: one good message of each kind and suite, and bad ones with one fault each.

`index.json` says of each file what it is, who reads it where and when, and what must come of it: the packet, or the kind of error. Keys,
certificates and messages are new each time. Run it in an environment with requirements.txt:

    python tests/oracle/make_vectors.py
"""

import datetime
import json
import os
import pathlib
import sys

sys.dont_write_bytecode = True

from asn1crypto import core
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID

import envelope
from envelope import AUTH_ENVELOPED, DATA, Writer, algorithm, identity, key_id, sha256

OUT = pathlib.Path(__file__).parent.parent / "vectors" / "envelope"
T0 = 1_795_500_000  # when the senders started, in seconds
STARTED = T0 - 60  # when the readers started
MICROS = 1_000_000


# Who is there.


def certificate(name, uri, key, issuer_name, issuer_key, ca=False):
    usage = dict.fromkeys(["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
                           "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"], False)
    if ca:
        usage.update(key_cert_sign=True, crl_sign=True)
    elif isinstance(key, rsa.RSAPrivateKey):
        usage.update(digital_signature=True, key_encipherment=True)
    else:
        usage.update(digital_signature=True, key_agreement=True)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer_name)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2026, 1, 1))
        .not_valid_after(datetime.datetime(2125, 1, 1))
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if uri:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


class Node:
    def __init__(self, file, role, name, key, ca_name, ca_key):
        self.file, self.key = file, key
        self.certificate = certificate(name, f"spiffe://example.org/{role}/{name}", key, ca_name, ca_key)
        self.writer = Writer(self.certificate, key)


def p256():
    return ec.generate_private_key(ec.SECP256R1())


def rsa2048():
    return rsa.generate_private_key(65537, 2048)


CA_KEY, OTHER_CA_KEY = p256(), p256()
CA = certificate("vectors CA", None, CA_KEY, "vectors CA", CA_KEY, ca=True)
OTHER_CA = certificate("another CA", None, OTHER_CA_KEY, "another CA", OTHER_CA_KEY, ca=True)
NODES = {
    name: Node(name, role, name.removeprefix("rsa-"), key(), "vectors CA", CA_KEY)
    for name, role, key in [
        ("m1", "mapper", p256), ("m2", "mapper", p256), ("fred", "agent", p256), ("bob", "agent", p256),
        ("rsa-m3", "mapper", rsa2048), ("rsa-carl", "agent", rsa2048),
    ]
}
# Not known to the readers, by the same CA and by another.
UNKNOWN = Node("unknown", "mapper", "m1", p256(), "vectors CA", CA_KEY)
# Known to the readers, but of a CA that they do not trust.
STRANGER = Node("stranger", "mapper", "m9", p256(), "another CA", OTHER_CA_KEY)


# The messages.

TOKEN = "000102030405060708090a0b0c0d0e0f"


def body(kind, sender, receiver):
    me, to = identity(sender.certificate), identity(receiver.certificate)
    cls, data = {
        "register": ("Register", {"identity": me, "services": ["/simple/echo"], "status": 0.5, "tags": ["big"]}),
        "unregister": ("UnRegister", {"identity": me}),
        "ping": ("Ping", {"identity": me, "status": 0.5}),
        "advertise": ("Advertise", {"target": None}),
        "request": ("Request", {"type": "/simple/echo", "payload": {"a": [1, 2.5, None, "ü"]}, "from": me, "token": TOKEN}),
        "push": ("Push", {"type": "/simple/echo", "payload": "x", "from": me, "token": TOKEN}),
        "result": ("Result", {"token": TOKEN, "to": to, "from": me, "results": [1]}),
        "intermediate": ("IntermediateMessage",
                         {"token": TOKEN, "to": to, "from": me, "messagekey": "k", "message": 1, "sequence": 0}),
        "file-start": ("FileStart", {"filename": "a", "dest": "b", "token": TOKEN, "file_size": 1, "domain": "d"}),
        "file-chunk": ("FileChunk", {"token": TOKEN, "chunk": "x", "sequence": 0}),
        "file-end": ("FileEnd", {"token": TOKEN, "meta": None}),
    }[kind]
    return json.dumps({"json_class": f"Nanite::{cls}", "data": data}, ensure_ascii=False).encode()


CHANNELS = {
    "register": "presence", "unregister": "presence", "ping": "presence", "advertise": "agent-control",
    "request": "agent-inbox", "push": "agent-inbox", "result": "mapper-inbox", "intermediate": "mapper-inbox",
    "file-start": "agent-control", "file-chunk": "agent-control", "file-end": "agent-control",
}
FROM_AGENT = {"register", "unregister", "ping", "result", "intermediate"}

COUNT = 0


def fields(kind, to, **more):
    global COUNT
    COUNT += 1
    return {"kind": kind, "instance": T0 * MICROS, "sequence": COUNT, "to": to,
            "issued_at": (T0 + 10) * MICROS, "expires_at": (T0 + 70) * MICROS, **more}


def message(sender, recipients, header, content, *, encrypt=None, certificates=None, signer=None, on_header=None,
            on_plaintext=None, on_enveloped=None, on_info=None, on_signed=None, on_bytes=None, signing={}, how={},
            after_signing=None):
    """A message, with a place to meddle at each step; what comes later is right for what was meddled with before."""
    writer, signing = (signer or sender).writer, dict(signing)
    encrypt = header["kind"] != "advertise" if encrypt is None else encrypt
    if certificates is None:
        certificates = [sender.certificate] if header["kind"] in ("advertise", "register") else []
    salt = os.urandom(32)
    recipients = [one.certificate for one in recipients]
    header_der = sender.writer.header(recipients if encrypt else [], salt, content, header)
    if on_header:
        header_der = on_header(header_der)
    plaintext = salt + sha256(header_der) + content
    if on_plaintext:
        plaintext = on_plaintext(plaintext)
    signed = writer.enveloped(plaintext, recipients, **how) if encrypt else plaintext
    if on_enveloped:
        signed = on_enveloped(signed)
    content_type = signing.pop("content_type", AUTH_ENVELOPED if encrypt else DATA)
    info = writer.signer_info(content_type, signed, header_der, **signing)
    if on_info:
        info = on_info(info)
    if after_signing:
        signed = after_signing(signed)
    der = writer.signed(content_type, signed, [info], certificates)
    if on_signed:
        der = change(envelope.ContentInfo, der, lambda outer: on_signed(outer["content"]))
    return on_bytes(der) if on_bytes else der


def change(spec, der, how):
    value = spec.load(der)
    result = how(value)
    return value.dump(force=True) if result is None else result


def changed(spec, how):
    return lambda der: change(spec, der, how)


def swapped(first, second):
    """Two pieces that stand one behind the other, the other way round."""
    def swap(der):
        assert first + second in der
        return der.replace(first + second, second + first)
    return swap


def in_order(values):
    return sorted(value.dump() for value in values)


INDEX = []


def write(name, what, der, reader, channel, expect, packet=None, now=T0 + 20):
    directory = OUT / "messages"
    (directory / f"{name}.der").write_bytes(der)
    entry = {"file": f"{name}.der", "what": what, "reader": reader.file, "channel": channel, "now": now, "expect": expect}
    if packet is not None:
        entry["packet"] = json.loads(packet)
    INDEX.append(entry)


def good():
    for suite, mapper, agent in [("p256", "m1", "fred"), ("rsa", "rsa-m3", "rsa-carl")]:
        mapper, agent = NODES[mapper], NODES[agent]
        for kind, channel in CHANNELS.items():
            sender, reader = (agent, mapper) if kind in FROM_AGENT else (mapper, agent)
            to = "mappers" if channel == "presence" else "agents" if kind == "advertise" else [identity(reader.certificate)]
            packet = body(kind, sender, reader)
            der = message(sender, [reader], fields(kind, to), packet)
            write(f"good-{suite}-{kind}", f"a {kind} in the suite {suite}", der, reader, channel, "opened", packet)
    m1, fred, bob, m2, carl = (NODES[name] for name in ("m1", "fred", "bob", "m2", "rsa-carl"))
    packet = body("request", m1, fred)
    everybody = [identity(one.certificate) for one in (fred, bob, carl)]
    der = message(m1, [fred, bob, carl], fields("request", everybody), packet)
    write("good-many-fred", "for three nodes in both suites, read by one of P-256", der, fred, "agent-inbox", "opened", packet)
    write("good-many-carl", "the same, read by the one of RSA", der, carl, "agent-inbox", "opened", packet)
    der = message(m1, [m2], fields("request", "mappers", **{"class": "stored", "expires_at": (T0 + 86_400) * MICROS}), packet)
    write("good-stored", "stored, a day later", der, m2, "offline", "opened", packet, now=T0 + 86_000)
    der = message(m1, [fred], fields("request", ["nanite-fred"], in_reply_to="ab" * 16), packet)
    write("good-in-reply", "it answers a message", der, fred, "agent-inbox", "opened", packet)
    # What names the reader's process.
    own, early = STARTED * MICROS, {"instance": STARTED * MICROS, "issued_at": (STARTED - 1) * MICROS,
                                    "expires_at": (STARTED + 50) * MICROS}
    der = message(m1, [fred], fields("request", ["nanite-fred"], **early, instances=[own]), packet)
    write("good-process", "for the reader's process, by a clock that is behind", der, fred, "agent-inbox", "opened", packet,
          now=STARTED + 5)
    der = message(m1, [fred, bob, carl], fields("request", everybody, **early, instances=[1, own]), packet)
    write("good-many-processes", "for three nodes, with the processes of two", der, fred, "agent-inbox", "opened", packet,
          now=STARTED + 5)
    proxied = body("request", fred, m1)
    der = message(fred, [m1], fields("request", "mappers", **early, instances=[own, *range(own + 1, own + 64)]), proxied)
    write("good-64-processes", "for the mappers, with 64 processes", der, m1, "requests", "opened", proxied, now=STARTED + 5)
    settled = {**early, "issued_at": (STARTED + 30) * MICROS, "expires_at": (STARTED + 90) * MICROS}
    der = message(m1, [fred], fields("request", ["nanite-fred"], **settled), packet)
    write("good-settled", "30 seconds after the reader's start, without a process", der, fred, "agent-inbox", "opened", packet,
          now=STARTED + 31)
    der = message(fred, [m1], fields("ping", "mappers", **{**early, "issued_at": own}), body("ping", fred, m1))
    write("good-early-ping", "a ping at the reader's start", der, m1, "presence", "opened", body("ping", fred, m1),
          now=STARTED + 5)
    der = message(m1, [fred], fields("request", ["nanite-fred"]), packet, how={"ukm": None})
    write("good-no-ukm", "without user keying material", der, fred, "agent-inbox", "opened", packet)


def bad():
    m1, m2, fred, bob = (NODES[name] for name in ("m1", "m2", "fred", "bob"))
    packet = body("request", m1, fred)

    def case(name, expect, what, *, kind="request", to=("nanite-fred",), recipients=(fred,), sender=m1, reader=fred,
             channel="agent-inbox", now=T0 + 20, content=packet, header={}, **meddle):
        to = list(to) if isinstance(to, tuple) else to
        der = message(sender, recipients, fields(kind, to, **header), content, **meddle)
        write(f"bad-{name}", what, der, reader, channel, expect, now=now)

    # 1 TooLarge: the limit of heartbeats is 64 KiB, that of their queue 256 KiB.
    large = json.loads(body("ping", fred, m1))
    large["data"]["status"] = "x" * 70_000
    case("large-ping", "TooLarge", "a ping of 70,000 bytes", kind="ping", sender=fred, to="mappers", recipients=[m1], reader=m1,
         channel="presence", content=json.dumps(large).encode())

    # 2 Malformed.
    def indefinite(der):
        return b"\x30\x80" + core.Sequence.load(der).contents + b"\x00\x00"

    def long_length(der):
        contents = core.Sequence.load(der).contents
        return b"\x30\x84" + len(contents).to_bytes(4, "big") + contents

    case("indefinite", "Malformed", "an indefinite length, as BER has", on_bytes=indefinite)
    case("long-length", "Malformed", "a length in more bytes than needed", on_bytes=long_length)
    case("trailing", "Malformed", "a byte behind the end", on_bytes=lambda der: der + b"\x00")
    case("truncated", "Malformed", "the last byte is missing", on_bytes=lambda der: der[:-1])
    case("empty", "Malformed", "no byte at all", on_bytes=lambda der: b"")
    case("json", "Malformed", "the packet as plain JSON", on_bytes=lambda der: packet)
    case("two-signers", "Malformed", "a second SignerInfo, of another node",
         on_signed=lambda signed: signed["signers"].append(
             m2.writer.signer_info(AUTH_ENVELOPED, signed["encapsulated"]["content"].native, b"header")))
    case("no-signer", "Malformed", "no SignerInfo", on_signed=lambda signed: signed["signers"].__delitem__(0))
    case("two-digests", "Malformed", "two digest algorithms",
         on_signed=lambda signed: signed["digests"].append(algorithm("2.16.840.1.101.3.4.2.3")))
    case("unsigned-attributes", "Malformed", "an unsigned attribute", on_info=lambda info: unsigned(info))
    case("certificate", "Malformed", "a certificate in a request", certificates=[m1.certificate])
    case("four-attributes", "Malformed", "a fourth signed attribute, the signing time",
         signing={"extra": [(core.ObjectIdentifier("1.2.840.113549.1.9.5"), core.UTCTime(datetime.datetime(2026, 11, 24, tzinfo=datetime.timezone.utc)))]})
    case("two-attributes", "Malformed", "no content type among the signed attributes",
         signing={"attributes": []})
    case("unsorted-attributes", "Malformed", "signed attributes that are not in the order of DER",
         on_bytes=lambda der: swap_attributes(der))
    case("wrong-content-type", "Malformed", "another content type in the attributes than outside",
         signing={}, on_signed=lambda signed: signed["encapsulated"].__setitem__("type", DATA))
    case("cms-version", "Malformed", "version 1 of SignedData", on_signed=lambda signed: signed.__setitem__("version", 1))
    case("no-recipients", "Malformed", "nobody to receive it", recipients=[])
    case("65-recipients", "Malformed", "65 recipients",
         on_enveloped=changed(envelope.AuthEnveloped, lambda data: many_recipients(data, 65)))
    case("tag-of-12", "Malformed", "an authentication tag of 12 bytes", how={"mac": 12})
    case("nonce-of-11", "Malformed", "a nonce of 11 bytes", how={"nonce": 11})
    case("compressed-point", "Malformed", "the originator's point is compressed",
         on_enveloped=changed(envelope.AuthEnveloped, compressed))
    case("no-header", "Malformed", "the header is a text", on_header=lambda der: b"HEADER")
    case("header-trailing", "Malformed", "a byte behind the header", on_header=lambda der: der + b"\x00")
    case("header-field-more", "Malformed", "a field more in the header", on_header=lambda der: lengthened(der, b"\x05\x00"))
    case("header-no-identity", "Malformed", "no identity where one should stand", header={"from": "m1"})
    case("header-for-nobody", "Malformed", "`to` is an empty list", to=())
    case("header-twice", "Malformed", "`to` names one node twice", to=("nanite-fred", "nanite-fred"))
    case("header-65", "Malformed", "`to` names 65 nodes", to=tuple(["nanite-fred"] + [f"nanite-a{n}" for n in range(64)]))
    case("header-group", "Malformed", "`to` names an unknown group", to="everybody")
    case("header-all-agents", "Malformed", "a request for all agents", to="agents")
    case("header-stored", "Malformed", "a stored request for one node", header={"class": "stored"})
    case("header-class", "Malformed", "an unknown class", header={"class": "unknown"})
    case("header-id", "Malformed", "an id of 15 bytes", header={"id": "ab" * 15})
    case("header-reply", "Malformed", "an in_reply_to of 15 bytes", header={"in_reply_to": "ab" * 15})
    case("header-codec", "Malformed", "a codec with a name in capitals", header={"codec": "JSON"})
    case("header-two-instances", "Malformed", "two instances for one node", header={"instances": [1, 2]})
    case("header-three-instances", "Malformed", "three instances for two nodes", to=("nanite-fred", "nanite-bob"),
         recipients=[fred, bob], header={"instances": [1, 2, 3]})
    case("header-unsorted-instances", "Malformed", "instances that do not ascend", to="mappers", recipients=[m1], reader=m1,
         channel="requests", header={"instances": [2, 1]})
    case("header-same-instances", "Malformed", "an instance twice", to="mappers", recipients=[m1], reader=m1,
         channel="requests", header={"instances": [1, 1]})
    case("header-65-instances", "Malformed", "65 instances", to="mappers", recipients=[m1], reader=m1, channel="requests",
         header={"instances": list(range(65))})
    case("header-agents-instance", "Malformed", "an instance of all agents", kind="advertise", to="agents",
         channel="agent-control", content=body("advertise", m1, fred), header={"instances": [1]})
    case("header-negative-instance", "Malformed", "a negative instance", header={"instances": [-1]})
    case("header-no-instances", "Malformed", "no field for the instances", on_header=lambda der: without(der, 6))
    case("header-negative", "Malformed", "a negative sequence", header={"sequence": -1})

    # 3 Unsupported.
    enveloped_data = "1.2.840.113549.1.7.3"
    case("enveloped-data", "Unsupported", "EnvelopedData, as the type says", signing={"content_type": enveloped_data})
    case("not-signed", "Unsupported", "AuthEnvelopedData without a signature",
         on_signed=lambda signed: None, on_bytes=lambda der: bare(der))
    case("sha512", "Unsupported", "SHA-512, as the SignerInfo says",
         signing={"digest_algorithm": algorithm("2.16.840.1.101.3.4.2.3")})
    case("ecdsa-sha1", "Unsupported", "ECDSA with SHA-1, as the SignerInfo says",
         signing={"signature_algorithm": algorithm("1.2.840.10045.4.1")})
    case("pkcs1", "Unsupported", "RSA with PKCS#1 v1.5, as the SignerInfo says",
         signing={"signature_algorithm": algorithm("1.2.840.113549.1.1.11", core.Null())})
    case("pss-salt-20", "Unsupported", "RSASSA-PSS with a salt of 20 bytes",
         signing={"signature_algorithm": algorithm(envelope.PSS, pss_salt(20))})
    case("cbc", "Unsupported", "AES-256-CBC, as the algorithm says", how={"cipher": "2.16.840.1.101.3.4.1.42"})
    case("aes128", "Unsupported", "AES-128-GCM, as the algorithm says", how={"cipher": "2.16.840.1.101.3.4.1.6"})
    case("icv-of-12", "Unsupported", "a tag of 12 bytes, as the algorithm says", how={"tag_length": 12})
    case("kdf-sha1", "Unsupported", "key derivation with SHA-1", how={"scheme": "1.3.133.16.840.63.0.2"})
    case("oaep-default", "Unsupported", "RSAES-OAEP with SHA-1, its default", recipients=[NODES["rsa-carl"]], to=("nanite-carl",),
         reader=NODES["rsa-carl"], how={"oaep": algorithm(envelope.OAEP, core.Sequence.load(b"\x30\x00"))})
    case("key-transport-pkcs1", "Unsupported", "RSAES-PKCS1-v1_5", recipients=[NODES["rsa-carl"]], to=("nanite-carl",),
         reader=NODES["rsa-carl"], how={"oaep": algorithm("1.2.840.113549.1.1.1", core.Null())})
    case("other-attribute", "Unsupported", "another attribute in place of the header",
         on_info=None, signing={}, on_bytes=lambda der: der.replace(oid(envelope.HEADER_OID), oid("1.3.6.1.4.1.32473.2.2")))
    case("header-version", "Unsupported", "version 3 of the header", header={"version": 3})
    case("header-kind", "Unsupported", "an unknown kind", kind="unknown")
    case("signed-only", "Unsupported", "a request that is not encrypted", encrypt=False)
    case("encrypted-advertise", "Unsupported", "an advertise that is encrypted", kind="advertise", encrypt=True,
         channel="agent-control", content=body("advertise", m1, fred))

    # 4 WrongDestination.
    case("for-bob", "WrongDestination", "for another node", to=("nanite-bob",))
    case("for-mappers", "WrongDestination", "for the mappers, given to an agent", to="mappers")
    case("other-queue", "WrongDestination", "a request in the queue of answers", channel="agent-control")
    case("live-offline", "WrongDestination", "a live request among the stored ones", to="mappers", recipients=[m2], reader=m2,
         channel="offline")

    case("stored-request", "WrongDestination", "a stored request among the live ones", to="mappers", recipients=[m2], reader=m2,
         channel="requests", header={"class": "stored"})

    other = STARTED * MICROS + 1
    case("other-process", "WrongDestination", "for another process of the reader", header={"instances": [other]})
    case("earlier-process", "WrongDestination", "for an earlier process of the reader", header={"instances": [other - 2]})
    case("other-processes", "WrongDestination", "for two nodes, and other processes of both", to=("nanite-fred", "nanite-bob"),
         recipients=[fred, bob], header={"instances": [1, other]})

    # 5 NotFresh.
    early = {"instance": STARTED * MICROS, "issued_at": (STARTED + 30) * MICROS - 1, "expires_at": (STARTED + 80) * MICROS}
    case("early", "NotFresh", "just after the reader's start, and does not name the reader's process", now=STARTED + 40,
         header=early)
    case("early-many", "NotFresh", "the same, for two nodes, and names a process of one", now=STARTED + 40,
         to=("nanite-fred", "nanite-bob"), recipients=[fred, bob], header={**early, "instances": [1]})
    case("early-mapper", "NotFresh", "the same, for the mappers, and names other processes", now=STARTED + 40, to="mappers",
         recipients=[m1], reader=m1, channel="requests", header={**early, "instances": [1, other]})
    case("early-register", "NotFresh", "a registration just after the reader's start", kind="register", now=STARTED + 40,
         sender=fred, to="mappers", recipients=[m1], reader=m1, channel="presence", content=body("register", fred, m1),
         certificates=[fred.certificate], header=early)
    case("early-answer", "NotFresh", "an answer to nothing that the reader sent, just after its start", kind="result",
         now=STARTED + 40, sender=fred, to=("mapper-m1",), recipients=[m1], reader=m1, channel="mapper-inbox",
         content=body("result", fred, m1), header={**early, "in_reply_to": "ab" * 16})
    case("future", "NotFresh", "issued 31 seconds in the future", now=T0 - 21 + 0)
    case("expired", "NotFresh", "expired a second ago", now=T0 + 71)
    case("long-lived", "NotFresh", "valid for 61 seconds", header={"expires_at": (T0 + 71) * MICROS})
    case("long-stored", "NotFresh", "stored for more than 7 days", to="mappers", recipients=[m2], reader=m2, channel="offline",
         header={"class": "stored", "expires_at": (T0 + 11 + 7 * 86_400) * MICROS})
    case("backwards", "NotFresh", "it expires before it is issued", now=T0 + 5,
         header={"expires_at": (T0 + 9) * MICROS})
    case("before-start", "NotFresh", "issued before the reader started",
         header={"instance": (STARTED - 10) * MICROS, "issued_at": (STARTED - 5) * MICROS,
                 "expires_at": (STARTED + 50) * MICROS}, now=STARTED + 20)
    case("future-start", "NotFresh", "the sender started 31 seconds after it issued the message",
         header={"instance": (T0 + 41) * MICROS})
    case("largest-instance", "NotFresh", "the largest instance", kind="ping", sender=fred, to="mappers", recipients=[m1],
         reader=m1, channel="presence", content=body("ping", fred, m1), header={"instance": 2**64 - 1})

    # 6 UnknownSigner.
    case("unknown-key", "UnknownSigner", "signed with a key of m1 that nobody knows", signer=UNKNOWN)
    case("unknown-name", "UnknownSigner", "from a node that nobody knows", header={"from": "mapper-nobody"})

    # 7 BadCertificate.
    case("other-ca", "BadCertificate", "the signer's certificate is of a CA that is not trusted", sender=STRANGER,
         content=body("request", STRANGER, fred))
    case("embedded-ca", "BadCertificate", "a registration with a CA's certificate in place of the sender's", kind="register",
         sender=fred, to="mappers", recipients=[m1], reader=m1, channel="presence", content=body("register", fred, m1),
         certificates=[CA])
    case("embedded-other", "BadCertificate", "a registration with the certificate of another node", kind="register",
         sender=fred, to="mappers", recipients=[m1], reader=m1, channel="presence", content=body("register", fred, m1),
         certificates=[bob.certificate])

    # 8 BadSignature.
    def flipped(der):
        return der[:-1] + bytes([der[-1] ^ 1])

    case("signature", "BadSignature", "one bit of the signature is flipped", on_bytes=flipped)
    case("content", "BadSignature", "one bit of what is signed is flipped", after_signing=flipped)
    case("signed-header", "BadSignature", "the header was changed after it was signed",
         on_bytes=lambda der: der.replace((T0 * MICROS + 70 * MICROS).to_bytes(7, "big"), (T0 * MICROS + 69 * MICROS).to_bytes(7, "big")))
    case("other-signer", "BadSignature", "signed by m2, with m1's key id",
         signer=m2, on_bytes=lambda der: der.replace(key_id(m2.certificate), key_id(m1.certificate)))
    case("other-suite", "BadSignature", "called a signature of RSA",
         signing={"signature_algorithm": algorithm(envelope.PSS, envelope.rsa_parameters(True, pss=True))})

    # 10 NotAuthorized.
    case("agent-to-agent", "NotAuthorized", "an agent gives work to an agent", sender=bob, content=body("request", bob, fred))
    case("agent-advertise", "NotAuthorized", "an agent asks agents to register", sender=bob, kind="advertise", to="agents",
         recipients=[], channel="agent-control", content=body("advertise", bob, fred))

    # 11 CannotOpen.
    case("not-a-recipient", "CannotOpen", "encrypted for others only", recipients=[bob])
    case("header-digest", "CannotOpen", "the digest inside is of another header",
         on_plaintext=lambda plaintext: plaintext[:32] + sha256(b"another") + plaintext[64:])
    case("recipients-digest", "CannotOpen", "the header names other recipients", header={"recipients": sha256(b"others")})
    case("commitment", "CannotOpen", "the header commits to another body", header={"commitment": sha256(b"another")})
    case("resigned", "CannotOpen", "m1's ciphertext, signed by m2 as its own", sender=m2,
         content=body("request", m2, fred), on_plaintext=lambda plaintext: plaintext[:32] + sha256(b"m1's header") + plaintext[64:])
    case("short-plaintext", "CannotOpen", "63 bytes inside", on_plaintext=lambda plaintext: plaintext[:63])
    case("tag", "CannotOpen", "one bit of the tag is flipped", on_enveloped=flipped)
    case("off-curve", "CannotOpen", "the originator's point is not on the curve",
         on_enveloped=changed(envelope.AuthEnveloped, off_curve))

    # 12 BadBody.
    case("other-sender", "BadBody", "the body says that it is from another", content=body("request", m2, fred))
    case("other-kind", "BadBody", "the body is of another kind", content=body("push", m1, fred))
    case("other-codec", "BadBody", "a codec that is not accepted", header={"codec": "marshal"})
    case("no-json", "BadBody", "the body is no JSON", content=b"{")
    case("trailing-body", "BadBody", "a second body behind the first", content=packet + packet)
    case("deep", "BadBody", "the payload is nested 65 levels deep",
         content=packet.replace(b'{"a": [1, 2.5, null, "\xc3\xbc"]}', b"[" * 65 + b"]" * 65))
    case("duplicate-key", "BadBody", "a key stands twice in the payload",
         content=packet.replace(b'{"a": [1, 2.5, null, "\xc3\xbc"]}', b'{"a": 1, "a": 2}'))
    case("registers-another", "BadBody", "an agent registers another", kind="register", sender=fred, to="mappers", recipients=[m1],
         reader=m1, channel="presence", content=body("register", bob, m1))
    case("answers-for-another", "BadBody", "an agent answers for another", kind="result", sender=fred, to=("mapper-m1",),
         recipients=[m1], reader=m1, channel="mapper-inbox", content=body("result", bob, m1))


def edges():
    """The edges of what the reader checks by itself: DER, points, lengths, numbers in signatures, parameters of RSA."""
    m1, fred, carl = NODES["m1"], NODES["fred"], NODES["rsa-carl"]

    def case(name, expect, what, *, reader=fred, **meddle):
        packet = body("request", m1, reader)
        der = message(m1, [reader], fields("request", [identity(reader.certificate)]), packet, **meddle)
        write(f"bad-{name}", what, der, reader, "agent-inbox", expect)

    # DER, in what is signed, in the header, and around both.
    for name, what, path, how in [
        ("der-padded-length", "a length in more bytes than needed, within", [2, 2], lambda der: padded_length(der)),
        ("der-indefinite-within", "an indefinite length, within", [2, 1], lambda der: indefinite(der)),
        ("der-constructed-octets", "an octet string in pieces, as BER has", [3],
         lambda der: tlv(0x24, tlv(4, contents(der)[:8]) + tlv(4, contents(der)[8:]))),
        ("der-constructed-ciphertext", "a ciphertext in pieces, as BER has", [2, 2], lambda der: tlv(0xa0, tlv(4, contents(der)))),
        ("der-long-tag", "a tag in its long form", [3], lambda der: b"\x1f\x04" + der[1:]),
        ("der-padded-integer", "an integer with a zero in front", [0], lambda der: b"\x02\x02\x00\x00"),
        ("der-negative-version", "a negative version", [0], lambda der: b"\x02\x01\xff"),
        ("der-empty-integer", "an integer without a byte", [0], lambda der: b"\x02\x00"),
        ("der-padded-tag-length", "the length of the tag with a zero in front", [2, 1, 1, 1], lambda der: b"\x02\x02\x00\x10"),
        ("der-default-tag-length", "the length of the tag as twelve, which is its default", [2, 1, 1, 1], lambda der: b"\x02\x01\x0c"),
        ("der-trailing-within", "a byte behind the last field", [], lambda der: tlv(0x30, contents(der) + b"\x00")),
        ("der-field-more", "a field more behind the last one", [], lambda der: tlv(0x30, contents(der) + b"\x05\x00")),
        ("der-unused-bits", "a point with an unused bit", [1, 0, 1, 0, 1], lambda der: tlv(3, b"\x01" + contents(der)[1:-1] + b"\x00")),
        ("der-empty-bits", "a point without a byte", [1, 0, 1, 0, 1], lambda der: b"\x03\x00"),
    ]:
        expect = "Unsupported" if name == "der-default-tag-length" else "Malformed"
        case(name, expect, what, on_enveloped=at(path, how))
    case("der-header-padded-length", "Malformed", "the header's length in more bytes than needed", on_header=padded_length)
    case("der-header-indefinite", "Malformed", "a header of indefinite length", on_header=indefinite)
    case("der-header-padded-integer", "Malformed", "a sequence with a zero in front",
         on_header=at([4], lambda der: tlv(2, b"\x00" + contents(der))))
    case("der-header-huge-integer", "Malformed", "a sequence of nine bytes",
         on_header=at([4], lambda der: tlv(2, b"\x01" + bytes(8))))
    case("der-header-not-utf8", "Malformed", "a sender that is no UTF-8",
         on_header=at([2], lambda der: tlv(0x0c, contents(der)[:-1] + b"\xff")))
    case("der-unsorted-recipients", "Malformed", "recipients that are not in the order of DER",
         on_enveloped=lambda der: unsorted(der))
    case("der-signature-in-pieces", "Malformed", "a signature in pieces, as BER has",
         on_bytes=at([1, 0, 3, 0, 5], lambda der: tlv(0x24, der)))
    case("der-signature-long-tag", "Malformed", "a signature with its tag in the long form",
         on_bytes=at([1, 0, 3, 0, 5], lambda der: b"\x1f" + der))

    # Points.
    p = 2**256 - 2**224 + 2**192 + 2**96 - 1
    b = 0x5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b
    root = pow(b, (p + 1) // 4, p)
    other_curve = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    for name, expect, what, point in [
        ("point-infinity", "Malformed", "the point at infinity", lambda point: b"\x00"),
        ("point-hybrid", "Malformed", "a point in the hybrid form", lambda point: bytes([6 + point[64] % 2]) + point[1:]),
        ("point-short", "Malformed", "a point without its last byte", lambda point: point[:-1]),
        ("point-long", "Malformed", "a point and a byte more", lambda point: point + b"\x00"),
        ("point-p384", "Malformed", "a point of P-384", lambda point: other_curve),
        ("point-p384-cut", "CannotOpen", "a point of P-384, cut to the length of one of P-256",
         lambda point: b"\x04" + other_curve[1:33] + other_curve[49:81]),
        ("point-zero", "CannotOpen", "a point with both coordinates zero", lambda point: b"\x04" + bytes(64)),
        ("point-unreduced", "CannotOpen", "a point of the curve whose coordinate is not below the prime",
         lambda point: b"\x04" + p.to_bytes(32, "big") + root.to_bytes(32, "big")),
    ]:
        change_point = at([1, 0, 1, 0, 1], lambda der, point=point: tlv(3, b"\x00" + point(contents(der)[1:])))
        case(name, expect, what, on_enveloped=change_point)

    # Lengths, and the value that key wrap checks.
    for length in (0, 8, 13, 16):
        case(f"nonce-of-{length}", "Malformed", f"a nonce of {length} bytes",
             on_enveloped=at([2, 1, 1, 0], lambda der, length=length: tlv(4, os.urandom(length))))
    for length in (0, 15, 17):
        case(f"tag-of-{length}", "Malformed", f"an authentication tag of {length} bytes",
             on_enveloped=at([3], lambda der, length=length: tlv(4, (contents(der) + b"\x00")[:length])))
    for length in (13, 14, 15, 17):
        case(f"icv-of-{length}", "Unsupported", f"a tag of {length} bytes, as the algorithm says", how={"tag_length": length})
    wrapped = [1, 0, 4, 0, 1]
    for length in (0, 24, 32, 39, 48):
        case(f"wrapped-{length}", "Malformed", f"a wrapped key of {length} bytes",
             on_enveloped=at(wrapped, lambda der, length=length: tlv(4, (contents(der) + bytes(8))[:length])))
    case("wrapped-zero", "CannotOpen", "a wrapped key of zeros", on_enveloped=at(wrapped, lambda der: tlv(4, bytes(40))))
    case("wrapped-first", "CannotOpen", "a bit of the first block of the wrapped key is flipped",
         on_enveloped=at(wrapped, lambda der: tlv(4, bytes([contents(der)[0] ^ 1]) + contents(der)[1:])))
    case("wrapped-last", "CannotOpen", "a bit of the last block of the wrapped key is flipped",
         on_enveloped=at(wrapped, lambda der: tlv(4, contents(der)[:-1] + bytes([contents(der)[-1] ^ 1]))))

    # Numbers in signatures.
    n = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551
    for name, what, how in [
        ("r-zero", "r is zero", lambda r, s: pair(0, s)),
        ("s-zero", "s is zero", lambda r, s: pair(r, 0)),
        ("both-zero", "r and s are zero", lambda r, s: pair(0, 0)),
        ("r-order", "r is the order of the curve", lambda r, s: pair(n, s)),
        ("s-order", "s is the order of the curve", lambda r, s: pair(r, n)),
        ("r-unreduced", "the order of the curve is added to r", lambda r, s: pair(r + n, s)),
        ("s-unreduced", "the order of the curve is added to s", lambda r, s: pair(r, s + n)),
        ("r-negative", "r is negative", lambda r, s: pair(-r, s)),
        ("s-negative", "s is negative", lambda r, s: pair(r, -s)),
        ("exchanged", "r and s are exchanged", lambda r, s: pair(s, r)),
        ("padded-number", "r with a zero in front, as BER allows", lambda r, s: tlv(
            0x30, tlv(2, b"\x00" + contents(core.Integer(r).dump())) + core.Integer(s).dump())),
        ("padded-length", "a length in more bytes than needed", lambda r, s: padded_length(pair(r, s))),
        ("indefinite", "an indefinite length", lambda r, s: indefinite(pair(r, s))),
        ("trailing", "a byte behind the numbers", lambda r, s: pair(r, s) + b"\x00"),
        ("third", "a third number", lambda r, s: tlv(0x30, contents(pair(r, s)) + b"\x02\x01\x00")),
        ("raw", "both numbers without any structure", lambda r, s: r.to_bytes(32, "big") + s.to_bytes(32, "big")),
        ("empty", "no byte at all", lambda r, s: b""),
    ]:
        case(f"ecdsa-{name}", "BadSignature", f"ECDSA: {what}",
             on_bytes=at([1, 0, 3, 0, 5], lambda der, how=how: tlv(4, how(*numbers(contents(der))))))

    # RSA: parameters, and what is not what they say.
    for name, what, parameters in [
        ("pss-salt-64", "a salt of 64 bytes", {"salt_length": 64}),
        ("pss-mgf-sha1", "MGF1 with SHA-1", {"mgf": algorithm(envelope.MGF1, algorithm("1.3.14.3.2.26"))}),
        ("pss-sha512", "SHA-512", {"hash": algorithm("2.16.840.1.101.3.4.2.3")}),
        ("pss-other-mgf", "another function than MGF1", {"mgf": algorithm(envelope.SHA256)}),
    ]:
        case(name, "Unsupported", f"RSASSA-PSS: {what}",
             signing={"signature_algorithm": algorithm(envelope.PSS, rsa_with(True, parameters))})
    case("pss-default", "Unsupported", "RSASSA-PSS with its default parameters",
         signing={"signature_algorithm": algorithm(envelope.PSS, core.Sequence.load(b"\x30\x00"))})
    for name, what, parameters in [
        ("oaep-mgf-sha1", "MGF1 with SHA-1", {"mgf": algorithm(envelope.MGF1, algorithm("1.3.14.3.2.26"))}),
        ("oaep-sha512", "SHA-512", {"hash": algorithm("2.16.840.1.101.3.4.2.3")}),
    ]:
        case(name, "Unsupported", f"RSAES-OAEP: {what}", reader=carl,
             how={"oaep": algorithm(envelope.OAEP, rsa_with(False, parameters))})
    public, key = carl.certificate.public_key(), os.urandom(32)
    oaep = envelope.OAEP_PADDING
    other_hash = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
    labelled = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"label")
    for name, what, how in [
        ("flipped", "a bit is flipped", lambda old: old[:-1] + bytes([old[-1] ^ 1])),
        ("short", "a byte is missing", lambda old: old[1:]),
        ("long", "a zero stands in front", lambda old: b"\x00" + old),
        ("empty", "no byte at all", lambda old: b""),
        ("not-reduced", "a number that is not below the modulus", lambda old: b"\xff" * 256),
        ("zero", "zero", lambda old: bytes(256)),
        ("other-hash", "with SHA-1, and called SHA-256", lambda old: public.encrypt(key, other_hash)),
        ("label", "with a label", lambda old: public.encrypt(key, labelled)),
        ("pkcs1", "RSAES-PKCS1-v1_5, and called OAEP", lambda old: public.encrypt(key, padding.PKCS1v15())),
        ("short-key", "a content key of 16 bytes", lambda old: public.encrypt(key[:16], oaep)),
        ("other-key", "another content key", lambda old: public.encrypt(key, oaep)),
    ]:
        case(f"transport-{name}", "CannotOpen", f"RSAES-OAEP: {what}", reader=carl,
             on_enveloped=at([1, 0, 3], lambda der, how=how: tlv(4, how(contents(der)))))


# Meddling that takes more than a line.


def split(der):
    """The length of the identifier and length octets of a value, and that of the value."""
    if der[1] < 0x80:
        return 2, der[1]
    count = der[1] & 0x7f
    return 2 + count, int.from_bytes(der[2:2 + count], "big")


def contents(der):
    start, length = split(der)
    return der[start:start + length]


def tlv(tag, content):
    if len(content) < 0x80:
        return bytes([tag, len(content)]) + content
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def pieces(content):
    while content:
        start, length = split(content)
        yield content[:start + length]
        content = content[start + length:]


def at(path, how):
    """Replaces the value at this place; the lengths around it stay right."""
    def edit(der):
        if not path:
            return how(der)
        inside = list(pieces(contents(der)))
        inside[path[0]] = at(path[1:], how)(inside[path[0]])
        return tlv(der[0], b"".join(inside))
    return edit


def indefinite(der):
    return bytes([der[0], 0x80]) + contents(der) + b"\x00\x00"


def padded_length(der):
    content = contents(der)
    return bytes([der[0], 0x84]) + len(content).to_bytes(4, "big") + content


def unsorted(der):
    one = next(pieces(contents(list(pieces(contents(der)))[1])))
    own = contents(list(pieces(contents(one)))[-1])
    other = one.replace(contents(list(pieces(contents(own)))[0]), bytes(24))
    assert other != one
    return at([1], lambda _: tlv(0x31, b"".join(sorted([one, other], reverse=True))))(der)


def numbers(signature):
    return [core.Integer.load(number).native for number in pieces(contents(signature))]


def pair(r, s):
    return tlv(0x30, core.Integer(r).dump() + core.Integer(s).dump())


def rsa_with(pss, changes):
    parameters = envelope.rsa_parameters(True, pss=pss)
    for name, value in changes.items():
        parameters[name] = value
    return parameters


def unsigned(info):
    attribute = envelope.Attribute({"type": "1.2.840.113549.1.9.5", "values": [core.Null()]})
    info["unsigned"] = envelope.Attributes([attribute])
    return info


def oid(text):
    return core.ObjectIdentifier(text).dump()


def lengthened(der, more):
    contents = core.Sequence.load(der).contents + more
    return b"\x30\x82" + len(contents).to_bytes(2, "big") + contents


def without(der, index):
    fields = list(pieces(contents(der)))
    return tlv(der[0], b"".join(fields[:index] + fields[index + 1:]))


def swap_attributes(der):
    info = envelope.ContentInfo.load(der)["content"]["signers"][0]
    first, second = in_order(info["attributes"])[:2]
    return swapped(first, second)(der)


def many_recipients(data, count):
    one = data["recipients"][0].dump()
    wrapped = data["recipients"][0].chosen["keys"][0]["key"].native
    copies = [one.replace(wrapped, bytes([number]) + wrapped[1:]) for number in range(count)]
    data["recipients"] = [envelope.RecipientInfo.load(copy) for copy in sorted(copies)]


def with_point(data, point):
    agreement = data["recipients"][0].chosen
    agreement["originator"].chosen["key"] = tuple(envelope.bits(point))
    data["recipients"] = [envelope.RecipientInfo("agreement", agreement)]


def compressed(data):
    point = envelope.unbits(data["recipients"][0].chosen["originator"].chosen["key"])
    with_point(data, bytes([2 + point[64] % 2]) + point[1:33])


def off_curve(data):
    point = envelope.unbits(data["recipients"][0].chosen["originator"].chosen["key"])
    with_point(data, point[:64] + bytes([point[64] ^ 1]))


def pss_salt(length):
    parameters = envelope.rsa_parameters(True, pss=True)
    parameters["salt_length"] = length
    return parameters


def bare(der):
    content = envelope.ContentInfo.load(der)["content"]["encapsulated"]["content"].native
    inner = oid(AUTH_ENVELOPED) + b"\xa0\x82" + len(content).to_bytes(2, "big") + content
    return b"\x30\x82" + len(inner).to_bytes(2, "big") + inner


def main():
    for part in ("messages", "pki"):
        (OUT / part).mkdir(parents=True, exist_ok=True)
        for old in (OUT / part).iterdir():
            old.unlink()
    pem = serialization.Encoding.PEM
    (OUT / "pki" / "ca.pem").write_bytes(CA.public_bytes(pem))
    for node in [*NODES.values(), STRANGER]:
        (OUT / "pki" / f"{node.file}.pem").write_bytes(node.certificate.public_bytes(pem))
        key = node.key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (OUT / "pki" / f"{node.file}-key.pem").write_bytes(key)
    good()
    bad()
    edges()
    index = {"started_at": STARTED, "messages": INDEX}
    (OUT / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(INDEX)} messages")


if __name__ == "__main__":
    main()
