//! Any bytes as a VMware disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::vmdk(data));
