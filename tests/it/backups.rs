//! Promise D1 for what backups leave behind: points, generations and leases, through a loss of power at any call, a
//! kill followed by one, and every call failing once.

use aquifer_tests::{
    backups::{self, Effort, Runs},
    ledger::Ledger,
    oracle::cases,
};

const CHILD: [&str; 4] = ["--exact", "--ignored", "--test-threads=1", "backups::child"];

#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn child() {
    backups::child();
}

#[test]
fn a_loss_of_power_leaves_the_old_point_or_the_new() {
    let ledger = Ledger::begin("crashes of a repository");
    let mut runs = Runs::new(&CHILD, &[], Effort { sample: 8, continue_one_in: 4 }, 1);
    runs.power(u64::from(cases(4))).unwrap_or_else(|what| panic!("{what}"));
    let tally = runs.tally;
    assert!(tally.states > 1000, "{tally:?}");
    let continued = ("of them gone on with", tally.continued);
    ledger.tell("1", &[("states", tally.states), continued, ("points", tally.points), ("kills", tally.kills)]);
}

#[test]
fn whichever_call_of_a_backup_fails_nothing_announced_is_lost() {
    let ledger = Ledger::begin("calls of a repository failed");
    let mut runs = Runs::new(&CHILD, &[], Effort { sample: 4, continue_one_in: 2 }, 2);
    let calls = runs.calls().unwrap_or_else(|what| panic!("{what}"));
    // Everything that makes something durable, and some of the rest; all of it in the long form.
    let step = if cases(1) > 1 { 1 } else { 5 };
    let durable = |name: &str| matches!(name, "fsync" | "fdatasync" | "linkat" | "renameat");
    let errors = ["EIO", "ENOSPC"];
    let chosen = calls.iter().enumerate().filter(|(at, call)| durable(&call.name) || at % step == 0);
    for (at, call) in chosen {
        runs.failing(call, errors[at % errors.len()]).unwrap_or_else(|what| panic!("{what}"));
    }
    let tally = runs.tally;
    assert!(tally.failed > 100, "{tally:?}");
    ledger.tell("2", &[("calls failed", tally.failed), ("states", tally.states)]);
}
