//! Threads for what may wait: decodes, reads of a slow source, syncs.
//!
//! Invariants
//! - As many jobs run as there are base threads; a job that has run for [`STUCK_AFTER`] counts as waiting,
//!   and another thread (up to `threads_max`) takes its place, so that a source that has gone away cannot
//!   hold up what does not need it.
//! - Lanes (one per connection) take turns: a client with many requests does not push others back.
//! - Every other turn belongs to lanes that had nothing queued: who asks for little waits for one job of those who
//!   always want more, however many they are.
//! - A panic of a job is caught and counted; the thread goes on.
//!
//! Lock order: the pool's one lock is never held while a job runs.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aquifer_vdisk::overlay::OVERLAY_BLOCK_BYTES;
use parking_lot::{Condvar, Mutex};

/// After this long a running job is taken to be waiting for something other than the processor.
pub(crate) const STUCK_AFTER: Duration = Duration::from_millis(20);
/// How long a thread beyond the base stays without work.
const IDLE_MAX: Duration = Duration::from_secs(5);
/// Threads for the large writes of one disk: it syncs one at a time, and the next is at hand.
const LARGE_THREADS: usize = 2;

/// Whether a write is of whole blocks of an overlay: such a one never reads the source.
pub(crate) fn is_of_whole_blocks(offset: u64, len: u64) -> bool {
    offset.is_multiple_of(OVERLAY_BLOCK_BYTES) && len.is_multiple_of(OVERLAY_BLOCK_BYTES)
}

/// What a thread keeps between jobs.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// A buffer whose length only grows, so that it is zeroed once.
    pub(crate) buffer: Vec<u8>,
}

impl Scratch {
    /// `len` bytes of the buffer, which hold anything.
    pub(crate) fn room(&mut self, len: u64) -> &mut [u8] {
        let len = usize::try_from(len).unwrap_or(0);
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
        self.buffer.get_mut(..len).unwrap_or_default()
    }
}

/// One piece of work.
pub(crate) type Job = Box<dyn FnOnce(&mut Scratch) + Send>;

/// Where the jobs of one connection queue up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LaneId(pub(crate) u64);

/// A bounded set of threads.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: &'static str,
    base: usize,
    threads_max: usize,
    state: Mutex<State>,
    work: Condvar,
    watch: Condvar,
    panics: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Lanes that were served since they last had nothing queued.
    lanes: VecDeque<(LaneId, VecDeque<Job>)>,
    /// Lanes that were not.
    fresh: VecDeque<(LaneId, VecDeque<Job>)>,
    /// Whose turn it is.
    fresh_next: bool,
    /// Jobs in all lanes.
    queued: usize,
    slots: Vec<Slot>,
    threads: usize,
    /// Threads that wait for work, or have been woken and not yet looked.
    idle: usize,
    watcher: Watcher,
    closed: bool,
}

/// What the thread with this number does.
#[derive(Clone, Copy, Default)]
enum Slot {
    #[default]
    Free,
    Idle,
    Busy(Instant),
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Watcher {
    #[default]
    None,
    Asleep,
    Awake,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("lanes", &self.lanes.len()).field("threads", &self.threads).finish()
    }
}

