//! A chain as bytes at rest: for disks that are images inside a backup, read through whatever the backup stores.
//!
//! Invariants
//! - Read-only. A read gives the chain's bytes or its error, which keeps its kind through [`std::io::Error`].
//!
//! Not here: what the bytes mean.

use std::io;

use aquifer_formats::{Error as FormatError, Storage};

use crate::{Chain, Error, Result};

/// A chain under a name of its own.
#[derive(Debug)]
pub struct ChainStorage {
    chain: Chain,
    label: String,
    identity: u64,
}

impl ChainStorage {
    /// Takes over `chain`.
    ///
    /// # Errors
    /// A layer that cannot tell what identifies it.
    pub fn new(chain: Chain, label: String) -> Result<Self> {
        let identity = chain.fingerprint()?.first_chunk().copied().map_or(0, u64::from_le_bytes);
        Ok(Self { chain, label, identity })
    }
}

fn as_io(error: Error) -> io::Error {
    match error {
        Error::Format(error) => io::Error::other(error),
        Error::OutOfRange { .. } => io::ErrorKind::UnexpectedEof.into(),
        other => io::Error::other(FormatError::io("image inside a backup", "read", 0, io::Error::other(other))),
    }
}

impl Storage for ChainStorage {
    fn label(&self) -> &str {
        &self.label
    }

    fn identity(&self) -> Option<u64> {
        Some(self.identity)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.chain.size())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.chain.read(offset, buf).map_err(as_io)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.chain.read_now(offset, buf).map_err(as_io)
    }

    fn allocated(&self, _offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        Ok((true, len_max))
    }

    aquifer_formats::storage_is_read_only!();
}
