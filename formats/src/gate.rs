//! The policy for files that an image names: a backing file, an external data file.
//!
//! Any image can name any file of the host, so a name read from bytes never becomes a path by
//! itself. A person names the first file ([`Gate::enter`]); what that file names is followed
//! ([`Gate::follow`]) only into the first file's folder or into places the person allowed.
//!
//! Invariants
//! - A followed file lies, symbolic links resolved, beneath an allowed place; the kernel checks
//!   that once more at the open (`openat2`, beneath, no links), so a rename in between only fails.
//! - Protocol names (`nbd:`, `json:`, any `word:`) are never followed. Opened files are regular,
//!   except a block device that was itself named or allowed; nothing is opened for writing.
//! - No file occurs twice from the first one down, and there is a depth bound.
//! - A file inside a recovery session's folder is refused, whoever names it: a guest can write there.
//!
//! Not here: which format a followed file has; who reads it.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use crate::{CHAIN_LAYERS_MAX, Error, Result, Storage, storage::FileStorage};

/// Longest name an image may hold, in bytes.
pub const NAME_BYTES_MAX: usize = 4095;

/// File whose presence makes a folder a recovery session's.
const SESSION_FILE: &str = "session.json";

/// How many folders above a file are looked at for [`SESSION_FILE`]: the session's own layout is
/// flatter, and further up the name could be anybody's.
const SESSION_LEVELS: usize = 3;

/// A folder beneath which followed files may lie, or one exact file.
#[derive(Debug)]
struct Place {
    /// As the person spelled it, made absolute.
    given: PathBuf,
    /// Without symbolic links.
    real: PathBuf,
}

/// What a person allows images to name.
#[derive(Debug, Default)]
pub struct Gate {
    allowed: Vec<Arc<Place>>,
}

/// A file that passed the gate, and the way that led to it.
#[derive(Clone, Debug)]
pub struct Passage {
    storage: Arc<FileStorage>,
    /// Absolute, without symbolic links.
    path: PathBuf,
    home: Arc<Place>,
    trail: Arc<Step>,
}

/// One file of a trail; compared by device and inode, which no spelling can dodge.
#[derive(Debug)]
struct Step {
    file: (u64, u64),
    depth: usize,
    above: Option<Arc<Step>>,
}

impl Passage {
    /// The open file, read-only.
    pub fn storage(&self) -> Arc<dyn Storage> {
        self.storage.clone()
    }

    /// The open file, for what only a descriptor can do.
    pub fn file(&self) -> &FileStorage {
        &self.storage
    }

    /// Absolute path without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Files passed to get here, this one included.
    pub fn depth(&self) -> usize {
        self.trail.depth
    }
}

impl Gate {
    /// Allows images to name files in their own folder, and beneath `allowed` (folders, or exact files).
    ///
    /// # Errors
    /// [`Error::Io`] if an allowed place does not exist.
    pub fn new(allowed: &[PathBuf]) -> Result<Self> {
        let allowed = allowed.iter().map(|path| Place::new(path).map(Arc::new)).collect::<Result<_>>()?;
        Ok(Self { allowed })
    }

    /// Opens the file a person named: a regular file or a block device.
    ///
    /// # Errors
    /// [`Error::Refused`] for another kind of file or one in a session's folder; [`Error::Io`].
    pub fn enter(&self, path: &Path) -> Result<Passage> {
        let label = path.display().to_string();
        let real = path.canonicalize().map_err(|e| Error::io(&label, "open", 0, e))?;
        refuse_session(&real, &label)?;
        let folder = real.parent().unwrap_or(Path::new("/"));
        let given = std::path::absolute(path).ok().and_then(|p| p.parent().map(Path::to_path_buf));
        let home = Arc::new(Place { given: given.unwrap_or_else(|| folder.into()), real: folder.into() });
        let devices = Devices::Allowed;
        let (storage, file) = open_beneath(folder, Path::new(real.file_name().unwrap_or_default()), devices, &label)?;
        let trail = Arc::new(Step { file, depth: 1, above: None });
        Ok(Passage { storage: Arc::new(storage), path: real, home, trail })
    }

