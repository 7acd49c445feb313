//! Writing a lot that nobody reads soon, without filling the memory with it.
//!
//! A page cache takes a fresh page for each page written. In a virtual machine a fresh page is one that its host has to
//! find first, which costs more than all the rest of a write, and everywhere it pushes out what somebody does read.
//! What was written a while ago is on the disk by now, so its pages can be used again.
//!
//! Invariants
//! - Hints only: nothing here makes anything durable, or loses it.
//! - Memory that is to be kept once is not given up later: somebody reads there.
//! - Nobody waits for the disk: what is not written back yet stays in memory.

use std::{collections::VecDeque, mem, ops::Range};

use super::Storage;

/// Bytes after which what was written is given up, so that the disk has had time for them.
const LAG_BYTES: u64 = 16 << 20;

/// Writes that follow each other are told of together, up to about this many bytes.
const PIECE_BYTES: u64 = 1 << 20;

/// Who reads what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Nobody soon: its memory is given up.
    None,
    /// Somebody: it stays in memory.
    Some,
}

/// What one writer wrote lately to one storage.
#[derive(Debug, Default)]
pub struct WriteBehind {
    /// Written, but the storage was not asked for anything yet.
    piece: Range<u64>,
    ranges: VecDeque<Range<u64>>,
    bytes: u64,
}

impl WriteBehind {
    /// A range was written: with what was written just before it, it is sent on its way to the disk, and the memory of
    /// an earlier one is let go where nobody reads it.
    pub fn wrote(&mut self, storage: &dyn Storage, range: Range<u64>, readers: Readers) {
        if let Some(piece) = self.join(range) {
            self.send(storage, piece, readers);
        }
        if len_of(&self.piece) >= PIECE_BYTES {
            let piece = mem::take(&mut self.piece);
            self.send(storage, piece, readers);
        }
    }

    /// Makes a range part of the piece; returns the piece before where the range begins a new one.
    fn join(&mut self, range: Range<u64>) -> Option<Range<u64>> {
        if self.piece.end == range.start && !self.piece.is_empty() {
            self.piece.end = range.end;
            return None;
        }
        Some(mem::replace(&mut self.piece, range)).filter(|before| !before.is_empty())
    }

    fn send(&mut self, storage: &dyn Storage, piece: Range<u64>, readers: Readers) {
        let _hint = storage.start_writeback(piece.start, len_of(&piece));
        if readers == Readers::Some {
            self.ranges.clear();
            self.bytes = 0;
            return;
        }
        self.note(piece);
        while let Some(old) = self.due() {
            let _hint = storage.forget_cached(old.start, len_of(&old));
        }
    }

    fn note(&mut self, range: Range<u64>) {
        self.bytes += len_of(&range);
        self.ranges.push_back(range);
    }

    /// The oldest range, once enough was written after it.
    fn due(&mut self) -> Option<Range<u64>> {
        let after = self.bytes - self.ranges.front().map_or(0, len_of);
        let old = if after >= LAG_BYTES { self.ranges.pop_front() } else { None }?;
        self.bytes = after;
        Some(old)
    }
}

fn len_of(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Access, FileStorage};

    #[test]
    fn a_range_is_due_once_enough_was_written_after_it() {
        let mut behind = WriteBehind::default();
        behind.note(0..1000);
        assert_eq!(behind.due(), None);
        behind.note(5000..5000 + LAG_BYTES - 1);
        assert_eq!(behind.due(), None);
        behind.note(2000..2001);
        assert_eq!(behind.due(), Some(0..1000));
        assert_eq!(behind.due(), None);
        behind.note(1 << 40..(1 << 40) + 2 * LAG_BYTES);
        assert_eq!(behind.due(), Some(5000..5000 + LAG_BYTES - 1));
        assert_eq!(behind.due(), Some(2000..2001));
        assert_eq!(behind.due(), None, "nothing was written after it");
    }

    #[test]
    fn writes_that_follow_each_other_are_one_piece() {
        let mut behind = WriteBehind::default();
        assert_eq!(behind.join(0..10), None);
        assert_eq!(behind.join(10..30), None);
        assert_eq!(behind.join(40..50), Some(0..30));
        assert_eq!(behind.join(30..40), Some(40..50), "what lies before is not what follows");
        assert_eq!(behind.piece, 30..40);
    }

    #[test]
    fn what_was_let_go_is_still_there() {
        let folder = tempfile::tempdir().unwrap();
        let file = FileStorage::open(&folder.path().join("f"), Access::CreateNew).unwrap();
        let mut behind = WriteBehind::default();
        let piece = |n: u64| vec![u8::try_from(n % 251).unwrap(); 300_000];
        let pieces = 3 * LAG_BYTES / 300_000;
        for n in 0..pieces {
            file.write_at(n * 300_000, &piece(n)).unwrap();
            let readers = if n % 3 == 0 { Readers::Some } else { Readers::None };
            behind.wrote(&file, n * 300_000..(n + 1) * 300_000, readers);
        }
        let mut read = piece(0);
        for n in 0..pieces {
            file.read_at(n * 300_000, &mut read).unwrap();
            assert!(read == piece(n), "piece {n}");
        }
    }
}
