//! What hydration leaves out: ranges no file system uses, as long as nobody reads there.
//!
//! Invariants
//! - Until it is known what is unused, only what is asked for is copied; nothing that is asked for is ever left out.
//! - What was read by anybody is copied, unused or not.
//! - The rest becomes zeros only when all else is local, and durably before anybody sees it.
//!
//! Not here: file systems (`unused`).

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    pace::Blocks,
    worker::{RETRY, Shared, is_transient},
};
use crate::{Delta, Error, Result, disk::UNIT_BYTES, overlay::Run, unused::Unused};

/// How often what is left out is counted anew.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// What is known of a disk's unused ranges.
#[derive(Debug, Default)]
pub(super) struct LeaveOut {
    /// Still being looked for.
    pub(super) pending: bool,
    found: Option<Arc<Unused>>,
    /// Absent bytes that will not be copied, and when that was counted.
    counted: Option<(u64, Instant)>,
}

impl LeaveOut {
    pub(super) fn new(blocks: Blocks, is_watched: bool) -> Self {
        Self { pending: blocks == Blocks::Used && is_watched, found: None, counted: None }
    }

    pub(super) fn found(&self) -> Option<Arc<Unused>> {
        self.found.clone()
    }
}

impl Shared {
    /// Learns what is unused.
    pub(super) fn look_for_unused(&self) {
        if !self.state.lock().leave_out.pending {
            return;
        }
        let found = self.try_to_find();
        let mut state = self.state.lock();
        state.leave_out.pending = false;
        state.leave_out.found = found.map(Arc::new);
        drop(state);
        self.demand.wake();
    }

    fn try_to_find(&self) -> Option<Unused> {
        loop {
            let seen = self.demand.seen();
            if self.wait_while_held() {
                return None;
            }
            // Strangers' bytes are read here: whatever goes wrong, everything is copied.
            let attempt = catch_unwind(AssertUnwindSafe(|| self.disk.find_unused()));
            match attempt {
                Ok(Ok(found)) => return found,
                Ok(Err(Error::Format(e))) if is_transient(&e) => self.demand.hold(seen, RETRY.end),
                Ok(Err(_)) => return None,
                Err(_) => return Some(Unused { doubt: Some("its reader failed"), ..Unused::default() }),
            }
        }
    }

    /// The next absent range from `from` on that is to be copied, at most as long as `step`.
    pub(super) fn next_wanted(&self, unused: Option<&Unused>, from: u64, step: u64) -> Option<(u64, u64)> {
        let mut at = from;
        loop {
            at = self.disk.next_absent(at)?;
            let end = (at - at % step).saturating_add(step).min(self.disk.size());
            let Some(unused) = unused else { return Some((at, end)) };
            let (is_unused, until) = unused.ranges.run_until(at, end);
            if !is_unused {
                return Some((at, until));
            }
            let until = unused.ranges.run_until(at, next_unit(at)).1;
            if self.disk.is_touched(at) {
                return Some((at, until.min(end)));
            }
            at = until;
        }
    }

    /// Absent bytes that will not be copied.
    pub(super) fn left_out(&self) -> u64 {
        let unused = {
            let state = self.state.lock();
            match state.leave_out.counted {
                Some((bytes, at)) if at.elapsed() < COUNT_EVERY => return bytes,
                _ => state.leave_out.found(),
            }
        };
        let Some(unused) = unused else { return 0 };
        let Ok(overlay) = self.disk.overlay() else { return 0 };
        let mut bytes = 0;
        for range in unused.ranges.iter() {
            let mut at = range.start;
            while at < range.end {
                let (run, len) = overlay.run(at, range.end.min(next_unit(at)) - at);
                if run == Run::Absent && !self.disk.is_touched(at) {
                    bytes += len;
                }
                at += len;
            }
        }
        self.state.lock().leave_out.counted = Some((bytes, Instant::now()));
        bytes
    }

    /// Everything else is local: what was left out becomes zeros.
    pub(super) fn forget_unused(&self) -> Result<()> {
        let found = self.state.lock().leave_out.found();
        let Some(unused) = found.filter(|unused| !unused.ranges.is_empty()) else { return Ok(()) };
        self.disk.forget(&unused.ranges)?;
        self.state.lock().leave_out.counted = None;
        Ok(())
    }

    /// Bytes of `data` that are to be copied.
    pub(super) fn wanted_of(&self, data: &Delta) -> u64 {
        let found = self.state.lock().leave_out.found();
        found.map_or_else(|| data.bytes(), |unused| data.subtract(&unused.ranges).bytes())
    }
}

/// End of the unit `at` lies in: whether it was read is known for each.
fn next_unit(at: u64) -> u64 {
    (at - at % UNIT_BYTES).saturating_add(UNIT_BYTES)
}
