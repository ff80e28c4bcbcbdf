//! Generates `fuzz/pki` and `fuzz/seeds`: CAs with fixed times, and valid inputs for every target without vectors. Files that fuzzing has
//! found (`found-*`) stay. The inputs in `fuzz/corpus` belong to the previous keys: delete them.
//!
//!     cargo run --manifest-path fuzz/Cargo.toml --example seeds

#[path = "../../tests/suite/harness/forge.rs"]
#[allow(dead_code)]
mod forge;

/// What `forge.rs` needs of the test harness.
mod pki {
    /// The start time of the readers.
    pub use nanite_fuzz::targets::world::START as T0;
}

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forge::{Forge, Forged};
use nanite::security::fuzzing::header_der;
use nanite::security::inspect;
use nanite::serializer::{Codec, Json, MsgPack, Yaml};
use nanite_fuzz::targets::world::{NOW, START, root, world};
use openssl::nid::Nid;
use openssl::x509::X509;

const DAY: Duration = Duration::from_secs(86_400);

fn main() {
    let ca = Forge::ca("fuzz root").self_signed();
    let usage = (Nid::BASIC_CONSTRAINTS, "critical,CA:TRUE,pathlen:0");
    let below = Forge::ca("fuzz intermediate").set(usage.0, usage.1).signed_by(&ca);
    certificates(&ca, &below);
    lists(&ca);
    bodies();
    headers();
    messages();
    policies();
    steps();
}

fn folder(name: &str) -> PathBuf {
    let folder = root().join("fuzz").join(name);
    fs::create_dir_all(&folder).unwrap();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if !path.file_name().unwrap().to_str().unwrap().starts_with("found-") {
            fs::remove_file(path).unwrap();
        }
    }
    folder
}

fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) {
    fs::write(folder.join(name), content).unwrap();
}

fn certificates(ca: &Forged, below: &Forged) {
    let names = |uri: &str| format!("URI:{uri}");
    let leaf = Forge::leaf;
    let issued: Vec<(&str, Forged)> = vec![
        ("leaf", leaf().signed_by(ca)),
        ("below", leaf().signed_by(below)),
        (
            "rsa",
            leaf().key(forge::rsa(2048)).set(Nid::KEY_USAGE, "critical,digitalSignature,keyEncipherment").signed_by(ca),
        ),
        ("mapper", leaf().set(Nid::SUBJECT_ALT_NAME, &names("spiffe://example.org/mapper/m1")).signed_by(below)),
        (
            "names",
            leaf()
                .set(
                    Nid::SUBJECT_ALT_NAME,
                    "URI:spiffe://example.org/agent/fred,DNS:fred.example.org,IP:127.0.0.1,email:a@example.org",
                )
                .signed_by(ca),
        ),
        ("purposes", leaf().set(Nid::EXT_KEY_USAGE, "clientAuth,serverAuth").signed_by(ca)),
    ];
    // The CA has signed these too, but most of them are not trusted.
    let odd: Vec<(&str, Forged)> = vec![
        ("other-domain", leaf().set(Nid::SUBJECT_ALT_NAME, &names("spiffe://example.com/agent/fred")).signed_by(ca)),
        (
            "two-names",
            leaf()
                .set(Nid::SUBJECT_ALT_NAME, "URI:spiffe://example.org/agent/a,URI:spiffe://example.org/agent/b")
                .signed_by(ca),
        ),
        ("expired", leaf().valid(START.saturating_sub(DAY * 2), START.saturating_sub(DAY)).signed_by(ca)),
        ("is-ca", leaf().set(Nid::BASIC_CONSTRAINTS, "critical,CA:TRUE").signed_by(ca)),
        ("no-usage", leaf().set(Nid::KEY_USAGE, "").signed_by(ca)),
        ("constrained", leaf().set(Nid::NAME_CONSTRAINTS, "permitted;URI:example.org").signed_by(ca)),
        ("self-signed", leaf().self_signed()),
    ];
    let pki = folder("pki");
    for (name, authority) in [("root", ca), ("intermediate", below)] {
        write(&pki, &format!("{name}.pem"), authority.x509.to_pem().unwrap());
        write(&pki, &format!("{name}-key.pem"), authority.key.private_key_to_pem_pkcs8().unwrap());
    }
    let all: Vec<u8> = issued.iter().chain(&odd).flat_map(|(_, leaf)| leaf.x509.to_pem().unwrap()).collect();
    write(&pki, "issued.pem", &all);
    write(&pki, "good.pem", issued[0].1.x509.to_pem().unwrap());

    let seeds = folder("seeds/certificate");
    for (name, leaf) in issued.iter().chain(&odd) {
        let chain = if matches!(*name, "below" | "mapper") { [leaf.der(), below.der()].concat() } else { leaf.der() };
        write(&seeds, &format!("{name}.der"), chain);
    }
    write(&seeds, "text.pem", [issued[0].1.x509.to_pem().unwrap(), ca.x509.to_pem().unwrap()].concat());
    let fred = nanite::packet::Identity::agent("fred").unwrap();
    let key = nanite::certs::PrivateKey::generate(nanite::certs::KeyType::P256).unwrap();
    write(&seeds, "request.pem", nanite::certs::CertificateRequest::new(&fred, &key).unwrap().to_pem().unwrap());
}