impl Pool {
    /// No thread is started before there is work.
    pub(crate) fn new(name: &'static str, base: usize, threads_max: usize) -> Self {
        let shared = Shared {
            name,
            base,
            threads_max,
            state: Mutex::default(),
            work: Condvar::new(),
            watch: Condvar::new(),
            panics: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// For the writes of one disk that pay for themselves and are of whole blocks: it takes one at a time, so that more
    /// threads would only wait for it. One that may wait for its source does not belong here, where others are behind it.
    pub(crate) fn for_large_writes(name: &'static str) -> Self {
        Self::new(name, 1, LARGE_THREADS)
    }

    /// Queues a job; never waits. After [`Pool::close`] it is dropped.
    pub(crate) fn submit(&self, lane: LaneId, job: Job) {
        let mut state = self.shared.state.lock();
        if state.closed {
            return;
        }
        let State { lanes, fresh, .. } = &mut *state;
        match lanes.iter_mut().chain(&mut *fresh).find(|(id, _)| *id == lane) {
            Some((_, jobs)) => jobs.push_back(job),
            None => fresh.push_back((lane, VecDeque::from([job]))),
        }
        state.queued += 1;
        if state.idle >= state.queued {
            drop(state);
            self.shared.work.notify_one();
        } else if state.threads < self.shared.base {
            self.shared.start(&mut state);
        } else {
            match state.watcher {
                Watcher::Awake => {}
                Watcher::Asleep => drop(self.shared.watch.notify_one()),
                Watcher::None => self.shared.start_watcher(&mut state),
            }
        }
    }

    /// Drops the queued jobs of a lane.
    pub(crate) fn cancel(&self, lane: LaneId) {
        let mut state = self.shared.state.lock();
        let State { lanes, fresh, .. } = &mut *state;
        let taken = |queue: &mut VecDeque<(LaneId, VecDeque<Job>)>| {
            let index = queue.iter().position(|(id, _)| *id == lane)?;
            queue.remove(index)
        };
        let gone = taken(lanes).or_else(|| taken(fresh));
        state.queued -= gone.as_ref().map_or(0, |(_, jobs)| jobs.len());
        drop(state);
        // Dropped without the lock: a job may own anything.
        drop(gone);
    }

    /// Jobs that panicked so far.
    pub(crate) fn panics(&self) -> u64 {
        self.shared.panics.load(Ordering::Relaxed)
    }

    /// Drops what is queued and lets the threads end once their jobs do.
    pub(crate) fn close(&self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        let gone = (std::mem::take(&mut state.lanes), std::mem::take(&mut state.fresh));
        state.queued = 0;
        drop(state);
        drop(gone);
        self.shared.work.notify_all();
        self.shared.watch.notify_all();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    /// The next job; its lane goes to the back of the queue.
    fn next(&mut self) -> Option<Job> {
        let (first, second) = match self.fresh_next {
            true => (&mut self.fresh, &mut self.lanes),
            false => (&mut self.lanes, &mut self.fresh),
        };
        let (lane, mut jobs) = first.pop_front().or_else(|| second.pop_front())?;
        self.fresh_next = !self.fresh_next;
        let job = jobs.pop_front();
        self.queued -= 1;
        if !jobs.is_empty() {
            self.lanes.push_back((lane, jobs));
        }
        job
    }
}

impl Shared {
    fn start(self: &Arc<Self>, state: &mut State) {
        let number = state.slots.iter().position(|slot| matches!(slot, Slot::Free)).unwrap_or(state.slots.len());
        if number == state.slots.len() {
            state.slots.push(Slot::Free);
        }
        let shared = Arc::clone(self);
        if thread::Builder::new().name(self.name.into()).spawn(move || shared.run(number)).is_ok() {
            state.threads += 1;
            set(&mut state.slots, number, Slot::Idle);
        }
    }

    fn start_watcher(self: &Arc<Self>, state: &mut State) {
        let shared = Arc::clone(self);
        if thread::Builder::new().name(format!("{}-watch", self.name)).spawn(move || shared.watch()).is_ok() {
            state.watcher = Watcher::Awake;
        }
    }

    fn run(&self, number: usize) {
        let mut scratch = Scratch::default();
        while let Some(job) = self.take(number) {
            if catch_unwind(AssertUnwindSafe(|| job(&mut scratch))).is_err() {
                self.panics.fetch_add(1, Ordering::Relaxed);
                scratch = Scratch::default();
            }
        }
    }

    /// Waits for a job; `None` ends the thread.
    fn take(&self, number: usize) -> Option<Job> {
        let mut state = self.state.lock();
        set(&mut state.slots, number, Slot::Idle);
        let mut idle_too_long = false;
        loop {
            if let Some(job) = state.next() {
                set(&mut state.slots, number, Slot::Busy(Instant::now()));
                return Some(job);
            }
            if state.closed || idle_too_long {
                set(&mut state.slots, number, Slot::Free);
                state.threads -= 1;
                return None;
            }
            state.idle += 1;
            if state.threads > self.base {
                idle_too_long = self.work.wait_for(&mut state, IDLE_MAX).timed_out();
            } else {
                self.work.wait(&mut state);
            }
            state.idle -= 1;
        }
    }

    /// Looks after queued jobs while all threads are busy.
    fn watch(self: &Arc<Self>) {
        let mut state = self.state.lock();
        while !state.closed {
            if state.queued == 0 {
                state.watcher = Watcher::Asleep;
                self.watch.wait(&mut state);
                state.watcher = Watcher::Awake;
                continue;
            }
            let stuck = |slot: &&Slot| matches!(slot, Slot::Busy(began) if began.elapsed() > STUCK_AFTER);
            let moving = state.threads.saturating_sub(state.slots.iter().filter(stuck).count());
            if moving < self.base && state.threads < self.threads_max {
                self.start(&mut state);
            }
            self.watch.wait_for(&mut state, STUCK_AFTER / 4);
        }
        state.watcher = Watcher::None;
    }
}

fn set(slots: &mut [Slot], number: usize, to: Slot) {
    if let Some(slot) = slots.get_mut(number) {
        *slot = to;
    }
}

#[cfg(test)]
mod tests;
