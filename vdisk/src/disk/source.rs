//! What a disk does while its source does not answer.
//!
//! Invariants
//! - Only errors that may pass are waited out; damage is reported at once.
//! - A read that waits is listed for as long as it waits, and never waits longer than the patience.
//!
//! Not here: what counts as an answer.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::{Error, Result, hydrate::is_transient};

/// A range that waits for a source which does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parked {
    /// Start on the disk in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// How long it has been waiting.
    pub waited: Duration,
}

/// First and longest pause between two attempts.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// A read that has taken less is only slow.
const PARKED_AFTER: Duration = Duration::from_millis(500);

/// Reads that wait, and how long they may.
#[derive(Debug)]
pub(super) struct Patience {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    limit: Duration,
    next: u64,
    waiting: Vec<Waiting>,
}

/// A read that may have to wait.
#[derive(Debug)]
struct Waiting {
    id: u64,
    offset: u64,
    len: u64,
    since: Instant,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { inner: Mutex::new(Inner { limit, next: 0, waiting: Vec::new() }), changed: Condvar::new() }
    }

    pub(super) fn set(&self, limit: Duration) {
        self.inner.lock().limit = limit;
        self.changed.notify_all();
    }

    /// Has all that wait try again now.
    pub(super) fn retry(&self) {
        let _inner = self.inner.lock();
        self.changed.notify_all();
    }

    pub(super) fn parked(&self) -> Vec<Parked> {
        let inner = self.inner.lock();
        let parked = |read: &Waiting| Parked { offset: read.offset, len: read.len, waited: read.since.elapsed() };
        let all = inner.waiting.iter().map(parked);
        all.filter(|parked| parked.waited >= PARKED_AFTER).collect()
    }

    /// Tries `read` until it succeeds, fails for good, or the patience is over.
    pub(super) fn with(&self, offset: u64, len: u64, mut read: impl FnMut() -> Result<()>) -> Result<()> {
        let since = Instant::now();
        let id = {
            let mut inner = self.inner.lock();
            inner.next += 1;
            let id = inner.next;
            inner.waiting.push(Waiting { id, offset, len, since });
            id
        };
        // Listed from the start: a source may also be away by not answering at all.
        let result = match read() {
            Err(Error::Format(e)) if is_transient(&e) => self.wait_out(offset, len, since, e, &mut read),
            other => other,
        };
        let mut inner = self.inner.lock();
        if let Some(at) = inner.waiting.iter().position(|read| read.id == id) {
            inner.waiting.swap_remove(at);
        }
        result
    }

    fn wait_out(
        &self,
        offset: u64,
        len: u64,
        since: Instant,
        mut last: aquifer_formats::Error,
        read: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut pause = PAUSE_MIN;
        loop {
            {
                let mut inner = self.inner.lock();
                let left = inner.limit.saturating_sub(since.elapsed());
                if left.is_zero() {
                    let seconds = since.elapsed().as_secs();
                    return Err(Error::SourceAway { offset, len, seconds, cause: last.to_string() });
                }
                let limit = inner.limit;
                self.changed.wait_for(&mut inner, pause.min(left));
                // Patience that was taken away ends the wait without another attempt.
                if inner.limit < limit && inner.limit <= since.elapsed() {
                    continue;
                }
            }
            match read() {
                Err(Error::Format(e)) if is_transient(&e) => last = e,
                other => return other,
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}
