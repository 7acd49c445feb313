//! Promise: the house stays in order. Rooms depend in one direction, files stay small, every module
//! says what it is, nothing is left open, no test file is forgotten.

use std::{
    fs,
    path::{Path, PathBuf},
};

const ROOMS: [&str; 6] = ["formats", "vdisk", "mount", "runner", "tests", "benches"];
const FILE_LINES_MAX: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("read a folder").map(|e| e.expect("an entry").path()) {
        if entry.is_dir() {
            sources(&entry, out);
        } else if entry.extension().is_some_and(|e| e == "rs") {
            out.push(entry);
        }
    }
}

fn all_sources() -> Vec<PathBuf> {
    let mut out = Vec::new();
    for room in ROOMS {
        sources(&root().join(room), &mut out);
    }
    assert!(out.len() > 10, "the walk finds the sources");
    out
}

/// A crate names only what stands to its left: formats <- vdisk <- mount <- runner.
#[test]
fn rooms_depend_in_one_direction() {
    let order =
        [("formats", "aquifer-formats"), ("vdisk", "aquifer-vdisk"), ("mount", "aquifer-mount"), ("runner", "aquifer")];
    for (place, (room, _)) in order.iter().enumerate() {
        let manifest = fs::read_to_string(root().join(room).join("Cargo.toml")).expect("a manifest");
        let normal = manifest.split("[dev-dependencies]").next().unwrap_or_default();
        for (_, right) in order.iter().skip(place + 1) {
            let named = normal.lines().any(|l| l.split(['.', ' ', '=']).next() == Some(right));
            assert!(!named, "{room} depends on {right}, which stands to its right");
        }
        if *room == "formats" || *room == "vdisk" {
            for heavy in ["tokio", "sqlx", "axum", "clap"] {
                assert!(!normal.lines().any(|l| l.starts_with(heavy)), "{room} must build without {heavy}");
            }
        }
    }
}

#[test]
fn files_are_small_and_say_what_they_are() {
    for path in all_sources() {
        let text = fs::read_to_string(&path).expect("utf-8");
        let lines = text.lines().count();
        assert!(lines <= FILE_LINES_MAX, "{}: {lines} lines, at most {FILE_LINES_MAX}: split it", path.display());
        let first = text.lines().find(|l| !l.trim().is_empty() && !l.starts_with("#!["));
        assert!(first.is_some_and(|l| l.starts_with("//!")), "{}: begins without module documentation", path.display());
    }
}

#[test]
fn nothing_is_left_open() {
    let marks =
        [["TO", "DO"].concat(), ["FIX", "ME"].concat(), ["todo", "!("].concat(), ["unimplemented", "!("].concat()];
    for path in all_sources() {
        for (number, line) in fs::read_to_string(&path).expect("utf-8").lines().enumerate() {
            let open = marks.iter().find(|m| line.contains(m.as_str()));
            assert!(open.is_none(), "{}:{}: left open: {line}", path.display(), number + 1);
        }
    }
}

/// Libraries never print, never read the environment, never exit.
#[test]
fn libraries_keep_to_themselves() {
    let forbidden = ["std::env::var", "env::var(", "process::exit", "println!", "eprintln!"];
    for room in ["formats", "vdisk", "mount"] {
        let mut files = Vec::new();
        sources(&root().join(room).join("src"), &mut files);
        for path in files.iter().filter(|p| !p.ends_with("tests.rs")) {
            let text = fs::read_to_string(path).expect("utf-8");
            for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//")) {
                let hit = forbidden.iter().find(|f| line.contains(**f));
                assert!(hit.is_none(), "{}:{}: a library does not use {hit:?}", path.display(), number + 1);
            }
        }
    }
}

#[test]
fn no_test_file_is_forgotten() {
    let folder = root().join("tests/it");
    let main = fs::read_to_string(folder.join("main.rs")).expect("main.rs");
    for entry in fs::read_dir(&folder).expect("tests/it").map(|e| e.expect("an entry").path()) {
        let name = entry.file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_owned();
        if name != "main" {
            assert!(main.contains(&format!("mod {name};")), "tests/it/main.rs does not name {name}");
        }
    }
}
