//! What can be seen of a source's files without reading them, to know later whether they are still the same.
//!
//! Invariants
//! - Equal states mean an unchanged file: a write changes its times or its size, another file in its place
//!   has another inode.
//! - A block device and an NBD export prove nothing about themselves, and have no state.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use aquifer_formats::repo::record::PointDisk;
use aquifer_vdisk::Chain;
use serde::{Deserialize, Serialize};

/// A file as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileState {
    path: String,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileState {
    fn of(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
        Some(Self {
            path: path.display().to_string(),
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// The files that a chain is read from, newest first: each layer's own, and the one beside it that holds
/// its data.
pub(crate) fn of_chain(chain: &Chain) -> Option<Vec<FileState>> {
    let mut files = Vec::new();
    for layer in chain.layers() {
        files.push(FileState::of(Path::new(layer.label()))?);
        if let Ok(beside) = layer.file(1) {
            files.push(FileState::of(Path::new(beside.label()))?);
        }
    }
    Some(files)
}

/// The files that a disk of a point draws from; `top` is its own.
pub(crate) fn of_point(top: &Path, disk: &PointDisk) -> Option<Vec<FileState>> {
    let points = top.parent()?.parent()?;
    let needed = disk.needs.iter().map(|need| points.join(need.point.to_string()).join(format!("{}.aql", need.disk)));
    let paths: Vec<PathBuf> = std::iter::once(top.to_path_buf()).chain(needed).collect();
    paths.iter().map(|path| FileState::of(path)).collect()
}
