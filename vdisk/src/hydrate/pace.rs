//! How fast the bulk copy may go: a highest rate, a limit that follows how the guest fares, and a floor below it.
//!
//! While more than one guest read in a hundred takes longer than the target, the limit is halved four times a second;
//! while not, it grows by a sixteenth of what the source has shown it can give, until it limits nothing.
//!
//! Invariants
//! - Over any second the copy takes at most the rate and one step of each worker.
//! - The limit never falls below the floor, so the copy always ends; a floor that was promised (a deadline) is kept
//!   whatever the guest waits for, any other is at most a quarter of what the source can give.
//! - Steps are so small that a guest's read does not wait long behind one.
//!
//! Not here: what is copied.

use std::time::{Duration, Instant};

use super::step::STEP_BYTES;

/// How fast to hydrate, and what to spare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Threads that read and store, 1 to 64.
    pub workers: usize,
    /// Most bytes each second, `None` for as fast as it goes.
    pub rate_bytes: Option<u64>,
    /// The bulk copy yields while guest reads take longer than this.
    pub latency_target: Option<Duration>,
    /// Bytes each second the bulk copy keeps even then, so that it ends; a quarter of what the source can
    /// give where that is less.
    pub floor_bytes: u64,
    /// Bytes each second it keeps whatever the guest waits for: what a deadline needs. 0 without one.
    pub promised_bytes: u64,
    /// What is copied. Looked at when hydration starts.
    pub blocks: Blocks,
}

/// What is copied in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// Everything the chain has data for.
    All,
    /// Of that, what a file system uses or somebody has read; the rest is zeros in the end. Only where it is known
    /// what was read ([`crate::Disk::watching`]).
    Used,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            workers: 3,
            rate_bytes: None,
            latency_target: Some(Duration::from_millis(2)),
            floor_bytes: 16 << 20,
            promised_bytes: 0,
            blocks: Blocks::Used,
        }
    }
}

/// Least of what is ever left for the copy, bytes each second.
const FLOOR_BYTES_MIN: u64 = 256 << 10;
/// How often the limit is looked at.
const ADJUST_EVERY: Duration = Duration::from_millis(250);

/// A limit that is halved while the guest's reads are slow and grows step by step while they are not.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// `None`: nothing is limited.
    limit: Option<u64>,
    /// The best rate seen, forgotten slowly.
    peak: u64,
    adjusted: Instant,
    /// Bytes copied since then.
    since: u64,
}

impl Throttle {
    pub(crate) fn new(now: Instant) -> Self {
        Self { limit: None, peak: 0, adjusted: now, since: 0 }
    }

    /// Notes copied bytes and how long that took: one step alone shows what the source can give at least.
    pub(crate) fn add(&mut self, bytes: u64, took: Duration) {
        self.since = self.since.saturating_add(bytes);
        let speed = u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1);
        self.peak = self.peak.max(u64::try_from(speed).unwrap_or(u64::MAX));
    }

    /// What is left for the copy while the guest waits.
    pub(crate) fn floor(&self, pace: &Pace) -> u64 {
        let share = if self.peak == 0 { u64::MAX } else { self.peak / 4 };
        pace.floor_bytes.min(share).max(FLOOR_BYTES_MIN).max(pace.promised_bytes)
    }

    /// Looks how the guest fares, if it is time to. `is_slow` is asked only then.
    pub(crate) fn adjust(&mut self, pace: &Pace, now: Instant, is_slow: impl FnOnce() -> bool) {
        let passed = now.saturating_duration_since(self.adjusted);
        if passed < ADJUST_EVERY {
            return;
        }
        let millis = passed.as_millis().max(1);
        let rate = u64::try_from(u128::from(self.since) * 1000 / millis).unwrap_or(u64::MAX);
        (self.adjusted, self.since) = (now, 0);
        self.peak = rate.max(self.peak - self.peak / 256);
        let floor = self.floor(pace);
        if is_slow() {
            let from = self.limit.unwrap_or(self.peak).min(self.peak);
            self.limit = Some((from / 2).max(floor));
        } else if let Some(limit) = self.limit {
            let limit = limit.saturating_add((self.peak / 16).max(FLOOR_BYTES_MIN));
            self.limit = (limit < self.peak.saturating_add(self.peak / 4)).then_some(limit.max(floor));
        }
    }

    /// The limit now, bytes each second.
    pub(crate) fn limit(&self) -> Option<u64> {
        self.limit
    }
}

/// How much is copied at once: as much as the source gives within a time a guest may wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepSize {
    bytes: u64,
}

const STEP_BYTES_MIN: u64 = 64 << 10;
const STEP_LONG: Duration = Duration::from_millis(80);
const STEP_SHORT: Duration = Duration::from_millis(25);

impl StepSize {
    pub(crate) fn new() -> Self {
        Self { bytes: STEP_BYTES }
    }

    pub(crate) fn bytes(self) -> u64 {
        self.bytes
    }

    /// Notes how long a step that copied so many bytes took.
    pub(crate) fn took(&mut self, copied: u64, took: Duration) {
        if took > STEP_LONG && copied > 0 {
            self.bytes = (self.bytes / 2).max(STEP_BYTES_MIN);
        } else if took < STEP_SHORT && copied >= self.bytes {
            self.bytes = (self.bytes * 2).min(STEP_BYTES);
        }
    }
}

/// Two buckets that refill with time: what the rate allows, and what the floor guarantees.
#[derive(Debug)]
pub(crate) struct Buckets {
    rate: Bucket,
    floor: Bucket,
}

/// A bucket that refills with time. Whoever takes from it may take at once as long as what was taken before has been
/// earned by now; so each piece may be as large as it likes, and the rate holds over any longer time.
#[derive(Debug, Default)]
pub struct Bucket {
    /// When the bytes taken so far will have been earned.
    earned: Option<Instant>,
}

