//! Writes down what a machine reads for the first time.
//!
//! Invariants
//! - Each block of 4 KiB is named once, at its first read.
//! - Memory is bounded by [`STEPS_MAX`]; whoever reads while it is full or late costs one look at a clock.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::{BLOCK_BYTES, BYTES_MAX, RECORD_MS, STEPS_MAX, Step, Trace};

/// Blocks of 1 MiB, as bits.
type Seen = [u64; 4];
const SEEN_BLOCKS: u64 = 256;

/// A trace being recorded.
#[derive(Debug)]
pub(crate) struct Recorder {
    trace: Trace,
    bytes: u64,
    seen: HashMap<u64, Seen>,
    /// When the first read was, as far as this process' clock goes.
    began: Option<Instant>,
    /// Time that passed in an earlier process.
    before: Duration,
}

impl Recorder {
    /// Goes on from what an earlier process of the same recovery recorded; an empty trace begins.
    pub(crate) fn new(earlier: Trace, size: u64) -> Self {
        let before = Duration::from_millis(earlier.steps.last().map_or(0, |s| u64::from(s.after_ms)));
        let mut recorder = Self {
            trace: Trace { size, complete: earlier.complete, steps: Vec::new() },
            bytes: 0,
            seen: HashMap::new(),
            began: None,
            before,
        };
        for step in earlier.steps {
            recorder.add(step.range.start, step.range.end, step.after_ms);
        }
        recorder
    }

    /// Notes a read; `false` once nothing more is recorded.
    pub(crate) fn note(&mut self, offset: u64, len: u64, now: Instant) -> bool {
        let began = *self.began.get_or_insert(now);
        let after = self.before + now.saturating_duration_since(began);
        let after_ms = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
        if after_ms > RECORD_MS {
            self.trace.complete = true;
        }
        if !self.trace.complete {
            self.add(offset, offset.saturating_add(len), after_ms);
        }
        !self.trace.complete
    }

    fn add(&mut self, from: u64, to: u64, after_ms: u32) {
        let (first, end) = (from / BLOCK_BYTES, to.min(self.trace.size).div_ceil(BLOCK_BYTES));
        let mut block = first;
        while block < end {
            let bits = self.seen.entry(block / SEEN_BLOCKS).or_default();
            let at = block % SEEN_BLOCKS;
            let word = bits.get_mut(usize::try_from(at / 64).unwrap_or(0));
            let fresh = word.is_some_and(|word| {
                let bit = 1 << (at % 64);
                let fresh = *word & bit == 0;
                *word |= bit;
                fresh
            });
            if fresh && !self.push(block, after_ms) {
                self.trace.complete = true;
                return;
            }
            block += 1;
        }
    }

    /// `false` where it is full.
    fn push(&mut self, block: u64, after_ms: u32) -> bool {
        let start = block * BLOCK_BYTES;
        let end = (start + BLOCK_BYTES).min(self.trace.size);
        if self.bytes + (end - start) > BYTES_MAX {
            return false;
        }
        let full = self.trace.steps.len() >= STEPS_MAX;
        match self.trace.steps.last_mut() {
            // Read one after another, in one go or nearly so.
            Some(last) if last.range.end == start && after_ms.saturating_sub(last.after_ms) < 100 => {
                last.range.end = end;
            }
            _ if full => return false,
            _ => self.trace.steps.push(Step { range: start..end, after_ms }),
        }
        self.bytes += end - start;
        true
    }

    /// What has been recorded so far.
    pub(crate) fn trace(&self) -> &Trace {
        &self.trace
    }

    /// How much that is, to see whether it has grown.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}
