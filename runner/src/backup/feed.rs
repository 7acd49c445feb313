//! Feeds a disk to the writer of its layer.
//!
//! Invariants
//! - Blocks are given in order, each once: data is read, zeros are told, what has not changed is told.
//! - The layer is marked from time to time, so that an interruption costs little.
//! - The append lease beats while there is work.

use std::time::{Duration, Instant};

use aquifer_formats::{
    aql::{Stats, Writer},
    repo::{DiskPlan, DiskWork, LEASE_TTL, Transaction},
};
use aquifer_vdisk::{Delta, Disk, Extent, ExtentKind};

use super::{Order, Pace, Wanted, changed::Look, resume::Begun};
use crate::{
    fail::Result,
    output::Progress,
    read_ahead::{Piece, Step, Taker, read_ahead},
    stop::Stop,
    tasks::{Stage, Stages},
};

/// Longest piece given at once, bytes; a multiple of every block size's.
const PIECE_BYTES: u64 = 4 << 20;

/// The map is asked for this much of the disk at a time, bytes.
const WINDOW_BYTES: u64 = 1 << 30;

/// How often the layer is made resumable.
const MARK_EVERY: Duration = Duration::from_secs(20);

/// How a disk came into the point.
pub(super) enum Fed {
    /// It was stored.
    Now(Stats),
    /// An interrupted run had stored it, from the same source.
    Before,
    /// An interrupted run had finished it, and the source may have changed since.
    Stale,
}

/// Stores a disk.
pub(super) fn feed(order: &Order<'_>, begun: &mut Begun<'_>, wanted: &Wanted, look: &Look) -> Result<Fed> {
    let same = begun.same_since.is_some();
    let plan = DiskPlan { size: wanted.disk.size(), sector_bytes: 512, full: order.full, options: begun.options };
    let mut writer = match begun.transaction.disk(&wanted.name, plan)? {
        DiskWork::Sealed if same => return Ok(Fed::Before),
        DiskWork::Sealed => return Ok(Fed::Stale),
        DiskWork::Write(writer) => *writer,
    };
    let block = writer.block_bytes() as u64;
    let from = if same { writer.resume_from() * block } else { 0 };
    let total = look.bytes(&wanted.disk)?;
    let progress = match order.ahead {
        Some(ahead) => {
            ahead(total);
            None
        }
        None => Some(order.context.out.progress(order.by, Some(total))),
    };
    let mut taker = Feeder {
        writer: &mut writer,
        transaction: &mut begun.transaction,
        progress: progress.as_ref(),
        stop: order.stop,
        pace: order.pace,
        stages: order.stages,
        block,
        marked: Instant::now(),
        beaten: Instant::now(),
    };
    let pieces = Pieces::new(&wanted.disk, look.ranges.as_ref(), from.min(wanted.disk.size()), block);
    if let Err(fail) = read_ahead(&wanted.disk, pieces, &mut taker) {
        // Only what is marked can be gone on with; if this fails too, more is read again.
        let _ = writer.mark();
        return Err(fail);
    }
    drop(progress);
    Ok(Fed::Now(writer.finish()?.stats))
}

struct Feeder<'a, 'r, 'p> {
    writer: &'a mut Writer,
    transaction: &'a mut Transaction<'r>,
    progress: Option<&'a Progress<'p>>,
    stop: Stop,
    pace: Pace<'a>,
    stages: Option<&'a Stages>,
    block: u64,
    marked: Instant,
    beaten: Instant,
}

