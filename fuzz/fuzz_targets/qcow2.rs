//! Any bytes as a qcow2 image.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::qcow2(data));
