//! Threads that hash and compress, and the order in which their results are appended.
//!
//! Invariants
//! - Items in flight are bounded; whoever gives too many waits.
//! - Results are applied in the order of their numbers, by whichever thread completes the next one.
//! - The first error ends the work: later items are dropped, and the error is given to the next caller.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use parking_lot::{Condvar, Mutex, RwLock};

use super::{
    append::{Appender, Encoded, Item, Outcome},
    block::{Compression, Encoder},
    dedupe::DedupeTable,
    entry::{Entry, IdPage},
    key::{ContentId, ContentKey, LOST_ID},
    layout::FRAME_HEADER_BYTES,
    reader::{Reader, split},
};
use crate::{Error, Result};

/// A run of blocks to be encoded.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) first: u64,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Debug)]
enum Work {
    Encode(Chunk),
    Done(Item),
}

#[derive(Debug, Default)]
struct Queue {
    waiting: std::collections::VecDeque<(u64, Chunk)>,
    ready: BTreeMap<u64, Item>,
    given: u64,
    applied: u64,
    applying: bool,
    closed: bool,
    failed: bool,
    failure: Option<Error>,
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    room: Condvar,
    appender: Mutex<Option<Appender>>,
    dedupe: RwLock<DedupeTable>,
    parent: Option<Arc<Reader>>,
    key: ContentKey,
    how: Compression,
    block_bytes: usize,
    in_flight_max: u64,
    /// Blocks of another product's disk are stored, not left where they are.
    take_over: AtomicBool,
}

/// The running pipeline.
#[derive(Debug)]
pub(crate) struct Pipeline {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What one encoding thread keeps to itself.
struct Bench {
    encoder: Encoder,
    /// The parent's ids of the leaf last asked for.
    ids: Option<(u64, Arc<IdPage>)>,
    /// A block of the disk that the parent stands on.
    bytes: Vec<u8>,
}

impl Bench {
    fn new(how: Compression) -> Self {
        Self { encoder: Encoder::new(how), ids: None, bytes: Vec::new() }
    }

    /// Whether the parent has this content there. What lies in the disk of another product and was never read is read
    /// now; with `take_over` it does not count.
    fn is_as_before(
        &mut self,
        parent: &Reader,
        block: u64,
        id: ContentId,
        raw: &[u8],
        take_over: bool,
    ) -> Result<bool> {
        let before = self.parent_id(parent, block)?;
        if before != id && before != LOST_ID {
            return Ok(false);
        }
        let linked = parent.linked().is_some() && matches!(parent.entry(block)?, Entry::Foreign { .. });
        if !linked || take_over || before == id {
            return Ok(before == id && !(linked && take_over));
        }
        parent.read_linked(block, &mut self.bytes)?;
        Ok(self.bytes == raw)
    }

    fn parent_id(&mut self, parent: &Reader, block: u64) -> Result<ContentId> {
        let (leaf, index) = split(block);
        if let Some((at, ids)) = &self.ids
            && *at == leaf
        {
            return Ok(ids.get(index));
        }
        let ids = parent.ids(leaf)?;
        let id = ids.get(index);
        self.ids = Some((leaf, ids));
        Ok(id)
    }
}

/// What the encoders need to know.
pub(crate) struct PipelineSetup {
    pub(crate) appender: Appender,
    pub(crate) dedupe: DedupeTable,
    pub(crate) parent: Option<Arc<Reader>>,
    pub(crate) key: ContentKey,
    pub(crate) how: Compression,
    pub(crate) threads: usize,
}

impl Pipeline {
    /// Starts `threads` encoders; with none, the caller's thread does the work.
    pub(crate) fn start(setup: PipelineSetup) -> Self {
        let block_bytes = usize::try_from(setup.appender.identity.block_bytes()).unwrap_or(usize::MAX);
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue::default()),
            work: Condvar::new(),
            room: Condvar::new(),
            appender: Mutex::new(Some(setup.appender)),
            dedupe: RwLock::new(setup.dedupe),
            parent: setup.parent,
            key: setup.key,
            how: setup.how,
            block_bytes,
            in_flight_max: (setup.threads as u64 * 4).max(1),
            take_over: AtomicBool::new(false),
        });
        let threads = (0..setup.threads)
            .filter_map(|_| {
                let shared = Arc::clone(&shared);
                // Where no thread can be had, fewer do the work; with none, the caller does.
                std::thread::Builder::new().name("aql-encode".into()).spawn(move || shared.encode_all()).ok()
            })
            .collect();
        Self { shared, threads }
    }

    /// A buffer to fill: a used one where there is one.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        self.shared.queue.lock().spare.pop().unwrap_or_default()
    }

    /// Gives blocks to be encoded.
    pub(crate) fn encode(&self, chunk: Chunk) -> Result<()> {
        self.give(Work::Encode(chunk))
    }

    /// Gives an item that needs no encoding.
    pub(crate) fn pass(&self, item: Item) -> Result<()> {
        self.give(Work::Done(item))
    }

    fn give(&self, work: Work) -> Result<()> {
        let shared = &self.shared;
        let mut queue = shared.queue.lock();
        while queue.given - queue.applied >= shared.in_flight_max && !queue.failed {
            shared.room.wait(&mut queue);
        }
        queue.report()?;
        let number = queue.given;
        queue.given += 1;
        match work {
            Work::Encode(chunk) if self.threads.is_empty() => {
                drop(queue);
                let mut bench = Bench::new(shared.how);
                shared.finish(number, shared.encode(&mut bench, chunk));
                shared.queue.lock().report()
            }
            Work::Encode(chunk) => {
                queue.waiting.push_back((number, chunk));
                shared.work.notify_one();
                Ok(())
            }
            Work::Done(item) => {
                drop(queue);
                shared.finish(number, Ok(item));
                shared.queue.lock().report()
            }
        }
    }

    /// From now on blocks of another product's disk are stored, not left where they are.
    pub(crate) fn take_over(&self) {
        self.shared.take_over.store(true, Relaxed);
    }

    /// Waits until everything given has been applied.
    pub(crate) fn drain(&self) -> Result<()> {
        let mut queue = self.shared.queue.lock();
        while queue.applied < queue.given && !queue.failed {
            self.shared.room.wait(&mut queue);
        }
        queue.report()
    }

    /// Runs `f` on the appender, between items.
    pub(crate) fn with_appender<T>(&self, f: impl FnOnce(&mut Appender) -> T) -> Option<T> {
        self.shared.appender.lock().as_mut().map(f)
    }

    /// Ends the threads and gives the appender back, once everything has been applied.
    pub(crate) fn finish(self) -> Result<Appender> {
        self.drain()?;
        let appender = self.shared.appender.lock().take();
        appender.ok_or_else(|| Error::Refused { path: "native layer".into(), what: "the writer has ended".into() })
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        queue.closed = true;
        queue.waiting.clear();
        drop(queue);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic there has already failed the queue's users; nothing is left to save.
            let _ = thread.join();
        }
    }
}

