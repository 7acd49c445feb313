//! Promise: a chain reads as the restore point it stands for, whatever its layers are, however deep
//! it is; what is damaged is an error in just that range; a delta never misses a byte.

#![expect(clippy::cast_possible_truncation, reason = "test disks are small")]

use std::{
    sync::{Arc, Barrier},
    time::Duration,
};

use aquifer_formats::{Content, Layer};
use aquifer_tests::{
    door,
    foreign::pbs,
    oracle::{Oracle, cases},
    rng::Rng,
    synthetic::{Kind, Plan, Synthetic, Write},
};
use aquifer_vdisk::{BlockCache, Chain, ChainSpec, Delta, Extent, ExtentKind, delta_between, open_chain};
use proptest::prelude::*;

fn write_plan(size_max: u64) -> impl Strategy<Value = Write> {
    let kind = prop_oneof![3 => Just(Kind::Plain), 4 => Just(Kind::Packed), 2 => Just(Kind::Zero)];
    let len = prop_oneof![8 => 1..4096u64, 3 => 4096..65536u64, 1 => 65536..size_max.max(65537)];
    (0..size_max, len, kind).prop_map(|(offset, len, kind)| Write { offset, len, kind })
}

fn plan(size_max: u64, writes_max: usize) -> impl Strategy<Value = Plan> {
    // Mostly the same size, sometimes cut or grown, sometimes to an odd byte.
    let size = prop_oneof![5 => Just(size_max), 1 => 1..size_max, 2 => (1..size_max / 512).prop_map(|s| s * 512)];
    let grain_log2 = prop_oneof![3 => Just(9u32), 2 => Just(12), 2 => 9..14u32, 1 => Just(16)];
    let writes = proptest::collection::vec(write_plan(size_max), 0..writes_max);
    (size, grain_log2, 0..4u32, prop::bool::weighted(0.2), 1..40u64, writes).prop_map(
        |(size, grain_log2, block_grains_log2, checked, run_grains_max, writes)| Plan {
            size,
            grain_log2,
            block_grains_log2,
            checked,
            run_grains_max,
            writes,
        },
    )
}

/// A few layers of up to 6 MiB (more than one window of 512-byte grains), or many small ones.
fn plans() -> impl Strategy<Value = Vec<Plan>> {
    prop_oneof![
        4 => proptest::collection::vec(plan(256 * 1024, 6), 1..8),
        2 => proptest::collection::vec(plan(6 << 20, 10), 1..5),
        1 => proptest::collection::vec(plan(128 * 1024, 3), 20..200),
    ]
}

/// Layers oldest first, with the bytes of every point.
fn build(plans: &[Plan]) -> (Vec<Arc<Synthetic>>, Vec<Oracle>) {
    let mut disk = Oracle::new(0);
    let mut points = Vec::new();
    let mut layers = Vec::new();
    for (salt, plan) in plans.iter().enumerate() {
        layers.push(Arc::new(Synthetic::build(plan.clone(), salt as u64 + 1, &mut disk)));
        points.push(disk.clone());
    }
    (layers, points)
}

/// The chain of the point that `layers` (oldest first) end in.
fn chain(layers: &[Arc<Synthetic>], cache_bytes: u64) -> Chain {
    let newest_first = layers.iter().rev().map(|l| l.clone() as Arc<dyn Layer>).collect();
    Chain::new(newest_first, Arc::new(BlockCache::new(cache_bytes))).expect("a chain")
}

