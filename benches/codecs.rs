//! p01: what it takes to write and read a request in each codec, as ratios to JSON.
//!
//! `cargo bench --bench codecs` measures and then prints medians and ratios from this one run.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod report;

use std::hint::black_box;
use std::time::Duration;

use criterion::Criterion;
use nanite::packet::{Identity, Packet, Payload, Request, Token};
use nanite::serializer::{Codec, Json, MsgPack, Yaml};
use report::{median, micros, ratio};
use serde_json::json;

/// A request whose payload is about this long in JSON: records as a program would send them.
fn packet(length: usize) -> Packet {
    let record = |n: usize| json!({"id": n, "name": format!("item {n}"), "price": n as f64 * 1.25, "tags": ["a", "b"]});
    let mut records = Vec::new();
    while serde_json::to_string(&records).unwrap().len() < length {
        records.push(record(records.len()));
    }
    let mut request = Request::new("/orders/total".parse().unwrap(), Payload::new(records).unwrap());
    request.from = Some(Identity::mapper("desk").unwrap());
    request.token = Some(Token::random().unwrap());
    Packet::Request(request)
}

fn main() {
    p01_codecs();
}

fn p01_codecs() {
    let codecs: [&dyn Codec; 3] = [&Json, &MsgPack, &Yaml];
    let packets = [("small", packet(1)), ("4KiB", packet(4096))];
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .sample_size(30)
        .configure_from_args();
    for (size, packet) in &packets {
        for codec in codecs {
            let bytes = codec.encode(packet).unwrap();
            criterion
                .benchmark_group(format!("codec-{size}-encode"))
                .bench_function(codec.name(), |b| b.iter(|| codec.encode(black_box(packet)).unwrap()));
            criterion
                .benchmark_group(format!("codec-{size}-decode"))
                .bench_function(codec.name(), |b| b.iter(|| codec.decode(black_box(&bytes)).unwrap()));
        }
    }
    criterion.final_summary();

    println!("\nmedians in microseconds; ratios are to JSON");
    println!("{:<16}{:>8}{:>10}{:>8}{:>10}{:>8}", "", "bytes", "encode", "ratio", "decode", "ratio");
    for (size, packet) in &packets {
        for codec in codecs {
            let of = |what: &str, codec: &dyn Codec| median(&format!("codec-{size}-{what}"), codec.name());
            println!(
                "{:<16}{:>8}{:>10}{:>8}{:>10}{:>8}",
                format!("{} {size}", codec.name()),
                codec.encode(packet).unwrap().len(),
                micros(of("encode", codec)),
                ratio(of("encode", codec), of("encode", codecs[0])),
                micros(of("decode", codec)),
                ratio(of("decode", codec), of("decode", codecs[0])),
            );
        }
    }
}
