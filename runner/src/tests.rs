//! The frame: what happens before a verb runs.

use super::*;

fn args(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

#[test]
fn json_is_seen_before_the_command_line_is_understood() {
    assert!(asks_for_json(&args(&["aquifer", "nonsense", "--json"])));
    assert!(!asks_for_json(&args(&["aquifer", "mount", "x", "--", "--json"])));
    assert!(!asks_for_json(&args(&["--json"])), "the program's own name is no option");
}

#[test]
fn usage_errors_exit_four_help_exits_zero() {
    assert_eq!(run(&args(&["aquifer", "nonsense"])), 4);
    assert_eq!(run(&args(&["aquifer", "info"])), 4);
    assert_eq!(run(&args(&["aquifer"])), 4);
    assert_eq!(run(&args(&["aquifer", "info", "x", "--rubbish", "--json"])), 4);
    assert_eq!(run(&args(&["aquifer", "--version"])), 0);
    assert_eq!(run(&args(&["aquifer", "mount", "--help"])), 0);
}
