//! Finding what is whole in a file that was never sealed, or whose end is torn off.
//!
//! Invariants
//! - Salvage writes nothing. What it cannot vouch for reads as an error, not as zeros.
//! - A frame counts only if its header, the layer's tag in it and its payload's checksum hold, so bytes of
//!   another layer file inside a stored block are never taken for frames.
//!
//! How: backwards to the last whole waymark, whose chain names every leaf written before it; from there
//! forward, frame by frame. Without a whole chain of waymarks: forward from the first frame.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use zerocopy::FromBytes;

use super::{
    append::Tail,
    block::decode_meta,
    entry::{Entry, LeafPages, LeafRef, Place, Stored},
    frame::{FrameInfo, FrameKind, parse_header},
    key::{ContentId, LOST_ID},
    layout::{
        FRAME_HEADER_BYTES, FRAME_IDENTITY_BYTES, FRAME_MAGIC, FRAMES_START, LEAF_BYTES, LEAF_ENTRIES, ROOT_BYTES_MAX,
        WAYMARK_BYTES_MAX, WAYMARK_MAGIC, WaymarkHeader, WaymarkLeaf,
    },
    leafmap::LeafMap,
    reader::{Overrides, Reader},
    resolve::Resolver,
    root::Root,
    seal::{Identity, SealInfo, Stats, read_seal, read_seal_copy, read_superblock},
};
use crate::{Codec, Error, Result, Storage};

/// Bytes read at a time while looking for a waymark.
const WINDOW: u64 = 1 << 20;

/// What a scan found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Where the last whole frame ends.
    pub(crate) end: u64,
    /// Sequence number of that frame.
    pub(crate) sequence: u64,
    /// Leaves written to the file.
    pub(crate) leaves: BTreeMap<u64, LeafRef>,
    /// Whether waymarks name all of `leaves`.
    pub(crate) leaves_in_waymarks: bool,
    /// Blocks written after their leaf.
    pub(crate) blocks: BTreeMap<u64, (Stored, ContentId)>,
    /// Blocks written behind the last waymark, with their stored bytes, whether a leaf knows them or not.
    pub(crate) uncounted: BTreeMap<u64, u32>,
    /// Blocks whose frame is there and damaged.
    pub(crate) lost: BTreeSet<u64>,
    /// Every block below was given to the writer.
    pub(crate) cursor: u64,
    /// What the last waymark had counted.
    pub(crate) stats: Stats,
    /// Offset of the last waymark; 0 for none.
    pub(crate) waymark: u64,
    /// A root follows everything: only the seal is missing.
    pub(crate) complete: bool,
}

/// Finds what a writer can go on from: stops at the first frame that is not whole.
pub(crate) fn scan(storage: &dyn Storage, identity: &Identity) -> Result<Found> {
    Scan { storage, identity, len: len_of(storage)?, hop_over_damage: false }.run()
}

/// Whether a sealed file is whole from its last synced place on, read again. For a file whose writer was
/// told that the last sync failed: its seal may have reached the disk without what it seals.
///
/// # Errors
/// I/O only.
pub fn confirm_sealed(storage: &dyn Storage) -> Result<bool> {
    let seal = match read_seal(storage) {
        Ok(seal) => seal,
        Err(e @ Error::Io { .. }) => return Err(e),
        Err(_) => return Ok(false),
    };
    // Either may be the one that was torn.
    let mut both = true;
    for copy in [0, 1] {
        both &= match read_seal_copy(storage, copy) {
            Err(e @ Error::Io { .. }) => return Err(e),
            copy => copy.is_ok(),
        };
    }
    let found = scan(storage, &seal.identity)?;
    Ok(both && found.complete && found.end == seal.data_end && found.sequence == seal.sequence)
}

/// What happens to blocks of which an increment says nothing because it was cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unseen {
    /// They read as errors.
    Error,
    /// They read as in the parent (as zeros in a full), as if the source had not changed there.
    Parent,
}

/// A torn layer, as far as it can be read.
#[derive(Debug)]
pub struct Salvaged {
    /// Reads what is whole; damage and doubt are errors.
    pub reader: Reader,
    /// Only the seal was missing or torn: the layer is complete.
    pub complete: bool,
    /// Where the last whole frame ends, in bytes.
    pub frames_end: u64,
    /// Blocks whose frames are there and damaged.
    pub lost_blocks: Vec<u64>,
    /// From this block on only blocks found in the file itself are known; `None` if all are.
    pub unseen_from: Option<u64>,
}

