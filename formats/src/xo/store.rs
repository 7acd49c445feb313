//! What lies in a remote, or in a part of it: the points, found by their descriptions.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;

use super::{Point, refuse_merge};
use crate::{
    Error, Result, Storage, document,
    objects::{Folder, listed},
};

/// The folder of machines in a remote.
const MACHINES: &str = "xo-vm-backups";
/// Most files and folders that are looked at.
const ENTRIES_MAX: usize = 1 << 20;

/// One point of a machine, as a list shows it.
#[derive(Debug)]
pub struct Stored {
    /// Its description.
    pub path: PathBuf,
    /// What it says; or why it cannot be read.
    pub point: Result<Point>,
    /// Why it cannot be served, although it can be read.
    pub refusal: Option<String>,
}

/// What a remote says of its encryption, whether it has one or not.
#[derive(Debug, Deserialize)]
struct Encryption {
    #[serde(default)]
    algorithm: Option<String>,
}

/// The machines' folders of the remote that `folder` is, or that it is a part of; `None` where it is none.
pub fn machines_in(folder: &Path) -> Option<Vec<PathBuf>> {
    let machines = match folder.join(MACHINES) {
        below if below.is_dir() => below,
        _ if folder.file_name().is_some_and(|name| name == MACHINES) => folder.to_path_buf(),
        _ => {
            let is_machine = folder.parent().and_then(Path::file_name).is_some_and(|name| name == MACHINES);
            return is_machine.then(|| vec![folder.to_path_buf()]);
        }
    };
    // Links to folders elsewhere are none of the remote's machines.
    let is_folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let mut folders: Vec<PathBuf> =
        fs::read_dir(machines).ok()?.flatten().filter(is_folder).map(|entry| entry.path()).collect();
    folders.sort_unstable();
    Some(folders)
}

/// The points in the folders of machines, in no order.
///
/// # Errors
/// [`Error::Io`] for a folder that cannot be listed, [`Error::Unsupported`] for an encrypted remote. What is wrong with a
/// single point is said in its place.
pub fn points(machines: &[PathBuf]) -> Result<Vec<Stored>> {
    let (mut found, mut seen) = (Vec::new(), 0usize);
    for folder in machines {
        refuse_encryption(folder)?;
        let label = folder.display().to_string();
        let failed = |e| Error::io(&label, "list", 0, e);
        for entry in fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            seen += 1;
            if seen > ENTRIES_MAX {
                return Err(Error::unsupported(label, "a remote with that many files"));
            }
            if is_point(&path) {
                let point = listed(&path).and_then(|storage| Point::read(&(Arc::new(storage) as Arc<dyn Storage>)));
                let refusal = point.as_ref().ok().and_then(|point| refusal(folder, point));
                found.push(Stored { path, point, refusal });
            }
        }
    }
    Ok(found)
}

/// Points are named by their time; hidden files, caches and the rest are not.
fn is_point(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    path.extension().is_some_and(|end| end == "json") && stem.starts_with(|first: char| first.is_ascii_digit())
}

/// What is missing of a point, or in the way.
fn refusal(folder: &Path, point: &Point) -> Option<String> {
    let parts = match Folder::open(folder) {
        Ok(parts) => parts,
        Err(error) => return Some(error.to_string()),
    };
    let missing = |path: &str, what: String| match parts.find(path) {
        Ok(Some(_)) => None,
        Ok(None) => Some(format!("{what} is not there")),
        Err(error) => Some(format!("{what}: {error}")),
    };
    if let Some(export) = point.export() {
        return missing(export, format!("its export {export}"));
    }
    let disks = match point.disks() {
        Ok(disks) => disks,
        Err(error) => return Some(error.to_string()),
    };
    disks.iter().find_map(|disk| {
        missing(&disk.path, format!("{} of disk {}", disk.path, disk.name))
            .or_else(|| refuse_merge(&folder.join(&disk.path)).err().map(|error| error.to_string()))
    })
}

fn refuse_encryption(machine: &Path) -> Result<()> {
    let Some(root) = machine.parent().and_then(Path::parent) else { return Ok(()) };
    if !root.join(MACHINES).is_dir() {
        return Ok(());
    }
    let Some(file) = Folder::open(root)?.find("encryption.json")? else { return Ok(()) };
    let told: Encryption = document::read(&file, 64 << 10)?;
    match told.algorithm.as_deref() {
        None | Some("none") => Ok(()),
        Some(other) => Err(Error::unsupported(file.label(), format!("a remote encrypted by {other}"))),
    }
}
