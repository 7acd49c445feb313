//! What every door and every job reads and writes: a chain, and perhaps a writable overlay on it.
//!
//! Invariants
//! - All methods take `&self` and may be called from any number of threads.
//! - Exactly one source is read per block: overlay or chain.
//! - `flush` covers everything acknowledged before it on any connection (NBD multi-conn).
//!
//! Not here: wire formats, queues, threads.

use std::sync::Arc;

use crate::{Chain, Error, Extent, Result};

/// One virtual disk.
#[derive(Debug)]
pub struct Disk {
    name: String,
    chain: Arc<Chain>,
}

/// What a zeroing request allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Space may be given back.
    MayTrim,
    /// Space must stay reserved (`NBD_CMD_FLAG_NO_HOLE`).
    KeepSpace,
}

impl Disk {
    /// A read-only disk.
    pub fn read_only(name: impl Into<String>, chain: Arc<Chain>) -> Self {
        Self { name: name.into(), chain }
    }

    /// Name, as exports and messages give it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.chain.size()
    }

    /// Whether writes are possible.
    pub fn is_writable(&self) -> bool {
        false
    }

    /// Fills `buf` from `offset`; may decode, and may wait for a slow source.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.chain.read(offset, buf)
    }

    /// As [`Disk::read`], but only if that needs no decode and no slow source (cached, zero or local
    /// ranges). `Ok(false)` leaves `buf` in any state: hand the read to a thread that may wait.
    pub fn read_now(&self, _offset: u64, _buf: &mut [u8]) -> Result<bool> {
        Ok(false)
    }

    /// Writes `bytes` at `offset`. Durable after the next [`Disk::flush`].
    pub fn write(&self, _offset: u64, _bytes: &[u8]) -> Result<()> {
        Err(self.refuse_write())
    }

    /// Makes a range read as zeros.
    pub fn write_zeroes(&self, _offset: u64, _len: u64, _zeroing: Zeroing) -> Result<()> {
        Err(self.refuse_write())
    }

    /// Gives a range back; it reads as zeros afterwards.
    pub fn trim(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(self.refuse_write())
    }

    /// Makes everything acknowledged so far durable. A read-only disk has nothing to do.
    pub fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Reads a range into the cache, so that later reads are quick. A hint: errors are dropped.
    pub fn prefetch(&self, _offset: u64, _len: u64) {}

    /// What a range holds, appended to `out` in order and merged. Reads no data.
    pub fn extents(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        self.chain.extents(offset, len, out)
    }

    fn refuse_write(&self) -> Error {
        Error::ReadOnly { disk: self.name.clone() }
    }
}
