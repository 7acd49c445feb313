//! A machine in its folder on a host: `machine.toml` beside its disks.
//!
//! Invariants
//! - A disk's format is what its file's name ends in (`.raw`, `.img`, `.qcow2`), which a person or we wrote; nothing is
//!   probed.
//! - `source` of a disk is relative to the folder unless it is absolute.
//!
//! Not here: whether it runs (`Host::find`).

use std::{
    fs,
    path::{Path, PathBuf},
};

use aquifer_formats::repo::record::MachineDescription;

use super::{
    Attachment, ImageFormat, Shape,
    firmware::{self, Firmware},
};
use crate::{
    fail::{Code, Fail, Result},
    machine::{Described, DescribedDisk, DescribedNic, FirmwareKind},
    recover::shape::{Wishes, named_firmware, shape, stored},
};

/// Name of the description in a machine's folder.
pub const DESCRIPTION: &str = "machine.toml";

/// A disk in a machine's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedDisk {
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// What that is.
    pub format: ImageFormat,
}

/// A machine in its folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The folder.
    pub folder: PathBuf,
    /// What its description says.
    pub described: Described,
    /// Its disks, in order.
    pub disks: Vec<PlacedDisk>,
}

impl Placed {
    /// Reads the machine in `folder`.
    ///
    /// # Errors
    /// [`Code::NotFound`] where there is none; [`Code::Config`].
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(DESCRIPTION);
        let described = Described::read(&path)?;
        let disks = described.disks.iter().map(|disk| {
            let source = disk.source.clone().unwrap_or_else(|| format!("{}.qcow2", disk.name));
            let file = folder.join(source);
            let format = format_of(&file).ok_or_else(|| {
                let what =
                    format!("disk {} is {}, which ends neither in .raw, .img nor .qcow2", disk.name, file.display());
                Fail::new(Code::Config, what).at(path.display())
            })?;
            Ok(PlacedDisk { name: disk.name.clone(), path: file, format })
        });
        let disks = disks.collect::<Result<Vec<_>>>()?;
        Ok(Self { folder: folder.to_path_buf(), described, disks })
    }

    /// What its machine is attached to.
    pub fn attachments(&self) -> Vec<Attachment> {
        self.disks.iter().map(|disk| Attachment::File { path: disk.path.clone(), format: disk.format }).collect()
    }

    /// What the host is asked for.
    ///
    /// # Errors
    /// A disk that cannot be read, where the description does not say what starts the machine.
    pub fn shape(&self, name: &str, wishes: &Wishes, disks: &[aquifer_vdisk::Disk]) -> Result<Shape> {
        let names: Vec<String> = self.disks.iter().map(|disk| disk.name.clone()).collect();
        let mut shape = shape(name, &names, &self.described, wishes).shape;
        shape.firmware = match named_firmware(&self.described, wishes) {
            Some(firmware) => firmware,
            None if disks.is_empty() => Firmware::Bios,
            None => firmware::decide(None, disks)?.firmware,
        };
        Ok(shape)
    }
}

/// The format a file's name ends in.
pub fn format_of(path: &Path) -> Option<ImageFormat> {
    match path.extension()?.to_str()? {
        "raw" | "img" => Some(ImageFormat::Raw),
        "qcow2" => Some(ImageFormat::Qcow2),
        _ => None,
    }
}

/// Writes the description of a machine whose disks are `disks`: names and files relative to the folder.
///
/// # Errors
/// I/O.
pub fn write(folder: &Path, description: &MachineDescription, disks: &[(String, String)]) -> Result<()> {
    let mut described = stored(description);
    described.disks = disks
        .iter()
        .map(|(name, file)| {
            let known = described.disks.iter().find(|disk| disk.name == *name).cloned();
            DescribedDisk { name: name.clone(), source: Some(file.clone()), ..known.unwrap_or_default() }
        })
        .collect();
    let text = text(&described);
    fs::create_dir_all(folder).map_err(|e| Fail::io(folder.display(), "create", &e))?;
    crate::replica::digests::put_file(&folder.join(DESCRIPTION), text.as_bytes())
}

/// A description as it is written.
pub(crate) fn text(described: &Described) -> String {
    let mut out = String::from("version = 1\n");
    let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let mut line = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            out.push_str(&format!("{key} = {value}\n"));
        }
    };
    line("name", described.name.as_deref().map(quoted));
    line("uuid", described.uuid.map(|uuid| quoted(&uuid.to_string())));
    let firmware = described.firmware.map(|kind| match kind {
        FirmwareKind::Bios => "bios",
        FirmwareKind::Uefi => "uefi",
    });
    line("firmware", firmware.map(quoted));
    line("machine_type", described.machine_type.as_deref().map(quoted));
    line("cpus", described.cpus.map(|cpus| cpus.to_string()));
    line("memory", described.memory.map(|bytes| quoted(&format!("{bytes}B"))));
    for DescribedDisk { name, bus, source, boot_order } in &described.disks {
        line("\n[[disk]]\nname", Some(quoted(name)));
        line("bus", bus.as_deref().map(quoted));
        line("source", source.as_deref().map(quoted));
        line("boot_order", boot_order.map(|order| order.to_string()));
    }
    for DescribedNic { mac, model, network } in &described.nics {
        line("\n[[nic]]\nmodel", Some(quoted(model.as_deref().unwrap_or("virtio"))));
        line("mac", mac.as_deref().map(quoted));
        line("network", network.as_deref().map(quoted));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("folder");
        let mut description = MachineDescription { name: "db \"01\"".into(), cpus: Some(3), ..Default::default() };
        description.name = "db01".into();
        description.memory_bytes = Some(256 << 20);
        let disks = [("vda".to_owned(), "vda/7.qcow2".to_owned()), ("vdb".to_owned(), "b.raw".to_owned())];
        write(dir.path(), &description, &disks).expect("write");
        let placed = Placed::read(dir.path()).expect("read");
        assert_eq!(placed.described.memory, Some(256 << 20));
        assert_eq!(placed.described.cpus, Some(3));
        let found: Vec<_> = placed.disks.iter().map(|d| (d.path.clone(), d.format)).collect();
        assert_eq!(
            found,
            [(dir.path().join("vda/7.qcow2"), ImageFormat::Qcow2), (dir.path().join("b.raw"), ImageFormat::Raw)]
        );
        assert!(Placed::read(&dir.path().join("none")).is_err());
        fs::write(dir.path().join(DESCRIPTION), "version = 1\n[[disk]]\nname = \"a\"\nsource = \"a.vmdk\"\n")
            .expect("w");
        assert_eq!(Placed::read(dir.path()).expect_err("no format").code, Code::Config);
    }
}
