//! p01: sealing and opening, against the sum of the primitives inside and against OpenSSL's own CMS calls doing the same.
//!
//! `cargo bench --bench envelope` measures and then prints ratios of medians, from this one run. OpenSSL's CMS calls derive keys
//! with SHA-1 where these use SHA-256 (their default, which the `openssl` crate cannot change), parse the message, and check
//! neither header nor freshness; certificates and keys are parsed beforehand on both sides.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion};
use nanite::certs::{
    Certificate, CertificateAuthority, CertificateStore, Credentials, KeyType, PrivateKey, Recipient, RecipientQuery,
    RevocationList, RevocationReason, SignerQuery, StoreError, Trust,
};
use nanite::clock::Timestamp;
use nanite::packet::{Identity, Packet, Payload, Request};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, OpenContext, SealRequest, Serializer};
use openssl::cms::{CMSOptions, CmsContentInfo};
use openssl::ec::{EcGroup, EcKey, EcPoint, PointConversionForm};
use openssl::md::Md;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private, Public};
use openssl::pkey_ctx::PkeyCtx;
use openssl::rsa::Padding;
use openssl::sign::RsaPssSaltlen;
use openssl::stack::Stack;
use openssl::x509::X509;
use openssl::x509::store::X509StoreBuilder;

const NOW: Timestamp = Timestamp::from_secs(1_795_500_000);
const SIZES: [usize; 2] = [256, 4096];

/// Everybody, found by walking a list; and whoever brings a certificate along, as a store does that learns.
#[derive(Debug)]
struct Everybody(Vec<Arc<Certificate>>);

impl CertificateStore for Everybody {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        let known = self.0.iter().find(|one| one.identity() == query.identity && one.key_id() == query.key_id);
        Ok(known.or(query.presented).cloned())
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        let Recipient::One(identity) = query.recipient else { return Ok(Vec::new()) };
        Ok(self.0.iter().filter(|one| one.identity() == identity).cloned().collect())
    }
}

/// One suite: a mapper that sends, an agent that receives, and the same keys as OpenSSL has them.
struct Bench {
    name: &'static str,
    ca: CertificateAuthority,
    from: Credentials,
    to: Credentials,
    store: Arc<Everybody>,
    signing: PKey<Private>,
    receiving: PKey<Private>,
    receiving_public: PKey<Public>,
    signing_public: PKey<Public>,
    elliptic: bool,
}

impl Bench {
    fn new(name: &'static str, key_type: KeyType) -> Self {
        let ca =
            CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, NOW).unwrap();
        let issue = |identity: Identity| {
            let key = PrivateKey::generate(key_type).unwrap();
            let pem = key.to_pem().unwrap();
            let request = nanite::certs::CertificateRequest::new(&identity, &key).unwrap();
            let certificate = ca.sign(&request, &identity, CertificateAuthority::LEAF_VALID_FOR, NOW).unwrap();
            (Credentials::new(certificate, key).unwrap(), PKey::private_key_from_pem(&pem).unwrap())
        };
        let (from, signing) = issue(Identity::mapper("m1").unwrap());
        let (to, receiving) = issue(Identity::agent("fred").unwrap());
        let store = Arc::new(Everybody(vec![from.certificate().clone(), to.certificate().clone()]));
        let elliptic = key_type == KeyType::P256;
        let signing_public = from.certificate().public_key().clone();
        let receiving_public = to.certificate().public_key().clone();
        Self { name, ca, from, to, store, signing, receiving, receiving_public, signing_public, elliptic }
    }

    fn serializer(&self, credentials: &Credentials, reuse: bool) -> SecureSerializer {
        let trust = self.ca.trust().unwrap();
        let builder = SecureSerializer::builder(credentials.clone(), self.store.clone(), trust)
            .started_at(NOW.saturating_sub(Duration::from_secs(60)));
        if reuse { builder.build() } else { builder.dangerous().without_key_reuse().build() }.unwrap()
    }
}

fn packet(size: usize) -> Packet {
    Packet::Request(Request::new("/simple/echo".parse().unwrap(), Payload::from("x".repeat(size).as_str())))
}

