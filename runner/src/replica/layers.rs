//! The layers of a replica: native images that stand on one another.
//!
//! Invariants
//! - Every layer names what it stands on by file name and format; nothing is probed.
//! - A layer appears under its name whole and durable, or not at all.
//!
//! Not here: what is in them.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{
    Storage,
    probe::Format,
    qcow2::{BackingName, NewQcow2, Qcow2},
    storage::{Access, FileStorage},
};
use aquifer_vdisk::{BlockCache, Chain, ChainSpec, Delta, Disk, open_chain};
use rustix::io::Errno;

use super::digests::sync_folder;
use crate::{
    fail::{Code, Fail, Result},
    source,
};

/// Opens the layer at `path` with all it stands on.
///
/// # Errors
/// A layer that is missing, damaged, or not the one that is named.
pub fn open(path: &Path, format: Format, cache: &Arc<BlockCache>) -> Result<Arc<Chain>> {
    let path = path.to_path_buf();
    let spec = ChainSpec::Image { path, format: Some(format), allow_backing: Vec::new(), snapshot: None };
    Ok(Arc::new(open_chain(&spec, cache.clone(), &|uri| source::layer_of_nbd(uri))?))
}

/// Opens a disk that is served.
///
/// # Errors
/// Nobody serves it.
pub fn served(uri: &str, cache: &Arc<BlockCache>) -> Result<Arc<Chain>> {
    let spec = ChainSpec::Nbd { uri: uri.to_owned() };
    Ok(Arc::new(open_chain(&spec, cache.clone(), &|uri| source::layer_of_nbd(uri))?))
}

/// The same, as a disk.
///
/// # Errors
/// As [`open`].
pub fn disk(path: &Path, cache: &Arc<BlockCache>) -> Result<Disk> {
    Ok(Disk::read_only(path.display().to_string(), open(path, Format::Qcow2, cache)?))
}

/// What the layers above `below` say, together; everything where `below` is not in the chain.
///
/// # Errors
/// A layer whose tables cannot be read.
pub fn said_above(chain: &Chain, below: &Path) -> Result<Option<Delta>> {
    let below = below.display().to_string();
    let mut said = Delta::new();
    for layer in chain.layers() {
        if layer.label() == below {
            return Ok(Some(said.clip(0..chain.size())));
        }
        let mut own = Delta::new();
        layer.scan(0, layer.size(), &mut |offset, len, _| own.insert(offset..offset.saturating_add(len)))?;
        // Past the end of a shorter layer nothing below shows.
        own.insert(layer.size()..chain.size());
        said = said.union(&own);
    }
    Ok(None)
}

/// The files of a layer and of all it stands on, newest first.
///
/// # Errors
/// A file that cannot be read.
pub fn files(top: &Path) -> Result<Vec<PathBuf>> {
    const DEPTH_MAX: usize = 4096;
    let mut all = vec![top.to_path_buf()];
    while let Some(last) = all.last().filter(|_| all.len() < DEPTH_MAX) {
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(last, Access::ReadOnly)?);
        let image = Qcow2::open(storage)?;
        let Some(backing) = image.backing() else { return Ok(all) };
        let below = last.with_file_name(&backing.name);
        if below.parent() != last.parent() {
            return Ok(all);
        }
        let is_last = backing.format.as_deref() != Some("qcow2");
        all.push(below);
        if is_last {
            return Ok(all);
        }
    }
    Err(Fail::new(Code::Corrupt, "the layers stand on one another in a circle").at(top.display()))
}

/// How a layer in the same folder is named as backing.
///
/// # Errors
/// A name that is no text.
pub fn backing(below: &Path, format: Format) -> Result<BackingName> {
    let name = below.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Fail::new(Code::Unsupported, "a layer's name is not UTF-8").at(below.display()))?;
    Ok(BackingName { name: name.to_owned(), format: format.name().to_owned() })
}

/// Makes an empty layer on `below`: O(1). `enter` is told the file before it gets its name.
///
/// # Errors
/// I/O; those of `enter`.
pub fn make_empty(
    path: &Path,
    (below, format): (&Path, Format),
    size: u64,
    enter: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let part = part_of(path);
    remove(&part)?;
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&part, Access::CreateNew)?);
    NewQcow2::create(storage, size, Some(backing(below, format)?))?.finish()?;
    enter(&part)?;
    name_it(&part, path)
}

/// The name a layer has while it is written.
pub fn part_of(path: &Path) -> PathBuf {
    beside(path, "part")
}

pub(super) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(ending);
    path.with_file_name(name)
}

/// Gives a finished file its name.
///
/// # Errors
/// I/O.
pub fn name_it(part: &Path, path: &Path) -> Result<()> {
    fs::rename(part, path).map_err(|e| Fail::io(path.display(), "name", &e))?;
    sync_folder(path.parent().unwrap_or(Path::new("/")))
}

/// The same, where nobody else has got the name meanwhile. Done again it goes on.
///
/// # Errors
/// [`Code::Exists`]: somebody has, and keeps it; I/O.
pub fn name_new(part: &Path, path: &Path) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let named = match renameat_with(CWD, part, CWD, path, RenameFlags::NOREPLACE) {
        // A file system that cannot do it in one step.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            fs::hard_link(part, path).and_then(|()| fs::remove_file(part))
        }
        named => named.map_err(io::Error::from),
    };
    match named {
        // Cut short between the two steps the file has both names.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if inode(part)? != inode(path)? {
                return Err(taken(path));
            }
            remove(part)?;
        }
        named => named.map_err(|e| Fail::io(path.display(), "name", &e))?,
    }
    sync_folder(path.parent().unwrap_or(Path::new("/")))
}

/// Refuses the name `path` for `part` where another file has it.
///
/// # Errors
/// [`Code::Exists`]; I/O.
pub fn can_be_named(part: &Path, path: &Path) -> Result<()> {
    let there = inode(path)?;
    if there.is_none() || there == inode(part)? { Ok(()) } else { Err(taken(path)) }
}

/// Device and inode of what has a name. A link to a file is another one: what it leads to may go.
fn inode(path: &Path) -> Result<Option<(u64, u64)>> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(|meta| Some((meta.dev(), meta.ino()))).map_err(|e| Fail::io(path.display(), "look at", &e)),
    }
}

/// Somebody else has the name `path`.
pub fn taken(path: &Path) -> Fail {
    Fail::new(Code::Exists, format!("{} exists already", path.display())).at(path.display())
}

/// Removes a file; one that is gone is gone.
///
/// # Errors
/// I/O.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Fail::io(path.display(), "remove", &error)),
        _ => Ok(()),
    }
}
