//! Any bytes as a disk whose unused space is looked for.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::unused(data));
