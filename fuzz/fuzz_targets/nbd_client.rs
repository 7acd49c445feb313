//! Any bytes as what an NBD server sends to our client.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| { aquifer_tests::fuzz::nbd_client(data); });