impl Taker for Feeder<'_, '_, '_> {
    fn buffer(&mut self) -> Vec<u8> {
        self.writer.buffer()
    }

    fn waited(&mut self, time: Duration) {
        if let Some(stages) = self.stages {
            stages.add(Stage::Source, time);
        }
    }

    fn take(&mut self, piece: Piece, bytes: Option<Vec<u8>>) -> Result<()> {
        self.stop.check()?;
        let first = piece.offset / self.block;
        let blocks = first..first + piece.len.div_ceil(self.block);
        match (piece.step, bytes) {
            (Step::Read, Some(bytes)) => {
                let began = Instant::now();
                self.writer.put_buffer(first, bytes)?;
                if let Some(progress) = self.progress {
                    progress.add(piece.len);
                }
                if let Some(stages) = self.stages {
                    stages.add(Stage::Target, began.elapsed());
                }
                (self.pace)(piece.len)?;
            }
            (Step::Keep, _) => self.writer.keep(blocks)?,
            (Step::Zero | Step::Read, _) => self.writer.zero(blocks)?,
        }
        if self.marked.elapsed() >= MARK_EVERY {
            self.writer.mark()?;
            self.marked = Instant::now();
        }
        if self.beaten.elapsed() >= LEASE_TTL / 6 {
            self.transaction.beat()?;
            self.beaten = Instant::now();
        }
        Ok(())
    }
}

/// A disk cut into pieces of whole blocks: what is to be read, what is zeros, what has not changed.
struct Pieces<'a> {
    disk: &'a Disk,
    /// `None`: everything may have changed.
    changed: Option<&'a Delta>,
    block: u64,
    at: u64,
    /// Pieces of the window that were not handed out yet, last first.
    ready: Vec<Piece>,
}

impl<'a> Pieces<'a> {
    fn new(disk: &'a Disk, changed: Option<&'a Delta>, from: u64, block: u64) -> Self {
        Self { disk, changed, block, at: from, ready: Vec::new() }
    }

    /// Cuts the next window.
    fn refill(&mut self) -> Result<()> {
        let end = ((self.at / WINDOW_BYTES + 1) * WINDOW_BYTES).min(self.disk.size());
        let mut at = self.at;
        while at < end {
            let (dirty, until) = match self.changed {
                None => (true, end),
                Some(delta) => delta.run_until(at, end),
            };
            if dirty {
                self.cut_by_map(at, until)?;
            } else {
                push(&mut self.ready, Piece { offset: at, len: until - at, step: Step::Keep });
            }
            at = until;
        }
        self.ready.reverse();
        self.at = end;
        Ok(())
    }

    /// Splits a changed range into zeros and what has to be read, at block boundaries.
    fn cut_by_map(&mut self, from: u64, until: u64) -> Result<()> {
        let mut extents: Vec<Extent> = Vec::new();
        self.disk.extents(from, until - from, &mut extents)?;
        let mut at = from;
        for extent in extents.iter().filter(|extent| extent.kind == ExtentKind::Data) {
            let start = (extent.offset / self.block * self.block).max(at);
            let end = (extent.offset + extent.len).next_multiple_of(self.block).min(until);
            if start > at {
                push(&mut self.ready, Piece { offset: at, len: start - at, step: Step::Zero });
            }
            let mut piece_at = start;
            while piece_at < end {
                let boundary = ((piece_at / PIECE_BYTES + 1) * PIECE_BYTES).min(end);
                self.ready.push(Piece { offset: piece_at, len: boundary - piece_at, step: Step::Read });
                piece_at = boundary;
            }
            at = at.max(end);
        }
        if at < until {
            push(&mut self.ready, Piece { offset: at, len: until - at, step: Step::Zero });
        }
        Ok(())
    }
}

/// Appends a piece that is not read, as part of the one before where that is of its kind.
fn push(pieces: &mut Vec<Piece>, next: Piece) {
    match pieces.last_mut() {
        Some(last) if last.step == next.step && last.offset + last.len == next.offset => last.len += next.len,
        _ => pieces.push(next),
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && self.at < self.disk.size() {
            if let Err(fail) = self.refill() {
                self.at = self.disk.size();
                return Some(Err(fail));
            }
        }
        self.ready.pop().map(Ok)
    }
}

#[cfg(test)]
mod tests;
