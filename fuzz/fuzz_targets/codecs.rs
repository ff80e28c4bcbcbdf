#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| nanite_fuzz::targets::codecs::run(data));
