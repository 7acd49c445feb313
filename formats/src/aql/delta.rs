//! What differs between two points, from metadata alone.
//!
//! Invariants
//! - Never misses a differing byte; with ids of one key it never names a block that was rewritten with
//!   equal content either.
//! - Only id pages are read: the id of zeros is zeros, and that of a lost block equals nothing.
//! - Equal references to a leaf prove its 256 blocks equal, and no page is read for them.

use std::ops::Range;

use super::{
    entry::{Entry, LeafRef, Place},
    key::{LOST_ID, ZERO_ID},
    layout::LEAF_ENTRIES,
    reader::Reader,
};
use crate::{Error, Layer, Result};

/// Ranges of `b`'s disk, in bytes, sorted and disjoint, that read differently on `a`'s disk, where a
/// shorter `a` reads as zeros past its end. Ranges end at the end of `b`.
///
/// # Errors
/// [`Error::Unsupported`] if block sizes or id keys differ: then only the bytes can tell. Damage, I/O.
pub fn delta(a: &Reader, b: &Reader) -> Result<Vec<Range<u64>>> {
    if a.block_bytes() != b.block_bytes() || a.id_domain() != b.id_domain() {
        let what = format!("comparing with {} by content ids: block size or id key differ", a.label());
        return Err(Error::unsupported(b.label(), what));
    }
    let mut ranges = Vec::new();
    for leaf in 0..b.identity().leaves() {
        if !same_leaf(a, b, leaf)? {
            compare_leaf(a, b, leaf, &mut ranges)?;
        }
    }
    Ok(ranges)
}

/// What proves a page: the layer it lies in, where, and its checksum.
fn proof(reader: &Reader, place: Place, check: u32) -> Result<(uuid::Uuid, u64, u32)> {
    Ok((reader.file_of(place.slot)?.0, place.offset, check))
}

fn leaf_ref(reader: &Reader, leaf: u64) -> Result<LeafRef> {
    if leaf >= reader.identity().leaves() {
        return Ok(LeafRef::Zero);
    }
    let at = reader.seal_info().root_a;
    reader.root().leaf_ref(leaf).map_err(|what| Error::corrupt(reader.label(), at, what))
}

fn same_leaf(a: &Reader, b: &Reader, leaf: u64) -> Result<bool> {
    if a.overrides().is_some() || b.overrides().is_some() {
        return Ok(false);
    }
    Ok(match (leaf_ref(a, leaf)?, leaf_ref(b, leaf)?) {
        (LeafRef::Zero, LeafRef::Zero) => true,
        (LeafRef::Pages(p), LeafRef::Pages(q)) => proof(a, p.map, p.map_check)? == proof(b, q.map, q.map_check)?,
        _ => false,
    })
}

fn compare_leaf(a: &Reader, b: &Reader, leaf: u64, ranges: &mut Vec<Range<u64>>) -> Result<()> {
    let first = leaf * LEAF_ENTRIES as u64;
    let ids_b = b.ids(leaf)?;
    let ids_a = if leaf < a.identity().leaves() { Some(a.ids(leaf)?) } else { None };
    let salvaged = a.overrides().is_some() || b.overrides().is_some();
    for (index, block) in (first..b.blocks().min(first + LEAF_ENTRIES as u64)).enumerate() {
        let before = ids_a.as_ref().map_or(ZERO_ID, |ids| ids.get(index));
        let mut equal = before == ids_b.get(index) && before != LOST_ID;
        if salvaged {
            equal &= known(a, block)? && known(b, block)?;
        }
        if !equal {
            let grain = b.grain();
            let range = block * grain..((block + 1) * grain).min(b.size());
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
    }
    Ok(())
}

/// Whether a salvaged layer knows a block; what was never seen differs from everything.
fn known(reader: &Reader, block: u64) -> Result<bool> {
    Ok(block >= reader.blocks() || matches!(reader.entry(block)?, Entry::Zero | Entry::Data(_)))
}
