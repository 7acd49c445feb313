//! What requests do to the disk: at once where that is memory and journal work, else in a pool.
//!
//! Invariants
//! - Data passes through a buffer of ours on its way: the disk never sees memory that a guest can change.
//! - A request that was handed off holds its place in the queue until it is answered.
//! - FLUSH, and writes that must be durable, wait in a pool of their own, which no read can fill.
//! - Work on a long range is done in slices, between which others have their turns.

use std::sync::{Arc, atomic::Ordering};

use aquifer_vdisk::{Error, Zeroing};

use super::{
    config::Caching,
    queue::{Air, Effect, Queue, State, Taken},
    request::{HEADER_LEN, ID_LEN, Request, Status, ZeroRange},
    ring::RingError,
};
use crate::nbd::server::pool::{Pool, Scratch, is_of_whole_blocks};

/// Longest READ answered in place.
const READ_INLINE_MAX: u64 = 256 << 10;
/// Longest READ that is decoded in place, where it is the only one.
const DECODE_INLINE_MAX: u64 = 64 << 10;
/// Longest WRITE done in place.
const WRITE_INLINE_MAX: u64 = 1 << 20;
/// Bytes that pass through a pool's buffer at once.
const PIECE: u64 = 1 << 20;
/// Bytes that are made zero before others have a turn.
const ZERO_SLICE: u64 = 16 << 20;

/// Does a request, or hands it off.
pub(super) fn begin(
    queue: &Arc<Queue>,
    state: &mut State,
    taken: Taken,
    header: [u8; HEADER_LEN],
) -> Result<(), RingError> {
    let device = &queue.device;
    let layout = Arc::clone(&taken.layout);
    let request = Request::parse(header, layout.output_len, layout.input_len, device.rules());
    let whole = state.memory().check(&layout.output).and_then(|()| state.memory().check(&layout.input));
    let request = match (request, whole) {
        (Ok(request), Ok(())) => request,
        (Err(status), _) => return refuse(queue, state, &taken, status),
        (_, Err(_)) => return refuse(queue, state, &taken, Status::IoError),
    };
    match request {
        Request::Read { offset, len } => read(queue, state, taken, offset, len),
        Request::Write { offset, len } => write(queue, state, taken, offset, len),
        Request::Flush if !device.rules().writable => queue.finish(state, &taken, 0, Status::Ok),
        Request::Flush => {
            submit_flush(queue.hand_off(state, taken, Effect::Changes));
            Ok(())
        }
        Request::Identity => {
            let n = device.id.len().min(usize::try_from(layout.input_len).unwrap_or(ID_LEN));
            let id = device.id.get(..n).unwrap_or_default();
            let told = state.memory().scatter(&layout.input, 0, id).is_ok();
            let written = if told { u32::try_from(n).unwrap_or(0) } else { 0 };
            queue.finish(state, &taken, written, if told { Status::Ok } else { Status::IoError })
        }
        Request::Discard { ranges } | Request::WriteZeroes { ranges } => {
            let mut data = vec![0; super::request::RANGE_LEN * ranges as usize];
            let copied = state.memory().gather(&layout.output, 0, &mut data).map_err(|_| Status::IoError);
            match copied.and_then(|()| request.ranges(&data, device.rules())) {
                Ok(ranges) => {
                    submit_zeroes(queue.hand_off(state, taken, Effect::Changes), ranges);
                    Ok(())
                }
                Err(status) => refuse(queue, state, &taken, status),
            }
        }
    }
}

fn refuse(queue: &Queue, state: &mut State, taken: &Taken, status: Status) -> Result<(), RingError> {
    queue.device.stats.refused.fetch_add(1, Ordering::Relaxed);
    queue.finish(state, taken, 0, status)
}

/// Tells of a disk's error where it can be seen.
fn report(queue: &Queue, what: &'static str, error: &Error) -> Status {
    queue.device.stats.errors.fetch_add(1, Ordering::Relaxed);
    tracing::warn!(disk = queue.device.disk.name(), what, %error, "request failed");
    Status::IoError
}

fn read(queue: &Arc<Queue>, state: &mut State, taken: Taken, offset: u64, len: u64) -> Result<(), RingError> {
    let disk = &queue.device.disk;
    if len <= READ_INLINE_MAX {
        let n = usize::try_from(len).unwrap_or(0);
        let decode = len <= DECODE_INLINE_MAX && state.is_alone();
        let mut buffer = std::mem::take(&mut state.buffer);
        if buffer.len() < n {
            buffer.resize(n, 0);
        }
        let data = buffer.get_mut(..n).unwrap_or_default();
        let done = if decode { disk.read_soon(offset, data) } else { disk.read_now(offset, data) };
        let answered = match done {
            Ok(true) => {
                let (data, status) = match state.memory().scatter(&taken.layout.input, 0, data) {
                    Ok(()) => (u32::try_from(len).unwrap_or(0), Status::Ok),
                    Err(_) => (0, Status::IoError),
                };
                queue.device.stats.bytes_read.fetch_add(data.into(), Ordering::Relaxed);
                Some(queue.finish(state, &taken, data, status))
            }
            Ok(false) => None,
            Err(error) => Some(queue.finish(state, &taken, 0, report(queue, "read", &error))),
        };
        state.buffer = buffer;
        if let Some(answered) = answered {
            return answered;
        }
    }
    let air = queue.hand_off(state, taken, Effect::None);
    submit(&queue.device.pools.slow, air, move |air, scratch| {
        let done = read_pieces(&air, scratch, offset, len);
        let written = if done == Status::Ok { u32::try_from(len).unwrap_or(u32::MAX - 1) } else { 0 };
        air.land(written, done);
    });
    Ok(())
}

