"""The secure envelope, read and written without any code of nanite's: the structures by asn1crypto, the primitives by cryptography.

It follows docs/wire-format.md. `read` checks everything that can be checked without a clock, a store and a memory; `Writer` can be told
to do one thing wrong at a time.

    envelope.py read  SIGNER.pem RECIPIENT.pem RECIPIENT-key.pem < message.der     prints JSON
    envelope.py write SIGNER.pem SIGNER-key.pem RECIPIENT.pem... < spec.json       prints DER
"""

import hashlib
import json
import os
import sys

from asn1crypto import core
from asn1crypto import x509 as asn1_x509
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF

HEADER_OID = "1.3.6.1.4.1.32473.2.1"
AUTH_ENVELOPED = "1.2.840.113549.1.9.16.1.23"
DATA = "1.2.840.113549.1.7.1"
SHA256 = "2.16.840.1.101.3.4.2.1"
ECDH_SHA256 = "1.3.132.1.11.1"
AES256_WRAP = "2.16.840.1.101.3.4.1.45"
AES256_GCM = "2.16.840.1.101.3.4.1.46"
ECDSA_SHA256 = "1.2.840.10045.4.3.2"
PSS = "1.2.840.113549.1.1.10"
OAEP = "1.2.840.113549.1.1.7"
MGF1 = "1.2.840.113549.1.1.8"
EC_KEY = "1.2.840.10045.2.1"


class Refused(Exception):
    """What was read is not a message of the format."""


# The header.


class Identities(core.SequenceOf):
    _child_spec = core.UTF8String


class To(core.Choice):
    _alternatives = [("identities", Identities, {"implicit": 0}), ("group", core.UTF8String, {"implicit": 1})]


class Instances(core.SequenceOf):
    _child_spec = core.Integer


class InReplyTo(core.Choice):
    _alternatives = [("none", core.Null), ("id", core.OctetString)]


class Kind(core.Enumerated):
    _map = {
        1: "register", 2: "unregister", 3: "ping", 4: "advertise", 5: "request", 6: "push", 7: "result",
        8: "intermediate", 9: "file-start", 10: "file-chunk", 11: "file-end", 99: "unknown",
    }


class Class(core.Enumerated):
    _map = {0: "live", 1: "stored", 2: "unknown"}


class Header(core.Sequence):
    _fields = [
        ("version", core.Integer),
        ("kind", Kind),
        ("from", core.UTF8String),
        ("instance", core.Integer),
        ("sequence", core.Integer),
        ("to", To),
        ("instances", Instances),
        ("id", core.OctetString),
        ("issued_at", core.Integer),
        ("expires_at", core.Integer),
        ("class", Class),
        ("in_reply_to", InReplyTo),
        ("codec", core.UTF8String),
        ("recipients", core.OctetString),
        ("commitment", core.OctetString),
    ]


# What asn1crypto lacks, and what it would write in another way: algorithms without parameters.


class Algorithm(core.Sequence):
    _fields = [("algorithm", core.ObjectIdentifier), ("parameters", core.Any, {"optional": True})]


class GcmParameters(core.Sequence):
    _fields = [("nonce", core.OctetString), ("tag_length", core.Integer, {"default": 12})]


class OaepParameters(core.Sequence):
    _fields = [("hash", Algorithm, {"explicit": 0}), ("mgf", Algorithm, {"explicit": 1})]


class PssParameters(core.Sequence):
    _fields = OaepParameters._fields + [("salt_length", core.Integer, {"explicit": 2})]


class SharedInfo(core.Sequence):
    _fields = [
        ("key_info", Algorithm),
        ("ukm", core.OctetString, {"explicit": 0, "optional": True}),
        ("length", core.OctetString, {"explicit": 2}),
    ]


class PublicKey(core.Sequence):
    _fields = [("algorithm", Algorithm), ("key", core.BitString)]


class Originator(core.Choice):
    _alternatives = [("key", PublicKey, {"implicit": 1})]


class KeyId(core.Sequence):
    _fields = [("key_id", core.OctetString)]


class Rid(core.Choice):
    _alternatives = [("key_id", KeyId, {"implicit": 0})]