fn lists(ca: &Forged) {
    let pki = root().join("fuzz/pki");
    let revoked = Forge::leaf().signed_by(ca).x509;
    write(&pki, "revoked.pem", revoked.to_pem().unwrap());
    let (from, to) = (START.saturating_sub(DAY), START.saturating_add(DAY * 20));
    let made = [ca.crl(&[&revoked], from, to), ca.crl(&[&revoked, &ca.x509], from, to)];
    let stale = ca.crl(&[&revoked], START.saturating_sub(DAY * 3), START.saturating_sub(DAY));
    let another = Forge::ca("fuzz root").self_signed().crl(&[&X509::from_der(&ca.der()).unwrap()], from, to);
    let ours = our_list(ca, &revoked);
    let pem: Vec<u8> = made.iter().flat_map(|list| list.to_pem().unwrap()).chain(ours.iter().copied()).collect();
    write(&pki, "lists.pem", &pem);
    let seeds = folder("seeds/crl");
    for (name, list) in [("one", &made[0]), ("two", &made[1]), ("stale", &stale), ("another", &another)] {
        write(&seeds, &format!("{name}.der"), list.to_der().unwrap());
    }
    write(&seeds, "text.pem", &pem);
    write(&seeds, "ours.der", openssl::x509::X509Crl::from_pem(&ours).unwrap().to_der().unwrap());
}

/// A list as nanite makes it, with a reason.
fn our_list(ca: &Forged, revoked: &X509) -> Vec<u8> {
    use nanite::certs::{Certificate, CertificateAuthority, PrivateKey, RevocationList, RevocationReason};
    let key = PrivateKey::from_pem(&ca.key.private_key_to_pem_pkcs8().unwrap(), None).unwrap();
    let ca = CertificateAuthority::new(ca.x509.clone(), key, Some("example.org")).unwrap();
    let revoked = Certificate::from_x509(revoked.clone()).unwrap();
    let list = RevocationList::issue(None, &ca, &[(&revoked, RevocationReason::KeyCompromise)], DAY, NOW).unwrap();
    list.to_pem().unwrap()
}

/// The packets of the vectors, in the other codecs.
fn bodies() {
    let seeds = folder("seeds/codecs");
    for (name, packet) in packets() {
        write(&seeds, &format!("{name}.msgpack"), MsgPack.encode(&packet).unwrap());
        write(&seeds, &format!("{name}.yaml"), Yaml.encode(&packet).unwrap());
    }
}

fn packets() -> Vec<(String, nanite::packet::Packet)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(root().join("tests/vectors/json-packets")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        all.push((name, Json.decode(&fs::read(path).unwrap()).unwrap()));
    }
    all.sort_by(|one, other| one.0.cmp(&other.0));
    all
}

