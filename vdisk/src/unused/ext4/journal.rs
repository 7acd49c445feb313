//! The journal of a file system that was not unmounted: which blocks the log holds copies of.
//!
//! The log is walked as a replay would walk it, but without checking commits: what is found is at least what a replay
//! could write.
//!
//! Invariants
//! - The walk takes no more steps than the log has blocks.
//! - A journal of another kind (external, with fast commits, of unknown features) is a doubt.
//!
//! Not here: replaying.

use super::{
    super::source::{Stop, be16, be32, ensure, le16, le32},
    Fs,
};

pub(super) const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;
const FEATURE_64BIT: u32 = 0x2;
const FEATURE_CSUM_V2: u32 = 0x8;
const FEATURE_CSUM_V3: u32 = 0x10;
/// Revoke records, 64 bits, commits that do not wait, two kinds of checksums.
const FEATURES_KNOWN: u32 = 0x1 | FEATURE_64BIT | 0x4 | FEATURE_CSUM_V2 | FEATURE_CSUM_V3;
const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;

/// Most blocks of a log: 4 GiB of the usual size.
const LOG_BLOCKS_MAX: u32 = 1 << 20;
const EXTENTS_MAX: usize = 4096;
const EXTENTS_FLAG: u32 = 0x8_0000;

/// What a log holds: (block, where its copy lies, whether the copy's first bytes were changed), by block.
#[derive(Debug, Default)]
pub(super) struct Log {
    copies: Vec<(u64, u64, bool)>,
}

impl Log {
    /// Where copies of a block lie.
    pub(super) fn copies_of(&self, block: u64) -> Vec<(u64, bool)> {
        let from = self.copies.partition_point(|(of, ..)| *of < block);
        let these = self.copies.iter().skip(from).take_while(|(of, ..)| *of == block);
        these.map(|(_, place, escaped)| (*place, *escaped)).collect()
    }
}

/// Reads the log of a file system that needs a replay.
pub(super) fn read(fs: &mut Fs<'_, '_>) -> Result<Log, Stop> {
    ensure(!fs.sb.has_fast_commits(), "its journal may hold fast commits")?;
    let extents = extents(fs)?;
    let head = fs.block(place(&extents, 0)?)?;
    let kind = be32(&head, 4);
    ensure(be32(&head, 0) == MAGIC && (kind == 3 || kind == 4), "no journal where it should be")?;
    ensure(u64::from(be32(&head, 12)) == fs.sb.block_bytes, "a journal of another block size")?;
    let (len, first, sequence, start) = (be32(&head, 16), be32(&head, 20), be32(&head, 24), be32(&head, 28));
    let features = if kind == 4 { be32(&head, 40) } else { 0 };
    ensure(be32(&head, 32) == 0, "a journal that has noted errors")?;
    ensure(features & !FEATURES_KNOWN == 0, "a journal with a feature that is not known here")?;
    if start == 0 {
        return Ok(Log::default());
    }
    let sound = len <= LOG_BLOCKS_MAX && first >= 1 && first < len && (first..len).contains(&start);
    ensure(sound, "a journal of a size nobody uses")?;
    let mut walk = Walk { extents, first, len, at: start, left: len, tags: Tags::new(features), log: Log::default() };
    walk.run(fs, sequence)?;
    walk.log.copies.sort_unstable();
    Ok(walk.log)
}

struct Walk {
    extents: Vec<(u32, u32, u64)>,
    first: u32,
    len: u32,
    /// Next block of the log.
    at: u32,
    /// Steps left.
    left: u32,
    tags: Tags,
    log: Log,
}

impl Walk {
    /// The place of the next block of the log, which goes round; `None` after as many steps as it has blocks.
    fn next(&mut self) -> Result<Option<u64>, Stop> {
        if self.left == 0 {
            return Ok(None);
        }
        let place = place(&self.extents, self.at)?;
        self.left -= 1;
        self.at = if self.at + 1 >= self.len { self.first } else { self.at + 1 };
        Ok(Some(place))
    }

    fn run(&mut self, fs: &mut Fs<'_, '_>, mut sequence: u32) -> Result<(), Stop> {
        while let Some(place) = self.next()? {
            let block = fs.block(place)?;
            if be32(&block, 0) != MAGIC || be32(&block, 8) != sequence {
                return Ok(());
            }
            match be32(&block, 4) {
                DESCRIPTOR => {
                    for (of, escaped) in self.tags.of(&block) {
                        let Some(copy) = self.next()? else { return Ok(()) };
                        self.log.copies.push((of, copy, escaped));
                    }
                }
                COMMIT => sequence = sequence.wrapping_add(1),
                REVOKE => {}
                _ => return Ok(()),
            }
        }
        Ok(())
    }
}

