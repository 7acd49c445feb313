//! What the threads of one worker have in hand, in figures, for whoever shows it while they work.
//!
//! Not here: what the catalogue is told of it, which happens a few times a lease.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;

use super::task::Counts;
use crate::catalogue::{SessionId, WorkId};

/// The counts of all work that a worker has had of the session it is there for.
#[derive(Debug, Default)]
pub struct Hands {
    counts: Mutex<BTreeMap<WorkId, Arc<Counts>>>,
}

impl Hands {
    /// Counts for a piece of work that begins; an earlier attempt's are forgotten. Those of a worker that serves any
    /// session are not kept: there is no end to them, and nobody sums them.
    pub(super) fn take(&self, work: WorkId, session: Option<SessionId>) -> Arc<Counts> {
        let counts = Arc::<Counts>::default();
        if session.is_some() {
            self.counts.lock().insert(work, Arc::clone(&counts));
        }
        counts
    }

    /// Bytes done with and bytes there are to do, as far as is known; no total where any piece of work knows none yet.
    pub fn progress(&self) -> (u64, Option<u64>) {
        let mut sum = (0u64, Some(0u64));
        for counts in self.counts.lock().values() {
            let now = counts.progress();
            sum.0 = sum.0.saturating_add(now.bytes_done);
            sum.1 = sum
                .1
                .filter(|_| now.bytes_total > 0)
                .map(|total| total.saturating_add(now.bytes_total.max(now.bytes_done)));
        }
        (sum.0, sum.1.filter(|total| *total > 0))
    }
}
