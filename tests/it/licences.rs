//! What may be linked, by `deny.toml`: permissive licences, nothing that is banned, one registry. The same gate as
//! `cargo deny check bans licenses sources`, without having to build that first.

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").into()
}

/// The quoted words of the list that `key` begins in `deny.toml`.
fn list(deny: &str, key: &str) -> Vec<String> {
    let start = deny.find(&format!("\n{key} = [")).unwrap_or_else(|| panic!("deny.toml has no {key}"));
    let text = &deny[start..];
    let text = &text[..text.find(']').expect("the list ends")];
    text.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether an SPDX expression can be satisfied with licences that `allowed` knows. `/` is an old way to say OR.
fn acceptable(expression: &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let (verdict, rest) = either(&words, allowed);
    assert!(rest.is_empty(), "not an SPDX expression: {expression}");
    verdict
}

fn either<'a>(words: &'a [&'a str], allowed: &dyn Fn(&str) -> bool) -> (bool, &'a [&'a str]) {
    let (mut verdict, mut rest) = both(words, allowed);
    while let ["OR", after @ ..] = rest {
        let (next, left) = both(after, allowed);
        (verdict, rest) = (verdict | next, left);
    }
    (verdict, rest)
}

fn both<'a>(words: &'a [&'a str], allowed: &dyn Fn(&str) -> bool) -> (bool, &'a [&'a str]) {
    let (mut verdict, mut rest) = one(words, allowed);
    while let ["AND", after @ ..] = rest {
        let (next, left) = one(after, allowed);
        (verdict, rest) = (verdict & next, left);
    }
    (verdict, rest)
}

fn one<'a>(words: &'a [&'a str], allowed: &dyn Fn(&str) -> bool) -> (bool, &'a [&'a str]) {
    match words {
        ["(", after @ ..] => match either(after, allowed) {
            (verdict, [")", rest @ ..]) => (verdict, rest),
            (_, rest) => (false, rest),
        },
        [licence, "WITH", exception, rest @ ..] => (allowed(&format!("{licence} WITH {exception}")), rest),
        [licence, rest @ ..] => (allowed(licence), rest),
        [] => (false, words),
    }
}

#[test]
fn everything_linked_is_permissive_and_known() {
    let deny = fs::read_to_string(root().join("deny.toml")).expect("deny.toml");
    let licences = list(&deny, "allow");
    let banned = list(&deny, "deny");
    assert!(licences.len() > 5 && banned.contains(&"openssl-sys".to_owned()), "deny.toml is read: {banned:?}");
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .expect("cargo");
    assert!(metadata.status.success(), "{}", String::from_utf8_lossy(&metadata.stderr));
    let metadata: Value = serde_json::from_slice(&metadata.stdout).expect("json");
    let packages = metadata["packages"].as_array().expect("packages");
    assert!(packages.len() > 50, "{} packages: the tree is missing", packages.len());
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().expect("name");
        let licence = package["license"].as_str().unwrap_or("none");
        if !acceptable(licence, &|l| licences.iter().any(|known| known == l)) {
            wrong.push(format!("{name}: licence {licence}"));
        }
        if banned.iter().any(|b| b == name) {
            wrong.push(format!("{name}: banned"));
        }
        if let Some(source) = package["source"].as_str()
            && !source.starts_with("registry+https://github.com/rust-lang/crates.io-index")
        {
            wrong.push(format!("{name}: from {source}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn expressions_are_read_as_written() {
    let mit = |l: &str| l == "MIT";
    for (expression, good) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("GPL-3.0 AND MIT", false),
        ("(GPL-3.0 OR MIT) AND MIT", true),
        ("MIT AND (GPL-3.0 OR LGPL-2.1)", false),
        ("MIT/Apache-2.0", true),
        ("MIT WITH Some-exception", false),
    ] {
        assert_eq!(acceptable(expression, &mit), good, "{expression}");
    }
}
