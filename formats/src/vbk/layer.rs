//! One disk of a file as a layer: its list of blocks over the block store.
//!
//! Invariants
//! - A block of the list and its entry in the store say the same MD5 and length, or the block is damaged.
//! - A whole disk says something of each of its blocks; of an increment, only the blocks it lists.
//! - Memory is bounded by the lists: 24 bytes for 1088 blocks of a whole disk and the places of their pages,
//!   16 bytes for each block of an increment.

use std::sync::{Arc, OnceLock};

use super::{
    Shared,
    directory::{Blocks, Item, Kind},
    pages::{NONE, Pages, Vector},
    slot::{u32_at, u64_at},
    store::{Digest, Stored},
};
use crate::{BlockRef, Content, Error, Layer, Result, codec::BLOCK_BYTES_MAX, tables::duplicates};

/// Blocks in one table of a whole disk.
const TABLE_BLOCKS: u64 = 0x440;
/// Bytes of a description of a table, of a block, of a changed block.
const TABLE_BYTES: usize = 24;
const BLOCK_BYTES: usize = 46;
const CHANGED_BYTES: usize = 53;
/// Most tables of a whole disk: 68 TiB in blocks of 1 MiB.
const TABLES_MAX: u64 = 1 << 16;
/// Most blocks of an increment: 64 TiB in blocks of 1 MiB.
const CHANGED_MAX: u64 = 1 << 26;

/// One disk.
#[derive(Debug)]
pub struct VbkLayer {
    shared: Arc<Shared>,
    label: String,
    /// Where its entry in the folder lies.
    entry_at: u64,
    size: u64,
    block_bytes: u64,
    list: List,
}

#[derive(Debug)]
enum List {
    /// Tables of [`TABLE_BLOCKS`] each.
    Whole(Vec<Table>),
    /// By index of the block, with its place in the vector.
    Changed { vector: Vector, order: Vec<(u64, u64)> },
}

#[derive(Debug)]
struct Table {
    /// [`NONE`] for nothing but zeros.
    root: u64,
    count: u64,
    /// Found when it is first needed.
    vector: OnceLock<Vector>,
}

/// What a list says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listed {
    Zero,
    Stored { len: u32, digest: Digest, id: u64 },
}

impl VbkLayer {
    pub(super) fn open(shared: &Arc<Shared>, item: &Item, label: String) -> Result<Self> {
        let pages = &shared.pages;
        let (blocks, changed) = match item.kind {
            Kind::Whole(blocks) => (blocks, false),
            Kind::Changed(blocks) => (blocks, true),
            Kind::Other(kind) => return Err(unread(&label, kind)),
            Kind::Folder { .. } => return Err(Error::ChainBroken { path: label, what: "it is a folder".into() }),
        };
        if blocks.unfinished {
            let what = "the backup that wrote it never ended".into();
            return Err(Error::ChainBroken { path: label, what });
        }
        let bad = |what: String| Error::corrupt(&label, item.at, what);
        if blocks.len == 0 {
            return Err(bad("a disk of no bytes".into()));
        }
        let (list, block_bytes) = match changed {
            true => (changed_blocks(pages, &blocks)?, u64::from(pages.header.block_bytes)),
            false => whole(pages, &blocks).map_err(|e| e.unwrap_or_else(bad))?,
        };
        if block_bytes > BLOCK_BYTES_MAX as u64 {
            return Err(Error::unsupported(label, format!("blocks of {block_bytes} bytes")));
        }
        let layer = Self { shared: shared.clone(), label, entry_at: item.at, size: blocks.len, block_bytes, list };
        layer.check_order()?;
        shared.store()?;
        Ok(layer)
    }

    /// Changed blocks are listed once each, inside the disk.
    fn check_order(&self) -> Result<()> {
        let List::Changed { order, .. } = &self.list else { return Ok(()) };
        let bad = |what: String| Error::corrupt(&self.label, 0, what);
        if let Some(pair) = order.windows(2).find(|pair| matches!(pair, [a, b] if a.0 == b.0)) {
            return Err(bad(format!("block {} is in the increment twice", pair.first().map_or(0, |first| first.0))));
        }
        match order.last() {
            Some((last, _)) if *last >= self.size.div_ceil(self.block_bytes) => {
                Err(bad(format!("block {last} lies past the end of the disk of {} bytes", self.size)))
            }
            _ => Ok(()),
        }
    }

