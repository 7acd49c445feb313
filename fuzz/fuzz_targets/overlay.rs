//! Any bytes as the map and the journal of an overlay.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::overlay(data));
