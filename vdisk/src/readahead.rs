//! When to decode ahead of a client that reads one piece after the other.
//!
//! A client with many requests in flight needs no help; one that asks for the next piece only when
//! it has the last (`dd`, `cp`, a guest's own readahead) waits for every decode. Two blocks ahead,
//! decoded on another thread, hide that.
//!
//! Invariants
//! - A range is named at most once while the client goes on in order; random reads name none.
//! - What is named lies ahead of the client, at most two blocks and the rest of the present one.
//!
//! Not here: threads. Whoever serves the client owns a pool, and calls `Disk::prefetch` on it.

use std::ops::Range;

/// How far ahead, in bytes: two blocks of the usual size.
const AHEAD_BYTES: u64 = 128 * 1024;
/// Reads in order before anything is fetched: chance makes two.
const STREAK_MIN: u32 = 3;

/// Watches the reads of one client.
#[derive(Clone, Debug, Default)]
pub struct Readahead {
    /// Where the last read ended.
    next: u64,
    streak: u32,
    /// Up to where ranges have been named.
    named: u64,
}

impl Readahead {
    /// Takes note of a read, and says what to fetch now, if anything. Ends are multiples of 64 KiB;
    /// whoever fetches cuts them at the end of the disk.
    pub fn after(&mut self, offset: u64, len: u64) -> Option<Range<u64>> {
        if offset == self.next {
            self.streak = self.streak.saturating_add(1);
        } else {
            *self = Self { streak: 1, ..Self::default() };
        }
        self.next = offset.saturating_add(len);
        // A client whose reads are as long as that keeps the decoder busy itself.
        if self.streak < STREAK_MIN || len >= AHEAD_BYTES {
            return None;
        }
        let half = AHEAD_BYTES / 2;
        let until = (self.next / half).saturating_mul(half).saturating_add(AHEAD_BYTES);
        let from = self.named.max(self.next);
        self.named = until.max(self.named);
        (from < until).then_some(from..until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(reads: impl IntoIterator<Item = (u64, u64)>) -> Vec<Range<u64>> {
        let mut ahead = Readahead::default();
        reads.into_iter().filter_map(|(offset, len)| ahead.after(offset, len)).collect()
    }

    #[test]
    fn pages_in_order_name_each_block_once_and_before_it_is_needed() {
        let mut ahead = Readahead::default();
        let mut end = None;
        for page in 0..256u64 {
            if page >= 3 {
                let known = end.expect("named by now");
                assert!(known >= (page + 1) * 4096, "page {page} was not named");
                assert!(known <= (page + 1) * 4096 + AHEAD_BYTES + 65536, "too far ahead of page {page}");
            }
            if let Some(range) = ahead.after(page * 4096, 4096) {
                assert_eq!(range.start, end.unwrap_or(range.start), "once, without a gap");
                end = Some(range.end);
            }
        }
    }

    #[test]
    fn reads_out_of_order_name_nothing() {
        assert_eq!(named((0..100).map(|i| (i * 7919 % 100 * 65536, 4096))), []);
        assert_eq!(named((0..100).rev().map(|i| (i * 4096, 4096))), []);
        assert_eq!(named((0..100).flat_map(|i| [(i * 1_000_000, 4096), (i * 1_000_000 + 4096, 4096)])), []);
    }

    #[test]
    fn long_reads_need_no_help() {
        assert_eq!(named((0..100).map(|i| (i << 20, 1 << 20))), []);
    }

    #[test]
    fn a_jump_starts_over() {
        let mut ahead = Readahead::default();
        for page in 0..10 {
            ahead.after(page * 4096, 4096);
        }
        assert_eq!(ahead.after(1 << 30, 4096), None);
        assert_eq!(ahead.after((1 << 30) + 4096, 4096), None);
        assert_eq!(ahead.after((1 << 30) + 8192, 4096), Some((1 << 30) + 12288..(1 << 30) + 131_072));
        assert_eq!(ahead.after(u64::MAX, 4096), None, "nothing overflows");
    }
}
