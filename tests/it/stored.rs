//! Promise I1 below the overlay: a damaged or misplaced block of a native layer is refused, never read; chains that
//! share a cache never see one another's bytes.

use aquifer_tests::{ledger::Ledger, oracle::cases, stored};

#[test]
fn a_damaged_or_misplaced_block_is_never_read() {
    let ledger = Ledger::begin("damages of a native layer");
    let (flipped, refused) = stored::flips(73).unwrap_or_else(|what| panic!("{what}"));
    assert!(refused * 10 > flipped * 9, "{refused} of {flipped} refused");
    let swapped = stored::swaps().unwrap_or_else(|what| panic!("{what}"));
    assert!(swapped > 100, "only {swapped} blocks were misplaced");
    ledger.tell("none", &[("bits flipped", flipped), ("refused", refused), ("blocks misplaced", swapped)]);
}

#[test]
fn chains_under_one_cache_keep_apart() {
    (0..u64::from(cases(200))).for_each(|seed| stored::random_chains(seed).unwrap_or_else(|what| panic!("{what}")));
}
