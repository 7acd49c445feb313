//! Any sectors as a backup file of Veeam's.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::vbk(data));