class WrappedKey(core.Sequence):
    _fields = [("rid", Rid), ("key", core.OctetString)]


class WrappedKeys(core.SequenceOf):
    _child_spec = WrappedKey


class Agreement(core.Sequence):
    _fields = [
        ("version", core.Integer),
        ("originator", Originator, {"explicit": 0}),
        ("ukm", core.OctetString, {"explicit": 1, "optional": True}),
        ("algorithm", Algorithm),
        ("keys", WrappedKeys),
    ]


class Sid(core.Choice):
    _alternatives = [("key_id", core.OctetString, {"implicit": 0})]


class Transport(core.Sequence):
    _fields = [("version", core.Integer), ("rid", Sid), ("algorithm", Algorithm), ("key", core.OctetString)]


class RecipientInfo(core.Choice):
    _alternatives = [("transport", Transport), ("agreement", Agreement, {"implicit": 1})]


class RecipientInfos(core.SetOf):
    _child_spec = RecipientInfo


class Encrypted(core.Sequence):
    _fields = [("type", core.ObjectIdentifier), ("algorithm", Algorithm), ("content", core.OctetString, {"implicit": 0})]


class AuthEnveloped(core.Sequence):
    _fields = [
        ("version", core.Integer),
        ("recipients", RecipientInfos),
        ("encrypted", Encrypted),
        ("mac", core.OctetString),
    ]


class Values(core.SetOf):
    _child_spec = core.Any


class Attribute(core.Sequence):
    _fields = [("type", core.ObjectIdentifier), ("values", Values)]


class Attributes(core.SetOf):
    _child_spec = Attribute


class Algorithms(core.SetOf):
    _child_spec = Algorithm


class Encapsulated(core.Sequence):
    _fields = [("type", core.ObjectIdentifier), ("content", core.OctetString, {"explicit": 0})]


class Certificates(core.SetOf):
    _child_spec = asn1_x509.Certificate


class SignerInfo(core.Sequence):
    _fields = [
        ("version", core.Integer),
        ("sid", Sid),
        ("digest", Algorithm),
        ("attributes", Attributes, {"implicit": 0}),
        ("algorithm", Algorithm),
        ("signature", core.OctetString),
        ("unsigned", Attributes, {"implicit": 1, "optional": True}),
    ]


class SignerInfos(core.SetOf):
    _child_spec = SignerInfo


class SignedData(core.Sequence):
    _fields = [
        ("version", core.Integer),
        ("digests", Algorithms),
        ("encapsulated", Encapsulated),
        ("certificates", Certificates, {"implicit": 0, "optional": True}),
        ("signers", SignerInfos),
    ]


class ContentInfo(core.Sequence):
    _fields = [("type", core.ObjectIdentifier), ("content", SignedData, {"explicit": 0})]


def algorithm(oid, parameters=None):
    return Algorithm({"algorithm": oid} if parameters is None else {"algorithm": oid, "parameters": parameters})


def rsa_parameters(null, pss):
    sha = algorithm(SHA256, core.Null() if null else None)
    fields = {"hash": sha, "mgf": algorithm(MGF1, sha)}
    return PssParameters({**fields, "salt_length": 32}) if pss else OaepParameters(fields)


WRAP = algorithm(AES256_WRAP)


def key_id(certificate):
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def identity(certificate):
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    [uri] = names.get_values_for_type(x509.UniformResourceIdentifier)
    role, name = uri.split("/")[3:]
    return {"agent": "nanite-", "mapper": "mapper-"}[role] + name


def sha256(data):
    return hashlib.sha256(data).digest()


def recipients_digest(key_ids):
    return sha256(b"".join(bytes([len(one)]) + one for one in sorted(key_ids)))


def commitment(salt, body):
    return sha256(b"nanite/2 commitment" + salt + body)


def kek(shared, ukm):
    info = {"key_info": WRAP, "length": (256).to_bytes(4, "big")}
    if ukm is not None:
        info["ukm"] = ukm
    return X963KDF(hashes.SHA256(), 32, SharedInfo(info).dump()).derive(shared)


OAEP_PADDING = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
PSS_PADDING = padding.PSS(padding.MGF1(hashes.SHA256()), 32)


