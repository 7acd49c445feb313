//! Opens a disk's source beside everything else, again and again while it is away.
//!
//! Invariants
//! - Nothing waits for it longer than it chooses to: neither the start of a door nor its end.
//! - A chain is handed out once, and only one that is the chain the session was started on.
//! - Between two attempts there is a pause that grows, and never ends the trying: a source may be away for days.
//!
//! Not here: what reads do meanwhile (`Disk`), who looks for the outcome (`watch`).

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_vdisk::{BlockCache, Chain};
use parking_lot::{Condvar, Mutex};

use super::{DiskSpec, Error, Result, disks::chain_of, serve::ConnectNbd};

/// First and longest pause between two attempts.
const PAUSE: Range<Duration> = Duration::from_millis(200)..Duration::from_secs(10);

/// A source on its way.
#[derive(Debug)]
pub(super) struct Opening {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    chain: Option<Arc<Chain>>,
    /// Why the last attempt failed, until somebody takes it, and in words for whoever asks.
    failed: Option<Error>,
    words: Option<String>,
    stop: bool,
}

impl Opening {
    /// Begins to open the source of `disk`.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn begin(disk: DiskSpec, cache: Arc<BlockCache>, connect: ConnectNbd) -> Result<Self> {
        let shared = Arc::new(Shared { inner: Mutex::default(), changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("source".into());
        // Never joined: an attempt may hang in the source for as long as that likes.
        let started = thread.spawn(move || theirs.run(&disk, &cache, connect));
        started.map_err(|e| Error::io(std::path::Path::new("source"), "start a thread", e))?;
        Ok(Self { shared })
    }

    /// What the first attempt came to; `None` while it is not known after `limit`.
    pub(super) fn first(&self, limit: Duration) -> Option<Result<Arc<Chain>>> {
        let until = Instant::now() + limit;
        let mut inner = self.shared.inner.lock();
        while inner.chain.is_none() && inner.failed.is_none() {
            if self.shared.changed.wait_until(&mut inner, until).timed_out() {
                return None;
            }
        }
        inner.chain.take().map(Ok).or_else(|| inner.failed.take().map(Err))
    }

    /// The chain, once, when it is there.
    pub(super) fn take(&self) -> Option<Arc<Chain>> {
        self.shared.inner.lock().chain.take()
    }

    /// Why it is not there yet.
    pub(super) fn why(&self) -> String {
        let words = self.shared.inner.lock().words.clone();
        words.unwrap_or_else(|| "it does not answer".to_owned())
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.shared.inner.lock().stop = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn run(&self, disk: &DiskSpec, cache: &Arc<BlockCache>, connect: ConnectNbd) {
        let mut pause = PAUSE.start;
        loop {
            let outcome = chain_of(disk, cache, connect);
            let mut inner = self.inner.lock();
            match outcome {
                Ok(chain) => inner.chain = Some(chain),
                Err(error) => {
                    inner.words = Some(error.to_string());
                    inner.failed = Some(error);
                }
            }
            self.changed.notify_all();
            if inner.chain.is_some() {
                return;
            }
            let until = Instant::now() + pause;
            while !inner.stop && !self.changed.wait_until(&mut inner, until).timed_out() {}
            if inner.stop {
                return;
            }
            pause = (pause * 2).min(PAUSE.end);
        }
    }
}
