//! The end of a file being written: the only place that appends to it.
//!
//! Invariants
//! - Items are applied in the order in which they were given to the writer.
//! - A waymark is appended only after everything before it has been synced, so whoever finds a whole
//!   waymark may trust all it refers to.
//! - After the first failed write or sync nothing more is written.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
};

use zerocopy::{
    IntoBytes,
    little_endian::{U32, U64},
};

use super::{
    block::{Compression, Encoder},
    dedupe::{DedupeTable, Known},
    entry::{Entry, Place, Stored},
    frame::{FrameInfo, FrameKind},
    key::{ContentId, LOST_ID, ZERO_ID},
    layout::{
        FRAME_HEADER_BYTES, LEAF_ENTRIES, PAGE_BYTES, PAGE_LEN, WAYMARK_LEAVES_MAX, WAYMARK_MAGIC, WaymarkHeader,
        WaymarkLeaf,
    },
    leafmap::LeafMap,
    reader::Reader,
    salvage::Found,
    seal::{Identity, SealInfo, Sealed, Stats},
};
use crate::{
    Codec, Error, Result, Storage,
    planted::{Bug, planted},
    storage::{Readers, WriteBehind},
};

/// Leaves held in memory before they are written: 16 MiB.
const LEAVES_IN_MEMORY: usize = 2048;

/// Blocks taken over from older files are written in pieces of this size, in bytes.
const ABSORB_BYTES: usize = 1 << 20;

/// Where the next frame goes.
#[derive(Debug)]
pub(crate) struct Tail {
    storage: Arc<dyn Storage>,
    offset: u64,
    sequence: u64,
    behind: WriteBehind,
}

impl Tail {
    pub(crate) fn new(storage: Arc<dyn Storage>, offset: u64, sequence: u64) -> Self {
        Self { storage, offset, sequence, behind: WriteBehind::default() }
    }

    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    pub(crate) fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Appends bytes and asks for their write-back.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let offset = self.offset;
        self.storage.write_at(offset, bytes).map_err(|e| Error::io(self.storage.label(), "write", offset, e))?;
        self.offset += bytes.len() as u64;
        self.behind.wrote(&*self.storage, offset..self.offset, Readers::None);
        Ok(())
    }

    pub(crate) fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(|e| Error::io(self.storage.label(), "sync", self.offset, e))
    }
}

/// What a worker found out about one block.
#[derive(Debug)]
pub(crate) enum Outcome {
    Zero,
    /// Equal to the parent's block at the same place.
    AsParent(ContentId),
    /// Stored already.
    Known(Known),
    /// To be stored.
    Frame(Encoded),
}

/// A frame in a chunk's bytes, its header still empty.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) bytes: Range<usize>,
    pub(crate) codec: Codec,
    pub(crate) id: ContentId,
    pub(crate) payload_crc: u32,
}

/// One item of the writer's order.
#[derive(Debug)]
pub(crate) enum Item {
    /// Blocks from `first` on, and their frames.
    Blocks { first: u64, outcomes: Vec<Outcome>, frames: Vec<u8> },
    /// A run of zero blocks.
    Zero(Range<u64>),
    /// A run of blocks that are as in the parent.
    Keep(Range<u64>),
    /// A run of blocks that lie in the disk of another product.
    Linked(Range<u64>),
}

impl Item {
    fn blocks(&self) -> Range<u64> {
        match self {
            Self::Blocks { first, outcomes, .. } => *first..*first + outcomes.len() as u64,
            Self::Zero(range) | Self::Keep(range) | Self::Linked(range) => range.clone(),
        }
    }
}

/// State of a file being written.
#[derive(Debug)]
pub(crate) struct Appender {
    pub(crate) identity: Identity,
    pub(crate) tail: Tail,
    pub(crate) map: LeafMap,
    pub(crate) stats: Stats,
    /// Every block below was given.
    pub(crate) cursor: u64,
    pub(crate) waymark: u64,
    /// End of the last waymark.
    waymark_end: u64,
    waymark_every: u64,
    parent_hint: String,
    /// Blocks found behind the last waymark, which nobody has counted, and not given again yet: their
    /// stored bytes.
    recovered: BTreeMap<u64, u32>,
}

