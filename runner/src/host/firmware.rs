//! Which firmware a machine is started with.
//!
//! The rule, first match wins: what the backup says of the machine; an EFI system partition; a BIOS boot
//! partition; any GPT disk; else BIOS. The rule that decided is part of the answer, so that a wrong guess can be
//! seen and overruled.
//!
//! Invariants
//! - Pure: reads the given disks, changes nothing.
//! - A disk that cannot be read is an error; a damaged table is a hint beside the decision.
//!
//! Not here: firmware files and how QEMU is given them ([`super::qemu`]).

use std::fmt;

use aquifer_vdisk::Disk;
use serde::{Deserialize, Serialize};

use super::partition::Table;

/// What starts the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF.
    Uefi,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// The machine's description names it.
    Described,
    /// A disk has an EFI system partition.
    EfiSystemPartition,
    /// A disk has a BIOS boot partition and none has an EFI system partition.
    BiosBootPartition,
    /// A disk is partitioned by GPT.
    GptDisk,
    /// Nothing speaks for UEFI.
    Otherwise,
}

/// The decision and what led to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What starts the machine.
    pub firmware: Firmware,
    /// Which rule decided.
    pub rule: Rule,
    /// The disk that decided, by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// What a person may want to look at: sentences without a full stop.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hints: Vec<String>,
}

impl fmt::Display for Firmware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bios => "BIOS",
            Self::Uefi => "UEFI",
        })
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", self.firmware)?;
        let disk = self.disk.as_deref().unwrap_or("?");
        match self.rule {
            Rule::Described => f.write_str("the machine's description says so")?,
            Rule::EfiSystemPartition => write!(f, "{disk} has an EFI system partition")?,
            Rule::BiosBootPartition => write!(f, "{disk} has a BIOS boot partition")?,
            Rule::GptDisk => write!(f, "{disk} is partitioned by GPT")?,
            Rule::Otherwise => f.write_str("no disk has GPT or an EFI system partition")?,
        }
        f.write_str(")")
    }
}

/// Decides for a machine with these disks, in its order; `described` is what its description says, if it does.
///
/// # Errors
/// What a disk's source reports.
pub fn decide(described: Option<Firmware>, disks: &[Disk]) -> aquifer_vdisk::Result<Decision> {
    if let Some(firmware) = described {
        return Ok(Decision { firmware, rule: Rule::Described, disk: None, hints: Vec::new() });
    }
    let mut tables = Vec::with_capacity(disks.len());
    for disk in disks {
        tables.push((disk.name(), Table::read(disk)?));
    }
    Ok(decide_by_tables(&tables))
}

fn decide_by_tables(tables: &[(&str, Table)]) -> Decision {
    let first = |wanted: fn(&Table) -> bool| tables.iter().position(|(_, table)| wanted(table));
    let esp = first(|t| matches!(t, Table::Gpt(k) | Table::Mbr(k) if k.esp));
    let bios_boot = first(|t| matches!(t, Table::Gpt(k) if k.bios_boot));
    // A damaged GPT is still a disk that somebody partitioned by GPT.
    let gpt = first(|t| matches!(t, Table::Gpt(_) | Table::Damaged("gpt")));
    let (firmware, rule, by) = match (esp, bios_boot, gpt) {
        (Some(by), _, _) => (Firmware::Uefi, Rule::EfiSystemPartition, Some(by)),
        (None, Some(by), _) => (Firmware::Bios, Rule::BiosBootPartition, Some(by)),
        (None, None, Some(by)) => (Firmware::Uefi, Rule::GptDisk, Some(by)),
        (None, None, None) => (Firmware::Bios, Rule::Otherwise, None),
    };
    let mut hints = Vec::new();
    for (name, table) in tables {
        if let Table::Damaged(kind) = table {
            hints.push(format!("{name}: its {kind} partition table cannot be read"));
        }
    }
    if esp.is_some() && bios_boot.is_some() {
        hints.push("the machine can also start by BIOS: there is a BIOS boot partition".to_owned());
    }
    if rule == Rule::GptDisk && by != Some(0) {
        let name = by.and_then(|by| tables.get(by)).map_or("a disk", |(name, _)| *name);
        hints.push(format!(
            "only {name} has GPT and it is not the first disk; if the machine does not start, it wants BIOS"
        ));
    }
    let disk = by.and_then(|by| tables.get(by)).map(|(name, _)| (*name).to_owned());
    Decision { firmware, rule, disk, hints }
}

#[cfg(test)]
mod tests;
