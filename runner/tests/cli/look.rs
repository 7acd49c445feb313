//! Promise: any image can be looked at, served and copied out without a repository, and every way
//! gives the same bytes.

use std::{fs, os::unix::fs::MetadataExt, process::Command, time::Duration};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    carrier::Process,
    harness::{Outcome, Room},
    images,
};

#[test]
fn info_says_what_an_image_holds() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 1);
    let disk = room.json(["info", "vm-2.qcow2"]).one("disk");
    assert_eq!(disk["kind"], "qcow2");
    assert_eq!(disk["size"], (24 << 20) + 4096);
    assert_eq!(disk["layers"].as_array().map(Vec::len), Some(3));
    assert_eq!(disk["partition_table"], "none");
    let human = room.ok(["info", "./vm-2.qcow2"]);
    assert!(human.stdout.contains("vm-0.qcow2"), "{}", human.stdout);
    assert!(human.stderr.contains("next: aquifer mount ./vm-2.qcow2 --run"), "{}", human.stderr);
}

#[test]
fn a_raw_image_is_read_only_when_it_is_named_raw() {
    let room = Room::new();
    images::write(&room.path("vm.img"), &images::disk(2));
    let refused = room.run(["info", "vm.img"]);
    assert_eq!(refused.code, 3);
    assert!(
        refused.stderr.contains("\n  at: ") && refused.stderr.contains("\n  do: aquifer info raw:"),
        "{}",
        refused.stderr
    );
    assert_eq!(room.json(["info", "raw:vm.img"]).one("disk")["kind"], "raw");
}

#[test]
fn a_backing_file_elsewhere_needs_permission() {
    let room = Room::new();
    fs::create_dir(room.path("base")).expect("folder");
    fs::create_dir(room.path("top")).expect("folder");
    images::qcow2_chain(&room.path("base"), "vm", 3);
    let (backing, top) = (room.text("base/vm-2.qcow2"), room.text("top/vm.qcow2"));
    images::must("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &backing, "-F", "qcow2", &top]);
    let refused = room.run(["map", "top/vm.qcow2"]);
    assert_eq!(refused.code, 3, "{}", refused.stderr);
    assert!(refused.stderr.contains("--allow-backing"), "{}", refused.stderr);
    assert_eq!(room.run(["map", "top/vm.qcow2", "--allow-backing", "base"]).code, 0);
}

#[test]
fn map_covers_the_disk_without_gaps() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 4);
    let ranges = room.json(["map", "vm-2.qcow2"]).kind("range");
    let mut at = 0;
    for range in &ranges {
        assert_eq!(range["offset"].as_u64(), Some(at));
        at += range["length"].as_u64().expect("a length");
    }
    assert_eq!(at, (24 << 20) + 4096);
    assert!(ranges.iter().any(|r| r["kind"] == "zero") && ranges.iter().any(|r| r["kind"] == "data"));
}

#[test]
fn exports_equal_the_source_and_are_sparse() {
    let room = Room::new();
    let bytes = images::qcow2_chain(room.dir.path(), "vm", 5);
    let raw = room.json(["export", "vm-2.qcow2", "out.raw"]).one("exported");
    assert_eq!(fs::read(room.path("out.raw")).expect("out.raw"), bytes);
    let stored = fs::metadata(room.path("out.raw")).expect("metadata").blocks() * 512;
    assert!(stored < raw["size"].as_u64().expect("size") / 2, "{stored} bytes are stored");
    room.ok(["export", "vm-2.qcow2", "out.qcow2"]);
    images::must("qemu-img", &["check", "-q", &room.text("out.qcow2")]);
    images::same(&room.text("vm-2.qcow2"), "qcow2", &room.text("out.qcow2"), "qcow2");
    let again = room.run(["export", "vm-2.qcow2", "out.raw"]);
    assert_eq!(again.code, 3, "an existing file is never overwritten");
    assert_eq!(fs::read(room.path("out.raw")).expect("out.raw"), bytes);
    assert_eq!(room.run(["export", "vm-2.qcow2", "out.vmdk"]).code, 4);
}

#[test]
fn an_export_that_fails_leaves_nothing() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 6);
    // The compressed clusters of the lowest file, all of them.
    let base = room.path("vm-0.qcow2");
    let mut bytes = fs::read(&base).expect("read");
    let len = bytes.len();
    bytes[len / 2..len - 100].fill(0x55);
    fs::write(&base, bytes).expect("write");
    let before: Vec<_> = fs::read_dir(room.dir.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
    let failed = room.run(["export", "vm-2.qcow2", "out.raw"]);
    assert_eq!(failed.code, 14, "{}", failed.stderr);
    assert!(failed.stderr.contains("vm-0.qcow2, offset "), "{}", failed.stderr);
    assert!(failed.stderr.contains("do: aquifer verify vm-2.qcow2"), "{}", failed.stderr);
    let after: Vec<_> = fs::read_dir(room.dir.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(before, after);
}

#[test]
fn a_command_sees_the_disk_and_its_exit_code_is_ours() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 7);
    let served = room.ok(["mount", "vm-2.qcow2", "--run", "qemu-img compare -F qcow2 \"$uri\" vm-2.qcow2"]);
    assert!(served.stdout.contains("Images are identical"), "{}", served.stdout);
    assert_eq!(room.run(["mount", "vm-2.qcow2", "--run", "exit 7"]).code, 7);
    let json = room.json(["mount", "vm-2.qcow2", "--run", "echo talk; exit 7"]);
    assert_eq!(json.one("error")["exit"], 7);
    assert!(json.stderr.contains("talk"), "the command's stdout is kept out of ours");
    assert!(fs::read_dir(room.path("aquifer")).is_ok_and(|mut d| d.next().is_none()), "a socket is left behind");
}

