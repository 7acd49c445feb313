//! Any bytes as a guest's memory with a ring in it, and as requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::vhost_user(data));