/// What a plain walk over the layers says; shares nothing with the chain under test.
fn walk(layers: &[Arc<Synthetic>], offset: u64) -> (Option<usize>, Content) {
    for (index, layer) in layers.iter().rev().enumerate() {
        if offset >= layer.size() {
            return (None, Content::Zero);
        }
        match layer.lookup(offset, 1).expect("a good table").0 {
            Content::Absent => {}
            Content::Zero => return (None, Content::Zero),
            content => return (Some(index), content),
        }
    }
    (None, Content::Absent)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(48), ..ProptestConfig::default() })]

    #[test]
    fn every_read_equals_the_oracle(
        plans in plans(),
        cache_bytes in prop_oneof![Just(0u64), Just(40_000), Just(8 << 20)],
        reads in proptest::collection::vec((any::<u64>(), 1..70_000u64), 1..60),
    ) {
        let (layers, points) = build(&plans);
        let (disk, chain) = (&points[points.len() - 1], chain(&layers, cache_bytes));
        prop_assert_eq!(chain.size(), disk.size() as u64);
        for (offset, len) in reads {
            let offset = offset % chain.size();
            let len = len.min(chain.size() - offset) as usize;
            let wanted = disk.read(offset as usize, len);
            let mut now = vec![0xAA; len];
            if chain.read_now(offset, &mut now).expect("in range") {
                prop_assert_eq!(&now[..], wanted, "read_now {}+{}", offset, len);
            }
            let mut soon = vec![0xAA; len];
            if offset % 3 == 0 && chain.read_soon(offset, &mut soon).expect("in range") {
                prop_assert_eq!(&soon[..], wanted, "read_soon {}+{}", offset, len);
            }
            let mut bytes = vec![0xAA; len];
            chain.read(offset, &mut bytes).expect("a good chain");
            prop_assert_eq!(&bytes[..], wanted, "read {}+{}", offset, len);
            prop_assert!(chain.cache().stats().resident_bytes <= cache_bytes);
        }
        chain.prefetch(0, chain.size());
        let mut all = vec![0xAA; disk.size()];
        chain.read(0, &mut all).expect("a good chain");
        prop_assert!(all == disk.bytes(), "one large read");
    }

    #[test]
    fn the_map_answers_what_a_walk_would(plans in plans(), at in proptest::collection::vec(any::<u64>(), 200)) {
        let (layers, _) = build(&plans);
        let chain = chain(&layers, 0);
        for offset in at.into_iter().map(|at| at % chain.size()) {
            let (index, content, len) = chain.resolve(offset, u64::MAX).expect("a good chain");
            prop_assert!(len >= 1 && offset + len <= chain.size());
            let (wanted_index, wanted) = walk(&layers, offset);
            prop_assert_eq!(content, wanted, "at {}", offset);
            prop_assert_eq!(index, wanted_index.unwrap_or(layers.len()), "at {}", offset);
            // The answer holds to its last byte.
            let last = offset + len - 1;
            let (_, wanted) = walk(&layers, last);
            let by = len - 1;
            let moved = match content {
                Content::Plain { file, offset } => Content::Plain { file, offset: offset + by },
                Content::Packed { block, skip } => Content::Packed { block, skip: skip + u32::try_from(by).expect("in a block") },
                same => same,
            };
            prop_assert_eq!(moved, wanted, "at {}, the end of {}+{}", last, offset, len);
        }
    }

    #[test]
    fn extents_are_whole_in_order_and_true(plans in plans()) {
        let (layers, points) = build(&plans);
        let (disk, chain) = (&points[points.len() - 1], chain(&layers, 0));
        let mut extents: Vec<Extent> = Vec::new();
        chain.extents(0, u64::MAX, &mut extents).expect("a good chain");
        let mut at = 0;
        for pair in extents.windows(2) {
            prop_assert_ne!(pair[0].kind, pair[1].kind, "merged");
        }
        for extent in &extents {
            prop_assert_eq!(extent.offset, at);
            prop_assert!(extent.len > 0);
            let zero = disk.read(at as usize, extent.len as usize).iter().all(|b| *b == 0);
            match extent.kind {
                ExtentKind::Data => prop_assert!(!zero, "synthetic data is never zero"),
                ExtentKind::Zero | ExtentKind::Hole => prop_assert!(zero),
            }
            at += extent.len;
        }
        prop_assert_eq!(at, chain.size());
    }

    #[test]
    fn a_delta_misses_nothing(
        plans in plans(),
        branch in proptest::collection::vec(plan(256 * 1024, 6), 0..4),
        from in any::<prop::sample::Index>(),
        fork in any::<prop::sample::Index>(),
    ) {
        let (trunk, points) = build(&plans);
        let (from, fork) = (from.index(trunk.len()), fork.index(trunk.len()));
        let (mut layers, mut disk) = (trunk[..=fork].to_vec(), points[fork].clone());
        for (salt, plan) in branch.into_iter().enumerate() {
            layers.push(Arc::new(Synthetic::build(plan, 1000 + salt as u64, &mut disk)));
        }
        let ends = [(&trunk[..=from], &points[from]), (&layers[..], &disk)];
        for [(old_layers, old_disk), (new_layers, new_disk)] in [[ends[0], ends[1]], [ends[1], ends[0]]] {
            let (old, new) = (chain(old_layers, 0), chain(new_layers, 0));
            let delta = delta_between(&old, &new).expect("a good chain");
            prop_assert!(delta.end() <= new.size());
            let mut replica = old_disk.clone();
            replica.resize(new_disk.size());
            for range in &delta {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                new.read(range.start, &mut bytes).expect("a good chain");
                replica.write(range.start as usize, &bytes);
            }
            prop_assert!(replica == *new_disk, "from {} to a branch of {}", from, fork);
        }
        let same = chain(&layers, 0);
        prop_assert_eq!(delta_between(&same, &same).expect("a good chain"), Delta::new());
    }
}

