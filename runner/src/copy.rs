//! The one bulk mover: reads what a disk holds, several ranges at a time, and hands it to a sink.
//!
//! Invariants
//! - Each range of data is handed over exactly once; [`copy`] never hands over what reads as zeros, [`sweep`] hands it
//!   over as such.
//! - The first error ends the copy, whichever thread met it; so does a wish to stop.
//! - Memory: [`PIECE_BYTES`] per reader and a queue of twice as many ranges, whatever the disk's size.
//!
//! Not here: where the bytes go, durability, which disk.

use std::{
    num::NonZero,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use aquifer_vdisk::{Delta, Disk, Extent, ExtentKind};
use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use crate::{
    fail::{Code, Fail, Result},
    output::Progress,
    stop::Stop,
};

/// Longest range read at once, bytes.
pub const PIECE_BYTES: u64 = 1 << 20;

/// The map is asked for this much of the disk at a time, bytes.
const WINDOW_BYTES: u64 = 4 << 30;

/// Zeros inside data are looked for in units of this many bytes.
const GRAIN_BYTES: usize = 4096;

/// Takes a piece at its place on the disk; called from several threads.
pub type Sink<'a> = &'a (dyn Fn(u64, &[u8]) -> Result<()> + Sync);

/// What a copy moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes read from the disk.
    pub read: u64,
    /// Of these, bytes that were not zero and reached the sink.
    pub moved: u64,
}

/// Calls `each` with every range of data of a disk, in order. Reads no data.
///
/// # Errors
/// The first one of the disk or of `each`; the interruption, if this process listens for signals.
pub fn each_data_range(disk: &Disk, mut each: impl FnMut(Extent) -> Result<()>) -> Result<()> {
    let stop = Stop::of_process();
    let mut extents = Vec::new();
    let mut at = 0;
    while at < disk.size() {
        // A disk of nothing but zeros may be of any size.
        stop.check()?;
        let len = WINDOW_BYTES.min(disk.size() - at);
        extents.clear();
        disk.extents(at, len, &mut extents)?;
        for extent in extents.iter().filter(|e| e.kind == ExtentKind::Data) {
            each(*extent)?;
        }
        at += len;
    }
    Ok(())
}

/// Bytes of a disk that are data, by its map.
pub fn used_bytes(disk: &Disk) -> Result<u64> {
    let mut used = 0u64;
    each_data_range(disk, |extent| {
        used += extent.len;
        Ok(())
    })?;
    Ok(used)
}

/// Copies everything a disk holds into `sink`.
///
/// # Errors
/// The first one of the disk or the sink; the interruption.
pub fn copy(disk: &Disk, sink: Sink<'_>, stop: Stop, progress: &Progress<'_>) -> Result<Copied> {
    let readers = thread::available_parallelism().map_or(2, NonZero::get).clamp(2, 16);
    let (send, receive) = bounded::<(u64, u64)>(readers * 2);
    let shared = Shared {
        disk,
        sink,
        progress,
        failed: AtomicBool::new(false),
        failure: Mutex::new(None),
        read: AtomicU64::new(0),
        moved: AtomicU64::new(0),
    };
    thread::scope(|scope| {
        for _ in 0..readers {
            let receive = receive.clone();
            let shared = &shared;
            scope.spawn(move || shared.serve(&receive));
        }
        drop(receive);
        if let Err(fail) = deal(&shared, &send, stop) {
            shared.fail(fail);
        }
        drop(send);
    });
    match shared.failure.into_inner() {
        Some(fail) => Err(fail),
        None => Ok(Copied { read: shared.read.into_inner(), moved: shared.moved.into_inner() }),
    }
}

/// What a sweep read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Bytes.
    pub read: u64,
    /// Time that reading them took, of all readers together.
    pub reading: Duration,
}

/// A piece of a disk.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Bytes that were read.
    Bytes(&'a [u8]),
    /// So many zeros, known from the map.
    Zeros(u64),
}

