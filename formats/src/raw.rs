//! A raw image: the identity layer. Holes of a sparse file are reported as `Zero`.
//!
//! Never probed: any bytes are a valid raw image, so `raw` is only what somebody named.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::{BlockRef, Content, Error, FileSlot, Layer, Result, Storage, scan_by_lookup};

/// Gives out identities for [`Layer::file_id`].
pub fn next_file_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What a hole is told in, in bytes.
const GRAIN_BYTES: u64 = 4096;

/// Identity of a file for [`Layer::file_id`]: that of its state where the storage can tell, else one of its own.
pub fn file_id(storage: &dyn Storage) -> u64 {
    storage.identity().unwrap_or_else(next_file_id)
}

/// A file taken byte for byte.
#[derive(Debug)]
pub struct RawLayer {
    storage: Arc<dyn Storage>,
    size: u64,
    id: u64,
}

impl RawLayer {
    /// Takes the storage's present length as the disk's size.
    ///
    /// # Errors
    /// [`Error::Io`] if the length cannot be read.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let size = storage.len().map_err(|e| Error::io(storage.label(), "stat", 0, e))?;
        let id = file_id(&*storage);
        Ok(Self { storage, size, id })
    }
}

impl Layer for RawLayer {
    fn label(&self) -> &str {
        self.storage.label()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        GRAIN_BYTES
    }

    fn lookup(&self, offset: u64, len_max: u64) -> Result<(Content, u64)> {
        let left = self.size.checked_sub(offset).filter(|left| *left > 0 && len_max > 0);
        let left =
            left.ok_or_else(|| Error::OutOfRange { path: self.label().into(), offset, len: len_max, size: self.size })?;
        let end = offset + left.min(len_max);
        // File systems may map in smaller units than the grain. A grain that holds any byte is stored.
        let start = offset - offset % GRAIN_BYTES;
        let asked = end.next_multiple_of(GRAIN_BYTES).min(self.size);
        let (stored, len) =
            self.storage.allocated(start, asked - start).map_err(|e| Error::io(self.label(), "map", offset, e))?;
        let border = start + len;
        let hole_end = if border == asked { asked } else { border - border % GRAIN_BYTES };
        let (content, until) = match stored {
            false if hole_end > offset => (Content::Zero, hole_end),
            _ => (Content::Plain { file: 0, offset }, border.next_multiple_of(GRAIN_BYTES)),
        };
        Ok((content, until.min(end) - offset))
    }

    fn scan(&self, offset: u64, len: u64, each: &mut dyn FnMut(u64, u64, Content)) -> Result<()> {
        scan_by_lookup(self, offset, len, each)
    }

    fn file(&self, slot: FileSlot) -> Result<&Arc<dyn Storage>> {
        if slot == 0 {
            Ok(&self.storage)
        } else {
            Err(Error::corrupt(self.label(), 0, format!("raw image has no file {slot}")))
        }
    }

    fn file_id(&self, _slot: FileSlot) -> u64 {
        self.id
    }

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = blake3::Hasher::new();
        hash.update(b"raw").update(&self.size.to_le_bytes());
        let mut page = [0u8; 4096];
        let samples = 64;
        for i in 0..samples {
            let offset = self.size / samples * i;
            let len = usize::try_from(self.size - offset).unwrap_or(usize::MAX).min(page.len());
            let part = page.get_mut(..len).unwrap_or_default();
            self.storage.read_at(offset, part).map_err(|e| Error::io(self.label(), "read", offset, e))?;
            hash.update(part);
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, _out: &mut Vec<u8>) -> Result<()> {
        Err(Error::corrupt(self.label(), block.offset, "a raw image has no packed blocks"))
    }
}

#[cfg(test)]
mod tests;
