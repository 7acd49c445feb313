//! Opens a session's disks: chain, overlay, and whether the two belong together.
//!
//! Invariants
//! - A chain that is not the one the session was started on is refused before anything is served.
//! - An overlay appears under its final name complete or not at all; what a crash left unfinished was
//!   never served and is made anew.
//! - A disk whose overlay holds everything is opened without its source.
//! - A disk whose overlay holds something is opened with its source or without: what is local is served at once.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aquifer_formats::{
    Storage, benji, longhorn,
    pbs::datastore_of,
    storage::{Access as FileAccess, FileStorage},
};
use aquifer_vdisk::{
    BlockCache, Chain, ChainSpec, Disk, Overlay, OverlayOf, OverlayOptions, open_chain, unflushed::Boot,
};

use super::{
    Access, Blocks, DiskSpec, Error, Preallocate, Result, Spec,
    folder::{make_private_dir, sync_dir},
    serve::ConnectNbd,
    source::Opening,
};

/// How long a door that has something to serve waits for a source before it serves without it.
const SOURCE_WAIT: Duration = Duration::from_secs(5);

/// A disk, and its source where that is still on its way.
pub(super) struct Opened {
    pub(super) disk: Arc<Disk>,
    pub(super) opening: Option<Opening>,
}

impl From<Arc<Disk>> for Opened {
    fn from(disk: Arc<Disk>) -> Self {
        Self { disk, opening: None }
    }
}

/// Opens one disk of `spec`.
///
/// # Errors
/// [`Error::OtherChain`]; [`Error::Disk`] for what is wrong with source or overlay.
pub(super) fn open(spec: &Spec, disk: &DiskSpec, cache: &Arc<BlockCache>, connect: ConnectNbd) -> Result<Opened> {
    if spec.options.access == Access::ReadOnly {
        let chain = chain_of(disk, cache, connect)?;
        return Ok(Arc::new(Disk::read_only(&disk.name, chain)).into());
    }
    let of = overlay_of(disk).unwrap_or(OverlayOf { size: disk.size, chain: [0; 32] });
    let mut options = OverlayOptions::default();
    if let Some(bytes) = spec.options.journal_bytes {
        options.journal_bytes = bytes;
    }
    let dir = spec.disk_dir(&disk.name);
    if dir.exists() {
        let overlay = Overlay::open(&dir, of, options)?;
        if overlay.local().absent == 0 {
            return Ok(surviving(spec, Disk::detached(&disk.name, overlay)?, &dir)?.into());
        }
        let opening = Opening::begin(disk.clone(), cache.clone(), connect)?;
        return match opening.first(SOURCE_WAIT) {
            Some(Ok(chain)) => Ok(surviving(spec, Disk::writable(&disk.name, chain, overlay)?, &dir)?.into()),
            // It is there, and it is another one: nothing good comes of waiting.
            Some(Err(error @ Error::OtherChain { .. })) => Err(error),
            Some(Err(_)) | None => {
                let disk = surviving(spec, Disk::awaiting(&disk.name, overlay), &dir)?;
                Ok(Opened { disk, opening: Some(opening) })
            }
        };
    }
    // The source first: nothing is made for one that cannot be read.
    let chain = chain_of(disk, cache, connect)?;
    create_overlay(&dir, of, options, spec.options.preallocate)?;
    let overlay = Overlay::open(&dir, of, options)?;
    Ok(surviving(spec, Disk::writable(&disk.name, chain, overlay)?, &dir)?.into())
}

/// The machine stays when this process dies: nothing it was told is written may be gone then.
fn surviving(spec: &Spec, disk: Disk, dir: &Path) -> Result<Arc<Disk>> {
    // Watched first: bytes that are brought back were never read from what is absent.
    let disk = if spec.options.blocks == Blocks::Used { disk.watching(dir)? } else { disk };
    Ok(Arc::new(disk.surviving(dir, this_boot()?)?))
}

/// Which boot of this host it is.
///
/// # Errors
/// The kernel does not say.
pub fn this_boot() -> Result<Boot> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(|e| Error::io(Path::new(path), "read", e))?;
    let boot = uuid::Uuid::try_parse(text.trim()).map_err(|e| Error::bad_file(Path::new(path), e.to_string()))?;
    Ok(boot.into_bytes())
}

