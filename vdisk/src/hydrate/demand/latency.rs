//! How long reads of about the last second took, without a lock.
//!
//! Invariant: a figure may miss a few reads that happen while a half second turns; it never needs more than a fixed
//! few hundred bytes.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

/// Four to each doubling, from 1 us on; the last takes all that is longer (over 60 s).
const BUCKETS: usize = 4 * 26;
const TURN_NANOS: u64 = 500_000_000;

/// Counts of reads by their length, for this half second and the last one.
#[derive(Debug)]
pub(super) struct Latencies {
    /// Number of the present half second.
    turn: AtomicU64,
    counts: [[AtomicU32; BUCKETS]; 2],
}

impl Default for Latencies {
    fn default() -> Self {
        let row = || std::array::from_fn(|_| AtomicU32::new(0));
        Self { turn: AtomicU64::new(0), counts: [row(), row()] }
    }
}

/// The bucket of a length.
fn bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    let octave = micros.ilog2();
    // The two bits below the highest.
    let quarter = if octave >= 2 { (micros >> (octave - 2)) & 3 } else { (micros << (2 - octave)) & 3 };
    let index = u64::from(octave) * 4 + quarter;
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The longest time in a bucket.
fn upper(bucket: usize) -> Duration {
    let (octave, quarter) = (bucket / 4, bucket as u64 % 4);
    let quarters = 4 + quarter + 1;
    Duration::from_nanos((quarters << octave) * 250)
}

impl Latencies {
    /// Notes a read that ended at `now`, nanoseconds of any steady clock.
    pub(super) fn note(&self, took: Duration, now: u64) {
        let turn = now / TURN_NANOS;
        self.turn_to(turn);
        let row = self.counts.get(usize::try_from(turn % 2).unwrap_or(0));
        if let Some(count) = row.and_then(|row| row.get(bucket(took))) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn turn_to(&self, turn: u64) {
        let last = self.turn.load(Ordering::Relaxed);
        if last >= turn || self.turn.compare_exchange(last, turn, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
        for (parity, row) in (0u64..).zip(&self.counts) {
            // After a pause the other row is old too.
            if parity == turn % 2 || turn > last + 1 {
                row.iter().for_each(|count| count.store(0, Ordering::Relaxed));
            }
        }
    }

    /// Reads of the last half to whole second, by bucket.
    fn sums(&self, now: u64) -> impl Iterator<Item = u64> {
        self.turn_to(now / TURN_NANOS);
        let rows = move |at| self.counts.iter().filter_map(move |row: &[AtomicU32; BUCKETS]| row.get(at));
        (0..BUCKETS).map(move |at| rows(at).map(|count| u64::from(count.load(Ordering::Relaxed))).sum())
    }

    /// How many reads there were in the last half to whole second.
    pub(super) fn count(&self, now: u64) -> u64 {
        self.sums(now).sum()
    }

    /// How long `percent` in a hundred reads of the last half to whole second took at most; `None` without reads.
    pub(super) fn quantile(&self, percent: u64, now: u64) -> Option<Duration> {
        let sums: Vec<u64> = self.sums(now).collect();
        let total: u64 = sums.iter().sum();
        let mut left = (total * percent).div_ceil(100).checked_sub(1)?;
        for (at, count) in sums.iter().enumerate() {
            if left < *count {
                return Some(upper(at));
            }
            left -= count;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_a_quarter_wide() {
        let mut last = 0;
        for micros in (1..4000).chain((4..60_000).map(|ms| ms * 1000)) {
            let took = Duration::from_micros(micros);
            let at = bucket(took);
            assert!(at >= last, "{micros}");
            assert!(upper(at) >= took && upper(at) <= took * 2, "{micros} us: {:?}", upper(at));
            last = at;
        }
        assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_quantile_is_that_of_the_last_second() {
        let latencies = Latencies::default();
        assert_eq!(latencies.quantile(99, 0), None);
        for read in 0..1000u64 {
            let took = Duration::from_micros(if read % 50 == 0 { 20_000 } else { 100 });
            latencies.note(took, read * 400_000);
        }
        let near = |found: Option<Duration>, micros: u64| {
            found.is_some_and(|f| (micros..micros * 5 / 4 + 2).contains(&u64::try_from(f.as_micros()).expect("short")))
        };
        assert!(near(latencies.quantile(50, 400_000_000), 100));
        assert!(near(latencies.quantile(99, 400_000_000), 20_000), "two in a hundred are slow");
        assert!(latencies.quantile(99, 900_000_000).is_some(), "the last half second still counts");
        assert_eq!(latencies.count(450_000_000), 1000);
        assert_eq!(latencies.quantile(99, 2_000_000_000), None, "long ago");
        assert_eq!(latencies.count(2_000_000_000), 0);
    }
}
