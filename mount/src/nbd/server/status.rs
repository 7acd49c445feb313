//! What BLOCK_STATUS tells: extents of a range, per context.
//!
//! Invariants
//! - Extents follow each other from the request's offset, are merged, never empty, and never reach past the
//!   request; their sum fits 64 bits and, in compact replies, each length fits 32.
//! - At most [`EXTENTS_MAX`] extents per context; a reply may tell less than was asked, never nothing.
//! - A map that cannot be read is an error, unless something true was found before it.

use std::time::{Duration, Instant};

use aquifer_vdisk::{Delta, Error, Extent, ExtentKind};

use crate::nbd::{
    export::Export,
    negotiate::{Context, ContextKind, Mode},
    reply::{self, StatusHead},
    request::Request,
    wire::{command_flag as flag, state},
};

/// Most extents of one context in one reply.
const EXTENTS_MAX: usize = 64 << 10;
/// The map is asked in steps of this many bytes, so that a vast request costs no vast memory.
const STEP: u64 = 64 << 20;
/// The first step for a client that takes one extent only: copies ask that way, once for each extent.
const STEP_ONE: u64 = 256 << 10;
/// Contexts of which an answer with one extent each fits any batch.
const CONTEXTS_NOW_MAX: usize = 16;
/// After this long a reply goes out with what was found.
const TIME_MAX: Duration = Duration::from_millis(100);

/// The whole reply.
///
/// # Errors
/// Whatever the disk's map reports.
pub(super) fn answer(export: &Export, contexts: &[Context], request: &Request, mode: Mode) -> Result<Vec<u8>, Error> {
    put_all(export, contexts, request, mode, &|offset, len, out| export.disk.extents(offset, len, out).map(|()| true))
        .map(Option::unwrap_or_default)
}

/// The reply to a client that takes one extent only, if the map is at hand: such a client waits for each answer
/// before it asks for anything else, and must not stand behind decodes.
pub(super) fn answer_now(export: &Export, contexts: &[Context], request: &Request, mode: Mode) -> Option<Vec<u8>> {
    if !request.has(flag::REQ_ONE) || contexts.len() > CONTEXTS_NOW_MAX {
        return None;
    }
    put_all(export, contexts, request, mode, &|offset, len, out| export.disk.extents_now(offset, len, out))
        .ok()
        .flatten()
}

/// Appends the extents of a range; `false` where they are not at hand.
type Ask<'a> = &'a dyn Fn(u64, u64, &mut Vec<Extent>) -> Result<bool, Error>;

fn put_all(
    export: &Export,
    contexts: &[Context],
    request: &Request,
    mode: Mode,
    ask: Ask<'_>,
) -> Result<Option<Vec<u8>>, Error> {
    let count_max = if request.has(flag::REQ_ONE) { 1 } else { EXTENTS_MAX };
    let mut out = Vec::new();
    for (index, context) in contexts.iter().enumerate() {
        let extents = match context.kind {
            ContextKind::Allocation => match allocation(ask, request.offset, request.len, count_max)? {
                Some(extents) => extents,
                None => return Ok(None),
            },
            ContextKind::Dirty(number) => {
                let dirty = export.contexts.get(number).map(|context| context.delta());
                dirty.map_or_else(Vec::new, |delta| changes(delta, request.offset, request.len, count_max))
            }
        };
        let head = StatusHead {
            cookie: request.cookie,
            request: request.offset,
            context: context.id,
            done: index + 1 == contexts.len(),
        };
        reply::put_extents(&mut out, mode, head, &extents);
    }
    Ok(Some(out))
}

/// Appends, merging; `false` once `count_max` would be passed.
fn push(out: &mut Vec<(u64, u32)>, count_max: usize, len: u64, state: u32) -> bool {
    if let Some((last, same)) = out.last_mut()
        && *same == state
    {
        *last += len;
        return true;
    }
    let room = out.len() < count_max;
    if room {
        out.push((len, state));
    }
    room
}

fn allocation(ask: Ask<'_>, offset: u64, len: u64, count_max: usize) -> Result<Option<Vec<(u64, u32)>>, Error> {
    let began = Instant::now();
    let end = offset.saturating_add(len);
    let (mut out, mut step) = (Vec::new(), Vec::new());
    let mut at = offset;
    let mut step_len = if count_max == 1 { STEP_ONE } else { STEP };
    while at < end && (out.is_empty() || began.elapsed() < TIME_MAX) {
        step.clear();
        let next = end.min((at / step_len + 1).saturating_mul(step_len));
        step_len = (step_len * 4).min(STEP);
        match ask(at, next - at, &mut step) {
            Ok(true) => {}
            Ok(false) if out.is_empty() => return Ok(None),
            Ok(false) => break,
            Err(_) if !out.is_empty() => break,
            Err(error) => return Err(error),
        }
        if !step.iter().all(|extent| push(&mut out, count_max, extent.len, allocation_state(extent))) {
            break;
        }
        at = next;
    }
    Ok(Some(out))
}

fn allocation_state(extent: &Extent) -> u32 {
    match extent.kind {
        ExtentKind::Data => 0,
        ExtentKind::Zero => state::ZERO,
        ExtentKind::Hole => state::ZERO | state::HOLE,
    }
}

fn changes(delta: &Delta, offset: u64, len: u64, count_max: usize) -> Vec<(u64, u32)> {
    let end = offset.saturating_add(len);
    let ranges = delta.ranges();
    let first = ranges.partition_point(|range| range.end <= offset);
    let mut out = Vec::new();
    let mut at = offset;
    for range in ranges.get(first..).unwrap_or_default() {
        if range.start >= end || at >= end {
            break;
        }
        let clean = range.start.saturating_sub(at);
        if clean > 0 && !push(&mut out, count_max, clean, 0) {
            return out;
        }
        at += clean;
        let dirty = range.end.min(end) - at;
        if !push(&mut out, count_max, dirty, state::DIRTY) {
            return out;
        }
        at += dirty;
    }
    if at < end {
        push(&mut out, count_max, end - at, 0);
    }
    out
}
