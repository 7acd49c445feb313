//! What a guest asks for: the ranges it had to wait for, what it reads first, and how long its reads take.
//!
//! Invariants
//! - Telling costs a guest's read no more than a short lock; nothing here waits.
//! - Lists are bounded: a fault that finds its list full is forgotten, the bulk copy comes by anyway.
//!
//! Not here: what is done about it (`worker`).

mod latency;
mod window;

use std::{
    collections::VecDeque,
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use self::{latency::Latencies, window::Windows};
use crate::trace::{Recorder, Trace};

/// Faults are copied in units of this, the commonest size of an encoded block.
const FAULT_BYTES: u64 = 64 << 10;
const FAULTS_MAX: usize = 256;

/// What a guest had to wait for so far, and how long its reads take now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DemandStats {
    /// Reads, or parts of them, that waited for the source.
    pub misses: u64,
    /// Bytes of those.
    pub miss_bytes: u64,
    /// How long half of the reads of the last second took at most; `None` without reads.
    pub p50: Option<Duration>,
    /// The same for 99 in a hundred.
    pub p99: Option<Duration>,
}

#[derive(Debug, Default)]
struct Lists {
    faults: VecDeque<Range<u64>>,
    neighbours: VecDeque<Range<u64>>,
    windows: Windows,
    /// How often everybody has been woken.
    wakes: u64,
}

/// A moment before which nothing that woke anybody matters: it is taken before deciding to wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen(u64);

/// Faults and latencies of one disk's guest.
#[derive(Debug)]
pub(crate) struct Demand {
    size: u64,
    lists: Mutex<Lists>,
    /// Told when there is something to take, or something else has changed.
    changed: Condvar,
    /// Told when what keeps threads from taking anything may have changed.
    allowed: Condvar,
    started: Instant,
    /// Nanoseconds after `started` until which reads count as slow.
    slow_until: AtomicU64,
    /// Reads longer than this, in nanoseconds, are slow; 0 means none is.
    target: AtomicU64,
    latencies: Latencies,
    misses: AtomicU64,
    miss_bytes: AtomicU64,
    /// Whether neighbours have been asked for that nobody has read yet.
    ahead: AtomicBool,
    recording: AtomicBool,
    recorder: Mutex<Option<Recorder>>,
}

/// Reads of the last half to whole second from which on copied bytes stay in memory.
const OFTEN_READS: u64 = 50;
/// How long one slow read holds the bulk copy back.
const SLOW_HOLD: Duration = Duration::from_millis(20);

