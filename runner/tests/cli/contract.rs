//! Promise: exit codes, JSON lines and error texts keep to the contract, verb by verb.

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
};

use aquifer_runner::{cli::GROUPS, fail::Code};

use crate::harness::{BINARY, Outcome, Room};

/// One failing command line per verb, and the code it must fail with.
fn failing() -> Vec<(Vec<&'static str>, &'static str, i32)> {
    vec![
        (vec!["info"], "E_USAGE", 4),
        (vec!["inof"], "E_USAGE", 4),
        (vec![], "E_USAGE", 4),
        (vec!["explain", "E_NONSENSE"], "E_NOT_FOUND", 2),
        (vec!["man", "nonsense"], "E_NOT_FOUND", 2),
        (vec!["completions", "cmd.exe"], "E_USAGE", 4),
        (vec!["-c", "/nowhere/site.toml", "config", "check"], "E_NOT_FOUND", 2),
    ]
}

#[test]
fn failures_exit_alike_with_and_without_json() {
    let room = Room::new();
    for (args, code, exit) in failing() {
        let plain = room.run(&args);
        assert_eq!(plain.code, exit, "{args:?}: {}", plain.stderr);
        assert!(plain.stdout.is_empty(), "{args:?}: a failure has no data: {}", plain.stdout);
        let line = plain.stderr.lines().find(|l| l.starts_with(code));
        assert!(line.is_some_and(|l| l.starts_with(&format!("{code}: "))), "{args:?}: {}", plain.stderr);
        let json = room.json(&args);
        assert_eq!(json.code, exit, "{args:?}: {}", json.stdout);
        assert_eq!(json.one("error")["code"], code, "{args:?}");
        assert!(Code::find(code).is_some());
    }
}

#[test]
fn a_failure_says_where_and_what_to_do() {
    let room = Room::new();
    let outcome = room.run(["-c", "/nowhere/site.toml", "config", "check"]);
    assert!(outcome.stderr.contains("\n  at: /nowhere/site.toml, ENOENT: "), "{}", outcome.stderr);
    let outcome = room.run(["explain", "E_NONSENSE"]);
    assert!(outcome.stderr.contains("\n  do: aquifer explain"), "{}", outcome.stderr);
    let error = room.json(["-c", "/nowhere/site.toml", "config", "check"]).one("error");
    assert_eq!(error["at"]["path"], "/nowhere/site.toml");
    assert!(error["at"]["cause"].as_str().is_some_and(|c| c.starts_with("ENOENT")));
}

#[test]
fn help_is_data_and_every_verb_has_it() {
    let room = Room::new();
    for verb in GROUPS.iter().flat_map(|(_, verbs)| verbs.iter()) {
        let help = room.run([verb, "--help"]);
        assert_eq!(help.code, 0);
        assert!(help.stdout.contains("Usage: aquifer ") && help.stderr.is_empty(), "{verb}: {}", help.stderr);
        let json = room.json([verb, "--help"]);
        assert_eq!(json.one("help")["schema"], format!("aquifer.{verb}/1"));
    }
}

/// No terminal, no environment, stdin and stderr closed: as cron and systemd may start it.
#[test]
fn it_runs_with_nothing_around_it() {
    let script = format!("exec env -i {BINARY} explain --json <&- 2>&-");
    let output = Command::new("/bin/sh").args(["-c", &script]).stderr(Stdio::null()).output().expect("sh");
    let outcome = Outcome::of(output);
    assert_eq!(outcome.code, 0);
    let codes: BTreeSet<String> =
        outcome.kind("code").iter().filter_map(|r| r["code"].as_str().map(str::to_owned)).collect();
    assert_eq!(codes.len(), Code::ALL.len());
    let closed =
        Command::new("/bin/sh").args(["-c", &format!("exec env -i {BINARY} explain >&-")]).status().expect("sh");
    assert_eq!(closed.code(), Some(0), "a closed stdout loses data, not the process");
}

#[test]
fn a_reader_that_leaves_is_no_fault() {
    let script = format!("{BINARY} explain --json | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}");
    let output = Command::new("bash").args(["-c", &script]).output().expect("bash");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn colour_is_for_terminals() {
    let room = Room::new();
    assert!(!room.run(["explain", "E_NONSENSE"]).stderr.contains('\x1b'));
}

#[test]
fn every_code_is_explained_offline() {
    let room = Room::new();
    for code in Code::ALL {
        let text = room.ok(["explain", code.name()]).stdout;
        assert!(text.contains(code.text()), "{text}");
    }
}