#[test]
fn writes_of_a_mount_are_thrown_away() {
    let room = Room::new();
    let bytes = images::qcow2_chain(room.dir.path(), "vm", 8);
    let script = "qemu-io -f raw -c 'write -q -P 9 1M 1M' -c flush -c 'read -P 9 1M 1M' \"$uri\"";
    room.ok(["mount", "vm-2.qcow2", "--writable", "--run", script]);
    room.ok(["export", "vm-2.qcow2", "out.raw"]);
    assert_eq!(fs::read(room.path("out.raw")).expect("out.raw"), bytes);
    let read_only = room.run(["mount", "vm-2.qcow2", "--run", "qemu-io -f raw -c 'write 0 512' \"$uri\""]);
    assert_ne!(read_only.code, 0, "a mount takes no writes unless it is asked to");
    assert!(fs::read_dir(room.path("home/scratch")).is_ok_and(|mut d| d.next().is_none()), "scratch is left behind");
}

#[test]
fn a_mount_in_the_background_serves_until_it_is_told() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 9);
    let started = room.json(["mount", "vm-2.qcow2", "--detach"]);
    let uri = started.one("serving")["uri"].as_str().expect("a uri").to_owned();
    let pid = started.one("done")["pid"].as_i64().expect("a process");
    images::same(&uri, "raw", &room.text("vm-2.qcow2"), "qcow2");
    Command::new("kill").arg(pid.to_string()).status().expect("kill");
    let gone = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        !std::path::Path::new(&format!("/proc/{pid}/exe")).exists()
    });
    assert!(gone, "it goes on after SIGTERM");
    let failed = room.json(["mount", "nothing.qcow2", "--detach", "--nbd", "unix:/nowhere/else/s"]);
    assert_ne!(failed.code, 0);
}

#[test]
fn a_signal_ends_a_walk_through_zeros_without_end() {
    let room = Room::new();
    // Minutes of looking at tables that do not exist.
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M"]).arg(room.path("empty.qcow2")).arg("1E");
    assert!(make.status().expect("qemu-img").success());
    let mut walk = Process::start(room.command(["verify", "empty.qcow2"]));
    assert_eq!(walk.ends_within(Duration::from_millis(500)), None, "the disk is too small for this test");
    kill_process(Pid::from_child(&walk.0), Signal::TERM).expect("a signal");
    assert_eq!(walk.ends(), Some(143));
}

#[test]
fn a_signal_ends_a_mount_in_order() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 10);
    for signal in ["-INT", "-TERM"] {
        let mut command = room.command(["mount", "vm-2.qcow2", "--json"]);
        let child =
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().expect("spawn");
        std::thread::sleep(Duration::from_millis(500));
        Command::new("kill").args([signal, &child.id().to_string()]).status().expect("kill");
        let outcome = Outcome::of(child.wait_with_output().expect("wait"));
        assert_eq!(outcome.code, 0, "{signal} is the regular end of a mount: {}", outcome.stderr);
        outcome.one("done");
    }
}

#[test]
fn dry_runs_change_nothing() {
    let room = Room::new();
    images::qcow2_chain(room.dir.path(), "vm", 11);
    let before = tree(&room);
    for args in [
        &["export", "vm-2.qcow2", "out.raw", "-n"][..],
        &["mount", "vm-2.qcow2", "--dry-run"],
        &["mount", "vm-2.qcow2", "--writable", "--overlay", "kept", "--dry-run"],
        &["mount", "vm-2.qcow2", "--nbd", "unix:s", "-n"],
    ] {
        let outcome = room.json(args);
        assert_eq!(outcome.code, 0, "{args:?}: {}", outcome.stderr);
        assert_eq!(tree(&room), before, "{args:?}");
    }
    assert_eq!(room.run(["export", "vm-2.qcow2", "vm-1.qcow2", "-n"]).code, 3, "as the real run would");
}

/// Every file below the room, with its length and time of change.
fn tree(room: &Room) -> Vec<(std::path::PathBuf, u64, i64)> {
    let mut found = Vec::new();
    let mut folders = vec![room.dir.path().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("list").map(|e| e.expect("entry").path()) {
            let meta = fs::symlink_metadata(&entry).expect("metadata");
            if meta.is_dir() {
                folders.push(entry.clone());
            }
            found.push((entry, meta.len(), meta.mtime_nsec()));
        }
    }
    found.sort();
    found
}