/// How the blocks of a transaction are listed.
struct Tags {
    bytes: usize,
    tail: usize,
    wide: bool,
    v3: bool,
}

impl Tags {
    fn new(features: u32) -> Self {
        let wide = features & FEATURE_64BIT != 0;
        let (v2, v3) = (features & FEATURE_CSUM_V2 != 0, features & FEATURE_CSUM_V3 != 0);
        let bytes = if v3 { 16 } else { 8 + if wide { 4 } else { 0 } + if v2 { 2 } else { 0 } };
        Self { bytes, tail: if v2 || v3 { 4 } else { 0 }, wide, v3 }
    }

    /// The blocks that follow a descriptor: which block each is a copy of, and whether it was escaped.
    fn of(&self, block: &[u8]) -> Vec<(u64, bool)> {
        let end = block.len().saturating_sub(self.tail);
        let mut out = Vec::new();
        let mut at = 12;
        while at + self.bytes <= end {
            let flags = if self.v3 { be32(block, at + 4) } else { u32::from(be16(block, at + 6)) };
            let high = if self.wide { u64::from(be32(block, at + 8)) } else { 0 };
            out.push((high << 32 | u64::from(be32(block, at)), flags & TAG_ESCAPED != 0));
            at += self.bytes + if flags & TAG_SAME_UUID == 0 { 16 } else { 0 };
            if flags & TAG_LAST != 0 {
                break;
            }
        }
        out
    }
}

/// Where a block of the log lies.
fn place(extents: &[(u32, u32, u64)], block: u32) -> Result<u64, Stop> {
    let next = extents.partition_point(|(first, ..)| *first <= block);
    let found = next.checked_sub(1).and_then(|at| extents.get(at)).filter(|(first, len, _)| block - first < *len);
    found.map(|(first, _, place)| place + u64::from(block - first)).ok_or(Stop::Doubt("a journal with holes"))
}

/// The journal's extents: first block of the log, count, place.
fn extents(fs: &mut Fs<'_, '_>) -> Result<Vec<(u32, u32, u64)>, Stop> {
    ensure(fs.sb.journal_inode != 0, "its journal is elsewhere")?;
    let inode = fs.inode(fs.sb.journal_inode)?;
    ensure(le32(&inode, 0x20) & EXTENTS_FLAG != 0, "a journal without extents")?;
    let mut out = Vec::new();
    // Nodes still to be read, the root first; each level must be one lower than the last, so this ends.
    let mut nodes = vec![(inode.get(0x28..0x64).unwrap_or_default().to_vec(), None)];
    while let Some((node, above)) = nodes.pop() {
        for below in children(&node, above, &mut out)? {
            ensure(nodes.len() < EXTENTS_MAX, "a journal in too many pieces")?;
            let (block, depth) = below;
            nodes.push((fs.block(block)?, Some(depth)));
        }
    }
    out.sort_unstable();
    let apart =
        out.iter().zip(out.iter().skip(1)).all(|((first, len, _), (next, ..))| first.saturating_add(*len) <= *next);
    ensure(apart, "a journal whose extents overlap")?;
    Ok(out)
}

/// Adds a leaf's extents to `out`, or returns an inner node's children with their depth.
fn children(node: &[u8], above: Option<u16>, out: &mut Vec<(u32, u32, u64)>) -> Result<Vec<(u64, u16)>, Stop> {
    let (magic, entries, depth) = (le16(node, 0), usize::from(le16(node, 2)), le16(node, 6));
    let sound = magic == 0xf30a && depth <= 5 && above.is_none_or(|above| depth + 1 == above);
    ensure(sound && 12 + entries * 12 <= node.len(), "a journal's extents are damaged")?;
    let mut below = Vec::new();
    for entry in node.get(12..12 + entries * 12).unwrap_or_default().chunks_exact(12) {
        if depth > 0 {
            below.push((u64::from(le16(entry, 8)) << 32 | u64::from(le32(entry, 4)), depth));
            continue;
        }
        let len = le16(entry, 4);
        ensure((1..=32_768).contains(&len), "a journal that was not written")?;
        ensure(out.len() < EXTENTS_MAX, "a journal in too many pieces")?;
        let place = u64::from(le16(entry, 6)) << 32 | u64::from(le32(entry, 8));
        out.push((le32(entry, 0), len.into(), place));
    }
    Ok(below)
}