fn p01_seal_and_open(c: &mut Criterion, bench: &Bench) {
    let audience = Audience::One(bench.to.certificate().identity().clone());
    let how = SealRequest::new(&audience, NOW);
    let context = OpenContext::new(InboundQueue::AgentInbox, NOW);
    for size in SIZES {
        let packet = packet(size);
        for reuse in [true, false] {
            if !reuse && !bench.elliptic {
                continue;
            }
            let from = bench.serializer(&bench.from, reuse);
            let to = bench.serializer(&bench.to, reuse);
            let what = if reuse { "ours" } else { "ours-no-reuse" };
            c.benchmark_group(format!("{}-{size}-seal", bench.name))
                .bench_function(what, |b| b.iter(|| from.seal(black_box(&packet), &how).unwrap()));
            c.benchmark_group(format!("{}-{size}-open", bench.name)).bench_function(what, |b| {
                b.iter_batched(
                    || from.seal(&packet, &how).unwrap().bytes,
                    |bytes| to.open(&bytes, &context).unwrap(),
                    BatchSize::SmallInput,
                );
            });
        }
    }
}

/// What it costs to refuse: a flood of forgeries should cost less than honest messages.
fn refusals(c: &mut Criterion, bench: &Bench) {
    let (from, to) = (bench.serializer(&bench.from, true), bench.serializer(&bench.to, true));
    let audience = Audience::One(bench.to.certificate().identity().clone());
    let sealed = from.seal(&packet(256), &SealRequest::new(&audience, NOW)).unwrap().bytes;
    let mut forged = sealed.clone();
    *forged.last_mut().unwrap() ^= 1;
    let advertise = Packet::Advertise(nanite::packet::Advertise::default());
    let stranger = Bench::new(bench.name, if bench.elliptic { KeyType::P256 } else { KeyType::Rsa2048 });
    let strange = stranger.serializer(&stranger.from, true);
    let strange = strange.seal(&advertise, &SealRequest::new(&Audience::Agents, NOW)).unwrap().bytes;
    for (what, bytes, channel) in [
        ("forged", forged, InboundQueue::AgentInbox),
        ("stranger", strange, InboundQueue::AgentControl),
        ("garbage", vec![0x30; sealed.len()], InboundQueue::AgentInbox),
    ] {
        let context = OpenContext::new(channel, NOW);
        c.benchmark_group(format!("{}-256-open", bench.name))
            .bench_function(what, |b| b.iter(|| to.open(&bytes, &context).unwrap_err()));
    }
    let good = from.seal(&advertise, &SealRequest::new(&Audience::Agents, NOW)).unwrap().bytes;
    let context = OpenContext::new(InboundQueue::AgentControl, NOW);
    c.benchmark_group(format!("{}-256-open", bench.name)).bench_function("newcomer", |b| {
        let never_met = || bench.serializer(&bench.to, true);
        let open = |to: SecureSerializer| {
            to.open(&good, &context).unwrap();
            to
        };
        b.iter_batched(never_met, open, BatchSize::SmallInput);
    });
}

/// How many certificates the longer revocation list revokes.
const REVOKED: usize = 1000;

