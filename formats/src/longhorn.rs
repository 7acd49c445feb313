//! Backup stores of Longhorn, read-only: volumes whose backups list blocks by their digest.
//!
//! ```text
//! backupstore/volumes/6a/ff/VOLUME/volume.cfg                how large the volume is
//!                                  backups/backup_NAME.cfg   which block lies where
//!                                  blocks/8b/de/8bde30...blk a block, named by its digest
//! ```
//!
//! Invariants
//! - Every backup lists all its blocks, so it stands on nothing; what it does not list is zeros.
//! - A block's digest holds (SHA-512, the first half), or its range is an error; one that is not there is an error.
//! - A block is opened by the name its digest makes, beneath the volume's own folder, through no link.
//! - A backup that is still being made is refused, and so is a volume that stands on a backing image.
//!
//! Not here: backups of single files and of whole systems; locks of the store: what a running Longhorn deletes is missed
//! here, and said to be.

mod layer;
mod store;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, de};

pub use layer::LonghornLayer;
pub use store::{Stored, backups, volumes_in};

use crate::{
    Error, Result, SECTOR_BYTES, Storage, document,
    objects::{self, VOLUME_BYTES_MAX},
};

/// Longest list of a backup, in bytes: a volume of 8 TiB.
const BACKUP_BYTES_MAX: u64 = 512 << 20;
/// What describes a volume, in its folder.
const DESCRIPTION: &str = "volume.cfg";
/// Longest description of a volume, in bytes.
const DESCRIPTION_BYTES_MAX: u64 = 1 << 20;
/// Sizes that blocks have: before 1.10 always the first.
const BLOCK_BYTES: [u64; 2] = [2 << 20, 16 << 20];

/// Half a SHA-512.
type Digest = [u8; 32];

/// Where a block belongs, and its name.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Block {
    offset: u64,
    #[serde(rename = "BlockChecksum", deserialize_with = "digest")]
    digest: Digest,
}

fn digest<'de, D: Deserializer<'de>>(from: D) -> Result<Digest, D::Error> {
    struct Digits;
    impl de::Visitor<'_> for Digits {
        type Value = Digest;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("64 hexadecimal digits")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Digest, E> {
            objects::from_hexadecimal(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
    from.deserialize_str(Digits)
}

/// A number, which that program writes between quotes.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Number {
    Plain(u64),
    Quoted(String),
}

impl Number {
    fn value(&self) -> Option<u64> {
        match self {
            Self::Plain(number) => Some(*number),
            Self::Quoted(text) => text.parse().ok(),
        }
    }
}

/// What `volume.cfg` says, as far as it is used.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Volume {
    name: String,
    size: Number,
    #[serde(default)]
    backing_image_name: Option<String>,
}

impl Volume {
    fn read(folder: &Path) -> Result<Self> {
        document::read(&objects::listed(&folder.join(DESCRIPTION))?, DESCRIPTION_BYTES_MAX)
    }
}

/// How a backup says that its blocks are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Plain,
    Gzip,
    Lz4,
}

/// What `backup_NAME.cfg` says; of a list that nobody needs, nothing is kept.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase", bound(deserialize = "B: Deserialize<'de>"))]
struct Config<B> {
    name: String,
    volume_name: String,
    /// Empty while it is being made.
    #[serde(default)]
    created_time: String,
    #[serde(default)]
    is_incremental: bool,
    #[serde(default)]
    compression_method: Option<String>,
    #[serde(default = "Option::default")]
    blocks: Option<B>,
    #[serde(default)]
    single_file: Option<SingleFile>,
}

/// A backup of one file instead of blocks.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SingleFile {
    #[serde(default)]
    file_path: String,
}

impl<B> Config<B> {
    /// Why this is nothing that can be served.
    fn refusal(&self) -> Option<&'static str> {
        if self.created_time.is_empty() {
            return Some("the backup is still being made, or never ended");
        }
        let file = self.single_file.as_ref().is_some_and(|file| !file.file_path.is_empty());
        file.then_some("a backup of a file, which has no blocks")
    }

    fn method(&self) -> Result<Method, String> {
        match self.compression_method.as_deref().unwrap_or_default() {
            "none" => Ok(Method::Plain),
            "gzip" | "" => Ok(Method::Gzip),
            "lz4" => Ok(Method::Lz4),
            other => Err(format!("blocks compressed by {other:?}")),
        }
    }

    fn created(&self) -> Option<Timestamp> {
        self.created_time.parse().ok()
    }
}

/// The volume's folder that the backup at `path` lies in.
fn volume_folder(path: &Path) -> Option<PathBuf> {
    path.parent()?.parent().map(Path::to_path_buf)
}

/// The volume that the file at `path` is a backup of: where its blocks lie.
pub fn volume_of(path: &Path) -> Option<PathBuf> {
    volume_folder(path).filter(|folder| folder.join(DESCRIPTION).is_file())
}

/// One backup of a volume.
#[derive(Debug)]
pub struct Backup {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    config: Config<Vec<Block>>,
    size: u64,
    method: Method,
}

impl Backup {
    /// Reads the backup's list in `storage`, which lies at `path` in its volume's folder, and the volume's description.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Unsupported`], [`Error::Io`]; [`Error::ChainBroken`] where it lies in no volume.
    pub fn open(storage: Arc<dyn Storage>, path: &Path) -> Result<Self> {
        let label = storage.label().to_owned();
        let config: Config<Vec<Block>> = document::read(&*storage, BACKUP_BYTES_MAX)?;
        if let Some(why) = config.refusal() {
            return Err(Error::unsupported(label, why));
        }
        let method = config.method().map_err(|what| Error::unsupported(&label, what))?;
        let nowhere = || Error::ChainBroken { path: label.clone(), what: "it lies in no volume's folder".into() };
        let folder = volume_folder(path).ok_or_else(nowhere)?;
        let volume = Volume::read(&folder)?;
        if volume.name != config.volume_name {
            let what = format!("a backup of {:?} in the folder of {:?}", config.volume_name, volume.name);
            return Err(Error::ChainBroken { path: label, what });
        }
        // Some releases quote the name once more.
        let image = volume.backing_image_name.as_deref().unwrap_or_default().trim_matches('"');
        if !image.is_empty() {
            return Err(Error::unsupported(label, format!("a volume that stands on the backing image {image:?}")));
        }
        let size = volume
            .size
            .value()
            .filter(|size| *size > 0 && i64::try_from(*size).is_ok() && size.is_multiple_of(SECTOR_BYTES));
        let size = size.ok_or_else(|| Error::corrupt(&label, 0, format!("a volume of {:?} bytes", volume.size)))?;
        if size > VOLUME_BYTES_MAX {
            return Err(Error::unsupported(label, format!("a volume of {size} bytes (at most {VOLUME_BYTES_MAX})")));
        }
        Ok(Self { storage, folder, config, size, method })
    }

    /// Name of the volume, which is the only disk.
    pub fn volume(&self) -> &str {
        &self.config.volume_name
    }

    /// The disk.
    ///
    /// # Errors
    /// Blocks that do not fit together; a first block that is missing or damaged, for it tells how large all are.
    pub fn disk(&self) -> Result<LonghornLayer> {
        LonghornLayer::new(self)
    }
}

#[cfg(test)]
mod tests;