/// Takes pieces of a sweep; called from several threads.
pub type Taker<'a> = &'a (dyn Fn(u64, Piece<'_>) -> Result<()> + Sync);

/// Hands `ranges` of a disk to `taker`, all of them: what is data in pieces of at most [`PIECE_BYTES`] that no multiple
/// of it cuts in two, what is zeros unread. Data is rounded out to blocks of `block` bytes, a power of two that is not
/// larger than a piece, as far as the ranges have them. Answers how many bytes were read, and how long that took all
/// readers together.
///
/// # Errors
/// The first one of the disk or the taker.
pub fn sweep(disk: &Disk, ranges: &Delta, block: u64, taker: Taker<'_>) -> Result<Swept> {
    let readers = thread::available_parallelism().map_or(2, NonZero::get).clamp(2, 16);
    let (send, receive) = bounded::<(u64, u64, ExtentKind)>(readers * 2);
    let (failure, failed, read) = (Mutex::new(None::<Fail>), AtomicBool::new(false), AtomicU64::new(0));
    let reading = AtomicU64::new(0);
    let fail = |fail: Fail| {
        failure.lock().get_or_insert(fail);
        failed.store(true, Ordering::Relaxed);
    };
    thread::scope(|scope| {
        for _ in 0..readers {
            let receive = receive.clone();
            let (fail, failed, read, reading) = (&fail, &failed, &read, &reading);
            scope.spawn(move || {
                let mut buffer = Vec::new();
                for (offset, len, kind) in receive {
                    if failed.load(Ordering::Relaxed) {
                        continue;
                    }
                    let taken = match kind {
                        ExtentKind::Data => {
                            buffer.resize(usize::try_from(len).unwrap_or_default(), 0);
                            read.fetch_add(len, Ordering::Relaxed);
                            let began = Instant::now();
                            let bytes = disk.read(offset, &mut buffer);
                            let nanos = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
                            reading.fetch_add(nanos, Ordering::Relaxed);
                            bytes.map_err(Fail::from).and_then(|()| taker(offset, Piece::Bytes(&buffer)))
                        }
                        ExtentKind::Zero | ExtentKind::Hole => taker(offset, Piece::Zeros(len)),
                    };
                    taken.unwrap_or_else(fail);
                }
            });
        }
        drop(receive);
        if let Err(error) = deal_sweep(disk, ranges, block, &send, &failed) {
            fail(error);
        }
        drop(send);
    });
    match failure.into_inner() {
        Some(fail) => Err(fail),
        None => Ok(Swept { read: read.into_inner(), reading: Duration::from_nanos(reading.into_inner()) }),
    }
}

fn deal_sweep(
    disk: &Disk,
    ranges: &Delta,
    block: u64,
    send: &Sender<(u64, u64, ExtentKind)>,
    failed: &AtomicBool,
) -> Result<()> {
    let mut extents = Vec::new();
    let windows = ranges.iter().flat_map(|range| {
        let starts = (range.start..range.end).step_by(usize::try_from(WINDOW_BYTES).unwrap_or(usize::MAX));
        starts.map(move |at| at..range.end.min(at.saturating_add(WINDOW_BYTES)))
    });
    for window in windows {
        extents.clear();
        disk.extents(window.start, window.end - window.start, &mut extents)?;
        let data = extents.iter().filter(|e| e.kind == ExtentKind::Data).map(|e| e.offset..e.offset + e.len);
        let data = data.collect::<Delta>().round_out(block).clip(window.clone());
        let zeros = std::iter::once(window).collect::<Delta>().subtract(&data);
        let all = data.iter().map(|r| (r, ExtentKind::Data)).chain(zeros.iter().map(|r| (r, ExtentKind::Zero)));
        for (range, kind) in all {
            let mut at = range.start;
            while at < range.end {
                let end = match kind {
                    ExtentKind::Data => ((at / PIECE_BYTES + 1) * PIECE_BYTES).min(range.end),
                    ExtentKind::Zero | ExtentKind::Hole => range.end,
                };
                if failed.load(Ordering::Relaxed) || send.send((at, end - at, kind)).is_err() {
                    return Err(Fail::new(Code::Failed, "the copy was ended by another reader's failure"));
                }
                at = end;
            }
        }
    }
    Ok(())
}

struct Shared<'a, 'o> {
    disk: &'a Disk,
    sink: Sink<'a>,
    progress: &'a Progress<'o>,
    failed: AtomicBool,
    failure: Mutex<Option<Fail>>,
    read: AtomicU64,
    moved: AtomicU64,
}

/// Cuts the data of the disk into pieces at piece boundaries, so that a block of any format is
/// decoded by one reader.
fn deal(shared: &Shared<'_, '_>, send: &Sender<(u64, u64)>, stop: Stop) -> Result<()> {
    each_data_range(shared.disk, |extent| {
        let (mut at, end) = (extent.offset, extent.offset + extent.len);
        while at < end {
            stop.check()?;
            let boundary = (at / PIECE_BYTES + 1) * PIECE_BYTES;
            let len = boundary.min(end) - at;
            if shared.failed.load(Ordering::Relaxed) || send.send((at, len)).is_err() {
                return Err(Fail::new(Code::Failed, "the copy was ended by another reader's failure"));
            }
            at += len;
        }
        Ok(())
    })
}

impl Shared<'_, '_> {
    /// Keeps the first failure: later ones follow from it.
    fn fail(&self, fail: Fail) {
        self.failure.lock().get_or_insert(fail);
        self.failed.store(true, Ordering::Relaxed);
    }

    fn serve(&self, receive: &Receiver<(u64, u64)>) {
        let mut buffer = Vec::new();
        // A failed copy goes on taking ranges, so that whoever deals them never waits for nobody.
        for (offset, len) in receive {
            if self.failed.load(Ordering::Relaxed) {
                continue;
            }
            if let Err(fail) = self.piece(offset, len, &mut buffer) {
                self.fail(fail);
            }
        }
    }

    fn piece(&self, offset: u64, len: u64, buffer: &mut Vec<u8>) -> Result<()> {
        let bytes = usize::try_from(len).map_err(|_| Fail::new(Code::Bug, "a piece is too long"))?;
        buffer.resize(bytes, 0);
        self.disk.read(offset, buffer)?;
        let mut at = 0;
        while let Some(run) = next_run(buffer, at) {
            (self.sink)(offset + run.start as u64, buffer.get(run.clone()).unwrap_or_default())?;
            self.moved.fetch_add(run.len() as u64, Ordering::Relaxed);
            at = run.end;
        }
        self.read.fetch_add(len, Ordering::Relaxed);
        self.progress.add(len);
        Ok(())
    }
}

/// The next run of grains that are not all zero, from `at` on.
fn next_run(bytes: &[u8], at: usize) -> Option<std::ops::Range<usize>> {
    let is_zero = |from: usize| {
        let grain = bytes.get(from..bytes.len().min(from + GRAIN_BYTES)).unwrap_or_default();
        is_zero_bytes(grain)
    };
    let mut start = at;
    while start < bytes.len() && is_zero(start) {
        start += GRAIN_BYTES;
    }
    if start >= bytes.len() {
        return None;
    }
    let mut end = start;
    while end < bytes.len() && !is_zero(end) {
        end += GRAIN_BYTES;
    }
    Some(start..end.min(bytes.len()))
}

/// Whether all bytes are zero; a chunked fold that compiles to wide loads.
pub(crate) fn is_zero_bytes(bytes: &[u8]) -> bool {
    let mut chunks = bytes.chunks_exact(64);
    chunks.by_ref().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && chunks.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use aquifer_formats::{raw::RawLayer, storage::MemoryStorage};
    use aquifer_vdisk::{BlockCache, Chain};

    use super::*;
    use crate::output::{Form, Output};

    fn disk(bytes: Vec<u8>) -> Disk {
        let layer = RawLayer::open(Arc::new(MemoryStorage::new("m", bytes))).expect("open");
        let chain = Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("chain");
        Disk::read_only("d", Arc::new(chain))
    }

    #[test]
    fn everything_that_is_not_zero_arrives_once() {
        let mut bytes = vec![0u8; 5_000_003];
        for (at, byte) in bytes.iter_mut().enumerate().filter(|(at, _)| at / 10_000 % 3 == 0) {
            *byte = u8::try_from(at % 255).expect("small") + 1;
        }
        let target = Mutex::new(vec![0u8; bytes.len()]);
        let sink = |offset: u64, piece: &[u8]| {
            let mut target = target.lock();
            let slot = &mut target[usize::try_from(offset).expect("small")..][..piece.len()];
            assert!(slot.iter().all(|b| *b == 0), "a range arrived twice");
            slot.copy_from_slice(piece);
            Ok(())
        };
        let out = Output::new(Form::Json, "export").quiet(true);
        let stop = Stop::listen().expect("signals");
        let copied = copy(&disk(bytes.clone()), &sink, stop, &out.progress("copy", None)).expect("copy");
        assert_eq!(*target.lock(), bytes);
        assert_eq!(copied.read, bytes.len() as u64);
        assert!(copied.moved < copied.read);
    }

    #[test]
    fn a_sweep_hands_over_every_byte_of_its_ranges_once() {
        let mut bytes = vec![0u8; 9_000_003];
        for (at, byte) in bytes.iter_mut().enumerate().filter(|(at, _)| at / 300_000 % 4 == 0) {
            *byte = u8::try_from(at % 255).expect("small") + 1;
        }
        let ranges: Delta = [0..65536, 131_072..5_000_000, 8_999_936..9_000_003].into_iter().collect();
        let seen = Mutex::new(Delta::new());
        let taker = |offset: u64, piece: Piece<'_>| {
            let at = usize::try_from(offset).expect("small");
            let len = match piece {
                Piece::Bytes(got) => {
                    assert_eq!(got, &bytes[at..at + got.len()]);
                    assert!(got.len() as u64 <= PIECE_BYTES);
                    got.len() as u64
                }
                Piece::Zeros(len) => {
                    assert!(is_zero_bytes(&bytes[at..at + usize::try_from(len).expect("small")]));
                    len
                }
            };
            let mut seen = seen.lock();
            assert!(!seen.overlaps(&(offset..offset + len)), "handed over twice");
            seen.insert(offset..offset + len);
            Ok(())
        };
        let read = sweep(&disk(bytes.clone()), &ranges, 65536, &taker).expect("sweep");
        assert_eq!(*seen.lock(), ranges);
        assert!(read.read <= ranges.bytes());
        let fail = sweep(&disk(bytes.clone()), &ranges, 65536, &|_, _| Err(Fail::new(Code::Capacity, "full")));
        assert_eq!(fail.expect_err("it fails").code, Code::Capacity);
    }

    #[test]
    fn the_first_failure_ends_the_copy() {
        let sink = |offset: u64, _: &[u8]| match offset {
            0 => Ok(()),
            _ => Err(Fail::new(Code::Capacity, "full")),
        };
        let out = Output::new(Form::Json, "export").quiet(true);
        let stop = Stop::listen().expect("signals");
        let disk = disk(vec![1; 20 << 20]);
        let fail = copy(&disk, &sink, stop, &out.progress("copy", None)).expect_err("it fails");
        assert_eq!(fail.code, Code::Capacity);
    }

    #[test]
    fn runs_are_cut_at_grains() {
        let mut bytes = vec![0u8; 4096 * 4 + 100];
        bytes[4096 + 7] = 1;
        bytes[4096 * 4 + 99] = 1;
        assert_eq!(next_run(&bytes, 0), Some(4096..8192));
        assert_eq!(next_run(&bytes, 8192), Some(4096 * 4..4096 * 4 + 100));
        assert_eq!(next_run(&bytes, bytes.len()), None);
        assert_eq!(next_run(&[], 0), None);
    }
}
