//! Which piece of work is next.
//!
//! Invariants
//! - Pure: no clock, no catalogue.
//! - Nothing starves. Priority is a head start in time ([`AGE_MS`] for each point), so work that has waited longer than
//!   the head start of others goes before all that came after it. Work that waits for a slot longer than
//!   [`PATIENCE_MS`] has the next free ones kept for it.
//! - The slots of a resource are never exceeded.

use std::collections::BTreeMap;

use crate::catalogue::Need;

/// One point of priority is worth so many milliseconds of waiting: 100 points are half an hour.
pub const AGE_MS: i64 = 18_000;

/// Work that waits for slots longer than this has them kept free, milliseconds.
pub const PATIENCE_MS: i64 = 10 * 60 * 1000;

/// A piece of work that could be begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its place in the order, by [`place`].
    pub place: i64,
    /// Since when it could have been begun, milliseconds.
    pub waits_from: i64,
    /// The slots it needs.
    pub needs: Vec<Need>,
    /// Whether whoever asks can do it.
    pub ours: bool,
}

/// The place in the order of work that waits from `waits_from` milliseconds on: lower is earlier. Does not depend on
/// when it is asked: all that waits ages alike.
pub fn place(priority: i32, waits_from: i64) -> i64 {
    waits_from.saturating_sub(i64::from(priority).saturating_mul(AGE_MS))
}

/// The candidate to begin now, given the slots in use. Candidates come in the order of their places.
pub fn pick(candidates: &[Candidate], in_use: &BTreeMap<String, u32>, now: i64) -> Option<usize> {
    let mut kept: BTreeMap<&str, u32> = BTreeMap::new();
    for (index, candidate) in candidates.iter().enumerate() {
        let fits = candidate.needs.iter().all(|need| {
            let used = in_use.get(&need.resource).copied().unwrap_or(0);
            let kept = kept.get(need.resource.as_str()).copied().unwrap_or(0);
            used.saturating_add(kept) < need.limit
        });
        if fits && candidate.ours {
            return Some(index);
        }
        // What could begin but not here is left to another worker: its slots are as good as taken only once it has
        // waited too long.
        if now.saturating_sub(candidate.waits_from) > PATIENCE_MS {
            for need in &candidate.needs {
                let count = kept.entry(need.resource.as_str()).or_default();
                *count = count.saturating_add(1);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests;