/// Opens what is whole in an unsealed or torn file. `parent` and the path to it are needed for an increment.
///
/// # Errors
/// The superblock is unreadable, the parent is not the one the layer was begun on, or I/O.
pub fn salvage(
    storage: Arc<dyn Storage>,
    parent: Option<(Arc<Reader>, String)>,
    resolver: Resolver,
    unseen: Unseen,
) -> Result<Salvaged> {
    let identity = match read_superblock(storage.as_ref()) {
        Ok(identity) => identity,
        Err(e) => read_seal(storage.as_ref()).map(|seal| seal.identity).map_err(|_| e)?,
    };
    let (parent, hint) = parent.unzip();
    if identity.parent != parent.as_ref().map(|p| (p.layer_id(), p.seal_hash())) {
        let what = "the torn layer was begun on another parent".into();
        return Err(Error::ChainBroken { path: storage.label().into(), what });
    }
    let scan =
        Scan { storage: storage.as_ref(), identity: &identity, len: len_of(storage.as_ref())?, hop_over_damage: true };
    let found = scan.run()?;
    let tail = Tail::new(Arc::clone(&storage), found.end, found.sequence);
    let mut map = LeafMap::new(identity.clone(), parent)?;
    for (leaf, at) in &found.leaves {
        map.adopt(*leaf, *at, &tail)?;
    }
    for (block, (at, id)) in &found.blocks {
        map.put(*block, Entry::Data(*at), *id, Some(&tail))?;
    }
    for block in &found.lost {
        map.put(*block, Entry::Bad, LOST_ID, Some(&tail))?;
    }
    let unseen_from = (!found.complete && unseen == Unseen::Error).then_some(found.cursor);
    let overrides = Overrides { leaves: map.take_leaves(), unseen_from };
    let root = map.root(&hint.unwrap_or_default());
    let seal = unsealed(&identity, &found, map.data_blocks());
    let reader = Reader::assemble(storage, seal, root, resolver, Some(overrides));
    let lost_blocks = found.lost.iter().copied().collect();
    Ok(Salvaged { reader, complete: found.complete, frames_end: found.end, lost_blocks, unseen_from })
}

/// What stands in for the seal of a salvaged layer: its hash is that of no sealed file.
fn unsealed(identity: &Identity, found: &Found, data_blocks: u64) -> SealInfo {
    let mut hash = blake3::Hasher::new_derive_key("aquifer 2026 salvaged layer");
    hash.update(identity.layer.as_bytes()).update(&found.end.to_le_bytes());
    SealInfo {
        identity: identity.clone(),
        hash: *hash.finalize().as_bytes(),
        file_bytes: found.end,
        data_end: found.end,
        sequence: found.sequence,
        root_codec: Codec::Raw,
        root_a: 0,
        root_b: 0,
        root_stored: 0,
        root_raw: 0,
        root_hash: [0; 32],
        waymark: found.waymark,
        stats: Stats { data_blocks, ..found.stats },
    }
}

fn stats_of(header: &WaymarkHeader) -> Stats {
    Stats {
        blocks_given: header.blocks_given.get(),
        blocks_zero: header.blocks_zero.get(),
        blocks_unchanged: header.blocks_unchanged.get(),
        blocks_shared: header.blocks_shared.get(),
        blocks_written: header.blocks_written.get(),
        blocks_moved: header.blocks_moved.get(),
        bytes_raw: header.bytes_raw.get(),
        bytes_stored: header.bytes_stored.get(),
        data_blocks: 0,
    }
}

fn len_of(storage: &dyn Storage) -> Result<u64> {
    storage.len().map_err(|e| Error::io(storage.label(), "stat", 0, e))
}

/// A frame met by a scan: what it says, its `check`, and its payload if that is whole.
type Seen = (FrameInfo, u32, Option<Vec<u8>>);

struct Scan<'a> {
    storage: &'a dyn Storage,
    identity: &'a Identity,
    len: u64,
    /// Salvage goes on after a damaged payload whose header is whole; a writer may not.
    hop_over_damage: bool,
}

