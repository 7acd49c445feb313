//! How far to read ahead of a guest: streams of reads, each with a window that grows while it is used and shrinks when
//! it was for nothing or when the source has too much to do.
//!
//! Additive increase, multiplicative decrease: the first window of a new stream grows by a step with each stream that
//! goes on, and is halved by each that does not; a stream's own window doubles each time it is used up. When waiting
//! takes several times as long as it can, all windows are halved.
//!
//! Invariants
//! - A window never leaves its bounds, nor the disk.
//! - What is asked for is asked for once: a stream goes on where it stopped.

use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};

use super::FAULT_BYTES;

/// Bounds of the first window of a stream.
const START_BYTES_MIN: u64 = 64 << 10;
pub(super) const START_BYTES_MAX: u64 = 512 << 10;
const START_BYTES: u64 = 128 << 10;
const START_STEP: u64 = 32 << 10;
/// Largest window of a stream that goes on.
const WINDOW_BYTES_MAX: u64 = 8 << 20;
const STREAMS: usize = 8;

/// A wait this many times the shortest one, and this much more, is no longer the way to the source but a queue before it.
const CONGESTED_TIMES: u32 = 4;
const CONGESTED_MORE: Duration = Duration::from_millis(5);
/// Windows are halved once for what one queue did.
const SHRINK_EVERY: Duration = Duration::from_millis(250);

/// A run of reads that follow one another.
#[derive(Clone, Debug)]
struct Stream {
    /// Where the next read of the run would be.
    next: u64,
    /// How far ahead has been asked for.
    asked: u64,
    window: u64,
    /// Whether anything of what was asked for has been read.
    used: bool,
}

/// All streams of one guest.
#[derive(Debug)]
pub(super) struct Windows {
    streams: VecDeque<Stream>,
    start: u64,
    /// The shortest wait lately.
    shortest: Option<Duration>,
    shrunk: Option<Instant>,
}

impl Default for Windows {
    fn default() -> Self {
        Self { streams: VecDeque::new(), start: START_BYTES, shortest: None, shrunk: None }
    }
}

impl Windows {
    /// A read of `start..end` found it absent. Returns what to fetch beyond it.
    pub(super) fn fault(&mut self, start: u64, end: u64, size: u64) -> Range<u64> {
        let known = self.streams.iter().position(|s| (s.next.saturating_sub(FAULT_BYTES)..=s.asked).contains(&start));
        let stream = match known.and_then(|at| self.streams.remove(at)) {
            Some(stream) => {
                // It overtook what was asked for, or came right behind it.
                self.start = (self.start + START_STEP).min(START_BYTES_MAX);
                let window = (stream.window * 2).min(WINDOW_BYTES_MAX);
                Stream { next: end, asked: stream.asked.max(end), window, used: true }
            }
            None => Stream { next: end, asked: end, window: self.start, used: false },
        };
        self.go_on(stream, size)
    }

    /// A read of `start..end` found it local. Returns what to fetch next, which may be nothing.
    pub(super) fn hit(&mut self, start: u64, end: u64, size: u64) -> Range<u64> {
        let inside = |s: &Stream| s.next <= end && start < s.asked && end <= s.asked.saturating_add(FAULT_BYTES);
        let Some(at) = self.streams.iter().position(inside) else { return 0..0 };
        let Some(stream) = self.streams.get_mut(at) else { return 0..0 };
        if !stream.used {
            stream.used = true;
            self.start = (self.start + START_STEP).min(START_BYTES_MAX);
        }
        stream.next = end;
        if stream.asked.saturating_sub(end) > stream.window / 2 {
            return 0..0;
        }
        // Half of it is used up: the next one is on its way before the guest gets there.
        let Some(mut stream) = self.streams.remove(at) else { return 0..0 };
        stream.window = (stream.window * 2).min(WINDOW_BYTES_MAX);
        stream.asked = stream.asked.max(end);
        self.go_on(stream, size)
    }

    /// Puts a stream first, with its next window asked for.
    fn go_on(&mut self, mut stream: Stream, size: u64) -> Range<u64> {
        let from = stream.asked;
        stream.asked = stream.next.saturating_add(stream.window).min(size).max(from);
        let ahead = from..stream.asked;
        self.streams.push_front(stream);
        if self.streams.len() > STREAMS && self.streams.pop_back().is_some_and(|gone| !gone.used) {
            self.start = (self.start / 2).max(START_BYTES_MIN);
        }
        ahead
    }

