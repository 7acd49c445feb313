//! Reads small structures of a restore point in pieces large enough for a source far away.
//!
//! Invariants
//! - A read outside the disk is a doubt, not an error.
//! - Memory is a few pieces of 64 KiB.

use std::collections::VecDeque;

use super::ReadAt;
use crate::{Error, hydrate::is_transient};

const PIECE_BYTES: u64 = 64 << 10;
const PIECES: usize = 8;

/// Why reading a structure stops.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It cannot be trusted.
    Doubt(&'static str),
    /// It cannot be read now.
    Read(Error),
}

/// Stops with a doubt where `true` does not hold.
pub(super) fn ensure(holds: bool, doubt: &'static str) -> Result<(), Stop> {
    if holds { Ok(()) } else { Err(Stop::Doubt(doubt)) }
}

/// A restore point's bytes.
pub(super) struct Source<'a> {
    size: u64,
    read: ReadAt<'a>,
    pieces: VecDeque<(u64, Vec<u8>)>,
}

impl<'a> Source<'a> {
    pub(super) fn new(size: u64, read: ReadAt<'a>) -> Self {
        Self { size, read, pieces: VecDeque::new() }
    }

    /// Size of the disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// `N` bytes from `offset`.
    pub(super) fn bytes<const N: usize>(&mut self, offset: u64) -> Result<[u8; N], Stop> {
        let mut out = [0; N];
        self.fill(offset, &mut out)?;
        Ok(out)
    }

    /// `len` bytes from `offset`; `len` is the caller's to bound.
    pub(super) fn vec(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, Stop> {
        ensure(offset.checked_add(len as u64).is_some_and(|end| end <= self.size), "it leaves the disk")?;
        let mut out = vec![0; len];
        self.fill(offset, &mut out)?;
        Ok(out)
    }

    fn fill(&mut self, offset: u64, out: &mut [u8]) -> Result<(), Stop> {
        let end = offset.checked_add(out.len() as u64);
        ensure(end.is_some_and(|end| end <= self.size), "it leaves the disk")?;
        let (mut at, mut rest) = (offset, out);
        while !rest.is_empty() {
            let start = at - at % PIECE_BYTES;
            let skip = usize::try_from(at - start).unwrap_or(0);
            let piece = self.piece(start)?;
            let have = piece.get(skip..).unwrap_or_default();
            let n = have.len().min(rest.len());
            ensure(n > 0, "it leaves the disk")?;
            let (front, tail) = rest.split_at_mut(n);
            front.copy_from_slice(have.get(..n).unwrap_or_default());
            at += n as u64;
            rest = tail;
        }
        Ok(())
    }

    fn piece(&mut self, start: u64) -> Result<&[u8], Stop> {
        if let Some(at) = self.pieces.iter().position(|(have, _)| *have == start) {
            if let Some(found) = self.pieces.remove(at) {
                self.pieces.push_front(found);
            }
        } else {
            let len = PIECE_BYTES.min(self.size.saturating_sub(start));
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            match (self.read)(start, &mut bytes) {
                Ok(()) => {}
                Err(Error::Format(e)) if !is_transient(&e) => return Err(Stop::Doubt("it is damaged in the source")),
                Err(e) => return Err(Stop::Read(e)),
            }
            self.pieces.truncate(PIECES - 1);
            self.pieces.push_front((start, bytes));
        }
        Ok(self.pieces.front().map_or(&[], |(_, bytes)| bytes.as_slice()))
    }
}

/// A little-endian field of two bytes; 0 where the structure is too short, which its reader has ruled out.
pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

/// The same of four bytes.
pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// The same of eight bytes.
pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// A big-endian field of two bytes.
pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    le16(bytes, at).swap_bytes()
}

/// The same of four bytes.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    le32(bytes, at).swap_bytes()
}
