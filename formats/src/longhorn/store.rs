//! What lies in a backup store, or in a part of it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::de::IgnoredAny;

use super::{BACKUP_BYTES_MAX, Config, DESCRIPTION, Volume};
use crate::{Error, Result, document, objects};

/// Most files and folders that are looked at.
const ENTRIES_MAX: usize = 1 << 20;

/// One backup of a volume, as a list shows it.
#[derive(Debug)]
pub struct Stored {
    /// Where its list lies.
    pub path: PathBuf,
    /// Name of the volume.
    pub volume: String,
    /// What Longhorn calls the backup.
    pub name: String,
    /// When it was made; `None` while it is being made.
    pub created: Option<Timestamp>,
    /// Whether only what had changed was read for it. It stands alone all the same.
    pub is_incremental: bool,
    /// Size of the volume in bytes.
    pub size: u64,
    /// Whether it has ended.
    pub is_complete: bool,
    /// Why it cannot be served.
    pub refusal: Option<String>,
}

/// The folder of volumes that `folder` is or holds: of a store, or the store's parent.
pub fn volumes_in(folder: &Path) -> Option<PathBuf> {
    let places = [folder.join("volumes"), folder.join("backupstore/volumes")];
    places.into_iter().find(|place| place.is_dir())
}

/// The backups of all volumes in the folder `volumes`, in no order.
///
/// # Errors
/// [`Error::Io`] for a folder that cannot be listed. What is wrong with a single backup is said in its place.
pub fn backups(volumes: &Path) -> Result<Vec<Stored>> {
    let (mut found, mut budget) = (Vec::new(), ENTRIES_MAX);
    for first in entries(volumes, &mut budget)? {
        for second in entries(&first, &mut budget)? {
            for volume in entries(&second, &mut budget)? {
                // Whatever it is: that it cannot be read is said of the backups.
                if is_folder(&volume) && volume.join(DESCRIPTION).symlink_metadata().is_ok() {
                    of_volume(&volume, &mut budget, &mut found)?;
                }
            }
        }
    }
    Ok(found)
}

fn of_volume(folder: &Path, budget: &mut usize, found: &mut Vec<Stored>) -> Result<()> {
    let volume = Volume::read(folder);
    let lists = folder.join("backups");
    let called = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for path in entries(&lists, budget)? {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(name) = file.strip_prefix("backup_").and_then(|name| name.strip_suffix(".cfg")) else { continue };
        let config =
            objects::listed(&path).and_then(|storage| document::read::<Config<IgnoredAny>>(&storage, BACKUP_BYTES_MAX));
        let mut stored = Stored {
            volume: called.clone(),
            name: name.to_owned(),
            created: None,
            is_incremental: false,
            size: volume.as_ref().ok().and_then(|volume| volume.size.value()).unwrap_or_default(),
            refusal: volume.as_ref().err().map(ToString::to_string),
            is_complete: true,
            path,
        };
        match config {
            Ok(config) => {
                stored.created = config.created();
                stored.is_incremental = config.is_incremental;
                stored.is_complete = !config.created_time.is_empty();
                stored.name.clone_from(&config.name);
                stored.refusal = stored.refusal.or(config.refusal().map(str::to_owned));
            }
            Err(error) => stored.refusal = Some(error.to_string()),
        }
        found.push(stored);
    }
    Ok(())
}

/// Whether `path` is a folder, and no link to one.
fn is_folder(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|stat| stat.is_dir())
}

/// What lies in `folder`, without what is hidden; nothing where it is no folder, or a link to one.
fn entries(folder: &Path, budget: &mut usize) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io(folder.display().to_string(), "list", 0, e);
    let mut found = Vec::new();
    if !is_folder(folder) {
        return Ok(found);
    }
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        *budget = budget
            .checked_sub(1)
            .ok_or_else(|| Error::unsupported(folder.display().to_string(), "a store with that many files"))?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            found.push(entry.path());
        }
    }
    Ok(found)
}