    /// Opens the file that the image `from` calls `name`. Relative names count from the folder of `from`.
    ///
    /// # Errors
    /// [`Error::Refused`] where policy forbids it, [`Error::ChainBroken`] for a name that leads
    /// nowhere, a cycle or too deep a chain; [`Error::Io`].
    pub fn follow(&self, from: &Passage, name: &OsStr) -> Result<Passage> {
        let shown = name.to_string_lossy();
        let label = from.path.display().to_string();
        let refused = |what: String| Error::Refused { path: label.clone(), what };
        check_name(name).map_err(|what| refused(format!("it names {shown:?}: {what}")))?;

        let folder = from.path.parent().unwrap_or(Path::new("/"));
        let wanted = folder.join(name);
        let places = || std::iter::once(&from.home).chain(&self.allowed);
        // Before anything outside is so much as looked at.
        let outside = || {
            let advice = "its own folder and those allowed for backing files";
            refused(format!("it names {shown:?}, which lies outside {advice}"))
        };
        let plain = without_dots(&wanted);
        if !places().any(|place| plain.starts_with(&place.given) || plain.starts_with(&place.real)) {
            return Err(outside());
        }
        let real = wanted.canonicalize().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                Error::ChainBroken { path: label.clone(), what: format!("it names {shown:?}, which does not exist") }
            }
            _ => Error::io(wanted.display().to_string(), "open", 0, e),
        })?;
        let place = places().find(|place| real.starts_with(&place.real)).ok_or_else(outside)?;
        refuse_session(&real, &label)?;
        self.open_followed(from, place, real)
    }

    fn open_followed(&self, from: &Passage, place: &Arc<Place>, real: PathBuf) -> Result<Passage> {
        let label = real.display().to_string();
        let (folder, rest, devices) = match real.strip_prefix(&place.real) {
            Ok(rest) if !rest.as_os_str().is_empty() => (place.real.as_path(), rest, Devices::Refused),
            // The place is this very file: allowed by its own name.
            _ => (Path::new("/"), real.strip_prefix("/").unwrap_or(&real), Devices::Allowed),
        };
        let (storage, file) = open_beneath(folder, rest, devices, &label)?;
        let depth = from.trail.depth + 1;
        if depth > CHAIN_LAYERS_MAX {
            let what = format!("the chain is deeper than {CHAIN_LAYERS_MAX} files");
            return Err(Error::ChainBroken { path: label, what });
        }
        let mut step = Some(&from.trail);
        while let Some(above) = step {
            if above.file == file {
                let what = format!("the chain is a cycle: {} leads back here", from.path.display());
                return Err(Error::ChainBroken { path: label, what });
            }
            step = above.above.as_ref();
        }
        let trail = Arc::new(Step { file, depth, above: Some(from.trail.clone()) });
        Ok(Passage { storage: Arc::new(storage), path: real, home: from.home.clone(), trail })
    }
}

impl Place {
    fn new(path: &Path) -> Result<Self> {
        let failed = |e| Error::io(path.display().to_string(), "open", 0, e);
        Ok(Self { given: std::path::absolute(path).map_err(failed)?, real: path.canonicalize().map_err(failed)? })
    }
}

impl Drop for Step {
    /// Unlinks the trail in a loop: a thousand nested drops would be deep for a small thread stack.
    fn drop(&mut self) {
        let mut next = self.above.take();
        while let Some(mut step) = next.and_then(Arc::into_inner) {
            next = step.above.take();
        }
    }
}

/// Why a name cannot be followed whatever it leads to.
fn check_name(name: &OsStr) -> Result<(), &'static str> {
    let bytes = name.as_bytes();
    let head = bytes.split(|b| *b == b'/').next().unwrap_or_default();
    match bytes {
        [] => Err("an empty name"),
        _ if bytes.len() > NAME_BYTES_MAX => Err("the name is too long"),
        _ if bytes.contains(&0) => Err("the name holds a zero byte"),
        // QEMU takes any word with a colon before the first slash for a protocol; so do we.
        _ if head.contains(&b':') => Err("protocol names and json: are never followed"),
        _ => Ok(()),
    }
}

/// `path` with `.` and `..` taken out by spelling alone; only for a first look, never for an open.
fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

fn refuse_session(real: &Path, label: &str) -> Result<()> {
    for folder in real.ancestors().skip(1).take(SESSION_LEVELS) {
        if folder.join(SESSION_FILE).symlink_metadata().is_ok() {
            let what = format!(
                "{} lies in a recovery session's folder, where a guest can write; use the session itself",
                real.display()
            );
            return Err(Error::Refused { path: label.into(), what });
        }
    }
    Ok(())
}

/// Whether a block device will do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Devices {
    Allowed,
    Refused,
}

/// Opens `folder`/`rest`, which must hold no symbolic link, and returns the file with its device and
/// inode. The kind is known before the real open, for opening a device or a pipe can have effects.
fn open_beneath(folder: &Path, rest: &Path, devices: Devices, label: &str) -> Result<(FileStorage, (u64, u64))> {
    let failed = |e: Errno| Error::io(label, "open", 0, e.into());
    let refused = |what: &str| Error::Refused { path: label.into(), what: what.into() };
    let dir_flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(folder, dir_flags, Mode::empty()).map_err(failed)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let open = |flags: OFlags| -> Result<(OwnedFd, rustix::fs::Stat)> {
        let fd = rustix::fs::openat2(&dir, rest, flags | OFlags::CLOEXEC, Mode::empty(), resolve).map_err(failed)?;
        let stat = rustix::fs::fstat(&fd).map_err(failed)?;
        Ok((fd, stat))
    };
    let (_, seen) = open(OFlags::PATH)?;
    match FileType::from_raw_mode(seen.st_mode) {
        FileType::RegularFile => {}
        FileType::BlockDevice if devices == Devices::Allowed => {}
        FileType::BlockDevice => return Err(refused("a block device that was not itself allowed")),
        FileType::Directory => return Err(refused("a folder, where a disk image was expected")),
        _ => return Err(refused("neither a regular file nor a block device")),
    }
    let (fd, stat) = open(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
    if (stat.st_dev, stat.st_ino) != (seen.st_dev, seen.st_ino) {
        return Err(refused("the file was exchanged while it was being opened"));
    }
    Ok((FileStorage::from_file(File::from(fd), label), (stat.st_dev, stat.st_ino)))
}

#[cfg(test)]
mod tests;
