//! Bugs on purpose: each is planted in turn, and the checks that run in every test must tell of it. A check that finds
//! nothing is worth nothing; this is how it is known that ours find something.
//!
//! Invariants
//! - With no bug planted every check passes.
//! - The checks are those of `tests/it`, by the same functions, with fewer cases.

#![allow(clippy::print_stdout, reason = "what caught a bug is worth reading")]

use std::{
    collections::BTreeSet,
    ffi::OsString,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicUsize, Ordering},
};

use aquifer_formats::planted::{Bug, plant};
use aquifer_tests::{
    backups::{self, Effort, Runs},
    damage,
    explore::{self, Depth},
    failing,
    faults::Failing,
    kept,
    ledger::Ledger,
    stored,
};

type Check = (&'static str, fn() -> Result<(), String>);

/// What runs against each bug, the quick ones first.
const CHECKS: [Check; 8] = [
    ("strangers", damage::strangers),
    ("pivot", damage::pivot),
    ("cut files", damage::cuts),
    ("kept writes", kept::all),
    ("stored layers", stored_layers),
    ("crashes", crashes),
    ("failing calls", failing_calls),
    ("flipped bits", || damage::flips(499).map(|_| ())),
];

fn stored_layers() -> Result<(), String> {
    stored::swaps()?;
    stored::flips(4099)?;
    (0..50).try_for_each(stored::random_chains)
}

fn crashes() -> Result<(), String> {
    let depth = Depth { subsets_of: 4, sample: 24, torn: 3 };
    (1..=400).try_for_each(|seed| explore::lives(seed, depth).map(|_| ()))
}

fn failing_calls() -> Result<(), String> {
    let mut sites = BTreeSet::new();
    (1..=3).try_for_each(|seed| failing::each_call(seed, Failing::NoSpace, &mut sites).map(|_| ()))
}

/// Bugs of what a process tells folders and files: that process has them planted too.
const OF_PROCESSES: [Bug; 10] = [
    Bug::RecordUnsynced,
    Bug::RecordNameUnsynced,
    Bug::FolderNameUnsynced,
    Bug::FolderTrusted,
    Bug::GenerationTrusted,
    Bug::LeaseUnsynced,
    Bug::LayerNameUnsynced,
    Bug::SealUnsynced,
    Bug::WaymarkUnsynced,
    Bug::NeededDeleted,
];
/// Which of them a process of this program has.
const BUG: &str = "AQUIFER_PLANTED_BUG";

#[test]
#[ignore = "run by the test below, in a process of its own"]
fn child() {
    let name = std::env::var(BUG).unwrap_or_default();
    plant(OF_PROCESSES.into_iter().find(|bug| format!("{bug:?}") == name));
    backups::child();
}

fn repository(bug: Option<Bug>) -> Result<(), String> {
    let name = OsString::from(format!("{bug:?}").trim_start_matches("Some(").trim_end_matches(')'));
    let (args, env) = (["--exact", "--ignored", "--test-threads=1", "child"], [(BUG, name.as_os_str())]);
    Runs::new(&args, &env, Effort { sample: 8, continue_one_in: 4 }, 1).power(0)
}

/// The first check that tells of a bug, and what it says.
fn caught(bug: Option<Bug>) -> Option<(&'static str, String)> {
    plant(bug);
    let of_process = bug.is_none_or(|bug| OF_PROCESSES.contains(&bug));
    let check = || repository(bug);
    let processes = of_process.then_some(("repository", &check as &dyn Fn() -> Result<(), String>));
    let all = processes.into_iter().chain(CHECKS.iter().map(|(name, check)| (*name, check as _)));
    let mut all = all.map(|(name, check)| (name, catch_unwind(AssertUnwindSafe(check))));
    let told = all.find_map(|(name, done)| match done {
        Ok(Ok(())) => None,
        Ok(Err(what)) => Some((name, what)),
        Err(_) => Some((name, "a panic".to_owned())),
    });
    plant(None);
    told
}

#[test]
fn every_planted_bug_is_caught() {
    let ledger = Ledger::begin("planted bugs");
    assert_eq!(caught(None), None, "with nothing planted");
    std::panic::set_hook(Box::new(|_| {}));
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let results: Vec<_> = std::thread::scope(|scope| {
        let work = || {
            let mut out = Vec::new();
            while let Some(bug) = Bug::ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
                out.push((*bug, caught(Some(*bug))));
            }
            out
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|t| t.join().expect("a thread")).collect()
    });
    let _default = std::panic::take_hook();
    let missed: Vec<_> = results.iter().filter(|(_, told)| told.is_none()).map(|(bug, _)| bug).collect();
    for (bug, told) in &results {
        let line = |text: &str| text.lines().next().unwrap_or_default().chars().take(150).collect::<String>();
        let told = told.as_ref().map_or("NOTHING".to_owned(), |(name, what)| format!("{name}: {}", line(what)));
        println!("{bug:?} ({}) <- {told}", bug.what());
    }
    assert!(missed.is_empty(), "{} bugs nobody tells of: {missed:?}", missed.len());
    ledger.tell("1..=400", &[("planted", results.len() as u64), ("caught", (results.len() - missed.len()) as u64)]);
}
