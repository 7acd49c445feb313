//! Fills the overlay from the chain while the machine works.
//!
//! Invariants
//! - A block is stored only while it is absent, under its lock: the guest's write always wins.
//! - What is reported as local after a restart was durable before it; at most what was copied since the
//!   last seal (128 MiB, 10 s) is copied again.
//! - The guest comes first: its faults and their neighbours before everything else, and the bulk copy
//!   yields while the guest's reads are slow, down to a floor.
//! - Threads run at a lower scheduling priority than those that serve, and wait asleep while nothing may be copied.
//!
//! Not here: how blocks are stored (`Overlay`), where they come from (`Chain`).

pub(crate) mod demand;
mod leave_out;
mod pace;
mod progress;
mod step;
mod worker;

use std::{
    ffi::CStr,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

pub use demand::DemandStats;
pub use pace::{Blocks, Bucket, Pace};
pub use progress::{HydrateProgress, HydrateState, Replay};
pub use step::Hydrated;

use self::worker::Shared;
pub(crate) use self::worker::is_transient;
use crate::{Disk, Result, Trace, unused::Unused};

const WORKERS_MAX: usize = 64;

/// The nice value of the threads: the only one that a jailed process need be able to give itself.
pub const YIELDING: i32 = 10;

/// How long [`Hydrator::stop`] waits for steps that a source holds up.
pub const STOP_MAX: Duration = Duration::from_secs(2);

/// A running hydration. Dropping it stops it.
#[derive(Debug)]
pub struct Hydrator {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Hydrator {
    /// Starts worker threads. They take guest faults first, then their neighbours, then what
    /// [`Hydrator::replay`] asked for, then everything. When all is local and durable, the disk lets go
    /// of its chain.
    ///
    /// # Errors
    /// [`crate::Error::ReadOnly`]: the disk has no overlay.
    pub fn start(disk: Arc<Disk>, pace: Pace) -> Result<Self> {
        disk.local()?;
        let demand = disk.demand();
        demand.set_target(pace.latency_target);
        let workers = pace.workers.clamp(1, WORKERS_MAX);
        let shared = Arc::new(Shared::new(disk, demand, pace, workers + 1));
        let mut threads: Vec<_> = (0..workers)
            .map(|_| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || {
                    begin(c"hydrate");
                    shared.run();
                    shared.leave();
                })
            })
            .collect();
        let surveyed = Arc::clone(&shared);
        threads.push(std::thread::spawn(move || {
            begin(c"hydrate-survey");
            surveyed.survey();
            surveyed.leave();
        }));
        Ok(Self { shared, threads: Mutex::new(threads) })
    }

    /// Fetches what the machine read early in an earlier boot, in that order, as far as it is absent.
    pub fn replay(&self, trace: &Trace) {
        self.shared.replay(trace);
    }

    /// Holds the copy; what is being copied is finished.
    pub fn pause(&self) {
        self.set_paused(true);
    }

    /// Goes on after [`Hydrator::pause`].
    pub fn resume(&self) {
        self.set_paused(false);
    }

    fn set_paused(&self, paused: bool) {
        let mut state = self.shared.state.lock();
        state.paused = paused;
        let running = !paused && state.phase == HydrateState::Running;
        state.meter.set_running(running, Instant::now());
        drop(state);
        self.shared.demand.wake();
    }

    /// Changes the pace, except for the number of workers.
    pub fn set_pace(&self, pace: Pace) {
        self.shared.demand.set_target(pace.latency_target);
        self.shared.state.lock().pace = pace;
        self.shared.demand.wake();
    }

    /// Changes the highest rate in bytes each second, `None` for no limit.
    pub fn set_rate(&self, rate_bytes: Option<u64>) {
        self.shared.state.lock().pace.rate_bytes = rate_bytes;
        self.shared.demand.wake();
    }

    /// Changes what is copied each second whatever the guest waits for, in bytes; 0 for nothing.
    pub fn set_promise(&self, promised_bytes: u64) {
        self.shared.state.lock().pace.promised_bytes = promised_bytes;
        self.shared.demand.wake();
    }

    /// Lets so many more bytes be stored, `None` for any number. At 0 nothing is copied ([`HydrateState::NoSpace`]); the
    /// machine goes on reading from its source.
    pub fn set_room(&self, bytes: Option<u64>) {
        let mut state = self.shared.state.lock();
        let had = std::mem::replace(&mut state.room, bytes.unwrap_or(u64::MAX));
        if had == 0 && state.room > 0 {
            state.recovered();
        }
        drop(state);
        self.shared.demand.wake();
    }

    /// What was found to be unused; `None` while that is not known, and where everything is copied.
    pub fn unused(&self) -> Option<Arc<Unused>> {
        self.shared.state.lock().leave_out.found()
    }

    /// How far it is.
    pub fn progress(&self) -> HydrateProgress {
        self.shared.progress()
    }

    /// Begins no further step. [`Hydrator::stop`] waits for those on their way, [`STOP_MAX`] from here at most.
    pub fn wind_down(&self) {
        {
            let mut state = self.shared.state.lock();
            state.stopping.get_or_insert_with(Instant::now);
            self.shared.set_phase(&mut state, HydrateState::Stopped);
        }
        self.shared.demand.wake();
    }

    /// Ends the threads, and makes durable what has been copied. Steps on their way are finished, unless the source
    /// holds them up: then they are left to themselves after [`STOP_MAX`]. What such a step may still store is a
    /// chain's bytes in an absent block, which hurts nobody; its thread keeps the disk open for as long.
    pub fn stop(&self) {
        self.wind_down();
        let threads = std::mem::take(&mut *self.threads.lock());
        if threads.is_empty() {
            return;
        }
        if self.shared.all_left() {
            for thread in threads {
                // It has no result; a panic of it has been reported where it happened.
                let _ended = thread.join();
            }
        }
        if self.shared.state.lock().phase == HydrateState::Stopped {
            // What is not durable is copied again; the next flush meets the error.
            let _sealed = self.shared.disk.seal();
        }
    }

    /// Waits until hydration has ended or `timeout` has passed, and tells the state then.
    pub fn wait(&self, timeout: Option<Duration>) -> HydrateState {
        let until = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut state = self.shared.state.lock();
        while !state.phase.is_final() {
            match until {
                None => self.shared.ended.wait(&mut state),
                Some(until) => {
                    if self.shared.ended.wait_until(&mut state, until).timed_out() {
                        break;
                    }
                }
            }
        }
        state.phase
    }
}

impl Drop for Hydrator {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Names the calling thread for profiles, in 15 bytes at most, and lowers its priority: a guest's read should not wait for a
/// copy's decode.
fn begin(name: &CStr) {
    let _unnamed = rustix::thread::set_name(name);
    // On Linux this is the calling thread's alone, and a jail can tell it from another's. A refusal changes only who waits
    // for whom.
    let _refused = rustix::process::setpriority_process(None, YIELDING);
}