class Writer:
    """Writes messages. Whatever is given beside the plain arguments replaces what would be right."""

    def __init__(self, certificate, key):
        self.certificate, self.key = certificate, key

    def header(self, recipients, salt, body, fields):
        to = fields["to"]
        to = To("group", core.UTF8String(to)) if isinstance(to, str) else To("identities", Identities(to))
        reply = fields.get("in_reply_to")
        reply = InReplyTo("none", core.Null()) if reply is None else InReplyTo("id", core.OctetString(bytes.fromhex(reply)))
        return Header({
            "version": fields.get("version", 2),
            "kind": fields["kind"],
            "from": fields.get("from", identity(self.certificate)),
            "instance": fields["instance"],
            "sequence": fields["sequence"],
            "to": to,
            "instances": fields.get("instances", []),
            "id": bytes.fromhex(fields["id"]) if "id" in fields else os.urandom(16),
            "issued_at": fields["issued_at"],
            "expires_at": fields["expires_at"],
            "class": fields.get("class", "live"),
            "in_reply_to": reply,
            "codec": fields.get("codec", "json"),
            "recipients": fields.get("recipients", recipients_digest([key_id(one) for one in recipients])),
            "commitment": fields.get("commitment", commitment(salt, body)),
        }).dump()

    def recipient(self, certificate, cek, ukm, null=False, scheme=ECDH_SHA256, oaep=None):
        public = certificate.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            return RecipientInfo("transport", Transport({
                "version": 2,
                "rid": Sid("key_id", core.OctetString(key_id(certificate))),
                "algorithm": oaep or algorithm(OAEP, rsa_parameters(null, pss=False)),
                "key": public.encrypt(cek, OAEP_PADDING),
            }))
        ephemeral = ec.generate_private_key(ec.SECP256R1())
        wrapped = keywrap.aes_key_wrap(kek(ephemeral.exchange(ec.ECDH(), public), ukm), cek)
        point = ephemeral.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        fields = {
            "version": 3,
            "originator": Originator("key", PublicKey({"algorithm": algorithm(EC_KEY), "key": tuple(bits(point))})),
            "algorithm": algorithm(scheme, WRAP),
            "keys": [{"rid": Rid("key_id", KeyId({"key_id": key_id(certificate)})), "key": wrapped}],
        }
        if ukm is not None:
            fields["ukm"] = ukm
        return RecipientInfo("agreement", Agreement(fields))

    def enveloped(self, plaintext, recipients, ukm=True, null=False, cipher=AES256_GCM, tag_length=16, mac=16,
                  scheme=ECDH_SHA256, oaep=None, nonce=12):
        cek, nonce = os.urandom(32), os.urandom(nonce)
        ukm = os.urandom(32) if ukm is True else ukm
        infos = [self.recipient(one, cek, ukm, null, scheme, oaep) for one in recipients]
        sealed = AESGCM(cek).encrypt(nonce, plaintext, None)
        return AuthEnveloped({
            "version": 0,
            "recipients": sorted(infos, key=lambda info: info.dump()),
            "encrypted": {
                "type": DATA,
                "algorithm": algorithm(cipher, GcmParameters({"nonce": nonce, "tag_length": tag_length})),
                "content": sealed[:-16],
            },
            "mac": sealed[-16:][:mac],
        }).dump()

    def sign(self, data):
        if isinstance(self.key, rsa.RSAPrivateKey):
            return self.key.sign(data, PSS_PADDING, hashes.SHA256())
        return self.key.sign(data, ec.ECDSA(hashes.SHA256()))

    def signature_algorithm(self, null=True):
        if isinstance(self.key, rsa.RSAPrivateKey):
            return algorithm(PSS, rsa_parameters(null, pss=True))
        return algorithm(ECDSA_SHA256)

    def signer_info(self, content_type, content, header, null=False, extra=(), unsigned=None, signature_algorithm=None,
                    digest_algorithm=None, attributes=None):
        null = core.Null() if null else None
        pairs = [
            (core.ObjectIdentifier("1.2.840.113549.1.9.3"), core.ObjectIdentifier(content_type)),
            (core.ObjectIdentifier("1.2.840.113549.1.9.4"), core.OctetString(sha256(content))),
            (core.ObjectIdentifier(HEADER_OID), core.OctetString(header)),
        ] if attributes is None else attributes
        signed = [Attribute({"type": name, "values": [value]}) for name, value in [*pairs, *extra]]
        signed = Attributes(sorted(signed, key=lambda one: one.dump()))
        fields = {
            "version": 3,
            "sid": Sid("key_id", core.OctetString(key_id(self.certificate))),
            "digest": digest_algorithm or algorithm(SHA256, null),
            "attributes": signed,
            "algorithm": signature_algorithm or self.signature_algorithm(),
            "signature": self.sign(signed.dump()),
        }
        if unsigned is not None:
            fields["unsigned"] = unsigned
        return SignerInfo(fields)

    def signed(self, content_type, content, infos, certificates=(), null=False):
        fields = {
            "version": 3,
            "digests": [algorithm(SHA256, core.Null() if null else None)],
            "encapsulated": {"type": content_type, "content": content},
            "signers": sorted(infos, key=lambda info: info.dump()),
        }
        if certificates:
            ders = sorted(one.public_bytes(serialization.Encoding.DER) for one in certificates)
            fields["certificates"] = [asn1_x509.Certificate.load(der) for der in ders]
        return ContentInfo({"type": "1.2.840.113549.1.7.2", "content": SignedData(fields)}).dump()

    def message(self, fields, body, recipients, certificates=(), encrypt=True, null=False, salt=None, header_digest=None,
                how={}, signing={}):
        salt = salt or os.urandom(32)
        header = self.header(recipients if encrypt else [], salt, body, fields)
        content = salt + (header_digest or sha256(header)) + body
        if encrypt:
            content = self.enveloped(content, recipients, null=null, **how)
        content_type = AUTH_ENVELOPED if encrypt else DATA
        info = self.signer_info(content_type, content, header, null=null, **signing)
        return self.signed(content_type, content, [info], certificates, null)


