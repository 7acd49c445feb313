//! What requests do that may wait: they run in a pool and answer through the connection's outlet.
//!
//! Invariants
//! - Every request that is submitted is answered exactly once, or its connection is ended.
//! - A READ's data goes out only if all of it (or of its chunk) was read; a failure is sent after the last
//!   chunk of data, never before.
//! - Work on a long range is done in slices, between which other connections have their turns.
//! - FLUSH and FUA wait in a pool of their own, which no read can fill.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use aquifer_vdisk::{Disk, Error, Zeroing};
use parking_lot::Mutex;

use super::{
    connection::{READ_INLINE_MAX, Shared},
    flight::Permit,
    pool::{Pool, Scratch, is_of_whole_blocks},
    status,
};
use crate::{
    errno::Errno,
    nbd::{
        negotiate::{Context, Mode},
        reply::{self, DataHead},
        request::Request,
        wire::{Cursor, command as cmd, command_flag as flag},
    },
};

/// Most that one CACHE request reads ahead, in bytes: it is a hint.
const CACHE_MAX: u64 = 32 << 20;

/// Bytes that TRIM and WRITE_ZEROES change before others have a turn.
const ZERO_SLICE: u64 = 16 << 20;
/// Bytes that are read ahead before others have a turn.
const AHEAD_SLICE: u64 = 1 << 20;

/// Tells of a disk's error where it can be seen, and turns it into its number.
pub(super) fn report(shared: &Shared, command: &'static str, request: &Request, error: &Error) -> Errno {
    let Request { offset, len, .. } = *request;
    shared.hub.stats.errors.fetch_add(1, Ordering::Relaxed);
    tracing::warn!(export = shared.export.name, command, offset, len, %error, "request failed");
    Errno::from(error)
}

/// Runs `job` in `pool`; a panic ends the connection, whose client would wait for ever.
fn submit(pool: &Pool, shared: &Arc<Shared>, job: impl FnOnce(&Arc<Shared>, &mut Scratch) + Send + 'static) {
    struct EndOnPanic(Arc<Shared>);
    impl Drop for EndOnPanic {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.outlet.fail();
            }
        }
    }
    let guard = EndOnPanic(Arc::clone(shared));
    pool.submit(shared.lane, Box::new(move |scratch| job(&guard.0, scratch)));
}

/// The last message of a reply, with the permit of its request.
fn answer(shared: &Arc<Shared>, buf: &mut Vec<u8>, len: usize, permit: Permit) {
    shared.hub.stats.requests.fetch_add(1, Ordering::Relaxed);
    shared.outlet.post(buf, len, Some(permit));
}

/// An answer without data.
fn finish(shared: &Arc<Shared>, request: &Request, permit: Permit, done: Result<(), Errno>) {
    let mut out = Vec::with_capacity(128);
    match done {
        Ok(()) => reply::put_done(&mut out, shared.mode(), request.cookie, request.offset),
        Err(errno) => reply::put_error(&mut out, shared.mode(), (request.cookie, request.offset), errno),
    }
    let len = out.len();
    answer(shared, &mut out, len, permit);
}

/// A READ that is not at hand: whole, or split where its answer may come in chunks.
pub(super) fn submit_read(shared: &Arc<Shared>, request: Request, permit: Permit) {
    if shared.mode() >= Mode::Structured && !request.has(flag::DF) && request.len > READ_INLINE_MAX {
        return submit_pieces(shared, request, permit);
    }
    submit(&shared.hub.slow, shared, move |shared, scratch| {
        let Request { cookie, offset, len, .. } = request;
        let head = DataHead { cookie, request: offset, offset, len, done: true };
        match read_into(shared, scratch, head) {
            Ok(total) => answer(shared, &mut scratch.buffer, total, permit),
            Err(error) => finish(shared, &request, permit, Err(report(shared, "read", &request, &error))),
        }
    });
}

