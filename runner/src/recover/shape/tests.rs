//! Descriptions become shapes: what was said is kept, what was not is filled in, what cannot be is told.

use super::*;

fn described(text: &str) -> Described {
    Described::parse("test.toml", text).expect("a description")
}

#[test]
fn a_machine_nobody_described_has_the_defaults() {
    let shaped = shape("db01", &["vda".into()], &Described::default(), &Wishes::default());
    let shape = shaped.shape;
    assert_eq!((shape.cpus, shape.memory, shape.nics.len()), (2, 4 << 30, 1));
    assert_eq!(shape.disks, [Disk { name: "vda".into(), bus: Bus::Virtio, boot_order: None }]);
    assert!(shape.nics[0].mac.starts_with("52:54:00:") && shape.nics[0].mac.len() == 17);
    assert!(shaped.warnings.is_empty());
}

#[test]
fn what_was_said_is_kept_and_wishes_win() {
    let said = described(
        "version = 1\nname = \"db01\"\nuuid = \"1b4e28ba-2fa1-11d2-883f-0016d3cca427\"\nfirmware = \"uefi\"\ncpus = 3\n\
         memory = \"1GiB\"\n[[disk]]\nname = \"sda\"\nbus = \"scsi\"\nboot_order = 2\n[[disk]]\nname = \"sdb\"\nbus = \"ide\"\n\
         [[nic]]\nmac = \"52:54:00:12:34:56\"\nmodel = \"vmxnet3\"\n",
    );
    let wishes = Wishes { cpus: Some(1), memory: Some(1000), ..Wishes::default() };
    let shaped = shape("db01", &["sda".into(), "sdb".into()], &said, &wishes);
    assert_eq!(shaped.shape.uuid.to_string(), "1b4e28ba-2fa1-11d2-883f-0016d3cca427");
    assert_eq!((shaped.shape.cpus, shaped.shape.memory), (1, 1 << 20));
    assert_eq!(shaped.shape.disks[0].bus, Bus::Scsi);
    assert_eq!(shaped.shape.disks[0].boot_order, Some(2));
    assert_eq!(shaped.shape.disks[1].bus, Bus::Sata);
    assert_eq!(shaped.shape.nics[0].mac, "52:54:00:12:34:56");
    assert_eq!(shaped.warnings.len(), 2, "{:?}", shaped.warnings);
    assert_eq!(named_firmware(&said, &wishes), Some(Firmware::Uefi));
    let bios = Wishes { firmware: Some(Firmware::Bios), ..Wishes::default() };
    assert_eq!(named_firmware(&said, &bios), Some(Firmware::Bios));
}

#[test]
fn a_machine_described_without_cards_has_none() {
    let cards = |text: &str| shape("db01", &["vda".into()], &described(text), &Wishes::default()).shape.nics.len();
    assert_eq!(cards("version = 1\ncpus = 2\n"), 0);
    assert_eq!(cards("version = 1\nname = \"db01\"\n[[disk]]\nname = \"vda\"\n"), 1, "only named");
}

#[test]
fn disks_take_the_names_the_machine_knows() {
    let names = |all: &[&str]| all.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let said = described("version = 1\n[[disk]]\nname = \"vda\"\n[[disk]]\nname = \"vdb\"\n");
    assert_eq!(disk_names(&names(&["image"]), &Described::default()).expect("own"), ["image"]);
    assert_eq!(disk_names(&names(&["vdb"]), &said).expect("some of them"), ["vdb"]);
    assert_eq!(disk_names(&names(&["a", "b"]), &said).expect("by place"), ["vda", "vdb"]);
    assert_eq!(disk_names(&names(&["a"]), &said).expect_err("which one?").code, Code::Usage);
}

#[test]
fn a_stored_description_comes_back_whole() {
    let stored_form = MachineDescription {
        name: "db01".into(),
        uuid: Some(Uuid::from_u128(7)),
        firmware: Some(StoredFirmware::Uefi),
        machine_type: Some("pc-q35-7.2".into()),
        variables: None,
        cpus: Some(3),
        memory_bytes: Some(1 << 30),
        disks: vec![DiskDescription {
            name: aquifer_formats::repo::DiskName::new("sda").expect("name"),
            size: Some(5),
            bus: Some("scsi".into()),
            boot_order: Some(1),
        }],
        nics: vec![NicDescription {
            mac: Some("52:54:00:12:34:56".into()),
            network: Some("default".into()),
            model: Some("e1000e".into()),
        }],
    };
    let back = stored(&stored_form);
    assert_eq!((back.uuid, back.cpus, back.memory), (Some(Uuid::from_u128(7)), Some(3), Some(1 << 30)));
    assert_eq!(back.firmware, Some(FirmwareKind::Uefi));
    let shape = shape("db01", &["sda".into()], &back, &Wishes::default()).shape;
    assert_eq!(shape.disks, [Disk { name: "sda".into(), bus: Bus::Scsi, boot_order: Some(1) }]);
    assert_eq!(shape.machine_type.as_deref(), Some("pc-q35-7.2"));
    assert_eq!(shape.nics, [Nic { mac: "52:54:00:12:34:56".into(), model: NicModel::E1000e }]);
}

#[test]
fn the_old_board_has_its_own_controller() {
    let said = described("version = 1\nmachine_type = \"pc-i440fx-7.2\"\n[[disk]]\nname = \"hda\"\nbus = \"ide\"\n");
    let shaped = shape("old", &["hda".into()], &said, &Wishes::default());
    assert_eq!(shaped.shape.disks[0].bus, Bus::Ide);
    assert!(shaped.warnings.is_empty(), "{:?}", shaped.warnings);
}