/// The chain of a disk, if it is the one the session was started on.
pub(super) fn chain_of(disk: &DiskSpec, cache: &Arc<BlockCache>, connect: ConnectNbd) -> Result<Arc<Chain>> {
    let chain = open_chain(&disk.chain, cache.clone(), &connect)?;
    let found = hexadecimal(&chain.fingerprint()?);
    let same = found.eq_ignore_ascii_case(&disk.fingerprint);
    if !same || chain.size() != disk.size {
        return Err(Error::OtherChain {
            disk: disk.name.clone(),
            expected: format!("{} of {} bytes", disk.fingerprint, disk.size),
            found: format!("{found} of {} bytes", chain.size()),
        });
    }
    Ok(Arc::new(chain))
}

fn create_overlay(dir: &Path, of: OverlayOf, options: OverlayOptions, preallocate: Preallocate) -> Result<()> {
    let parent = dir.parent().unwrap_or(dir);
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    // Names of disks never begin with a dot.
    let draft = parent.join(format!(".{name}.new"));
    if draft.exists() {
        fs::remove_dir_all(&draft).map_err(|e| Error::io(&draft, "remove", e))?;
    }
    make_private_dir(&draft)?;
    let made = fill_overlay(&draft, of, options, preallocate);
    if made.is_err() {
        let _ = fs::remove_dir_all(&draft);
        return made;
    }
    sync_dir(&draft)?;
    fs::rename(&draft, dir).map_err(|e| Error::io(dir, "create", e))?;
    sync_dir(parent)
}

fn fill_overlay(draft: &Path, of: OverlayOf, options: OverlayOptions, preallocate: Preallocate) -> Result<()> {
    drop(Overlay::create(draft, of, options)?);
    if preallocate == Preallocate::Full {
        let path = Overlay::raw_path(draft);
        let raw = FileStorage::open(&path, FileAccess::ReadWrite).map_err(aquifer_vdisk::Error::from)?;
        let reserved = raw.reserve(0, of.size).and_then(|()| raw.sync());
        reserved.map_err(|e| match e.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => {
                let what = format!("the {} bytes of the disk", of.size);
                Error::Disk(aquifer_vdisk::Error::NoSpace { path: path.display().to_string(), what })
            }
            _ => Error::io(&path, "reserve", e),
        })?;
    }
    Ok(())
}

/// What a disk's overlay belongs to.
pub(super) fn overlay_of(disk: &DiskSpec) -> Option<OverlayOf> {
    Some(OverlayOf { size: disk.size, chain: digits(&disk.fingerprint)? })
}

/// A disk's `disk.raw`, for passthrough.
pub(super) fn raw_file(spec: &Spec, disk: &DiskSpec) -> Option<File> {
    File::open(Overlay::raw_path(&spec.disk_dir(&disk.name))).ok()
}

/// Folders a chain is read from.
pub(super) fn source_folders(chain: &ChainSpec) -> Vec<PathBuf> {
    let (path, more) = match chain {
        ChainSpec::Image { path, allow_backing, .. } => (path, allow_backing.as_slice()),
        ChainSpec::Native { path } | ChainSpec::Member { path, .. } | ChainSpec::Snapshot { path, .. } => {
            (path, &[][..])
        }
        ChainSpec::Mixed { path, .. } => (path, &[][..]),
        ChainSpec::Nbd { .. } => return Vec::new(),
    };
    let mut out: Vec<PathBuf> = more.to_vec();
    if let ChainSpec::Snapshot { key: Some(key), .. } = chain {
        out.extend(std::iter::once(&key.file).chain(&key.passphrase).cloned());
    }
    if let ChainSpec::Mixed { below, .. } = chain {
        out.extend(source_folders(below));
    }
    let real = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    for file in [path, &real] {
        let Some(folder) = file.parent() else { continue };
        // The points of a repository's machine stand on each other, in folders side by side.
        let repository = folder.ancestors().take(8).find(|a| a.join("aquifer.json").is_file());
        out.push(repository.unwrap_or(folder).to_path_buf());
        // Blocks of a store lie above what lists them.
        out.extend(datastore_of(file));
        out.extend(longhorn::volume_of(file));
        out.extend(benji::storage_of(file).filter(|_| benji::is_object(file)));
    }
    out
}

/// Bytes as hexadecimal digits.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// 64 hexadecimal digits as bytes.
fn digits(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    let text = text.as_bytes();
    for (index, byte) in out.iter_mut().enumerate() {
        let pair = std::str::from_utf8(text.get(index * 2..index * 2 + 2)?).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    (text.len() == 64).then_some(out)
}
