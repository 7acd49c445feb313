//! Veeam backup files, read-only: fulls (`.vbk`) and forward increments (`.vib`).
//!
//! [`Vbk`] is one file: a tree of folders, one for each machine that was backed up, with the machine's disks and
//! a `summary.xml` that tells which point this is and which one it stands on. [`VbkLayer`] is one disk of it
//! without what lies below, as a [`crate::Layer`].
//!
//! ```text
//! 0       what the file is           1000h  two slots, the newer valid one counts
//! behind  banks of 4 KiB pages: the tree, lists of blocks, the block store; the blocks themselves
//! ```
//!
//! Invariants
//! - Nothing of a slot or a bank is used before its CRC held; a bank is checked when it is first touched.
//! - Every block is read through the block store, and its MD5 holds, or its range is an error, never zeros.
//! - What is not known (other encodings, blocks kept in an object store, reverse increments, keys) is refused
//!   by name; a file that a backup is still writing does not open.
//! - Opening a file opens no other one: the point below is an id ([`Backup::below`]) that the caller looks for.
//!
//! Not here: which file holds the point below (`aquifer_vdisk::open`), disks that are files of another format
//! inside the backup (the same place), the job's own list (`.vbm`), writing.

mod directory;
mod layer;
mod pages;
mod slot;
mod store;
mod summary;

pub use layer::VbkLayer;
pub use summary::Summary;

use std::sync::{Arc, OnceLock};

use self::{
    directory::{Item, Kind},
    pages::{Pages, Vector},
    slot::Slot,
    store::Store,
};
use crate::{Error, Result, Storage, tables::TableFile};

/// Name of the file in a machine's folder that tells which point it is.
const SUMMARY: &str = "summary.xml";

/// Longest summary that is read, in bytes.
const SUMMARY_BYTES_MAX: u64 = 16 << 20;

/// Most entries of one folder that are looked at.
const FOLDER_ITEMS_MAX: u64 = 65_536;

/// One file, opened for reading.
#[derive(Debug)]
pub struct Vbk {
    shared: Arc<Shared>,
    root: (u64, u64),
}

/// What all disks of a file read through.
#[derive(Debug)]
struct Shared {
    pages: Pages,
    slot: Slot,
    store: OnceLock<Store>,
}

/// One machine at one point in time: a folder of the file.
#[derive(Clone, Debug)]
pub struct Backup {
    /// The folder's name.
    pub folder: String,
    /// What its summary says; `None` where there is none that can be read.
    pub summary: Option<Summary>,
    /// Its disks.
    pub disks: Vec<BackupDisk>,
    items: Vec<Item>,
}

/// One disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupDisk {
    /// Name of its file in the folder.
    pub name: String,
    /// Length of that file in bytes: the disk's size, or that of the image which the disk is in.
    pub bytes: u64,
    /// Whether only changed blocks are here.
    pub is_increment: bool,
}

impl Vbk {
    /// Reads the header, the newer slot and the root folder. No other file is opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`], [`Error::Key`], [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let header = slot::Header::read(&file)?;
        let slot = Slot::newest(&file, &header)?;
        let pages = Pages::new(file, &header, &slot)?;
        let root = slot.directory;
        Ok(Self { shared: Arc::new(Shared { pages, slot, store: OnceLock::new() }), root })
    }

    /// The file's name for messages.
    pub fn label(&self) -> &str {
        self.shared.pages.file.label()
    }

    /// The machines in the file.
    ///
    /// # Errors
    /// A tree that breaks its format; [`Error::Io`]. A summary that cannot be read is `None`.
    pub fn backups(&self) -> Result<Vec<Backup>> {
        let mut backups = Vec::new();
        for item in self.items(self.root)? {
            let Kind::Folder { root, count } = item.kind else { continue };
            let items = self.items((root, count))?;
            let summary = match items.iter().find(|file| file.name == SUMMARY) {
                Some(file) => self.summary(file, &item.name)?,
                None => None,
            };
            let mut disks = Vec::new();
            for file in &items {
                if let Some((bytes, is_increment)) = file.disk(&self.shared.pages)? {
                    disks.push(BackupDisk { name: file.name.clone(), bytes, is_increment });
                }
            }
            backups.push(Backup { folder: item.name, summary, disks, items });
        }
        Ok(backups)
    }

    fn items(&self, (root, count): (u64, u64)) -> Result<Vec<Item>> {
        let pages = &self.shared.pages;
        if count > FOLDER_ITEMS_MAX {
            return Err(Error::unsupported(self.label(), format!("a folder of {count} files")));
        }
        let vector = Vector::open(pages, root, directory::ITEM_BYTES, count)?;
        (0..count).map(|index| vector.with(pages, index, |at, bytes| Item::read(pages, at, bytes))?).collect()
    }

    /// Damage in a summary costs what it says, not the machine's disks; a file that cannot be read is an error.
    fn summary(&self, file: &Item, folder: &str) -> Result<Option<Summary>> {
        if file.bytes().is_none_or(|bytes| bytes > SUMMARY_BYTES_MAX) {
            return Ok(None);
        }
        let text = VbkLayer::open(&self.shared, file, file.name.clone()).and_then(|layer| layer.read_all());
        match text {
            Ok(text) => Ok(Summary::parse(&text, folder)),
            Err(error @ (Error::Io { .. } | Error::Key { .. })) => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// The disk `name` of a machine.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if there is none, or its backup never ended; [`Error::Corrupt`],
    /// [`Error::Truncated`], [`Error::Unsupported`], [`Error::Key`], [`Error::Io`].
    pub fn disk(&self, backup: &Backup, name: &str) -> Result<VbkLayer> {
        let missing = || Error::ChainBroken {
            path: self.label().into(),
            what: format!("{:?} has no disk {name:?}", backup.folder),
        };
        let known = backup.disks.iter().any(|disk| disk.name == name);
        let item = backup.items.iter().find(|item| known && item.name == name).ok_or_else(missing)?;
        VbkLayer::open(&self.shared, item, format!("{} ({name})", self.label()))
    }
}

impl Backup {
    /// Id of this point of the machine, if its summary tells.
    pub fn id(&self) -> Option<&str> {
        self.summary.as_ref().map(|summary| summary.id.as_str())
    }

    /// Id of the point below; `None` for a full one, and where nothing is known.
    pub fn below(&self) -> Option<&str> {
        self.summary.as_ref().and_then(|summary| summary.below.as_deref())
    }

    /// The machine's name: as its summary says, else the folder's.
    pub fn machine(&self) -> &str {
        self.summary.as_ref().map_or(&self.folder, |summary| &summary.machine)
    }
}

impl Shared {
    /// The block store, its pages found when the first disk is opened.
    fn store(&self) -> Result<&Store> {
        match self.store.get() {
            Some(store) => Ok(store),
            None => {
                let store = Store::open(&self.pages, self.slot.store)?;
                Ok(self.store.get_or_init(|| store))
            }
        }
    }
}

#[cfg(test)]
mod tests;