/// Header and data into the scratch buffer; the length of both.
fn read_into(shared: &Shared, scratch: &mut Scratch, head: DataHead) -> Result<usize, Error> {
    let front = reply::data_header_len(shared.mode());
    let total = front + usize::try_from(head.len).unwrap_or(0);
    let mut header = Vec::with_capacity(front);
    reply::put_data(&mut header, shared.mode(), head);
    if scratch.buffer.len() < total {
        scratch.buffer.resize(total, 0);
    }
    if let Some((place, data)) = scratch.buffer.get_mut(..total).and_then(|b| b.split_at_mut_checked(front)) {
        place.copy_from_slice(&header);
        shared.disk().read(head.offset, data)?;
        shared.hub.stats.bytes_read.fetch_add(head.len, Ordering::Relaxed);
    }
    Ok(total)
}

/// One READ in pieces, decoded beside each other. Whichever ends last ends the reply.
struct Pieces {
    request: Request,
    left: AtomicUsize,
    /// The first failure.
    failed: Mutex<Option<Errno>>,
    permit: Mutex<Option<Permit>>,
}

fn submit_pieces(shared: &Arc<Shared>, request: Request, permit: Permit) {
    let end = request.offset + request.len;
    let mut starts = vec![request.offset];
    // Cut where blocks of the disk may be, so that no block is decoded for two pieces.
    let first_cut = (request.offset / READ_INLINE_MAX + 1) * READ_INLINE_MAX;
    starts.extend((first_cut..end).step_by(usize::try_from(READ_INLINE_MAX).unwrap_or(usize::MAX)));
    let pieces = Arc::new(Pieces {
        request,
        left: AtomicUsize::new(starts.len()),
        failed: Mutex::new(None),
        permit: Mutex::new(Some(permit)),
    });
    for (index, start) in starts.iter().enumerate() {
        let len = starts.get(index + 1).copied().unwrap_or(end) - start;
        let head = DataHead { cookie: request.cookie, request: request.offset, offset: *start, len, done: false };
        let pieces = Arc::clone(&pieces);
        submit(&shared.hub.slow, shared, move |shared, scratch| pieces.read(shared, head, scratch));
    }
}

