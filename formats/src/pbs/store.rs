//! What lies in a datastore, or in a part of it: the snapshots, found by their folders.

use std::{
    fs,
    path::{Path, PathBuf},
};

use jiff::Timestamp;

use super::{CHUNKS, LEVELS_MAX, Manifest, datastore_of};
use crate::{Error, Result};

/// Most folders that are looked at.
const FOLDERS_MAX: usize = 1 << 20;

/// One snapshot's folder.
#[derive(Debug)]
pub struct Snapshot {
    /// Where it lies.
    pub folder: PathBuf,
    /// What it holds; `None` where the manifest is missing: its backup still runs, or never ended.
    pub manifest: Result<Option<Manifest>>,
}

impl Snapshot {
    /// When the backup began: as the manifest says, else the folder's name.
    pub fn created(&self) -> Option<Timestamp> {
        let told = self.manifest.as_ref().ok().and_then(Option::as_ref);
        told.and_then(|manifest| Timestamp::from_second(manifest.backup_time).ok()).or_else(|| time_of(&self.folder))
    }
}

/// Snapshots are named by their time.
fn time_of(folder: &Path) -> Option<Timestamp> {
    folder.file_name()?.to_str()?.parse().ok()
}

/// The datastore that `folder` is, or lies in.
pub fn datastore_holding(folder: &Path) -> Option<PathBuf> {
    if folder.join(CHUNKS).is_dir() { Some(folder.into()) } else { datastore_of(folder) }
}

/// The snapshots in `folder`, which is a datastore or a part of it, in no order. Links are not followed.
///
/// # Errors
/// [`Error::Io`] for a folder that cannot be listed.
pub fn snapshots(folder: &Path) -> Result<Vec<Snapshot>> {
    let (mut found, mut seen) = (Vec::new(), 0usize);
    let mut open = vec![(folder.to_path_buf(), 0)];
    while let Some((folder, depth)) = open.pop() {
        seen += 1;
        if seen > FOLDERS_MAX || depth > LEVELS_MAX {
            return Err(Error::unsupported(folder.display().to_string(), "a datastore with that many folders"));
        }
        if time_of(&folder).is_some() {
            found.push(Snapshot { manifest: Manifest::of(&folder), folder });
            continue;
        }
        let failed = |e| Error::io(folder.display().to_string(), "list", 0, e);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let is_folder = entry.file_type().map_err(failed)?.is_dir();
            if is_folder && !entry.file_name().to_string_lossy().starts_with('.') {
                open.push((entry.path(), depth + 1));
            }
        }
    }
    Ok(found)
}
