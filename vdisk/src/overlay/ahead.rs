//! How far writes that go straight to `disk.raw` may run ahead of the next sync.
//!
//! A flush has to sync all that anybody has written in place. So a client that floods the disk would make every other
//! client's flush as long as its flood. It pays for that itself instead: while somebody asks for flushes, whoever has
//! [`OverlayOptions::ahead_bytes`](super::OverlayOptions) in place and not synced syncs before it goes on.
//!
//! Invariants
//! - While flushes are asked for, a flush finds no more in place than that, and a write of each thread.
//! - Where nobody flushes nobody waits: write-back is only begun early.
//! - Decided by counting, never by a clock: the same calls always sync at the same places.
//!
//! Not here: syncing (`commit`).

use crate::sync::{AtomicU64, Ordering};

/// For how many syncs that writers make of their own accord a flush that was asked for is remembered.
const REMEMBERED: u64 = 16;
/// After so many times the allowance write-back is begun where nobody flushes.
const SEND_TIMES: u64 = 8;

/// What a writer does before it stores more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Go,
    /// Begins write-back of what is in place.
    Send,
    /// Syncs it.
    Sync,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ahead {
    /// In place since the last group of flushes took what was there.
    bytes: AtomicU64,
    /// How much of that has been sent on its way.
    sent: AtomicU64,
    /// Syncs to go until the last flush is forgotten.
    asked: AtomicU64,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { bytes: AtomicU64::new(0), sent: AtomicU64::new(0), asked: AtomicU64::new(0) }
    }

    /// Bytes went in place.
    pub(super) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A group of flushes covers all that is in place.
    pub(super) fn taken(&self) {
        self.bytes.store(0, Ordering::Relaxed);
        self.sent.store(0, Ordering::Relaxed);
    }

    /// Somebody outside asks for a flush.
    pub(super) fn asked(&self) {
        self.asked.store(REMEMBERED, Ordering::Relaxed);
    }

    /// What the next writer does, with `allowed` bytes.
    pub(super) fn step(&self, allowed: u64) -> Step {
        let bytes = self.bytes.load(Ordering::Relaxed);
        if bytes < allowed {
            return Step::Go;
        }
        let asked = self.asked.load(Ordering::Relaxed);
        if asked > 0 {
            // Two at once may count as one: it is remembered for a little longer.
            self.asked.store(asked - 1, Ordering::Relaxed);
            return Step::Sync;
        }
        let sent = self.sent.load(Ordering::Relaxed);
        if bytes.saturating_sub(sent) < allowed.saturating_mul(SEND_TIMES) {
            return Step::Go;
        }
        self.sent.store(bytes, Ordering::Relaxed);
        Step::Send
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_floods_syncs_while_somebody_flushes_and_only_then() {
        let ahead = Ahead::new();
        let mut steps = Vec::new();
        for write in 0..64 {
            if write == 32 {
                ahead.asked();
                ahead.taken();
            }
            steps.push(ahead.step(4));
            if steps.last() == Some(&Step::Sync) {
                ahead.taken();
            }
            ahead.add(1);
        }
        let places = |wanted| (0..64).filter(|n| steps.get(*n) == Some(&wanted)).collect::<Vec<usize>>();
        assert!(places(Step::Send).is_empty(), "32 writes without a flush are not worth it");
        assert_eq!(places(Step::Sync), vec![36, 40, 44, 48, 52, 56, 60]);
    }

    #[test]
    fn a_flush_is_forgotten_in_time() {
        let ahead = Ahead::new();
        ahead.asked();
        let mut syncs = 0;
        for _ in 0..100 {
            ahead.add(4);
            match ahead.step(4) {
                Step::Sync => {
                    syncs += 1;
                    ahead.taken();
                }
                Step::Go | Step::Send => {}
            }
        }
        assert_eq!(syncs, REMEMBERED);
        let sends = (0..64).filter(|_| (ahead.add(4), ahead.step(4)).1 == Step::Send).count();
        assert_eq!(sends, 8, "once for eight times the allowance");
    }
}
