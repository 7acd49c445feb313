//! What is refused before QEMU is started. Machines that run are in `tests/it/host.rs`.

use super::*;
use crate::host::{Disk, Network, Nic, shape::MEMORY_DEFAULT};

fn shape() -> Shape {
    Shape {
        name: "m".into(),
        uuid: uuid::Uuid::nil(),
        firmware: Firmware::Bios,
        machine_type: None,
        variables: None,
        memory: MEMORY_DEFAULT,
        cpus: 2,
        disks: vec![Disk { name: "vda".into(), bus: Bus::Virtio, boot_order: None }],
        nics: Vec::new(),
        network: Network::User,
    }
}

#[test]
fn limits_are_said_before_anything_starts() {
    let refused = |change: fn(&mut Shape)| {
        let mut shape = shape();
        change(&mut shape);
        matches!(Qemu.check(&shape), Err(Error::Shape { .. }))
    };
    assert!(Qemu.check(&shape()).is_ok(), "QEMU is installed by scripts/setup.sh");
    assert!(refused(|s| s.disks = vec![Disk { name: "d".into(), bus: Bus::Virtio, boot_order: None }; 25]));
    assert!(refused(|s| s.disks = vec![Disk { name: "d".into(), bus: Bus::Sata, boot_order: None }; 7]));
    assert!(refused(|s| s.nics = vec![Nic { mac: "52:54:00:00:00:01".into(), model: Default::default() }; 24]));
    assert!(refused(|s| s.memory = (1 << 30) + 1));
    assert!(refused(|s| s.memory = 0));
    assert!(refused(|s| s.cpus = 0));
}

#[test]
fn the_version_is_read() {
    assert!(version().expect("installed") >= VERSION_MIN);
}

#[test]
fn what_a_program_said_is_cut_to_its_end() {
    let log = tempfile::NamedTempFile::new().expect("log");
    std::fs::write(log.path(), "old\n\n  first \nlast\n").expect("write");
    assert_eq!(said(log.path(), 4), "first; last");
    assert_eq!(said(log.path(), 400), "it said nothing");
}
