//! The target `http1_edge` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::http1_edge::run(bytes));
