//! s12: the fuzz targets, without a fuzzer. Runs every stored input, the seeds and all inputs that once failed, so that fixed bugs stay
//! fixed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

#[path = "../../fuzz/src/targets/mod.rs"]
mod targets;

use targets::{ALL, Target, world::root};

/// The maximum size of all seeds together.
const MAX_SEED_BYTES: u64 = 300 * 1024;

/// The initial inputs of a target: its seeds, and test vectors.
fn inputs(target: &Target) -> Vec<PathBuf> {
    let folders = [Some(format!("fuzz/seeds/{}", target.name)), target.vectors.map(str::to_owned)];
    let files = folders.into_iter().flatten().flat_map(|folder| fs::read_dir(root().join(folder)).unwrap());
    files.map(|file| file.unwrap().path()).collect()
}

fn repeat(name: &str) {
    let target = ALL.iter().find(|target| target.name == name).unwrap();
    for file in inputs(target) {
        eprintln!("{}", file.display());
        (target.run)(&fs::read(file).unwrap());
    }
    // Inputs without a file: empty, and long repetitions.
    for input in [&[][..], &[0; 4096], &[0xff; 4096], &[0x30; 4096], &[b'['; 4096]] {
        (target.run)(input);
    }
}

/// A test for each target, and the list of their targets: a test that is missing here is missing there.
macro_rules! repeats {
    ($(fn $test:ident() { repeat($target:literal) })*) => {
        const REPEATED: &[&str] = &[$($target),*];
        $(
            #[test]
            fn $test() {
                repeat($target);
            }
        )*
    };
}

repeats! {
    fn s12_repeats_certificate_inputs() { repeat("certificate") }
    fn s12_repeats_cms_inputs() { repeat("cms") }
    fn s12_repeats_codecs_inputs() { repeat("codecs") }
    fn s12_repeats_crl_inputs() { repeat("crl") }
    fn s12_repeats_envelope_inputs() { repeat("envelope") }
    fn s12_repeats_insider_inputs() { repeat("insider") }
    fn s12_repeats_policy_inputs() { repeat("policy") }
    fn s12_repeats_replay_inputs() { repeat("replay") }
}

#[test]
fn s12_every_target_has_seeds_and_runs_in_make_test() {
    // Each line is a target, and the folders of its initial inputs.
    let list = Command::new(root().join("scripts/fuzz.sh")).arg("list").output().unwrap();
    let expected: Vec<String> = ALL
        .iter()
        .map(|target| {
            let vectors = target.vectors.map(|folder| format!(" {folder}")).unwrap_or_default();
            format!("{0} fuzz/seeds/{0}{vectors}", target.name)
        })
        .collect();
    assert_eq!(String::from_utf8(list.stdout).unwrap().lines().collect::<Vec<_>>(), expected);

    let manifest = fs::read_to_string(root().join("fuzz/Cargo.toml")).unwrap();
    assert_eq!(REPEATED, ALL.iter().map(|target| target.name).collect::<Vec<_>>(), "a target is not repeated");
    for target in ALL {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{}.rs\"", target.name)), "{}", target.name);
        let own = fs::read_dir(root().join("fuzz/seeds").join(target.name)).unwrap();
        assert!(own.count() >= 3 || target.vectors.is_some(), "{} has few seeds", target.name);
    }
    let sizes = ALL.iter().flat_map(|target| fs::read_dir(root().join("fuzz/seeds").join(target.name)).unwrap());
    let size: u64 = sizes.map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(size < MAX_SEED_BYTES, "{size} bytes of seeds");

    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    let test = makefile.lines().find(|line| line.starts_with("test:")).unwrap();
    assert!(test.split_whitespace().any(|word| word == "fuzz"), "{test}");
    assert!(makefile.contains("\n\t./scripts/fuzz.sh run\n"), "make fuzz runs every target");
}
