//! Where a disk may have changed since its last point.
//!
//! Invariants
//! - A bitmap that is missing, in use, not kept up or of another disk is no reason to fail: everything
//!   is read and compared instead, and the reason is said.
//! - A bitmap that somebody names is believed only if it counted when the last point was made, and counts still. Whoever clears it
//!   by hand answers for when: nothing tells.
//! - A bitmap that is believed is still tested: blocks outside it are sampled, and one that differs from
//!   the parent proves that the bitmap belongs to another point.
//! - What lies past the end of the parent's disk has always changed.

use std::sync::Arc;

use aquifer_formats::{
    Layer,
    aql::Reader,
    gate::Gate,
    qcow2::{BitmapTrust, Qcow2},
    repo::{Point, record::Found},
};
use aquifer_vdisk::{Chain, ChainSpec, Delta, Disk};

use super::{Hint, Order, Wanted};
use crate::{
    context::Context,
    copy,
    fail::{Code, Fail, Result},
    site::OnImpossible,
    source::connect,
};

/// Blocks outside a bitmap that are compared with the parent.
const SAMPLES: u64 = 128;

/// What to read of a disk.
pub(crate) struct Look {
    /// How it was found out; travels with the point.
    pub(crate) found: Found,
    /// The ranges; everything where there are none.
    pub(crate) ranges: Option<Delta>,
}

/// Decides what to read of `wanted`, which stands on `parent`.
pub(super) fn look(
    order: &Order<'_>,
    wanted: &Wanted,
    parent: Option<&Arc<Reader>>,
    point: Option<&Point>,
) -> Result<Look> {
    let context = order.context;
    let Some(parent) = parent else {
        return Ok(Look { found: Found::Everything, ranges: None });
    };
    let known = match &wanted.hint {
        Hint::None => return Ok(Look { found: Found::Comparison, ranges: None }),
        Hint::Ranges(ranges) => {
            let block = u64::from(parent.block_bytes());
            let ranges = ranges.clone().round_out(block).clip(0..wanted.disk.size());
            return Ok(Look { found: Found::Comparison, ranges: Some(ranges) });
        }
        Hint::Bitmap(name) => changed_by(context, wanted, name, parent)?,
        Hint::Named(name) if is_image(wanted) && !counted(point, wanted, name) => {
            Err(format!("bitmap `{name}` did not count yet when the last point was made"))
        }
        Hint::Named(name) => changed_by(context, wanted, name, parent)?,
        Hint::Missing(reason) => Err(reason.clone()),
    };
    match known {
        Ok(look) => Ok(look),
        Err(reason) if order.fallback == OnImpossible::Fail => {
            let what = format!("{}: {reason}, and the job does not compare everything instead", wanted.name);
            Err(Fail::new(Code::Refused, what))
        }
        Err(reason) => {
            let size = crate::units::bytes(copy::used_bytes(&wanted.disk)?);
            let what = format!("{}: {reason}; all of it ({size}) is read and compared instead", wanted.name);
            order.warn(Code::WarnFallback, what, Some("aquifer explain W_COMPARED"));
            Ok(Look { found: Found::Comparison, ranges: None })
        }
    }
}

fn is_image(wanted: &Wanted) -> bool {
    matches!(wanted.selected.spec, ChainSpec::Image { .. }) && wanted.format == "qcow2"
}

/// Whether the last point says that a bitmap counted when it was made.
fn counted(point: Option<&Point>, wanted: &Wanted, bitmap: &str) -> bool {
    let disks = point.and_then(|point| point.record.as_ref()).map(|record| record.disks.as_slice()).unwrap_or_default();
    let disk = disks.iter().find(|disk| disk.name == wanted.name);
    disk.is_some_and(|disk| disk.counting.iter().any(|known| known == bitmap))
}

/// Bitmaps of an image at rest that count its changes, for the point that is made of it.
///
/// # Errors
/// Tables that cannot be read.
pub(super) fn counting(wanted: &Wanted) -> Result<Vec<String>> {
    let (ChainSpec::Image { path, .. }, true) = (&wanted.selected.spec, is_image(wanted)) else {
        return Ok(Vec::new());
    };
    let bitmaps = Qcow2::open(Gate::default().enter(path)?.storage())?.bitmaps()?;
    let good = bitmaps.into_iter().filter(|bitmap| bitmap.recording && bitmap.trust == BitmapTrust::Consistent);
    Ok(good.map(|bitmap| bitmap.name).collect())
}

