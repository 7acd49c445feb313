//! Reads everything a disk holds and lists what cannot be read.
//!
//! Invariants
//! - Damage is listed once per stored place, with the range of the disk it costs, and ends nothing.
//! - What is not damage (a source that went away, no access) ends the scan: it would look like damage
//!   of everything that follows.

use std::{collections::BTreeMap, num::NonZero, ops::Range, thread};

use aquifer_vdisk::{Disk, Extent};
use crossbeam_channel::{Sender, bounded};
use parking_lot::Mutex;

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

/// Damage of one stored place.
#[derive(Clone, Debug)]
pub(super) struct Lost {
    /// Why, with file and offset.
    pub(super) fail: Fail,
    /// Ranges of the disk that cannot be read because of it.
    pub(super) ranges: Vec<Range<u64>>,
}

/// What a scan found, by file and offset.
pub(super) type Found = BTreeMap<(String, u64), Lost>;

/// Whether reading again cannot help: the stored bytes are wrong.
fn is_damage(code: Code) -> bool {
    matches!(code, Code::BlockCorrupt | Code::Corrupt | Code::Truncated | Code::ChainBroken)
}

struct Shared<'a> {
    disk: &'a Disk,
    found: Mutex<Found>,
    failure: Mutex<Option<Fail>>,
}

/// Reads all data of `disk`.
///
/// # Errors
/// Whatever is not damage, and the interruption; both with what was found until then.
pub(super) fn scan(disk: &Disk, stop: Stop, progress: &Progress<'_>) -> (Found, Result<()>) {
    let readers = thread::available_parallelism().map_or(2, NonZero::get).clamp(2, 16);
    let shared = Shared { disk, found: Mutex::default(), failure: Mutex::default() };
    let outcome = thread::scope(|scope| {
        let (send, receive) = bounded::<(u64, u64)>(readers * 2);
        for _ in 0..readers {
            let (receive, shared) = (receive.clone(), &shared);
            scope.spawn(move || {
                for (offset, len) in receive {
                    shared.piece(offset, len);
                    progress.add(len);
                }
            });
        }
        drop(receive);
        copy::each_data_range(disk, |extent| deal(&shared, &send, extent, stop))
    });
    let failure = shared.failure.into_inner();
    (shared.found.into_inner(), outcome.and_then(|()| failure.map_or(Ok(()), Err)))
}

/// Deals an extent out to the readers in pieces.
fn deal(shared: &Shared<'_>, send: &Sender<(u64, u64)>, extent: Extent, stop: Stop) -> Result<()> {
    let (mut at, end) = (extent.offset, extent.offset + extent.len);
    while at < end {
        stop.check()?;
        if let Some(fail) = shared.failure.lock().clone() {
            return Err(fail);
        }
        let len = ((at / PIECE_BYTES + 1) * PIECE_BYTES).min(end) - at;
        if send.send((at, len)).is_err() {
            return Err(Fail::new(Code::Bug, "the readers of a scan have ended"));
        }
        at += len;
    }
    Ok(())
}

impl Shared<'_> {
    fn piece(&self, offset: u64, len: u64) {
        let mut buffer = vec![0; usize::try_from(len).unwrap_or_default()];
        if self.disk.read(offset, &mut buffer).is_err() {
            self.read_parts(offset, len);
        }
    }

    /// Reads a piece part by part: each part's own error is the one that counts.
    fn read_parts(&self, offset: u64, len: u64) {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let until = ((at / PART_BYTES + 1) * PART_BYTES).min(end);
            let mut buffer = vec![0; usize::try_from(until - at).unwrap_or_default()];
            if let Err(error) = self.disk.read(at, &mut buffer) {
                let fail = Fail::from(error);
                if !is_damage(fail.code) {
                    self.failure.lock().get_or_insert(fail);
                    return;
                }
                self.note(fail, at..until);
            }
            at = until;
        }
    }

    fn note(&self, fail: Fail, range: Range<u64>) {
        let at = fail.at.clone().unwrap_or_default();
        let mut found = self.found.lock();
        let lost = found.entry((at.path, at.offset.unwrap_or_default()));
        let lost = lost.or_insert_with(|| Lost { fail, ranges: Vec::new() });
        match lost.ranges.last_mut().filter(|last| last.end == range.start) {
            Some(last) => last.end = range.end,
            None => lost.ranges.push(range),
        }
    }
}
