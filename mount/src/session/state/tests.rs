//! The state machine, edge by edge.

use super::*;

#[test]
fn every_edge_is_as_drawn() {
    let drawn = [
        ("Queued", "Preparing Dismounting"),
        ("Preparing", "Mounting Failed"),
        ("Mounting", "Mounted Failed"),
        ("Mounted", "Interrupted Migrating Dismounting"),
        ("Interrupted", "Mounted Dismounting"),
        ("Migrating", "Mounted Interrupted ReadyToSwitch Migrated Dismounting"),
        ("ReadyToSwitch", "Switching Dismounting"),
        ("Switching", "Migrated Migrating"),
        ("Migrated", "Dismounting"),
        ("Dismounting", "Stopped"),
        ("Stopped", ""),
        ("Failed", "Preparing Dismounting"),
    ];
    for (from, to) in drawn {
        let from = State::ALL.into_iter().find(|s| s.to_string() == from).expect(from);
        for next in State::ALL {
            let legal = to.split(' ').any(|t| t == next.to_string());
            assert_eq!(from.to(next).is_ok(), legal, "{from} -> {next}");
        }
    }
}

#[test]
fn no_state_is_a_trap() {
    for state in State::ALL {
        let mut seen = vec![state];
        while let Some(next) = seen.iter().flat_map(|s| s.allowed()).find(|n| !seen.contains(n)).copied() {
            seen.push(next);
        }
        assert!(seen.contains(&State::Stopped), "{state} never reaches Stopped");
    }
}

#[test]
fn a_refusal_names_what_would_do() {
    let Err(Error::State { have, need, allowed }) = State::Queued.to(State::Migrated) else { panic!("refused") };
    assert_eq!(have, State::Queued);
    assert_eq!(need, [State::Migrating, State::Switching]);
    assert_eq!(allowed, [State::Preparing, State::Dismounting]);
}

#[test]
fn names_survive_json() {
    for state in State::ALL {
        let text = serde_json::to_string(&state).expect("json");
        assert_eq!(text, format!("\"{state}\""));
        assert_eq!(serde_json::from_str::<State>(&text).expect("back"), state);
    }
}
