//! The table of states has no dead end and allows nothing that behaviour does not.

use std::collections::{HashSet, VecDeque};

use super::*;

/// States that only an operation under way is in: the operation itself is the way out.
const PASSING: [State; 2] = [State::Processing, State::Verifying];

#[test]
fn every_state_is_reached_and_left() {
    let mut seen = HashSet::from([State::Absent]);
    let mut next = VecDeque::from([State::Absent]);
    while let Some(state) = next.pop_front() {
        for op in state.allowed() {
            let arrow = state.step(op).expect("it is allowed");
            for to in [arrow.during, arrow.success, arrow.failure] {
                if seen.insert(to) {
                    next.push_back(to);
                }
            }
        }
    }
    assert_eq!(seen.len(), State::ALL.len(), "reached: {seen:?}");
    for state in State::ALL {
        let stays = state.is_final() || PASSING.contains(&state);
        assert_eq!(state.allowed().is_empty(), stays, "{state}");
    }
}

#[test]
fn what_is_not_in_the_table_is_refused_with_what_is() {
    for state in State::ALL {
        for op in Op::ALL {
            match state.step(op) {
                Ok(_) => assert!(state.allowed().contains(&op)),
                Err(refusal) => {
                    assert_eq!((refusal.have, refusal.op), (state, op));
                    assert_eq!(refusal.allowed, state.allowed());
                    assert!(!refusal.need.contains(&state));
                    assert!(refusal.need.iter().all(|needed| needed.step(op).is_ok()), "{op}");
                    let fail = Fail::from(refusal);
                    assert_eq!(fail.code, Code::State);
                    assert!(fail.what.contains(state.name()) && fail.what.contains(op.name()));
                }
            }
        }
    }
}

#[test]
fn a_replica_that_serves_is_not_replicated() {
    for state in State::ALL {
        let runs = state.step(Op::Replicate).is_ok();
        assert_eq!(runs, matches!(state, State::Absent | State::Ready), "{state}");
        assert!(!(runs && state.holds_replication()));
    }
}

#[test]
fn names_are_those_of_the_records() {
    for state in State::ALL {
        assert_eq!(serde_json::to_value(state).expect("json"), state.name());
    }
    for op in Op::ALL {
        assert_eq!(serde_json::to_value(op).expect("json"), op.name());
    }
}
