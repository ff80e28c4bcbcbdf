#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| nanite_fuzz::targets::replay::run(data));