impl Appender {
    pub(crate) fn new(identity: Identity, tail: Tail, map: LeafMap, waymark_every: u64, parent_hint: String) -> Self {
        let waymark_end = tail.offset();
        let stats = Stats::default();
        Self {
            identity,
            tail,
            map,
            stats,
            cursor: 0,
            waymark: 0,
            waymark_end,
            waymark_every,
            parent_hint,
            recovered: BTreeMap::new(),
        }
    }

    /// Takes over what a scan found in an interrupted file.
    pub(crate) fn adopt(&mut self, found: &Found, dedupe: &mut DedupeTable) -> Result<()> {
        for (leaf, at) in &found.leaves {
            self.map.adopt(*leaf, *at, &self.tail)?;
            self.map.own_blocks(*leaf, &self.tail, |known| dedupe.insert(known))?;
        }
        // The waymarks already name these; only what follows is new.
        self.map.take_changed();
        for (block, (at, id)) in &found.blocks {
            self.map.put(*block, Entry::Data(*at), *id, Some(&self.tail))?;
            dedupe.insert(Known { id: *id, at: *at, logical: *block });
        }
        if !found.leaves_in_waymarks {
            self.map.mark_all_changed(found.leaves.keys().copied());
        }
        self.cursor = found.cursor;
        self.waymark = found.waymark;
        self.stats = found.stats;
        self.recovered.clone_from(&found.uncounted);
        Ok(())
    }

    /// Counts a block that is as it was: unchanged, unless it was found behind the last waymark, where nobody
    /// had counted it yet.
    fn count_unchanged(&mut self, block: u64) {
        match self.recovered.remove(&block) {
            Some(stored) => self.count_written(stored),
            None => self.stats.blocks_unchanged += 1,
        }
    }

    fn count_written(&mut self, stored_bytes: u32) {
        self.stats.blocks_written += 1;
        self.stats.bytes_raw += u64::from(self.identity.block_bytes());
        self.stats.bytes_stored += u64::from(stored_bytes) + FRAME_HEADER_BYTES as u64;
    }

    pub(crate) fn apply(&mut self, item: Item, dedupe: &parking_lot::RwLock<DedupeTable>) -> Result<Vec<u8>> {
        let given = item.blocks();
        let recycled = match item {
            Item::Blocks { first, outcomes, frames } => self.apply_blocks(first, outcomes, frames, dedupe)?,
            Item::Zero(range) => {
                let blocks = range.end - range.start;
                self.stats.blocks_given += blocks;
                self.stats.blocks_zero += blocks;
                self.recovered.retain(|block, _| !range.contains(block));
                // In steps, so that a sweep over a large disk keeps memory bounded.
                let step = (LEAF_ENTRIES * LEAVES_IN_MEMORY) as u64;
                let mut at = range.start;
                while at < range.end {
                    let end = at.saturating_add(step).min(range.end);
                    self.map.zero(at, end, &self.tail)?;
                    self.settle()?;
                    at = end;
                }
                Vec::new()
            }
            Item::Linked(range) => {
                self.stats.blocks_given += range.end - range.start;
                self.link(range)?;
                Vec::new()
            }
            Item::Keep(range) => {
                self.stats.blocks_given += range.end - range.start;
                self.stats.blocks_unchanged += range.end - range.start;
                Vec::new()
            }
        };
        if given.start <= self.cursor {
            self.cursor = self.cursor.max(given.end);
        }
        self.settle()?;
        Ok(recycled)
    }

