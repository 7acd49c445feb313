//! The tree of verbs keeps its promises.

use std::collections::BTreeSet;

use super::*;

#[test]
fn the_tree_is_sound() {
    command().debug_assert();
}

#[test]
fn every_verb_stands_in_one_group() {
    let listed: Vec<&str> = GROUPS.iter().flat_map(|(_, verbs)| verbs.iter().copied()).collect();
    let set: BTreeSet<&str> = listed.iter().copied().collect();
    assert_eq!(set.len(), listed.len(), "a verb is listed twice");
    let command = command();
    let tree: BTreeSet<&str> = command.get_subcommands().filter(|s| !s.is_hide_set()).map(Command::get_name).collect();
    assert_eq!(tree, set);
}

#[test]
fn aliases_resolve_and_stay_hidden() {
    let command = command();
    for (alias, verb) in [("restore", "recover"), ("snapshots", "points"), ("list", "points"), ("check", "verify")] {
        assert_eq!(command.find_subcommand(alias).map(Command::get_name), Some(verb));
        assert_eq!(verb_among(&["aquifer".into(), "-r".into(), "info".into(), alias.into()]), verb);
    }
    let help = super::command().render_long_help().to_string();
    for alias in ["restore", "snapshots", "list", "check"] {
        let shown = help.lines().any(|line| line.trim_start().split(' ').next() == Some(alias));
        assert!(!shown, "{alias} shows in:\n{help}");
    }
}

/// X11: `--json` on every verb; X5: `-n` wherever something changes.
#[test]
fn every_verb_takes_json_and_every_changing_verb_a_dry_run() {
    let changing = ["mount", "recover", "finalize", "init", "backup", "forget", "export", "bench"];
    let mut command = command();
    command.build();
    let has = |sub: &Command, long: &str| sub.get_arguments().any(|a| a.get_long() == Some(long));
    for sub in command.get_subcommands() {
        assert!(has(sub, "json"), "{} without --json", sub.get_name());
        if changing.contains(&sub.get_name()) {
            assert!(has(sub, "dry-run"), "{} without --dry-run", sub.get_name());
        }
    }
    let session = command.find_subcommand("session").expect("session");
    assert!(session.get_subcommands().all(|sub| has(sub, "dry-run")), "session verbs without --dry-run");
}
