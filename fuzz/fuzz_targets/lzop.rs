//! Any bytes as a stream of lzop, and as one block of it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::lzop(data));