/// What chain and revocation lists add to opening: with the verdict kept, with one made anew (as once a minute for each signer), and
/// with the lists read anew, too (as when the second is another than that of the verdict before).
fn trust(c: &mut Criterion, bench: &Bench) {
    let from = bench.serializer(&bench.from, true);
    let audience = Audience::One(bench.to.certificate().identity().clone());
    let (how, packet) = (SealRequest::new(&audience, NOW), packet(256));
    let list = |count: usize| {
        let issue = |n| {
            let identity = Identity::agent(&format!("gone-{n}")).unwrap();
            let valid_for = CertificateAuthority::LEAF_VALID_FOR;
            bench.ca.issue(&identity, KeyType::P256, valid_for, NOW).unwrap().certificate().clone()
        };
        let gone: Vec<Arc<Certificate>> = (0..count).map(issue).collect();
        let revoked: Vec<_> = gone.iter().map(|one| (&**one, RevocationReason::Superseded)).collect();
        RevocationList::issue(None, &bench.ca, &revoked, RevocationList::VALID_FOR, NOW).unwrap().to_pem().unwrap()
    };
    let chain = || bench.ca.trust().unwrap();
    for (what, believed) in [
        ("pinned", Trust::pinned()),
        ("chain", chain()),
        ("list", chain().with_crls_pem(&list(1)).unwrap()),
        ("long-list", chain().with_crls_pem(&list(REVOKED)).unwrap()),
    ] {
        let believed = Arc::new(believed);
        let builder = SecureSerializer::builder(bench.to.clone(), bench.store.clone(), believed.clone());
        let to = builder.started_at(NOW.saturating_sub(Duration::from_secs(60))).build().unwrap();
        let sealed = || from.seal(&packet, &how).unwrap().bytes;
        let mut group = c.benchmark_group(format!("{}-256-open", bench.name));
        let context = OpenContext::new(InboundQueue::AgentInbox, NOW);
        group.bench_function(format!("{what}-kept"), |b| {
            b.iter_batched(sealed, |bytes| to.open(&bytes, &context).unwrap(), BatchSize::SmallInput);
        });
        group.bench_function(format!("{what}-anew"), |b| {
            let setup = || {
                let bytes = sealed();
                // What is kept is forgotten with it.
                believed.replace_authorities(&believed);
                bytes
            };
            b.iter_batched(setup, |bytes| to.open(&bytes, &context).unwrap(), BatchSize::PerIteration);
        });
        let mut second = 0;
        group.bench_function(format!("{what}-reloaded"), |b| {
            let setup = || {
                let bytes = sealed();
                believed.replace_authorities(&believed);
                second = 1 - second;
                (bytes, OpenContext::new(InboundQueue::AgentInbox, NOW.saturating_add(Duration::from_secs(second))))
            };
            b.iter_batched(setup, |(bytes, context)| to.open(&bytes, &context).unwrap(), BatchSize::PerIteration);
        });
    }
}

/// What cannot be left out of one message, by OpenSSL's primitives.
struct Primitives {
    gcm: openssl::cipher::Cipher,
    block: openssl::cipher::Cipher,
    group: EcGroup,
}

impl Primitives {
    fn new() -> Self {
        Self {
            gcm: openssl::cipher::Cipher::fetch(None, "AES-256-GCM", None).unwrap(),
            block: openssl::cipher::Cipher::fetch(None, "AES-256-ECB", None).unwrap(),
            group: EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap(),
        }
    }

    fn gcm(&self, encrypt: bool, input: &[u8], tag: &mut [u8; 16]) -> Vec<u8> {
        let mut context = openssl::cipher_ctx::CipherCtx::new().unwrap();
        let mut out = vec![0; input.len()];
        if encrypt {
            context.encrypt_init(Some(&self.gcm), Some(&[1; 32]), Some(&[2; 12])).unwrap();
            context.cipher_update(input, Some(&mut out)).unwrap();
            context.cipher_final(&mut []).unwrap();
            context.tag(tag).unwrap();
        } else {
            context.decrypt_init(Some(&self.gcm), Some(&[1; 32]), Some(&[2; 12])).unwrap();
            context.cipher_update(input, Some(&mut out)).unwrap();
            context.set_tag(tag).unwrap();
            context.cipher_final(&mut []).unwrap();
        }
        out
    }

    /// The 24 blocks of AES that wrapping a key takes.
    fn wrap(&self, wrap: bool) -> [u8; 32] {
        let mut context = openssl::cipher_ctx::CipherCtx::new().unwrap();
        if wrap {
            context.encrypt_init(Some(&self.block), Some(&[3; 32]), None).unwrap();
        } else {
            context.decrypt_init(Some(&self.block), Some(&[3; 32]), None).unwrap();
        }
        context.set_padding(false);
        let mut out = [0; 32];
        for _ in 0..24 {
            let input: [u8; 16] = out[..16].try_into().unwrap();
            context.cipher_update(&input, Some(&mut out)).unwrap();
        }
        out
    }