def bits(data):
    return [int(bit) for byte in data for bit in f"{byte:08b}"]


def unbits(value):
    text = "".join(str(bit) for bit in value.native)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def need(condition, what):
    if not condition:
        raise Refused(what)


def strict(spec, data):
    """Reads a structure; what it would write again must be what was read."""
    value = spec.load(data, strict=True)
    need(value.dump(force=True) == data, f"{spec.__name__} is not DER")
    return value


def one_of(algorithm_, *accepted):
    need(any(algorithm_.dump() == one.dump() for one in accepted), "another algorithm")


def read(message, signer, certificate, key):
    """Verifies and opens a message; gives the header and the body."""
    info = strict(ContentInfo, message)
    need(info["type"].dotted == "1.2.840.113549.1.7.2", "not SignedData")
    signed = info["content"]
    need(signed["version"].native == 3 and len(signed["digests"]) == 1 and len(signed["signers"]) == 1, "counts")
    shas = algorithm(SHA256), algorithm(SHA256, core.Null())
    one_of(signed["digests"][0], *shas)
    signer_info = signed["signers"][0]
    need(signer_info["version"].native == 3 and signer_info["unsigned"].native is None, "unsigned attributes")
    need(signer_info["sid"].chosen.native == key_id(signer), "another signer")
    one_of(signer_info["digest"], *shas)

    content_type = signed["encapsulated"]["type"].dotted
    content = signed["encapsulated"]["content"].native
    attributes = signer_info["attributes"]
    values = {one["type"].dotted: one["values"][0].parse() for one in attributes}
    need(len(attributes) == 3 and len(values) == 3, "other attributes")
    need(values["1.2.840.113549.1.9.3"].dotted == content_type, "content type")
    need(values["1.2.840.113549.1.9.4"].native == sha256(content), "digest")
    public, signature = signer.public_key(), signer_info["signature"].native
    data = attributes.untag().dump()
    try:
        if isinstance(public, rsa.RSAPublicKey):
            one_of(signer_info["algorithm"], *(algorithm(PSS, rsa_parameters(null, pss=True)) for null in (True, False)))
            public.verify(signature, data, PSS_PADDING, hashes.SHA256())
        else:
            one_of(signer_info["algorithm"], algorithm(ECDSA_SHA256))
            public.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise Refused("signature")

    header_der = values[HEADER_OID].native
    header = strict(Header, header_der)
    need(header["version"].native == 2 and header["from"].native == identity(signer), "header")
    instances, to = header["instances"].native, header["to"]
    most = {"mappers": 64, "agents": 0}[to.chosen.native] if to.name == "group" else len(to.chosen)
    need(instances == sorted(set(instances)) and len(instances) <= most, "instances")
    need(header["instance"].native <= header["issued_at"].native + 30_000_000, "instance")
    if content_type == DATA:
        plaintext, key_ids = content, []
    else:
        need(content_type == AUTH_ENVELOPED, "content type")
        plaintext, key_ids = decrypt(content, certificate, key)
    salt, digest, body = plaintext[:32], plaintext[32:64], plaintext[64:]
    need(digest == sha256(header_der), "the header's digest")
    need(header["recipients"].native == recipients_digest(key_ids), "recipients")
    need(header["commitment"].native == commitment(salt, body), "commitment")
    return header, body