fn read_pieces(air: &Air, scratch: &mut Scratch, offset: u64, len: u64) -> Status {
    let device = &air.queue().device;
    let mut done = 0;
    while done < len {
        let data = scratch.room((len - done).min(PIECE));
        if let Err(error) = device.disk.read(offset + done, data) {
            return report(air.queue(), "read", &error);
        }
        match air.with_memory(|memory| memory.scatter(&air.layout().input, done, data)) {
            Some(Ok(())) => {}
            _ => return Status::IoError,
        }
        device.stats.bytes_read.fetch_add(data.len() as u64, Ordering::Relaxed);
        done += data.len() as u64;
    }
    Status::Ok
}

/// Whole blocks are taken in place. What may read the source, or is to be durable at once, is handed off.
fn write(queue: &Arc<Queue>, state: &mut State, taken: Taken, offset: u64, len: u64) -> Result<(), RingError> {
    let device = &queue.device;
    let aligned = is_of_whole_blocks(offset, len);
    let pays = device.disk.pays(len);
    if aligned && len <= WRITE_INLINE_MAX && !pays && device.caching() == Caching::WriteBack {
        let n = usize::try_from(len).unwrap_or(0);
        let mut buffer = std::mem::take(&mut state.buffer);
        if buffer.len() < n {
            buffer.resize(n, 0);
        }
        let data = buffer.get_mut(..n).unwrap_or_default();
        let status = match state.memory().gather(&taken.layout.output, 0, data) {
            Ok(()) => match device.disk.write(offset, data) {
                Ok(()) => Status::Ok,
                Err(error) => report(queue, "write", &error),
            },
            Err(_) => Status::IoError,
        };
        device.stats.bytes_written.fetch_add(len, Ordering::Relaxed);
        state.buffer = buffer;
        return queue.finish(state, &taken, 0, status);
    }
    let air = queue.hand_off(state, taken, Effect::Changes);
    // Whatever may wait for the source stays away from those that need none.
    let pool = if pays && aligned { &device.large } else { &device.pools.slow };
    submit(pool, air, move |air, scratch| match write_pieces(&air, scratch, offset, len) {
        Status::Ok => settle(air),
        status => air.land(0, status),
    });
    Ok(())
}

fn write_pieces(air: &Air, scratch: &mut Scratch, offset: u64, len: u64) -> Status {
    let device = &air.queue().device;
    let mut done = 0;
    while done < len {
        let data = scratch.room((len - done).min(PIECE));
        match air.with_memory(|memory| memory.gather(&air.layout().output, done, data)) {
            Some(Ok(())) => {}
            _ => return Status::IoError,
        }
        if let Err(error) = device.disk.write(offset + done, data) {
            return report(air.queue(), "write", &error);
        }
        device.stats.bytes_written.fetch_add(data.len() as u64, Ordering::Relaxed);
        done += data.len() as u64;
    }
    Status::Ok
}

/// Answers a change, after a sync where the guest counts on one.
fn settle(air: Air) {
    match air.queue().device.caching() {
        Caching::WriteBack => air.land(0, Status::Ok),
        Caching::WriteThrough => submit_flush(air),
    }
}

fn submit_flush(air: Air) {
    let device = Arc::clone(&air.queue().device);
    submit(&device.pools.sync, air, |air, _| {
        let done = air.queue().device.disk.flush();
        let status = done.map_or_else(|error| report(air.queue(), "flush", &error), |()| Status::Ok);
        air.land(0, status);
    });
}

fn submit_zeroes(air: Air, mut ranges: Vec<ZeroRange>) {
    let device = Arc::clone(&air.queue().device);
    let Some(ZeroRange { offset, len, zeroing }) = ranges.pop() else { return settle(air) };
    submit(&device.pools.slow, air, move |air, _| {
        // Cut at multiples, where the overlay's regions end.
        let end = (offset - offset % ZERO_SLICE).saturating_add(ZERO_SLICE).min(offset + len);
        let disk = &air.queue().device.disk;
        let done = match zeroing {
            Zeroing::MayTrim => disk.trim(offset, end - offset),
            Zeroing::KeepSpace => disk.write_zeroes(offset, end - offset, zeroing),
        };
        if let Err(error) = done {
            let status = report(air.queue(), "zero", &error);
            return air.land(0, status);
        }
        if end < offset + len {
            ranges.push(ZeroRange { offset: end, len: offset + len - end, zeroing });
        }
        submit_zeroes(air, ranges);
    });
}

fn submit(pool: &Pool, air: Air, job: impl FnOnce(Air, &mut Scratch) + Send + 'static) {
    pool.submit(air.queue().lane, Box::new(move |scratch| job(air, scratch)));
}
