//! VHDX, read-only: Hyper-V's disks of the second generation, their checkpoints (`.avhdx`) included.
//!
//! [`Vhdx`] is what one file says: its headers, its log, its metadata. [`VhdxLayer`] is its disk without
//! the parent, as a [`crate::Layer`].
//!
//! Invariants
//! - Opening a file opens no other one: a parent is a name ([`Vhdx::parent`]) that the caller follows
//!   through the gate, and is accepted only by the id its child recorded ([`Vhdx::check_parent`]).
//! - A log is replayed in memory; the file is never written.
//! - A block outside the file is an error for its range, and only for that.
//!
//! Not here: following parents (`aquifer_vdisk::open`), writing, resilient change tracking files.

mod header;
mod layer;
mod log;

pub use header::Parent;
pub(crate) use header::names;
pub use layer::VhdxLayer;

use std::sync::Arc;

use crate::{Error, Result, Storage, tables::TableFile};
use header::{Header, Metadata, Regions};

const SIGNATURE: &[u8] = b"vhdxfile";

/// One file, opened for reading.
#[derive(Debug)]
pub struct Vhdx {
    /// With its log replayed.
    file: TableFile,
    header: Header,
    regions: Regions,
    metadata: Metadata,
}

impl Vhdx {
    /// Reads headers, log, region table and metadata. No other file is opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`] (unknown required parts), [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        if file.read(0, SIGNATURE.len() as u64, "the signature")? != SIGNATURE {
            return Err(Error::corrupt(file.label(), 0, "no VHDX signature"));
        }
        let header = Header::newest(&file)?;
        let file = log::replay(file, &header)?;
        let regions = Regions::read(&file)?;
        let metadata = Metadata::read(&file, regions.metadata)?;
        Ok(Self { file, header, regions, metadata })
    }

    /// The disk this one falls back to, if it names one.
    pub fn parent(&self) -> Option<&Parent> {
        self.metadata.parent.as_ref()
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.metadata.size
    }

    /// Identity that the disk keeps through its checkpoints.
    pub fn disk_id(&self) -> [u8; 16] {
        self.metadata.disk_id
    }

    /// Whether `parent` is the very disk, in the very state, that this one was made on.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if it is not.
    pub fn check_parent(&self, parent: &Vhdx) -> Result<()> {
        let path = parent.file.label();
        let id = parent.header.data_write;
        match self.parent() {
            Some(wanted) if wanted.linkage.contains(&id) => Ok(()),
            Some(wanted) => Err(Error::ChainBroken {
                path: path.into(),
                what: format!(
                    "its content is {}, but {} was made on {}: the parent was changed since, or is another disk",
                    header::spelled(&id),
                    self.file.label(),
                    wanted.linkage.iter().map(header::spelled).collect::<Vec<_>>().join(" or ")
                ),
            }),
            None => Err(Error::ChainBroken { path: self.file.label().into(), what: "it has no parent".into() }),
        }
    }

    /// The disk without its parent.
    ///
    /// # Errors
    /// A block table that breaks its format.
    pub fn layer(&self) -> Result<VhdxLayer> {
        VhdxLayer::new(self.file.clone(), self.regions.bat, &self.metadata, self.header.data_write)
    }
}

#[cfg(test)]
mod tests;
