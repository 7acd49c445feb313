//! Promises D1 and D2: after a crash at any point, with any subset of what was not synced lost or torn,
//! everything flushed is there, everything else is old or new, and every changed block is dirty.
//! `explore` holds the machinery; here are how much of it is run, and the histories that once failed.

use aquifer_tests::{
    explore::{self, Depth},
    guest::Act,
    ledger::Ledger,
    oracle::{cases, first_seed},
};

fn flushed_writes(blocks: std::ops::Range<usize>) -> Vec<Act> {
    blocks.flat_map(|b| [Act::Write { first: 8 * b, count: 8 }, Act::Flush]).collect()
}

fn states_of(acts: &[Act]) -> u64 {
    explore::scripted(acts, Depth::default()).unwrap_or_else(|what| panic!("{what}")).states
}

/// A block is hydrated, written and flushed, then trimmed without a flush; the half of the journal that
/// has its bytes is freed before the trim is durable. It must not be found as it was hydrated.
#[test]
fn a_trim_meets_its_older_record() {
    let mut acts = vec![Act::Hydrate { first: 0, count: 128 }, Act::Seal];
    acts.extend(flushed_writes(0..6));
    acts.extend([Act::Zero { first: 0, count: 8, keep: false }, Act::Seal]);
    assert!(states_of(&acts) > 50);
}

/// Bytes in a record, then newer ones stored in place and flushed: replay must not bring the older back.
#[test]
fn bytes_in_place_outlive_an_older_record() {
    let mut acts = flushed_writes(0..2);
    acts.push(Act::Hydrate { first: 0, count: 128 });
    acts.push(Act::Drain);
    acts.extend(flushed_writes(0..2));
    assert!(states_of(&acts) > 30);
}

#[test]
fn no_crash_loses_a_flush_or_forgets_a_change() {
    let ledger = Ledger::begin("crash states in memory");
    let first = first_seed();
    let lives = u64::from(cases(1800));
    let tally = explore::many(first..first + lives, Depth::default()).unwrap_or_else(|what| panic!("{what}"));
    let seeds = format!("{first}..{}", first + lives);
    ledger.tell(&seeds, &[("states", tally.states), ("cuts judged", tally.judged), ("points", tally.points)]);
    let promised = 1_000_000 * u64::from(cases(1));
    assert!(tally.states >= promised, "{tally:?}: the histories have become too short to prove anything");
}
