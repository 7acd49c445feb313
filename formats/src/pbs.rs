//! Proxmox Backup Server datastores, read-only: fixed indexes (`.fidx`) and the chunks they name.
//!
//! ```text
//! DATASTORE/[ns/NAME/...]{vm,ct,host}/ID/TIME/index.json.blob      what the snapshot holds
//!                                             drive-scsi0.img.fidx which chunks a disk has
//! DATASTORE/.chunks/8bde/8bde30...                                 a chunk, named by its digest
//! ```
//!
//! Invariants
//! - Every chunk's CRC and digest hold, or its range is an error; a chunk that is not there is an error,
//!   never zeros.
//! - A chunk is opened by the name its digest makes, beneath the datastore the index lies in, through no link.
//! - Memory is bounded by the index: 32 bytes for each chunk.
//!
//! - An encrypted chunk is opened with the key it is read with, and its digest, which the key goes into, holds.
//!
//! Not here: dynamic indexes (`.didx`, archives of files), signatures of manifests, the lock that
//! keeps a running server from collecting chunks: what it collects is missed here, and said to be.

mod blob;
mod delta;
mod index;
mod key;
mod layer;
mod manifest;
mod store;

pub use delta::delta;
pub use key::Key;
pub use layer::PbsLayer;
pub use manifest::{Manifest, ManifestFile};
pub use store::{Snapshot, datastore_holding, snapshots};

use std::path::{Path, PathBuf};

/// The folder of a datastore's chunks.
const CHUNKS: &str = ".chunks";

/// How deep namespaces nest in the server, and the folders of a snapshot below them.
const LEVELS_MAX: usize = 2 * 8 + 4;

/// The datastore that the file at `path` belongs to: the nearest folder above it that holds chunks.
pub fn datastore_of(path: &Path) -> Option<PathBuf> {
    let above = path.ancestors().skip(1).take(LEVELS_MAX);
    above.into_iter().find(|folder| folder.join(CHUNKS).is_dir()).map(Path::to_path_buf)
}

#[cfg(test)]
mod tests;
