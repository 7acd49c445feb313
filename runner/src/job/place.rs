//! Where a machine of a host of the kind `qemu` is: its folder, its description, its disks, its sockets.
//!
//! ```text
//! IMAGES/MACHINE/machine.toml    description; a disk's `source` is its file, relative to the folder
//! IMAGES/MACHINE/vda.qcow2       where nothing is said: NAME.qcow2, NAME.raw or NAME.img
//! RUNTIME/MACHINE/qmp.sock       the monitor of a running machine; agent.sock its guest's agent
//! ```
//!
//! Two images that would be the same disk are refused, and never guessed between. Where nobody has described a machine,
//! each image is a disk of it, but for one that it runs without; one that is called like a copy of another is told.
//!
//! Not here: starting machines (`host`), replicas (`replica`).

use std::path::{Path, PathBuf};

use aquifer_formats::repo::DiskName;

use super::backup::fleece::{self, Sockets};
use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    host::qmp::Qmp,
    machine::Described,
    site::Host,
};

/// Disks by name, each with its file.
pub type Files = Vec<(DiskName, PathBuf)>;

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
    pub disks: Files,
}

impl Place {
    /// Finds a machine on a host.
    ///
    /// # Errors
    /// [`Code::NotFound`]: no folder, no disk, or a disk without a file; a description that cannot be read;
    /// [`Code::Refused`]: nobody says which of two images a disk is.
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

    /// The files of a machine that runs: where nobody has described it, one that it has not open at all is no disk of
    /// it, which is told.
    ///
    /// # Errors
    /// The monitor fails; [`Code::NotFound`]: it has none of them open.
    pub fn opened(&self, qmp: &mut Qmp, files: Files, tell: &dyn Fn(String)) -> Result<Files> {
        if self.description.is_some() {
            return Ok(files);
        }
        let strangers = fleece::unopened(qmp, &files)?;
        let (left_out, open): (Files, Files) = files.into_iter().partition(|(name, _)| strangers.contains(name));
        if open.is_empty() {
            let what = "the running machine has none of the images in its folder open";
            return Err(Fail::new(Code::NotFound, what).at(self.folder.display()));
        }
        for (_, path) in &left_out {
            tell(format!("{} is no disk of the running machine, and left out", called(path)));
        }
        Ok(open)
    }

    /// Images that nobody has described and that are called like copies of others, but for those in `excluded`, each in a
    /// sentence.
    pub fn doubtful(&self, excluded: &[String]) -> Vec<String> {
        if self.description.is_some() {
            return Vec::new();
        }
        let is_in = |name: &DiskName| !excluded.iter().any(|out| out == name.as_str());
        let is_like =
            |name: &str, of: &str| name.strip_prefix(of).is_some_and(|rest| rest.starts_with(['-', '_', '.']));
        let of = |(name, path): &(DiskName, PathBuf)| {
            let (_, other) = self.disks.iter().find(|(other, _)| is_like(name.as_str(), other.as_str()))?;
            Some(format!(
                "{} beside {} is taken for a disk of its own: name the disks in machine.toml, or leave it out with \
                 exclude_disks = [\"{name}\"]",
                called(path),
                called(other)
            ))
        };
        self.disks.iter().filter(|(name, _)| is_in(name)).filter_map(of).collect()
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

fn called(path: &Path) -> String {
    path.file_name().unwrap_or_default().display().to_string()
}

/// Images of a folder that nobody has described, by name.
///
/// # Errors
/// [`Code::Refused`]: two of one name; I/O.
fn images_in(folder: &Path) -> Result<Files> {
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
    disks.sort();
    if let Some([(name, one), (_, other)]) = disks.array_windows().find(|[(one, _), (other, _)]| one == other) {
        let what = format!("{} and {} would both be the disk {name}", called(one), called(other));
        let folder_word = quoted(&folder.display().to_string());
        let help =
            format!("ls -l {folder_word}    # then name each disk and its file in machine.toml: docs/machines.md");
        return Err(Fail::new(Code::Refused, what).at(folder.display()).help(help));
    }
    Ok(disks)
}

#[cfg(test)]
mod tests;
