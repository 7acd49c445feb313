//! `lookup` and `scan` of a layer whose format answers piece by piece.
//!
//! A piece is what one structure says at `at`, for how many bytes of `at..end` that holds. Formats give
//! pieces; here they are put together, so that both ways of asking see the same runs.
//!
//! Invariants
//! - Consecutive pieces that say the same (or lie one after the other in one file) are one run.
//! - A broken piece spoils only its own range: a run that reaches it ends before it.
//!
//! [`layer_in_pieces`] writes the methods of a layer that are the same for all such formats.

use crate::{Content, Error, Result};

/// The methods of a [`crate::Layer`] that follow from its `piece(&self, at, end)`; and, for one whose bytes all lie in one
/// [`crate::tables::TableFile`], those that tell of its file. The fields that lead to that are named.
macro_rules! layer_in_pieces {
    () => {
        fn lookup(&self, offset: u64, len_max: u64) -> $crate::Result<($crate::Content, u64)> {
            $crate::runs::lookup(self.label(), self.size(), offset, len_max, |at, end| self.piece(at, end))
        }

        fn scan(&self, offset: u64, len: u64, each: &mut dyn FnMut(u64, u64, $crate::Content)) -> $crate::Result<()> {
            $crate::runs::scan(self.size(), offset, len, each, |at, end| self.piece(at, end))
        }
    };
    ($($file:ident).+) => {
        $crate::runs::layer_in_pieces!();

        fn file(&self, slot: $crate::FileSlot) -> $crate::Result<&std::sync::Arc<dyn $crate::Storage>> {
            self.$($file).+.only(slot)
        }

        fn file_id(&self, _slot: $crate::FileSlot) -> u64 {
            self.$($file).+.id
        }
    };
}
pub(crate) use layer_in_pieces;

/// The run at `offset`, in at most `len_max` bytes of a disk of `size` bytes.
pub(crate) fn lookup(
    label: &str,
    size: u64,
    offset: u64,
    len_max: u64,
    piece: impl Fn(u64, u64) -> Result<(Content, u64)>,
) -> Result<(Content, u64)> {
    let left = size.checked_sub(offset).filter(|left| *left > 0 && len_max > 0);
    let left = left.ok_or_else(|| Error::OutOfRange { path: label.into(), offset, len: len_max, size })?;
    let end = offset + left.min(len_max);
    let (first, mut len) = bounded(piece(offset, end)?, end - offset);
    while offset + len < end {
        let Ok((next, n)) = piece(offset + len, end) else { break };
        if !continues(first, len, next) {
            break;
        }
        len += bounded((next, n), end - offset - len).1;
    }
    Ok((first, len))
}

/// Tells `each` every run of `offset..offset + len` that is not absent.
pub(crate) fn scan(
    size: u64,
    offset: u64,
    len: u64,
    each: &mut dyn FnMut(u64, u64, Content),
    piece: impl Fn(u64, u64) -> Result<(Content, u64)>,
) -> Result<()> {
    let end = offset.saturating_add(len).min(size);
    let mut run: Option<(u64, u64, Content)> = None;
    let mut tell = |run: Option<(u64, u64, Content)>| {
        if let Some((start, len, content)) = run.filter(|(_, _, content)| *content != Content::Absent) {
            each(start, len, content);
        }
    };
    let mut at = offset;
    while at < end {
        let (content, n) = match piece(at, end) {
            Ok(told) => bounded(told, end - at),
            Err(error) => {
                tell(run);
                return Err(error);
            }
        };
        match &mut run {
            Some((_, so_far, first)) if continues(*first, *so_far, content) => *so_far += n,
            _ => tell(run.replace((at, n, content))),
        }
        at += n;
    }
    tell(run);
    Ok(())
}

/// A piece that answers for nothing would never end, one that answers for too much would lie.
fn bounded((content, n): (Content, u64), len_max: u64) -> (Content, u64) {
    (content, n.clamp(1, len_max))
}

/// Whether `next`, which lies right behind `len` bytes of `run`, goes on with it.
pub(crate) fn continues(run: Content, len: u64, next: Content) -> bool {
    match (run, next) {
        (Content::Absent, Content::Absent) | (Content::Zero, Content::Zero) => true,
        (Content::Plain { file: a, offset }, Content::Plain { file: b, offset: next }) => {
            a == b && offset.checked_add(len) == Some(next)
        }
        _ => false,
    }
}
