//! Any bytes as a stored block of any encoding.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::codec(data));
