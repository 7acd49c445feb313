//! Where decoded bytes are kept: pages of one size, used again.
//!
//! Blocks and prefixes of blocks come in many lengths, and a heap that gives and takes 16 to 64 KiB
//! at random for days holds far more than what is in use. Pages of one size leave no gaps.
//!
//! Invariants
//! - Only bytes that were copied in since the pages were taken can be copied out: what a page held
//!   before never shows.
//! - At most [`FREE_MAX`] pages wait unused.
//!
//! Not here: which blocks are kept (`cache`).

use std::sync::Arc;

use parking_lot::Mutex;

/// Bytes in a page: the step in which native frames can be decoded.
pub(super) const PAGE_BYTES: usize = 16 * 1024;
/// Unused pages that are held for the next block: 8 MiB.
const FREE_MAX: usize = 512;

type Page = Box<[u8; PAGE_BYTES]>;

/// Pages that are not in use.
#[derive(Debug, Default)]
pub(super) struct PagePool {
    free: Mutex<Vec<Page>>,
}

/// Bytes in pages; what is shorter than a page has a buffer of its own length.
#[derive(Debug)]
pub(super) struct Paged {
    pages: Vec<Page>,
    short: Box<[u8]>,
    len: usize,
    pool: Arc<PagePool>,
}

impl Paged {
    /// A copy of `bytes`.
    pub(super) fn of(bytes: &[u8], pool: &Arc<PagePool>) -> Self {
        let mut paged = Self { pages: Vec::new(), short: Box::default(), len: bytes.len(), pool: pool.clone() };
        if bytes.len() < PAGE_BYTES {
            paged.short = bytes.into();
            return paged;
        }
        let count = bytes.len().div_ceil(PAGE_BYTES);
        paged.pages.reserve_exact(count);
        {
            let mut free = pool.free.lock();
            let kept = free.len().saturating_sub(count);
            paged.pages.extend(free.drain(kept..));
        }
        paged.pages.resize_with(count, || Box::new([0; PAGE_BYTES]));
        for (page, part) in paged.pages.iter_mut().zip(bytes.chunks(PAGE_BYTES)) {
            if let Some(place) = page.get_mut(..part.len()) {
                place.copy_from_slice(part);
            }
        }
        paged
    }

    /// How many bytes there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory they take.
    pub(super) fn weight(&self) -> u64 {
        (self.pages.len() * PAGE_BYTES + self.short.len()) as u64
    }

    /// Fills `out` with the bytes from `start` on; `false`, with `out` in any state, where there are fewer.
    pub(super) fn copy_to(&self, start: usize, out: &mut [u8]) -> bool {
        if start.checked_add(out.len()).is_none_or(|end| end > self.len) {
            return false;
        }
        if self.pages.is_empty() {
            return copy(&self.short, start, out);
        }
        let (mut index, mut skip, mut rest) = (start / PAGE_BYTES, start % PAGE_BYTES, out);
        while !rest.is_empty() {
            let (part, tail) = rest.split_at_mut((PAGE_BYTES - skip).min(rest.len()));
            if !self.pages.get(index).is_some_and(|page| copy(&page[..], skip, part)) {
                return false;
            }
            (index, skip, rest) = (index + 1, 0, tail);
        }
        true
    }
}

fn copy(from: &[u8], start: usize, out: &mut [u8]) -> bool {
    from.get(start..start + out.len()).map(|bytes| out.copy_from_slice(bytes)).is_some()
}

impl Drop for Paged {
    fn drop(&mut self) {
        if !self.pages.is_empty() {
            let mut free = self.pool.free.lock();
            let room = FREE_MAX.saturating_sub(free.len());
            free.extend(self.pages.drain(..).take(room));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_every_length_comes_back_and_nothing_older() {
        let pool = Arc::new(PagePool::default());
        drop(Paged::of(&[0xEE; 10 * PAGE_BYTES], &pool));
        for len in [0, 1, 512, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES, 3 * PAGE_BYTES + 700] {
            let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i % 200).expect("small")).collect();
            let paged = Paged::of(&bytes, &pool);
            assert_eq!(paged.len(), len);
            for start in (0..=len).step_by(509) {
                for part in [0, 1, 4096, len - start] {
                    let mut out = vec![0xAA; part];
                    assert_eq!(paged.copy_to(start, &mut out), start + part <= len, "{start}+{part} of {len}");
                    if start + part <= len {
                        assert!(out == bytes[start..start + part], "{start}+{part} of {len}");
                    }
                }
            }
            assert!(!paged.copy_to(usize::MAX, &mut [0; 2]));
        }
    }

    #[test]
    fn pages_are_used_again_and_few_are_held() {
        let pool = Arc::new(PagePool::default());
        let held = || pool.free.lock().len();
        let many: Vec<Paged> = (0..2 * FREE_MAX).map(|_| Paged::of(&[1; PAGE_BYTES], &pool)).collect();
        assert_eq!(held(), 0);
        drop(many);
        assert_eq!(held(), FREE_MAX);
        let _some = Paged::of(&[2; 4 * PAGE_BYTES], &pool);
        assert_eq!(held(), FREE_MAX - 4);
    }
}
