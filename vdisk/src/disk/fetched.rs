//! How much has been fetched for a disk, through all chains it has had.
//!
//! Invariants
//! - What is on its way through a chain that was let go is counted when it comes.
//! - What is kept grows with the chains somebody still reads from, not with those there have been.
//!
//! Not here: what counts as fetched (`chain`).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::{Chain, sync::Mutex};

#[derive(Debug, Default)]
struct Counts {
    /// Of chains nobody can read from any more.
    before: u64,
    chains: Vec<Arc<AtomicU64>>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Fetched(Mutex<Counts>);

impl Fetched {
    /// Counts with this chain from now on.
    pub(super) fn add(&self, chain: &Chain) {
        let mut counts = self.0.lock();
        let Counts { before, chains } = &mut *counts;
        chains.retain(|count| {
            // The chain has the other reference: without it nothing is added any more.
            let gone = Arc::strong_count(count) == 1;
            *before += if gone { count.load(Ordering::Relaxed) } else { 0 };
            !gone
        });
        if !chains.iter().any(|count| Arc::ptr_eq(count, chain.count())) {
            chains.push(Arc::clone(chain.count()));
        }
    }

    /// Bytes of all.
    pub(super) fn bytes(&self) -> u64 {
        let counts = self.0.lock();
        counts.before + counts.chains.iter().map(|count| count.load(Ordering::Relaxed)).sum::<u64>()
    }
}