    fn link(&mut self, range: Range<u64>) -> Result<()> {
        let lost = || Error::corrupt("map", range.start, "this layer stands on no disk of another product");
        let slot = self.map.linked_slot().ok_or_else(lost)?;
        for block in range {
            self.map.put(block, Entry::Foreign { slot }, LOST_ID, Some(&self.tail))?;
            if block % LEAF_ENTRIES as u64 == 0 {
                self.settle()?;
            }
        }
        Ok(())
    }

    fn apply_blocks(
        &mut self,
        first: u64,
        outcomes: Vec<Outcome>,
        mut frames: Vec<u8>,
        dedupe: &parking_lot::RwLock<DedupeTable>,
    ) -> Result<Vec<u8>> {
        let mut kept = 0;
        let mut entries = Vec::with_capacity(outcomes.len());
        for (block, outcome) in (first..).zip(outcomes) {
            self.stats.blocks_given += 1;
            let (entry, id) = match outcome {
                Outcome::Zero => {
                    self.recovered.remove(&block);
                    self.stats.blocks_zero += 1;
                    (Entry::Zero, ZERO_ID)
                }
                Outcome::AsParent(id) => match self.map.get(block, &self.tail)? {
                    (_, now) if now == id => {
                        self.count_unchanged(block);
                        continue;
                    }
                    _ => match self.map.parent_entry(block)? {
                        Some(entry) => {
                            self.stats.blocks_unchanged += 1;
                            (entry, id)
                        }
                        None => return Err(Error::corrupt("map", block, "the parent's block is gone")),
                    },
                },
                Outcome::Known(known) => self.point_at(block, &known)?,
                Outcome::Frame(encoded) => {
                    let id = encoded.id;
                    let known = dedupe.read().find(&id);
                    match known {
                        Some(known) => self.point_at(block, &known)?,
                        None => {
                            self.recovered.remove(&block);
                            let at = self.place_frame(block, encoded, &mut frames, &mut kept);
                            dedupe.write().insert(Known { id, at, logical: block });
                            (Entry::Data(at), id)
                        }
                    }
                }
            };
            entries.push((block, entry, id));
        }
        frames.truncate(kept);
        self.tail.append(&frames)?;
        for (block, entry, id) in entries {
            self.map.put(block, entry, id, Some(&self.tail))?;
        }
        frames.clear();
        Ok(frames)
    }

    /// An entry for content that is stored already.
    fn point_at(&mut self, block: u64, known: &Known) -> Result<(Entry, ContentId)> {
        let at = Stored { shared: known.logical != block, ..known.at };
        if self.map.get(block, &self.tail)?.1 == known.id {
            self.count_unchanged(block);
        } else {
            self.stats.blocks_shared += 1;
        }
        Ok((Entry::Data(at), known.id))
    }

    /// Gives a frame its header and its place, closing the gap that shared blocks left before it.
    fn place_frame(&mut self, block: u64, encoded: Encoded, frames: &mut [u8], kept: &mut usize) -> Stored {
        let Encoded { bytes, codec, id, payload_crc } = encoded;
        let stored = bytes.len() - FRAME_HEADER_BYTES;
        let info = FrameInfo {
            kind: FrameKind::Block,
            codec,
            logical: block,
            raw_bytes: self.identity.block_bytes(),
            stored_bytes: u32::try_from(stored).unwrap_or(u32::MAX),
            sequence: self.tail.next_sequence(),
            tag: self.identity.tag,
            id,
        };
        let (header, check) = info.header(payload_crc);
        let start = *kept;
        *kept += bytes.len();
        frames.copy_within(bytes, start);
        if let Some(to) = frames.get_mut(start..start + FRAME_HEADER_BYTES) {
            to.copy_from_slice(&header);
        }
        self.count_written(info.stored_bytes);
        let place = Place { slot: self.identity.slot, offset: self.tail.offset() + start as u64 };
        Stored { place, stored_bytes: info.stored_bytes, codec, shared: false, check }
    }

