//! A machine described in TOML.
//!
//! ```toml
//! version = 1
//! name = "db01"
//! uuid = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
//! firmware = "uefi"                  # or "bios"
//! machine_type = "q35"
//! nvram = "/var/lib/libvirt/qemu/nvram/db01_VARS.fd"
//! cpus = 2
//! memory = "4GiB"
//! [[disk]]
//! name = "vda"
//! bus = "virtio"                     # virtio, scsi, sata, nvme, ide
//! boot_order = 1
//! [[nic]]
//! mac = "52:54:00:12:34:56"
//! model = "virtio"
//! ```

use super::{DEVICES_MAX, Described, DescribedDisk, DescribedNic, FirmwareKind, mac_of, plain_name};
use crate::{fail::Result, strict::Reader, units};

/// Buses a disk can hang on.
const BUSES: [&str; 6] = ["virtio", "scsi", "sata", "nvme", "ide", "usb"];

pub(super) fn parse(label: &str, text: &str) -> Result<Described> {
    let mut reader = Reader::new(label, text);
    let top = reader.parse();
    let top = top.get_ref();
    let known = ["version", "name", "uuid", "firmware", "machine_type", "nvram", "cpus", "memory", "disk", "nic"];
    reader.only(top, "the machine's description", &known);
    reader.integer(top, "version", 1..=1);
    let described = Described {
        name: reader.parsed(top, "name", plain_name),
        uuid: reader.parsed(top, "uuid", |text| uuid::Uuid::try_parse(text).map_err(|e| e.to_string())),
        firmware: reader.parsed(top, "firmware", firmware),
        machine_type: reader.string(top, "machine_type"),
        nvram: reader.string(top, "nvram"),
        cpus: reader.integer(top, "cpus", 1..=4096).and_then(|cpus| u32::try_from(cpus).ok()),
        memory: reader.parsed(top, "memory", |text| units::parse_bytes(text).map_err(|fail| fail.what)),
        disks: disks(&mut reader, top),
        nics: nics(&mut reader, top),
    };
    reader.finish(Some(described))
}

fn disks<'a>(reader: &mut Reader<'a>, top: &toml::de::DeTable<'a>) -> Vec<DescribedDisk> {
    let mut disks: Vec<DescribedDisk> = Vec::new();
    let tables = reader.tables(top, "disk");
    if tables.len() > DEVICES_MAX {
        reader.problem(Reader::place_of(top, "disk"), format!("more than {DEVICES_MAX} disks"));
    }
    for table in tables.into_iter().take(DEVICES_MAX) {
        reader.only(table, "a disk", &["name", "bus", "source", "boot_order"]);
        let Some(name) = reader.parsed(table, "name", plain_name) else {
            if table.get("name").is_none() {
                reader.problem(Reader::place_of(top, "disk"), "a disk without a `name`");
            }
            continue;
        };
        if disks.iter().any(|disk| disk.name == name) {
            reader.problem(Reader::place_of(table, "name"), format!("two disks are called `{name}`"));
        }
        let bus = reader.parsed(table, "bus", |text| match BUSES.contains(&text) {
            true => Ok(text.to_owned()),
            false => Err(format!("`{text}` is none of {}", BUSES.join(", "))),
        });
        let source = reader.string(table, "source");
        let boot_order = reader.integer(table, "boot_order", 1..=255).and_then(|n| u32::try_from(n).ok());
        disks.push(DescribedDisk { name, bus, source, boot_order });
    }
    disks
}

fn nics<'a>(reader: &mut Reader<'a>, top: &toml::de::DeTable<'a>) -> Vec<DescribedNic> {
    let mut nics = Vec::new();
    let tables = reader.tables(top, "nic");
    if tables.len() > DEVICES_MAX {
        reader.problem(Reader::place_of(top, "nic"), format!("more than {DEVICES_MAX} network cards"));
    }
    for table in tables.into_iter().take(DEVICES_MAX) {
        reader.only(table, "a network card", &["mac", "model", "network"]);
        let mac = reader.parsed(table, "mac", |text| mac_of(text).ok_or_else(|| format!("`{text}` is no address")));
        nics.push(DescribedNic { mac, model: reader.string(table, "model"), network: reader.string(table, "network") });
    }
    nics
}

fn firmware(text: &str) -> Result<FirmwareKind, String> {
    match text {
        "bios" => Ok(FirmwareKind::Bios),
        "uefi" => Ok(FirmwareKind::Uefi),
        _ => Err(format!("`{text}` is neither bios nor uefi")),
    }
}
