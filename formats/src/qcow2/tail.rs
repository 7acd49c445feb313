//! A file whose last cluster is short, read as if zeros filled it up.
//!
//! QEMU does not write the unused end of the last cluster; by the format it reads as zeros. Only the
//! reads change: nothing can be written here.

use std::{io, sync::Arc};

use crate::Storage;

/// `inner`, which ends at `len`, with zeros from there to `padded_len`.
#[derive(Debug)]
pub(super) struct ZeroTail {
    inner: Arc<dyn Storage>,
    len: u64,
    padded_len: u64,
}

impl ZeroTail {
    /// Fills `inner` of `len` bytes up to whole clusters; as it is where it ends with one.
    pub(super) fn fill_up(inner: Arc<dyn Storage>, len: u64, cluster_bytes: u64) -> Arc<dyn Storage> {
        match len.checked_next_multiple_of(cluster_bytes) {
            Some(padded_len) if padded_len > len => Arc::new(Self { inner, len, padded_len }),
            _ => inner,
        }
    }

    /// Splits `buf` into what is stored and what is zeros, and zeroes the latter.
    fn stored<'a>(&self, offset: u64, buf: &'a mut [u8]) -> io::Result<&'a mut [u8]> {
        let end = offset.checked_add(buf.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        if end > self.padded_len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let stored = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let (stored, zeros) = buf.split_at_mut(stored);
        zeros.fill(0);
        Ok(stored)
    }
}

impl Storage for ZeroTail {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn identity(&self) -> Option<u64> {
        self.inner.identity()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.padded_len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self.stored(offset, buf)? {
            [] => Ok(()),
            stored => self.inner.read_at(offset, stored),
        }
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        match self.stored(offset, buf)? {
            [] => Ok(true),
            stored => self.inner.read_now(offset, stored),
        }
    }

    fn write_at(&self, _offset: u64, _buf: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        match self.len.saturating_sub(offset) {
            0 => Ok((false, len_max)),
            left => self.inner.allocated(offset, len_max.min(left)),
        }
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn start_writeback(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
