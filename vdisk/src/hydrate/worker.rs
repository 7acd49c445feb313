//! The threads that hydrate: what comes next, what to do when it fails, when it is done.
//!
//! Order: guest faults, their neighbours, the replayed trace, then everything from the start of the disk.
//!
//! Invariants
//! - A range that failed is tried again until it is local, found damaged, or hydration is stopped.
//! - `Done` is reported only after everything is local *and* durable, and the source has been let go.
//! - A failed sync of the overlay ends hydration: nothing it does could become durable any more.
//!
//! Not here: how a range is copied (`step`), how fast (`pace`).

use std::{
    collections::VecDeque,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_formats::storage::{Readers, WriteBehind};
use parking_lot::{Condvar, Mutex};

use super::{
    STOP_MAX,
    demand::Demand,
    leave_out::LeaveOut,
    pace::{Buckets, Pace, StepSize, Throttle},
    progress::{HydrateProgress, HydrateState, Meter, Replay},
    step::Class,
};
use crate::{Delta, Disk, Error, ExtentKind, Result, Trace};

/// Copied bytes after which they are made durable, with their marks.
const SEAL_BYTES: u64 = 128 << 20;
/// Time after which they are in any case.
const SEAL_AFTER: Duration = Duration::from_secs(10);
/// First and longest pause before something that failed is tried again.
pub(super) const RETRY: Range<Duration> = Duration::from_millis(200)..Duration::from_secs(5);
/// Metadata is read this far at once to learn what is used.
const SURVEY_BYTES: u64 = 64 << 20;

/// What all threads of one hydrator share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) disk: Arc<Disk>,
    pub(super) demand: Arc<Demand>,
    pub(super) state: Mutex<State>,
    /// Told when `state.phase` or `state.threads` has changed.
    pub(super) ended: Condvar,
}

/// See [`Shared`].
#[derive(Debug)]
pub(super) struct State {
    pub(super) pace: Pace,
    pub(super) paused: bool,
    /// Bytes that may be stored until more is allowed.
    pub(super) room: u64,
    /// Since when no step is begun any more.
    pub(super) stopping: Option<Instant>,
    /// Threads that have not ended.
    threads: usize,
    pub(super) phase: HydrateState,
    pub(super) meter: Meter,
    trace: VecDeque<Range<u64>>,
    /// Fetches of the trace in all.
    traced: usize,
    buckets: Buckets,
    throttle: Throttle,
    step: StepSize,
    pub(super) leave_out: LeaveOut,
    /// Bulk steps on their way.
    bulk_busy: usize,
    /// Where the bulk copy goes on.
    cursor: u64,
    /// Ranges that threads are at; no two overlap, so nothing is fetched by two of them.
    busy: Vec<Range<u64>>,
    /// Failed ranges, to be tried again.
    again: Vec<Range<u64>>,
    retry_at: Option<Instant>,
    retry_pause: Duration,
    damaged: Delta,
    error: Option<String>,
    used: Option<u64>,
    /// What is used is still being counted: the chain is needed for that.
    surveying: bool,
    /// Copied since the last seal, and since when.
    unsealed: u64,
    unsealed_since: Instant,
    sealing: bool,
}

/// What one thread keeps from step to step.
#[derive(Debug, Default)]
struct Desk {
    /// The bytes of a run.
    buf: Vec<u8>,
    behind: WriteBehind,
}

/// What a thread does next.
enum Next {
    Copy(Range<u64>, Class),
    Seal,
    /// For something to take, for so long at most.
    Wait(Duration),
    /// Whatever there is to take: nothing may be taken for so long, or until that has changed.
    Hold(Duration),
    /// Nothing is absent any more, or what is cannot be copied.
    Finish,
    Quit,
}

impl Shared {
    pub(super) fn new(disk: Arc<Disk>, demand: Arc<Demand>, pace: Pace, threads: usize) -> Self {
        let now = Instant::now();
        let state = State {
            pace,
            paused: false,
            room: u64::MAX,
            stopping: None,
            threads,
            phase: HydrateState::Running,
            meter: Meter::new(now),
            trace: VecDeque::new(),
            traced: 0,
            buckets: Buckets::new(),
            throttle: Throttle::new(now),
            step: StepSize::new(),
            leave_out: LeaveOut::new(pace.blocks, disk.is_watched()),
            bulk_busy: 0,
            cursor: 0,
            busy: Vec::new(),
            again: Vec::new(),
            retry_at: None,
            retry_pause: RETRY.start,
            damaged: Delta::new(),
            error: None,
            used: None,
            surveying: true,
            unsealed: 0,
            unsealed_since: now,
            sealing: false,
        };
        Self { disk, demand, state: Mutex::new(state), ended: Condvar::new() }
    }