    fn agree(&self, own: &PKey<Private>, public: &PKey<Public>) -> [u8; 32] {
        let mut deriver = openssl::derive::Deriver::new(own).unwrap();
        deriver.set_peer_ex(public, false).unwrap();
        let mut secret = [0; 32];
        deriver.derive(&mut secret).unwrap();
        secret
    }

    fn sign(&self, bench: &Bench, digest: &[u8]) -> Vec<u8> {
        let mut context = PkeyCtx::new(&bench.signing).unwrap();
        context.sign_init().unwrap();
        if !bench.elliptic {
            pss(&mut context);
        }
        let mut signature = Vec::new();
        context.sign_to_vec(digest, &mut signature).unwrap();
        signature
    }

    fn verify(&self, bench: &Bench, digest: &[u8], signature: &[u8]) {
        let mut context = PkeyCtx::new(&bench.signing_public).unwrap();
        context.verify_init().unwrap();
        if !bench.elliptic {
            pss(&mut context);
        }
        assert!(context.verify(digest, signature).unwrap());
    }
}

/// SHA-256 without looking it up, which OpenSSL's one-shot function does every time.
fn sha256(data: &[u8]) -> [u8; 32] {
    let mut sha = openssl::sha::Sha256::new();
    sha.update(data);
    sha.finish()
}

fn pss<T>(context: &mut PkeyCtx<T>) {
    context.set_rsa_padding(Padding::PKCS1_PSS).unwrap();
    context.set_signature_md(Md::sha256()).unwrap();
    context.set_rsa_mgf1_md(Md::sha256()).unwrap();
    context.set_rsa_pss_saltlen(RsaPssSaltlen::custom(32)).unwrap();
}

fn oaep<T>(context: &mut PkeyCtx<T>) {
    context.set_rsa_padding(Padding::PKCS1_OAEP).unwrap();
    context.set_rsa_oaep_md(Md::sha256()).unwrap();
    context.set_rsa_mgf1_md(Md::sha256()).unwrap();
}

fn primitives(c: &mut Criterion, bench: &Bench) {
    let tools = Primitives::new();
    // What the header and the signed attributes take.
    let (header, attributes) = ([7u8; 300], [8u8; 400]);
    for size in SIZES {
        let body = vec![9u8; size + 100];
        let plaintext = vec![9u8; size + 164];
        for reuse in [true, false] {
            if !reuse && !bench.elliptic {
                continue;
            }
            let what = if reuse { "primitives" } else { "primitives-no-reuse" };
            c.benchmark_group(format!("{}-{size}-seal", bench.name)).bench_function(what, |b| {
                b.iter(|| {
                    let mut random = [0; 124];
                    openssl::rand::rand_bytes(&mut random[..60]).unwrap();
                    openssl::rand::rand_priv_bytes(&mut random[60..]).unwrap();
                    let mut tag = [0; 16];
                    let digests = (sha256(&body), sha256(&header), sha256(&attributes));
                    let content = tools.gcm(true, &plaintext, &mut tag);
                    let key = if bench.elliptic {
                        if !reuse {
                            let key = EcKey::generate(&tools.group).unwrap();
                            let mut context = openssl::bn::BigNumContext::new().unwrap();
                            let form = PointConversionForm::UNCOMPRESSED;
                            black_box(key.public_key().to_bytes(&tools.group, form, &mut context).unwrap());
                            tools.agree(&PKey::from_ec_key(key).unwrap(), &bench.receiving_public);
                        }
                        (sha256(&random), tools.wrap(true)).1.to_vec()
                    } else {
                        let mut context = PkeyCtx::new(&bench.receiving_public).unwrap();
                        context.encrypt_init().unwrap();
                        oaep(&mut context);
                        let mut out = Vec::new();
                        context.encrypt_to_vec(&random[..32], &mut out).unwrap();
                        out
                    };
                    (digests, sha256(&content), key, tools.sign(bench, &digests.2))
                });
            });

            let mut tag = [0; 16];
            let content = tools.gcm(true, &plaintext, &mut tag);
            let signature = tools.sign(bench, &sha256(&attributes));
            let ephemeral = EcKey::generate(&tools.group).unwrap();
            let mut context = openssl::bn::BigNumContext::new().unwrap();
            let form = PointConversionForm::UNCOMPRESSED;
            let point = ephemeral.public_key().to_bytes(&tools.group, form, &mut context).unwrap();
            let transported = (!bench.elliptic).then(|| {
                let mut context = PkeyCtx::new(&bench.receiving_public).unwrap();
                context.encrypt_init().unwrap();
                oaep(&mut context);
                let mut out = Vec::new();
                context.encrypt_to_vec(&[5; 32], &mut out).unwrap();
                out
            });
            c.benchmark_group(format!("{}-{size}-open", bench.name)).bench_function(what, |b| {
                b.iter(|| {
                    let digests = (sha256(&body), sha256(&header), sha256(&attributes), sha256(&content));
                    tools.verify(bench, &digests.2, &signature);
                    let key = match &transported {
                        Some(transported) => {
                            let mut context = PkeyCtx::new(&bench.receiving).unwrap();
                            context.decrypt_init().unwrap();
                            oaep(&mut context);
                            let mut out = Vec::new();
                            context.decrypt_to_vec(transported, &mut out).unwrap();
                            out
                        }
                        None => {
                            if !reuse {
                                let mut context = openssl::bn::BigNumContext::new().unwrap();
                                let point = EcPoint::from_bytes(&tools.group, &point, &mut context).unwrap();
                                let key = EcKey::from_public_key(&tools.group, &point).unwrap();
                                tools.agree(&bench.receiving, &PKey::from_ec_key(key).unwrap());
                            }
                            (sha256(&header), tools.wrap(false)).1.to_vec()
                        }
                    };
                    (digests, key, tools.gcm(false, &content, &mut tag))
                });
            });
        }
    }
}

