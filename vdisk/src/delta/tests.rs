//! Sets of ranges against sets of bytes.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::Delta;

const SIZE: u64 = 200;

fn set(delta: &Delta) -> BTreeSet<u64> {
    for pair in delta.ranges().windows(2) {
        assert!(pair[0].end < pair[1].start, "sorted, disjoint, merged: {delta:?}");
    }
    assert!(delta.iter().all(|r| r.start < r.end), "no empty range: {delta:?}");
    delta.iter().flatten().collect()
}

fn pairs() -> impl Strategy<Value = Vec<(u64, u64)>> {
    proptest::collection::vec((0..SIZE, 0..20u64), 0..24)
}

fn build(pairs: &[(u64, u64)]) -> (Delta, BTreeSet<u64>) {
    let delta = pairs.iter().map(|(o, n)| *o..o + n).collect();
    (delta, pairs.iter().flat_map(|(o, n)| *o..o + n).collect())
}

proptest! {
    #[test]
    fn set_algebra_matches_a_set_of_bytes(a in pairs(), b in pairs(), block in 1..40u64) {
        let ((a, a_set), (b, b_set)) = (build(&a), build(&b));
        prop_assert_eq!(set(&a), a_set.clone());
        prop_assert_eq!(a.bytes(), a_set.len() as u64);
        prop_assert_eq!(set(&a.union(&b)), &a_set | &b_set);
        prop_assert_eq!(set(&a.intersect(&b)), &a_set & &b_set);
        prop_assert_eq!(set(&a.subtract(&b)), &a_set - &b_set);
        prop_assert_eq!(set(&a.clip(30..90)), a_set.iter().copied().filter(|x| (30..90).contains(x)).collect());
        let rounded: BTreeSet<u64> = a_set.iter().flat_map(|x| x / block * block..(x / block + 1) * block).collect();
        prop_assert_eq!(set(&a.round_out(block)), rounded);
        for x in 0..SIZE + 30 {
            prop_assert_eq!(a.contains(x), a_set.contains(&x));
            prop_assert_eq!(a.overlaps(&(x..x + 7)), (x..x + 7).any(|y| a_set.contains(&y)));
            let (inside, end) = a.run_until(x, SIZE + 30);
            prop_assert!(end > x);
            prop_assert!((x..end).all(|y| a_set.contains(&y) == inside));
        }
    }

    #[test]
    fn json_keeps_the_set(a in pairs()) {
        let (a, _) = build(&a);
        let text = serde_json::to_string(&a).expect("to json");
        prop_assert_eq!(serde_json::from_str::<Delta>(&text).expect("from json"), a);
    }
}

#[test]
fn unsorted_and_overlapping_json_is_brought_into_form() {
    let delta: Delta = serde_json::from_str("[[10,5],[0,3],[12,8],[3,2],[7,0]]").expect("from json");
    assert_eq!(delta.ranges(), [0..5, 10..20]);
}

#[test]
fn json_that_leaves_64_bits_is_refused() {
    assert!(serde_json::from_str::<Delta>("[[18446744073709551615,2]]").is_err());
}

#[test]
fn a_block_at_the_end_of_the_number_line_is_cut() {
    let delta = Delta::full(u64::MAX).round_out(4096);
    assert_eq!(delta.end(), u64::MAX);
}
