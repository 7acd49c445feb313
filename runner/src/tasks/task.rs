//! One piece of work in hand: what its body is given.
//!
//! Invariants
//! - A body asks [`Task::check`] between blocks and ends with what it has stored; it never learns of takeovers later
//!   than with the next durable effect, which its fence refuses.
//! - What a body counts is told with each sign of life and stored with the end.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde_json::Value;

use super::{rate::Rates, stage::Stages};
use crate::{
    catalogue::{Catalogue, Event, Fence, Progress, Work},
    context::Context,
    fail::{Code, Fail, Result},
    stop::Stop,
};

/// Over how long the rate of a task is measured.
const WINDOW: Duration = Duration::from_secs(10);

/// What a body is given.
#[derive(Debug)]
pub struct Task<'a> {
    /// The process's site, repository cache, output.
    pub context: &'a Context,
    /// The catalogue.
    pub catalogue: &'a Catalogue,
    /// What to do.
    pub work: &'a Work,
    /// Proof of the lease, for each durable effect.
    pub fence: &'a Fence,
    /// The wish to stop, of this task and of the process.
    pub stop: Stop,
    /// Rates that tasks of this process share.
    pub rates: &'a Rates,
    /// What is counted.
    pub counts: &'a Counts,
}

/// What a body came to.
#[derive(Clone, Debug, PartialEq)]
pub enum Done {
    /// All was done. What it reports is kept with the work.
    Success(Value),
    /// Done, with something to look at.
    Warning {
        /// What.
        why: String,
        /// What it reports.
        report: Value,
    },
    /// Left out: its object is on hold.
    Skipped {
        /// Why.
        why: String,
        /// Whether the run before was left out for the same reason.
        known: bool,
    },
}

impl Task<'_> {
    /// Fails where the task is to stop: cancelled, paused, its lease lost, the process asked to end.
    ///
    /// # Errors
    /// The interruption.
    pub fn check(&self) -> Result<()> {
        self.stop.check()
    }

    /// What the work is to do, as it was put in.
    ///
    /// # Errors
    /// [`Code::Corrupt`]: it was put in by something else.
    pub fn spec<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        T::deserialize(&self.work.spec).map_err(|error| {
            let what = format!("what work {} is to do cannot be understood", self.work.id);
            Fail::new(Code::Corrupt, what).at("catalogue").cause(error)
        })
    }

    /// Whether the run before said this of the same object. One that cannot be asked has said nothing.
    pub fn was_said(&self, what: &str) -> bool {
        self.catalogue.said_before(self.work, what).unwrap_or(false)
    }

    /// Tells what happened to an object, in the name of this work.
    ///
    /// # Errors
    /// [`Code::Fenced`].
    pub fn event(&self, object: &str, op: &str, reason: Option<String>) -> Result<()> {
        let event = Event {
            object: object.to_owned(),
            op: op.to_owned(),
            session: self.work.session,
            user: self.fence.owner.clone(),
            reason,
            ..Event::default()
        };
        Ok(self.catalogue.event_of(self.fence, &event)?)
    }
}

/// Counts of a task; every body adds to them, any thread may.
#[derive(Debug, Default)]
pub struct Counts {
    /// Bytes there are to do.
    pub total: AtomicU64,
    /// Bytes done with.
    pub done: AtomicU64,
    /// Bytes read from sources.
    pub read: AtomicU64,
    /// Of these, bytes read from production.
    pub read_production: AtomicU64,
    /// Bytes written to targets.
    pub written: AtomicU64,
    /// Bytes of a target's own files that were written anew on it.
    pub merged: AtomicU64,
    /// Blocks that were equal and moved nothing.
    pub blocks_equal: AtomicU64,
    /// The lowest limit that applies, bytes each second; 0 is none.
    pub limit: AtomicU64,
    /// Where its time goes.
    pub stages: Stages,
    phase: Mutex<String>,
    samples: Mutex<VecDeque<(Instant, u64)>>,
}

impl Counts {
    /// What is being done now.
    pub fn phase(&self, phase: &str) {
        phase.clone_into(&mut self.phase.lock());
    }

    /// Adds to a count.
    pub fn add(count: &AtomicU64, bytes: u64) {
        count.fetch_add(bytes, Ordering::Relaxed);
    }

    /// As it is stored.
    pub fn progress(&self) -> Progress {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let limit = get(&self.limit);
        Progress {
            phase: self.phase.lock().clone(),
            bytes_total: get(&self.total),
            bytes_done: get(&self.done),
            bytes_read: get(&self.read),
            bytes_read_production: get(&self.read_production),
            bytes_written: get(&self.written),
            bytes_merged: get(&self.merged),
            blocks_equal: get(&self.blocks_equal),
            rate: self.rate(Instant::now()),
            rate_limit: (limit > 0).then_some(limit),
            busy: self.stages.busy(),
        }
    }

    /// Bytes read each second, over the last seconds.
    fn rate(&self, now: Instant) -> u64 {
        let read = self.read.load(Ordering::Relaxed);
        let mut samples = self.samples.lock();
        samples.push_back((now, read));
        while samples.len() > 2 && samples.front().is_some_and(|(at, _)| now - *at > WINDOW) {
            samples.pop_front();
        }
        let Some((since, from)) = samples.front() else { return 0 };
        let rate = u128::from(read.saturating_sub(*from)) * 1000 / (now - *since).as_millis().max(1);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}