fn layer(size: u64, writes: &[(u64, u64, Kind)]) -> Plan {
    let writes = writes.iter().map(|(offset, len, kind)| Write { offset: *offset, len: *len, kind: *kind }).collect();
    Plan { size, grain_log2: 12, block_grains_log2: 4, checked: false, run_grains_max: 64, writes }
}

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 65536;

#[test]
fn a_bad_block_fails_just_its_range() {
    let mut disk = Oracle::new(0);
    let below = Synthetic::build(layer(MIB, &[(0, MIB, Kind::Packed)]), 1, &mut disk).with_bad_block(3 * BLOCK);
    let above = Synthetic::build(layer(MIB, &[(3 * BLOCK, 4096, Kind::Plain)]), 2, &mut disk);
    let chain = chain(&[Arc::new(below), Arc::new(above)], MIB);
    for at in (0..MIB).step_by(4096) {
        let mut page = vec![0; 4096];
        let read = chain.read(at, &mut page);
        let hidden = at == 3 * BLOCK;
        if (3 * BLOCK..4 * BLOCK).contains(&at) && !hidden {
            let error = read.expect_err("a bad block").to_string();
            assert!(error.contains("layer-1") && error.contains("196608"), "names file and offset: {error}");
        } else {
            read.expect("a good block");
            assert_eq!(page, disk.read(at as usize, 4096));
        }
    }
    let mut all = vec![0; MIB as usize];
    assert!(chain.read(0, &mut all).is_err(), "a large read over it fails too");
    chain.read(4 * BLOCK, &mut all[..8 * BLOCK as usize]).expect("a large read beside it");
    assert_eq!(all[..8 * BLOCK as usize], *disk.read(4 * BLOCK as usize, 8 * BLOCK as usize));
}

#[test]
fn a_bad_table_fails_just_what_needs_it() {
    let mut disk = Oracle::new(0);
    let lowest = Synthetic::build(layer(MIB, &[(0, MIB, Kind::Packed)]), 1, &mut disk);
    let bad =
        Synthetic::build(layer(MIB, &[(0, 2 * BLOCK, Kind::Plain)]), 2, &mut disk).with_bad_table(3 * BLOCK..5 * BLOCK);
    let above = Synthetic::build(layer(MIB, &[(4 * BLOCK, BLOCK, Kind::Packed)]), 3, &mut disk);
    let chain = chain(&[Arc::new(lowest), Arc::new(bad), Arc::new(above)], MIB);
    for at in (0..MIB).step_by(4096) {
        let mut page = vec![0; 4096];
        let read = chain.read(at, &mut page);
        if (3 * BLOCK..4 * BLOCK).contains(&at) {
            assert!(read.expect_err("a bad table").to_string().contains("layer-2"));
        } else {
            read.expect("needs no bad table");
            assert_eq!(page, disk.read(at as usize, 4096));
        }
    }
}

#[test]
fn a_source_that_was_away_is_asked_again() {
    let mut disk = Oracle::new(0);
    let below = Arc::new(Synthetic::build(layer(MIB, &[(0, MIB, Kind::Plain)]), 1, &mut disk));
    let above = Arc::new(Synthetic::build(layer(MIB, &[(0, BLOCK, Kind::Plain)]), 2, &mut disk));
    let chain = chain(&[below.clone(), above], MIB);
    let mut page = vec![0; 4096];
    below.leave_for(3);
    chain.read(0, &mut page).expect("the layer above is there");
    assert_eq!(page, disk.read(0, 4096));
    assert!(!chain.read_now(0, &mut page).expect("in range"), "no map was kept");
    assert!(chain.read(BLOCK, &mut page).is_err(), "away");
    chain.read(BLOCK, &mut page).expect("back");
    assert_eq!(page, disk.read(BLOCK as usize, 4096));
    assert!(chain.read_now(BLOCK, &mut page).expect("in range"), "mapped now");
}

