//! VHD, read-only: the disks of Virtual PC, first-generation Hyper-V, Xen and Azure; fixed, dynamic and
//! differencing.
//!
//! [`Vhd`] is what one file says: its footer and, unless it is fixed, its dynamic header. [`VhdLayer`] is
//! its disk without the parent, as a [`crate::Layer`].
//!
//! Invariants
//! - Nothing of a footer or header is used before its checksum held.
//! - Opening a file opens no other one: a parent is a name ([`Vhd::parent`]) that the caller follows
//!   through the gate, and is accepted only by the id its child recorded ([`Vhd::check_parent`]).
//! - A footer has two sizes, and which one counts depends on who wrote it. Where they differ and the
//!   writer is not known, the disk is refused: half of the guesses would lose its end.
//! - A block outside the file is an error for its range, and only for that.
//!
//! Not here: following parents (`aquifer_vdisk::open`), writing. A fixed disk cannot be probed: its
//! footer lies where a guest can write.

pub(crate) mod footer;
mod layer;

pub use footer::{Kind, Parent};
pub use layer::VhdLayer;

use std::sync::Arc;

use crate::{Error, Result, Storage, tables::TableFile};
use footer::{Dynamic, Footer};

/// One file, opened for reading.
#[derive(Debug)]
pub struct Vhd {
    file: TableFile,
    footer: Footer,
    /// `None` for a fixed disk.
    dynamic: Option<Dynamic>,
}

impl Vhd {
    /// Reads footer and dynamic header. No other file is opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Io`]; [`Error::Unsupported`] for other versions,
    /// kinds, and a size that is not certain.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let footer = Footer::read(&file)?;
        let dynamic = match footer.kind {
            Kind::Fixed => None,
            kind => Some(Dynamic::read(&file, &footer, kind)?),
        };
        Ok(Self { file, footer, dynamic })
    }

    /// How the disk is stored.
    pub fn kind(&self) -> Kind {
        self.footer.kind
    }

    /// The disk this one falls back to, if it is a differencing one.
    pub fn parent(&self) -> Option<&Parent> {
        self.dynamic.as_ref().and_then(|dynamic| dynamic.parent.as_ref())
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.footer.size
    }

    /// Whether `parent` is the very disk that this one was made on.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if it is not.
    pub fn check_parent(&self, parent: &Vhd) -> Result<()> {
        check_parent(self.parent(), self.file.label(), &parent.footer.id, parent.file.label())
    }

    /// What tells this disk from others.
    pub(crate) fn id(&self) -> &[u8; 16] {
        &self.footer.id
    }

    /// Name for messages.
    pub(crate) fn label(&self) -> &str {
        self.file.label()
    }

    /// The disk without its parent.
    ///
    /// # Errors
    /// A block table or data that the file does not hold.
    pub fn layer(&self) -> Result<VhdLayer> {
        VhdLayer::new(self.file.clone(), &self.footer, self.dynamic.as_ref())
    }
}

/// Whether the disk with this id is the one that `child`, with this parent, was made on.
pub(crate) fn check_parent(wanted: Option<&Parent>, child: &str, id: &[u8; 16], label: &str) -> Result<()> {
    let spelled = |id: &[u8; 16]| uuid::Uuid::from_bytes(*id).to_string();
    match wanted {
        Some(wanted) if wanted.id == *id => Ok(()),
        Some(wanted) => Err(Error::ChainBroken {
            path: label.into(),
            what: format!("its id is {}, but {child} was made on {}", spelled(id), spelled(&wanted.id)),
        }),
        None => Err(Error::ChainBroken { path: child.into(), what: "it has no parent".into() }),
    }
}

#[cfg(test)]
mod tests;
