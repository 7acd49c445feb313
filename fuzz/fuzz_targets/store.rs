//! Any bytes as one file of a store whose other files are honest.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::store(data));
