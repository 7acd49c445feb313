//! Promise: `bench` measures the real thing and its peers, says so in figures and in a picture, and leaves nothing behind.

use std::fs;

use crate::{harness::Room, images};

/// What lies in the room's folder, apart from what every command may make there.
fn left(room: &Room) -> Vec<String> {
    let entries = fs::read_dir(room.dir.path()).expect("a folder");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("an entry").file_name().into_string().expect("utf-8")).collect();
    names.retain(|name| name.starts_with("aquifer-bench-") || name == "repo");
    names
}

#[test]
fn a_backup_is_measured_against_its_peers() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 5);
    let done = room.json(["bench", "backup", "vm-2.qcow2", "--peer", "qemu-img,qemu-img-parallel", "--svg", "b.svg"]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let measured = done.kind("measured");
    let sides: Vec<&str> = measured.iter().filter_map(|side| side["side"].as_str()).collect();
    assert_eq!(sides, ["aquifer", "qemu-img", "qemu-img-parallel"]);
    for side in &measured {
        assert!(
            side["seconds"].as_f64().is_some_and(|s| s > 0.0) && side["bytes_stored"].as_u64() > Some(1000),
            "{side}"
        );
    }
    assert_eq!(done.kind("ratio").len(), 2);
    let svg = fs::read_to_string(room.path("b.svg")).expect("a picture");
    assert!(svg.starts_with("<svg") && sides.iter().all(|side| svg.contains(&format!(">{side}</text>"))), "{svg}");
    assert_eq!(left(&room), Vec::<String>::new());
}

#[test]
fn hydration_and_reads_are_measured_against_their_peers() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 6);
    let hydrated = room.json(["bench", "hydrate", "vm-2.qcow2", "--peer", "qemu-img", "--svg", "h.svg"]);
    assert_eq!((hydrated.code, hydrated.kind("ratio").len()), (0, 1), "{}", hydrated.stderr);
    assert!(room.path("h.svg").exists());
    let args = ["bench", "read", "vm-2.qcow2", "--duration", "200ms", "--peer", "qemu-nbd", "--svg", "r.svg"];
    let read = room.json(args);
    assert_eq!((read.code, read.kind("measured").len()), (0, 2), "{}", read.stderr);
    let svg = fs::read_to_string(room.path("r.svg")).expect("a picture");
    assert!(svg.contains("p99.9, us") && svg.contains(">qemu-nbd</text>"), "{svg}");
    assert_eq!(left(&room), Vec::<String>::new());
}

#[test]
fn a_peer_that_cannot_do_the_work_is_refused_before_anything_runs() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 7);
    for (work, peer) in [("backup", "qemu-nbd"), ("hydrate", "qemu-img-parallel"), ("read", "nbdkit")] {
        let refused = room.run(["bench", work, "vm-2.qcow2", "--peer", peer, "--duration", "100ms"]);
        assert_eq!((refused.code, refused.stdout.as_str()), (4, ""), "{work}: {}", refused.stderr);
    }
    assert_eq!(room.run(["bench", "backup", "vm-2.qcow2", "-n"]).code, 0);
    assert_eq!(left(&room), Vec::<String>::new());
}

/// The guest of `demo` on a disk of its own: it says what it was given.
#[test]
fn a_boot_is_measured_and_discarded() {
    let room = Room::new();
    let mut disk = vec![0; 64 << 20];
    aquifer_runner::verb::demo::guest::put_on(&mut disk, "\r\nThis machine was measured.\r\n");
    fs::write(room.path("vm.raw"), &disk).expect("write");
    let args = ["bench", "boot", "raw:vm.raw", "--memory", "64MiB", "--until", "was measured", "--limit", "60s"];
    let done = room.json(args);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let measured = done.kind("measured");
    let [boot] = measured.as_slice() else { panic!("{measured:?}") };
    let (running, said) = (boot["running_seconds"].as_f64(), boot["said_seconds"].as_f64());
    assert!(running > Some(0.0) && said >= running, "{boot}");
    assert!(boot["bytes_fetched"].as_u64() > Some(511), "{boot}");
    assert_eq!(fs::read(room.path("vm.raw")).expect("read"), disk, "the source is as it was");
    assert_eq!(left(&room), Vec::<String>::new());
    let refused = room.run(["bench", "boot", "raw:vm.raw", "--peer", "qemu-img"]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
}
