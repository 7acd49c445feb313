//! Any bytes as what the hypervisor's monitor says.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::qmp(data));
