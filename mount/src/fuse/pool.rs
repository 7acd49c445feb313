//! Threads for requests that may wait.
//!
//! Invariants
//! - A job that panics ends only itself; its reply, dropped on the way, answers with an error.
//! - The queue is bounded; whoever puts one more waits. The kernel's own limits keep it from filling.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use crossbeam_channel::{Sender, bounded};

/// Waiting jobs beyond which a loop waits with them. `max_background` is a quarter of it.
const QUEUE_MAX: usize = 1024;

type Job = Box<dyn FnOnce(&mut Vec<u8>) + Send>;

/// Threads, each with a buffer of its own that it lends to its jobs.
#[derive(Debug)]
pub(super) struct Pool {
    jobs: Sender<Job>,
    pending: Arc<AtomicUsize>,
}

impl Pool {
    /// `threads` threads called `name`. They end once the pool is dropped and the queue is empty.
    pub(super) fn new(name: &str, threads: usize) -> io::Result<Self> {
        let (jobs, queue) = bounded::<Job>(QUEUE_MAX);
        let pending = Arc::new(AtomicUsize::new(0));
        for index in 0..threads {
            let (queue, pending) = (queue.clone(), pending.clone());
            let work = move || {
                let mut buffer = Vec::new();
                for job in queue {
                    if catch_unwind(AssertUnwindSafe(|| job(&mut buffer))).is_err() {
                        tracing::error!("a request panicked and was answered with an error");
                        buffer = Vec::new();
                    }
                    pending.fetch_sub(1, Ordering::Release);
                }
            };
            std::thread::Builder::new().name(format!("{name}-{index}")).spawn(work)?;
        }
        Ok(Self { jobs, pending })
    }

    /// Hands a job over.
    pub(super) fn run(&self, job: impl FnOnce(&mut Vec<u8>) + Send + 'static) {
        self.pending.fetch_add(1, Ordering::Acquire);
        // The threads live as long as the sender, so this fails only where none was made; the reply
        // inside the job is dropped then, and answers.
        if self.jobs.send(Box::new(job)).is_err() {
            self.pending.fetch_sub(1, Ordering::Release);
        }
    }

    /// Jobs not finished yet.
    pub(super) fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }
}
