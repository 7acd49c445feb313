//! The command line: formats, error policy, and names that try to be options.

use super::*;
use crate::host::{Disk, shape::MEMORY_DEFAULT};

fn line(shape: &Shape) -> Vec<String> {
    let door = |n| {
        Attachment::Door(crate::host::Door {
            socket: format!("/run/a,b/{n}").into(),
            export: "vda".into(),
            reconnect_s: 300,
        })
    };
    let doors: Vec<_> = (0..shape.disks.len()).map(door).collect();
    let places = Places { dir: "/vm/a,b".into(), runtime_dir: "/run/a,b".into() };
    let line = Line::new(shape, &doors, &places, Accel::Tcg).expect("line");
    line.args().iter().map(|a| a.to_str().expect("text").to_owned()).collect()
}

fn shape(buses: &[Bus]) -> Shape {
    let disk = |(n, bus): (usize, &Bus)| Disk { name: format!("disk,{n}"), bus: *bus, boot_order: None };
    Shape {
        name: "db01".into(),
        uuid: uuid::Uuid::nil(),
        firmware: Firmware::Bios,
        machine_type: None,
        variables: None,
        memory: MEMORY_DEFAULT,
        cpus: 2,
        disks: buses.iter().enumerate().map(disk).collect(),
        nics: vec![Nic { mac: "52:54:00:00:00:01".into(), model: NicModel::Virtio }],
        network: Network::User,
    }
}

#[test]
fn formats_are_named_and_errors_stop_the_machine() {
    let args = line(&shape(&[Bus::Virtio, Bus::Scsi, Bus::Sata]));
    let blockdevs: Vec<&String> =
        args.iter().zip(&args[1..]).filter(|(a, _)| *a == "-blockdev").map(|(_, b)| b).collect();
    assert_eq!(blockdevs.len(), 6);
    for pair in blockdevs.chunks(2) {
        assert!(pair[0].contains("\"driver\":\"nbd\"") && pair[0].contains("\"reconnect-delay\":300"), "{}", pair[0]);
        assert!(pair[1].contains("\"driver\":\"raw\""), "{}", pair[1]);
    }
    let disks: Vec<&String> = args.iter().filter(|a| a.contains("\"drive\":")).collect();
    assert_eq!(disks.len(), 3);
    assert!(disks.iter().all(|d| d.contains("\"rerror\":\"stop\"") && d.contains("\"werror\":\"stop\"")), "{disks:?}");
    assert_eq!(disks.iter().filter(|d| d.contains("bootindex")).count(), 1);
}

#[test]
fn a_machine_of_its_own_needs_no_door_and_starts_at_once() {
    let dir = tempfile::tempdir().expect("folder");
    let places = Places { dir: dir.path().into(), runtime_dir: dir.path().into() };
    let disk = Attachment::File { path: "/vm/db01/vda/disk.raw".into(), format: crate::host::ImageFormat::Raw };
    let line = Line::new(&shape(&[Bus::Virtio]), &[disk], &places, Accel::Tcg).expect("line");
    line.keep().expect("written");
    let text = fs::read_to_string(dir.path().join("qemu.command")).expect("command");
    assert!(text.contains(r#""filename":"/vm/db01/vda/disk.raw""#) && !text.contains("nbd"), "{text}");
    assert!(!text.split_whitespace().any(|word| word == "-S"), "{text}");
    let words = line.args().join(OsStr::new("\0"));
    assert!(super::super::is_machine_in(words.as_encoded_bytes(), dir.path()));
}

#[test]
fn a_name_with_commas_adds_no_option() {
    let args = line(&shape(&[Bus::Virtio]));
    let console = args.iter().find(|a| a.starts_with("socket,id=console")).expect("console");
    assert!(console.contains("path=/run/a,,b/console.sock,logfile=/vm/a,,b/console.log"), "{console}");
}

#[test]
fn a_card_without_a_network_has_no_peer() {
    let mut alone = shape(&[Bus::Virtio]);
    alone.network = Network::None;
    let args = line(&alone);
    assert!(!args.iter().any(|a| a == "-netdev"));
    assert!(args.iter().any(|a| a.contains("virtio-net-pci") && !a.contains("netdev")));
}

#[test]
fn the_boot_order_is_the_described_one() {
    let mut two = shape(&[Bus::Virtio, Bus::Virtio]);
    two.disks[1].boot_order = Some(1);
    let args = line(&two);
    let starts: Vec<bool> =
        args.iter().filter(|a| a.contains("\"drive\":")).map(|a| a.contains("\"bootindex\":1")).collect();
    assert_eq!(starts, [false, true]);
}

#[test]
fn the_old_board_has_two_channels_of_two() {
    let old = Shape { machine_type: Some("pc".into()), ..shape(&[Bus::Ide, Bus::Sata, Bus::Ide, Bus::Ide]) };
    let args = line(&old);
    assert!(args.contains(&"pc,vmport=off".to_owned()), "{args:?}");
    let places: Vec<String> = args
        .iter()
        .filter(|a| a.contains("\"drive\":"))
        .map(|a| serde_json::from_str::<Value>(a).expect("JSON"))
        .map(|d| format!("{}:{}", d["bus"].as_str().unwrap_or("?"), d["unit"]))
        .collect();
    assert_eq!(places, ["ide.0:0", "ahci.0:null", "ide.0:1", "ide.1:0"]);
}
