//! How far writers may run ahead of the next flush.
//!
//! A flush covers all that anybody was acknowledged. So a client that floods the disk would make every other client's flush as
//! long as its flood. It pays for that itself instead, while somebody asks for flushes: a large write is durable in its place before it is
//! acknowledged (`paid`); small ones stay in memory for the journal, and once
//! [`OverlayOptions::ahead_bytes`](super::OverlayOptions) of them wait, whoever wrote a good part of them flushes before it goes
//! on, and leaves room in the journal and in memory. Who wrote little goes on: it is not to wait for the flood of another.
//!
//! Invariants
//! - While flushes are asked for, a flush finds no more than that to record, and of each thread a write and a sixteenth; and nothing that
//!   a flood has put in place since.
//! - Where nobody flushes nobody waits: write-back is only begun early.
//! - Decided by counting, never by a clock: the same calls always sync at the same places.
//!
//! Not here: flushing (`commit`), making room (`settle`).

use std::cell::Cell;

use crate::sync::{AtomicU64, Ordering};

/// For how many syncs that writers make of their own accord a flush that was asked for is remembered: a flood of 2 GB/s that
/// syncs each MiB is held back for 64 ms after it.
const REMEMBERED: u64 = 128;
/// After so many times the allowance write-back is begun where nobody flushes.
const SEND_TIMES: u64 = 8;

/// Whoever has this part of the allowance in place is one of those who pay.
const PART: u64 = 16;
/// A write of this part of the allowance pays for itself.
const LARGE_PART: u64 = 4;

/// Numbers for overlays, and for what was in place between two syncs of one: no two are the same. Nobody waits by it, so
/// it need not be seen by the schedule test.
static ROUNDS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

thread_local! {
    /// What the calling thread has put in place, and in which round.
    static MINE: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

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
    /// How many bytes may wait; `u64::MAX` for as many as there are.
    allowed: u64,
    /// In place, or in memory while flushes are asked for, since the last sync began.
    bytes: AtomicU64,
    /// Number of the time since then.
    round: AtomicU64,
    /// How much of that has been sent on its way.
    sent: AtomicU64,
    /// Syncs to go until the last flush is forgotten.
    asked: AtomicU64,
}

impl Ahead {
    /// `allowed` bytes may wait for a flush; `u64::MAX` for as many as there are.
    pub(super) fn new(allowed: u64) -> Self {
        let round = AtomicU64::new(next_round());
        Self { allowed, bytes: AtomicU64::new(0), round, sent: AtomicU64::new(0), asked: AtomicU64::new(0) }
    }

    /// The calling thread put bytes in place.
    pub(super) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let round = self.round.load(Ordering::Relaxed);
        MINE.set((round, self.mine() + bytes));
    }

    /// The calling thread has something more in memory.
    pub(super) fn keep(&self, bytes: u64) {
        if self.is_asked() {
            self.add(bytes);
        }
    }

    /// Whether flushes are asked for, and somebody is to be held back for them.
    pub(super) fn is_asked(&self) -> bool {
        self.allowed != u64::MAX && self.asked.load(Ordering::Relaxed) > 0
    }

    /// Whether a write of so many bytes is to be durable before it is acknowledged.
    pub(super) fn pays(&self, bytes: u64) -> bool {
        self.is_asked() && bytes >= self.allowed / LARGE_PART
    }

    /// One that was is. Two at once may count as one: the flush is remembered for a little longer.
    pub(super) fn paid(&self) {
        let asked = self.asked.load(Ordering::Relaxed);
        self.asked.store(asked.saturating_sub(1), Ordering::Relaxed);
    }

    /// What the calling thread has put in place since the last sync began.
    fn mine(&self) -> u64 {
        let (round, bytes) = MINE.get();
        if round == self.round.load(Ordering::Relaxed) { bytes } else { 0 }
    }

    /// A sync that begins now covers all that is in place.
    pub(super) fn taken(&self) {
        self.round.store(next_round(), Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
        self.sent.store(0, Ordering::Relaxed);
    }

    /// Somebody outside asks for a flush.
    pub(super) fn asked(&self) {
        self.asked.store(REMEMBERED, Ordering::Relaxed);
    }

    /// What the next writer does.
    pub(super) fn step(&self) -> Step {
        let (bytes, allowed) = (self.bytes.load(Ordering::Relaxed), self.allowed);
        if bytes < allowed {
            return Step::Go;
        }
        if self.is_asked() {
            if self.mine() < allowed / PART {
                return Step::Go;
            }
            self.paid();
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

fn next_round() -> u64 {
    // From 1 on: a thread that has put nothing in place has the number 0.
    ROUNDS.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_floods_pays() {
        let ahead = Ahead::new(64);
        ahead.asked();
        std::thread::scope(|scope| {
            let flood = scope.spawn(|| {
                ahead.add(100);
                ahead.step()
            });
            assert_eq!(flood.join().expect("it ends"), Step::Sync);
        });
        assert_eq!(ahead.step(), Step::Go, "this thread wrote nothing");
        ahead.add(4);
        assert_eq!(ahead.step(), Step::Sync, "this is a good part");
        ahead.taken();
        ahead.add(3);
        assert_eq!((ahead.mine(), ahead.step()), (3, Step::Go));
        let other = Ahead::new(64);
        assert_eq!(other.mine(), 0, "of another disk");
    }

    #[test]
    fn whoever_floods_syncs_while_somebody_flushes_and_only_then() {
        let ahead = Ahead::new(4);
        let mut steps = Vec::new();
        for write in 0..64 {
            if write == 32 {
                ahead.asked();
                ahead.taken();
            }
            steps.push(ahead.step());
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
        let ahead = Ahead::new(4);
        ahead.asked();
        let mut syncs = 0;
        for _ in 0..200 {
            ahead.add(4);
            match ahead.step() {
                Step::Sync => {
                    syncs += 1;
                    ahead.taken();
                }
                Step::Go | Step::Send => {}
            }
        }
        assert_eq!(syncs, REMEMBERED);
        let sends = (0..64).filter(|_| (ahead.add(4), ahead.step()).1 == Step::Send).count();
        assert_eq!(sends, 8, "once for eight times the allowance");
    }
}