    /// Takes over what the disk still has in these older files, as it is stored there, so that the new layer
    /// does not need them.
    pub(crate) fn absorb(&mut self, parent: &Reader, slots: &BTreeSet<u16>) -> Result<()> {
        let mut frames = Vec::new();
        let mut moved = Vec::new();
        let mut places: HashMap<Place, Stored> = HashMap::new();
        for leaf in 0..self.identity.leaves() {
            let Some(blocks) = self.map.blocks_in(leaf, slots, &self.tail)? else { continue };
            for (block, at, id) in blocks {
                let new = match places.get(&at.place) {
                    Some(known) => Stored { shared: true, ..*known },
                    None => self.copy_frame(parent, block, &at, id, &mut frames)?,
                };
                places.insert(at.place, new);
                moved.push((block, new, id));
            }
            if frames.len() >= ABSORB_BYTES {
                self.settle_moved(&mut frames, &mut moved)?;
            }
            self.map.rewrite(leaf, &self.tail)?;
        }
        self.settle_moved(&mut frames, &mut moved)
    }

    /// One stored block, with a header of this layer.
    fn copy_frame(
        &mut self,
        parent: &Reader,
        block: u64,
        at: &Stored,
        id: ContentId,
        frames: &mut Vec<u8>,
    ) -> Result<Stored> {
        let start = frames.len();
        frames.resize(start + FRAME_HEADER_BYTES, 0);
        parent.stored_payload(at, frames)?;
        let payload_crc = crc32c::crc32c(frames.get(start + FRAME_HEADER_BYTES..).unwrap_or_default());
        let info = FrameInfo {
            kind: FrameKind::Block,
            codec: at.codec,
            logical: block,
            raw_bytes: self.identity.block_bytes(),
            stored_bytes: at.stored_bytes,
            sequence: self.tail.next_sequence(),
            tag: self.identity.tag,
            id,
        };
        let (header, check) = info.header(payload_crc);
        if let Some(to) = frames.get_mut(start..start + FRAME_HEADER_BYTES) {
            to.copy_from_slice(&header);
        }
        let place = Place { slot: self.identity.slot, offset: self.tail.offset() + start as u64 };
        self.stats.blocks_moved += 1;
        Ok(Stored { place, shared: false, check, ..*at })
    }

    fn settle_moved(&mut self, frames: &mut Vec<u8>, moved: &mut Vec<(u64, Stored, ContentId)>) -> Result<()> {
        self.tail.append(frames)?;
        frames.clear();
        for (block, at, id) in moved.drain(..) {
            self.map.put(block, Entry::Data(at), id, Some(&self.tail))?;
        }
        self.settle()
    }

    /// Writes leaves and a waymark where enough has gathered.
    fn settle(&mut self) -> Result<()> {
        let grown = self.tail.offset().saturating_sub(self.waymark_end) >= self.waymark_every;
        if grown || self.map.leaves_in_memory() >= LEAVES_IN_MEMORY { self.mark() } else { Ok(()) }
    }

    /// Flushes leaves, syncs, appends waymarks for what changed since the last.
    pub(crate) fn mark(&mut self) -> Result<()> {
        self.map.flush(&mut self.tail)?;
        if !planted(Bug::WaymarkUnsynced) {
            self.tail.sync()?;
        }
        let changed = self.map.take_changed();
        let mut parts = changed.chunks(WAYMARK_LEAVES_MAX).peekable();
        loop {
            let part = parts.next().unwrap_or_default();
            let last = parts.peek().is_none();
            self.append_waymark(part, last)?;
            if last {
                return Ok(());
            }
        }
    }

