//! One step of hydration: a range, from the chain into the overlay.
//!
//! Invariants
//! - Only what is absent is read from the chain; what somebody else makes local meanwhile stays his.
//! - Data is stored in whole overlay blocks; a range without data only gets its marks.
//! - Nothing is durable before [`Disk::seal`].
//! - The bulk copy leaves the cache to the guest: what is stored is not asked of the chain again.
//!
//! Not here: which range comes next, retries, write-back.

use std::ops::Range;

use crate::{
    Chain, Delta, Disk, Extent, ExtentKind, Overlay, Result,
    overlay::{OVERLAY_BLOCK_BYTES, Run},
    sync::Mutex,
};

/// Most bytes that are read and stored at once.
pub(crate) const STEP_BYTES: u64 = 1 << 20;

/// Why a range is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// The guest waits for it, waits beside it, or waited for it in an earlier boot.
    Urgent,
    /// Everything has to come over.
    Bulk,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hydrated {
    /// Bytes that became local.
    pub local: u64,
    /// Bytes of them that were copied; the rest is without data.
    pub copied: u64,
}

impl Disk {
    /// Makes a range local, as far as it is absent: one attempt, without waiting for a source that is
    /// away. The range is rounded outwards to whole overlay blocks.
    ///
    /// # Errors
    /// [`crate::Error::ReadOnly`]; what the chain reports; [`crate::Error::NoSpace`]. What was made local
    /// before stays local.
    pub fn hydrate(&self, offset: u64, len: u64) -> Result<Hydrated> {
        self.hydrate_with(offset, len, Class::Urgent, &mut Vec::new())
    }

    /// As [`Disk::hydrate`], with a buffer to use again.
    pub(crate) fn hydrate_with(&self, offset: u64, len: u64, class: Class, buf: &mut Vec<u8>) -> Result<Hydrated> {
        let overlay = self.overlay()?;
        let mut done = Hydrated::default();
        let Some(chain) = self.source()? else { return Ok(done) };
        let start = offset - offset % OVERLAY_BLOCK_BYTES;
        let end = offset.saturating_add(len).min(self.size());
        let end = end.next_multiple_of(OVERLAY_BLOCK_BYTES).min(self.size());
        let mut at = start;
        while at < end {
            let (kind, n) = overlay.run(at, (end - at).min(STEP_BYTES));
            if kind == Run::Absent {
                hydrate_run(overlay, &chain, self.turn(), at..at + n, class, buf, &mut done)?;
            }
            at += n;
        }
        Ok(done)
    }

    /// Makes durable what was hydrated, with its marks: from then on a restart need not copy it again.
    ///
    /// # Errors
    /// [`crate::Error::SyncFailed`], [`crate::Error::NoSpace`], [`crate::Error::ReadOnly`].
    pub fn seal(&self) -> Result<()> {
        self.overlay()?.seal()
    }
}

/// Copies a run of whole blocks.
fn hydrate_run(
    overlay: &Overlay,
    chain: &Chain,
    turn: &Mutex<()>,
    Range { start: offset, end }: Range<u64>,
    class: Class,
    buf: &mut Vec<u8>,
    done: &mut Hydrated,
) -> Result<()> {
    let len = end - offset;
    let mut extents = Vec::new();
    chain.extents(offset, len, &mut extents)?;
    for (has_data, from, to) in block_runs(&extents, offset + len) {
        if has_data {
            buf.resize(usize::try_from(to - from).unwrap_or(usize::MAX), 0);
            match class {
                Class::Urgent => chain.read(from, buf)?,
                Class::Bulk => chain.read_once(from, buf)?,
            }
            let stored = {
                let _turn = turn.lock();
                overlay.fill(from, buf)?
            };
            done.local += stored;
            done.copied += stored;
        } else {
            done.local += overlay.fill_zero(from, to - from)?;
        }
    }
    Ok(())
}

/// Extents as runs of whole blocks `(has data, from, to)`; a block that has data anywhere has data. They
/// begin at a block; `end` is the end of a block, or of the disk.
fn block_runs(extents: &[Extent], end: u64) -> Vec<(bool, u64, u64)> {
    let data: Delta =
        extents.iter().filter(|e| e.kind == ExtentKind::Data).map(|e| e.offset..e.offset + e.len).collect();
    let data = data.round_out(OVERLAY_BLOCK_BYTES);
    let mut out = Vec::new();
    let mut at = extents.first().map_or(end, |e| e.offset);
    while at < end {
        let (has_data, to) = data.run_until(at, end);
        out.push((has_data, at, to));
        at = to;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_with_any_data_is_copied_whole() {
        let extent = |offset, len, kind| Extent { offset, len, kind };
        let extents = [
            extent(0, 4096 + 512, ExtentKind::Zero),
            extent(4608, 512, ExtentKind::Data),
            extent(5120, 20480 - 5120 - 512, ExtentKind::Hole),
            extent(20480 - 512, 1024, ExtentKind::Data),
            extent(20992, 1000, ExtentKind::Zero),
        ];
        let runs = block_runs(&extents, 21992);
        let expected = vec![(false, 0, 4096), (true, 4096, 8192), (false, 8192, 16384), (true, 16384, 21992)];
        assert_eq!(runs, expected);
    }

    #[test]
    fn runs_cover_every_block_once() {
        let mut state = 7u64;
        let mut next = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for _ in 0..2000 {
            let mut extents = Vec::new();
            let mut at = 0;
            let end = 4096 * (1 + next(10)) - next(3) * 512;
            while at < end {
                let len = (512 * (1 + next(20))).min(end - at);
                let kind = match next(3) {
                    0 => ExtentKind::Data,
                    1 => ExtentKind::Zero,
                    _ => ExtentKind::Hole,
                };
                Extent::push(&mut extents, Extent { offset: at, len, kind });
                at += len;
            }
            let mut covered = 0;
            for (data, from, to) in block_runs(&extents, end) {
                assert_eq!(from, covered, "{extents:?}");
                assert!(to == end || to % 4096 == 0, "{extents:?}");
                let holds =
                    extents.iter().any(|e| e.kind == ExtentKind::Data && e.offset < to && e.offset + e.len > from);
                assert_eq!(data, holds, "{from}..{to} of {extents:?}");
                covered = to;
            }
            assert_eq!(covered, end, "{extents:?}");
        }
    }
}