#[test]
fn a_shorter_layer_hides_what_is_below_its_end() {
    let mut disk = Oracle::new(0);
    let layers: Vec<_> = [
        layer(MIB, &[(0, MIB, Kind::Packed)]),
        layer(300_001, &[(0, 4096, Kind::Plain)]),
        layer(MIB, &[(900_000, 4096, Kind::Plain)]),
    ]
    .into_iter()
    .enumerate()
    .map(|(salt, plan)| Arc::new(Synthetic::build(plan, salt as u64 + 1, &mut disk)))
    .collect();
    let chain = chain(&layers, MIB);
    let mut all = vec![0xAA; MIB as usize];
    chain.read(0, &mut all).expect("a good chain");
    assert!(all == disk.bytes());
    assert!(all[300_001..897_024].iter().all(|b| *b == 0), "bytes cut off years ago stay dead");
}

#[test]
fn one_decode_however_many_wait() {
    let mut disk = Oracle::new(0);
    let plan = layer(MIB, &[(0, MIB, Kind::Packed)]);
    let layer = Arc::new(Synthetic::build(plan, 1, &mut disk).slow(Duration::from_millis(100)));
    let chain = chain(std::slice::from_ref(&layer), 4 * MIB);
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for reader in 0..8u64 {
            let (chain, start, disk) = (&chain, &start, &disk);
            scope.spawn(move || {
                start.wait();
                let (at, mut page) = (reader * 1000, [0; 500]);
                chain.read(at, &mut page).expect("a good block");
                assert_eq!(page, disk.read(at as usize, 500));
            });
        }
    });
    assert_eq!((layer.unpacks(), layer.scans()), (1, 1), "one decode, one reading of the table");
    let stats = chain.cache().stats();
    assert_eq!((stats.decodes, stats.hits + stats.waits), (1, 7));
    assert_eq!(stats.decoded_bytes, 16384, "only as far as was asked for");
}

#[test]
fn many_readers_of_a_fresh_chain_see_one_disk() {
    for round in 0..u64::from(cases(8)) {
        let mut disk = Oracle::new(0);
        let kinds = [Kind::Packed, Kind::Plain, Kind::Zero];
        let layers: Vec<_> = (0..20u64)
            .map(|salt| {
                let writes: Vec<_> = (0..6)
                    .map(|i| ((salt * 131 + i * 977 + round) * 4096, 30_000, kinds[(salt + i) as usize % 3]))
                    .collect();
                Arc::new(Synthetic::build(layer(2 * MIB, &writes), salt + 1, &mut disk))
            })
            .collect();
        let (chain, start) = (chain(&layers, 300_000), Barrier::new(6));
        std::thread::scope(|scope| {
            for reader in 0..6u64 {
                let (chain, start, disk) = (&chain, &start, &disk);
                scope.spawn(move || {
                    let mut rng = Rng::new(round * 100 + reader);
                    start.wait();
                    for _ in 0..300 {
                        let at = rng.below(2 * MIB);
                        let mut part = vec![0xAA; (1 + rng.below(9000)).min(2 * MIB - at) as usize];
                        let done = rng.once_in(3) && chain.read_now(at, &mut part).expect("in range");
                        if !done {
                            chain.read(at, &mut part).expect("a good chain");
                        }
                        assert!(part == disk.read(at as usize, part.len()), "{at}+{}", part.len());
                    }
                });
            }
        });
        assert!(chain.cache().stats().resident_bytes <= 300_000);
        assert_eq!(chain.map_bytes(), 2 * MIB / 4096 * 8, "one window, once");
    }
}