def decrypt(content, certificate, key):
    enveloped = strict(AuthEnveloped, content)
    key_ids, cek = [], None
    for info in enveloped["recipients"]:
        if info.name == "transport":
            transport = info.chosen
            found = transport["rid"].chosen.native
            one_of(transport["algorithm"], *(algorithm(OAEP, rsa_parameters(null, pss=False)) for null in (True, False)))
            if found == key_id(certificate):
                cek = key.decrypt(transport["key"].native, OAEP_PADDING)
        else:
            agreement = info.chosen
            need(len(agreement["keys"]) == 1, "more than one key")
            found = agreement["keys"][0]["rid"].chosen["key_id"].native
            one_of(agreement["algorithm"], algorithm(ECDH_SHA256, WRAP))
            if found == key_id(certificate):
                point = unbits(agreement["originator"].chosen["key"])
                shared = key.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point))
                cek = keywrap.aes_key_unwrap(kek(shared, agreement["ukm"].native), agreement["keys"][0]["key"].native)
        key_ids.append(found)
    need(cek is not None, "not for this key")
    encrypted = enveloped["encrypted"]
    need(encrypted["type"].dotted == DATA and encrypted["algorithm"]["algorithm"].dotted == AES256_GCM, "cipher")
    parameters = encrypted["algorithm"]["parameters"].parse(GcmParameters)
    need(parameters["tag_length"].native == 16, "tag length")
    nonce, mac = parameters["nonce"].native, enveloped["mac"].native
    need(len(nonce) == 12 and len(mac) == 16, "lengths")
    return AESGCM(cek).decrypt(nonce, encrypted["content"].native + mac, None), key_ids


def load_certificate(path):
    with open(path, "rb") as file:
        return x509.load_pem_x509_certificate(file.read())


def load_key(path):
    with open(path, "rb") as file:
        return serialization.load_pem_private_key(file.read(), None)


def header_json(header):
    native = {name: header[name].native for name in ("version", "kind", "from", "instance", "sequence", "issued_at",
                                                     "expires_at", "class", "codec")}
    native["to"] = header["to"].chosen.native
    native["instances"] = header["instances"].native
    native["id"] = header["id"].native.hex()
    native["in_reply_to"] = None if header["in_reply_to"].name == "none" else header["in_reply_to"].chosen.native.hex()
    return native


def main(arguments):
    if arguments[0] == "read":
        signer, certificate, key = arguments[1:]
        header, body = read(sys.stdin.buffer.read(), load_certificate(signer), load_certificate(certificate), load_key(key))
        print(json.dumps({"header": header_json(header), "body": body.decode()}))
    elif arguments[0] == "write":
        signer, key, *recipients = arguments[1:]
        spec = json.load(sys.stdin)
        writer = Writer(load_certificate(signer), load_key(key))
        options = spec.get("options", {})
        if options.pop("certificates", False):
            options["certificates"] = [writer.certificate]
        recipients = [load_certificate(one) for one in recipients]
        sys.stdout.buffer.write(writer.message(spec["header"], spec["body"].encode(), recipients, **options))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
