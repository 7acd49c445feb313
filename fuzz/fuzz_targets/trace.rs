//! Any bytes as a boot trace.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::trace(data));
