//! Promise: what is generated is what is shipped.

use std::{fs, path::Path};

use crate::harness::Room;

/// `AQUIFER_BLESS=1` writes the page anew.
#[test]
fn the_reference_page_is_the_tree() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    let page = aquifer_runner::cli::reference();
    if std::env::var_os("AQUIFER_BLESS").is_some() {
        fs::write(&path, &page).expect("write docs/cli.md");
    }
    let kept = fs::read_to_string(&path).expect("docs/cli.md");
    assert!(
        kept == page,
        "docs/cli.md is old; write it anew with AQUIFER_BLESS=1 cargo test -p aquifer --test cli docs"
    );
}

#[test]
fn man_pages_and_completions_come_for_every_verb() {
    let room = Room::new();
    let out = room.text("man");
    room.ok(["man", "--out", &out]);
    for (_, verbs) in aquifer_runner::cli::GROUPS {
        for verb in *verbs {
            let page = fs::read_to_string(room.path(format!("man/aquifer-{verb}.1"))).expect(verb);
            assert!(page.contains(".SH NAME") && page.contains(".SH OPTIONS"), "{verb}: {page}");
        }
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = room.ok(["completions", shell]).stdout;
        assert!(script.contains("recover") && script.contains("allow-backing"), "{shell}");
        assert!(!script.contains("snapshots"), "{shell} offers a hidden alias");
    }
}
