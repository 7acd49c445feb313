//! Deltas over so many leaves that pages are read in runs by several threads.
//!
//! The promise: they say exactly what a walk of single blocks would say, read few and large pieces, and a
//! damaged id page is an error that names the file.

use std::ops::Range;

use super::{entry::LeafRef, *};
use crate::Error;

const GRAIN: u64 = 16 << 10;
const LEAVES: u64 = 1500;

/// A point in which `leaves` have a block of their own, `seed` apart from other points.
fn point(chain: &mut Chain, parent: Option<&Arc<Reader>>, leaves: impl Iterator<Item = u64>, seed: u8) -> Arc<Reader> {
    let new = match parent {
        Some(parent) => NewLayer::increment(Arc::clone(parent), parent.label(), key()),
        None => NewLayer::full(LEAVES * LEAF_ENTRIES as u64 * GRAIN, key()),
    };
    chain.point(new, options(), |writer| {
        for leaf in leaves {
            let mut block = vec![seed; usize::try_from(GRAIN).expect("small")];
            block[..8].copy_from_slice(&leaf.to_le_bytes());
            writer.put(leaf * LEAF_ENTRIES as u64 + leaf % 7, &block).expect("put");
        }
    })
}

fn blocks(leaves: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let block = |leaf: u64| leaf * LEAF_ENTRIES as u64 + leaf % 7;
    leaves.map(|leaf| block(leaf) * GRAIN..(block(leaf) + 1) * GRAIN).collect()
}

#[test]
fn a_delta_of_many_leaves_is_exact_and_reads_in_runs() {
    let mut chain = Chain::new();
    let first = point(&mut chain, None, 0..LEAVES, 1);
    let all = point(&mut chain, Some(&first), 0..LEAVES, 2);
    let (reads, _) = chain.count(|| assert_eq!(delta(&first, &all).expect("delta"), blocks(0..LEAVES)));
    assert!(reads < LEAVES / 10, "{reads} reads for {LEAVES} leaves");
    // Gaps, leaves that are read for nothing, and leaves that one side does not have.
    let some = point(&mut chain, Some(&all), (0..LEAVES).filter(|leaf| leaf % 3 != 0), 3);
    assert_eq!(delta(&all, &some).expect("delta"), blocks((0..LEAVES).filter(|leaf| leaf % 3 != 0)));
    let back = point(&mut chain, Some(&some), 0..LEAVES, 2);
    assert_eq!(delta(&all, &back).expect("delta"), vec![], "other pages, equal ids");
    let few = point(&mut chain, None, (0..LEAVES).step_by(2), 1);
    assert_eq!(delta(&few, &first).expect("delta"), blocks((1..LEAVES).step_by(2)));
    assert_eq!(delta(&first, &few).expect("delta"), blocks((1..LEAVES).step_by(2)));
}

#[test]
fn a_damaged_id_page_ends_a_delta() {
    let mut chain = Chain::new();
    let first = point(&mut chain, None, 0..LEAVES, 1);
    let all = point(&mut chain, Some(&first), 0..LEAVES, 2);
    for leaf in [0, 700, LEAVES - 1] {
        let LeafRef::Pages(pages) = all.root().leaf_ref(leaf).expect("in the map") else {
            panic!("leaf {leaf} is zero")
        };
        let storage = chain.storage(all.label());
        let at = pages.ids.offset + 100;
        let mut byte = [0];
        storage.read_at(at, &mut byte).expect("read");
        storage.write_at(at, &[byte[0] ^ 1]).expect("write");
        match delta(&first, &all) {
            Err(Error::BadBlock { path, offset, .. }) => {
                assert_eq!((path.as_str(), offset), (all.label(), pages.ids.offset))
            }
            other => panic!("{other:?}"),
        }
        storage.write_at(at, &byte).expect("write");
    }
    assert!(delta(&first, &all).is_ok());
}
