//! What differs between two points, from metadata alone.
//!
//! Invariants
//! - Never misses a differing byte; with ids of one key it never names a block that was rewritten with
//!   equal content either.
//! - Only id pages are read: the id of zeros is zeros, and that of a lost block equals nothing.
//! - Equal references to a leaf prove its 256 blocks equal, and no page is read for them.
//! - Every page is checked as every reader checks it; memory is bounded: [`RUN_BYTES`] a side and thread.
//!
//! 1 TiB has 65,536 leaves. Where all of them differ, 512 MiB of id pages are compared: they are read in
//! runs, since the writer lays them side by side, and by several threads.

use std::{ops::Range, thread};

use uuid::Uuid;
use zerocopy::FromBytes;

use super::{
    entry::{Entry, LeafPages, LeafRef, Place},
    frame::{self, FrameKind},
    key::{ContentId, LOST_ID, ZERO_ID},
    layout::{FRAME_HEADER_BYTES, LEAF_BYTES, LEAF_ENTRIES, SLOTS_MAX},
    reader::{Reader, leaf_page_expected},
};
use crate::{Error, Layer, Result};

/// Pages that lie side by side are read together up to this many bytes, so that they stay in a core's cache.
const RUN_BYTES: u64 = 256 << 10;

/// A leaf page with its frame.
const FRAME_BYTES: u64 = FRAME_HEADER_BYTES as u64 + LEAF_BYTES as u64;

/// Leaves below which one thread is faster.
const LEAVES_A_THREAD: usize = 512;

/// More threads than this wait for memory.
const THREADS_MAX: usize = 8;

type Ids = [ContentId; LEAF_ENTRIES];

static NO_IDS: Ids = [ZERO_ID; LEAF_ENTRIES];

/// Ranges of `b`'s disk, in bytes, sorted and disjoint, that read differently on `a`'s disk, where a
/// shorter `a` reads as zeros past its end. Ranges end at the end of `b`.
///
/// # Errors
/// [`Error::Unsupported`] if block sizes or id keys differ: then only the bytes can tell. Damage, I/O.
pub fn delta(a: &Reader, b: &Reader) -> Result<Vec<Range<u64>>> {
    if a.block_bytes() != b.block_bytes() || a.id_domain() != b.id_domain() {
        let what = format!("comparing with {} by content ids: block size or id key differ", a.label());
        return Err(Error::unsupported(b.label(), what));
    }
    if a.overrides().is_some() || b.overrides().is_some() {
        return salvaged_delta(a, b);
    }
    let leaves = different_leaves(a, b)?;
    let cores = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let threads = (leaves.len() / LEAVES_A_THREAD).clamp(1, cores);
    let parts = if threads == 1 {
        vec![compare(a, b, &leaves)]
    } else {
        in_threads(a, b, leaves.chunks(leaves.len().div_ceil(threads)))
    };
    let mut ranges = Vec::new();
    for part in parts {
        part?.into_iter().for_each(|range| append(&mut ranges, range));
    }
    Ok(ranges)
}

fn in_threads<'a>(a: &Reader, b: &Reader, parts: impl Iterator<Item = &'a [Pair]>) -> Vec<Result<Vec<Range<u64>>>> {
    thread::scope(|scope| {
        let running: Vec<_> = parts.map(|part| scope.spawn(move || compare(a, b, part))).collect();
        let ended = |done: thread::Result<_>| done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        running.into_iter().map(|thread| ended(thread.join())).collect()
    })
}

fn append(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// A leaf that may differ, and where its id pages lie; `None` for a leaf of zeros.
#[derive(Clone, Copy, Debug)]
struct Pair {
    leaf: u64,
    old: Option<IdsAt>,
    new: Option<IdsAt>,
}

#[derive(Clone, Copy, Debug)]
struct IdsAt {
    place: Place,
    check: u32,
}

impl IdsAt {
    fn of(pages: &LeafPages) -> Self {
        Self { place: pages.ids, check: pages.ids_check }
    }
}

/// The leaves that the roots do not prove equal.
fn different_leaves(a: &Reader, b: &Reader) -> Result<Vec<Pair>> {
    let (files_a, files_b) = (files(a), files(b));
    let mut pairs = Vec::new();
    for leaf in 0..b.identity().leaves() {
        let (old, new) = (leaf_ref(a, leaf)?, leaf_ref(b, leaf)?);
        let same = match (&old, &new) {
            (None, None) => true,
            (Some(p), Some(q)) => {
                p.map.offset == q.map.offset
                    && p.map_check == q.map_check
                    && file_of(a, &files_a, p.map.slot)? == file_of(b, &files_b, q.map.slot)?
            }
            _ => false,
        };
        if !same {
            pairs.push(Pair { leaf, old: old.as_ref().map(IdsAt::of), new: new.as_ref().map(IdsAt::of) });
        }
    }
    Ok(pairs)
}

/// The layer behind each slot, for as many lookups as a disk has leaves.
fn files(reader: &Reader) -> Vec<Option<Uuid>> {
    (0..SLOTS_MAX).map(|slot| reader.file_of(slot).ok().map(|(layer, _)| layer)).collect()
}

fn file_of(reader: &Reader, files: &[Option<Uuid>], slot: u16) -> Result<Uuid> {
    match files.get(usize::from(slot)).copied().flatten() {
        Some(layer) => Ok(layer),
        None => reader.file_of(slot).map(|(layer, _)| layer),
    }
}

fn leaf_ref(reader: &Reader, leaf: u64) -> Result<Option<LeafPages>> {
    if leaf >= reader.identity().leaves() {
        return Ok(None);
    }
    let at = reader.seal_info().root_a;
    match reader.root().leaf_ref(leaf).map_err(|what| Error::corrupt(reader.label(), at, what))? {
        LeafRef::Zero => Ok(None),
        LeafRef::Pages(pages) => Ok(Some(pages)),
    }
}

/// Where the blocks of these leaves differ.
fn compare(a: &Reader, b: &Reader, pairs: &[Pair]) -> Result<Vec<Range<u64>>> {
    let (mut old, mut new) = (Pages::new(a), Pages::new(b));
    let mut ranges = Vec::new();
    for (index, pair) in pairs.iter().enumerate() {
        let ahead = pairs.get(index + 1..).unwrap_or_default();
        let before = old.ids(pair.leaf, pair.old, ahead.iter().map(|next| next.old))?;
        let after = new.ids(pair.leaf, pair.new, ahead.iter().map(|next| next.new))?;
        let first = pair.leaf * LEAF_ENTRIES as u64;
        for (block, (was, is)) in (first..b.blocks()).zip(before.iter().zip(after)) {
            if (was != is || *was == LOST_ID) && !same_linked(a, b, block, was, is)? {
                append(&mut ranges, block_range(b, block));
            }
        }
    }
    Ok(ranges)
}

/// Whether a block that nobody has read in one of the two lies in the same place of the same linked disk in both.
fn same_linked(a: &Reader, b: &Reader, block: u64, was: &ContentId, is: &ContentId) -> Result<bool> {
    if (*was != LOST_ID && *is != LOST_ID) || block >= a.blocks() {
        return Ok(false);
    }
    let (Some(old), Some(new)) = (a.linked(), b.linked()) else { return Ok(false) };
    // Where one disk ends inside the block, the rest of it reads otherwise.
    let grain = a.grain();
    let cut = a.size() != b.size() && (block + 1) * grain > a.size().min(b.size());
    let foreign = |disk: &Reader| disk.entry(block).map(|entry| matches!(entry, Entry::Foreign { .. }));
    Ok(old.identity == new.identity && !cut && foreign(a)? && foreign(b)?)
}

fn block_range(disk: &Reader, block: u64) -> Range<u64> {
    let grain = disk.grain();
    block * grain..((block + 1) * grain).min(disk.size())
}

/// Id pages of one disk, read in runs.
struct Pages<'a> {
    reader: &'a Reader,
    bytes: Vec<u8>,
    /// Where `bytes` was read.
    from: Place,
}

