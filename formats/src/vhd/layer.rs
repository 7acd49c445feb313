//! A disk as a layer: the block table, and a bitmap of sectors before each block.
//!
//! Invariants
//! - A broken entry spoils only its own block.
//! - A sector whose bit is clear is the parent's in a differencing disk, and zeros in a dynamic one.

use super::footer::{Dynamic, Footer, Kind};
use crate::{BlockRef, Content, Error, Layer, Result, SECTOR_BYTES, raw::RawLayer, tables::TableFile};

const UNUSED: u32 = u32::MAX;
/// Entries of the block table that are read at once.
const PIECE_ENTRIES: u64 = 16_384;
/// Finest granularity that is told of a disk with bitmaps, in bytes.
const GRAIN_BYTES: u64 = 4096;

/// Where the bytes are.
#[derive(Debug)]
enum Body {
    Fixed(RawLayer),
    Blocks { table_at: u64, entries: u64, block_bytes: u64, clear: Content },
}

/// One disk without its parent.
#[derive(Debug)]
pub struct VhdLayer {
    file: TableFile,
    size: u64,
    id: [u8; 16],
    body: Body,
}

impl VhdLayer {
    pub(super) fn new(file: TableFile, footer: &Footer, dynamic: Option<&Dynamic>) -> Result<Self> {
        let body = match dynamic {
            None => {
                file.check_inside(0, footer.size, "a fixed disk")?;
                Body::Fixed(RawLayer::open(file.storage.clone())?)
            }
            Some(Dynamic { table_at, entries, block_bytes, .. }) => Body::Blocks {
                table_at: *table_at,
                entries: *entries,
                block_bytes: *block_bytes,
                clear: if footer.kind == Kind::Differencing { Content::Absent } else { Content::Zero },
            },
        };
        Ok(Self { file, size: footer.size, id: footer.id, body })
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let (table_at, entries, block_bytes, clear) = match &self.body {
            Body::Fixed(raw) => return raw.lookup(at, end - at),
            Body::Blocks { table_at, entries, block_bytes, clear } => (*table_at, *entries, *block_bytes, *clear),
        };
        let (block, start) = (at / block_bytes, at - at % block_bytes);
        let end = end.min(start.saturating_add(block_bytes));
        let first = block - block % PIECE_ENTRIES;
        let len = usize::try_from(PIECE_ENTRIES.min(entries.saturating_sub(first)) * 4).unwrap_or(usize::MAX);
        let place = table_at + block * 4;
        let bad = |what: &str| Error::corrupt(self.label(), place, format!("block table entry {block}: {what}"));
        let entry = self.file.with_table(table_at + first * 4, len, |bytes| {
            let at = usize::try_from((block - first) * 4).unwrap_or(usize::MAX);
            let word = bytes.get(at..).and_then(|b| b.first_chunk());
            word.map(|b| u32::from_be_bytes(*b)).ok_or_else(|| bad("lies past the table"))
        })?;
        if entry == UNUSED {
            return Ok((Content::Absent, end - at));
        }
        if entry == 0 {
            return Err(bad("points at the start of the file"));
        }
        let sectors = block_bytes / SECTOR_BYTES;
        let bitmap_bytes = (sectors / 8).next_multiple_of(SECTOR_BYTES);
        let bitmap = u64::from(entry) * SECTOR_BYTES;
        // The block in which the disk ends need not be whole.
        self.file.check_inside(bitmap, bitmap_bytes + block_bytes.min(self.size - start), "a block")?;
        self.file.with_table(bitmap, usize::try_from(bitmap_bytes).unwrap_or(usize::MAX), |bits| {
            let is_here = |at: u64| {
                let sector = (at - start) / SECTOR_BYTES;
                let byte = usize::try_from(sector / 8).ok().and_then(|i| bits.get(i)).copied().unwrap_or_default();
                byte & (0x80 >> (sector % 8)) != 0
            };
            let here = is_here(at);
            let mut to = at;
            while to < end && is_here(to) == here {
                to = (to - to % SECTOR_BYTES + SECTOR_BYTES).min(end);
            }
            let plain = Content::Plain { file: 0, offset: bitmap + bitmap_bytes + (at - start) };
            Ok((if here { plain } else { clear }, to - at))
        })
    }
}

impl Layer for VhdLayer {
    fn label(&self) -> &str {
        self.file.label()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        GRAIN_BYTES
    }

    crate::runs::layer_in_pieces!(file);

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.file.fingerprint("vhd", self.size);
        hash.update(&self.id);
        match &self.body {
            Body::Fixed(raw) => _ = hash.update(&raw.fingerprint()?),
            Body::Blocks { table_at, entries, .. } => self.file.add_table(&mut hash, *table_at, entries * 4)?,
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        Err(Error::corrupt(self.label(), block.offset, "a VHD has no packed blocks"))
    }
}
