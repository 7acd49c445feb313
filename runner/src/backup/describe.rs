//! The machine's description as it travels with the point.

use std::{fs, io::Read, path::Path};

use aquifer_formats::repo::{
    DiskName, UefiVariables, VARIABLES_BYTES_MAX,
    record::{DiskDescription, Firmware, MachineDescription, NicDescription},
};

use super::Wanted;
use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    machine::{Described, DescribedDisk, FirmwareKind},
};

/// Where a machine's description is.
pub(crate) struct About<'a> {
    /// Name of the machine.
    pub(crate) machine: &'a str,
    /// TOML or libvirt XML.
    pub(crate) description: Option<&'a Path>,
    /// File with its UEFI variables.
    pub(crate) nvram: Option<&'a Path>,
    /// Disks that are meant to be missing.
    pub(crate) left_out: &'a [String],
}

/// Puts together what is known: the file's word where there is one, and the disks that are stored.
pub(crate) fn describe(context: &Context, args: &About<'_>, wanted: &[Wanted]) -> Result<MachineDescription> {
    let said = match args.description {
        Some(path) => Described::read(path)?,
        None => Described::default(),
    };
    let disks = wanted.iter().map(|disk| {
        let known = said.disks.iter().find(|known| known.name == disk.name.as_str());
        DiskDescription {
            name: disk.name.clone(),
            size: Some(disk.disk.size()),
            bus: known.and_then(|known| known.bus.clone()),
            boot_order: known.and_then(|known| known.boot_order),
        }
    });
    let disks: Vec<DiskDescription> = disks.collect();
    let is_missed = |known: &&DescribedDisk| {
        wanted.iter().all(|disk| disk.name.as_str() != known.name) && !args.left_out.contains(&known.name)
    };
    for left in said.disks.iter().filter(is_missed) {
        context.out.warn(Code::WarnSkipped, left_out(left), Some(&format!("add --disk {}=SOURCE", left.name)));
    }
    let variables = match (args.nvram, &said.nvram) {
        (Some(path), _) => Some(variables(path)?),
        (None, Some(path)) => {
            let what = format!("the machine's UEFI variables ({path}) are not backed up");
            context.out.warn(Code::WarnSkipped, what, Some(&format!("add --nvram {}", quoted(path))));
            None
        }
        (None, None) => None,
    };
    Ok(of_described(said, args.machine, disks, variables))
}

/// A description as points keep it.
pub(crate) fn of_described(
    said: Described,
    machine: &str,
    disks: Vec<DiskDescription>,
    variables: Option<UefiVariables>,
) -> MachineDescription {
    MachineDescription {
        variables,
        name: said.name.unwrap_or_else(|| machine.to_owned()),
        uuid: said.uuid,
        firmware: said.firmware.map(|kind| match kind {
            FirmwareKind::Bios => Firmware::Bios,
            FirmwareKind::Uefi => Firmware::Uefi,
        }),
        machine_type: said.machine_type,
        cpus: said.cpus,
        memory_bytes: said.memory,
        disks: in_order(disks, &said.disks),
        nics: said
            .nics
            .into_iter()
            .map(|nic| NicDescription { mac: nic.mac, network: nic.network, model: nic.model })
            .collect(),
    }
}

/// The content of a file of UEFI variables.
pub(crate) fn variables(path: &Path) -> Result<UefiVariables> {
    let label = path.display().to_string();
    let read = |e: &std::io::Error| Fail::io(&label, "read", e);
    let mut content = Vec::new();
    let file = fs::File::open(path).map_err(|e| read(&e))?;
    // One byte more than can be: what is too long is refused, not cut.
    file.take(u64::from(VARIABLES_BYTES_MAX) + 1).read_to_end(&mut content).map_err(|e| read(&e))?;
    Ok(UefiVariables::of(&label, &content)?)
}

fn left_out(disk: &DescribedDisk) -> String {
    let source = disk.source.as_deref().map(|source| format!(" ({source})")).unwrap_or_default();
    format!("the machine's disk {}{source} is not backed up", disk.name)
}

/// The order of the description, then that of the command line.
fn in_order(mut disks: Vec<DiskDescription>, said: &[DescribedDisk]) -> Vec<DiskDescription> {
    let place = |name: &DiskName| said.iter().position(|known| known.name == name.as_str()).unwrap_or(usize::MAX);
    disks.sort_by_key(|disk| place(&disk.name));
    disks
}
