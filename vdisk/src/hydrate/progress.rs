//! How far hydration is, and how fast it really goes.
//!
//! Invariant: numbers are counted, never estimated; the rate covers the last minute of running, and the
//! time left is unknown until there have been ten seconds of it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// What the hydrator is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HydrateState {
    /// Copying.
    Running,
    /// Held by [`crate::Hydrator::pause`].
    Paused,
    /// The source does not answer; tried again by itself.
    SourceAway,
    /// No space left beside the overlay; tried again by itself.
    NoSpace,
    /// All is local but some ranges (damage in the source), or the overlay failed.
    Failed,
    /// Stopped by [`crate::Hydrator::stop`] before all was local.
    Stopped,
    /// Everything is local and durable.
    Done,
}

impl HydrateState {
    /// Whether it will not go on by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Stopped | Self::Done)
    }
}

/// How far hydration is.
#[derive(Clone, Debug, PartialEq)]
pub struct HydrateProgress {
    /// What it is doing.
    pub state: HydrateState,
    /// Size of the disk in bytes.
    pub total: u64,
    /// Bytes of it that are local.
    pub local: u64,
    /// Bytes of it the chain holds data for, in whole overlay blocks; `None` until that is known.
    pub used: Option<u64>,
    /// Bytes of those that are local.
    pub used_local: Option<u64>,
    /// Bytes copied by this hydrator.
    pub copied: u64,
    /// Bytes copied each second, over the last minute of running.
    pub rate_bytes: u64,
    /// Time to the end at that rate; `None` while unknown (under 10 s of running, or standing still).
    pub eta: Option<Duration>,
    /// Ranges that could not be copied because the source is damaged there, as `(offset, len)`.
    pub damaged: Vec<(u64, u64)>,
    /// The last error, for people.
    pub error: Option<String>,
    /// Bytes that are absent and will not be copied: no file system uses them, and nobody has read them.
    pub left_out: u64,
    /// How far an earlier boot's trace has been fetched; `None` without one.
    pub replay: Option<Replay>,
}

/// Fetches of a boot trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replay {
    /// Begun or done.
    pub done: usize,
    /// In all.
    pub total: usize,
}

const WINDOW: Duration = Duration::from_secs(60);
const KNOWN_AFTER: Duration = Duration::from_secs(10);
const SAMPLE: Duration = Duration::from_millis(500);

/// Copied bytes over running time.
#[derive(Debug)]
pub(crate) struct Meter {
    /// (running time, copied bytes), oldest first.
    samples: VecDeque<(Duration, u64)>,
    /// Running time before `since`.
    ran: Duration,
    /// Since when it runs, `None` while held.
    since: Option<Instant>,
    copied: u64,
}

impl Meter {
    pub(crate) fn new(now: Instant) -> Self {
        Self { samples: VecDeque::from([(Duration::ZERO, 0)]), ran: Duration::ZERO, since: Some(now), copied: 0 }
    }

    fn running(&self, now: Instant) -> Duration {
        self.ran + self.since.map_or(Duration::ZERO, |s| now.saturating_duration_since(s))
    }

    /// Stops or starts the clock.
    pub(crate) fn set_running(&mut self, running: bool, now: Instant) {
        self.ran = self.running(now);
        self.since = running.then_some(now);
    }

    pub(crate) fn add(&mut self, bytes: u64, now: Instant) {
        self.copied += bytes;
        let at = self.running(now);
        if self.samples.back().is_none_or(|(last, _)| at.saturating_sub(*last) >= SAMPLE) {
            self.samples.push_back((at, self.copied));
            // The one just outside stays: the window reaches back to it.
            while self.samples.get(1).is_some_and(|(t, _)| at.saturating_sub(*t) >= WINDOW) {
                self.samples.pop_front();
            }
        }
    }

    pub(crate) fn copied(&self) -> u64 {
        self.copied
    }

    /// Bytes each second over the last minute of running.
    pub(crate) fn rate(&self, now: Instant) -> u64 {
        let at = self.running(now);
        let inside = self.samples.iter().find(|(t, _)| at.saturating_sub(*t) <= WINDOW).or(self.samples.back());
        let Some((from, bytes)) = inside else { return 0 };
        let millis = at.saturating_sub(*from).as_millis().max(1);
        u64::try_from(u128::from(self.copied - bytes) * 1000 / millis).unwrap_or(u64::MAX)
    }

    /// Time for `left` more bytes, if that can be said.
    pub(crate) fn eta(&self, left: u64, now: Instant) -> Option<Duration> {
        let rate = self.rate(now);
        let known = self.running(now) >= KNOWN_AFTER && rate > 0;
        known.then(|| Duration::from_secs(left.div_ceil(rate.max(1))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_minute_of_running() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut meter = Meter::new(start);
        for second in 1..=100 {
            meter.add(if second <= 50 { 1000 } else { 10 }, at(second));
        }
        let rate = meter.rate(at(100));
        assert!((170..=190).contains(&rate), "10 x 1000 and 50 x 10 in 60 s, not {rate}");
        meter.set_running(false, at(100));
        assert_eq!(meter.rate(at(5000)), rate, "time that was held does not count");
    }

    /// A source of constant pace, whose answers come unevenly: what is said at each quarter comes true within a quarter.
    #[test]
    fn the_end_comes_when_it_was_said_to() {
        const STEP: u64 = 1 << 20;
        // Milliseconds between steps, in turn: even, in bursts of eight, and one long wait in sixteen.
        let paces: [&dyn Fn(u64) -> u64; 3] =
            [&|_| 125, &|n| if n % 8 == 0 { 1000 } else { 0 }, &|n| if n % 16 == 0 { 1100 } else { 60 }];
        for (case, gap) in paces.iter().enumerate() {
            let start = Instant::now();
            let mut meter = Meter::new(start);
            let total = 2000 * STEP;
            let ends = (1..=2000).map(gap).sum::<u64>();
            let mut now = 0;
            let mut said = 0;
            for n in 1..=2000u64 {
                now += gap(n);
                meter.add(STEP, start + Duration::from_millis(now));
                if n % 500 == 0 && n < 2000 {
                    let eta = meter.eta(total - n * STEP, start + Duration::from_millis(now)).expect("known by now");
                    let ratio = eta.as_secs_f64() * 1000.0 / (ends - now) as f64;
                    assert!((0.75..=1.25).contains(&ratio), "case {case} at {n} of 2000: {ratio:.2} of what it was");
                    said += 1;
                }
            }
            assert_eq!(said, 3);
        }
    }

    #[test]
    fn the_end_is_unknown_at_first_and_while_nothing_moves() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut meter = Meter::new(start);
        meter.add(5000, at(5));
        assert_eq!(meter.eta(1000, at(9)), None);
        assert_eq!(meter.eta(1000, at(10)), Some(Duration::from_secs(2)));
        assert_eq!(meter.eta(1000, at(200)), None, "nothing for a minute");
    }
}
