//! qcow2, versions 2 and 3: QEMU's copy-on-write image as layers; new images are written, none is ever changed.
//!
//! [`Qcow2`] is one image file: what its header says, its internal snapshots, its dirty bitmaps.
//! [`Qcow2Layer`] is one disk in it, the active one or a snapshot's, as a [`crate::Layer`].
//! [`NewQcow2`] is an image on its way to be one.
//!
//! Invariants
//! - Opening an image opens no other file: backing files and data files are names
//!   ([`Qcow2::backing`], [`Qcow2::data_file`]) that the caller follows through the gate.
//! - An unknown incompatible feature, encryption or the corrupt mark refuses the image. The dirty
//!   mark does not: it is about reference counts, which reading does not use.
//! - A table or cluster past the end of the file is an error for the range that needs it, and only
//!   for that. An uncompressed last cluster may be short and reads on as zeros; a compressed one not.
//! - Memory and time are bounded by the file's length, never by what the header claims.
//!
//! Not here: following backing files (`aquifer_vdisk::open`), changing an image, reading reference counts.

mod bitmap;
mod header;
mod layer;
mod snapshot;
mod table;
mod writer;

pub use bitmap::{Bitmap, BitmapTrust};
pub use header::{Backing, Compression, DataFile, Info};
pub use layer::Qcow2Layer;
pub use snapshot::Snapshot;
pub use writer::{BackingName, CLUSTER_BYTES, Checkpoint, MAP_ENTRY_BYTES, NewQcow2};

use std::sync::Arc;

use crate::{Error, Gate, Passage, Result, Storage, tables::TableFile};
use header::Header;
use table::Table;

/// Longest active or snapshot L1 table, in bytes.
const L1_BYTES_MAX: u64 = 32 << 20;

/// One image file, opened for reading.
#[derive(Debug)]
pub struct Qcow2 {
    file: TableFile,
    header: Header,
}

impl Qcow2 {
    /// Reads and checks the header. Nothing else is read, and no other file is opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`] (encryption, unknown
    /// features), [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let header = Header::read(file.storage.as_ref(), file.len)?;
        Ok(Self { file, header })
    }

    /// The file this image falls back to, if it names one.
    pub fn backing(&self) -> Option<&Backing> {
        self.header.backing.as_ref()
    }

    /// The file that holds the guest's bytes, if not this one.
    pub fn data_file(&self) -> Option<&DataFile> {
        self.header.data_file.as_ref()
    }

    /// What the header says, for people and programs.
    pub fn info(&self) -> Info {
        self.header.info()
    }

    /// Size of the active disk in bytes.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// The internal snapshots, oldest first.
    ///
    /// # Errors
    /// A snapshot table that breaks its format; [`Error::Io`].
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        snapshot::read_all(&self.file, &self.header)
    }

    /// The persistent dirty bitmaps, trusted or not.
    ///
    /// # Errors
    /// A bitmap directory that breaks its format; [`Error::Io`].
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        bitmap::read_directory(&self.file, &self.header)
    }

    /// Tells `each` every dirty range of `bitmap` as `(offset, len)` in bytes, in order and merged.
    ///
    /// # Errors
    /// [`Error::Refused`] for a bitmap that is not to be trusted; damage; [`Error::Io`].
    pub fn dirty_ranges(&self, bitmap: &Bitmap, each: &mut dyn FnMut(u64, u64)) -> Result<()> {
        bitmap::dirty_ranges(&self.file, &self.header, bitmap, each)
    }

    /// The active disk. `data` is the file that [`Qcow2::data_file`] names, and `None` without one.
    ///
    /// # Errors
    /// An L1 table that breaks its format; [`Error::ChainBroken`] if `data` is missing or not asked for.
    pub fn active(&self, data: Option<Arc<dyn Storage>>) -> Result<Qcow2Layer> {
        let header = &self.header;
        let path = self.file.label();
        let wrong = |what: &str| Error::ChainBroken { path: path.into(), what: what.into() };
        match (&header.data_file, &data) {
            (Some(_), None) => return Err(wrong("its external data file is needed")),
            (None, Some(_)) => return Err(wrong("it has no external data file")),
            _ => {}
        }
        let table = Table::read(&self.file, header, header.l1_offset, header.l1_entries, header.size)?;
        Qcow2Layer::new(self.file.clone(), header, table, data, path.into())
    }

    /// As [`Qcow2::active`] for the image that `from` let through; the data file, if there is one, is
    /// followed through `gate`.
    ///
    /// # Errors
    /// Those of [`Qcow2::active`] and of [`Gate::follow`].
    pub fn active_through(&self, gate: &Gate, from: &Passage) -> Result<Qcow2Layer> {
        let unnamed = || Error::unsupported(self.file.label(), "an external data file that the image does not name");
        let data = match self.data_file() {
            None => None,
            Some(data) => Some(gate.follow(from, data.name.as_ref().ok_or_else(unnamed)?)?.storage()),
        };
        self.active(data)
    }

    /// The disk of an internal snapshot, found by name, or else by id.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if there is none or several have that name; damage; [`Error::Io`].
    pub fn snapshot(&self, name: &str) -> Result<Qcow2Layer> {
        let path = self.file.label();
        let broken = |what: String| Error::ChainBroken { path: path.into(), what };
        if self.header.data_file.is_some() {
            return Err(Error::unsupported(path, "internal snapshots beside an external data file"));
        }
        let all = self.snapshots()?;
        let mut named = all.iter().filter(|s| s.name == name);
        let found = match (named.next(), named.next()) {
            (Some(_), Some(_)) => return Err(broken(format!("several snapshots are named {name:?}; use an id"))),
            (Some(one), None) => one,
            _ => all.iter().find(|s| s.id == name).ok_or_else(|| broken(format!("has no snapshot {name:?}")))?,
        };
        let table = Table::read(&self.file, &self.header, found.l1_offset, found.l1_entries, found.size)?;
        Qcow2Layer::new(self.file.clone(), &self.header, table, None, format!("{path} (snapshot {name})"))
    }
}

#[cfg(test)]
mod tests;