impl Demand {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            lists: Mutex::new(Lists::default()),
            changed: Condvar::new(),
            allowed: Condvar::new(),
            started: Instant::now(),
            slow_until: AtomicU64::new(0),
            target: AtomicU64::new(0),
            latencies: Latencies::default(),
            misses: AtomicU64::new(0),
            miss_bytes: AtomicU64::new(0),
            ahead: AtomicBool::new(false),
            recording: AtomicBool::new(false),
            recorder: Mutex::new(None),
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
        if target == 0 {
            return;
        }
        let now = self.now();
        self.latencies.note(took, now);
        if took.as_nanos() > u128::from(target) {
            self.slow_until.store(now + u64::try_from(SLOW_HOLD.as_nanos()).unwrap_or(0), Ordering::Relaxed);
        }
    }

    /// How much longer guest reads count as slow.
    pub(crate) fn slow_for(&self) -> Option<Duration> {
        let left = self.slow_until.load(Ordering::Relaxed).saturating_sub(self.now());
        (left > 0).then(|| Duration::from_nanos(left))
    }

    /// Whether more than one read in a hundred of the last second took longer than the target.
    pub(crate) fn is_over_target(&self) -> bool {
        let target = Duration::from_nanos(self.target.load(Ordering::Relaxed));
        !target.is_zero() && self.latencies.quantile(99, self.now()).is_some_and(|p99| p99 > target)
    }

    /// Whether the guest reads so much that one in a hundred of its reads soon meets what has just been copied.
    pub(crate) fn is_read_often(&self) -> bool {
        self.latencies.count(self.now()) >= OFTEN_READS
    }

    /// What the guest had to wait for, and how its reads fare.
    pub(crate) fn stats(&self) -> DemandStats {
        let now = self.now();
        DemandStats {
            misses: self.misses.load(Ordering::Relaxed),
            miss_bytes: self.miss_bytes.load(Ordering::Relaxed),
            p50: self.latencies.quantile(50, now),
            p99: self.latencies.quantile(99, now),
        }
    }

    /// Notes that the guest read a range that was absent: it, and what probably comes next, is wanted.
    pub(crate) fn note_fault(&self, offset: u64, len: u64) {
        let start = offset - offset % FAULT_BYTES;
        let end = offset.saturating_add(len).next_multiple_of(FAULT_BYTES).min(self.size);
        let mut lists = self.lists.lock();
        if lists.faults.len() >= FAULTS_MAX {
            return;
        }
        lists.faults.push_back(start..end);
        let ahead = lists.windows.fault(start, end, self.size);
        lists.ask(ahead);
        self.ahead.store(true, Ordering::Relaxed);
        drop(lists);
        self.changed.notify_one();
    }

    /// Notes that a fault had to wait for the source, and how long.
    pub(crate) fn note_miss(&self, len: u64, took: Duration) {
        self.misses.fetch_add(1, Ordering::Relaxed);
        self.miss_bytes.fetch_add(len, Ordering::Relaxed);
        self.lists.lock().windows.waited(took, Instant::now());
    }

    /// Notes that the guest read a range that is local: perhaps because its neighbour was asked for.
    pub(crate) fn note_hit(&self, offset: u64, len: u64) {
        if !self.ahead.load(Ordering::Relaxed) {
            return;
        }
        // Somebody else is telling something: this hit is one of many.
        let Some(mut lists) = self.lists.try_lock() else { return };
        let ahead = lists.windows.hit(offset, offset.saturating_add(len), self.size);
        if lists.ask(ahead) {
            drop(lists);
            self.changed.notify_one();
        }
    }

    /// The oldest fault, else the oldest range that neighbours one.
    pub(crate) fn take(&self) -> Option<Range<u64>> {
        let mut lists = self.lists.lock();
        lists.faults.pop_front().or_else(|| lists.neighbours.pop_front())
    }

    /// Records what the guest reads first from now on, as a continuation of what is known.
    pub(crate) fn record_from(&self, earlier: Trace) {
        let recorder = Recorder::new(earlier, self.size);
        let goes_on = !recorder.trace().complete;
        *self.recorder.lock() = Some(recorder);
        self.recording.store(goes_on, Ordering::Release);
    }

    /// Notes that the guest reads a range that it has not written.
    pub(crate) fn record(&self, offset: u64, len: u64) {
        if !self.recording.load(Ordering::Relaxed) {
            return;
        }
        let mut recorder = self.recorder.lock();
        if !recorder.as_mut().is_some_and(|r| r.note(offset, len, Instant::now())) {
            self.recording.store(false, Ordering::Release);
        }
    }

    /// What has been recorded, if it is more than `known` bytes or recording has ended.
    pub(crate) fn recorded(&self, known: u64) -> Option<Trace> {
        let recorder = self.recorder.lock();
        let recorder = recorder.as_ref()?;
        (recorder.bytes() > known || recorder.trace().complete).then(|| recorder.trace().clone())
    }

    /// What to hand to [`Demand::wait`] or [`Demand::hold`], from before what they depend on was looked at.
    pub(crate) fn seen(&self) -> Seen {
        Seen(self.lists.lock().wakes)
    }

    /// Waits for a fault, for a [`Demand::wake`] after `seen` or for `limit`.
    pub(crate) fn wait(&self, seen: Seen, limit: Duration) {
        let mut lists = self.lists.lock();
        if lists.wakes == seen.0 && lists.faults.is_empty() && lists.neighbours.is_empty() {
            self.changed.wait_for(&mut lists, limit);
        }
    }

    /// Waits for a [`Demand::wake`] after `seen` or for `limit`, whatever faults there are: for who may not take them now.
    pub(crate) fn hold(&self, seen: Seen, limit: Duration) {
        let mut lists = self.lists.lock();
        if lists.wakes == seen.0 {
            self.allowed.wait_for(&mut lists, limit);
        }
    }

    /// Wakes everybody who waits, and who has decided to.
    pub(crate) fn wake(&self) {
        // Whoever waits looks at the count under this lock, so none can miss it in between.
        let mut lists = self.lists.lock();
        lists.wakes = lists.wakes.wrapping_add(1);
        self.changed.notify_all();
        self.allowed.notify_all();
    }
}

