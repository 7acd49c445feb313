//! Remotes of Xen Orchestra, read-only: machines of XCP-ng and XenServer as chains of VHDs, each a file, or a folder
//! whose files are its parts.
//!
//! ```text
//! xo-vm-backups/VM/20261101T000000Z.json                         a point: its disks, and where they lie
//!               VM/vdis/JOB/DISK/20261101T000000Z.alias.vhd      one line: `data/NAME.vhd`
//!                                data/NAME.vhd/chunk-filters.json  how all other parts are compressed
//!                                              footer, header      those of a VHD
//!                                              bat                 a bit for each block that is there
//!                                              blocks/1/234        block 1234: its bitmap and its bytes
//! ```
//!
//! Invariants
//! - A point's disk is the newest of a chain; a parent is taken only by the id that its child recorded.
//! - A block that the table promises and that is not there is an error, never zeros.
//! - While a program merges a disk into another one, neither is read: the file that it keeps meanwhile is looked for, at
//!   the opening and again whenever a block was read.
//! - Names lead beneath the folder of the file that was named; links are not followed.
//!
//! Not here: encrypted remotes; full backups, which are [XVA](crate::xva) files beside the points.

mod folder;
mod point;
mod store;

use std::{ffi::OsString, path::Path, sync::Arc};

pub use folder::{VhdFolder, VhdFolderLayer, is_folder_of_parts};
pub use point::{Disk as PointDisk, Point};
pub use store::{Stored, machines_in, points};

use crate::{
    Error, Layer, Result, Storage,
    vhd::{self, Parent, Vhd},
};

/// Longest line of an alias, in bytes.
const ALIAS_BYTES_MAX: u64 = 1024;

/// A disk of a remote, in either form.
#[derive(Debug)]
pub enum Disk {
    /// One file.
    File(Box<Vhd>),
    /// A folder of parts.
    Folder(Box<VhdFolder>),
}

impl Disk {
    /// The disk this one falls back to, if it is a differencing one.
    pub fn parent(&self) -> Option<&Parent> {
        match self {
            Self::File(disk) => disk.parent(),
            Self::Folder(disk) => disk.parent(),
        }
    }

    /// Whether `parent` is the very disk that this one was made on.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if it is not.
    pub fn check_parent(&self, parent: &Self) -> Result<()> {
        let ((child, _), (label, id)) = (self.identity(), parent.identity());
        vhd::check_parent(self.parent(), child, id, label)
    }

    fn identity(&self) -> (&str, &[u8; 16]) {
        match self {
            Self::File(disk) => (disk.label(), disk.id()),
            Self::Folder(disk) => (disk.label(), disk.id()),
        }
    }

    /// The disk without its parent.
    ///
    /// # Errors
    /// A block table or data that is not there.
    pub fn layer(&self) -> Result<Arc<dyn Layer>> {
        Ok(match self {
            Self::File(disk) => Arc::new(disk.layer()?),
            Self::Folder(disk) => Arc::new(disk.layer()?),
        })
    }
}

/// Where the alias in `storage` leads: a name that counts from the alias's own folder.
///
/// # Errors
/// [`Error::Corrupt`] for one that is too long, empty or no text; [`Error::Io`].
pub fn alias_target(storage: &dyn Storage) -> Result<OsString> {
    let len = storage.len().map_err(|e| Error::io(storage.label(), "stat", 0, e))?;
    let bad = |what: &str| Error::corrupt(storage.label(), 0, format!("an alias {what}"));
    if len > ALIAS_BYTES_MAX {
        return Err(bad("that is too long"));
    }
    let mut text = vec![0; usize::try_from(len).unwrap_or_default()];
    storage.read_at(0, &mut text).map_err(|e| Error::io(storage.label(), "read", 0, e))?;
    let text = String::from_utf8(text).map_err(|_| bad("that is no text"))?;
    match text.trim() {
        "" => Err(bad("of nothing")),
        target if target.ends_with(".alias.vhd") => Err(bad("of an alias")),
        target => Ok(target.into()),
    }
}

/// Refuses the disk whose file or alias lies at `path` while it is being merged with others.
///
/// # Errors
/// [`Error::Refused`].
pub fn refuse_merge(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let state = path.with_file_name(format!(".{name}.merge.json"));
    if state.symlink_metadata().is_err() {
        return Ok(());
    }
    let what = "Xen Orchestra is merging disks into it; wait until that is done, or finish it there".into();
    Err(Error::Refused { path: path.display().to_string(), what })
}

#[cfg(test)]
mod tests;
