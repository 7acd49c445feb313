//! Promise: the list of requirements is true to what is there: every state is one of four, whatever is not simply open
//! says what shows it or what is missing, and every test file and test that is named exists. What the seeds state is built;
//! whatever else is not is named in the decision on what waits, and nothing else is.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const STATES: [&str; 4] = ["built", "partly", "not yet", "not applicable"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

/// Sources of every room, with their text.
fn sources() -> Vec<(PathBuf, String)> {
    let (mut found, mut folders) = (Vec::new(), Vec::new());
    folders.extend(["formats", "vdisk", "mount", "runner", "tests", "benches"].map(|room| root().join(room)));
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text = fs::read_to_string(&path).expect("utf-8");
                found.push((path, text));
            }
        }
    }
    found
}

/// A name that only a test would have: lower case, of four words or more.
fn is_test_name(word: &str) -> bool {
    let plain = word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    plain && word.split('_').filter(|part| !part.is_empty()).count() >= 4
}

/// The ids that the decision on what waits names, in bold.
fn decided() -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("docs/decisions/2026-11-21-what-waits.md")).expect("the decision");
    text.split("**").filter(|word| word.starts_with("R-") && !word.contains(' ')).map(str::to_owned).collect()
}

/// Where the list and the decision do not say the same.
fn undecided(list: &str) -> Vec<String> {
    let (mut wrong, mut decided) = (Vec::new(), decided());
    for line in list.lines().filter(|line| line.starts_with("| R-")) {
        let cells: Vec<&str> = line.trim_matches('|').splitn(5, '|').map(str::trim).collect();
        let [id, mark, _, state, _] = cells[..] else { continue };
        let is_open = ["partly", "not yet"].contains(&state);
        if is_open && mark == "S" {
            wrong.push(format!("{id} is stated in the seeds, and {state}"));
        }
        match (is_open, decided.remove(id)) {
            (true, false) => wrong.push(format!("{id} is {state}, and no decision says why")),
            (false, true) => wrong.push(format!("{id} is {state}, and the decision says that it waits")),
            (true, true) | (false, false) => {}
        }
    }
    wrong.extend(decided.into_iter().map(|id| format!("{id} waits, and is not in the list")));
    wrong
}

#[test]
fn the_list_of_requirements_names_what_there_is() {
    let text = fs::read_to_string(root().join("docs/requirements.md")).expect("the list");
    let sources = sources();
    let mut ids = BTreeSet::new();
    let mut wrong = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("| R-")) {
        // What shows it may hold bars of a command line.
        let cells: Vec<&str> = line.trim_matches('|').splitn(5, '|').map(str::trim).collect();
        let [id, _, _, state, shown] = cells[..] else {
            wrong.push(format!("{line}: not five cells"));
            continue;
        };
        if !ids.insert(id) {
            wrong.push(format!("{id} is there twice"));
        }
        if !STATES.contains(&state) {
            wrong.push(format!("{id}: `{state}` is no state"));
        }
        if state != "not yet" && shown.is_empty() {
            wrong.push(format!("{id}: {state}, and nothing says why"));
        }
        let words = || shown.split(|c: char| !(c.is_alphanumeric() || "_./".contains(c))).map(|w| w.trim_matches('.'));
        let files: Vec<&str> = words().filter(|word| word.ends_with(".rs")).collect();
        let named: Vec<&(PathBuf, String)> =
            sources.iter().filter(|(path, _)| files.iter().any(|file| path.ends_with(file))).collect();
        for file in &files {
            if !named.iter().any(|(path, _)| path.ends_with(file)) {
                wrong.push(format!("{id}: there is no {file}"));
            }
        }
        let tests: Vec<&str> = words().filter(|word| is_test_name(word)).collect();
        for test in &tests {
            let is_there = |(_, text): &&(PathBuf, String)| text.contains(&format!("fn {test}("));
            let there =
                if files.is_empty() { sources.iter().any(|s| is_there(&s)) } else { named.iter().any(is_there) };
            if !there {
                wrong.push(format!("{id}: there is no test {test} in {files:?}"));
            }
        }
    }
    wrong.extend(undecided(&text));
    assert!(ids.len() > 100, "{} requirements were read", ids.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
