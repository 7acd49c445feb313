//! Bytes in memory as [`Storage`], for tests and small generated files. `sync` is a no-op.

use std::io;

use parking_lot::RwLock;

use super::Storage;

/// A growable byte buffer.
#[derive(Debug)]
pub struct MemoryStorage {
    bytes: RwLock<Vec<u8>>,
    label: String,
}

impl MemoryStorage {
    /// Takes over `bytes`.
    pub fn new(label: impl Into<String>, bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes), label: label.into() }
    }

    /// A copy of the present contents.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.read().clone()
    }
}

fn place(offset: u64, len: usize) -> io::Result<(usize, usize)> {
    let start = usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let end = start.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
    Ok((start, end))
}

impl Storage for MemoryStorage {
    fn label(&self) -> &str {
        &self.label
    }

    fn identity(&self) -> Option<u64> {
        None
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.read().len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (start, end) = place(offset, buf.len())?;
        let bytes = self.bytes.read();
        buf.copy_from_slice(bytes.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buf).map(|()| true)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let (start, end) = place(offset, buf.len())?;
        let mut bytes = self.bytes.write();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes.get_mut(start..end).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(buf);
        Ok(())
    }

    fn allocated(&self, _offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        Ok((true, len_max))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = self.bytes.write();
        let size = bytes.len();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(size);
        let end = usize::try_from(offset.saturating_add(len)).unwrap_or(usize::MAX).min(size);
        if let Some(range) = bytes.get_mut(start..end) {
            range.fill(0);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.bytes.write().resize(len, 0);
        Ok(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let need = usize::try_from(offset.saturating_add(len)).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut bytes = self.bytes.write();
        if bytes.len() < need {
            bytes.resize(need, 0);
        }
        Ok(())
    }

    fn start_writeback(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn forget_cached(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