    /// All bytes, for small files.
    pub(super) fn read_all(&self) -> Result<Vec<u8>> {
        let (mut all, mut block) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < self.size {
            let (content, len) = self.piece(at, self.size)?;
            match content {
                Content::Packed { block: found, .. } => {
                    self.unpack(&found, usize::MAX, &mut block)?;
                    all.extend_from_slice(&block);
                }
                _ => all.resize(all.len().saturating_add(usize::try_from(len).unwrap_or(usize::MAX)), 0),
            }
            at += len;
        }
        Ok(all)
    }

    /// Bytes of block `index`.
    fn len_of(&self, index: u64) -> u64 {
        self.block_bytes.min(self.size.saturating_sub(index.saturating_mul(self.block_bytes)))
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let (index, skip) = (at / self.block_bytes, at % self.block_bytes);
        let until = |block: u64| block.saturating_mul(self.block_bytes).min(end) - at;
        let listed = match &self.list {
            List::Changed { order, .. } => {
                let next = order.partition_point(|(block, _)| *block < index);
                match order.get(next) {
                    Some((block, _)) if *block == index => self.listed(index)?,
                    Some((block, _)) => return Ok((Content::Absent, until(*block))),
                    None => return Ok((Content::Absent, end - at)),
                }
            }
            List::Whole(tables) => {
                let number = index / TABLE_BLOCKS;
                match usize::try_from(number).ok().and_then(|i| tables.get(i)) {
                    Some(Table { root: NONE, .. }) => return Ok((Content::Zero, until((number + 1) * TABLE_BLOCKS))),
                    _ => self.listed(index)?,
                }
            }
        };
        let len = until(index + 1);
        let Listed::Stored { .. } = listed else { return Ok((Content::Zero, len)) };
        let stored = self.stored(index, listed)?;
        // What is behind a block in its room is read along, so that blocks end where sectors do.
        let whole_sectors = stored.stored_len.next_multiple_of(512);
        let block = BlockRef {
            offset: stored.offset,
            logical: index,
            stored_len: if whole_sectors <= stored.room { whole_sectors } else { stored.stored_len },
            raw_len: stored.raw_len,
            check: 0,
            file: 0,
            codec: stored.encoding.codec(),
        };
        Ok((Content::Packed { block, skip: u32::try_from(skip).unwrap_or(u32::MAX) }, len))
    }

    /// What the list says of block `index`, which it has.
    fn listed(&self, index: u64) -> Result<Listed> {
        let pages = &self.shared.pages;
        let missing = || Error::corrupt(&self.label, 0, format!("block {index} is not in its list"));
        match &self.list {
            List::Changed { vector, order } => {
                let found = order.binary_search_by_key(&index, |(block, _)| *block).ok().and_then(|i| order.get(i));
                let (_, place) = *found.ok_or_else(missing)?;
                vector.with(pages, place, |at, bytes| self.read(at, bytes))?
            }
            List::Whole(tables) => {
                let table = usize::try_from(index / TABLE_BLOCKS).ok().and_then(|i| tables.get(i));
                let table = table.ok_or_else(missing)?;
                if table.root == NONE {
                    return Ok(Listed::Zero);
                }
                let vector = match table.vector.get() {
                    Some(vector) => vector,
                    None => {
                        let vector = Vector::open(pages, table.root, BLOCK_BYTES, table.count)?;
                        table.vector.get_or_init(|| vector)
                    }
                };
                vector.with(pages, index % TABLE_BLOCKS, |at, bytes| self.read(at, bytes))?
            }
        }
    }

    /// One entry of a list: both kinds begin alike.
    fn read(&self, at: u64, bytes: &[u8]) -> Result<Listed> {
        match bytes.get(4).copied().unwrap_or_default() {
            0 => Ok(Listed::Stored {
                len: u32_at(bytes, 0),
                digest: bytes.get(5..21).and_then(|b| b.first_chunk()).copied().unwrap_or_default(),
                id: u64_at(bytes, 21),
            }),
            1 => Ok(Listed::Zero),
            kind @ 2..=5 => {
                let what = format!("a block of kind {kind} (entry at {at}): its bytes are not in this file");
                Err(Error::unsupported(&self.label, what))
            }
            kind => Err(Error::corrupt(&self.label, at, format!("a block of kind {kind}"))),
        }
    }

