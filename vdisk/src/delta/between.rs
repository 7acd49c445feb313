//! What differs between two points, from the layers' tables alone.
//!
//! Two chains that stand on the same lower layers can differ only where a layer above says
//! something, or where a shorter layer above cuts off what is below. Nothing else is looked at.
//! Native points compare their own maps, and by content ids see what was rewritten unchanged; snapshots of Proxmox
//! Backup Server compare their indexes, which name each chunk by its digest.
//!
//! Not here: comparing bytes. In other formats, data rewritten with the same bytes is reported.

use std::{ops::Range, sync::Arc};

use aquifer_formats::{Content, Error, Layer, aql, pbs};

use super::Delta;
use crate::{Chain, Result};

/// Where `new` may differ from `old`, cut at the end of `new`: an `old` that is cut or extended with
/// zeros to the size of `new` and takes these ranges from it becomes `new`. Reads no data. Chains
/// that share no layer give everything that either of them holds.
///
/// # Errors
/// A layer whose tables cannot be read.
pub fn delta_between(old: &Chain, new: &Chain) -> Result<Delta> {
    if let (Some(old), Some(new)) = (old.point(), new.point()) {
        match aql::delta(old, new) {
            // Other block sizes or keys: nothing in the tables compares.
            Err(Error::Unsupported { .. }) => {}
            ranges => return Ok(ranges?.into_iter().collect()),
        }
    }
    if let (Some(old), Some(new)) = (old.snapshot(), new.snapshot()) {
        match pbs::delta(old, new) {
            Err(Error::Unsupported { .. }) => {}
            ranges => return Ok(ranges?.into_iter().collect()),
        }
    }
    let same = |(a, b): &(&Arc<dyn Layer>, &Arc<dyn Layer>)| same_layer(a, b);
    let common = old.layers().iter().rev().zip(new.layers().iter().rev()).take_while(same).count();
    let above = |chain: &'_ Chain| chain.layers().len() - common;
    if let ([a, ..], [b, ..]) = (old.layers(), new.layers())
        && (above(old), above(new)) == (1, 1)
        && same_files(&**a, &**b)
    {
        return two_tables(&**a, &**b, common > 0);
    }
    let mut delta = Delta::new();
    for chain in [old, new] {
        let mut visible = new.size();
        for layer in chain.layers().iter().take(chain.layers().len() - common) {
            visible = visible.min(layer.size());
            delta = delta.union(&said(&**layer, 0..visible)?);
        }
        // Past the end of a layer above the common ones, those do not show any more.
        if common > 0 {
            delta.insert(visible..new.size());
        }
    }
    Ok(delta)
}

/// Whether two layers are the same table over the same files. Two internal snapshots of one file are not.
fn same_layer(a: &Arc<dyn Layer>, b: &Arc<dyn Layer>) -> bool {
    let same_table = || matches!((a.fingerprint(), b.fingerprint()), (Ok(a), Ok(b)) if a == b);
    Arc::ptr_eq(a, b) || (a.size() == b.size() && same_files(&**a, &**b) && same_table())
}

/// Whether two layers draw from the same files: their own, and the one beside it that a format may have.
fn same_files(a: &dyn Layer, b: &dyn Layer) -> bool {
    (0..2).all(|slot| a.file_id(slot) == b.file_id(slot))
}

/// Two tables over one file, as internal snapshots are: equal where they name the same stored bytes.
/// `stands` says whether there are layers below, which both fall back to.
fn two_tables(old: &dyn Layer, new: &dyn Layer, stands: bool) -> Result<Delta> {
    let mut delta = Delta::new();
    let mut at = 0;
    while at < new.size() {
        let (after, mut len) = new.lookup(at, new.size() - at)?;
        let before = match old.size().checked_sub(at).filter(|left| *left > 0) {
            Some(left) => {
                let (before, n) = old.lookup(at, left.min(len))?;
                len = n;
                before
            }
            None => Content::Zero,
        };
        let zeros = |content| content == Content::Zero || (content == Content::Absent && !stands);
        if before != after && !(zeros(before) && zeros(after)) {
            delta.insert(at..at + len);
        }
        at += len;
    }
    Ok(delta)
}

/// Where in `range` a layer says anything.
fn said(layer: &dyn Layer, range: Range<u64>) -> Result<Delta> {
    let mut delta = Delta::new();
    layer.scan(range.start, range.end - range.start, &mut |offset, len, _| {
        delta.insert(offset..offset.saturating_add(len));
    })?;
    Ok(delta)
}
