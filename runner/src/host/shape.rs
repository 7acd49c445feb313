//! A machine as a hypervisor needs to know it.
//!
//! Not here: where a description comes from and how it is written down (`aquifer_formats`' machine description,
//! `recover`).

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::firmware::Firmware;

/// Memory of a machine nobody described, in bytes.
pub const MEMORY_DEFAULT: u64 = 4 << 30;

/// Processors of a machine nobody described.
pub const CPUS_DEFAULT: u32 = 2;

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Its name: letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// Its identity, as the guest's firmware tells it.
    pub uuid: Uuid,
    /// What starts it.
    pub firmware: Firmware,
    /// Its board, by QEMU's names, where somebody said which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_type: Option<String>,
    /// Bytes of the UEFI variables it brings along; they lie in its folder before it starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<u64>,
    /// Bytes of memory, whole MiB.
    pub memory: u64,
    /// Number of processors.
    pub cpus: u32,
    /// Its disks, in the order it sees them.
    pub disks: Vec<Disk>,
    /// Its network cards.
    pub nics: Vec<Nic>,
    /// Where its cards are plugged in.
    pub network: Network,
}

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name.
    pub name: String,
    /// What it hangs on.
    pub bus: Bus,
    /// Place in the order the firmware tries to start from, from 1; where no disk has one, the first is it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_order: Option<u32>,
}

/// What a disk hangs on. The guest has to have a driver for it: a changed bus may not start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bus {
    /// virtio-blk, a PCI device for each disk.
    #[default]
    Virtio,
    /// A disk on one virtio-scsi controller.
    Scsi,
    /// A disk on the board's SATA controller; every system has a driver.
    Sata,
    /// NVMe, a controller for each disk.
    Nvme,
    /// The old board's own controller, two channels of two disks.
    Ide,
}

/// Kinds of board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Board {
    /// PCI Express, SATA.
    Q35,
    /// PCI, IDE.
    Pc,
}

impl Board {
    /// The kind that a machine type belongs to; the newer one where nothing is said.
    pub fn of(machine_type: Option<&str>) -> Self {
        let old = |said: &str| said == "pc" || (said.starts_with("pc-") && !said.starts_with("pc-q35"));
        if machine_type.is_some_and(old) { Self::Pc } else { Self::Q35 }
    }

    /// QEMU's name for its newest one.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Pc => "pc",
        }
    }
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its address; the same as the original's unless a new one was asked for.
    pub mac: String,
    /// Its model: `virtio`, `e1000e`, `rtl8139`.
    pub model: NicModel,
}

/// Model of a network card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NicModel {
    /// virtio-net.
    #[default]
    Virtio,
    /// Intel 82574L.
    E1000e,
    /// Intel 82540EM.
    E1000,
    /// Realtek 8139.
    Rtl8139,
}

/// Where network cards are plugged in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Behind an address translation of its own: the machine reaches out, nobody reaches it, and it cannot clash with
    /// its original.
    #[default]
    User,
    /// Nowhere: the cards are there, their link is down.
    None,
}
