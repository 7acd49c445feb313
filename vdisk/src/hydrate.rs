//! Fills the overlay from the chain while the machine works.
//!
//! Invariants
//! - A block is stored only while it is absent, under its lock: the guest's write always wins.
//! - What is reported as local after a crash was durable before it.
//!
//! Not here: how blocks are stored (`Overlay`), where they come from (`Chain`).

mod step;

use std::{ops::Range, sync::Arc, time::Duration};

pub use step::Hydrated;

use crate::{Disk, Result};

/// How fast to hydrate, and what to spare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Threads that read and store.
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
        Self { workers: 2, rate_bytes: None, latency_target: Some(Duration::from_millis(5)), floor_bytes: 8 << 20 }
    }
}

/// What the hydrator is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HydrateState {
    /// Copying.
    Running,
    /// Held by [`Hydrator::pause`].
    Paused,
    /// The source does not answer; tried again by itself.
    SourceAway,
    /// No space left beside the overlay; tried again by itself.
    NoSpace,
    /// Gave up on some ranges (damage in the source) or on the overlay (a failed sync).
    Failed,
    /// Stopped by [`Hydrator::stop`] before all was local.
    Stopped,
    /// Everything is local and durable.
    Done,
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
    /// Bytes of it the chain holds data for; `None` until that is known.
    pub used: Option<u64>,
    /// Bytes of those that are local.
    pub used_local: Option<u64>,
    /// Bytes each second, over the last minute of running.
    pub rate_bytes: u64,
    /// Time to the end at that rate; `None` while unknown (under 10 s of running, or standing still).
    pub eta: Option<Duration>,
    /// Ranges that could not be copied because the source is damaged there, as `(offset, len)`.
    pub damaged: Vec<(u64, u64)>,
    /// The last error, for people.
    pub error: Option<String>,
}

/// A running hydration. Dropping it stops it.
#[derive(Debug)]
pub struct Hydrator {
    disk: Arc<Disk>,
}

impl Hydrator {
    /// Starts worker threads. They take guest faults first, then their neighbours, then what
    /// [`Hydrator::replay`] asked for, then everything.
    ///
    /// # Errors
    /// The disk has no overlay.
    pub fn start(disk: Arc<Disk>, _pace: Pace) -> Result<Self> {
        disk.local()?;
        Ok(Self { disk })
    }

    /// Ranges a machine read early in an earlier boot, in that order.
    pub fn replay(&self, _ranges: &[Range<u64>]) {}

    /// Holds the copy; what is being copied is finished.
    pub fn pause(&self) {}

    /// Goes on after [`Hydrator::pause`].
    pub fn resume(&self) {}

    /// Changes the pace.
    pub fn set_pace(&self, _pace: Pace) {}

    /// Changes the highest rate in bytes each second, `None` for no limit.
    pub fn set_rate(&self, _rate_bytes: Option<u64>) {}

    /// How far it is.
    pub fn progress(&self) -> HydrateProgress {
        let local = self.disk.local().unwrap_or_default();
        HydrateProgress {
            state: HydrateState::Stopped,
            total: local.total(),
            local: local.local(),
            used: None,
            used_local: None,
            rate_bytes: 0,
            eta: None,
            damaged: Vec::new(),
            error: None,
        }
    }

    /// Ends the threads. What has been copied is made durable.
    pub fn stop(&self) {}

    /// Waits until hydration has ended or `timeout` has passed, and tells the state then.
    pub fn wait(&self, _timeout: Option<Duration>) -> HydrateState {
        self.progress().state
    }
}
