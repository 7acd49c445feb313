//! What `verify` says of a whole repository.

use std::fs;

use crate::{
    harness::Room,
    images::{disk, write},
};

#[test]
fn a_point_that_has_lost_its_file_is_damage() {
    let room = Room::new();
    write(&room.path("vm.img"), &disk(1));
    room.ok(["init"]);
    room.ok(["backup", "web", "--disk", "vda=raw:./vm.img"]);
    room.ok(["backup", "web", "--full", "--disk", "vda=raw:./vm.img"]);
    room.ok(["verify"]);
    let points = room.repo().join("machines");
    let machine = fs::read_dir(points).expect("machines").next().expect("one").expect("one").path();
    let mut files: Vec<_> =
        fs::read_dir(machine.join("points")).expect("points").map(|p| p.expect("one").path().join("vda.aql")).collect();
    files.sort();
    fs::remove_file(&files[0]).expect("lose a file");
    let outcome = room.json(["verify"]);
    assert_eq!(outcome.code, 14, "{}", outcome.stdout);
    let records = outcome.records();
    assert_eq!(records.iter().filter(|record| record["type"] == "damage").count(), 1, "{records:?}");
    assert_eq!(records.iter().filter(|record| record["type"] == "verified").count(), 1, "the other is read");
}
