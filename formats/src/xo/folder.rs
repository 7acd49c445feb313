//! One VHD whose parts are files of a folder.
//!
//! Invariants
//! - Nothing of a footer or header is used before its checksum held.
//! - A block is handed on only where its bitmap says that all of it is there. Programs that write such folders write whole
//!   blocks; how another one would have to be read is not known, so it is refused and not guessed.
//! - After a block was read, the alias still leads where it led, and no merge has begun: what was read is the disk's.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::refuse_merge;
use crate::{
    BlockRef, Codec, Content, Error, Layer, Result, SECTOR_BYTES, Storage, document,
    objects::{self, Folder, VOLUME_BYTES_MAX},
    storage::FileStorage,
    tables::TableFile,
    unzip,
    vhd::{
        Kind, Parent,
        footer::{Dynamic, Footer},
    },
};

/// Longest list of filters, in bytes.
const FILTERS_BYTES_MAX: u64 = 64 << 10;
/// Largest blocks that are read, in bytes: two mebibytes is what there is.
const BLOCK_BYTES_MAX: u64 = 4 << 20;
/// Longest table of blocks, in bytes.
const TABLE_BYTES_MAX: usize = 4 << 20;

/// What every part was passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filter {
    None,
    Gzip,
    Brotli,
}

impl Filter {
    fn read(folder: &Folder) -> Result<Self> {
        let Some(file) = folder.find("chunk-filters.json")? else { return Ok(Self::None) };
        let filters: Vec<String> = document::read(&file, FILTERS_BYTES_MAX)?;
        match filters.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            [] | ["none"] => Ok(Self::None),
            ["gzip"] => Ok(Self::Gzip),
            ["brotli"] => Ok(Self::Brotli),
            other => Err(Error::unsupported(file.label(), format!("parts that were passed through {other:?}"))),
        }
    }

    /// Reads a part of at most `bytes_max` bytes into `out` (cleared first).
    fn part(self, object: &FileStorage, bytes_max: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let stored_max = (bytes_max + bytes_max / 128 + 4096) as u64;
        objects::whole(object, stored_max, |stored| {
            let done = match self {
                Self::Gzip => unzip::gzip(stored, bytes_max, out),
                Self::Brotli => unzip::brotli(stored, bytes_max, out),
                Self::None if stored.len() > bytes_max => Err(format!("more than {bytes_max} bytes")),
                Self::None => {
                    out.extend_from_slice(stored);
                    Ok(())
                }
            };
            done.map_err(|what| objects::damaged(object, stored.len() as u64, what))
        })
    }
}

/// Tells that a disk is still the one that its alias led to.
#[derive(Clone, Debug)]
struct Watch {
    alias: PathBuf,
    seen: (u64, u64),
}

impl Watch {
    fn look(alias: &Path) -> Result<(u64, u64)> {
        let stat = fs::symlink_metadata(alias).map_err(|e| Error::io(alias.display().to_string(), "stat", 0, e))?;
        Ok((stat.dev(), stat.ino()))
    }

    fn of(alias: &Path) -> Result<Self> {
        refuse_merge(alias)?;
        Ok(Self { alias: alias.into(), seen: Self::look(alias)? })
    }

    fn check(&self) -> Result<()> {
        refuse_merge(&self.alias)?;
        if Self::look(&self.alias)? == self.seen {
            return Ok(());
        }
        let what = "another disk has taken this one's name since it was opened: it was merged".into();
        Err(Error::ChainBroken { path: self.alias.display().to_string(), what })
    }
}

/// Whether the folder at `path` looks like a VHD in parts.
pub fn is_folder_of_parts(path: &Path) -> bool {
    ["footer", "header", "bat"].iter().all(|part| path.join(part).is_file())
}

/// One disk, its footer, header and table read.
#[derive(Debug)]
pub struct VhdFolder {
    /// The alias, or the footer where the folder itself was named.
    label: String,
    /// The footer's.
    file: TableFile,
    place: PathBuf,
    filter: Filter,
    footer: Footer,
    dynamic: Dynamic,
    /// Footer, header and table, as they were.
    proof: blake3::Hash,
    table: Arc<[u8]>,
    watch: Option<Watch>,
}

impl VhdFolder {
    /// Reads the disk in the folder at `place`, whose footer is `footer`; `alias` is the file that led there.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Unsupported`], [`Error::ChainBroken`] for parts that are missing, [`Error::Refused`]
    /// while it is being merged, [`Error::Io`].
    pub fn open(footer: Arc<dyn Storage>, place: &Path, alias: Option<&Path>) -> Result<Self> {
        let file = TableFile::open(footer)?;
        let watch = alias.map(Watch::of).transpose()?;
        let label = alias.map_or_else(|| file.label().to_owned(), |alias| alias.display().to_string());
        let folder = Folder::open(place)?;
        let filter = Filter::read(&folder)?;
        let mut bytes = Vec::new();
        let mut read = |name: &str, bytes_max: usize| -> Result<Vec<u8>> {
            filter.part(&folder.object(name, &label)?, bytes_max, &mut bytes)?;
            Ok(bytes.clone())
        };
        let (footer_bytes, header_bytes) = (read("footer", 512)?, read("header", 1024)?);
        let table = read("bat", TABLE_BYTES_MAX)?;
        let none = || Error::corrupt(&label, 0, "its footer is none, or its checksum is wrong");
        let footer = Footer::parse(&footer_bytes, &label, 0)?.ok_or_else(none)?;
        if footer.kind == Kind::Fixed {
            return Err(Error::unsupported(label, "a fixed VHD in parts"));
        }
        let dynamic = Dynamic::alone(&header_bytes, &label, &footer, footer.kind)?;
        if footer.size > VOLUME_BYTES_MAX {
            return Err(Error::unsupported(
                label,
                format!("a disk of {} bytes (at most {VOLUME_BYTES_MAX})", footer.size),
            ));
        }
        if dynamic.block_bytes > BLOCK_BYTES_MAX {
            return Err(Error::unsupported(label, format!("blocks of {} bytes", dynamic.block_bytes)));
        }
        if (table.len() as u64).saturating_mul(8) < dynamic.entries {
            let what = format!("a table of {} bytes for {} blocks", table.len(), dynamic.entries);
            return Err(Error::corrupt(label, 0, what));
        }
        let mut proof = blake3::Hasher::new();
        proof.update(&footer_bytes).update(&header_bytes).update(&table);
        let (proof, table) = (proof.finalize(), table.into());
        Ok(Self { label, file, place: place.into(), filter, footer, dynamic, proof, table, watch })
    }

