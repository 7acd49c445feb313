//! Promise: bytes of an older point are never handed out in silence where the newest is damaged.

use std::{fs, path::PathBuf};

use crate::{
    harness::{Outcome, Room},
    images::write,
};

const DISK_BYTES: usize = 1 << 20;

/// Two points of `plain`, the newer one cut short by a byte; their ids, the older first.
fn with_a_damaged_newest(room: &Room) -> [String; 2] {
    room.ok(["init"]);
    let ids = [17u8, 199].map(|byte| {
        let mut disk = vec![byte; 64 << 10];
        disk.resize(DISK_BYTES, 0);
        write(&room.path("plain.img"), &disk);
        room.ok(["backup", "plain", "--disk", &format!("data=raw:{}", room.text("plain.img"))]);
        let points = room.json(["points", "plain"]).kind("point");
        points.last().expect("a point")["point"].as_str().expect("an id").to_owned()
    });
    let file = layer(room, &ids[1]);
    let bytes = fs::read(&file).expect("the layer");
    fs::write(&file, &bytes[..bytes.len() - 1]).expect("cut");
    ids
}

fn layer(room: &Room, id: &str) -> PathBuf {
    let machines = fs::read_dir(room.repo().join("machines")).expect("machines").flatten();
    let file = |machine: fs::DirEntry| machine.path().join("points").join(id).join("data.aql");
    machines.map(file).find(|file| file.is_file()).expect("the layer of the point")
}

/// Done with a warning that names the older point taken, the newer passed over, and what helps.
fn warned(outcome: &Outcome, [older, newest]: &[String; 2]) {
    assert_eq!(outcome.code, 1, "{}{}", outcome.stdout, outcome.stderr);
    let warning = outcome.one("warning");
    assert_eq!(warning["code"], "W_OLDER_POINT");
    let what = warning["what"].as_str().expect("text");
    assert!(what.contains(&format!("the older point {older}")) && what.contains(newest), "{what}");
    assert!(what.contains("bytes instead of"), "why: {what}");
    assert!(warning["do"].as_str().expect("a command").contains(&format!("verify plain@{newest}")), "{warning}");
    let passed_over = outcome.one("passed_over");
    assert_eq!((&passed_over["point"], &passed_over["taken"]), (&newest.as_str().into(), &older.as_str().into()));
    assert_eq!(passed_over["state"], "corrupted");
}

#[test]
fn an_older_point_in_place_of_a_damaged_newest_is_told() {
    let room = Room::new();
    let ids = with_a_damaged_newest(&room);
    warned(&room.json(["export", "plain@latest", "out.raw"]), &ids);
    assert_eq!(fs::read(room.path("out.raw")).expect("exported")[0], 17);
    warned(&room.json(["info", "plain"]), &ids);
    warned(&room.json(["info", "plain@2099-01-01T00:00:00Z"]), &ids);
    warned(&room.json(["points", "plain@latest"]), &ids);
    warned(&room.json(["map", "plain@latest"]), &ids);
    let said = room.run(["mount", "plain@latest", "--run", "true"]);
    assert!(said.code == 1 && said.stderr.contains("W_OLDER_POINT"), "{}{}", said.code, said.stderr);
    let strict = room.run(["--strict", "info", "plain@latest"]);
    assert_eq!(strict.code, 2, "{}", strict.stderr);
    // Of a point that is named, and of a time before the damaged one, nothing needs to be told.
    room.ok(["info", &format!("plain@{}", ids[0])]);
    let between = room.json(["points", "plain"]).kind("point")[0]["created"].as_str().expect("a time").to_owned();
    room.ok(["info", &format!("plain@{between}")]);
    let named = room.run(["export", &format!("plain@{}", ids[1]), "no.raw"]);
    assert!(named.code == 14 && !room.path("no.raw").exists(), "{}", named.stderr);
}