    /// The life of one thread.
    pub(super) fn run(&self) {
        let mut desk = Desk::default();
        loop {
            let seen = self.demand.seen();
            match self.next() {
                Next::Copy(range, class) => self.copy(range, class, &mut desk),
                Next::Seal => self.seal(),
                Next::Wait(limit) => self.demand.wait(seen, limit),
                Next::Hold(limit) => self.demand.hold(seen, limit),
                Next::Finish => self.finish(),
                Next::Quit => return,
            }
        }
    }

    /// A thread has ended.
    pub(super) fn leave(&self) {
        self.state.lock().threads -= 1;
        self.ended.notify_all();
    }

    /// Waits until all threads have ended; `false` if some had not [`STOP_MAX`] after the first word of stopping.
    pub(super) fn all_left(&self) -> bool {
        let mut state = self.state.lock();
        let until = state.stopping.unwrap_or_else(Instant::now) + STOP_MAX;
        while state.threads > 0 {
            if self.ended.wait_until(&mut state, until).timed_out() {
                return state.threads == 0;
            }
        }
        true
    }

    fn next(&self) -> Next {
        let mut state = self.state.lock();
        let now = Instant::now();
        if state.stopping.is_some() || state.phase.is_final() {
            return Next::Quit;
        }
        if let Some(at) = state.retry_at {
            if now < at {
                return Next::Hold(at - now);
            }
            state.retry_at = None;
        }
        let seal_due = state.unsealed >= SEAL_BYTES
            || state.unsealed > 0 && now.duration_since(state.unsealed_since) >= SEAL_AFTER;
        if seal_due && !state.sealing {
            state.sealing = true;
            return Next::Seal;
        }
        if state.paused {
            return Next::Hold(Duration::from_secs(1));
        }
        if state.room == 0 {
            // The machine is served from its source; what it asks for is not kept.
            while self.demand.take().is_some() {}
        }
        while state.room > 0
            && let Some(range) = self.demand.take().or_else(|| state.trace.pop_front())
        {
            if let Some(range) = state.claim(range) {
                return Next::Copy(range, Class::Urgent);
            }
        }
        let pace = state.pace;
        state.throttle.adjust(&pace, now, || self.demand.is_over_target());
        let slow_for = self.demand.slow_for();
        if let Some(slow) = slow_for.filter(|_| state.bulk_busy > 0) {
            // One at a time: a guest that waits should not wait behind several.
            return Next::Wait(slow);
        }
        if state.leave_out.pending {
            return Next::Wait(RETRY.start);
        }
        let Some(range) = self.bulk(&mut state) else {
            // The last one to find nothing, once nobody is at anything, ends it.
            return if state.busy.is_empty() && !state.sealing && !state.surveying {
                Next::Finish
            } else {
                Next::Wait(RETRY.start)
            };
        };
        if state.room == 0 {
            state.again.push(range);
            state.error = Some("what is free is kept for what the machine writes".to_owned());
            self.set_phase(&mut state, HydrateState::NoSpace);
            return Next::Wait(Duration::from_secs(1));
        }
        let State { buckets, throttle, .. } = &mut *state;
        if let Err(wait) = buckets.take(range.end - range.start, &pace, throttle, slow_for, now) {
            state.again.push(range);
            return Next::Wait(wait);
        }
        state.busy.push(range.clone());
        state.bulk_busy += 1;
        Next::Copy(range, Class::Bulk)
    }

    /// The next range of the bulk copy.
    fn bulk(&self, state: &mut State) -> Option<Range<u64>> {
        loop {
            while let Some(range) = state.again.pop() {
                if let Some(range) = state.free_part(range) {
                    return Some(range);
                }
            }
            let unused = state.leave_out.found();
            let (from, to) = self.next_wanted(unused.as_deref(), state.cursor, state.step.bytes())?;
            state.cursor = to;
            if let Some(range) = state.free_part(from..to) {
                return Some(range);
            }
        }
    }

    fn copy(&self, range: Range<u64>, class: Class, desk: &mut Desk) {
        let began = Instant::now();
        let result = self.disk.hydrate_with(range.start, range.end - range.start, class, &mut desk.buf);
        if result.as_ref().is_ok_and(|done| done.copied > 0) {
            self.send_off(range.clone(), class, desk);
        }
        let now = Instant::now();
        let mut state = self.state.lock();
        state.busy.retain(|busy| *busy != range);
        state.bulk_busy -= usize::from(class == Class::Bulk);
        match result {
            Ok(done) => {
                state.throttle.add(done.copied, now - began);
                if class == Class::Bulk {
                    state.step.took(done.copied, now - began);
                }
                state.meter.add(done.copied, now);
                state.room = state.room.saturating_sub(if state.room == u64::MAX { 0 } else { done.copied });
                if state.unsealed == 0 {
                    state.unsealed_since = now;
                }
                // Marks alone are cheap to find again, but have to be stored once.
                state.unsealed += done.copied.max(u64::from(done.local > 0));
                state.recovered();
            }
            Err(e) => self.note_error(&mut state, range, &e, now),
        }
    }

