//! A folder of stored objects: files that are opened by names which were made of what was read.
//!
//! Invariants
//! - A name leads beneath the folder, through no link, to a regular file; the kernel checks it at the open.
//! - An object that is not there is told apart from one that cannot be read, and never taken for zeros.
//!
//! Not here: what the names are made of, what an object holds.

use std::{fs::File, os::fd::OwnedFd, path::Path};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use crate::{Error, Result, Storage, codec, storage::FileStorage};

/// Largest volume that is served from a store, in bytes: what VHDX, the largest of the image formats, allows.
pub(crate) const VOLUME_BYTES_MAX: u64 = 64 << 40;

/// An open folder.
#[derive(Debug)]
pub(crate) struct Folder {
    fd: OwnedFd,
    path: String,
}

impl Folder {
    /// Opens the folder at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let label = path.display().to_string();
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Error::io(&label, "open", 0, e.into()))?;
        Ok(Self { fd, path: label })
    }

    /// Its path.
    pub(crate) fn label(&self) -> &str {
        &self.path
    }

    /// The object `name`; `None` where there is none.
    pub(crate) fn find(&self, name: impl AsRef<Path>) -> Result<Option<FileStorage>> {
        let name = name.as_ref();
        let label = format!("{}/{}", self.path, name.display());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let fd = match rustix::fs::openat2(&self.fd, name, flags, Mode::empty(), resolve) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(e) => return Err(Error::io(label, "open", 0, e.into())),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| Error::io(&label, "stat", 0, e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::Refused { path: label, what: "no regular file".into() });
        }
        Ok(Some(FileStorage::from_file(File::from(fd), label)))
    }

    /// The object `name`, which `owner` cannot do without.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] where it is missing.
    pub(crate) fn object(&self, name: impl AsRef<Path>, owner: &str) -> Result<FileStorage> {
        let name = name.as_ref();
        let missing = || Error::ChainBroken {
            path: format!("{}/{}", self.path, name.display()),
            what: format!("this part of {owner} is missing"),
        };
        self.find(name)?.ok_or_else(missing)
    }
}

/// The file at `path`, which a list of its folder named.
///
/// # Errors
/// As [`Folder::object`]: one that is no regular file or a link is refused, and nobody waits for it.
pub(crate) fn listed(path: &Path) -> Result<FileStorage> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    Folder::open(folder)?.object(path.file_name().unwrap_or_default(), &folder.display().to_string())
}

/// Hands all bytes of `object`, at most `bytes_max`, to `work`.
///
/// # Errors
/// [`Error::BadBlock`] for one that is longer; I/O.
pub(crate) fn whole<R>(object: &FileStorage, bytes_max: u64, work: impl FnOnce(&[u8]) -> Result<R>) -> Result<R> {
    let len = object.len().map_err(|e| Error::io(object.label(), "stat", 0, e))?;
    if len > bytes_max {
        return Err(damaged(object, len, format!("{len} bytes, where at most {bytes_max} belong")));
    }
    codec::with_stored(object, 0, usize::try_from(len).unwrap_or(usize::MAX), work)
}

/// What is wrong with an object of `len` bytes.
pub(crate) fn damaged(object: &FileStorage, len: u64, what: impl Into<String>) -> Error {
    Error::BadBlock { path: object.label().into(), offset: 0, len, what: what.into() }
}

/// Lower-case hexadecimal digits of `bytes`.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes that an even number of hexadecimal digits stand for.
pub(crate) fn from_hexadecimal<const N: usize>(text: &str) -> Option<[u8; N]> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut bytes = [0; N];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests;
