//! A disk as a layer: the block table and the sector bitmaps.
//!
//! Invariants
//! - A broken entry spoils only its own block.
//! - Only a disk with a parent may have blocks that are stored in part.

use super::header::{Guid, Metadata, REGION_UNIT, Region};
use crate::{BlockRef, Content, Error, Layer, Result, tables::TableFile};

/// Bits of a sector bitmap, all of one block of 1 MiB.
const BITMAP_BITS: u64 = 1 << 23;
/// Entries of the block table that are read at once.
const PIECE_ENTRIES: u64 = 8192;
/// Finest granularity that is told of a disk with a parent, in bytes; Windows writes pages.
const PARTIAL_GRAIN: u64 = 4096;

/// States of a payload block.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;

/// One disk without its parent.
#[derive(Debug)]
pub struct VhdxLayer {
    file: TableFile,
    bat: Region,
    entries: u64,
    block_bytes: u64,
    sector_bytes: u64,
    /// Payload blocks between two entries for bitmaps.
    ratio: u64,
    size: u64,
    has_parent: bool,
    data_write: Guid,
}

impl VhdxLayer {
    pub(super) fn new(file: TableFile, bat: Region, metadata: &Metadata, data_write: Guid) -> Result<Self> {
        let Metadata { block_bytes, sector_bytes, size, .. } = *metadata;
        let ratio = BITMAP_BITS * sector_bytes / block_bytes;
        let blocks = size.div_ceil(block_bytes);
        let has_parent = metadata.parent.is_some();
        let entries = if has_parent { blocks.div_ceil(ratio) * (ratio + 1) } else { blocks + (blocks - 1) / ratio };
        if entries * 8 > bat.len {
            let what = format!("a block table of {} bytes, but {entries} entries are needed", bat.len);
            return Err(Error::corrupt(file.label(), bat.offset, what));
        }
        file.check_inside(bat.offset, entries * 8, "the block table")?;
        Ok(Self { file, bat, entries, block_bytes, sector_bytes, ratio, size, has_parent, data_write })
    }

    /// Entry `index` of the block table.
    fn entry(&self, index: u64) -> Result<u64> {
        let first = index - index % PIECE_ENTRIES;
        let count = PIECE_ENTRIES.min(self.entries.saturating_sub(first));
        let at = self.bat.offset + first * 8;
        let len = usize::try_from(count * 8).unwrap_or(usize::MAX);
        self.file.with_table(at, len, |bytes| {
            let place = usize::try_from((index - first) * 8).unwrap_or(usize::MAX);
            let word = bytes.get(place..).and_then(|b| b.first_chunk());
            word.map(|b| u64::from_le_bytes(*b)).ok_or_else(|| self.bad(index, "lies past the table"))
        })
    }

    fn bad(&self, index: u64, what: &str) -> Error {
        let at = self.bat.offset.saturating_add(index.saturating_mul(8));
        Error::corrupt(self.file.label(), at, format!("block table entry {index}: {what}"))
    }

    /// Where the block of an entry lies; `len` bytes of it have to be in the file.
    fn place(&self, index: u64, entry: u64, len: u64) -> Result<u64> {
        let at = (entry >> 20) * REGION_UNIT;
        if at < REGION_UNIT {
            return Err(self.bad(index, "points into the headers"));
        }
        self.file.check_inside(at, len, "a block")?;
        Ok(at)
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let block = at / self.block_bytes;
        let start = block * self.block_bytes;
        let end = end.min(start.saturating_add(self.block_bytes));
        let index = block + block / self.ratio;
        let entry = self.entry(index)?;
        if entry & 0xf_fff8 != 0 {
            return Err(self.bad(index, "reserved bits are set"));
        }
        // The block in which the disk ends need not be whole.
        let stored = self.block_bytes.min(self.size - start);
        let content = match entry & 7 {
            NOT_PRESENT => Content::Absent,
            UNDEFINED | ZERO | UNMAPPED => Content::Zero,
            FULLY_PRESENT => Content::Plain { file: 0, offset: self.place(index, entry, stored)? + (at - start) },
            PARTIALLY_PRESENT if self.has_parent => {
                let host = self.place(index, entry, stored)?;
                return self.partial(block, host, at, end);
            }
            PARTIALLY_PRESENT => return Err(self.bad(index, "a block in part, but there is no parent")),
            state => return Err(self.bad(index, &format!("state {state}"))),
        };
        Ok((content, end - at))
    }

    /// A block of which single sectors are here: bit 1 of the chunk's bitmap, the others are the parent's.
    fn partial(&self, block: u64, host: u64, at: u64, end: u64) -> Result<(Content, u64)> {
        let index = block / self.ratio * (self.ratio + 1) + self.ratio;
        let entry = self.entry(index)?;
        if entry & 7 != FULLY_PRESENT {
            return Err(self.bad(index, "a block in part without its sector bitmap"));
        }
        let bytes = self.block_bytes / self.sector_bytes / 8;
        let bitmap = self.place(index, entry, REGION_UNIT)? + block % self.ratio * bytes;
        let start = block * self.block_bytes;
        self.file.with_table(bitmap, usize::try_from(bytes).unwrap_or(usize::MAX), |bits| {
            let is_here = |at: u64| {
                let sector = (at - start) / self.sector_bytes;
                let byte = usize::try_from(sector / 8).ok().and_then(|i| bits.get(i)).copied().unwrap_or_default();
                byte >> (sector % 8) & 1 == 1
            };
            let here = is_here(at);
            let mut to = at;
            while to < end && is_here(to) == here {
                to = (to - to % self.sector_bytes + self.sector_bytes).min(end);
            }
            let content = if here { Content::Plain { file: 0, offset: host + (at - start) } } else { Content::Absent };
            Ok((content, to - at))
        })
    }
}

impl Layer for VhdxLayer {
    fn label(&self) -> &str {
        self.file.label()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        if self.has_parent { PARTIAL_GRAIN } else { self.block_bytes }
    }

    crate::runs::layer_in_pieces!(file);

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.file.fingerprint("vhdx", self.size);
        hash.update(&self.data_write);
        self.file.add_table(&mut hash, self.bat.offset, self.entries * 8)?;
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        Err(Error::corrupt(self.label(), block.offset, "a VHDX disk has no packed blocks"))
    }
}