/// OpenSSL's CMS calls: AuthEnvelopedData inside SignedData, and back.
fn openssl_cms(c: &mut Criterion, bench: &Bench) {
    let from = X509::from_der(bench.from.certificate().der()).unwrap();
    let to = X509::from_der(bench.to.certificate().der()).unwrap();
    let mut recipients = Stack::new().unwrap();
    recipients.push(to.clone()).unwrap();
    let mut signers = Stack::new().unwrap();
    signers.push(from.clone()).unwrap();
    let store = X509StoreBuilder::new().unwrap().build();
    let flags = CMSOptions::BINARY | CMSOptions::USE_KEYID | CMSOptions::CMS_NOCERTS | CMSOptions::NOSMIMECAP;
    let seal = |body: &[u8]| {
        let cipher = openssl::symm::Cipher::aes_256_gcm();
        let enveloped = CmsContentInfo::encrypt(&recipients, body, cipher, flags).unwrap().to_der().unwrap();
        let signed = CmsContentInfo::sign(Some(&from), Some(&bench.signing), None, Some(&enveloped), flags).unwrap();
        signed.to_der().unwrap()
    };
    let open = |bytes: &[u8]| {
        let mut signed = CmsContentInfo::from_der(bytes).unwrap();
        let mut enveloped = Vec::new();
        let flags = CMSOptions::BINARY | CMSOptions::NO_SIGNER_CERT_VERIFY | CMSOptions::NOINTERN;
        signed.verify(Some(&signers), Some(&store), None, Some(&mut enveloped), flags).unwrap();
        CmsContentInfo::from_der(&enveloped).unwrap().decrypt(&bench.receiving, &to).unwrap()
    };
    for size in SIZES {
        let body = vec![9u8; size + 100];
        let sealed = seal(&body);
        assert_eq!(open(&sealed), body);
        c.benchmark_group(format!("{}-{size}-seal", bench.name))
            .bench_function("openssl-cms", |b| b.iter(|| seal(&body)));
        c.benchmark_group(format!("{}-{size}-open", bench.name))
            .bench_function("openssl-cms", |b| b.iter(|| open(&sealed)));
    }
}

