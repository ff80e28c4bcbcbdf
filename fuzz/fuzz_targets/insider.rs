#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| nanite_fuzz::targets::insider::run(data));
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    nanite_fuzz::mutator::mutate(data, size, max_size, seed, &mut libfuzzer_sys::fuzzer_mutate)
});
