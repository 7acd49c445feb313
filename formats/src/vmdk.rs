//! VMDK, read-only: VMware's disks as layers, however they are cut into files.
//!
//! [`Vmdk`] is what one file says about a disk: the text of a descriptor, or a sparse extent that holds
//! its descriptor itself. [`VmdkLayer`] is that disk without its parent, as a [`crate::Layer`].
//!
//! Invariants
//! - Opening a descriptor opens no other file: extents and parents are names, followed through the
//!   gate ([`Vmdk::layer_through`], [`Vmdk::parent`]).
//! - A parent is accepted only with the content id its child recorded ([`Vmdk::check_parent`]).
//! - A sparse extent without a descriptor is a part of a disk, and refused as a disk: it cannot say what
//!   lies below it.
//! - A grain or table outside its file is an error for the range that needs it, and only for that.
//!
//! Not here: following parents (`aquifer_vdisk::open`), writing, raw device mappings, changed block
//! tracking files, encryption.

mod descriptor;
mod layer;
mod sparse;

pub use descriptor::Parent;
pub use layer::VmdkLayer;

use std::{ffi::OsStr, sync::Arc};

use crate::{Error, Gate, Passage, Result, SECTOR_BYTES, Storage, tables::TableFile};
use descriptor::{BYTES_MAX, Descriptor, Kind, SIGNATURE};

/// One disk as its main file describes it.
#[derive(Debug)]
pub struct Vmdk {
    file: TableFile,
    descriptor: Descriptor,
    /// Digest over the descriptor's bytes.
    text: [u8; 32],
    /// Whether the main file is the only extent itself.
    embedded: bool,
}

impl Vmdk {
    /// Reads and checks the descriptor. No other file is opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Io`]; [`Error::Unsupported`] for devices,
    /// unknown types, and an extent without its descriptor.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let head = file.read(0, file.len.min(SECTOR_BYTES), "the head")?;
        let magic = head.first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let (at, bytes) = match magic {
            sparse::HOSTED_MAGIC => embedded(&file)?,
            sparse::COWD_MAGIC => return Err(lone(&file)),
            _ if head.first_chunk().is_some_and(|b| u64::from_le_bytes(*b) == sparse::SESPARSE_MAGIC) => {
                return Err(lone(&file));
            }
            _ if head.starts_with(SIGNATURE) => {
                if file.len > BYTES_MAX {
                    let what = format!("a descriptor of {} bytes (at most {BYTES_MAX})", file.len);
                    return Err(Error::unsupported(file.label(), what));
                }
                (0, file.read(0, file.len, "the descriptor")?)
            }
            _ => return Err(Error::corrupt(file.label(), 0, "neither a VMware descriptor nor a sparse extent")),
        };
        let descriptor = Descriptor::parse(&bytes, file.label(), at)?;
        let embedded = at != 0;
        if embedded && !matches!(descriptor.extents.as_slice(), [one] if one.kind == Kind::Hosted) {
            return Err(Error::unsupported(file.label(), "a descriptor inside an extent that names other extents"));
        }
        let text = *blake3::hash(&bytes).as_bytes();
        Ok(Self { file, descriptor, text, embedded })
    }

    /// The disk this one falls back to, if it names one.
    pub fn parent(&self) -> Option<&Parent> {
        self.descriptor.parent.as_ref()
    }

    /// Content id, which a child of this disk records.
    pub fn cid(&self) -> u32 {
        self.descriptor.cid
    }

    /// Type of the disk as its descriptor spells it, like `monolithicSparse`.
    pub fn create_type(&self) -> &str {
        &self.descriptor.create_type
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.descriptor.size
    }

    /// Whether `parent` is the very disk, in the very state, that this one was made on.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if it is not.
    pub fn check_parent(&self, parent: &Vmdk) -> Result<()> {
        match self.parent() {
            Some(wanted) if wanted.cid == parent.cid() => Ok(()),
            Some(wanted) => Err(Error::ChainBroken {
                path: parent.file.label().into(),
                what: format!(
                    "its content id is {:08x}, but {} was made on content {:08x}: the parent was changed since, or is another disk",
                    parent.cid(),
                    self.file.label(),
                    wanted.cid
                ),
            }),
            None => Err(Error::ChainBroken { path: self.file.label().into(), what: "it has no parent".into() }),
        }
    }

    /// The disk, with its extents opened by `follow`.
    ///
    /// # Errors
    /// Extents that break their format or are too small; what `follow` reports.
    pub fn layer(&self, mut follow: impl FnMut(&OsStr) -> Result<Arc<dyn Storage>>) -> Result<VmdkLayer> {
        let mut layer = VmdkLayer::new(self.file.label(), self.text);
        for extent in &self.descriptor.extents {
            let storage = match extent.kind {
                Kind::Zero => None,
                _ if self.embedded => Some(self.file.storage.clone()),
                _ => Some(follow(&extent.name)?),
            };
            layer.push(extent, storage)?;
        }
        Ok(layer)
    }

    /// As [`Vmdk::layer`] for the file that `from` let through; extents are followed through `gate`.
    ///
    /// # Errors
    /// Those of [`Vmdk::layer`] and of [`Gate::follow`].
    pub fn layer_through(&self, gate: &Gate, from: &Passage) -> Result<VmdkLayer> {
        self.layer(|name| Ok(gate.follow(from, name)?.storage()))
    }
}

/// The descriptor inside a hosted extent, and where it lies.
fn embedded(file: &TableFile) -> Result<(u64, Vec<u8>)> {
    let header = sparse::hosted_header(file, 0)?;
    let (offset, count) = (header.descriptor_offset.get(), header.descriptor_sectors.get());
    if offset == 0 || count == 0 {
        return Err(lone(file));
    }
    let place = offset.checked_mul(SECTOR_BYTES).zip(count.checked_mul(SECTOR_BYTES));
    match place.filter(|(_, len)| *len <= BYTES_MAX) {
        Some((at, len)) => Ok((at, file.read(at, len, "the descriptor")?)),
        None => Err(Error::corrupt(file.label(), 28, format!("a descriptor of {count} sectors at sector {offset}"))),
    }
}

fn lone(file: &TableFile) -> Error {
    Error::unsupported(file.label(), "an extent without its descriptor; name the .vmdk file that lists its extents")
}

#[cfg(test)]
mod tests;