impl Queue {
    fn report(&mut self) -> Result<()> {
        if !self.failed {
            return Ok(());
        }
        let again = || Error::Refused { path: "native layer".into(), what: "writing it has failed before".into() };
        Err(self.failure.take().unwrap_or_else(again))
    }
}

impl Shared {
    fn encode_all(&self) {
        let _guard = FailOnPanic(self);
        let mut bench = Bench::new(self.how);
        loop {
            let mut queue = self.queue.lock();
            let (number, chunk) = loop {
                if let Some(next) = queue.waiting.pop_front() {
                    break next;
                }
                if queue.closed {
                    return;
                }
                self.work.wait(&mut queue);
            };
            let failed = queue.failed;
            drop(queue);
            if !failed {
                let item = self.encode(&mut bench, chunk);
                self.finish(number, item);
            }
        }
    }

    fn encode(&self, bench: &mut Bench, chunk: Chunk) -> Result<Item> {
        let Chunk { first, bytes } = chunk;
        let mut frames = self.queue.lock().spare.pop().unwrap_or_default();
        frames.clear();
        let mut outcomes = Vec::with_capacity(bytes.len() / self.block_bytes + 1);
        for (block, raw) in (first..).zip(bytes.chunks(self.block_bytes)) {
            outcomes.push(self.encode_block(bench, block, raw, &mut frames)?);
        }
        self.recycle(bytes);
        Ok(Item::Blocks { first, outcomes, frames })
    }

    fn encode_block(&self, bench: &mut Bench, block: u64, raw: &[u8], frames: &mut Vec<u8>) -> Result<Outcome> {
        if is_zero(raw) {
            return Ok(Outcome::Zero);
        }
        let id = self.key.id(raw);
        if let Some(parent) = self.parent.as_ref().filter(|parent| block < parent.blocks())
            && bench.is_as_before(parent, block, id, raw, self.take_over.load(Relaxed))?
        {
            return Ok(Outcome::AsParent(id));
        }
        if let Some(known) = self.dedupe.read().find(&id) {
            return Ok(Outcome::Known(known));
        }
        let start = frames.len();
        frames.resize(start + FRAME_HEADER_BYTES, 0);
        let codec = bench.encoder.encode(raw, frames);
        let payload_crc = crc32c::crc32c(frames.get(start + FRAME_HEADER_BYTES..).unwrap_or_default());
        Ok(Outcome::Frame(Encoded { bytes: start..frames.len(), codec, id, payload_crc }))
    }

    fn recycle(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut queue = self.queue.lock();
        if (queue.spare.len() as u64) < 2 * self.in_flight_max {
            queue.spare.push(buffer);
        }
    }

    /// Takes a result and, unless another thread is at it, applies all that are next in order.
    fn finish(&self, number: u64, item: Result<Item>) {
        let mut queue = self.queue.lock();
        match item {
            Ok(item) => {
                queue.ready.insert(number, item);
            }
            Err(e) => self.fail(&mut queue, e),
        }
        if queue.applying {
            return;
        }
        queue.applying = true;
        loop {
            let next = queue.applied;
            let Some(item) = queue.ready.remove(&next).filter(|_| !queue.failed) else { break };
            drop(queue);
            let done = match self.appender.lock().as_mut() {
                Some(appender) => appender.apply(item, &self.dedupe),
                None => Ok(Vec::new()),
            };
            let done = done.map(|buffer| self.recycle(buffer));
            queue = self.queue.lock();
            match done {
                Ok(()) => queue.applied += 1,
                Err(e) => self.fail(&mut queue, e),
            }
            self.room.notify_all();
        }
        queue.applying = false;
    }

    fn fail(&self, queue: &mut Queue, e: Error) {
        if !queue.failed {
            queue.failed = true;
            queue.failure = Some(e);
        }
        queue.ready.clear();
        self.room.notify_all();
    }
}

/// A thread that panics must not leave the others waiting for its result.
struct FailOnPanic<'a>(&'a Shared);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = Error::Refused { path: "native layer".into(), what: "an encoding thread panicked".into() };
            self.0.fail(&mut self.0.queue.lock(), error);
        }
    }
}

/// Whether a block is all zeros; most blocks that are not say so in their first bytes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|piece| piece.iter().fold(0, |seen, byte| seen | byte) == 0)
}
