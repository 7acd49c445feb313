//! Reads everything a disk holds and lists what cannot be read.
//!
//! Invariants
//! - Damage is listed once per stored place, with the ranges of the disk it costs, and ends nothing.
//! - What is not damage (a source that went away, no access) ends the scan: it would look like damage
//!   of everything that follows.

use std::{collections::BTreeMap, num::NonZero, ops::Range, thread};

use aquifer_vdisk::{Disk, Extent};
use crossbeam_channel::{Sender, bounded};
use parking_lot::Mutex;

use super::{Checked, Keeper, Lost, memory::Front};
use crate::{
    copy,
    fail::{Code, Fail, Result},
    output::Progress,
    stop::Stop,
};

/// Longest range read at once, bytes.
const PIECE_BYTES: u64 = 1 << 20;

/// A piece that fails is read again in parts of this many bytes, to say what is lost.
const PART_BYTES: u64 = 64 << 10;

/// What was found, by file and offset.
#[derive(Debug, Default)]
pub(super) struct Found(BTreeMap<(String, u64), Lost>);

impl Found {
    /// What an earlier run has found.
    pub(super) fn of(damage: Vec<Lost>) -> Self {
        let mut found = Self::default();
        for lost in damage {
            for range in &lost.ranges {
                found.note(lost.fail.clone(), range.clone());
            }
        }
        found
    }

    /// A range of the disk cannot be read.
    pub(super) fn note(&mut self, fail: Fail, range: Range<u64>) {
        let at = fail.at.clone().unwrap_or_default();
        let lost = self.0.entry((at.path, at.offset.unwrap_or_default()));
        let lost = lost.or_insert_with(|| Lost { fail, ranges: Vec::new() });
        match lost.ranges.last_mut().filter(|last| last.end == range.start) {
            Some(last) => last.end = range.end,
            None if range.is_empty() => {}
            None => lost.ranges.push(range),
        }
    }

    /// All of it, by file and offset, the ranges in order.
    pub(super) fn list(&self) -> Vec<Lost> {
        let mut list: Vec<Lost> = self.0.values().cloned().collect();
        for lost in &mut list {
            lost.ranges = merged(std::mem::take(&mut lost.ranges));
        }
        list
    }
}

/// Ranges in order, touching ones as one.
pub(super) fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut().filter(|last| last.end >= range.start) {
            Some(last) => last.end = last.end.max(range.end),
            None => out.push(range),
        }
    }
    out
}

/// Whether reading again cannot help: the stored bytes are wrong.
fn is_damage(code: Code) -> bool {
    matches!(code, Code::BlockCorrupt | Code::Corrupt | Code::Truncated | Code::ChainBroken)
}

struct Shared<'a> {
    disk: &'a Disk,
    found: Mutex<Found>,
    failure: Mutex<Option<Fail>>,
}

/// A piece of the disk; pieces are counted in their order.
struct Piece {
    step: u64,
    range: Range<u64>,
}

/// Reads all data of `disk`, from where an earlier run has ended.
///
/// # Errors
/// Whatever is not damage, and the interruption.
pub(super) fn check(disk: &Disk, keeper: &mut Keeper<'_>) -> Result<Checked> {
    let before = std::mem::take(&mut keeper.before);
    let used = copy::used_bytes(disk)?;
    let progress = keeper.context.out.progress("verify", Some(used));
    progress.set(before.bytes);
    let (first, from) = (before.steps, before.below);
    let shared = Shared { disk, found: Mutex::new(Found::of(before.damage())), failure: Mutex::default() };
    let front = Front::from(before);
    let readers = thread::available_parallelism().map_or(2, NonZero::get).clamp(2, 16);
    let outcome = thread::scope(|scope| {
        let (send, receive) = bounded::<Piece>(readers * 2);
        for _ in 0..readers {
            let (receive, shared, progress, front, keeper) = (receive.clone(), &shared, &progress, &front, &*keeper);
            scope.spawn(move || {
                for piece in receive {
                    shared.serve(&piece, front, progress);
                    if front.is_due() {
                        keeper.keep(&front.now(), &shared.found.lock().list());
                    }
                }
            });
        }
        drop(receive);
        let mut step = first;
        copy::each_data_range(disk, |extent| deal(&shared, &send, extent, from, &mut step, keeper.stop))
    });
    drop(progress);
    let (done, damage) = (front.now(), shared.found.into_inner().list());
    keeper.keep(&done, &damage);
    outcome?;
    match shared.failure.into_inner() {
        Some(fail) => Err(fail),
        None => Ok(Checked { size: disk.size(), bytes: done.bytes, damage }),
    }
}

/// Deals an extent out to the readers in pieces; what lies before `from` was read before.
fn deal(
    shared: &Shared<'_>,
    send: &Sender<Piece>,
    extent: Extent,
    from: u64,
    step: &mut u64,
    stop: Stop,
) -> Result<()> {
    let (mut at, end) = (extent.offset.max(from), extent.offset + extent.len);
    while at < end {
        stop.check()?;
        if let Some(fail) = shared.failure.lock().clone() {
            return Err(fail);
        }
        let until = ((at / PIECE_BYTES + 1) * PIECE_BYTES).min(end);
        if send.send(Piece { step: *step, range: at..until }).is_err() {
            return Err(Fail::new(Code::Bug, "the readers of a scan have ended"));
        }
        *step += 1;
        at = until;
    }
    Ok(())
}

impl Shared<'_> {
    fn serve(&self, piece: &Piece, front: &Front, progress: &Progress<'_>) {
        let Range { start, end } = piece.range;
        let mut buffer = vec![0; usize::try_from(end - start).unwrap_or_default()];
        let read = self.disk.read(start, &mut buffer).is_ok() || self.read_parts(start, end);
        if read {
            progress.add(end - start);
            front.done(piece.step, end, end - start);
        }
    }

    /// Reads a piece part by part: each part's own error is the one that counts. Whether all of it was read
    /// or is damaged.
    fn read_parts(&self, mut at: u64, end: u64) -> bool {
        while at < end {
            let until = ((at / PART_BYTES + 1) * PART_BYTES).min(end);
            let mut buffer = vec![0; usize::try_from(until - at).unwrap_or_default()];
            if let Err(error) = self.disk.read(at, &mut buffer) {
                let fail = Fail::from(error);
                if !is_damage(fail.code) {
                    self.failure.lock().get_or_insert(fail);
                    return false;
                }
                self.found.lock().note(fail, at..until);
            }
            at = until;
        }
        true
    }
}
