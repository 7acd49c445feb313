//! A file of the operating system as [`Storage`].
//!
//! Not here: folder durability (`rename`, create-only put), which belongs to whoever owns the folder.

use std::{
    fs::{File, Metadata, OpenOptions},
    io,
    num::NonZeroU64,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustix::{
    fs::{Advice, FallocateFlags, fallocate},
    io::ReadWriteFlags,
};

use super::Storage;
use crate::{Error, Result};

/// How a file is opened. There is no "maybe": sources are `ReadOnly` at the level of the operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Existing file, no writes.
    ReadOnly,
    /// Existing file, reads and writes.
    ReadWrite,
    /// New file; fails if the name exists.
    CreateNew,
}

/// A regular file or block device, read and written by `pread`/`pwrite`.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    label: String,
}

impl FileStorage {
    /// Opens `path`.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_CLOEXEC);
        match access {
            Access::ReadOnly => {}
            Access::ReadWrite => {
                options.write(true);
            }
            Access::CreateNew => {
                options.write(true).create_new(true).mode(0o600);
            }
        }
        let label = path.display().to_string();
        let file = options.open(path).map_err(|e| Error::io(&label, "open", 0, e))?;
        Ok(Self { file, label })
    }

    /// Wraps an open file.
    pub fn from_file(file: File, label: impl Into<String>) -> Self {
        Self { file, label: label.into() }
    }

    /// The open file, for what only a descriptor can do (locks, passthrough, `SEEK_HOLE`).
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Storage for FileStorage {
    fn label(&self) -> &str {
        &self.label
    }

    /// Device, inode, length and times of a regular file. A block device can change without telling.
    fn identity(&self) -> Option<u64> {
        let meta = self.file.metadata().ok().filter(Metadata::is_file)?;
        let times = [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()];
        let mut hash = blake3::Hasher::new_derive_key("aquifer 2026 file state");
        for number in [meta.dev(), meta.ino(), meta.len()] {
            hash.update(&number.to_le_bytes());
        }
        for number in times {
            hash.update(&number.to_le_bytes());
        }
        let mut identity = [0; 8];
        hash.finalize_xof().fill(&mut identity);
        Some(u64::from_le_bytes(identity))
    }

    fn len(&self) -> io::Result<u64> {
        let meta = self.file.metadata()?;
        if meta.is_file() {
            return Ok(meta.len());
        }
        // Block devices report 0 in stat; their size is where a seek to the end lands.
        rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0)).map_err(io::Error::from)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let wanted = buf.len();
        let mut parts = [io::IoSliceMut::new(buf)];
        match rustix::io::preadv2(&self.file, &mut parts, offset, ReadWriteFlags::NOWAIT) {
            Ok(got) => Ok(got == wanted),
            // Not in the page cache, or a file system that cannot say so: somebody who may wait asks again.
            Err(_) => Ok(false),
        }
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        use rustix::{fs::SeekFrom, io::Errno};
        // The file position moves, but nothing here ever reads or writes by position.
        let until = |to: u64| to.saturating_sub(offset).clamp(1, len_max);
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok((false, until(data))),
            Ok(_) => match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) => Ok((true, until(hole))),
                Err(_) => Ok((true, len_max)),
            },
            Err(Errno::NXIO) if offset < self.len()? => Ok((false, len_max)),
            Err(_) => Ok((true, len_max)),
        }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len).min(self.len()?);
        if end <= offset {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, end - offset) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(&self.file, offset, end),
            Err(e) => Err(e.into()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match fallocate(&self.file, FallocateFlags::empty(), offset, len) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn start_writeback(&self, offset: u64, len: u64) -> io::Result<()> {
        start_writeback(&self.file, offset, len)
    }

    fn forget_cached(&self, offset: u64, len: u64) -> io::Result<()> {
        let Some(len) = NonZeroU64::new(len) else { return Ok(()) };
        // Bytes that are not on the disk yet stay where they are.
        rustix::fs::fadvise(&self.file, offset, Some(len), Advice::DontNeed).map_err(io::Error::from)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn write_zeros(file: &File, mut offset: u64, end: u64) -> io::Result<()> {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    while offset < end {
        let len = usize::try_from(end - offset).unwrap_or(usize::MAX).min(ZEROS.len());
        file.write_all_at(ZEROS.get(..len).unwrap_or(&ZEROS), offset)?;
        offset += len as u64;
    }
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "sync_file_range has no safe wrapper; it takes a descriptor and two integers, no memory"
)]
fn start_writeback(file: &File, offset: u64, len: u64) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return Ok(()) };
    // SAFETY: the descriptor is open for as long as `file` is borrowed; the call reads no memory of ours.
    let code = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
