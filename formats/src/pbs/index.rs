//! A fixed index: the digest of every chunk of a disk.
//!
//! Invariants
//! - The file is exactly as long as its header says, and its own digest holds.
//! - The size of a chunk is a power of two that a block of ours can have.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::{Error, Result, Storage, codec::BLOCK_BYTES_MAX, tables::TableFile};

/// SHA-256 of a chunk's content.
pub(super) type Digest = [u8; 32];

const MAGIC: [u8; 8] = [0x2f, 0x7f, 0x41, 0xed, 0x91, 0xfd, 0x0f, 0xcd];

/// Bytes of the header; digests follow.
pub(super) const HEAD_BYTES: u64 = 4096;

const CHUNK_BYTES_MIN: u64 = 4096;

/// Largest disk: 2 GiB of digests at the usual chunk size are not an index but an attack.
const CHUNKS_MAX: u64 = 1 << 24;

/// An index, whole in memory.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) file: TableFile,
    pub(super) size: u64,
    pub(super) chunk_bytes: u64,
    pub(super) digests: Vec<Digest>,
    /// SHA-256 over the digests, as the header has it.
    pub(super) sum: Digest,
}

impl Index {
    /// Reads an index and checks it.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`], [`Error::Io`].
    pub(super) fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let head = file.read(0, HEAD_BYTES, "the header")?;
        let bad = |offset: u64, what: String| Error::corrupt(file.label(), offset, what);
        let word = |at: usize| head.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b));
        if !head.starts_with(&MAGIC) {
            return Err(bad(0, "no magic number of a fixed index".into()));
        }
        let (size, chunk_bytes) = (word(64), word(72));
        if !chunk_bytes.is_power_of_two() || chunk_bytes < CHUNK_BYTES_MIN {
            return Err(bad(72, format!("chunks of {chunk_bytes} bytes")));
        }
        if chunk_bytes > BLOCK_BYTES_MAX as u64 {
            return Err(Error::unsupported(file.label(), format!("chunks of {chunk_bytes} bytes")));
        }
        let count = size.div_ceil(chunk_bytes);
        if size == 0 || count > CHUNKS_MAX {
            return Err(bad(64, format!("a disk of {size} bytes")));
        }
        if file.len != HEAD_BYTES + 32 * count {
            let what = format!("{count} chunks need {} bytes, the file has {}", HEAD_BYTES + 32 * count, file.len);
            return Err(bad(64, what));
        }
        let table = file.read(HEAD_BYTES, 32 * count, "the digests")?;
        let sum: Digest = Sha256::digest(&table).into();
        if head.get(32..64) != Some(&sum[..]) {
            return Err(bad(32, "the digest of the index is wrong".into()));
        }
        let digests = table.as_chunks::<32>().0.to_vec();
        Ok(Self { file, size, chunk_bytes, digests, sum })
    }
}
