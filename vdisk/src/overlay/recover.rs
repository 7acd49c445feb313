//! What an overlay finds when it is opened: marks, then the journal on top.
//!
//! Invariants
//! - For each block the last entry counts; bytes of an earlier one are not replayed over a later mark.
//! - Bytes go to `disk.raw`, sync, marks to `map`, sync; only then is the journal written again. A crash
//!   in between leaves everything to be found again.
//! - Nothing is written if anything is damaged.
//!
//! Not here: the formats of the files.

use std::collections::BTreeMap;

use aquifer_formats::{
    Error as FormatError,
    planted::{Bug, planted},
};

use super::{
    LocalProgress, OverlayFiles, OverlayOf, OverlayOptions,
    core::{Core, in_region, region_of},
    failure::io_failed,
    journal::{Journal, Record},
    layout::{ENTRY_DATA, ENTRY_IN_PLACE, ENTRY_TRIMMED},
    mapfile::{MapFile, page_of},
    region::{BlockState, Line, OVERLAY_BLOCK_BYTES, REGION_BLOCKS},
};
use crate::{Result, sync::Ordering};

/// What the files say, before anything is written.
#[derive(Default)]
struct Found {
    lines: BTreeMap<u32, Line>,
    /// Block -> where in the journal its bytes are.
    bytes: BTreeMap<u64, u64>,
    /// Map pages that differ from what is in the file.
    dirty: Vec<u32>,
}

impl Found {
    fn apply(&mut self, record: &Record, files: &OverlayFiles, blocks: u64) -> Result<()> {
        for (entry, page_at) in &record.entries {
            let (first, count) = (entry.block(), u64::from(entry.count.get()));
            let state = match entry.kind() {
                ENTRY_DATA if count == 1 => BlockState::Written,
                ENTRY_IN_PLACE => BlockState::Written,
                ENTRY_TRIMMED => BlockState::Trimmed,
                kind => {
                    let what = format!("record {} has an entry of kind {kind} for {count} blocks", record.sequence);
                    return Err(FormatError::corrupt(files.journal.label(), 0, what).into());
                }
            };
            let Some(end) = first.checked_add(count).filter(|end| *end <= blocks) else {
                let what = format!("record {} names block {first}+{count} of {blocks}", record.sequence);
                return Err(FormatError::corrupt(files.journal.label(), 0, what).into());
            };
            self.mark(first, end, state);
            let superseded: Vec<u64> = self.bytes.range(first..end).map(|(block, _)| *block).collect();
            for block in superseded.into_iter().filter(|_| !planted(Bug::ReplayOlderBytes)) {
                self.bytes.remove(&block);
            }
            if entry.kind() == ENTRY_DATA {
                self.bytes.insert(first, *page_at);
            }
        }
        Ok(())
    }

    fn mark(&mut self, first: u64, end: u64, state: BlockState) {
        let mut block = first;
        while block < end {
            let region = region_of(block * OVERLAY_BLOCK_BYTES);
            let next = (block - block % REGION_BLOCKS + REGION_BLOCKS).min(end);
            let line = self.lines.entry(region).or_insert_with(|| Line::uniform(BlockState::Absent));
            for at in block..next {
                line.set(in_region(at), state);
            }
            self.dirty.push(page_of(region));
            block = next;
        }
    }
}

/// Reads what the files say and writes nothing. Not for an overlay that has been handed over.
fn find(files: &OverlayFiles, of: &OverlayOf, mut map: MapFile) -> Result<(Found, MapFile, Journal)> {
    let mut found = Found::default();
    let mut repaired = Vec::new();
    let lines = &mut found.lines;
    map.load(&mut repaired, &mut |region, line| {
        lines.insert(region, line);
    })?;
    found.dirty = repaired;
    let blocks = of.size.div_ceil(OVERLAY_BLOCK_BYTES);
    let mut replay = |record: &Record| found.apply(record, files, blocks);
    let journal = Journal::open(files.journal.clone(), map.id(), map.floor(), &mut replay)?;
    Ok((found, map, journal))
}