#[test]
fn a_list_beside_a_damaged_point_says_so() {
    let room = Room::new();
    let [older, newest] = with_a_damaged_newest(&room);
    let damaged = |words: &[&str], id: &str, state: &str, why: &str| {
        let outcome = room.json(words);
        let warning = outcome.one("warning");
        assert_eq!((outcome.code, warning["code"].as_str()), (1, Some("W_DAMAGED_POINT")), "{}", outcome.stdout);
        let what = warning["what"].as_str().expect("text");
        assert!(what.contains(id) && what.contains(state) && what.contains(why), "{what}");
        assert!(warning["do"].as_str().expect("a command").contains(&format!("verify plain@{id}")), "{warning}");
    };
    for words in [&["points", "plain"][..], &["points"], &["points", &format!("plain@{newest}")]] {
        damaged(words, &newest, "corrupted", "bytes instead of");
    }
    assert_eq!(room.run(["--strict", "points", "plain"]).code, 2);
    room.ok(["points", &format!("plain@{older}")]);
    room.ok(["forget", &format!("plain@{newest}"), "--yes"]);
    room.ok(["points", "plain"]);
    // Without its record a point is not one that was never finished: another one stands on its first block.
    let mut disk = vec![17; 64 << 10];
    disk.resize(DISK_BYTES, 5);
    write(&room.path("plain.img"), &disk);
    room.ok(["backup", "plain", "--disk", &format!("data=raw:{}", room.text("plain.img"))]);
    fs::remove_file(layer(&room, &older).with_file_name("point.json")).expect("remove");
    damaged(&["points", "plain"], &older, "missing", "point.json is gone");
    assert_eq!(room.run(["verify", &format!("plain@{older}")]).code, 14);
    let left = room.json(["forget", "--interrupted", "plain", "--yes"]);
    assert_eq!(left.code, 0, "{}", left.stdout);
    room.ok(["info", "plain@latest"]);
    room.ok(["export", "plain@latest", "whole.raw"]);
    assert!(fs::read(room.path("whole.raw")).expect("exported") == disk);
}

#[test]
fn a_newest_point_without_its_record_is_damaged_and_no_backup_touches_it() {
    let room = Room::new();
    let [_, newest] = with_a_damaged_newest(&room);
    room.ok(["forget", &format!("plain@{newest}"), "--yes"]);
    let disk = format!("data=raw:{}", room.text("plain.img"));
    let back_up = || room.json(["backup", "plain", "--full", "--disk", &disk]);
    assert_eq!(back_up().code, 0);
    let lost = room.json(["points", "plain"]).kind("point").last().expect("a point")["point"].clone();
    let lost = lost.as_str().expect("an id");
    let file = layer(&room, lost);
    fs::remove_file(file.with_file_name("point.json")).expect("remove");
    assert_eq!(room.json(["forget", "--interrupted", "plain", "--yes"]).code, 0);
    let next = room.run(["backup", "plain", "--disk", &disk]);
    assert!(next.code <= 1 && !next.stderr.contains("interrupted"), "{}{}", next.stdout, next.stderr);
    assert!(file.exists(), "somebody may still want what is left of it");
    let listed = room.json(["points", "plain"]);
    let states: Vec<_> = listed.kind("point").iter().map(|point| point["state"].clone()).collect();
    assert_eq!(states, ["complete", "missing", "complete"], "{}", listed.stdout);
    assert!(listed.one("warning")["what"].as_str().is_some_and(|what| what.contains("point.json is gone")));
    room.ok(["forget", &format!("plain@{lost}"), "--yes"]);
    room.ok(["points", "plain"]);
}

#[test]
fn a_recovery_from_an_older_point_is_told_before_it_begins() {
    let room = Room::new();
    let ids = with_a_damaged_newest(&room);
    let planned = room.json(["recover", "plain@latest", "--into", &room.text("back"), "-n"]);
    warned(&planned, &ids);
}

#[test]
fn verify_never_calls_another_point_whole() {
    let room = Room::new();
    let [older, newest] = with_a_damaged_newest(&room);
    for word in ["plain", "plain@latest", "plain@2099-01-01T00:00:00Z", "plain@latest:data"] {
        let outcome = room.run(["verify", word]);
        assert_eq!(outcome.code, 14, "{word}: {}{}", outcome.stdout, outcome.stderr);
        assert!(!outcome.stdout.contains("whole"), "{}", outcome.stdout);
        assert!(outcome.stdout.contains(&newest) && outcome.stderr.contains(&older), "{}", outcome.stderr);
    }
    assert_eq!(room.json(["verify", "plain@latest"]).one("damage")["source"], format!("plain@{newest}"));
    room.ok(["verify", &format!("plain@{older}")]);
    // No complete one is left: still damage, not a point that never was.
    fs::remove_file(layer(&room, &older)).expect("remove");
    for verb in ["verify", "info"] {
        let outcome = room.run([verb, "plain@latest"]);
        assert_eq!(outcome.code, 14, "{verb}: {}", outcome.stderr);
    }
}

#[test]
fn forget_does_not_guess_between_a_damaged_and_an_older_point() {
    let room = Room::new();
    let [older, newest] = with_a_damaged_newest(&room);
    let refused = room.run(["forget", "plain@latest", "--even-last", "--yes"]);
    assert_ne!(refused.code, 0);
    assert!(refused.stderr.contains("E_AMBIGUOUS") && refused.stderr.contains(&older), "{}", refused.stderr);
    room.ok(["forget", &format!("plain@{newest}"), "--yes"]);
    room.ok(["info", "plain@latest"]);
}
