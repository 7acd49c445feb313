//! One queue at work: takes requests, answers what is ready, hands off what may wait.
//!
//! Invariants
//! - Whatever touches the guest's memory does so with the queue's lock held and the queue not stopped: once
//!   [`Queue::stop`] has returned, the guest's memory is the guest's alone.
//! - A request that changes the disk is waited for before a queue is stopped: none can land later. A read that waits for
//!   a source is given up instead where the next start is told of it, and else waited for as well.
//! - Every request that was taken is answered exactly once, or is marked for whoever serves next.
//! - A fault of the ring ends that queue only, and the hypervisor is told.
//!
//! Lock order: a queue's lock is taken before any lock of the disk or the pools.

use std::{
    collections::VecDeque,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::{
    device::Device,
    inflight::Inflight,
    memory::Memory,
    request::{Descriptor, HEADER_LEN, Layout, Span, Status},
    ring::{Ring, RingError},
    work,
};
use crate::nbd::server::pool::LaneId;

/// Requests taken under one hold of the lock.
const BATCH: usize = 64;
/// How long to look for the next request before sleeping.
const SPIN: Duration = Duration::from_micros(30);
/// A guest that came back within this is worth looking out for.
const SPIN_GAP: Duration = Duration::from_micros(100);
/// How long a stop waits for reads that the next start would be told of.
const READS_WAIT: Duration = Duration::from_secs(1);

/// What adds one to an event counter.
#[expect(clippy::host_endian_bytes, reason = "the kernel reads a number of this machine's own")]
const ONE: [u8; 8] = 1u64.to_ne_bytes();

/// A queue that was started; it is stopped once and never started again.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) device: Arc<Device>,
    pub(super) index: u16,
    pub(super) lane: LaneId,
    state: Mutex<State>,
    landed: Condvar,
    signals: Signals,
    wake: OwnedFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Descriptors for waking the guest, which the hypervisor may change at any time.
#[derive(Clone, Debug, Default)]
pub(super) struct Signals {
    /// Answers are there.
    pub(super) call: Arc<Mutex<Option<File>>>,
    /// The ring cannot go on.
    pub(super) error: Arc<Mutex<Option<File>>>,
}

fn ring_bell(bell: &Mutex<Option<File>>) {
    if let Some(file) = &*bell.lock() {
        // One that is full has been rung.
        let _ = rustix::io::write(file, &ONE);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Running,
    /// Takes no more, finishes what it has.
    Stopping,
    Stopped,
}

/// What the lock guards.
#[derive(Debug)]
pub(super) struct State {
    pub(super) ring: Ring,
    inflight: Option<Arc<Inflight>>,
    /// What an earlier door took and did not answer.
    again: VecDeque<u16>,
    turn: u64,
    stage: Stage,
    /// Requests handed off and not yet answered.
    air: u32,
    /// Those of them that change the disk.
    changes: u32,
    descriptors: Vec<Descriptor>,
    pub(super) buffer: Vec<u8>,
}

/// A request that was taken: what its answer needs.
#[derive(Clone, Debug)]
pub(super) struct Taken {
    pub(super) head: u16,
    pub(super) layout: Arc<Layout>,
}

/// Whether a request that was handed off changes the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    Changes,
}

impl State {
    /// A queue's state over `ring`, going on with what `inflight` says was left.
    pub(super) fn new(mut ring: Ring, inflight: Option<Arc<Inflight>>, index: u16) -> Result<Self, RingError> {
        let (mut again, mut turn) = (VecDeque::new(), 0);
        if let Some(inflight) = &inflight {
            if ring.size() > inflight.size() {
                return Err(RingError::Size(ring.size().into()));
            }
            let (heads, last) = inflight.recover(index, ring.answered_index())?;
            if let Some(head) = heads.iter().find(|head| **head >= ring.size()) {
                return Err(RingError::Index(*head));
            }
            let taken = u16::try_from(heads.len()).unwrap_or(u16::MAX);
            ring.set_next(ring.answered_index().wrapping_add(taken));
            (again, turn) = (heads.into(), last);
        }
        let (descriptors, buffer) = (Vec::new(), Vec::new());
        Ok(Self { ring, inflight, again, turn, stage: Stage::Running, air: 0, changes: 0, descriptors, buffer })
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        self.ring.memory()
    }

    /// Whether nothing else is in the air or waits in the ring.
    pub(super) fn is_alone(&self) -> bool {
        self.air == 0 && self.again.is_empty() && self.ring.pending().is_ok_and(|pending| pending == 0)
    }

    fn take(&mut self, queue: u16) -> Result<Option<u16>, RingError> {
        if let Some(head) = self.again.pop_front() {
            return Ok(Some(head));
        }
        let Some(head) = self.ring.take()? else { return Ok(None) };
        self.turn = self.turn.wrapping_add(1);
        if let Some(inflight) = &self.inflight {
            inflight.taken(queue, head, self.turn)?;
        }
        Ok(Some(head))
    }

    fn put(&mut self, queue: u16, head: u16, written: u32) -> Result<(), RingError> {
        if let Some(inflight) = &self.inflight {
            inflight.answering(queue, head)?;
        }
        self.ring.answer(head, written)?;
        if let Some(inflight) = &self.inflight {
            inflight.answered(queue, head, self.ring.answered_index())?;
        }
        Ok(())
    }
}

impl Queue {
    /// Starts a queue: from now on it is served, whenever `kick` says so.
    pub(super) fn start(
        device: &Arc<Device>,
        (index, lane): (u16, LaneId),
        state: State,
        signals: Signals,
        kick: OwnedFd,
    ) -> std::io::Result<Arc<Self>> {
        // A kick that somebody else took back must not be waited for.
        rustix::io::ioctl_fionbio(&kick, true)?;
        let queue = Arc::new(Self {
            device: Arc::clone(device),
            index,
            lane,
            state: Mutex::new(state),
            landed: Condvar::new(),
            signals,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            thread: Mutex::new(None),
        });
        let serving = Arc::clone(&queue);
        let thread = std::thread::Builder::new().name("vhost-queue".into());
        *queue.thread.lock() = Some(thread.spawn(move || serving.serve(&kick))?);
        Ok(queue)
    }

    /// Stops it, once nothing it does can reach the guest or the disk any more. The index of the next request.
    pub(super) fn stop(&self) -> u16 {
        let mut state = self.state.lock();
        if state.stage == Stage::Running {
            state.stage = Stage::Stopping;
        }
        let _ = rustix::io::write(&self.wake, &ONE);
        let deadline = Instant::now() + READS_WAIT;
        while state.changes > 0 || state.air > 0 && (state.inflight.is_none() || Instant::now() < deadline) {
            self.landed.wait_for(&mut state, Duration::from_millis(50));
        }
        state.stage = Stage::Stopped;
        let next = state.ring.next_index();
        drop(state);
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
        next
    }

    /// Goes on in other memory.
    pub(super) fn remap(&self, memory: &Arc<Memory>) -> Result<(), RingError> {
        self.state.lock().ring.remap(Arc::clone(memory))
    }

    fn serve(self: &Arc<Self>, kick: &OwnedFd) {
        let mut gap = Duration::MAX;
        loop {
            match self.turn() {
                Ok(Turn::Over) => return,
                Ok(Turn::More) => continue,
                Ok(Turn::Idle) => {}
                Err(error) => return self.broken(&error),
            }
            let began = Instant::now();
            match self.wait(kick, gap) {
                Ok(true) => gap = began.elapsed(),
                Ok(false) => return,
                Err(error) => return self.broken(&error),
            }
        }
    }

    fn broken(&self, error: &dyn std::fmt::Display) {
        tracing::warn!(disk = self.device.disk.name(), queue = self.index, %error, "a queue cannot go on");
        self.device.stats.refused.fetch_add(1, Ordering::Relaxed);
        ring_bell(&self.signals.error);
    }

    /// All that is there, up to a batch.
    fn turn(self: &Arc<Self>) -> Result<Turn, RingError> {
        let mut state = self.state.lock();
        if state.stage != Stage::Running {
            return Ok(Turn::Over);
        }
        state.ring.want_no_kicks()?;
        let mut more = Turn::More;
        for _ in 0..BATCH {
            let Some(head) = state.take(self.index)? else {
                more = Turn::Idle;
                break;
            };
            self.begin(&mut state, head)?;
        }
        self.interrupt(&mut state)?;
        Ok(more)
    }

    /// Waits for a kick: awake for a moment if the guest is quick, then asleep. `false` once there is nobody to wait for.
    fn wait(&self, kick: &OwnedFd, gap: Duration) -> Result<bool, RingError> {
        let began = Instant::now();
        while gap < SPIN_GAP && began.elapsed() < SPIN {
            let state = self.state.lock();
            if state.stage != Stage::Running || state.ring.pending()? > 0 {
                return Ok(true);
            }
            drop(state);
            rustix::thread::sched_yield();
        }
        if self.state.lock().ring.want_kicks()? {
            return Ok(true);
        }
        let mut fds = [
            PollFd::from_borrowed_fd(kick.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
        ];
        // An interruption is as good as a kick.
        let _ = poll(&mut fds, None);
        let [kicked, woken] = &fds;
        if !woken.revents().is_empty() {
            return Ok(false);
        }
        if kicked.revents().contains(PollFlags::IN) {
            // Taken back, or it would be heard again; one that says nothing more has been closed.
            return Ok(!matches!(rustix::io::read(kick, &mut [0; 8]), Ok(0)));
        }
        Ok(kicked.revents().is_empty())
    }

    /// Looks at a request and does it, or hands it off.
    fn begin(self: &Arc<Self>, state: &mut State, head: u16) -> Result<(), RingError> {
        let mut descriptors = std::mem::take(&mut state.descriptors);
        let walked = state.ring.chain(head, &mut descriptors).map_err(|e| e.to_string());
        let layout = walked.and_then(|()| Layout::of(&descriptors).map_err(|e| e.to_string()));
        state.descriptors = descriptors;
        let layout = layout.and_then(|layout| {
            let mut header = [0; HEADER_LEN];
            let memory = state.memory();
            let whole = memory.gather(&layout.header, 0, &mut header);
            let whole = whole.and_then(|()| memory.check(&[Span { addr: layout.status, len: 1 }]));
            whole.map(|()| (header, layout)).map_err(|e| e.to_string())
        });
        match layout {
            Ok((header, layout)) => {
                let taken = Taken { head, layout: Arc::new(layout) };
                work::begin(self, state, taken, header)
            }
            Err(why) => {
                // There is no place for a status: that nothing was written is all the guest can be told.
                tracing::warn!(disk = self.device.disk.name(), why, "a request makes no sense");
                self.device.stats.refused.fetch_add(1, Ordering::Relaxed);
                state.put(self.index, head, 0)
            }
        }
    }

    /// Answers a request, of whose buffers `data` bytes were written beside the status.
    pub(super) fn finish(&self, state: &mut State, taken: &Taken, data: u32, status: Status) -> Result<(), RingError> {
        let stats = &self.device.stats;
        stats.requests.fetch_add(1, Ordering::Relaxed);
        let place = [Span { addr: taken.layout.status, len: 1 }];
        let told = state.memory().scatter(&place, 0, &[status as u8]);
        // Where the guest took that memory away meanwhile, nothing was written.
        state.put(self.index, taken.head, if told.is_ok() { data + 1 } else { 0 })
    }

    fn interrupt(&self, state: &mut State) -> Result<(), RingError> {
        if state.ring.wants_interrupt()? {
            ring_bell(&self.signals.call);
        }
        Ok(())
    }

    /// Counts a request in that is handed off; what is returned answers it.
    pub(super) fn hand_off(self: &Arc<Self>, state: &mut State, taken: Taken, effect: Effect) -> Air {
        state.air += 1;
        state.changes += u32::from(effect == Effect::Changes);
        Air { queue: Arc::clone(self), taken, effect, landed: false }
    }
}

enum Turn {
    /// There may be more.
    More,
    /// There is nothing.
    Idle,
    /// The queue was stopped.
    Over,
}

/// A request in the air. Dropped without an answer, it has failed.
#[derive(Debug)]
pub(super) struct Air {
    queue: Arc<Queue>,
    taken: Taken,
    effect: Effect,
    landed: bool,
}

impl Air {
    pub(super) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.taken.layout
    }

    /// The guest's memory, unless the queue was stopped.
    pub(super) fn with_memory<T>(&self, f: impl FnOnce(&Memory) -> T) -> Option<T> {
        let state = self.queue.state.lock();
        if state.stage == Stage::Stopped { None } else { Some(f(state.memory())) }
    }

    /// Answers it, with `data` bytes written beside the status.
    pub(super) fn land(mut self, data: u32, status: Status) {
        self.land_now(data, status);
    }

    fn land_now(&mut self, data: u32, status: Status) {
        if std::mem::replace(&mut self.landed, true) {
            return;
        }
        let queue = Arc::clone(&self.queue);
        let mut state: MutexGuard<'_, State> = queue.state.lock();
        state.air -= 1;
        state.changes -= u32::from(self.effect == Effect::Changes);
        if state.stage != Stage::Stopped {
            let answered = queue.finish(&mut state, &self.taken, data, status);
            if let Err(error) = answered.and_then(|()| queue.interrupt(&mut state)) {
                queue.broken(&error);
            }
        }
        drop(state);
        queue.landed.notify_all();
    }
}

impl Drop for Air {
    fn drop(&mut self) {
        self.land_now(0, Status::IoError);
    }
}
