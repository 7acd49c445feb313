//! What a guest asks for: the ranges it had to wait for, and how long its reads take.
//!
//! Invariants
//! - Telling costs a guest's read no more than a short lock; nothing here waits.
//! - Lists are bounded: a fault that finds its list full is forgotten, the bulk copy comes by anyway.
//!
//! Not here: what is done about it (`worker`).

use std::{
    collections::VecDeque,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// Faults are copied in units of this, the commonest size of an encoded block.
const FAULT_BYTES: u64 = 64 << 10;
const WINDOW_BYTES_MIN: u64 = 128 << 10;
const WINDOW_BYTES_MAX: u64 = 8 << 20;
const FAULTS_MAX: usize = 256;
const STREAMS: usize = 8;
const TRACE_MAX: usize = 65_536;

/// A run of faults that follow one another.
#[derive(Clone, Debug)]
struct Stream {
    /// Where the next fault of the run would be.
    next: u64,
    /// How far ahead has been asked for.
    asked: u64,
    window: u64,
}

#[derive(Debug, Default)]
struct Lists {
    faults: VecDeque<Range<u64>>,
    neighbours: VecDeque<Range<u64>>,
    streams: VecDeque<Stream>,
    trace: Vec<Range<u64>>,
}

/// Faults and latencies of one disk's guest.
#[derive(Debug)]
pub(crate) struct Demand {
    size: u64,
    lists: Mutex<Lists>,
    /// Told when there is something to take, or something else has changed.
    changed: Condvar,
    started: Instant,
    /// Nanoseconds after `started` until which reads count as slow.
    slow_until: AtomicU64,
    /// Reads longer than this, in nanoseconds, are slow; 0 means none is.
    target: AtomicU64,
}

/// How long one slow read holds the bulk copy back.
const SLOW_HOLD: Duration = Duration::from_millis(20);

impl Demand {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            lists: Mutex::new(Lists::default()),
            changed: Condvar::new(),
            started: Instant::now(),
            slow_until: AtomicU64::new(0),
            target: AtomicU64::new(0),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Sets from which length on a guest's read is slow.
    pub(crate) fn set_target(&self, target: Option<Duration>) {
        let nanos = target.map_or(0, |t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX));
        self.target.store(nanos, Ordering::Relaxed);
    }

    /// Whether anybody wants to know how long reads take.
    pub(crate) fn is_timed(&self) -> bool {
        self.target.load(Ordering::Relaxed) > 0
    }

    /// Notes how long a guest's read took.
    pub(crate) fn note_read(&self, took: Duration) {
        let target = self.target.load(Ordering::Relaxed);
        if target > 0 && took.as_nanos() > u128::from(target) {
            self.slow_until.store(self.now() + u64::try_from(SLOW_HOLD.as_nanos()).unwrap_or(0), Ordering::Relaxed);
        }
    }

    /// How much longer guest reads count as slow.
    pub(crate) fn slow_for(&self) -> Option<Duration> {
        let left = self.slow_until.load(Ordering::Relaxed).saturating_sub(self.now());
        (left > 0).then(|| Duration::from_nanos(left))
    }

    /// Notes that the guest waited for a range: it, and what probably comes next, is wanted.
    pub(crate) fn note_fault(&self, offset: u64, len: u64) {
        let start = offset - offset % FAULT_BYTES;
        let end = offset.saturating_add(len).next_multiple_of(FAULT_BYTES).min(self.size);
        let mut lists = self.lists.lock();
        if lists.faults.len() >= FAULTS_MAX {
            return;
        }
        lists.faults.push_back(start..end);
        if lists.trace.len() < TRACE_MAX {
            lists.trace.push(start..end);
        }
        let ahead = lists.ahead(start, end, self.size);
        if !ahead.is_empty() && lists.neighbours.len() < FAULTS_MAX {
            lists.neighbours.push_back(ahead);
        }
        drop(lists);
        self.changed.notify_one();
    }

    /// The oldest fault, else the oldest range that neighbours one.
    pub(crate) fn take(&self) -> Option<Range<u64>> {
        let mut lists = self.lists.lock();
        lists.faults.pop_front().or_else(|| lists.neighbours.pop_front())
    }

    /// Where the guest has faulted so far, in order: what to replay at the machine's next recovery.
    pub(crate) fn trace(&self) -> Vec<Range<u64>> {
        self.lists.lock().trace.clone()
    }

    /// Waits for a fault, for [`Demand::wake`] or for `limit`.
    pub(crate) fn wait(&self, limit: Duration) {
        let mut lists = self.lists.lock();
        if lists.faults.is_empty() && lists.neighbours.is_empty() {
            self.changed.wait_for(&mut lists, limit);
        }
    }

    /// Wakes everybody who waits.
    pub(crate) fn wake(&self) {
        // Whoever decides to wait does so under this lock, so none can miss it in between.
        let _lists = self.lists.lock();
        self.changed.notify_all();
    }
}

impl Lists {
    /// What to read ahead after a fault at `start..end`: twice as much each time a run goes on.
    fn ahead(&mut self, start: u64, end: u64, size: u64) -> Range<u64> {
        let known = self.streams.iter().position(|s| (s.next.saturating_sub(FAULT_BYTES)..=s.asked).contains(&start));
        let mut stream = known.and_then(|at| self.streams.remove(at)).map_or(
            Stream { next: end, asked: end, window: WINDOW_BYTES_MIN / 2 },
            |s| Stream { next: end, asked: s.asked.max(end), ..s },
        );
        stream.window = (stream.window * 2).min(WINDOW_BYTES_MAX);
        let from = stream.asked;
        stream.asked = end.saturating_add(stream.window).min(size).max(from);
        let ahead = from..stream.asked;
        self.streams.push_front(stream);
        self.streams.truncate(STREAMS);
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_faults_opens_its_window() {
        let demand = Demand::new(1 << 30);
        let mut ahead = Vec::new();
        for fault in 0..4u64 {
            demand.note_fault(fault * FAULT_BYTES, 4096);
            assert_eq!(demand.take(), Some(fault * FAULT_BYTES..(fault + 1) * FAULT_BYTES));
            ahead.push(demand.take().map_or(0, |r| r.end - r.start));
        }
        let total: u64 = ahead.iter().sum();
        assert_eq!(ahead[0], WINDOW_BYTES_MIN);
        assert_eq!(total, 3 * FAULT_BYTES + 8 * WINDOW_BYTES_MIN, "{ahead:?}");
    }

    #[test]
    fn lone_faults_ask_for_little_and_lists_stay_short() {
        let demand = Demand::new(1 << 40);
        for fault in 0..10_000u64 {
            demand.note_fault(fault * 977 * (1 << 20) % (1 << 40), 4096);
        }
        let mut taken = 0;
        while let Some(range) = demand.take() {
            assert!(range.end - range.start <= WINDOW_BYTES_MIN);
            taken += 1;
        }
        assert!(taken <= 2 * FAULTS_MAX);
    }

    #[test]
    fn only_reads_beyond_the_target_are_slow() {
        let demand = Demand::new(1 << 20);
        demand.note_read(Duration::from_secs(1));
        assert!(demand.slow_for().is_none(), "no target, no slow read");
        demand.set_target(Some(Duration::from_millis(5)));
        demand.note_read(Duration::from_millis(4));
        assert!(demand.slow_for().is_none());
        demand.note_read(Duration::from_millis(6));
        assert!(demand.slow_for().is_some());
    }
}
