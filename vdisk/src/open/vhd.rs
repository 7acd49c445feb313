//! Chains of VHDs: files, and the folders of parts that Xen Orchestra keeps them in, mixed as they come.
//!
//! Invariants
//! - A parent is the disk whose id the child recorded, or none.
//! - A folder of parts is named by its alias, or by its footer where somebody named the folder itself.
//! - A disk that others are being merged into is refused.

use std::{ffi::OsString, path::PathBuf, sync::Arc};

use aquifer_formats::{
    Layer,
    gate::{Gate, Passage},
    probe::{Format, probe},
    vhd::Vhd,
    xo::{self, Disk, VhdFolder},
};

use super::parent_of;
use crate::Result;

/// What a folder of parts is named by.
const FOOTER: &str = "footer";

/// Whether `file`, of a remote, is a disk and not a point.
pub(super) fn is_disk(file: &Passage) -> bool {
    let path = file.path();
    path.file_name().is_some_and(|name| name == FOOTER) || path.extension().is_some_and(|end| end == "vhd")
}

/// The disk `first` and its parents, newest first; answers the files that led to them.
pub(super) fn layers(gate: &Gate, first: Passage, layers: &mut Vec<Arc<dyn Layer>>) -> Result<Vec<PathBuf>> {
    let mut disk = open(gate, &first)?;
    let (mut at, mut files) = (first, Vec::new());
    loop {
        layers.push(disk.layer()?);
        files.push(at.path().to_path_buf());
        let Some(parent) = disk.parent() else { return Ok(files) };
        (at, disk) = parent_of(gate, &at, parent.names(), |file| {
            let parent = open(gate, file)?;
            disk.check_parent(&parent).map(|()| parent)
        })?;
    }
}

/// The disk that `file` is or leads to.
fn open(gate: &Gate, file: &Passage) -> aquifer_formats::Result<Disk> {
    let (storage, path) = (file.storage(), file.path());
    if path.file_name().is_some_and(|name| name == FOOTER) {
        let place = path.parent().unwrap_or(path);
        return Ok(Disk::Folder(Box::new(VhdFolder::open(storage, place, None)?)));
    }
    xo::refuse_merge(path)?;
    if probe(&*storage)? != Some(Format::Xo) {
        return Ok(Disk::File(Box::new(Vhd::open(storage)?)));
    }
    let mut name: OsString = xo::alias_target(&*storage)?;
    name.push("/");
    name.push(FOOTER);
    let footer = gate.follow(file, &name)?;
    let place = footer.path().parent().unwrap_or(path).to_path_buf();
    Ok(Disk::Folder(Box::new(VhdFolder::open(footer.storage(), &place, Some(path))?)))
}
