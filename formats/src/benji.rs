//! Storages of Benji, read-only: versions of volumes that list blocks, each an object of the storage.
//!
//! ```text
//! versions/9c/5e/V0000000001         what `benji metadata-export` writes of a version; Benji keeps it up by itself
//! blocks/8b/de/0000000000000001-0000000000000002        a block, under the MD5 of its name
//! blocks/8b/de/0000000000000001-0000000000000002.meta   how it was transformed, and its checksum
//! ```
//!
//! Invariants
//! - Every version lists all its blocks, so it stands on nothing; what it does not list is zeros, and so is an entry that
//!   has neither a name nor a checksum.
//! - A block's checksum holds, or its range is an error; one that is not there is an error, never zeros.
//! - What an object was transformed by is undone in the order its description gives; encryption is refused by name.
//! - A version whose backup never ended is refused.
//!
//! Not here: Benji's database, which holds the same as `versions/`; buckets of S3 and B2; signatures of descriptions.

mod blake2b;
mod layer;
mod list;
mod object;
mod store;
mod version;

pub use layer::BenjiLayer;
pub use store::{Stored, storage_of, versions};
pub use version::Version;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use list::Blocks;

use crate::{Error, Result, Storage};

/// Versions that one document lists: an object of a storage has one, an export any number.
#[derive(Debug)]
pub struct Versions {
    label: String,
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    versions: Vec<(Version, Arc<Blocks>)>,
}

impl Versions {
    /// Reads the document in `storage`, which lies at `path` in or beside a storage of Benji.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Unsupported`], [`Error::Io`]; [`Error::ChainBroken`] where there is no storage.
    pub fn open(storage: Arc<dyn Storage>, path: &Path) -> Result<Self> {
        let label = storage.label().to_owned();
        let folder = storage_of(path).ok_or_else(|| Error::ChainBroken {
            path: label.clone(),
            what: "it lies in no storage: no folder above it has blocks/".into(),
        })?;
        let versions = version::read::<Blocks>(&*storage, path)?;
        let versions = versions.into_iter().map(|(version, blocks)| (version, Arc::new(blocks))).collect();
        Ok(Self { label, storage, folder, versions })
    }

    /// What its disks are called: the volume's name where the document has one version, else that of the version.
    pub fn disks(&self) -> Vec<&str> {
        match self.versions.as_slice() {
            [(only, _)] => vec![only.volume()],
            several => several.iter().map(|(version, _)| version.uid()).collect(),
        }
    }

    /// The disk `name`.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if there is none; [`Error::Unsupported`] for a version that never ended, for blocks of a size
    /// that is not read, and for encrypted ones; [`Error::Corrupt`] for blocks that do not fit together.
    pub fn disk(&self, name: &str) -> Result<BenjiLayer> {
        let found = self.disks().iter().position(|disk| *disk == name).and_then(|index| self.versions.get(index));
        let missing = || Error::ChainBroken { path: self.label.clone(), what: format!("has no disk {name:?}") };
        let (version, blocks) = found.ok_or_else(missing)?;
        BenjiLayer::new(self.storage.clone(), &self.folder, version, blocks.clone())
    }
}

/// Whether the file at `path`, which begins like a stream of zstd, is an object of a storage: those have a description
/// beside them.
pub fn is_object(path: &Path) -> bool {
    object::description_of(path).is_file() && storage_of(path).is_some()
}

#[cfg(test)]
mod tests;
