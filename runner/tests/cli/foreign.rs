//! Promise: disks of other products go through every verb as qcow2 does, and give the bytes QEMU reads.

use std::fs;

use crate::{harness::Room, images};

/// A chain of two VMware disks in the room; what the newer one holds is in `truth.raw`.
fn vmdk_chain(room: &Room) -> Vec<u8> {
    images::write(&room.path("content.raw"), &images::disk(1));
    let [base, top, truth] = ["base.vmdk", "top.vmdk", "truth.raw"].map(|name| room.text(name));
    let options = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    images::must("qemu-img", &[&options[..], &[&room.text("content.raw"), &base]].concat());
    images::must("qemu-img", &["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", &base, &top]);
    images::must("qemu-io", &["-f", "vmdk", "-c", "write -q -P 7 1000k 300k", &top]);
    images::must("qemu-img", &["convert", "-f", "vmdk", "-O", "raw", &top, &truth]);
    fs::read(truth).expect("read")
}

#[test]
fn vmware_disks_go_through_every_verb() {
    let room = Room::new();
    let bytes = vmdk_chain(&room);
    let disk = room.json(["info", "top.vmdk"]).one("disk");
    assert_eq!((disk["kind"].as_str(), disk["size"].as_u64()), (Some("vmdk"), Some(bytes.len() as u64)));
    assert_eq!(disk["layers"].as_array().map(Vec::len), Some(2));
    let ranges = room.json(["map", "top.vmdk"]).kind("range");
    assert!(ranges.iter().any(|range| range["kind"] == "data"));
    assert_eq!(room.run(["verify", "top.vmdk"]).code, 0);
    let served = room.ok(["mount", "top.vmdk", "--run", "qemu-img compare -f raw -F raw \"$uri\" truth.raw"]);
    assert!(served.stdout.contains("Images are identical"), "{}", served.stdout);
    room.ok(["export", "top.vmdk", "out.raw"]);
    assert_eq!(fs::read(room.path("out.raw")).expect("out.raw"), bytes);
}

#[test]
fn a_chain_that_does_not_fit_together_is_told_with_its_file() {
    let room = Room::new();
    vmdk_chain(&room);
    images::must(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "vmdk", &room.text("content.raw"), &room.text("base.vmdk")],
    );
    let broken = room.run(["info", "top.vmdk"]);
    assert_eq!(broken.code, 14, "{}", broken.stderr);
    assert!(broken.stderr.contains("base.vmdk") && broken.stderr.contains("content id"), "{}", broken.stderr);
    fs::create_dir(room.path("away")).expect("a folder");
    fs::rename(room.path("base.vmdk"), room.path("away/base.vmdk")).expect("rename");
    assert_ne!(room.run(["info", "top.vmdk"]).code, 0);
}
