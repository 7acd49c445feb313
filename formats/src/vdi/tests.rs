//! Files made by hand. Disks that QEMU writes are compared in `tests/it/foreign/hyperv.rs`.

use super::*;
use crate::{
    made::{is_corrupt, is_truncated, is_unsupported},
    storage::MemoryStorage,
};

/// A disk of 4 blocks of 4096 bytes: block 0 is stored, 1 is zero, the rest is free.
fn made(change: impl FnOnce(&mut Vec<u8>)) -> Result<VdiLayer> {
    let mut bytes = vec![0; 1024 + 4096];
    let words = [
        (64, 0xbeda_107f),
        (68, 0x1_0001),
        (72, 400),
        (76, 1),
        (340, 512),
        (344, 1024),
        (368, 4 * 4096),
        (376, 4096),
        (384, 4),
    ];
    words.iter().for_each(|(at, value)| put(&mut bytes, *at, *value));
    [0, ZERO, FREE, FREE].iter().enumerate().for_each(|(i, entry)| put(&mut bytes, 512 + 4 * i, *entry));
    change(&mut bytes);
    VdiLayer::open(Arc::new(MemoryStorage::new("made.vdi", bytes)))
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn the_made_disk_reads() {
    let layer = made(|_| {}).expect("opens");
    assert_eq!(layer.lookup(9, u64::MAX).expect("plain"), (Content::Plain { file: 0, offset: 1033 }, 4087));
    assert_eq!(layer.lookup(4096, u64::MAX).expect("zero"), (Content::Zero, 4096));
    assert_eq!(layer.lookup(8192, u64::MAX).expect("free"), (Content::Absent, 8192));
}

#[test]
fn hostile_headers_are_refused() {
    type Verdict = fn(Result<VdiLayer>) -> bool;
    let cases: [(usize, u32, Verdict); 14] = [
        (64, 0, is_corrupt),
        (68, 0x1_0002, is_unsupported),
        (76, 3, is_unsupported),
        (76, 4, is_unsupported),
        (76, 9, is_unsupported),
        (340, 0, is_corrupt),
        (340, u32::MAX, is_truncated),
        (344, 0, is_corrupt),
        (344, 513, is_corrupt),
        (368, 0, is_corrupt),
        (372, u32::MAX, is_corrupt),
        (376, 5000, is_corrupt),
        (380, 512, is_unsupported),
        (384, 3, is_corrupt),
    ];
    for (at, value, verdict) in cases {
        let done = made(|bytes| put(bytes, at, value));
        let shown = format!("{done:?}");
        assert!(verdict(done), "{value} at {at}: {shown}");
    }
    assert!((0..1024).all(|len| made(|bytes| bytes.truncate(len)).is_err() || len >= 528));
    for entry in [1, 0xffff_fffd] {
        let layer = made(|bytes| put(bytes, 520, entry)).expect("opens");
        assert!(is_truncated(layer.lookup(8192, 1)), "{entry}");
        assert!(layer.lookup(0, 1).is_ok() && layer.lookup(12288, 1).is_ok());
    }
}
