//! A disk is cut so that nothing that has changed is passed over.

use aquifer_formats::{raw::RawLayer, storage::MemoryStorage};
use aquifer_vdisk::{BlockCache, Chain};
use proptest::prelude::*;

use std::ops::Range;

use super::*;

const SIZE: u64 = (24 << 20) + 4096 + 512;
const BLOCK: u64 = 64 << 10;

fn disk() -> Disk {
    let bytes = MemoryStorage::new("disk", vec![1; usize::try_from(SIZE).expect("small")]);
    let layer = RawLayer::open(std::sync::Arc::new(bytes)).expect("a layer");
    let cache = std::sync::Arc::new(BlockCache::new(0));
    let chain = Chain::new(vec![std::sync::Arc::new(layer)], cache).expect("a chain");
    Disk::read_only("disk", std::sync::Arc::new(chain))
}

/// Cuts a disk and checks that the pieces cover it from `from` on, each kept or read as the change says.
fn check(changed: Option<&Delta>, from: u64) {
    let disk = disk();
    let mut at = from;
    for piece in Pieces::new(&disk, changed, from, BLOCK) {
        let piece = piece.expect("a piece");
        assert_eq!(piece.offset, at, "one after the other");
        at += piece.len;
        for block in (piece.offset..at).step_by(usize::try_from(BLOCK).expect("small")) {
            let dirty = changed.is_none_or(|delta| delta.contains(block));
            let wanted = if dirty { Step::Read } else { Step::Keep };
            assert_eq!(piece.step, wanted, "block at {block} of {changed:?}");
        }
    }
    assert_eq!(at, SIZE);
}

#[test]
fn every_changed_range_is_read_and_nothing_else() {
    let mib = |range: Range<u64>| range.start << 20..range.end << 20;
    check(None, 0);
    check(Some(&Delta::new()), 0);
    check(Some(&[mib(4..5), mib(9..10), mib(20..22)].into_iter().collect()), 0);
    check(Some(&[mib(0..1), mib(2..3), mib(23..24)].into_iter().collect()), 0);
    check(Some(&[mib(1..2), mib(12..13)].into_iter().collect()), 6 << 20);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_change_is_read(ranges in prop::collection::vec((0..SIZE, 1..SIZE), 0..12), from in 0..SIZE / BLOCK) {
        let delta: Delta = ranges.iter().map(|(at, len)| *at..(at + len % (2 << 20)).min(SIZE)).collect();
        check(Some(&delta.round_out(BLOCK).clip(0..SIZE)), from * BLOCK);
    }
}