/// What a bitmap says, or why it is not believed.
fn changed_by(context: &Context, wanted: &Wanted, name: &str, parent: &Arc<Reader>) -> Result<Result<Look, String>> {
    let (found, dirty) = match &wanted.selected.spec {
        ChainSpec::Image { path, .. } if wanted.format == "qcow2" => {
            let image = Qcow2::open(Gate::default().enter(path)?.storage())?;
            match qcow2_bitmap(&image, name)? {
                Ok(dirty) => (Found::Bitmap { name: name.to_owned() }, dirty),
                Err(reason) => return Ok(Err(reason)),
            }
        }
        ChainSpec::Nbd { uri } => match connect::dirty(uri, name)? {
            Ok(dirty) => (Found::DirtyContext { name: name.to_owned() }, dirty),
            Err(reason) => return Ok(Err(reason)),
        },
        _ => return Ok(Err(format!("a {} source has no bitmaps", wanted.format))),
    };
    let size = wanted.disk.size();
    let block = u64::from(parent.block_bytes());
    let mut ranges = dirty.clip(0..size);
    if size > parent.size() {
        // The last block of the parent's disk may be one that both share.
        ranges.insert(parent.size() / block * block..size);
    }
    let ranges = ranges.round_out(block).clip(0..size);
    if let Some(at) = contradiction(context, wanted, parent, &ranges)? {
        let reason = format!("bitmap `{name}` does not mention offset {at}, which has changed since the last point");
        return Ok(Err(reason));
    }
    Ok(Ok(Look { found, ranges: Some(ranges) }))
}

fn qcow2_bitmap(image: &Qcow2, name: &str) -> Result<Result<Delta, String>> {
    let bitmaps = image.bitmaps()?;
    let Some(bitmap) = bitmaps.iter().find(|bitmap| bitmap.name == name) else {
        let names: Vec<&str> = bitmaps.iter().map(|bitmap| bitmap.name.as_str()).collect();
        return Ok(Err(format!("there is no bitmap `{name}` (there are: {})", names.join(", "))));
    };
    let why = match bitmap.trust {
        BitmapTrust::Consistent if !bitmap.recording => Some("does not count any more: it is disabled"),
        BitmapTrust::Consistent => None,
        BitmapTrust::InUse => Some("was not closed by its writer"),
        BitmapTrust::NotKeptUp => Some("was not kept up by a later writer of the image"),
        BitmapTrust::NotUnderstood => Some("is of a kind that is not understood"),
    };
    if let Some(why) = why {
        return Ok(Err(format!("bitmap `{name}` {why}")));
    }
    let mut dirty = Delta::new();
    image.dirty_ranges(bitmap, &mut |offset, len| dirty.insert(offset..offset.saturating_add(len)))?;
    Ok(Ok(dirty))
}

/// A place outside `ranges` that differs from the parent, where sampling finds one.
fn contradiction(context: &Context, wanted: &Wanted, parent: &Arc<Reader>, ranges: &Delta) -> Result<Option<u64>> {
    let block = u64::from(parent.block_bytes());
    let both = parent.size().min(wanted.disk.size());
    let outside = Delta::full(both).subtract(ranges);
    let blocks = outside.bytes() / block;
    if blocks == 0 {
        return Ok(None);
    }
    let old = old_disk(context, parent)?;
    let stride = (blocks / SAMPLES).max(1);
    let mut number = 0;
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for range in outside.iter() {
        let mut at = range.start;
        while at < range.end {
            if number % stride == stride / 2 {
                let len = usize::try_from(block.min(range.end - at)).unwrap_or_default();
                a.resize(len, 0);
                b.resize(len, 0);
                old.read(at, &mut a)?;
                wanted.disk.read(at, &mut b)?;
                if a != b {
                    return Ok(Some(at));
                }
            }
            number += 1;
            at += block;
        }
    }
    Ok(None)
}

/// The parent's disk, by its own map.
pub(crate) fn old_disk(context: &Context, parent: &Arc<Reader>) -> Result<Disk> {
    let chain = Chain::of_point(parent.clone(), context.cache()?);
    Ok(Disk::read_only("parent", Arc::new(chain)))
}
