//! A storage read otherwise than it lies there: a part of it, longer than it is, or with other bytes over some places.
//!
//! Invariants
//! - Nothing is written, and nothing outside the part is read.
//! - Behind what is stored come zeros, up to the view's length; behind that, an error.
//!
//! Not here: why a file has to be read so (`qcow2::layer`, `vhdx::log`).

use std::{collections::BTreeMap, io, ops::Range, sync::Arc};

use super::Storage;

/// What lies over stored bytes.
#[derive(Debug)]
pub(crate) enum Patch {
    /// Zeros, for the whole range.
    Zeros,
    /// These bytes, as many as the range has.
    Bytes(Box<[u8]>),
}

/// A read-only view of `inner`.
#[derive(Debug)]
pub(crate) struct View {
    inner: Arc<dyn Storage>,
    /// Where the view begins in `inner`.
    start: u64,
    /// How many bytes come from `inner`; zeros behind them.
    stored: u64,
    len: u64,
    /// By start, with their ends; disjoint.
    patches: BTreeMap<u64, (u64, Patch)>,
    /// Its own name, for a part.
    label: Option<String>,
}

impl View {
    /// All of `inner`, which has `stored` bytes, as if it were `len` bytes long and ended with zeros.
    pub(crate) fn extended(inner: Arc<dyn Storage>, stored: u64, len: u64) -> Self {
        Self { inner, start: 0, stored: stored.min(len), len, patches: BTreeMap::new(), label: None }
    }

    /// The `len` bytes of `inner` from `start` on, under a name of their own: a member of an archive. Reads
    /// fail where `inner` does not have them.
    pub(crate) fn part(inner: Arc<dyn Storage>, start: u64, len: u64, label: String) -> Self {
        Self { inner, start, stored: len, len, patches: BTreeMap::new(), label: Some(label) }
    }

    /// Length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.len
    }

    /// Puts a patch over what is there. Bounds are multiples of one unit, and bytes are always one unit
    /// long, so that an older patch of bytes is either kept or covered whole.
    pub(crate) fn put(&mut self, range: Range<u64>, patch: Patch) {
        let Range { start, end } = range;
        let first = self.patches.range(..start).next_back().map_or(start, |(at, _)| *at);
        let covered: Vec<u64> =
            self.patches.range(first..end).filter(|(_, (old_end, _))| *old_end > start).map(|(at, _)| *at).collect();
        for at in covered {
            let Some((old_end, old)) = self.patches.remove(&at) else { continue };
            if let Patch::Zeros = old {
                if at < start {
                    self.patches.insert(at, (start, Patch::Zeros));
                }
                if old_end > end {
                    self.patches.insert(end, (old_end, Patch::Zeros));
                }
            }
        }
        if end > start {
            self.patches.insert(start, (end, patch));
        }
    }

    /// Reads what is stored by `read`, and lays zeros and patches over it.
    fn read_over(
        &self,
        offset: u64,
        buf: &mut [u8],
        read: impl FnOnce(u64, &mut [u8]) -> io::Result<bool>,
    ) -> io::Result<bool> {
        let end = offset.checked_add(buf.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        if end > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let place = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let (inside, behind) = buf.split_at_mut(place(self.stored.saturating_sub(offset)).min(buf.len()));
        behind.fill(0);
        let at = self.start.checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
        if !inside.is_empty() && !read(at, inside)? {
            return Ok(false);
        }
        let first = self.patches.range(..=offset).next_back().map_or(offset, |(at, _)| *at);
        for (at, (patch_end, patch)) in self.patches.range(first..end) {
            let (from, to) = ((*at).max(offset), (*patch_end).min(end));
            if from >= to {
                continue;
            }
            let Some(part) = buf.get_mut(place(from - offset)..place(to - offset)) else { continue };
            match patch {
                Patch::Zeros => part.fill(0),
                Patch::Bytes(bytes) => {
                    let bytes = bytes.get(place(from - at)..place(to - at)).ok_or(io::ErrorKind::InvalidData)?;
                    part.copy_from_slice(bytes);
                }
            }
        }
        Ok(true)
    }
}

impl Storage for View {
    fn label(&self) -> &str {
        self.label.as_deref().unwrap_or_else(|| self.inner.label())
    }

    /// Parts of one file have one identity of the whole, so none of them has it.
    fn identity(&self) -> Option<u64> {
        if self.label.is_some() { None } else { self.inner.identity() }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_over(offset, buf, |at, part| self.inner.read_at(at, part).map(|()| true)).map(drop)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_over(offset, buf, |at, part| self.inner.read_now(at, part))
    }

    /// Over patches nothing is said to be a hole: bytes may lie over it.
    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        match self.stored.saturating_sub(offset) {
            _ if !self.patches.is_empty() => Ok((true, len_max)),
            0 => Ok((false, len_max)),
            left => self.inner.allocated(self.start.saturating_add(offset), len_max.min(left)),
        }
    }

    crate::storage_is_read_only!();
}