impl Pieces {
    fn read(&self, shared: &Arc<Shared>, head: DataHead, scratch: &mut Scratch) {
        // After a failure the rest need not be read: the client will not use it.
        if self.failed.lock().is_none() {
            match read_into(shared, scratch, head) {
                Ok(total) => shared.outlet.post(&mut scratch.buffer, total, None),
                Err(error) => {
                    let errno = report(shared, "read", &self.request, &error);
                    self.failed.lock().get_or_insert(errno);
                }
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(permit) = self.permit.lock().take()
        {
            let done = (*self.failed.lock()).map_or(Ok(()), Err);
            finish(shared, &self.request, permit, done);
        }
    }
}

/// A WRITE that may read the source or is to be durable at once.
pub(super) fn submit_write(shared: &Arc<Shared>, request: Request, payload: Vec<u8>, permit: Permit) {
    // Whatever may wait for the source stays away from those that need none.
    let large = shared.disk().pays(request.len) && is_of_whole_blocks(request.offset, request.len);
    let pool = if large { &shared.large } else { &shared.hub.slow };
    submit(pool, shared, move |shared, _| {
        let done = shared.disk().write(request.offset, &payload);
        drop(payload);
        shared.hub.stats.bytes_written.fetch_add(request.len, Ordering::Relaxed);
        settle(shared, "write", request, permit, done);
    });
}

/// Answers a change, after a sync of its own turn where FUA asks for one.
fn settle(shared: &Arc<Shared>, command: &'static str, request: Request, permit: Permit, done: Result<(), Error>) {
    match done {
        Ok(()) if request.has(flag::FUA) => submit_flush(shared, request, permit),
        done => {
            let done = done.map_err(|error| report(shared, command, &request, &error));
            finish(shared, &request, permit, done);
        }
    }
}

fn submit_flush(shared: &Arc<Shared>, request: Request, permit: Permit) {
    submit(&shared.hub.sync, shared, move |shared, _| {
        let done = shared.disk().flush().map_err(|error| report(shared, "flush", &request, &error));
        finish(shared, &request, permit, done);
    });
}

/// FLUSH, TRIM, WRITE_ZEROES and CACHE.
pub(super) fn submit_other(shared: &Arc<Shared>, request: Request, permit: Permit) {
    let Request { offset, len, .. } = request;
    match request.command {
        cmd::FLUSH => submit_flush(shared, request, permit),
        cmd::TRIM => {
            let step = |disk: &Disk, at, n| disk.trim(at, n);
            let done = move |shared: &Arc<Shared>, done| settle(shared, "trim", request, permit, done);
            in_slices(shared, offset..offset + len, ZERO_SLICE, step, done);
        }
        // Reserving space is work, and how much is not known beforehand.
        cmd::WRITE_ZEROES if request.has(flag::FAST_ZERO) && request.has(flag::NO_HOLE) => {
            finish(shared, &request, permit, Err(Errno::NotSup));
        }
        cmd::WRITE_ZEROES => {
            let zeroing = if request.has(flag::NO_HOLE) { Zeroing::KeepSpace } else { Zeroing::MayTrim };
            let step = move |disk: &Disk, at, n| disk.write_zeroes(at, n, zeroing);
            let done = move |shared: &Arc<Shared>, done| settle(shared, "write zeroes", request, permit, done);
            in_slices(shared, offset..offset + len, ZERO_SLICE, step, done);
        }
        _ => {
            let done = move |shared: &Arc<Shared>, _| finish(shared, &request, permit, Ok(()));
            in_slices(shared, offset..offset + len.min(CACHE_MAX), AHEAD_SLICE, ahead, done);
        }
    }
}

fn ahead(disk: &Disk, offset: u64, len: u64) -> Result<(), Error> {
    disk.prefetch(offset, len);
    Ok(())
}

/// Does `step` for a slice of `range` at a time, with other lanes' turns in between, and `done` at the end or after the
/// first failure.
fn in_slices(
    shared: &Arc<Shared>,
    range: Range<u64>,
    slice: u64,
    step: impl Fn(&Disk, u64, u64) -> Result<(), Error> + Send + 'static,
    done: impl FnOnce(&Arc<Shared>, Result<(), Error>) + Send + 'static,
) {
    submit(&shared.hub.slow, shared, move |shared, _| {
        // Cut at multiples, where the overlay's regions end.
        let end = (range.start - range.start % slice).saturating_add(slice).min(range.end);
        match step(shared.disk(), range.start, end - range.start) {
            Ok(()) if end < range.end => in_slices(shared, end..range.end, slice, step, done),
            outcome => done(shared, outcome),
        }
    });
}

/// Decodes what a client that reads in order will want next. Nobody waits for it.
pub(super) fn submit_ahead(shared: &Arc<Shared>, range: Range<u64>) {
    in_slices(shared, range, AHEAD_SLICE, ahead, |_, _| {});
}

/// The range and the contexts a BLOCK_STATUS payload picks; `None` where it is malformed.
pub(super) fn status_filter(shared: &Shared, payload: &[u8]) -> Option<(u64, Vec<Context>)> {
    let mut cursor = Cursor::new(payload);
    let len = cursor.u64().filter(|len| *len > 0)?;
    let mut chosen = Vec::new();
    while !cursor.is_empty() {
        let id = cursor.u32()?;
        let context = shared.contexts.iter().find(|context| context.id == id)?;
        if chosen.contains(context) {
            return None;
        }
        chosen.push(*context);
    }
    if chosen.is_empty() { None } else { Some((len, chosen)) }
}

/// BLOCK_STATUS, for all chosen contexts or those picked by this request.
pub(super) fn submit_status(shared: &Arc<Shared>, request: Request, picked: Option<Vec<Context>>, permit: Permit) {
    submit(&shared.hub.slow, shared, move |shared, _| {
        let contexts = picked.as_deref().unwrap_or(&shared.contexts);
        match status::answer(&shared.export, contexts, &request, shared.mode()) {
            Ok(mut out) => {
                let len = out.len();
                answer(shared, &mut out, len, permit);
            }
            Err(error) => finish(shared, &request, permit, Err(report(shared, "block status", &request, &error))),
        }
    });
}
