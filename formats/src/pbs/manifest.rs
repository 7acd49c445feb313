//! What a snapshot holds: `index.json.blob`.

use std::{io, path::Path};

use serde::Deserialize;

use super::blob::{self, Failure};
use crate::{
    Error, Result,
    storage::{Access, FileStorage, Storage},
};

/// File of the manifest in a snapshot's folder.
const NAME: &str = "index.json.blob";

/// Longest manifest that is read, in bytes, as stored and decoded.
const BYTES_MAX: usize = 1 << 20;

/// A snapshot's manifest, as far as it is used.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Manifest {
    /// `vm`, `ct` or `host`.
    pub backup_type: String,
    /// The machine's name in the datastore: a number, as a rule.
    pub backup_id: String,
    /// When the backup began, seconds since 1970 UTC.
    pub backup_time: i64,
    /// What it holds.
    pub files: Vec<ManifestFile>,
}

/// One file of a snapshot.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ManifestFile {
    /// Its name in the folder.
    pub filename: String,
    /// `none`, `encrypt` or `sign-only`.
    #[serde(default)]
    pub crypt_mode: Option<String>,
    /// Bytes of what it stands for.
    pub size: u64,
}

impl Manifest {
    /// Reads the manifest of the snapshot in `folder`; `None` where it is no snapshot.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a manifest that breaks its format, [`Error::Io`].
    pub fn of(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(NAME);
        match path.symlink_metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            _ => {}
        }
        let storage = FileStorage::open(&path, Access::ReadOnly)?;
        let label = storage.label().to_owned();
        let failed = |e| Error::io(&label, "read", 0, e);
        let len = storage.len().map_err(failed)?;
        let bad = |what: String| Error::corrupt(&label, 0, what);
        let Some(place) = usize::try_from(len).ok().filter(|len| *len <= BYTES_MAX) else {
            return Err(bad(format!("a manifest of {len} bytes")));
        };
        let mut stored = vec![0; place];
        storage.read_at(0, &mut stored).map_err(failed)?;
        let mut text = Vec::new();
        blob::decode(&stored, BYTES_MAX, None, &mut text).map_err(|failure| match failure {
            Failure::Damaged(what) => bad(what),
            Failure::Encrypted | Failure::OtherKey => bad("a manifest is never encrypted, and this one is".into()),
        })?;
        serde_json::from_slice(&text).map(Some).map_err(|e| bad(format!("a manifest that is not one: {e}")))
    }

    /// The disks: names of their indexes, with what the disk is called.
    pub fn disks(&self) -> impl Iterator<Item = (&str, &ManifestFile)> {
        self.files.iter().filter_map(|file| {
            let disk = file.filename.strip_suffix(".img.fidx")?;
            // A name becomes part of a path: one component, and no other.
            (!disk.is_empty() && !disk.contains(['/', '\0']) && !disk.starts_with('.')).then_some((disk, file))
        })
    }
}
