//! Where the answers of one connection leave, whoever has them ready.
//!
//! Invariants
//! - Messages leave whole and one after the other; their order is the order of [`Outlet::send`] and
//!   [`Outlet::post`] calls of one thread, and nothing more (NBD answers in any order).
//! - [`Outlet::post`] never waits for the peer: what the socket does not take stays here, for a thread that
//!   is started when first needed. A pool thread is never held by a client that does not read.
//! - What is kept is bounded by the connection's flight: each message holds its [`Permit`] until it has left.
//! - After a failed send the outlet drops all that is posted; the connection is over.
//!
//! Lock order: `wire` before `backlog`; neither is held across the other's waits, except that the sender of
//! the moment holds `wire` while the peer takes its time.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

use super::flight::Permit;
use crate::nbd::link::{Sender, Socket};

/// How long a peer may take nothing before its connection is ended.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The sending side of a connection.
#[derive(Debug)]
pub(super) struct Outlet {
    socket: Arc<Socket>,
    wire: Mutex<Wire>,
    backlog: Mutex<Backlog>,
    more: Condvar,
    failed: AtomicBool,
}

#[derive(Debug)]
struct Wire {
    sender: Sender,
    /// Permits of messages that are partly out or queued in the sender.
    permits: Vec<Permit>,
}

#[derive(Debug, Default)]
struct Backlog {
    messages: VecDeque<(Vec<u8>, Option<Permit>)>,
    /// The wire holds bytes that the socket did not take.
    stalled: bool,
    has_thread: bool,
    closed: bool,
}

impl Outlet {
    pub(super) fn new(socket: Arc<Socket>, sender: Sender) -> Self {
        Self {
            socket,
            wire: Mutex::new(Wire { sender, permits: Vec::new() }),
            backlog: Mutex::default(),
            more: Condvar::new(),
            failed: AtomicBool::new(false),
        }
    }

    /// Sends from the connection's own thread; waits for the peer.
    ///
    /// # Errors
    /// What the socket says; `TimedOut` where the peer took nothing for [`PATIENCE`].
    pub(super) fn send(self: &Arc<Self>, bytes: &[u8]) -> io::Result<()> {
        if self.has_failed() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut wire = self.wire.lock();
        let done = wire.sender.send(bytes, PATIENCE);
        wire.permits.clear();
        drop(wire);
        self.note(&done);
        self.drain();
        done
    }

    /// Hands over the first `len` bytes of `buf`, without waiting for the peer. The buffer comes back where
    /// it was not needed for longer.
    pub(super) fn post(self: &Arc<Self>, buf: &mut Vec<u8>, len: usize, permit: Option<Permit>) {
        if self.has_failed() {
            return;
        }
        if let Some(mut wire) = self.wire.try_lock()
            && self.backlog.lock().messages.is_empty()
        {
            match wire.sender.offer_from(buf, len) {
                Ok(true) => {}
                Ok(false) => {
                    wire.permits.extend(permit);
                    self.stall();
                }
                Err(e) => self.note(&Err(e)),
            }
            drop(wire);
            return self.drain();
        }
        let mut message = std::mem::take(buf);
        message.truncate(len);
        self.backlog.lock().messages.push_back((message, permit));
        self.drain();
    }

    /// Whether a send failed: the connection is over.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Ends the connection: an answer cannot be given.
    pub(super) fn fail(&self) {
        self.note(&Err(io::ErrorKind::Other.into()));
    }

    /// No more messages: the thread of the backlog ends once it is empty.
    pub(super) fn close(&self) {
        self.backlog.lock().closed = true;
        self.more.notify_all();
    }

    /// Moves what was posted meanwhile to the wire. Whoever finds the wire taken may leave: its holder comes
    /// by here after letting go.
    fn drain(self: &Arc<Self>) {
        while !self.has_failed() && !self.backlog.lock().messages.is_empty() {
            let Some(mut wire) = self.wire.try_lock() else { return };
            loop {
                let Some((mut message, permit)) = self.backlog.lock().messages.pop_front() else { break };
                let len = message.len();
                match wire.sender.offer_from(&mut message, len) {
                    Ok(true) => {}
                    Ok(false) => wire.permits.extend(permit),
                    Err(e) => return self.note(&Err(e)),
                }
            }
            if wire.sender.is_stalled() {
                self.stall();
            }
        }
    }

    /// Has the backlog's thread wait for the socket.
    fn stall(self: &Arc<Self>) {
        let mut backlog = self.backlog.lock();
        backlog.stalled = true;
        if backlog.has_thread {
            self.more.notify_one();
            return;
        }
        let outlet = Arc::clone(self);
        backlog.has_thread = true;
        let started = thread::Builder::new().name("nbd-send".into()).spawn(move || outlet.run());
        if let Err(e) = started {
            backlog.has_thread = false;
            drop(backlog);
            self.note(&Err(e));
        }
    }

    fn run(self: Arc<Self>) {
        loop {
            let mut backlog = self.backlog.lock();
            while !backlog.stalled && !backlog.closed {
                self.more.wait(&mut backlog);
            }
            let last = !backlog.stalled;
            backlog.stalled = false;
            drop(backlog);
            if last || self.has_failed() {
                return;
            }
            let mut wire = self.wire.lock();
            let done = wire.sender.pump(Some(PATIENCE)).map(drop);
            wire.permits.clear();
            drop(wire);
            self.note(&done);
            self.drain();
        }
    }

    fn note(&self, done: &io::Result<()>) {
        if done.is_err() && !self.failed.swap(true, Ordering::Relaxed) {
            self.socket.close();
            self.backlog.lock().messages.clear();
            self.more.notify_all();
        }
    }
}