    /// Sends what was stored on its way to the disk: a whole step at once, since the runs in it are short.
    fn send_off(&self, range: Range<u64>, class: Class, desk: &mut Desk) {
        let Ok(overlay) = self.disk.overlay() else { return };
        match class {
            Class::Bulk => {
                // What is let go has to come back through the queue of the very disk that is being written to.
                let readers = if self.demand.is_read_often() { Readers::Some } else { Readers::None };
                desk.behind.wrote(overlay.raw(), range, readers);
            }
            Class::Urgent => {
                // The guest reads what is beside it next: it stays in memory. A hint; the sync that matters reports.
                let _hint = overlay.raw().start_writeback(range.start, range.end - range.start);
            }
        }
    }

    fn note_error(&self, state: &mut State, range: Range<u64>, e: &Error, now: Instant) {
        state.error = Some(e.to_string());
        match e {
            Error::Format(inner) if !is_transient(inner) => self.narrow(state, range),
            Error::SyncFailed { .. } | Error::ReadOnly { .. } | Error::OutOfRange { .. } => {
                self.set_phase(state, HydrateState::Failed);
            }
            _ => {
                let phase =
                    if matches!(e, Error::NoSpace { .. }) { HydrateState::NoSpace } else { HydrateState::SourceAway };
                state.again.push(range);
                state.retry_at = Some(now + state.retry_pause);
                state.retry_pause = (state.retry_pause * 2).min(RETRY.end);
                self.set_phase(state, phase);
            }
        }
    }

    /// A range with damage somewhere is cut until the damage stands alone.
    fn narrow(&self, state: &mut State, range: Range<u64>) {
        const LEAST: u64 = crate::overlay::OVERLAY_BLOCK_BYTES;
        let len = range.end - range.start;
        if len <= LEAST {
            return state.damaged.insert(range);
        }
        let middle = range.start + (len / 2).next_multiple_of(LEAST);
        state.again.push(middle.min(range.end)..range.end);
        state.again.push(range.start..middle.min(range.end));
        state.again.retain(|r| r.start < r.end);
    }

    fn seal(&self) {
        let covered = {
            let mut state = self.state.lock();
            std::mem::take(&mut state.unsealed)
        };
        let result = self.disk.seal();
        let mut state = self.state.lock();
        state.sealing = false;
        if let Err(e) = result {
            state.unsealed += covered;
            let now = Instant::now();
            state.unsealed_since = now;
            self.note_error(&mut state, 0..0, &e, now);
        }
    }

    /// Nothing is left to copy: makes it durable and lets the source go.
    fn finish(&self) {
        {
            let mut state = self.state.lock();
            if state.phase.is_final() || state.sealing || !state.busy.is_empty() {
                return;
            }
            state.sealing = true;
        }
        let sealed = self.disk.seal().and_then(|()| self.forget_unused());
        let result = sealed.and_then(|()| self.disk.detach_chain());
        let mut state = self.state.lock();
        (state.sealing, state.unsealed) = (false, 0);
        match result {
            Ok(true) => {
                state.error = None;
                self.set_phase(&mut state, HydrateState::Done);
            }
            Ok(false) if !state.damaged.is_empty() => self.set_phase(&mut state, HydrateState::Failed),
            // A range was skipped that is still absent: once more from the start.
            Ok(false) => state.cursor = 0,
            Err(e) => self.note_error(&mut state, 0..0, &e, Instant::now()),
        }
    }

    pub(super) fn set_phase(&self, state: &mut State, phase: HydrateState) {
        if state.phase.is_final() || state.phase == phase {
            return;
        }
        state.phase = phase;
        let running = phase == HydrateState::Running && !state.paused;
        state.meter.set_running(running, Instant::now());
        self.ended.notify_all();
        if phase.is_final() {
            self.demand.wake();
        }
    }

    pub(super) fn replay(&self, trace: &Trace) {
        let fetches = trace.fetches(self.disk.size());
        let mut state = self.state.lock();
        state.traced += fetches.len();
        state.trace.extend(fetches);
        drop(state);
        self.demand.wake();
    }

