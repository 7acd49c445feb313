//! What can be seen of a source's files without reading them: whether they are still the same, and whether somebody writes.
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

use crate::{
    context::quoted,
    fail::{Code, Fail, Result},
    host::in_use::{self, Against},
};

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

impl FileState {
    /// Whether both are one file of one content; it may have been renamed or given to somebody else in between.
    fn is_as(&self, other: &Self) -> bool {
        let content = |file: &Self| (file.device, file.inode, file.size, file.modified);
        content(self) == content(other)
    }
}

/// The files of an image's chain that stand still while a point is made of them.
pub(crate) struct Still {
    disk: String,
    files: Vec<FileState>,
}

impl Still {
    /// Looks at the files of the disk `disk`; what is no file of this computer proves nothing, and is not looked at.
    ///
    /// # Errors
    /// [`Code::Busy`]: a program has one of them open to write.
    pub(crate) fn of(disk: &str, chain: &Chain) -> Result<Self> {
        let files = seen(chain).into_iter().flatten().collect();
        let still = Self { disk: disk.to_owned(), files };
        still.is_free()?;
        Ok(still)
    }

    fn is_free(&self) -> Result<()> {
        let ways = "turn its machine off, or give it a monitor where its host looks for one: docs/machines.md";
        self.files.iter().try_for_each(|file| {
            let free = in_use::free(&self.disk, Path::new(&file.path), Against::Writers);
            free.map_err(|fail| fail.help(format!("fuser -v {}    # {ways}", quoted(&file.path))))
        })
    }

    /// Looks again, after everything was read.
    ///
    /// # Errors
    /// [`Code::Busy`]: somebody has one of them open to write, or has written to it since.
    pub(crate) fn check(&self) -> Result<()> {
        self.is_free()?;
        for then in &self.files {
            if !FileState::of(Path::new(&then.path)).is_some_and(|now| now.is_as(then)) {
                let what =
                    format!("the disk {} was written to while it was read: a point would mix two states", self.disk);
                return Err(Fail::new(Code::Busy, what).at(&then.path));
            }
        }
        Ok(())
    }
}

/// The files that a chain is read from, newest first: each layer's own, and the one beside it that holds
/// its data. None where one of them is no file of this computer.
pub(crate) fn of_chain(chain: &Chain) -> Option<Vec<FileState>> {
    seen(chain).into_iter().collect()
}

/// The same, with none for what is no file of this computer.
fn seen(chain: &Chain) -> Vec<Option<FileState>> {
    let mut files = Vec::new();
    for layer in chain.layers() {
        files.push(FileState::of(Path::new(layer.label())));
        if let Ok(beside) = layer.file(1) {
            files.push(FileState::of(Path::new(beside.label())));
        }
    }
    files
}

/// The files that a disk of a point draws from; `top` is its own.
pub(crate) fn of_point(top: &Path, disk: &PointDisk) -> Option<Vec<FileState>> {
    let points = top.parent()?.parent()?;
    let needed = disk.needs.iter().map(|need| points.join(need.point.to_string()).join(format!("{}.aql", need.disk)));
    let paths: Vec<PathBuf> = std::iter::once(top.to_path_buf()).chain(needed).collect();
    paths.iter().map(|path| FileState::of(path)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use aquifer_formats::{
        Layer, Storage,
        raw::RawLayer,
        storage::{Access, FileStorage, MemoryStorage},
    };
    use aquifer_vdisk::BlockCache;

    use super::*;

    #[test]
    fn what_is_local_of_a_chain_is_watched_whatever_the_rest_is() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("below.raw");
        fs::write(&path, [1; 4096]).expect("write");
        let raw = |storage: Arc<dyn Storage>| Arc::new(RawLayer::open(storage).expect("a layer")) as Arc<dyn Layer>;
        let above = raw(Arc::new(MemoryStorage::new("nbd://elsewhere/vda", vec![0; 4096])));
        let below = raw(Arc::new(FileStorage::open(&path, Access::ReadOnly).expect("open")));
        let chain = Chain::new(vec![above, below], Arc::new(BlockCache::new(0))).expect("a chain");
        assert!(of_chain(&chain).is_none(), "it proves nothing as a whole");
        let still = Still::of("vda", &chain).expect("nobody writes");
        still.check().expect("nobody wrote");
        fs::write(&path, [2; 8192]).expect("write");
        assert_eq!(still.check().expect_err("it was written to").code, Code::Busy);
    }
}