impl<'a> Pages<'a> {
    fn new(reader: &'a Reader) -> Self {
        Self { reader, bytes: Vec::new(), from: Place { slot: 0, offset: 0 } }
    }

    /// The ids of a leaf, checked. `ahead` is what will be asked for next.
    fn ids(&mut self, leaf: u64, at: Option<IdsAt>, ahead: impl Iterator<Item = Option<IdsAt>>) -> Result<&Ids> {
        let Some(IdsAt { place, check }) = at else { return Ok(&NO_IDS) };
        if self.frame(place).is_none() {
            self.read(place, ahead)?;
        }
        let (_, tag) = self.reader.file_of(place.slot)?;
        let storage = self.reader.storage(place.slot)?;
        let expected = leaf_page_expected(FrameKind::Ids, leaf, tag, check);
        let payload = frame::confirm(storage.as_ref(), place.offset, &expected, self.frame(place).unwrap_or_default())?;
        let wrong = |_| Error::corrupt(storage.label(), place.offset, "leaf page of the wrong size");
        Ids::ref_from_bytes(payload).map_err(wrong)
    }

    fn frame(&self, place: Place) -> Option<&[u8]> {
        let start = place.offset.checked_sub(self.from.offset).filter(|_| place.slot == self.from.slot)?;
        let start = usize::try_from(start).ok()?;
        self.bytes.get(start..start.checked_add(usize::try_from(FRAME_BYTES).ok()?)?)
    }

    /// Reads the frame at `place`, and with it those that follow in the file and will be asked for.
    fn read(&mut self, place: Place, ahead: impl Iterator<Item = Option<IdsAt>>) -> Result<()> {
        let mut len = FRAME_BYTES;
        for next in ahead.flatten() {
            let follows = next.place.slot == place.slot && next.place.offset == place.offset.saturating_add(len);
            if !follows || len + FRAME_BYTES > RUN_BYTES {
                break;
            }
            len += FRAME_BYTES;
        }
        let storage = self.reader.storage(place.slot)?;
        self.from = place;
        self.bytes.resize(usize::try_from(len).unwrap_or_default(), 0);
        let read = storage.read_at(place.offset, &mut self.bytes);
        if let Err(e) = read {
            // What is in the buffer is nobody's.
            self.bytes.clear();
            return Err(frame::read_error(storage.as_ref(), place.offset, len, e));
        }
        Ok(())
    }
}

/// The same for layers whose pages salvage had to make up: no reference proves anything.
fn salvaged_delta(a: &Reader, b: &Reader) -> Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    for leaf in 0..b.identity().leaves() {
        let first = leaf * LEAF_ENTRIES as u64;
        let ids_b = b.ids(leaf)?;
        let ids_a = if leaf < a.identity().leaves() { Some(a.ids(leaf)?) } else { None };
        for (index, block) in (first..b.blocks().min(first + LEAF_ENTRIES as u64)).enumerate() {
            let before = ids_a.as_ref().map_or(ZERO_ID, |ids| ids.get(index));
            let equal = before == ids_b.get(index) && before != LOST_ID && known(a, block)? && known(b, block)?;
            if !equal {
                append(&mut ranges, block_range(b, block));
            }
        }
    }
    Ok(ranges)
}

/// Whether a salvaged layer knows a block; what was never seen differs from everything.
fn known(reader: &Reader, block: u64) -> Result<bool> {
    Ok(block >= reader.blocks() || matches!(reader.entry(block)?, Entry::Zero | Entry::Data(_)))
}