#[test]
fn a_page_past_the_kept_prefix_decodes_the_rest_once() {
    let mut disk = Oracle::new(0);
    let layer = Arc::new(Synthetic::build(layer(MIB, &[(0, MIB, Kind::Packed)]), 1, &mut disk));
    let chain = chain(std::slice::from_ref(&layer), 4 * MIB);
    let mut page = [0; 4096];
    for (at, unpacks) in [(0, 1), (12_288, 1), (20_480, 2), (61_440, 2), (0, 2), (BLOCK, 3)] {
        chain.read(at, &mut page).expect("a good block");
        assert_eq!(page, disk.read(at as usize, 4096));
        assert_eq!(layer.unpacks(), unpacks, "after {at}");
    }
    assert!(chain.read_now(40_960, &mut page).expect("in range"), "the rest is kept");
    assert!(!chain.read_now(2 * BLOCK, &mut page).expect("in range"), "never decoded");
    chain.prefetch(2 * BLOCK, BLOCK);
    assert!(chain.read_now(2 * BLOCK + 60_000, &mut page).expect("in range"), "fetched ahead, whole");
    assert_eq!(page, disk.read(2 * BLOCK as usize + 60_000, 4096));
}

#[test]
fn the_budget_holds_and_what_is_too_large_for_it_still_reads() {
    let mut disk = Oracle::new(0);
    let layer = Arc::new(Synthetic::build(layer(8 * MIB, &[(0, 8 * MIB, Kind::Packed)]), 1, &mut disk));
    for budget in [0, 5_000, 100_000, 1_000_000] {
        let chain = chain(std::slice::from_ref(&layer), budget);
        for at in (0..8 * MIB).step_by(16384) {
            let mut page = [0; 4096];
            chain.read(at, &mut page).expect("a good block");
            assert_eq!(page, disk.read(at as usize, 4096));
            let stats = chain.cache().stats();
            assert!(stats.resident_bytes <= budget, "{stats:?} over {budget}");
        }
        let stats = chain.cache().stats();
        assert_eq!(stats.blocks > 0, budget >= 100_000, "{stats:?} with {budget}");
    }
}

#[test]
fn a_large_read_pushes_nothing_out_and_takes_what_is_kept() {
    let mut disk = Oracle::new(0);
    let layer = Arc::new(Synthetic::build(layer(MIB, &[(0, MIB, Kind::Packed)]), 1, &mut disk));
    let chain = chain(std::slice::from_ref(&layer), 10 * BLOCK);
    chain.prefetch(12 * BLOCK, BLOCK);
    let (mut all, mut page) = (vec![0; MIB as usize], [0; 4096]);
    for turn in 1..=3 {
        chain.read(0, &mut all).expect("a good chain");
        assert!(all == disk.bytes());
        let stats = chain.cache().stats();
        assert!(
            stats.resident_bytes <= 10 * BLOCK / 8 * 7 && stats.blocks >= 7,
            "as much as there is room for: {stats:?}"
        );
        assert!(chain.read_now(12 * BLOCK, &mut page).expect("in range"), "still kept");
        assert_eq!(layer.unpacks(), 1 + 7 + turn * 8, "what is kept is not decoded again");
    }
}

#[test]
fn a_copy_that_reads_once_leaves_the_cache_as_it_was() {
    let mut disk = Oracle::new(0);
    let layer = Arc::new(Synthetic::build(layer(MIB, &[(0, MIB, Kind::Packed)]), 1, &mut disk));
    let chain = chain(std::slice::from_ref(&layer), 4 * MIB);
    chain.prefetch(3 * BLOCK, BLOCK);
    let before = chain.cache().stats();
    for at in (0..MIB).step_by(2 * BLOCK as usize) {
        let mut run = vec![0; 2 * BLOCK as usize];
        chain.read_once(at, &mut run).expect("a good chain");
        assert_eq!(run, disk.read(at as usize, 2 * BLOCK as usize));
    }
    let after = chain.cache().stats();
    assert_eq!((after.blocks, after.resident_bytes), (before.blocks, before.resident_bytes));
    assert_eq!(layer.unpacks(), MIB / BLOCK, "what is kept is not decoded again");
}

#[test]
fn a_wrong_pointer_to_a_kept_block_is_found_out() {
    let mut disk = Oracle::new(0);
    for checked in [false, true] {
        let plan = Plan { checked, ..layer(MIB, &[(0, MIB, Kind::Packed)]) };
        let layer = Synthetic::build(plan, 1, &mut disk).with_wrong_pointer(BLOCK);
        let chain = chain(&[Arc::new(layer)], 4 * MIB);
        let mut block = vec![0; BLOCK as usize];
        chain.read(0, &mut block).expect("the block it points to");
        assert_eq!(chain.resolve(0, u64::MAX).expect("a good table").2, BLOCK, "two blocks, though they look alike");
        let error = chain.read(BLOCK, &mut block).expect_err("another block's bytes");
        assert!(error.to_string().contains("identity"), "{error}");
        assert!(!chain.read_now(BLOCK, &mut block).expect("in range"));
    }
}