    /// A read had to wait for the source this long.
    pub(super) fn waited(&mut self, took: Duration, now: Instant) {
        // Forgotten slowly: the way to the source may change.
        let shortest = self.shortest.map_or(took, |s| took.min(s + s / 64));
        self.shortest = Some(shortest);
        let congested = took > shortest * CONGESTED_TIMES + CONGESTED_MORE;
        if congested && self.shrunk.is_none_or(|at| now.saturating_duration_since(at) >= SHRINK_EVERY) {
            self.shrunk = Some(now);
            self.start = (self.start / 2).max(START_BYTES_MIN);
            self.streams.iter_mut().for_each(|s| s.window = (s.window / 2).max(START_BYTES_MIN));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn len(range: &Range<u64>) -> u64 {
        range.end - range.start
    }

    #[test]
    fn a_run_of_faults_opens_its_window_and_asks_for_each_byte_once() {
        let mut windows = Windows::default();
        let mut covered = Vec::new();
        for fault in 0..4u64 {
            let (start, end) = (fault * FAULT_BYTES, (fault + 1) * FAULT_BYTES);
            covered.push(windows.fault(start, end, GIB));
        }
        assert_eq!(len(&covered[0]), START_BYTES);
        assert!(covered.windows(2).all(|pair| pair[0].end == pair[1].start), "{covered:?}");
        assert_eq!(covered[3].end, 4 * FAULT_BYTES + 8 * START_BYTES);
    }

    #[test]
    fn a_stream_that_is_read_goes_on_without_another_fault() {
        let mut windows = Windows::default();
        let mut asked = windows.fault(0, FAULT_BYTES, GIB).end;
        let (mut at, mut faults) = (FAULT_BYTES, 0);
        while at < 64 * MIB {
            if at < asked {
                let more = windows.hit(at, at + 4096, GIB);
                assert!(more.is_empty() || more.start == asked, "{more:?} after {asked}");
                asked = asked.max(more.end);
            } else {
                faults += 1;
                asked = windows.fault(at, at + FAULT_BYTES, GIB).end;
            }
            at += 4096;
        }
        assert_eq!(faults, 0);
        assert!(asked - at >= WINDOW_BYTES_MAX / 2, "{} ahead", asked - at);
    }

    #[test]
    fn what_was_for_nothing_makes_the_next_one_smaller_and_use_makes_it_larger() {
        let mut windows = Windows::default();
        for fault in 0..100u64 {
            windows.fault(fault * 97 * MIB, fault * 97 * MIB + FAULT_BYTES, 1 << 40);
        }
        assert_eq!(windows.start, START_BYTES_MIN);
        for stream in 1000..1030u64 {
            let from = stream * 97 * MIB;
            let ahead = windows.fault(from, from + FAULT_BYTES, 1 << 40);
            windows.hit(ahead.start, ahead.start + 4096, 1 << 40);
        }
        assert_eq!(windows.start, START_BYTES_MAX);
    }

    #[test]
    fn a_queue_before_the_source_halves_the_windows_once() {
        let mut windows = Windows::default();
        let now = Instant::now();
        windows.waited(Duration::from_millis(20), now);
        windows.waited(Duration::from_millis(60), now);
        assert_eq!(windows.start, START_BYTES, "three times is no queue");
        windows.waited(Duration::from_millis(200), now);
        windows.waited(Duration::from_millis(200), now + Duration::from_millis(10));
        assert_eq!(windows.start, START_BYTES / 2);
        windows.waited(Duration::from_millis(200), now + SHRINK_EVERY);
        assert_eq!(windows.start, START_BYTES_MIN);
    }

    #[test]
    fn windows_end_with_the_disk() {
        let mut windows = Windows::default();
        assert_eq!(windows.fault(0, FAULT_BYTES, FAULT_BYTES + 10), FAULT_BYTES..FAULT_BYTES + 10);
        let end = FAULT_BYTES + 10;
        assert!(windows.fault(FAULT_BYTES, end, end).is_empty());
        assert!(windows.hit(0, end, end).is_empty());
        let _ = windows.fault(u64::MAX - 10, u64::MAX, u64::MAX);
    }
}