/// The headers and packets of the valid messages of the vectors.
fn headers() {
    let seeds = folder("seeds/insider");
    let folder = root().join("tests/vectors/envelope");
    let index: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("index.json")).unwrap()).unwrap();
    let signers = ["mapper-m1", "mapper-m2", "nanite-fred", "nanite-bob", "mapper-m3", "nanite-carl"];
    for message in index["messages"].as_array().unwrap().iter().filter(|message| message["expect"] == "opened") {
        let file = message["file"].as_str().unwrap();
        let header = inspect(&fs::read(folder.join("messages").join(file)).unwrap()).unwrap().header;
        let signer = signers.iter().position(|name| *name == header.from.as_str()).unwrap_or(0) as u8;
        let clear = if header.kind == nanite::packet::Kind::Advertise { 0x10 } else { 0 };
        let packet = Json.decode(message["packet"].to_string().as_bytes()).unwrap();
        let body = if header.codec == "json" { Json.encode(&packet) } else { MsgPack.encode(&packet) };
        let input = [&[signer | clear], &header_der(&header).unwrap()[..], &body.unwrap()].concat();
        write(&seeds, file.trim_end_matches(".der"), input);
    }
}

/// Messages as nanite writes them; the vectors are from another program.
fn messages() {
    use nanite::packet::{Identity, Kind, Payload, Register, Request, Status};
    use nanite::serializer::{Audience, SealRequest, Serializer};
    let seal = |node: usize, packet: &nanite::packet::Packet, audience: &Audience| {
        let signer = world().serializer(&world().nodes[node]);
        signer.seal(packet, &SealRequest::new(audience, NOW)).unwrap().bytes
    };
    let [fred, carl] = ["fred", "carl"].map(|name| Identity::agent(name).unwrap());
    let request = Request::new("/a/b".parse().unwrap(), Payload::from("x")).into();
    let register = Register::new(fred.clone(), ["/a/b".parse().unwrap()])
        .with_status(Status::new(0.5))
        .with_tags(["eu".parse().unwrap()])
        .with_instance(START.as_micros());
    let all = [
        ("ours-many.der", seal(0, &request, &Audience::Many(vec![fred.clone(), carl]))),
        ("ours-rsa.der", seal(4, &request, &fred.into())),
        ("ours-register.der", seal(2, &register.into(), &Audience::Mappers)),
    ];
    assert_eq!(inspect(&all[2].1).unwrap().header.kind, Kind::Register);
    for target in ["cms", "envelope"] {
        let seeds = folder(&format!("seeds/{target}"));
        all.iter().for_each(|(name, message)| write(&seeds, name, message));
    }
}

fn policies() {
    let seeds = folder("seeds/policy");
    let rules = r#"[[register]]
name = "workers"
agents = ["nanite-w*"]
services = ["/jobs/*", "/agent/echo"]
tags = ["eu", "gpu-*"]
files = ["photos"]

[[request]]
name = "operators"
callers = ["mapper-*", "nanite-boss"]
services = ["/jobs/*"]

[[request]]
callers = ["nanite-*"]
roles = ["agent"]
through = ["mapper-main"]
services = ["/jobs/light"]
selectors = ["rr"]
tags = ["eu"]
"#;
    write(&seeds, "rules.toml", rules);
    write(&seeds, "none.toml", "");
    write(
        &seeds,
        "all.toml",
        "[[request]]\ncallers = [\"*\"]\nservices = [\"*\"]\n[[register]]\nagents = [\"*\"]\nservices = [\"*\"]\n",
    );
    write(
        &seeds,
        "inline.toml",
        "request = [{ callers = [\"nanite-f*d\"], services = ['/jobs/*'], roles = ['agent', 'mapper'] }]\n",
    );
    write(&seeds, "pattern", "*a*b*c\naabbcc");
}

/// Steps for the replay memory: operation, sender, message, expiry, and clock.
fn steps() {
    let seeds = folder("seeds/replay");
    let fill: Vec<u8> = (0..12).flat_map(|n| [0, n % 3, n, 200, 0, 0]).chain([2, 0, 0, 0, 40, 2]).collect();
    let pass: Vec<u8> = (0..30).flat_map(|n| [n % 3, n % 4, n % 5, 40, 20, 2]).collect();
    let beats: Vec<u8> = (0..30).flat_map(|n| [3, n % 5, n, 1, 30, 2]).collect();
    let back = [0, 0, 1, 255, 0, 0, 0, 1, 2, 10, 100, 3, 2, 0, 0, 0, 0xe0, 3, 2, 0, 0, 0, 0, 0];
    for (name, steps) in [("fill", &fill[..]), ("pass", &pass), ("beats", &beats), ("back", &back)] {
        write(&seeds, name, steps);
    }
}