impl Scan<'_> {
    fn run(&self) -> Result<Found> {
        if let Some(found) = self.last_waymark()? {
            return self.forward(found);
        }
        self.forward(Found { end: FRAMES_START, leaves_in_waymarks: false, ..Found::default() })
    }

    /// A whole frame at `offset`: header, tag, length and payload checksum hold.
    fn frame(&self, offset: u64) -> Result<Option<Seen>> {
        let room = self.len.saturating_sub(offset);
        if room < FRAME_HEADER_BYTES as u64 {
            return Ok(None);
        }
        let mut header = [0; FRAME_HEADER_BYTES];
        self.read(offset, &mut header)?;
        let Ok((info, check)) = parse_header(&header) else { return Ok(None) };
        let block = self.identity.block_bytes();
        let fits = match info.kind {
            FrameKind::Block => {
                info.raw_bytes == block && info.stored_bytes <= block && info.logical < self.identity.blocks()
            }
            FrameKind::Map | FrameKind::Ids => {
                info.stored_bytes == LEAF_BYTES && info.codec == Codec::Raw && info.logical < self.identity.leaves()
            }
            FrameKind::Waymark => info.stored_bytes <= WAYMARK_BYTES_MAX && info.codec == Codec::Raw,
            FrameKind::Root => info.raw_bytes <= ROOT_BYTES_MAX && info.stored_bytes <= ROOT_BYTES_MAX,
        };
        if info.tag != self.identity.tag || !fits || info.frame_bytes() > room {
            return Ok(None);
        }
        let mut payload = vec![0; usize::try_from(info.stored_bytes).unwrap_or_default()];
        self.read(offset + FRAME_HEADER_BYTES as u64, &mut payload)?;
        let identity = header.get(..FRAME_IDENTITY_BYTES).unwrap_or_default();
        let whole = crc32c::crc32c_append(crc32c::crc32c(&payload), identity) == check;
        Ok(Some((info, check, whole.then_some(payload))))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.storage.read_at(offset, buf).map_err(|e| Error::io(self.storage.label(), "read", offset, e))
    }

    /// The last whole waymark, looked for from the end backwards, and all it refers to.
    fn last_waymark(&self) -> Result<Option<Found>> {
        let overlap = FRAME_MAGIC.len() as u64;
        let mut end = self.len;
        while end > FRAMES_START {
            let start = end.saturating_sub(WINDOW).max(FRAMES_START);
            let mut window = vec![0; usize::try_from((end + overlap).min(self.len) - start).unwrap_or_default()];
            self.read(start, &mut window)?;
            let mut at = window.len();
            while let Some(found) = last_magic(window.get(..at).unwrap_or_default()) {
                if window.get(found + 4) == Some(&(FrameKind::Waymark as u8))
                    && let Some(state) = self.waymark_chain(start + found as u64)?
                {
                    return Ok(Some(state));
                }
                at = found + FRAME_MAGIC.len() - 1;
            }
            end = start;
        }
        Ok(None)
    }

    fn waymark(&self, offset: u64) -> Result<Option<(FrameInfo, WaymarkHeader, Vec<WaymarkLeaf>)>> {
        let Some((info, _, Some(payload))) = self.frame(offset)? else { return Ok(None) };
        if info.kind != FrameKind::Waymark {
            return Ok(None);
        }
        let Ok((header, rest)) = WaymarkHeader::read_from_prefix(&payload) else { return Ok(None) };
        let count = usize::try_from(header.leaves.get()).unwrap_or(usize::MAX);
        let leaves = match <[WaymarkLeaf]>::ref_from_bytes_with_elems(rest, count) {
            Ok(leaves) if header.magic == WAYMARK_MAGIC => leaves.to_vec(),
            _ => return Ok(None),
        };
        Ok(Some((info, header, leaves)))
    }

    /// State at a waymark; `None` if any waymark of its chain is not whole.
    fn waymark_chain(&self, offset: u64) -> Result<Option<Found>> {
        let Some((info, header, leaves)) = self.waymark(offset)? else { return Ok(None) };
        let mut found = Found {
            end: offset + info.frame_bytes(),
            sequence: info.sequence,
            leaves_in_waymarks: true,
            cursor: header.cursor.get(),
            stats: stats_of(&header),
            waymark: offset,
            ..Found::default()
        };
        let (mut at, mut header, mut leaves) = (offset, header, leaves);
        loop {
            for leaf in &leaves {
                let Ok(to) = LeafRef::unpack(&leaf.at) else { return Ok(None) };
                if leaf.leaf.get() >= self.identity.leaves() {
                    return Ok(None);
                }
                found.leaves.entry(leaf.leaf.get()).or_insert(to);
            }
            found.cursor = found.cursor.max(header.cursor.get());
            let previous = header.previous.get();
            if previous == 0 {
                return Ok(Some(found));
            }
            if previous >= at {
                return Ok(None);
            }
            at = previous;
            match self.waymark(at)? {
                Some((_, next_header, next_leaves)) => (header, leaves) = (next_header, next_leaves),
                None => return Ok(None),
            }
        }
    }

    /// Folds in what follows, frame by frame.
    fn forward(&self, mut found: Found) -> Result<Found> {
        let mut maps: BTreeMap<u64, (Place, u32)> = BTreeMap::new();
        while let Some((info, check, payload)) = self.frame(found.end)? {
            if info.sequence != found.sequence + 1 {
                break;
            }
            let offset = found.end;
            let Some(payload) = payload else {
                if !self.hop_over_damage {
                    break;
                }
                found.pass(offset, &info);
                found.lose(&info);
                continue;
            };
            found.pass(offset, &info);
            let place = Place { slot: self.identity.slot, offset };
            match info.kind {
                FrameKind::Block => found.add_block(&info, place, check),
                FrameKind::Map => {
                    maps.insert(info.logical, (place, check));
                }
                FrameKind::Ids => {
                    if let Some((map, map_check)) = maps.remove(&info.logical) {
                        let pages = LeafPages { map, map_check, ids: place, ids_check: check };
                        found.add_leaf(info.logical, pages);
                    }
                }
                FrameKind::Waymark => self.fold_waymark(&mut found, offset)?,
                FrameKind::Root => self.fold_root(&mut found, &info, &payload),
            }
        }
        Ok(found)
    }

    /// A waymark met on the way forward, when the chain behind it is broken: its cursor and leaves hold.
    fn fold_waymark(&self, found: &mut Found, offset: u64) -> Result<()> {
        if let Some((_, header, leaves)) = self.waymark(offset)? {
            found.cursor = found.cursor.max(header.cursor.get());
            found.stats = stats_of(&header);
            found.uncounted.clear();
            for leaf in leaves.iter().filter(|leaf| leaf.leaf.get() < self.identity.leaves()) {
                match LeafRef::unpack(&leaf.at) {
                    Ok(LeafRef::Pages(pages)) => found.add_leaf(leaf.leaf.get(), pages),
                    Ok(LeafRef::Zero) => found.zero_leaf(leaf.leaf.get()),
                    Err(_) => {}
                }
            }
        }
        Ok(())
    }

    fn fold_root(&self, found: &mut Found, info: &FrameInfo, payload: &[u8]) {
        let raw = usize::try_from(info.raw_bytes).unwrap_or_default();
        let mut out = Vec::new();
        if decode_meta(info.codec, payload, raw, &mut out).is_err() {
            return;
        }
        let Ok(root) = Root::decode(&out, self.identity) else { return };
        for (leaf, bytes) in (0..).zip(&root.refs) {
            match LeafRef::unpack(bytes) {
                Ok(LeafRef::Pages(pages)) if pages.map.slot == self.identity.slot => found.add_leaf(leaf, pages),
                Ok(LeafRef::Zero) => found.zero_leaf(leaf),
                _ => {}
            }
        }
        found.complete = true;
    }
}

