//! Any bytes as a Hyper-V or VirtualBox disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aquifer_tests::fuzz::hyperv(data));
