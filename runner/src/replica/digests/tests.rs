//! Digests come back as they were stored; damaged ones are not believed.

use std::sync::Arc;

use aquifer_formats::{raw::RawLayer, storage::MemoryStorage};
use aquifer_vdisk::{BlockCache, Chain};

use super::*;

const QUIET: Pace<'static> = &|_| Ok(());

fn disk(bytes: Vec<u8>) -> Disk {
    let layer = RawLayer::open(Arc::new(MemoryStorage::new("m", bytes))).expect("open");
    let chain = Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("chain");
    Disk::read_only("d", Arc::new(chain))
}

#[test]
fn what_is_read_again_is_what_was_stored() {
    let dir = tempfile::tempdir().expect("folder");
    let mut bytes = vec![0u8; 300_000];
    bytes[70_000] = 7;
    let digests = Digests::of(&disk(bytes.clone()), BLOCK_MIN, QUIET).expect("digests");
    let path = dir.path().join("a/b.digests");
    digests.store(&path).expect("store");
    assert_eq!(Digests::load(&path, 300_000).expect("load"), Some(digests.clone()));
    assert_eq!(Digests::load(&path, 300_001).expect("load"), None);
    assert_eq!(Digests::load(&dir.path().join("none"), 1).expect("load"), None);
    let stored = fs::read(&path).expect("read");
    for at in 0..stored.len() {
        let mut damaged = stored.clone();
        damaged[at] ^= 1;
        assert_eq!(Digests::parse(&damaged), None, "byte {at}");
    }
    for len in 0..stored.len() {
        assert_eq!(Digests::parse(&stored[..len]), None, "{len} bytes");
    }
    for (index, block) in bytes.chunks(1 << 16).enumerate() {
        assert_eq!(digests.sum(index as u64), Some(&sum_of(block)));
    }
}

#[test]
fn zeros_and_sizes_agree_with_reading() {
    for size in [0u64, 1, 65_535, 65_536, 65_537, 200_000] {
        let zeros = disk(vec![0; usize::try_from(size).expect("small")]);
        assert_eq!(Digests::of(&zeros, BLOCK_MIN, QUIET).expect("digests"), Digests::zero(size, BLOCK_MIN), "{size}");
    }
    let bytes: Vec<u8> = (0..200_000u32).map(|i| u8::try_from(i % 251).expect("small")).collect();
    for (from, to) in [(200_000, 100_000), (100_000, 200_000), (65_536, 131_072), (131_072, 65_536)] {
        let (old, new) = (disk(bytes[..from].to_vec()), disk(bytes[..to].to_vec()));
        let mut digests = Digests::of(&old, BLOCK_MIN, QUIET).expect("digests");
        digests.resize(to as u64);
        let edge = (from.min(to) / 65_536 * 65_536) as u64;
        digests.refresh(&new, &std::iter::once(edge..to as u64).collect()).expect("refresh");
        assert_eq!(digests, Digests::of(&new, BLOCK_MIN, QUIET).expect("digests"), "{from} to {to}");
    }
}