/// The median that criterion has just measured, in microseconds.
fn median(group: &str, what: &str) -> Option<f64> {
    let home = std::env::var_os("CRITERION_HOME")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/criterion"), std::path::PathBuf::from);
    let text = std::fs::read_to_string(home.join(group).join(what).join("new/estimates.json")).ok()?;
    let estimates: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(estimates["median"]["point_estimate"].as_f64()? / 1000.0)
}

fn print_ratios() {
    let row = |cells: [&str; 7]| {
        println!(
            "{:>16} {:>10} {:>18} {:>10} {:>22} {:>12} {:>14}",
            cells[0], cells[1], cells[2], cells[3], cells[4], cells[5], cells[6]
        );
    };
    println!("\nmedians in microseconds; ratios are ours over theirs");
    row(["", "ours", "over primitives", "no reuse", "over its primitives", "openssl-cms", "cms over ours"]);
    for name in ["p256", "rsa2048"] {
        for what in ["seal", "open", "both"] {
            for size in SIZES {
                let get = |which: &str| match what {
                    "both" => Some(
                        median(&format!("{name}-{size}-seal"), which)? + median(&format!("{name}-{size}-open"), which)?,
                    ),
                    what => median(&format!("{name}-{size}-{what}"), which),
                };
                let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
                let ratio =
                    |a: Option<f64>, b: Option<f64>| a.zip(b).map_or("-".to_owned(), |(a, b)| format!("{:.2}", a / b));
                let (ours, slow, cms) = (get("ours"), get("ours-no-reuse"), get("openssl-cms"));
                row([
                    &format!("{name} {what} {size}"),
                    &number(ours),
                    &ratio(ours, get("primitives")),
                    &number(slow),
                    &ratio(slow, get("primitives-no-reuse")),
                    &number(cms),
                    &ratio(cms, ours),
                ]);
            }
        }
    }
}

/// What it costs to refuse a message, over what it costs to open one.
fn print_refusals() {
    println!("\nrefusing over opening, 256 bytes");
    for name in ["p256", "rsa2048"] {
        let group = format!("{name}-256-open");
        for (what, which, good) in [
            ("a changed signature, over a good one", "forged", "ours"),
            ("a certificate of another CA that came along, over a known one", "stranger", "ours"),
            ("the same, over one of the own CA that is seen for the first time", "stranger", "newcomer"),
            ("garbage, over a message", "garbage", "ours"),
        ] {
            if let (Some(refused), Some(opened)) = (median(&group, which), median(&group, good)) {
                println!("{name:>16} {:>10.2} {what}", refused / opened);
            }
        }
    }
}

/// What chain and revocation lists add to opening a message, over what it costs with certificates that are pinned.
fn print_trust() {
    println!("\nopening by what is believed, over opening by pinned certificates, 256 bytes");
    println!("{:>52} {:>12} {:>12} {:>12}", "", "kept", "made anew", "and loaded");
    for name in ["p256", "rsa2048"] {
        let group = format!("{name}-256-open");
        let Some(bare) = median(&group, "pinned-kept") else { continue };
        let long = format!("and a list of {REVOKED}");
        for (what, which) in
            [("a chain to the CA", "chain"), ("and a revocation list of 1", "list"), (&*long, "long-list")]
        {
            let ratio = |how: &str| {
                median(&group, &format!("{which}-{how}")).map_or("-".to_owned(), |took| format!("{:.2}", took / bare))
            };
            let [kept, anew, reloaded] = ["kept", "anew", "reloaded"].map(ratio);
            println!("{name:>16} {what:>35} {kept:>12} {anew:>12} {reloaded:>12}");
        }
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200))
        .sample_size(30)
        .configure_from_args();
    for (name, key_type) in [("p256", KeyType::P256), ("rsa2048", KeyType::Rsa2048)] {
        let bench = Bench::new(name, key_type);
        p01_seal_and_open(&mut criterion, &bench);
        refusals(&mut criterion, &bench);
        trust(&mut criterion, &bench);
        primitives(&mut criterion, &bench);
        openssl_cms(&mut criterion, &bench);
    }
    criterion.final_summary();
    print_ratios();
    print_refusals();
    print_trust();
}
