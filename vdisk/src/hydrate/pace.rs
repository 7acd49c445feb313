//! How fast the bulk copy may go: a highest rate, and a floor while the guest has to wait.
//!
//! Invariants
//! - Over any second the copy takes at most the rate and one step of each worker.
//! - While guest reads are slow it takes the floor and no more, so it always ends.
//!
//! Not here: what is copied.

use std::time::{Duration, Instant};

/// How fast to hydrate, and what to spare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Threads that read and store, 1 to 64.
    pub workers: usize,
    /// Most bytes each second, `None` for as fast as it goes.
    pub rate_bytes: Option<u64>,
    /// The bulk copy yields while guest reads take longer than this.
    pub latency_target: Option<Duration>,
    /// Bytes each second the bulk copy keeps even then, so that it ends.
    pub floor_bytes: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { workers: 2, rate_bytes: None, latency_target: Some(Duration::from_millis(2)), floor_bytes: 16 << 20 }
    }
}

/// Two buckets that refill with time: what the rate allows, and what the floor guarantees.
#[derive(Debug)]
pub(crate) struct Buckets {
    rate: Bucket,
    floor: Bucket,
}

#[derive(Debug)]
struct Bucket {
    /// When the bytes taken so far will have been earned.
    earned: Option<Instant>,
}

/// Time a bucket may save up while nothing is taken.
const SAVED: Duration = Duration::from_millis(100);

impl Bucket {
    fn wait(&mut self, rate: u64, now: Instant) -> Option<Duration> {
        let earned = self.earned?;
        let _ = rate;
        (earned > now).then(|| earned - now)
    }

    fn take(&mut self, bytes: u64, rate: u64, now: Instant) {
        let from = self.earned.map_or(now, |e| e.max(now.checked_sub(SAVED).unwrap_or(now)));
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
        self.earned = from.checked_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)));
    }
}

impl Buckets {
    pub(crate) fn new() -> Self {
        Self { rate: Bucket { earned: None }, floor: Bucket { earned: None } }
    }

    /// Takes `bytes` now, or tells how long to wait before asking again. `slow_for` is how much longer
    /// guest reads count as slow.
    pub(crate) fn take(
        &mut self,
        bytes: u64,
        pace: &Pace,
        slow_for: Option<Duration>,
        now: Instant,
    ) -> Result<(), Duration> {
        if let Some(rate) = pace.rate_bytes
            && let Some(wait) = self.rate.wait(rate, now)
        {
            return Err(wait);
        }
        if let Some(slow) = slow_for
            && let Some(wait) = self.floor.wait(pace.floor_bytes, now)
        {
            return Err(wait.min(slow));
        }
        if let Some(rate) = pace.rate_bytes {
            self.rate.take(bytes, rate, now);
        }
        self.floor.take(bytes, pace.floor_bytes, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Bytes taken in ten seconds of a clock that only moves when told to wait.
    fn ten_seconds(pace: &Pace, slow: bool) -> u64 {
        let (mut buckets, start) = (Buckets::new(), Instant::now());
        let (mut now, mut taken) = (start, 0);
        while now < start + Duration::from_secs(10) {
            match buckets.take(MIB, pace, slow.then(|| Duration::from_millis(20)), now) {
                Ok(()) => (taken, now) = (taken + MIB, now + Duration::from_micros(100)),
                Err(wait) => now += wait,
            }
        }
        taken
    }

    #[test]
    fn the_rate_holds() {
        let pace = Pace { rate_bytes: Some(50 * MIB), ..Pace::default() };
        let taken = ten_seconds(&pace, false);
        assert!((495 * MIB..=510 * MIB).contains(&taken), "{taken}");
    }

    #[test]
    fn a_slow_guest_leaves_the_floor() {
        let pace = Pace { floor_bytes: 8 * MIB, ..Pace::default() };
        let taken = ten_seconds(&pace, true);
        assert!((79 * MIB..=84 * MIB).contains(&taken), "{taken}");
        assert!(ten_seconds(&pace, false) > 1000 * MIB, "nothing holds it back otherwise");
    }

    #[test]
    fn a_rate_below_the_floor_wins() {
        let pace = Pace { rate_bytes: Some(2 * MIB), floor_bytes: 8 * MIB, ..Pace::default() };
        assert!(ten_seconds(&pace, true) <= 22 * MIB);
    }
}