    fn append_waymark(&mut self, leaves: &[(u64, super::layout::LeafRefBytes)], last: bool) -> Result<()> {
        let header = WaymarkHeader {
            magic: WAYMARK_MAGIC,
            leaves: U32::new(u32::try_from(leaves.len()).unwrap_or(u32::MAX)),
            previous: U64::new(self.waymark),
            // Only the last part of a waymark may promise that all below the cursor is known.
            cursor: U64::new(if last { self.cursor } else { 0 }),
            blocks_given: U64::new(self.stats.blocks_given),
            blocks_zero: U64::new(self.stats.blocks_zero),
            blocks_unchanged: U64::new(self.stats.blocks_unchanged),
            blocks_shared: U64::new(self.stats.blocks_shared),
            blocks_written: U64::new(self.stats.blocks_written),
            blocks_moved: U64::new(self.stats.blocks_moved),
            bytes_raw: U64::new(self.stats.bytes_raw),
            bytes_stored: U64::new(self.stats.bytes_stored),
        };
        let mut payload = header.as_bytes().to_vec();
        for (leaf, at) in leaves {
            payload.extend_from_slice(WaymarkLeaf { leaf: U64::new(*leaf), at: *at }.as_bytes());
        }
        let offset = self.tail.offset();
        let frame = self.meta_frame(FrameKind::Waymark, 0, Codec::Raw, payload.len(), &payload);
        self.tail.append(&frame)?;
        self.waymark = offset;
        self.waymark_end = self.tail.offset();
        Ok(())
    }

    fn meta_frame(&mut self, kind: FrameKind, logical: u64, codec: Codec, raw: usize, payload: &[u8]) -> Vec<u8> {
        let info = FrameInfo {
            kind,
            codec,
            logical,
            raw_bytes: u32::try_from(raw).unwrap_or(u32::MAX),
            stored_bytes: u32::try_from(payload.len()).unwrap_or(u32::MAX),
            sequence: self.tail.next_sequence(),
            tag: self.identity.tag,
            id: [0; 16],
        };
        let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES + payload.len());
        info.append(payload, &mut bytes);
        bytes
    }

    /// Leaves, root and its copy, sync, seals, sync.
    pub(crate) fn seal(mut self) -> Result<Sealed> {
        self.map.flush(&mut self.tail)?;
        for stored in std::mem::take(&mut self.recovered).into_values() {
            self.stats.blocks_given += 1;
            self.count_written(stored);
        }
        self.stats.data_blocks = self.map.data_blocks();
        let raw = self.map.root(&self.parent_hint).encode();
        let mut payload = Vec::new();
        // A small root gains nothing by compression.
        let how = if raw.len() < PAGE_LEN { Compression::Raw } else { Compression::Zstd(1) };
        let root_codec = Encoder::new(how).encode(&raw, &mut payload);
        let root_a = self.tail.offset();
        let mut bytes = self.meta_frame(FrameKind::Root, 0, root_codec, raw.len(), &payload);
        let root_b = root_a + bytes.len() as u64;
        bytes.extend(self.meta_frame(FrameKind::Root, 1, root_codec, raw.len(), &payload));
        let data_end = root_a + bytes.len() as u64;
        let seals_at = data_end.next_multiple_of(PAGE_BYTES);
        bytes.resize(bytes.len() + usize::try_from(seals_at - data_end).unwrap_or_default(), 0);
        self.tail.append(&bytes)?;
        self.tail.sync()?;
        let info = SealInfo {
            identity: self.identity.clone(),
            hash: [0; 32],
            file_bytes: seals_at + 2 * PAGE_BYTES,
            data_end,
            sequence: self.tail.sequence,
            root_codec,
            root_a,
            root_b,
            root_stored: u32::try_from(payload.len()).unwrap_or(u32::MAX),
            root_raw: u32::try_from(raw.len()).unwrap_or(u32::MAX),
            root_hash: *blake3::hash(&raw).as_bytes(),
            waymark: self.waymark,
            stats: self.stats,
        };
        let (pages, seal) = info.pages();
        self.tail.append(&pages)?;
        if !planted(Bug::SealUnsynced) {
            self.tail.sync()?;
        }
        Ok(Sealed { layer: self.identity.layer, seal, file_bytes: info.file_bytes, stats: self.stats })
    }
}