    /// Where a listed block is stored.
    fn stored(&self, index: u64, listed: Listed) -> Result<Stored> {
        let Listed::Stored { len, digest, id } = listed else {
            return Err(Error::corrupt(&self.label, 0, format!("block {index} is zeros and has no bytes")));
        };
        let stored = self.shared.store()?.block(&self.shared.pages, id)?;
        let due = self.len_of(index);
        if stored.digest != digest || stored.raw_len != len || u64::from(len) != due {
            let what = format!(
                "block {index}: the store has {} bytes, the list {len}, and {due} belong there, or their MD5s differ",
                stored.raw_len
            );
            return Err(Error::corrupt(&self.label, stored.offset, what));
        }
        Ok(stored)
    }
}

fn unread(label: &str, kind: u32) -> Error {
    let what = match kind {
        2 => "a file whose blocks are in another file".to_owned(),
        4 => "a reverse increment (VRB)".to_owned(),
        other => format!("a file of kind {other}"),
    };
    Error::unsupported(label, what)
}

/// The tables of a whole file, and the length of its blocks. `Err(Err)` is the rule that is broken.
fn whole(pages: &Pages, blocks: &Blocks) -> Result<(List, u64), Result<Error, String>> {
    let count = blocks.count.div_ceil(TABLE_BLOCKS);
    if count == 0 || count > TABLES_MAX {
        return Err(Err(format!("a file of {} blocks", blocks.count)));
    }
    let vector = Vector::open(pages, blocks.root, TABLE_BYTES, count).map_err(Ok)?;
    let (mut tables, mut block_bytes) = (Vec::new(), None);
    for number in 0..count {
        let (root, len, listed) = vector
            .with(pages, number, |_, bytes| (u64_at(bytes, 0), u64_at(bytes, 8), u64_at(bytes, 16)))
            .map_err(Ok)?;
        let due = TABLE_BLOCKS.min(blocks.count - number * TABLE_BLOCKS);
        if root == NONE {
            tables.push(Table { root, count: due, vector: OnceLock::new() });
            continue;
        }
        if len == 0 || *block_bytes.get_or_insert(len) != len || listed < due {
            return Err(Err(format!("table {number}: {listed} blocks of {len} bytes, where {due} belong")));
        }
        tables.push(Table { root, count: due, vector: OnceLock::new() });
    }
    if !duplicates(tables.iter().map(|table| Some(table.root).filter(|root| *root != NONE))).is_empty() {
        return Err(Err("two tables of blocks are the same one".into()));
    }
    let block_bytes = block_bytes.unwrap_or(pages.header.block_bytes.into());
    if blocks.len.div_ceil(block_bytes) != blocks.count {
        return Err(Err(format!("{} blocks of {block_bytes} bytes, for {} bytes", blocks.count, blocks.len)));
    }
    Ok((List::Whole(tables), block_bytes))
}

fn changed_blocks(pages: &Pages, blocks: &Blocks) -> Result<List> {
    if blocks.count > CHANGED_MAX {
        return Err(Error::unsupported(pages.file.label(), format!("an increment of {} blocks", blocks.count)));
    }
    let vector = Vector::open(pages, blocks.root, CHANGED_BYTES, blocks.count)?;
    let mut order = Vec::new();
    for place in 0..blocks.count {
        order.push((vector.with(pages, place, |_, bytes| u64_at(bytes, 29))?, place));
    }
    order.sort_unstable();
    Ok(List::Changed { vector, order })
}

impl Layer for VbkLayer {
    fn label(&self) -> &str {
        &self.label
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        self.block_bytes.next_power_of_two().max(crate::SECTOR_BYTES)
    }

    crate::runs::layer_in_pieces!(shared.pages.file);

    /// The slot's checksum covers those of the banks, and these cover every block's MD5.
    fn fingerprint(&self) -> Result<[u8; 32]> {
        let (file, slot) = (&self.shared.pages.file, &self.shared.slot);
        let mut hash = file.fingerprint("vbk", self.size);
        hash.update(&slot.number.to_le_bytes()).update(&slot.crc.to_le_bytes());
        for bank in &slot.banks {
            hash.update(&bank.crc.to_le_bytes()).update(&bank.offset.to_le_bytes());
        }
        hash.update(&self.entry_at.to_le_bytes());
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let stored = self.stored(block.logical, self.listed(block.logical)?)?;
        if stored.offset != block.offset || stored.raw_len != block.raw_len {
            let what = format!("block {} does not lie here any more", block.logical);
            return Err(Error::corrupt(&self.label, block.offset, what));
        }
        stored.read(&self.shared.pages, out)
    }
}
