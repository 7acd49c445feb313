//! Where a machine of a host of the kind `qemu` is: its folder, its description, its disks, its sockets.
//!
//! ```text
//! IMAGES/MACHINE/machine.toml    description; a disk's `source` is its file, relative to the folder
//! IMAGES/MACHINE/vda.qcow2       where nothing is said: NAME.qcow2, NAME.raw or NAME.img
//! RUNTIME/MACHINE/qmp.sock       the monitor of a running machine; agent.sock its guest's agent
//! ```
//!
//! Not here: starting machines (`host`), replicas (`replica`).

use std::path::{Path, PathBuf};

use aquifer_formats::repo::DiskName;

use super::backup::fleece::Sockets;
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    machine::Described,
    site::Host,
};

/// A machine's place on its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its folder.
    pub folder: PathBuf,
    /// Folder of its sockets.
    pub runtime: PathBuf,
    /// Its description, if there is one.
    pub description: Option<PathBuf>,
    /// Its UEFI variables, if there are any.
    pub variables: Option<PathBuf>,
    /// Its disks.
    pub disks: Vec<(DiskName, PathBuf)>,
}

impl Place {
    /// Finds a machine on a host.
    ///
    /// # Errors
    /// [`Code::NotFound`]: no folder, no disk, or a disk without a file; a description that cannot be read.
    pub fn find(context: &Context, host_name: &str, host: &Host, machine: &str) -> Result<Self> {
        let folder = host.images.join(machine);
        if !folder.is_dir() {
            let what = format!("the host {host_name} has no machine `{machine}`");
            return Err(Fail::new(Code::NotFound, what).at(folder.display()));
        }
        let there = |name: &str| Some(folder.join(name)).filter(|path| path.is_file());
        let description = there("machine.toml");
        let described = description.as_deref().map_or_else(|| Ok(Described::default()), Described::read)?;
        let mut disks = Vec::new();
        for disk in &described.disks {
            disks.push((DiskName::new(disk.name.as_str())?, file_of(&folder, &disk.name, disk.source.as_deref())?));
        }
        if description.is_none() {
            disks = images_in(&folder)?;
        }
        if disks.is_empty() {
            return Err(Fail::new(Code::NotFound, format!("{machine} has no disks")).at(folder.display()));
        }
        let runtime = Self::runtime(context, host_name, host)?.join(machine);
        let variables = there("nvram.fd");
        Ok(Self { folder, runtime, description, variables, disks })
    }

    /// Folder below which the machines of a host have their sockets.
    ///
    /// # Errors
    /// As [`Context::runtime_dir`].
    pub fn runtime(context: &Context, host_name: &str, host: &Host) -> Result<PathBuf> {
        match &host.runtime {
            Some(dir) => Ok(dir.clone()),
            None => Ok(context.runtime_dir()?.join("hosts").join(host_name)),
        }
    }

    /// How the machine is reached while it runs.
    pub fn sockets(&self) -> Sockets {
        Sockets {
            monitor: self.runtime.join("qmp.sock"),
            agent: Some(self.runtime.join("agent.sock")).filter(|path| path.exists()),
            runtime: self.runtime.clone(),
            scratch: self.folder.clone(),
        }
    }
}

fn file_of(folder: &Path, name: &str, source: Option<&str>) -> Result<PathBuf> {
    let candidates = match source {
        Some(source) => vec![folder.join(source)],
        None => ["qcow2", "raw", "img"].iter().map(|end| folder.join(format!("{name}.{end}"))).collect(),
    };
    let missing = || {
        let what = format!("the disk {name} has no file; say `source` in machine.toml");
        Fail::new(Code::NotFound, what).at(folder.display())
    };
    candidates.iter().find(|path| path.is_file()).cloned().ok_or_else(missing)
}

/// Images of a folder that nobody has described, by name.
fn images_in(folder: &Path) -> Result<Vec<(DiskName, PathBuf)>> {
    let read = |e: &std::io::Error| Fail::io(folder.display(), "read", e);
    let mut disks = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| read(&e))? {
        let path = entry.map_err(|e| read(&e))?.path();
        let ends = path.extension().and_then(|end| end.to_str()).unwrap_or_default();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if ["qcow2", "raw", "img"].contains(&ends)
            && !stem.starts_with('.')
            && let Ok(name) = DiskName::new(stem)
        {
            disks.push((name, path));
        }
    }
    disks.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(disks)
}
