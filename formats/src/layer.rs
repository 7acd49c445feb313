//! What one layer (one restore point's own contribution to one disk) says about a range.
//!
//! Mapping and reading are two calls: [`Layer::lookup`] tells *where* a range lies and reads no data;
//! one generic reader (`aquifer_vdisk::Chain`) moves bytes, and the same map answers NBD block
//! status, sparse copies and deltas.
//!
//! Invariants
//! - `Absent` (ask the layer below) and `Zero` (zeros, hiding what is below) never merge.
//! - A range the layer should have but cannot deliver (torn, bad, missing) is an error, never zeros.
//! - A lookup past [`Layer::size`] is the caller's mistake; the chain cuts first. A layer that is
//!   shorter than the one above reads as zero past its end *and stops the walk*.

use std::{fmt::Debug, sync::Arc};

use crate::{Result, Storage};

/// Number of a file inside one layer (0 = the layer's own file). A layer may draw from several:
/// an external data file, or the files of older restore points.
pub type FileSlot = u16;

/// How a stored block is encoded. The numbers are those of the native format (`docs/formats/aql.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// Verbatim bytes, still under a checksum.
    Raw = 0,
    /// One LZ4 block.
    Lz4 = 1,
    /// One zstd frame (RFC 8878).
    Zstd = 2,
    /// Raw deflate (RFC 1951), as qcow2 writes it.
    Deflate = 3,
}

/// Names one encoded block inside a layer; all that [`Layer::unpack`] needs, so unpacking takes no
/// second lookup and no lock. `(layer identity, file, offset)` is the cache key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRef {
    /// Byte offset of the stored block in its file.
    pub offset: u64,
    /// Index of the block in the disk it was written for, in units of `raw_len`.
    pub logical: u64,
    /// Stored length in bytes.
    pub stored_len: u32,
    /// Decoded length in bytes.
    pub raw_len: u32,
    /// Checksum held by the pointer; 0 where the format has none.
    pub check: u32,
    /// Which file of the layer holds it.
    pub file: FileSlot,
    /// How it is encoded.
    pub codec: Codec,
}

/// What a layer says about a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: ask the layer below; with none below, zeros.
    Absent,
    /// Zeros, hiding whatever is below.
    Zero,
    /// Verbatim bytes of a file, unchecked by the format: a reader, a reflink or `sendfile` may use them.
    Plain {
        /// Which file of the layer.
        file: FileSlot,
        /// Byte offset in that file of the first byte of the range.
        offset: u64,
    },
    /// Part of an encoded block: unpack, cache, copy from `skip`.
    Packed {
        /// The block.
        block: BlockRef,
        /// Where the range begins inside the decoded block, in bytes.
        skip: u32,
    },
}

/// One layer of one disk. Immutable once opened.
pub trait Layer: Debug + Send + Sync {
    /// Name for messages: the path of its main file.
    fn label(&self) -> &str;

    /// Virtual size in bytes. Sizes differ between the layers of a chain.
    fn size(&self) -> u64;

    /// Granularity of the map in bytes, a power of two of at least 512: the answer of `lookup` is
    /// uniform over each aligned range of this length (except at the end of the disk), or nearly always:
    /// formats that map sectors say 4096 where their writers seldom go below it. Whoever merges maps
    /// must not rely on it, only be quick by it.
    fn grain(&self) -> u64;

    /// What this layer says at `offset`, and for how many bytes that holds, in `1..=len_max`.
    /// Consecutive `Plain` grains that lie one after the other in one file, and runs of `Zero` or
    /// `Absent`, are answered as one. A `Packed` answer never reaches past its block.
    /// `offset < size`, `len_max >= 1`; the answer is cut at the end of the disk. Reads no data,
    /// though it may have to read metadata.
    fn lookup(&self, offset: u64, len_max: u64) -> Result<(Content, u64)>;

    /// Tells `each` every run of `offset..offset + len` that is not `Absent`, in order, as
    /// `(offset, len, content)`: the answers of `lookup`, in bulk. Merged maps and deltas are built
    /// by it, so tables read on the way need not be kept. The range is cut at the end of the disk.
    /// After an error, what was told before it still holds.
    fn scan(&self, offset: u64, len: u64, each: &mut dyn FnMut(u64, u64, Content)) -> Result<()>;

    /// The file behind a slot, for `Plain` content. Panics never: an unknown slot is an error.
    fn file(&self, slot: FileSlot) -> Result<&Arc<dyn Storage>>;

    /// Process-wide identity of the file behind a slot: equal for equal immutable bytes, so that
    /// several exports of one chain share decoded blocks.
    fn file_id(&self, slot: FileSlot) -> u64;

    /// Digest over what identifies these bytes (a seal, a header with its tables, samples of a raw
    /// image): a session remembers it and refuses to go on over another chain.
    fn fingerprint(&self) -> Result<[u8; 32]>;

    /// Decodes and verifies a block into `out` (cleared first). At least the first `need` bytes are
    /// delivered (`need <= raw_len`); a codec that cannot stop early delivers all. The stored bytes are checked
    /// whole, however little is decoded.
    fn unpack(&self, block: &BlockRef, need: usize, out: &mut Vec<u8>) -> Result<()>;
}

/// [`Layer::scan`] by way of [`Layer::lookup`], for layers that have no quicker way.
///
/// # Errors
/// The first one that a lookup reports.
pub fn scan_by_lookup<L: Layer + ?Sized>(
    layer: &L,
    offset: u64,
    len: u64,
    each: &mut dyn FnMut(u64, u64, Content),
) -> Result<()> {
    let end = offset.saturating_add(len).min(layer.size());
    let mut at = offset;
    while at < end {
        let (content, n) = layer.lookup(at, end - at)?;
        if content != Content::Absent {
            each(at, n, content);
        }
        // A lookup that answers for nothing would never end.
        at = at.saturating_add(n.max(1));
    }
    Ok(())
}