    /// Marks what the chain has no data for as local, and counts what it has data for.
    pub(super) fn survey(&self) {
        self.look_for_unused();
        let used = self.count_used();
        let mut state = self.state.lock();
        (state.used, state.surveying) = (used, false);
        if state.unsealed == 0 {
            (state.unsealed, state.unsealed_since) = (1, Instant::now());
        }
        drop(state);
        self.demand.wake();
    }

    /// `None` if it cannot be known: whoever copies meets the error with its range.
    fn count_used(&self) -> Option<u64> {
        let (mut used, mut at) = (0, 0);
        while at < self.disk.size() {
            let seen = self.demand.seen();
            if self.wait_while_held() {
                return None;
            }
            match self.disk.survey(at, SURVEY_BYTES) {
                Ok(data) => (used, at) = (used + self.wanted_of(&data?), at.saturating_add(SURVEY_BYTES)),
                Err(Error::Format(e)) if is_transient(&e) => self.demand.hold(seen, RETRY.end),
                Err(_) => return None,
            }
        }
        Some(used)
    }

    /// Waits while paused; `true` if it is over.
    pub(super) fn wait_while_held(&self) -> bool {
        loop {
            let seen = self.demand.seen();
            let state = self.state.lock();
            if state.stopping.is_some() || state.phase.is_final() {
                return true;
            }
            if !state.paused {
                return false;
            }
            drop(state);
            self.demand.hold(seen, Duration::from_secs(1));
        }
    }

    pub(super) fn progress(&self) -> HydrateProgress {
        let left_out = self.left_out();
        let local = self.disk.local().unwrap_or_default();
        let state = self.state.lock();
        let now = Instant::now();
        // Once surveyed, whatever is still absent and not left out is data.
        let missing = local.absent.saturating_sub(left_out);
        let used_local = state.used.map(|used| used.saturating_sub(missing));
        let left = missing;
        HydrateProgress {
            state: if state.paused && !state.phase.is_final() { HydrateState::Paused } else { state.phase },
            total: local.total(),
            local: local.local(),
            used: state.used,
            used_local,
            copied: state.meter.copied(),
            rate_bytes: state.meter.rate(now),
            eta: state.used.and_then(|_| state.meter.eta(left, now)),
            damaged: state.damaged.iter().map(|r| (r.start, r.end - r.start)).collect(),
            error: state.error.clone(),
            left_out,
            replay: (state.traced > 0).then(|| Replay { done: state.traced - state.trace.len(), total: state.traced }),
        }
    }
}

impl State {
    /// The first part of a range that no thread is at; the others are kept for later. A thread that fails puts its own
    /// range back.
    fn free_part(&mut self, range: Range<u64>) -> Option<Range<u64>> {
        let busy: Delta = self.busy.iter().cloned().collect();
        let wanted: Delta = std::iter::once(range).collect();
        let mut parts = wanted.subtract(&busy).iter().collect::<Vec<_>>().into_iter();
        let first = parts.next();
        self.again.extend(parts);
        first
    }

    fn claim(&mut self, range: Range<u64>) -> Option<Range<u64>> {
        let range = self.free_part(range)?;
        self.busy.push(range.clone());
        Some(range)
    }

    /// Something has worked, or there is room: whatever was away is back.
    pub(super) fn recovered(&mut self) {
        self.retry_pause = RETRY.start;
        if matches!(self.phase, HydrateState::SourceAway | HydrateState::NoSpace) {
            self.phase = HydrateState::Running;
            self.error = None;
            self.meter.set_running(!self.paused, Instant::now());
        }
    }
}

/// Whether reading again may help: an I/O error, other than that a file is too short.
pub(crate) fn is_transient(e: &aquifer_formats::Error) -> bool {
    matches!(e, aquifer_formats::Error::Io { source, .. } if source.kind() != std::io::ErrorKind::UnexpectedEof)
}

impl Disk {
    /// Marks what a range has no data for as local; returns what the chain has data for, in whole overlay
    /// blocks; `None` without a chain.
    fn survey(&self, offset: u64, len: u64) -> Result<Option<Delta>> {
        let Some(chain) = self.source()? else { return Ok(None) };
        let end = offset.saturating_add(len).min(self.size());
        let mut extents = Vec::new();
        chain.extents(offset, end - offset, &mut extents)?;
        let data: Delta = extents
            .iter()
            .filter(|e| e.kind == ExtentKind::Data)
            .map(|e| e.offset..e.offset + e.len)
            .collect::<Delta>()
            .round_out(crate::overlay::OVERLAY_BLOCK_BYTES)
            .clip(offset..end);
        let empty = std::iter::once(offset..end).collect::<Delta>().subtract(&data);
        for range in empty.iter() {
            self.overlay()?.fill_zero(range.start, range.end - range.start)?;
        }
        Ok(Some(data))
    }
}