/// How much is local by what the files say. They may be read-only.
pub(super) fn look(files: &OverlayFiles, of: &OverlayOf) -> Result<LocalProgress> {
    let map = MapFile::open(files.map.clone(), of)?;
    if map.handed_over() {
        return Ok(LocalProgress { written: of.size, ..LocalProgress::default() });
    }
    let (found, ..) = find(files, of, map)?;
    let mut out = LocalProgress { absent: of.size, ..LocalProgress::default() };
    for (region, line) in &found.lines {
        let first = u64::from(*region) * REGION_BLOCKS;
        for block in first..(first + REGION_BLOCKS).min(of.size.div_ceil(OVERLAY_BLOCK_BYTES)) {
            let len = OVERLAY_BLOCK_BYTES.min(of.size - block * OVERLAY_BLOCK_BYTES);
            let count = match line.get(in_region(block)) {
                BlockState::Absent => continue,
                BlockState::Hydrated => &mut out.hydrated,
                BlockState::Written => &mut out.written,
                BlockState::Trimmed => &mut out.trimmed,
            };
            *count += len;
            out.absent -= len;
        }
    }
    Ok(out)
}

/// Opens files that hold an overlay; on return the journal is empty.
pub(super) fn open(files: OverlayFiles, of: OverlayOf, options: OverlayOptions) -> Result<Core> {
    let map = MapFile::open(files.map.clone(), &of)?;
    check_raw(&files, &of)?;
    if map.handed_over() {
        return Ok(open_plain(files, of, options, map));
    }
    let (mut found, mut map, mut journal) = find(&files, &of, map)?;
    settle(&files, &of, &mut map, &mut journal, &mut found)?;
    let core = Core::new(files, of, options, map, journal);
    let mut trimmed = false;
    for (region, line) in &found.lines {
        core.stripe(*region).write().load(*region, *line);
        for at in 0..core.region_blocks(*region) {
            let block = u64::from(*region) * REGION_BLOCKS + at as u64;
            let len = if planted(Bug::CountsWrong) { 512 } else { core.block_len(block) as u64 };
            core.count(BlockState::Absent, line.get(at), len);
            trimmed |= line.get(at) == BlockState::Trimmed;
        }
    }
    core.unswept.store(trimmed, Ordering::Release);
    Ok(core)
}

/// Somebody else may have written `disk.raw` since the flag was set: marks and journal are history.
fn open_plain(files: OverlayFiles, of: OverlayOf, options: OverlayOptions, map: MapFile) -> Core {
    let journal = Journal::closed(files.journal.clone(), map.id());
    let core = Core::new(files, of, options, map, journal);
    core.count(BlockState::Absent, BlockState::Written, core.of.size);
    core.plain.store(true, Ordering::Release);
    core
}

fn check_raw(files: &OverlayFiles, of: &OverlayOf) -> Result<()> {
    let raw = &*files.raw;
    let len = raw.len().map_err(|e| io_failed(raw, "stat", 0, e))?;
    if len != of.size && !planted(Bug::ShortRawAccepted) {
        let what = "the disk's bytes".to_owned();
        return Err(FormatError::Truncated { path: raw.label().to_owned(), len, need: of.size, what }.into());
    }
    Ok(())
}

/// Brings home what the journal carries.
fn settle(
    files: &OverlayFiles,
    of: &OverlayOf,
    map: &mut MapFile,
    journal: &mut Journal,
    found: &mut Found,
) -> Result<()> {
    let raw = &*files.raw;
    for (block, at) in &found.bytes {
        let mut page = [0; 4096];
        journal.read_page(*at, &mut page)?;
        let start = block * OVERLAY_BLOCK_BYTES;
        let len = usize::try_from(OVERLAY_BLOCK_BYTES.min(of.size - start)).unwrap_or(0);
        let whole = page.get(..len).unwrap_or_default();
        raw.write_at(start, whole).map_err(|e| io_failed(raw, "write", start, e))?;
    }
    if !planted(Bug::RecoveryNotSynced) {
        raw.sync().map_err(|e| io_failed(raw, "sync", 0, e))?;
    }
    found.dirty.sort_unstable();
    found.dirty.dedup();
    if planted(Bug::RecoveryMarksLost) {
        found.dirty.clear();
    }
    let absent = Line::uniform(BlockState::Absent);
    journal.restart();
    let lines = &found.lines;
    map.store(journal.floor_of_all(), &found.dirty, &mut |region| lines.get(&region).copied().unwrap_or(absent))
}
