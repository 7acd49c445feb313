//! Promise I1 below the overlay: a damaged, misplaced or outdated block of a native layer is refused, never read, and
//! neither is one of a layer without its end, salvaged or not; chains that share a cache never see one another's bytes.

use aquifer_tests::{ledger::Ledger, oracle::cases, stored};

#[test]
fn a_damaged_or_misplaced_block_is_never_read() {
    let ledger = Ledger::begin("damages of a native layer");
    let (flipped, refused) = stored::flips(73).unwrap_or_else(|what| panic!("{what}"));
    assert!(refused * 10 > flipped * 9, "{refused} of {flipped} refused");
    let swapped = stored::swaps().unwrap_or_else(|what| panic!("{what}"));
    assert!(swapped > 100, "only {swapped} blocks were misplaced");
    let stale = stored::stale().unwrap_or_else(|what| panic!("{what}"));
    let (cut, salvaged) = stored::tails(997).unwrap_or_else(|what| panic!("{what}"));
    assert!(stale > 12 && salvaged * 2 > cut, "{salvaged} of {cut} could be salvaged");
    ledger.tell(
        "none",
        &[
            ("bits flipped", flipped),
            ("refused", refused),
            ("blocks misplaced", swapped),
            ("older blocks and layers put back", stale),
            ("ends cut off or blank", cut),
            ("salvaged in part", salvaged),
        ],
    );
}

#[test]
fn chains_under_one_cache_keep_apart() {
    (0..u64::from(cases(200))).for_each(|seed| stored::random_chains(seed).unwrap_or_else(|what| panic!("{what}")));
}
