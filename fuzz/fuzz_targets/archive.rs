//! Any bytes as an archive of disks.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::archive(data));
