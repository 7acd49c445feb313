//! Rates that the tasks of a repository, a host or a job share, one for each direction.
//!
//! Invariants
//! - All tasks of this process that use a resource in one direction take from one bucket; so each gets what it asks
//!   for in turn, and together they never exceed the limit.
//! - Where workers on several machines use a resource, each gets the share of the limit that its tasks have of all.
//! - What is measured is what was taken, whether there is a limit or not.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aquifer_vdisk::Bucket;
use parking_lot::{Mutex, MutexGuard};

use crate::{fail::Result, stop::Stop};

/// Bytes on their way from a resource, or to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From it.
    Read,
    /// To it.
    Write,
}

/// Longest sleep before looking whether to stop.
const NAP: Duration = Duration::from_millis(100);

/// Over how long a rate is measured.
const WINDOW: Duration = Duration::from_secs(5);

/// The rate of one resource in one direction.
#[derive(Debug)]
pub struct Rate {
    /// Bytes each second, for all workers together; 0 is no limit.
    limit: AtomicU64,
    /// Our tasks among all, in parts of 1000.
    share: AtomicU64,
    /// Held by the one task that waits for the bucket; the others queue for it in the order they came.
    turn: Mutex<()>,
    bucket: Mutex<Bucket>,
    taken: AtomicU64,
    seen: Mutex<Measured>,
}

#[derive(Debug)]
struct Measured {
    at: Instant,
    taken: u64,
    rate: u64,
}

impl Rate {
    fn new(limit: Option<u64>) -> Self {
        Self {
            limit: AtomicU64::new(limit.unwrap_or(0)),
            share: AtomicU64::new(1000),
            turn: Mutex::default(),
            bucket: Mutex::default(),
            taken: AtomicU64::new(0),
            seen: Mutex::new(Measured { at: Instant::now(), taken: 0, rate: 0 }),
        }
    }

    /// The limit for this process, bytes each second.
    pub fn limit(&self) -> Option<u64> {
        let limit = self.limit.load(Ordering::Relaxed);
        let share = self.share.load(Ordering::Relaxed);
        let ours = u64::try_from(u128::from(limit) * u128::from(share) / 1000).unwrap_or(u64::MAX);
        (limit > 0).then_some(ours.max(1))
    }

    /// Waits until `bytes` may pass, and takes them.
    ///
    /// # Errors
    /// The interruption.
    pub fn take(&self, bytes: u64, stop: Stop) -> Result<()> {
        let turn = self.limit().map(|_| self.turn.lock());
        while let Some(limit) = self.limit() {
            let now = Instant::now();
            let wait = {
                let mut bucket = self.bucket.lock();
                match bucket.wait(now) {
                    Some(wait) => wait,
                    None => {
                        bucket.take(bytes, limit, now);
                        break;
                    }
                }
            };
            stop.wait(wait.min(NAP));
            stop.check()?;
        }
        // Whoever has just taken would be the first to ask again.
        turn.into_iter().for_each(MutexGuard::unlock_fair);
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Bytes each second, as it was over the last seconds.
    pub fn measured(&self) -> u64 {
        let taken = self.taken.load(Ordering::Relaxed);
        let mut seen = self.seen.lock();
        let passed = seen.at.elapsed();
        let rate = u128::from(taken.saturating_sub(seen.taken)) * 1000 / passed.as_millis().max(1);
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        if passed >= WINDOW {
            *seen = Measured { at: Instant::now(), taken, rate };
        }
        if passed >= WINDOW || seen.rate == 0 { rate } else { seen.rate }
    }

    /// Tells that this process does `ours` of `all` tasks that use the resource.
    pub fn share(&self, ours: u32, all: u32) {
        let share = if all == 0 || ours >= all { 1000 } else { u64::from(ours.max(1)) * 1000 / u64::from(all) };
        self.share.store(share, Ordering::Relaxed);
    }
}

/// Every rate of this process.
#[derive(Debug, Default)]
pub struct Rates {
    all: Mutex<BTreeMap<(String, Direction), Arc<Rate>>>,
}

impl Rates {
    /// The rate of a resource; the limit that was given last applies to all who take from it.
    pub fn of(&self, resource: &str, direction: Direction, limit: Option<u64>) -> Arc<Rate> {
        let mut all = self.all.lock();
        let rate = all.entry((resource.to_owned(), direction)).or_insert_with(|| Arc::new(Rate::new(limit)));
        rate.limit.store(limit.unwrap_or(0), Ordering::Relaxed);
        rate.clone()
    }

    /// Tells what share of the tasks of each resource this process does.
    pub fn share(&self, ours: &BTreeMap<String, u32>, all: &BTreeMap<String, u32>) {
        for ((resource, _), rate) in self.all.lock().iter() {
            let count = |of: &BTreeMap<String, u32>| of.get(resource).copied().unwrap_or(0);
            rate.share(count(ours), count(all));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn tasks_share_one_limit_fairly() {
        let rates = Rates::default();
        let stop = Stop::listen().expect("signals");
        let until = Instant::now() + Duration::from_millis(1200);
        let taken: Vec<u64> = thread::scope(|scope| {
            let tasks: Vec<_> = (0..3)
                .map(|_| {
                    let rate = rates.of("repository/nas", Direction::Read, Some(40 * MIB));
                    scope.spawn(move || {
                        let mut taken = 0;
                        while Instant::now() < until {
                            rate.take(MIB / 4, stop).expect("nobody stops");
                            taken += MIB / 4;
                        }
                        taken
                    })
                })
                .collect();
            tasks.into_iter().map(|t| t.join().expect("a task")).collect()
        });
        let sum: u64 = taken.iter().sum();
        // What was saved up, and one piece of each task, come on top.
        assert!((30 * MIB..=54 * MIB).contains(&sum), "{sum} in 1.2 s at 40 MiB/s");
        let (least, most) = (taken.iter().min().copied().unwrap_or(0), taken.iter().max().copied().unwrap_or(0));
        assert!(most <= least * 3, "{taken:?}");
        let rate = rates.of("repository/nas", Direction::Read, Some(40 * MIB));
        assert!((20 * MIB..=50 * MIB).contains(&rate.measured()), "{}", rate.measured());
        // The other direction is another rate, and without a limit nothing waits.
        let free = rates.of("repository/nas", Direction::Write, None);
        let began = Instant::now();
        (0..1000).for_each(|_| free.take(100 * MIB, stop).expect("nobody stops"));
        assert!(began.elapsed() < Duration::from_secs(1));
        assert_eq!(free.limit(), None);
    }

    #[test]
    fn the_limit_is_shared_with_other_workers() {
        let rates = Rates::default();
        let rate = rates.of("repository/nas", Direction::Write, Some(90 * MIB));
        let count = |n: u32| BTreeMap::from([("repository/nas".to_owned(), n)]);
        rates.share(&count(1), &count(3));
        assert_eq!(rate.limit(), Some(90 * MIB * 333 / 1000));
        rates.share(&count(3), &count(3));
        assert_eq!(rate.limit(), Some(90 * MIB));
        rates.share(&BTreeMap::new(), &count(2));
        assert!(rate.limit() < Some(46 * MIB), "counted when it began, not yet in the catalogue's sum");
    }
}
