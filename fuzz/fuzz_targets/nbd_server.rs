//! Any bytes as what a client sends to an NBD server.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| { aquifer_tests::fuzz::nbd_server(data); });