    /// The disk this one falls back to, if it is a differencing one.
    pub fn parent(&self) -> Option<&Parent> {
        self.dynamic.parent.as_ref()
    }

    pub(super) fn id(&self) -> &[u8; 16] {
        &self.footer.id
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// The disk without its parent.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn layer(&self) -> Result<VhdFolderLayer> {
        Ok(VhdFolderLayer {
            label: self.label.clone(),
            file: self.file.clone(),
            folder: Folder::open(&self.place)?,
            filter: self.filter,
            size: self.footer.size,
            block_bytes: self.dynamic.block_bytes,
            entries: self.dynamic.entries,
            clear: if self.parent().is_some() { Content::Absent } else { Content::Zero },
            proof: self.proof,
            table: self.table.clone(),
            watch: self.watch.clone(),
        })
    }
}

/// One disk without its parent.
#[derive(Debug)]
pub struct VhdFolderLayer {
    label: String,
    file: TableFile,
    folder: Folder,
    filter: Filter,
    size: u64,
    block_bytes: u64,
    entries: u64,
    /// What a block that is not there means.
    clear: Content,
    proof: blake3::Hash,
    table: Arc<[u8]>,
    watch: Option<Watch>,
}

impl VhdFolderLayer {
    fn is_here(&self, block: u64) -> bool {
        let byte = usize::try_from(block / 8).ok().and_then(|index| self.table.get(index));
        block < self.entries && byte.is_some_and(|byte| byte & (0x80 >> (block % 8)) != 0)
    }

    #[expect(clippy::unnecessary_wraps, reason = "a piece of other formats can be damaged")]
    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let (logical, skip) = (at / self.block_bytes, at % self.block_bytes);
        let len = (self.block_bytes - skip).min(end - at);
        if !self.is_here(logical) {
            return Ok((self.clear, len));
        }
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let block = BlockRef {
            offset: logical * self.block_bytes,
            logical,
            // What is stored is known only when the block is opened.
            stored_len: small(self.block_bytes),
            raw_len: small(self.block_bytes),
            check: 0,
            file: 0,
            codec: Codec::Deflate,
        };
        Ok((Content::Packed { block, skip: small(skip) }, len))
    }

    fn bitmap_bytes(&self) -> usize {
        let bytes = (self.block_bytes / SECTOR_BYTES / 8).next_multiple_of(SECTOR_BYTES);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// Whether `bytes` of block `logical` are what its `bitmap` says, without asking a parent.
    fn is_whole(&self, logical: u64, bitmap: &[u8], bytes: &[u8]) -> bool {
        let left = self.size.saturating_sub(logical.saturating_mul(self.block_bytes));
        let sectors = usize::try_from(left.div_ceil(SECTOR_BYTES)).unwrap_or(usize::MAX);
        let (all, _) = bytes.as_chunks::<512>();
        all.iter().take(sectors).enumerate().all(|(sector, bytes)| {
            let is_set = bitmap.get(sector / 8).is_some_and(|byte| byte & (0x80 >> (sector % 8)) != 0);
            is_set || self.clear == Content::Zero && bytes.iter().all(|byte| *byte == 0)
        })
    }
}

impl Layer for VhdFolderLayer {
    fn label(&self) -> &str {
        &self.label
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        self.block_bytes
    }

    crate::runs::layer_in_pieces!(file);

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.file.fingerprint("xo", self.size);
        hash.update(self.proof.as_bytes());
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let logical = block.logical;
        if !self.is_here(logical) {
            return Err(Error::corrupt(&self.label, block.offset, format!("the disk has no block {logical}")));
        }
        let object = self.folder.object(format!("blocks/{}/{}", logical / 1000, logical % 1000), &self.label)?;
        let (head, body) = (self.bitmap_bytes(), usize::try_from(self.block_bytes).unwrap_or(usize::MAX));
        let mut stored = Vec::new();
        self.filter.part(&object, head.saturating_add(body), &mut stored)?;
        if let Some(watch) = &self.watch {
            watch.check()?;
        }
        let (bitmap, bytes) = stored.split_at(head.min(stored.len()));
        if bytes.len() != body {
            let what = format!("{} bytes, where {} belong", stored.len(), head + body);
            return Err(objects::damaged(&object, stored.len() as u64, what));
        }
        if !self.is_whole(logical, bitmap, bytes) {
            return Err(Error::unsupported(object.label(), "a block of which only a part is there"));
        }
        out.extend_from_slice(bytes);
        Ok(())
    }
}
