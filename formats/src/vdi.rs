//! VDI, read-only: VirtualBox's disks, dynamic and fixed.
//!
//! Invariants
//! - A block table entry outside the file is an error for its block, and only for that.
//! - A differencing or undo disk is refused: which file it stands on is written in the machine's
//!   settings only, and a guess would show another machine's bytes.
//!
//! Not here: writing, reading of `.vbox` files.

use std::sync::Arc;

use zerocopy::{
    FromBytes, Immutable, KnownLayout, Unaligned,
    byteorder::little_endian::{U32, U64},
};

use crate::{BlockRef, Content, Error, Layer, Result, SECTOR_BYTES, Storage, tables::TableFile};

const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x1_0001;
const FREE: u32 = u32::MAX;
const ZERO: u32 = u32::MAX - 1;
/// Entries of the block table that are read at once.
const PIECE_ENTRIES: u64 = 16_384;

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    text: [u8; 64],
    signature: U32,
    version: U32,
    header_bytes: U32,
    kind: U32,
    flags: U32,
    comment: [u8; 256],
    blocks_at: U32,
    data_at: U32,
    geometry: [U32; 3],
    sector_bytes: U32,
    reserved: U32,
    size: U64,
    block_bytes: U32,
    block_extra: U32,
    blocks: U32,
    allocated: U32,
    created: [u8; 16],
    modified: [u8; 16],
    linkage: [u8; 16],
    parent_modified: [u8; 16],
}

const _: () = assert!(size_of::<RawHeader>() == 456);

/// One disk.
#[derive(Debug)]
pub struct VdiLayer {
    file: TableFile,
    table_at: u64,
    data_at: u64,
    block_bytes: u64,
    blocks: u64,
    size: u64,
    modified: [u8; 16],
}

impl VdiLayer {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Io`]; [`Error::Unsupported`] for other versions
    /// and disks that stand on another one.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let bad = |offset: u64, what: String| Error::corrupt(file.label(), offset, what);
        let bytes = file.read(0, size_of::<RawHeader>() as u64, "the header")?;
        let raw = RawHeader::read_from_bytes(&bytes).map_err(|_| bad(0, "the header is cut".into()))?;
        if raw.signature.get() != SIGNATURE {
            return Err(bad(64, "no VDI signature".into()));
        }
        let unsupported = |what: String| Err(Error::unsupported(file.label(), what));
        match (raw.version.get(), raw.kind.get(), raw.block_extra.get()) {
            (VERSION, 1 | 2, 0) => {}
            (VERSION, 3, _) => return unsupported("an undo VDI, whose parent only its machine's settings name".into()),
            (VERSION, 4, _) => {
                return unsupported("a differencing VDI, whose parent only its machine's settings name".into());
            }
            (VERSION, 1 | 2, extra) => return unsupported(format!("VDI blocks with {extra} bytes before each")),
            (VERSION, kind, _) => return unsupported(format!("VDI type {kind}")),
            (version, ..) => return unsupported(format!("VDI version {version:#x}")),
        }
        let (block_bytes, blocks) = (u64::from(raw.block_bytes.get()), u64::from(raw.blocks.get()));
        let (table_at, data_at) = (u64::from(raw.blocks_at.get()), u64::from(raw.data_at.get()));
        let size = raw.size.get();
        if !block_bytes.is_power_of_two() || !(4096..=256 << 20).contains(&block_bytes) {
            return Err(bad(376, format!("blocks of {block_bytes} bytes")));
        }
        if size == 0 || size.div_ceil(block_bytes) > blocks {
            return Err(bad(368, format!("a disk of {size} bytes in {blocks} blocks of {block_bytes}")));
        }
        if table_at < SECTOR_BYTES || data_at < SECTOR_BYTES || !data_at.is_multiple_of(SECTOR_BYTES) {
            return Err(bad(340, format!("a block table at {table_at} and data at {data_at}")));
        }
        let blocks = size.div_ceil(block_bytes);
        file.check_inside(table_at, blocks * 4, "the block table")?;
        Ok(Self { table_at, data_at, block_bytes, blocks, size, modified: raw.modified, file })
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let (block, start) = (at / self.block_bytes, at - at % self.block_bytes);
        let end = end.min(start.saturating_add(self.block_bytes));
        let first = block - block % PIECE_ENTRIES;
        let len = usize::try_from(PIECE_ENTRIES.min(self.blocks.saturating_sub(first)) * 4).unwrap_or(usize::MAX);
        let entry = self.file.with_table(self.table_at + first * 4, len, |bytes| {
            let place = usize::try_from((block - first) * 4).unwrap_or(usize::MAX);
            let word = bytes.get(place..).and_then(|b| b.first_chunk());
            let past = || Error::corrupt(self.label(), self.table_at, format!("block {block} lies past the table"));
            word.map(|b| u32::from_le_bytes(*b)).ok_or_else(past)
        })?;
        let content = match entry {
            FREE => Content::Absent,
            ZERO => Content::Zero,
            index => {
                let host = u64::from(index) * self.block_bytes + self.data_at;
                // The block in which the disk ends need not be whole.
                self.file.check_inside(host, self.block_bytes.min(self.size - start), "a block")?;
                Content::Plain { file: 0, offset: host + (at - start) }
            }
        };
        Ok((content, end - at))
    }
}

impl Layer for VdiLayer {
    fn label(&self) -> &str {
        self.file.label()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        self.block_bytes
    }

    crate::runs::layer_in_pieces!(file);

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.file.fingerprint("vdi", self.size);
        hash.update(&self.modified);
        self.file.add_table(&mut hash, self.table_at, self.blocks * 4)?;
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        Err(Error::corrupt(self.label(), block.offset, "a VDI has no packed blocks"))
    }
}

#[cfg(test)]
mod tests;