/// Time a bucket may save up while nothing is taken.
const SAVED: Duration = Duration::from_millis(100);

impl Bucket {
    /// How long to wait before anything may be taken.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        self.earned.filter(|earned| *earned > now).map(|earned| earned - now)
    }

    /// Takes bytes at a rate of so many each second.
    pub fn take(&mut self, bytes: u64, rate: u64, now: Instant) {
        let from = self.earned.map_or(now, |e| e.max(now.checked_sub(SAVED).unwrap_or(now)));
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
        self.earned = from.checked_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)));
    }
}

impl Buckets {
    pub(crate) fn new() -> Self {
        Self { rate: Bucket { earned: None }, floor: Bucket { earned: None } }
    }

    /// Takes `bytes` now, or tells how long to wait before asking again. `slow_for` is how much longer guest reads
    /// count as slow.
    pub(crate) fn take(
        &mut self,
        bytes: u64,
        pace: &Pace,
        throttle: &Throttle,
        slow_for: Option<Duration>,
        now: Instant,
    ) -> Result<(), Duration> {
        let floor = throttle.floor(pace);
        let rate = match (pace.rate_bytes, throttle.limit()) {
            (Some(rate), Some(limit)) => Some(rate.min(limit)),
            (rate, limit) => rate.or(limit),
        };
        if let Some(wait) = rate.and_then(|_| self.rate.wait(now)) {
            return Err(wait);
        }
        if let Some((slow, wait)) = slow_for.zip(self.floor.wait(now)) {
            return Err(wait.min(slow));
        }
        if let Some(rate) = rate {
            self.rate.take(bytes, rate, now);
        }
        self.floor.take(bytes, floor, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Bytes taken in ten seconds of a clock that only moves when told to wait, from a source that gives `source`
    /// bytes each second. The guest is slow while the copy takes more than `bearable`.
    fn ten_seconds(pace: &Pace, source: u64, bearable: u64, hold: bool) -> u64 {
        let start = Instant::now();
        let (mut buckets, mut throttle) = (Buckets::new(), Throttle::new(start));
        let (mut now, mut taken, mut lately) = (start, 0, 0);
        let mut turn = start;
        let mut slow = hold;
        while now < start + Duration::from_secs(10) {
            if now.duration_since(turn) >= ADJUST_EVERY {
                slow = hold || lately * 4 > bearable;
                (turn, lately) = (now, 0);
            }
            throttle.adjust(pace, now, || slow);
            match buckets.take(MIB, pace, &throttle, hold.then(|| Duration::from_millis(20)), now) {
                Ok(()) => {
                    let took = Duration::from_nanos(MIB * 1_000_000_000 / source);
                    throttle.add(MIB, took);
                    (taken, lately) = (taken + MIB, lately + MIB);
                    now += took;
                }
                Err(wait) => now += wait,
            }
        }
        taken
    }

    #[test]
    fn the_rate_holds() {
        let pace = Pace { rate_bytes: Some(50 * MIB), ..Pace::default() };
        let taken = ten_seconds(&pace, 1000 * MIB, u64::MAX, false);
        assert!((495 * MIB..=510 * MIB).contains(&taken), "{taken}");
    }

    #[test]
    fn a_slow_guest_leaves_the_floor() {
        let pace = Pace { floor_bytes: 8 * MIB, ..Pace::default() };
        let taken = ten_seconds(&pace, 1000 * MIB, 0, true);
        assert!((70 * MIB..=100 * MIB).contains(&taken), "{taken}");
        assert!(ten_seconds(&pace, 1000 * MIB, u64::MAX, false) > 9000 * MIB, "nothing holds it back otherwise");
    }

    #[test]
    fn a_thin_source_is_shared_with_the_guest() {
        // The floor alone is more than the source has.
        let taken = ten_seconds(&Pace::default(), 3 * MIB, 0, true);
        assert!((3 * MIB..=12 * MIB).contains(&taken), "{taken}");
    }

    #[test]
    fn a_promise_is_kept_although_the_guest_waits() {
        let pace = Pace { promised_bytes: 40 * MIB, ..Pace::default() };
        let taken = ten_seconds(&pace, 1000 * MIB, 0, true);
        assert!((390 * MIB..=450 * MIB).contains(&taken), "{taken}");
    }

    #[test]
    fn the_limit_finds_what_the_guest_can_bear() {
        let taken = ten_seconds(&Pace::default(), 1000 * MIB, 300 * MIB, false);
        assert!((1200 * MIB..=4000 * MIB).contains(&taken), "{} MiB/s on average", taken / MIB / 10);
    }

    #[test]
    fn a_rate_below_the_floor_wins() {
        let pace = Pace { rate_bytes: Some(2 * MIB), floor_bytes: 8 * MIB, ..Pace::default() };
        assert!(ten_seconds(&pace, 1000 * MIB, 0, true) <= 22 * MIB);
    }

    #[test]
    fn steps_shrink_on_a_thin_source_and_grow_back() {
        let mut step = StepSize::new();
        for _ in 0..10 {
            step.took(step.bytes(), Duration::from_millis(300));
        }
        assert_eq!(step.bytes(), STEP_BYTES_MIN);
        step.took(step.bytes(), Duration::from_millis(50));
        assert_eq!(step.bytes(), STEP_BYTES_MIN, "as it should be");
        step.took(0, Duration::from_millis(1));
        assert_eq!(step.bytes(), STEP_BYTES_MIN, "nothing was copied");
        for _ in 0..10 {
            step.took(step.bytes(), Duration::from_millis(5));
        }
        assert_eq!(step.bytes(), STEP_BYTES);
    }
}