impl Lists {
    /// Adds a neighbour; `true` if there is one and there was room.
    fn ask(&mut self, ahead: Range<u64>) -> bool {
        let wanted = !ahead.is_empty() && self.neighbours.len() < FAULTS_MAX;
        if wanted {
            self.neighbours.push_back(ahead);
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_come_before_neighbours_and_lists_stay_short() {
        let demand = Demand::new(1 << 40);
        for fault in 0..10_000u64 {
            demand.note_fault(fault * 977 * (1 << 20) % (1 << 40), 4096);
        }
        assert_eq!(demand.take(), Some(0..FAULT_BYTES));
        let mut taken = 1;
        while let Some(range) = demand.take() {
            assert!(range.end - range.start <= window::START_BYTES_MAX);
            taken += 1;
        }
        assert!(taken <= 2 * FAULTS_MAX);
    }

    #[test]
    fn who_may_not_take_a_fault_is_not_kept_awake_by_it() {
        let demand = Demand::new(1 << 30);
        demand.note_fault(0, 4096);
        let began = Instant::now();
        demand.wait(demand.seen(), Duration::from_secs(60));
        assert!(began.elapsed() < Duration::from_secs(30), "there is something to take");
        let began = Instant::now();
        demand.hold(demand.seen(), Duration::from_millis(50));
        assert!(began.elapsed() >= Duration::from_millis(40), "there is nothing to do");
    }

    #[test]
    fn who_is_woken_between_deciding_to_wait_and_waiting_does_not_wait() {
        let demand = Demand::new(1 << 30);
        let seen = demand.seen();
        demand.wake();
        let began = Instant::now();
        demand.hold(seen, Duration::from_secs(60));
        demand.wait(seen, Duration::from_secs(60));
        assert!(began.elapsed() < Duration::from_secs(30), "it has been woken");
    }

    #[test]
    fn only_reads_beyond_the_target_are_slow() {
        let demand = Demand::new(1 << 20);
        demand.note_read(Duration::from_secs(1));
        assert!(demand.slow_for().is_none(), "no target, no slow read");
        demand.set_target(Some(Duration::from_millis(5)));
        demand.note_read(Duration::from_millis(4));
        assert!(demand.slow_for().is_none() && !demand.is_over_target());
        demand.note_read(Duration::from_millis(9));
        assert!(demand.slow_for().is_some() && demand.is_over_target());
        for _ in 0..200 {
            demand.note_read(Duration::from_millis(1));
        }
        assert!(!demand.is_over_target(), "one in two hundred");
        let stats = demand.stats();
        assert!(stats.p50 <= stats.p99 && stats.p99 < Some(Duration::from_millis(5)), "{stats:?}");
    }

    #[test]
    fn a_miss_is_counted_and_a_recording_is_asked_for_once_it_has_grown() {
        let demand = Demand::new(1 << 30);
        demand.note_miss(4096, Duration::from_millis(20));
        assert_eq!((demand.stats().misses, demand.stats().miss_bytes), (1, 4096));
        demand.record(0, 4096);
        assert_eq!(demand.recorded(0), None, "nobody asked");
        demand.record_from(Trace::default());
        assert_eq!(demand.recorded(0), None);
        demand.record(8192, 4096);
        assert_eq!(demand.recorded(0).map(|t| t.steps.len()), Some(1));
        assert_eq!(demand.recorded(4096), None, "nothing new");
    }
}
