//! A process is found again, and only that one.

use std::process::Command;

use super::*;

#[test]
fn a_process_is_known_by_its_start() {
    let own = Process::of(std::process::id()).expect("we are alive");
    assert!(own.is_alive());
    assert!(!Process { started: own.started + 1, ..own }.is_alive(), "a later process of the same number");
    assert!(!Process { boot: own.boot ^ 1, ..own }.is_alive(), "of another boot");
}

#[test]
fn a_signal_reaches_it_and_only_it() {
    let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
    let process = Process::of(child.id()).expect("alive");
    Process { started: process.started + 1, ..process }.signal(Signal::KILL).expect("refused quietly");
    assert!(!process.wait_gone(Duration::from_millis(30)), "it was not meant");
    process.signal(Signal::TERM).expect("signal");
    assert!(process.wait_gone(Duration::from_secs(5)), "a zombie counts as gone");
    child.wait().expect("reap");
    process.signal(Signal::KILL).expect("a gone process has had it");
}