#[test]
fn reads_outside_the_disk_are_refused() {
    let mut disk = Oracle::new(0);
    let chain = chain(&[Arc::new(Synthetic::build(layer(5000, &[]), 1, &mut disk))], 0);
    for (offset, len) in [(5000, 1), (4999, 2), (u64::MAX, 1), (u64::MAX - 1, 2)] {
        let mut buf = vec![0; len];
        assert!(chain.read(offset, &mut buf).is_err(), "{offset}+{len}");
        assert!(chain.read_now(offset, &mut buf).is_err(), "{offset}+{len}");
        assert!(chain.resolve(offset.max(5000), len as u64).is_err(), "{offset}+{len}");
        chain.prefetch(offset, len as u64);
    }
    chain.read(5000, &mut []).expect("nothing, at the end");
    assert!(Chain::new(Vec::new(), Arc::new(BlockCache::new(0))).is_err(), "no layer");
}

#[test]
fn the_fingerprint_tells_chains_apart() {
    let mut disk = Oracle::new(0);
    let layers: Vec<_> = (1..4).map(|salt| Arc::new(Synthetic::build(layer(MIB, &[]), salt, &mut disk))).collect();
    let print = |layers: &[Arc<Synthetic>]| chain(layers, 0).fingerprint().expect("readable");
    let [a, b, c] = [&layers[0], &layers[1], &layers[2]].map(Arc::clone);
    assert_eq!(print(&[a.clone(), b.clone()]), print(&[a.clone(), b.clone()]));
    assert_ne!(print(&[a.clone(), b.clone()]), print(&[b.clone(), a.clone()]));
    assert_ne!(print(&[a.clone(), b.clone()]), print(&[a.clone(), b.clone(), c]));
    assert_ne!(print(&[a]), print(&[b]));
}

#[test]
fn a_read_that_must_not_wait_decodes_only_what_is_in_memory() {
    let mut disk = Oracle::new(0);
    let layer = Arc::new(Synthetic::build(layer(MIB, &[(0, MIB, Kind::Packed)]), 1, &mut disk));
    let chain = chain(std::slice::from_ref(&layer), 4 * MIB);
    let mut page = [0; 4096];
    assert!(!chain.read_soon(0, &mut page).expect("in range"), "no map was kept");
    chain.read(0, &mut page).expect("a good block");
    assert!(chain.read_soon(3 * BLOCK + 4096, &mut page).expect("in range"));
    assert_eq!(page, disk.read(3 * BLOCK as usize + 4096, 4096));
    assert!(chain.read_now(3 * BLOCK + 4096, &mut page).expect("in range"), "it was kept");
    assert!(chain.read_soon(3 * BLOCK + 40_960, &mut page).expect("in range"), "past what was kept");
    assert_eq!(page, disk.read(3 * BLOCK as usize + 40_960, 4096));
}

#[test]
fn a_large_block_is_decoded_once_however_small_the_reads_also_where_the_cache_is_full() {
    const CHUNK: usize = 4 << 20;
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = door::pattern(18 * CHUNK, 5);
    pbs::snapshot(folder.path(), "2026-11-01T00:00:00Z", 9, CHUNK, &[("d", &bytes)]);
    let path = folder.path().join("vm/100/2026-11-01T00:00:00Z/d.img.fidx");
    // Room for eight of them at most.
    let cache = Arc::new(BlockCache::new(32 << 20));
    let nobody = |uri: &str| panic!("{uri}");
    let chain = open_chain(&ChainSpec::Snapshot { path, key: None }, Arc::clone(&cache), &nobody).expect("a snapshot");
    let mut part = vec![0; 256 << 10];
    for at in (0..bytes.len()).step_by(part.len()) {
        chain.read(at as u64, &mut part).expect("read");
        assert!(part == bytes[at..at + part.len()], "at {at}");
    }
    assert_eq!(cache.stats().decodes, 18);
}
