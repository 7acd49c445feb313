//! What differs between two snapshots, from their indexes alone.

use std::ops::Range;

use super::layer::PbsLayer;
use crate::{Error, Layer as _, Result};

/// Where `new` may differ from `old`, in order, cut at the end of `new`: an `old` that is cut or extended with zeros to
/// the size of `new` and takes these ranges from it becomes `new`. No chunk is opened: equal digests of SHA-256 are
/// equal bytes. The same bytes encrypted with another key count as different.
///
/// # Errors
/// [`Error::Unsupported`] where the two are cut into chunks of different sizes.
pub fn delta(old: &PbsLayer, new: &PbsLayer) -> Result<Vec<Range<u64>>> {
    let chunk = new.index.chunk_bytes;
    if old.index.chunk_bytes != chunk {
        let what = format!("comparing chunks of {} bytes with chunks of {chunk}", old.index.chunk_bytes);
        return Err(Error::unsupported(new.label(), what));
    }
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut before = old.index.digests.iter();
    for (number, digest) in (0u64..).zip(&new.index.digests) {
        let same = match before.next() {
            Some(other) => other == digest,
            None => new.is_zeros(digest),
        };
        if same {
            continue;
        }
        let start = number * chunk;
        let end = start.saturating_add(chunk).min(new.index.size);
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    Ok(ranges)
}
