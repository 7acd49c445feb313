//! Exports as XenServer and XCP-ng write them: members for a folder that `tar` packs.

use std::{fs, path::Path, process::Command};

use sha1::{Digest, Sha1};

/// Bytes of a block.
const BLOCK: usize = 1 << 20;

fn field(name: &str, value: &str) -> String {
    format!("<member><name>{name}</name><value>{value}</value></member>")
}

fn object(class: &str, id: &str, snapshot: &str) -> String {
    let snapshot = field("snapshot", &format!("<struct>{snapshot}</struct>"));
    format!("<value><struct>{}{}{snapshot}</struct></value>", field("class", class), field("id", id))
}

/// The description of a machine with these disks: device and size.
fn description(disks: &[(&str, u64)]) -> String {
    let mut objects = object("VM", "Ref:0", &field("name_label", "a &amp; b"));
    for (number, (device, size)) in disks.iter().enumerate() {
        let (disk, attached) = (format!("Ref:{}", 10 + number), format!("Ref:{}", 50 + number));
        objects += &object("VDI", &disk, &(field("uuid", "x") + &field("virtual_size", &size.to_string())));
        objects += &object("VBD", &attached, &(field("VDI", &disk) + &field("device", device)));
    }
    let version = field("version", "<struct><member><name>export_vsn</name><value>2</value></member></struct>");
    let objects = field("objects", &format!("<array><data>{objects}</data></array>"));
    format!("<?xml version='1.0'?><value><struct>{version}{objects}</struct></value>")
}

/// Writes an export of `disks` (device, bytes) to `path`: first and last block always, others where they are not
/// zeros, each with its checksum: SHA-1. `folder` is made for the members. Behind every other block comes an empty one, as where nothing was sent for some seconds: it takes a number, and
/// what follows is numbered from there.
///
/// # Panics
/// `tar` does not run, or a file cannot be written.
pub fn export(folder: &Path, path: &Path, disks: &[(&str, &[u8])]) {
    fs::create_dir_all(folder).expect("a folder");
    let mut members = vec!["ova.xml".to_owned()];
    let sizes: Vec<(&str, u64)> = disks.iter().map(|(device, bytes)| (*device, bytes.len() as u64)).collect();
    fs::write(folder.join("ova.xml"), description(&sizes)).expect("write");
    for (number, (_, bytes)) in disks.iter().enumerate() {
        let disk = format!("Ref:{}", 10 + number);
        fs::create_dir_all(folder.join(&disk)).expect("a folder");
        let mut member = |number: usize, part: &[u8]| {
            let name = format!("{disk}/{number:08}");
            let sum: String = Sha1::digest(part).iter().map(|byte| format!("{byte:02x}")).collect();
            fs::write(folder.join(&name), part).expect("write");
            fs::write(folder.join(format!("{name}.checksum")), sum).expect("write");
            members.extend([name.clone(), format!("{name}.checksum")]);
        };
        let last = bytes.len().div_ceil(BLOCK) - 1;
        let (mut written, mut more) = (0, 0);
        for (block, part) in bytes.chunks(BLOCK).enumerate() {
            if block != 0 && block != last && part.iter().all(|byte| *byte == 0) {
                continue;
            }
            member(block + more, part);
            written += 1;
            if written % 2 == 1 && block != last {
                more += 1;
                member(block + more, &[]);
            }
        }
    }
    let mut tar = Command::new("tar");
    let tar = tar.arg("--format=ustar").arg("-C").arg(folder).arg("-cf").arg(path).args(&members).status();
    assert!(tar.expect("tar runs").success());
}