impl Found {
    fn pass(&mut self, offset: u64, info: &FrameInfo) {
        self.end = offset + info.frame_bytes();
        self.sequence = info.sequence;
        self.complete = self.complete && info.kind == FrameKind::Root;
    }

    fn lose(&mut self, info: &FrameInfo) {
        if info.kind == FrameKind::Block {
            self.blocks.remove(&info.logical);
            self.lost.insert(info.logical);
        }
    }

    fn add_block(&mut self, info: &FrameInfo, place: Place, check: u32) {
        let at = Stored { place, stored_bytes: info.stored_bytes, codec: info.codec, shared: false, check };
        self.lost.remove(&info.logical);
        self.uncounted.insert(info.logical, info.stored_bytes);
        self.blocks.insert(info.logical, (at, info.id));
    }

    fn add_leaf(&mut self, leaf: u64, pages: LeafPages) {
        self.leaves_in_waymarks = false;
        self.leaves.insert(leaf, LeafRef::Pages(pages));
        self.forget_blocks(leaf);
    }

    fn zero_leaf(&mut self, leaf: u64) {
        self.leaves_in_waymarks = false;
        self.leaves.insert(leaf, LeafRef::Zero);
        self.forget_blocks(leaf);
    }

    /// A leaf page knows all that was written before it; lost blocks stay lost.
    fn forget_blocks(&mut self, leaf: u64) {
        let first = leaf * LEAF_ENTRIES as u64;
        let mut rest = self.blocks.split_off(&first);
        self.blocks.append(&mut rest.split_off(&(first + LEAF_ENTRIES as u64)));
    }
}

fn last_magic(bytes: &[u8]) -> Option<usize> {
    bytes.windows(FRAME_MAGIC.len()).rposition(|w| w == FRAME_MAGIC)
}
