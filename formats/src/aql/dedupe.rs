//! Which contents the chain already stores: a table of bounded size.
//!
//! Invariants
//! - Memory never exceeds the budget: the table is made once, buckets of eight, the oldest of a bucket
//!   gives way. Forgetting costs space, never correctness.
//! - Only blocks that are durable frames of this file or of a sealed older one are in it.

use super::{entry::Stored, key::ContentId};

const WAYS: usize = 8;

/// A stored block and the block it was written for, where that is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) id: ContentId,
    pub(crate) at: Stored,
    /// `u64::MAX` where it is not known.
    pub(crate) logical: u64,
}

/// Content id -> stored block.
#[derive(Debug)]
pub(crate) struct DedupeTable {
    buckets: Vec<[Option<Known>; WAYS]>,
    next: Vec<u8>,
    kept: usize,
}

impl DedupeTable {
    /// A table of at most `budget` bytes, and no larger than `blocks` blocks need. 0 remembers nothing.
    pub(crate) fn new(budget: usize, blocks: u64) -> Self {
        let bucket = size_of::<[Option<Known>; WAYS]>() + 1;
        let wanted = usize::try_from(blocks).unwrap_or(usize::MAX).saturating_mul(2).div_ceil(WAYS);
        let possible = budget / bucket;
        let count = if possible == 0 { 0 } else { wanted.next_power_of_two().min(1 << possible.ilog2()) };
        Self { buckets: vec![[None; WAYS]; count], next: vec![0; count], kept: 0 }
    }

    /// Blocks it can hold.
    pub(crate) fn capacity(&self) -> usize {
        self.buckets.len() * WAYS
    }

    /// Blocks it holds.
    pub(crate) fn len(&self) -> usize {
        self.kept
    }

    fn bucket(&self, id: &ContentId) -> usize {
        let mut low = [0; 8];
        low.iter_mut().zip(id).for_each(|(to, from)| *to = *from);
        usize::try_from(u64::from_le_bytes(low) & (self.buckets.len() as u64).wrapping_sub(1)).unwrap_or_default()
    }

    pub(crate) fn find(&self, id: &ContentId) -> Option<Known> {
        self.buckets.get(self.bucket(id))?.iter().flatten().find(|known| known.id == *id).copied()
    }

    pub(crate) fn insert(&mut self, known: Known) {
        let index = self.bucket(&known.id);
        let (Some(bucket), Some(next)) = (self.buckets.get_mut(index), self.next.get_mut(index)) else { return };
        if let Some(same) = bucket.iter_mut().flatten().find(|k| k.id == known.id) {
            *same = known;
            return;
        }
        let place = bucket.iter().position(Option::is_none).unwrap_or_else(|| {
            let oldest = usize::from(*next) % WAYS;
            *next = next.wrapping_add(1);
            oldest
        });
        if let Some(slot) = bucket.get_mut(place) {
            self.kept += usize::from(slot.is_none());
            *slot = Some(known);
        }
    }
}
