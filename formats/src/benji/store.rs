//! What lies in a storage: the versions, found by their objects.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::de::IgnoredAny;

use super::{Version, version};
use crate::{Error, Result, objects};

/// Most files and folders that are looked at.
const ENTRIES_MAX: usize = 1 << 20;
/// Folders between a version and its storage.
const LEVELS_MAX: usize = 4;

/// One object of a version.
#[derive(Debug)]
pub struct Stored {
    /// Where it lies.
    pub path: PathBuf,
    /// What it holds; or why it cannot be read.
    pub versions: Result<Vec<Version>>,
}

/// The storage that the file at `path` lies in: the nearest folder above it that holds blocks.
pub fn storage_of(path: &Path) -> Option<PathBuf> {
    let above = path.ancestors().skip(1).take(LEVELS_MAX);
    above.into_iter().find(|folder| folder.join("blocks").is_dir()).map(Path::to_path_buf)
}

/// The versions of the storage `folder`, in no order; `None` where it is none.
///
/// # Errors
/// [`Error::Io`] for a folder that cannot be listed. What is wrong with a single version is said in its place.
pub fn versions(folder: &Path) -> Result<Option<Vec<Stored>>> {
    let top = folder.join("versions");
    if !top.is_dir() || !folder.join("blocks").is_dir() {
        return Ok(None);
    }
    let (mut found, mut seen) = (Vec::new(), 0usize);
    let mut open = vec![(top, 0)];
    while let Some((folder, depth)) = open.pop() {
        let failed = |e| Error::io(folder.display().to_string(), "list", 0, e);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            seen += 1;
            if seen > ENTRIES_MAX {
                return Err(Error::unsupported(folder.display().to_string(), "a storage with that many versions"));
            }
            let kind = entry.file_type().map_err(failed)?;
            let path = entry.path();
            let is_description = path.extension().is_some_and(|end| end == "meta");
            if kind.is_dir() && depth < 2 {
                open.push((path, depth + 1));
            } else if kind.is_file() && depth == 2 && !is_description {
                let versions = objects::listed(&path)
                    .and_then(|storage| version::read::<IgnoredAny>(&storage, &path))
                    .map(|read| read.into_iter().map(|(version, _)| version).collect());
                found.push(Stored { path, versions });
            }
        }
    }
    Ok(Some(found))
}
