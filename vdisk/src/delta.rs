//! A set of bytes of a disk: what differs between two points, what a guest has changed, what is
//! still missing.
//!
//! Invariants
//! - Ranges are non-empty, sorted, disjoint and never touch (touching ranges are one range), so
//!   equal sets are equal values and [`Delta::bytes`] counts each byte once.
//! - Whatever is deserialised is brought into that form, or refused where a range leaves `u64`.
//! - A delta may say too much about a disk and never too little: rounding is outwards.
//!
//! Not here: the bytes themselves, and what a guest has changed (`Overlay`).

use std::ops::Range;

use serde::{Deserialize, Serialize};

mod between;
#[cfg(test)]
mod tests;

pub use between::delta_between;

/// Sorted, disjoint, merged ranges of bytes. As JSON a list of `[offset, len]` pairs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct Delta {
    ranges: Vec<Range<u64>>,
}

impl Delta {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The whole of a disk of `size` bytes.
    pub fn full(size: u64) -> Self {
        std::iter::once(0..size).collect()
    }

    /// Adds a range; an empty one changes nothing. Constant time where `range` begins at or after
    /// the start of the last range, as it does for whoever walks a disk in order.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let Some(last) = self.ranges.last_mut() else { return self.ranges.push(range) };
        if range.start > last.end {
            self.ranges.push(range);
        } else if range.start >= last.start {
            last.end = last.end.max(range.end);
        } else {
            self.insert_before_last(range);
        }
    }

    fn insert_before_last(&mut self, mut range: Range<u64>) {
        let from = self.ranges.partition_point(|r| r.end < range.start);
        let to = self.ranges.partition_point(|r| r.start <= range.end);
        if let Some(touched) = self.ranges.get(from..to)
            && let (Some(first), Some(last)) = (touched.first(), touched.last())
        {
            range = range.start.min(first.start)..range.end.max(last.end);
        }
        self.ranges.splice(from..to, std::iter::once(range));
    }

    /// The ranges in order.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Range<u64>> + '_ {
        self.ranges.iter().cloned()
    }

    /// True where nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many bytes are in the set.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|r| r.end - r.start).sum()
    }

    /// End of the last range, 0 for the empty set.
    pub fn end(&self) -> u64 {
        self.ranges.last().map_or(0, |r| r.end)
    }

    /// Whether the byte at `offset` is in the set.
    pub fn contains(&self, offset: u64) -> bool {
        let next = self.ranges.partition_point(|r| r.end <= offset);
        self.ranges.get(next).is_some_and(|r| r.start <= offset)
    }

    /// Whether any byte of `range` is in the set.
    pub fn overlaps(&self, range: &Range<u64>) -> bool {
        let next = self.ranges.partition_point(|r| r.end <= range.start);
        range.start < range.end && self.ranges.get(next).is_some_and(|r| r.start < range.end)
    }

    /// Whether `offset` is in the set, and the offset until which that holds, at most `end_max`. It is an
    /// offset and no length: whoever walks a disk goes on from there. `offset < end_max`.
    pub fn run_until(&self, offset: u64, end_max: u64) -> (bool, u64) {
        let next = self.ranges.partition_point(|r| r.end <= offset);
        match self.ranges.get(next) {
            Some(r) if r.start <= offset => (true, r.end.min(end_max)),
            Some(r) => (false, r.start.min(end_max)),
            None => (false, end_max),
        }
    }

    /// Bytes in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let (mut left, mut right) = (self.iter().peekable(), other.iter().peekable());
        let mut out = Self::new();
        loop {
            let next = match (left.peek(), right.peek()) {
                (Some(a), Some(b)) if a.start <= b.start => left.next(),
                (_, Some(_)) => right.next(),
                (Some(_), None) => left.next(),
                (None, None) => return out,
            };
            out.extend(next);
        }
    }

    /// Bytes in both sets.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Self {
        let (mut left, mut right) = (self.iter().peekable(), other.iter().peekable());
        let mut out = Self::new();
        while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
            out.insert(a.start.max(b.start)..a.end.min(b.end));
            if a.end <= b.end {
                left.next();
            } else {
                right.next();
            }
        }
        out
    }

    /// Bytes in `self` and not in `other`.
    #[must_use]
    pub fn subtract(&self, other: &Self) -> Self {
        let mut out = Self::new();
        let mut cut = other.iter().peekable();
        for range in self.iter() {
            let mut from = range.start;
            while cut.next_if(|c| c.end <= from).is_some() {}
            // The last cut may reach into the next range, so it is looked at and left in place.
            while let Some(c) = cut.peek().filter(|c| c.start < range.end) {
                out.insert(from..c.start);
                from = from.max(c.end);
                if c.end >= range.end {
                    break;
                }
                cut.next();
            }
            out.insert(from..range.end);
        }
        out
    }

    /// Bytes of the set that lie in `range`.
    #[must_use]
    pub fn clip(&self, range: Range<u64>) -> Self {
        self.intersect(&std::iter::once(range).collect())
    }

    /// The smallest set of whole blocks of `block` bytes (at least 1) that covers this one; a block
    /// that would leave `u64` is cut there.
    #[must_use]
    pub fn round_out(&self, block: u64) -> Self {
        let block = block.max(1);
        let up = |end: u64| end.checked_next_multiple_of(block).unwrap_or(u64::MAX);
        self.iter().map(|r| r.start - r.start % block..up(r.end)).collect()
    }
}

impl FromIterator<Range<u64>> for Delta {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut out = Self::new();
        out.extend(ranges);
        out
    }
}

impl Extend<Range<u64>> for Delta {
    fn extend<I: IntoIterator<Item = Range<u64>>>(&mut self, ranges: I) {
        for range in ranges {
            self.insert(range);
        }
    }
}

impl<'a> IntoIterator for &'a Delta {
    type Item = &'a Range<u64>;
    type IntoIter = std::slice::Iter<'a, Range<u64>>;

    fn into_iter(self) -> Self::IntoIter {
        self.ranges.iter()
    }
}

impl From<Delta> for Vec<(u64, u64)> {
    fn from(delta: Delta) -> Self {
        delta.iter().map(|r| (r.start, r.end - r.start)).collect()
    }
}

/// A pair that is no range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("range {offset}+{len} is larger than 64 bits")]
pub struct RangeOverflow {
    /// Start in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl TryFrom<Vec<(u64, u64)>> for Delta {
    type Error = RangeOverflow;

    fn try_from(mut pairs: Vec<(u64, u64)>) -> Result<Self, RangeOverflow> {
        // Sorted first, so that a hostile order cannot make each insertion shift all others.
        pairs.sort_unstable();
        let mut out = Self::new();
        for (offset, len) in pairs {
            out.insert(offset..offset.checked_add(len).ok_or(RangeOverflow { offset, len })?);
        }
        Ok(out)
    }
}
