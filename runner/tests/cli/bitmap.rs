//! Increments that read only what a bitmap names.

use std::{fs, path::Path, process::Command};

use crate::{
    harness::Room,
    images::{must, noise, write},
};

const MIB: usize = 1 << 20;

/// A qcow2 image with some content, backed up whole, and then changed at three places under a bitmap.
fn changed_image(room: &Room) -> Vec<u8> {
    let mut bytes = vec![0; 48 * MIB];
    bytes[..32 * MIB].copy_from_slice(&noise(1, 32 * MIB));
    write(&room.path("disk.raw"), &bytes);
    must("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &room.text("disk.raw"), &room.text("disk.qcow2")]);
    room.ok(["init"]);
    must("qemu-img", &["bitmap", "--add", &room.text("disk.qcow2"), "since"]);
    room.ok(["backup", "web", "--disk", "vda=./disk.qcow2"]);
    let mut commands = Vec::new();
    for (place, value) in [(3, 2), (20, 3), (45, 4)] {
        bytes[place * MIB..place * MIB + (64 << 10)].fill(value);
        commands.extend(["-c".to_owned(), format!("write -P {value} {place}M 64k")]);
    }
    let image = room.text("disk.qcow2");
    let mut args = vec!["-f", "qcow2"];
    args.extend(commands.iter().map(String::as_str));
    args.push(&image);
    must("qemu-io", &args);
    bytes
}

fn judge(room: &Room, expected: &[u8]) {
    room.ok(["export", "web", "out.raw"]);
    let found = fs::read(room.path("out.raw")).expect("the export");
    let differs = expected.chunks(4096).zip(found.chunks(4096)).position(|(a, b)| a != b);
    assert_eq!((found.len(), differs.map(|block| block * 4096)), (expected.len(), None));
}

#[test]
fn every_range_of_a_bitmap_is_stored() {
    let room = Room::new();
    let expected = changed_image(&room);
    let outcome = room.json(["backup", "web", "--disk", "vda=./disk.qcow2", "--bitmap", "since"]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let disk = outcome.records().into_iter().find(|record| record["type"] == "disk").expect("a disk");
    assert_eq!(disk["bytes_to_read"], 3 * (64 << 10), "{disk}");
    assert_eq!(disk["counted"]["blocks_written"], 3, "{disk}");
    judge(&room, &expected);
}

#[test]
fn every_range_of_a_dirty_context_is_stored() {
    let room = Room::new();
    let expected = changed_image(&room);
    let socket = room.text("nbd");
    let mut server = Command::new("qemu-nbd")
        .args([
            "-r",
            "-t",
            "-e",
            "8",
            "-f",
            "qcow2",
            "-B",
            "since",
            "-x",
            "vda",
            "-k",
            &socket,
            &room.text("disk.qcow2"),
        ])
        .spawn()
        .expect("qemu-nbd");
    while !Path::new(&socket).exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let source = format!("vda=nbd+unix:///vda?socket={socket}");
    let outcome = room.run(["backup", "web", "--disk", &source, "--bitmap", "since"]);
    server.kill().expect("end the server");
    server.wait().expect("its end");
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    judge(&room, &expected);
}

#[test]
fn a_bitmap_that_cannot_know_is_not_believed() {
    for (how, said) in [("disabled", "disabled"), ("late", "did not count yet")] {
        let room = Room::new();
        let mut expected = changed_image(&room);
        let image = room.text("disk.qcow2");
        room.ok(["backup", "web", "--disk", "vda=./disk.qcow2", "--bitmap", "since"]);
        if how == "disabled" {
            must("qemu-img", &["bitmap", "--disable", &image, "since"]);
        }
        expected[10 * MIB..10 * MIB + (64 << 10)].fill(9);
        must("qemu-io", &["-f", "qcow2", "-c", "write -P 9 10M 64k", &image]);
        let name = if how == "late" { "nightly" } else { "since" };
        if how == "late" {
            must("qemu-img", &["bitmap", "--add", &image, name]);
        }
        let outcome = room.json(["backup", "web", "--disk", "vda=./disk.qcow2", "--bitmap", name]);
        assert_eq!(outcome.code, 1, "{how}: {}", outcome.stderr);
        let warning = outcome.one("warning");
        assert!(warning["what"].as_str().is_some_and(|what| what.contains(said)), "{how}: {warning}");
        judge(&room, &expected);
    }
}
