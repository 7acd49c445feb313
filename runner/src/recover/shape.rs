//! From what somebody said about a machine to what a host is asked for.
//!
//! Invariants
//! - What was said wins over defaults; what was said on the command line wins over all.
//! - Anything that could not be taken as it was said is in [`Shaped::warnings`].

use aquifer_formats::repo::record::{DiskDescription, Firmware as StoredFirmware, MachineDescription, NicDescription};
use uuid::Uuid;

use crate::{
    fail::{Code, Fail, Result},
    host::{
        Bus, Disk, Network, Nic, Shape,
        firmware::Firmware,
        shape::{Board, CPUS_DEFAULT, MEMORY_DEFAULT, NicModel},
    },
    machine::{Described, DescribedDisk, DescribedNic, FirmwareKind},
};

/// What the command line says about the machine.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Memory, bytes.
    pub memory: Option<u64>,
    /// Processors.
    pub cpus: Option<u32>,
    /// Firmware.
    pub firmware: Option<Firmware>,
    /// Where its network cards are plugged in.
    pub network: Network,
}

/// A machine, and what had to be changed about it.
#[derive(Clone, Debug)]
pub struct Shaped {
    /// What the host is asked for. Its firmware is decided later.
    pub shape: Shape,
    /// What could not be taken as it was said.
    pub warnings: Vec<String>,
}

/// The firmware somebody named.
pub fn named_firmware(described: &Described, wishes: &Wishes) -> Option<Firmware> {
    let kind = described.firmware.map(|kind| match kind {
        FirmwareKind::Bios => Firmware::Bios,
        FirmwareKind::Uefi => Firmware::Uefi,
    });
    wishes.firmware.or(kind)
}

/// The machine `name` with disks of these names, in order.
pub fn shape(name: &str, disks: &[String], described: &Described, wishes: &Wishes) -> Shaped {
    let mut warnings = Vec::new();
    let uuid = described.uuid.unwrap_or_else(Uuid::new_v4);
    let board = Board::of(described.machine_type.as_deref());
    let disks = disks.iter().enumerate().map(|(index, disk)| {
        let said = said_about(described, disk, index);
        let bus = bus(disk, said.and_then(|d| d.bus.as_deref()), board, &mut warnings);
        Disk { name: disk.clone(), bus, boot_order: said.and_then(|d| d.boot_order) }
    });
    let disks = disks.collect();
    // A machine whose hardware nobody described gets one card; one described without cards gets none.
    let unknown = [DescribedNic::default()];
    let nics = if says_hardware(described) { &described.nics[..] } else { &unknown };
    let nics = nics.iter().enumerate().map(|(index, said)| nic(uuid, index, said, &mut warnings)).collect();
    let memory = wishes.memory.or(described.memory).unwrap_or(MEMORY_DEFAULT);
    let shape = Shape {
        name: name.to_owned(),
        uuid,
        firmware: Firmware::Bios,
        machine_type: described.machine_type.clone(),
        variables: None,
        // Descriptions may hold odd kilobytes; a machine has whole mebibytes, and not less than was said.
        memory: memory.next_multiple_of(1 << 20),
        cpus: wishes.cpus.or(described.cpus).unwrap_or(CPUS_DEFAULT),
        disks,
        nics,
        network: wishes.network,
    };
    Shaped { shape, warnings }
}

/// Whether somebody described the machine, beyond its name and the names of its disks.
fn says_hardware(described: &Described) -> bool {
    !described.nics.is_empty() || described.cpus.is_some() || described.memory.is_some() || described.uuid.is_some()
}

/// The description that a restore point carries.
pub fn stored(description: &MachineDescription) -> Described {
    let disk = |disk: &DiskDescription| DescribedDisk {
        name: disk.name.as_str().to_owned(),
        bus: disk.bus.clone(),
        source: None,
        boot_order: disk.boot_order,
    };
    let nic = |nic: &NicDescription| DescribedNic {
        mac: nic.mac.clone(),
        model: nic.model.clone(),
        network: nic.network.clone(),
    };
    Described {
        name: Some(description.name.clone()),
        uuid: description.uuid,
        firmware: description.firmware.map(|firmware| match firmware {
            StoredFirmware::Bios => FirmwareKind::Bios,
            StoredFirmware::Uefi => FirmwareKind::Uefi,
        }),
        machine_type: description.machine_type.clone(),
        // The file it was is not the machine's any more; its content is with the point.
        nvram: None,
        cpus: description.cpus,
        memory: description.memory_bytes,
        disks: description.disks.iter().map(disk).collect(),
        nics: description.nics.iter().map(nic).collect(),
    }
}

/// What a description says about a disk: by its name, else by its place.
fn said_about<'a>(described: &'a Described, name: &str, index: usize) -> Option<&'a DescribedDisk> {
    described.disks.iter().find(|d| d.name == name).or_else(|| described.disks.get(index))
}

/// Names for the disks of a source, as the machine knows them.
///
/// # Errors
/// [`Code::Usage`] where the description has another number of disks.
pub fn disk_names(found: &[String], described: &Described) -> Result<Vec<String>> {
    if described.disks.is_empty() {
        return Ok(found.to_vec());
    }
    if found.iter().all(|name| described.disks.iter().any(|d| d.name == *name)) {
        return Ok(found.to_vec());
    }
    if found.len() == described.disks.len() {
        return Ok(described.disks.iter().map(|d| d.name.clone()).collect());
    }
    let names = |all: &mut dyn Iterator<Item = &str>| all.collect::<Vec<_>>().join(", ");
    let have = names(&mut described.disks.iter().map(|d| d.name.as_str()));
    let what = format!(
        "the description has {} disks ({have}), the source has {} ({})",
        described.disks.len(),
        found.len(),
        names(&mut found.iter().map(String::as_str))
    );
    let named = "`--disk NAME=SOURCE` says for each which one it is";
    Err(Fail::new(Code::Usage, what).at("the machine's description").cause(named))
}

fn bus(disk: &str, said: Option<&str>, board: Board, warnings: &mut Vec<String>) -> Bus {
    match said {
        Some("ide") if board == Board::Pc => Bus::Ide,
        None | Some("virtio") => Bus::Virtio,
        Some("scsi") => Bus::Scsi,
        Some("sata") => Bus::Sata,
        Some("nvme") => Bus::Nvme,
        Some(other) => {
            warnings.push(format!("disk {disk} was on {other} and is attached by SATA"));
            Bus::Sata
        }
    }
}

fn nic(machine: Uuid, index: usize, said: &DescribedNic, warnings: &mut Vec<String>) -> Nic {
    let model = match said.model.as_deref() {
        None | Some("virtio" | "virtio-net" | "virtio-net-pci") => NicModel::Virtio,
        Some("e1000e") => NicModel::E1000e,
        Some("e1000") => NicModel::E1000,
        Some("rtl8139") => NicModel::Rtl8139,
        Some(other) => {
            warnings.push(format!("network card {index} was of model {other} and becomes e1000e"));
            NicModel::E1000e
        }
    };
    Nic { mac: said.mac.clone().unwrap_or_else(|| mac(machine, index)), model }
}

/// An address for a card without one: the same each time for the same machine, of the range QEMU uses.
fn mac(machine: Uuid, index: usize) -> String {
    let mut hash = blake3::Hasher::new();
    hash.update(machine.as_bytes()).update(&index.to_le_bytes());
    let digest = hash.finalize();
    let [a, b, c, ..] = *digest.as_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

#[cfg(test)]
mod tests;
