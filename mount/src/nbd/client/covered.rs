//! Which bytes of a READ have come.
//!
//! Invariants
//! - Runs are sorted, disjoint and do not touch; nothing is counted twice.
//! - At most [`RUNS_MAX`] runs: a server that scatters its chunks more than that is not worth the work.

/// Most separate runs at a time.
const RUNS_MAX: usize = 4096;

/// Sorted runs of bytes that have come.
#[derive(Debug, Default)]
pub(super) struct Covered {
    runs: Vec<(u64, u64)>,
}

impl Covered {
    /// Adds `len` (at least 1) bytes from `at`, none of which has come before.
    pub(super) fn add(&mut self, at: u64, len: u64) -> Result<(), &'static str> {
        let end = at.checked_add(len).ok_or("a chunk beyond all disks")?;
        let next = self.runs.partition_point(|(start, _)| *start < at);
        let before = next.checked_sub(1).and_then(|i| self.runs.get(i)).copied();
        let after = self.runs.get(next).copied();
        if before.is_some_and(|(_, stop)| stop > at) || after.is_some_and(|(start, _)| start < end) {
            return Err("bytes that had come already");
        }
        let joins_before = before.is_some_and(|(_, stop)| stop == at);
        let joins_after = after.is_some_and(|(start, _)| start == end);
        let start = before.filter(|_| joins_before).map_or(at, |(start, _)| start);
        let stop = after.filter(|_| joins_after).map_or(end, |(_, stop)| stop);
        let (from, to) = (next - usize::from(joins_before), next + usize::from(joins_after));
        self.runs.splice(from..to, std::iter::once((start, stop)));
        if self.runs.len() > RUNS_MAX { Err("chunks scattered beyond reason") } else { Ok(()) }
    }

    /// Whether bytes `0..len` have all come.
    pub(super) fn is_all_of(&self, len: u64) -> bool {
        len == 0 || self.runs == [(0, len)]
    }
}
