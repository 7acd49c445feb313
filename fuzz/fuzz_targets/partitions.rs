//! Any bytes as a disk whose partition table is read.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::partitions(data));
