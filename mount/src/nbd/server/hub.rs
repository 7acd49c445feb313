//! What all connections of a server share: the catalogue, pools, counts, the register of sockets, the stop.
//!
//! Invariants
//! - A connection is in the register from before its thread starts until its thread ends.
//! - `stopping` is set once and never cleared; `forced` likewise, and after it.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use aquifer_vdisk::Disk;
use parking_lot::{Condvar, Mutex};

use super::{
    Limits, Stats,
    connection::{Connection, End, Shared},
    flight::Flight,
    outlet::Outlet,
    pool::{LaneId, Pool},
};
use crate::nbd::{
    ServerTls,
    link::{self, Receiver, Sender, Socket, Wait},
    negotiate::{Agreed, Catalogue, Negotiation, Outcome, TlsState},
    request::Rules,
};

/// Threads that may sync at once.
const SYNC_THREADS: usize = 16;
/// Threads that may wait for a slow source at once.
const SLOW_THREADS: usize = 64;
/// Bytes of the handshake kept before they make an option.
const HELLO_LEN: usize = 4096;

/// Counters; see [`Stats`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) accepted: AtomicU64,
    pub(super) turned_away: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) panics: AtomicU64,
}

/// The shared part of a server.
#[derive(Debug)]
pub(super) struct Hub {
    catalogue: Catalogue,
    limits: Limits,
    tls: Option<ServerTls>,
    pub(super) slow: Pool,
    /// Large writes that pay for themselves, a pool for each disk, by its address: in a pool for all of them those of one
    /// disk would be the ones that wait.
    large: Mutex<HashMap<usize, Arc<Pool>>>,
    pub(super) sync: Pool,
    pub(super) stats: Counters,
    pub(super) stopping: AtomicBool,
    forced: AtomicBool,
    /// Connections in transmission.
    active: AtomicUsize,
    cores: usize,
    register: Mutex<Register>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct Register {
    next: u64,
    open: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    socket: Arc<Socket>,
    shaking_hands: bool,
}

impl Hub {
    pub(super) fn new(catalogue: Catalogue, limits: Limits, tls: Option<ServerTls>) -> Arc<Self> {
        Arc::new(Self {
            catalogue,
            limits,
            tls,
            slow: Pool::new("nbd-slow", limits.workers, SLOW_THREADS.max(limits.workers)),
            large: Mutex::default(),
            // All that want a flush wait together: the overlay gives those that came meanwhile one sync.
            sync: Pool::new("nbd-sync", SYNC_THREADS, SYNC_THREADS),
            stats: Counters::default(),
            stopping: AtomicBool::new(false),
            forced: AtomicBool::new(false),
            active: AtomicUsize::new(0),
            cores: thread::available_parallelism().map_or(1, usize::from),
            register: Mutex::default(),
            left: Condvar::new(),
        })
    }

    pub(super) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Whether connections are being cut off.
    pub(super) fn is_forced(&self) -> bool {
        self.forced.load(Ordering::Relaxed)
    }

    /// Whether a connection may look for requests awake: only while processors are left over.
    pub(super) fn may_spin(&self) -> bool {
        self.active.load(Ordering::Relaxed) <= self.cores / 2
    }

    /// Where large writes wait to `disk`, which is in the catalogue: its address is nobody else's.
    fn large(&self, disk: &Arc<Disk>) -> Arc<Pool> {
        let mut large = self.large.lock();
        let pool = large.entry(Arc::as_ptr(disk).addr());
        Arc::clone(pool.or_insert_with(|| Arc::new(Pool::for_large_writes("nbd-large"))))
    }

    fn for_each_pool(&self, mut what: impl FnMut(&Pool)) {
        let large: Vec<_> = self.large.lock().values().cloned().collect();
        [&self.slow, &self.sync].into_iter().chain(large.iter().map(|pool| &**pool)).for_each(&mut what);
    }

    /// Drops the queued work of a connection.
    pub(super) fn cancel(&self, lane: LaneId) {
        self.for_each_pool(|pool| pool.cancel(lane));
    }

    pub(super) fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut panics = get(&self.stats.panics);
        self.for_each_pool(|pool| panics += pool.panics());
        Stats {
            accepted: get(&self.stats.accepted),
            turned_away: get(&self.stats.turned_away),
            open: self.register.lock().open.len() as u64,
            requests: get(&self.stats.requests),
            refused: get(&self.stats.refused),
            errors: get(&self.stats.errors),
            bytes_read: get(&self.stats.bytes_read),
            bytes_written: get(&self.stats.bytes_written),
            panics,
        }
    }

    /// Takes in a new connection, or turns it away.
    pub(super) fn admit(self: &Arc<Self>, fd: std::os::fd::OwnedFd) {
        let socket = Arc::new(Socket::new(fd));
        let Some(id) = self.enter(&socket) else { return };
        let hub = Arc::clone(self);
        let thread = thread::Builder::new().name(format!("nbd-{id}")).spawn(move || {
            if catch_unwind(AssertUnwindSafe(|| hub.serve(id, socket))).is_err() {
                hub.stats.panics.fetch_add(1, Ordering::Relaxed);
            }
            hub.leave(id);
        });
        if thread.is_err() {
            self.leave(id);
        }
    }

    fn enter(&self, socket: &Arc<Socket>) -> Option<u64> {
        let mut register = self.register.lock();
        self.stats.accepted.fetch_add(1, Ordering::Relaxed);
        if self.is_stopping() {
            return None;
        }
        if register.open.len() >= self.limits.connections {
            self.stats.turned_away.fetch_add(1, Ordering::Relaxed);
            let oldest = register.open.iter().filter(|(_, entry)| entry.shaking_hands).map(|(id, _)| *id).min();
            let evicted = oldest.and_then(|id| register.open.remove(&id))?;
            evicted.socket.close();
        }
        let id = register.next;
        register.next += 1;
        register.open.insert(id, Entry { socket: Arc::clone(socket), shaking_hands: true });
        Some(id)
    }

    /// Notes that a connection has shaken hands, unless it has had to make way.
    fn take_in(&self, id: u64) -> Result<(), End> {
        let mut register = self.register.lock();
        let entry = register.open.get_mut(&id).ok_or(End::Protocol("made way for another connection"))?;
        entry.shaking_hands = false;
        Ok(())
    }

    fn leave(&self, id: u64) {
        let gone = self.register.lock().open.remove(&id);
        if let Some(entry) = gone {
            entry.socket.close();
        }
        self.left.notify_all();
    }

    /// The life of a connection.
    fn serve(self: &Arc<Self>, id: u64, socket: Arc<Socket>) {
        let (mut receiver, mut sender) = link::halves(Arc::clone(&socket));
        let (agreed, rest) = match self.negotiate(id, &mut receiver, &mut sender) {
            Ok(done) => done,
            Err(why) => return tracing::debug!(id, %why, "handshake ended"),
        };
        let rules = Rules {
            size: agreed.export.disk.size(),
            writable: agreed.export.is_writable(),
            mode: agreed.mode,
            contexts: agreed.contexts.len(),
        };
        let shared = Shared {
            hub: Arc::clone(self),
            large: self.large(&agreed.export.disk),
            export: agreed.export,
            contexts: agreed.contexts,
            rules,
            outlet: Arc::new(Outlet::new(socket, sender)),
            flight: Arc::new(Flight::default()),
            lane: LaneId(id),
        };
        self.active.fetch_add(1, Ordering::Relaxed);
        let _active = Leave(&self.active);
        let end = Connection::new(Arc::new(shared), receiver, &rest).run();
        tracing::debug!(id, %end, "connection ended");
    }

    /// Shakes hands until the deadline; what was agreed, and what was received behind it.
    fn negotiate(&self, id: u64, receiver: &mut Receiver, sender: &mut Sender) -> Result<(Agreed, Vec<u8>), End> {
        let deadline = Instant::now() + self.limits.handshake;
        let tls = if self.has_tls() { TlsState::Required } else { TlsState::Off };
        let mut negotiation = Negotiation::new(Arc::clone(&self.catalogue), tls);
        let (mut input, mut out) = (Vec::new(), Vec::new());
        negotiation.greeting(&mut out);
        loop {
            let (used, outcome) = negotiation.advance(&input, &mut out);
            input.drain(..used);
            if matches!(outcome, Outcome::Begin(_)) {
                // Before the client is told: from that word on it makes way for nobody.
                self.take_in(id)?;
            }
            if !out.is_empty() {
                sender.send_until(&out, deadline)?;
                out.clear();
            }
            match outcome {
                Outcome::More if used > 0 => {}
                Outcome::More => {
                    let mut bytes = [0; HELLO_LEN];
                    let n = receiver.recv(&mut bytes, Wait::Until(deadline))?;
                    if n == 0 {
                        return Err(End::Orderly);
                    }
                    input.extend(bytes.iter().take(n));
                }
                Outcome::StartTls => {
                    // What was sent in the clear behind the request could pretend to have come under TLS.
                    if !input.is_empty() {
                        return Err(End::Protocol("bytes behind the request for TLS"));
                    }
                    self.begin_tls(receiver, sender, deadline)?;
                    negotiation.tls_began();
                }
                Outcome::Begin(agreed) => return Ok((agreed, input)),
                Outcome::End(why) => return Err(End::Protocol(why)),
            }
        }
    }

    fn begin_tls(&self, receiver: &mut Receiver, sender: &mut Sender, deadline: Instant) -> Result<(), End> {
        let Some(tls) = &self.tls else { return Err(End::Protocol("TLS is not set up")) };
        let session = rustls::ServerConnection::new(Arc::clone(&tls.config));
        let session = session.map_err(|_| End::Protocol("TLS could not begin"))?;
        link::begin_tls(receiver, sender, session.into(), deadline)?;
        Ok(())
    }

    /// Ends all connections: politely until `polite`, by force after it, returning at `deadline` at the latest.
    pub(super) fn stop(&self, polite: Instant, deadline: Instant) -> bool {
        self.stopping.store(true, Ordering::Relaxed);
        for entry in self.register.lock().open.values() {
            if entry.shaking_hands { entry.socket.close() } else { entry.socket.stop_receiving() }
        }
        let ended = self.wait_until_left(polite);
        if !ended {
            self.forced.store(true, Ordering::Relaxed);
            for entry in self.register.lock().open.values() {
                entry.socket.close();
            }
            self.wait_until_left(deadline);
        }
        self.for_each_pool(Pool::close);
        ended
    }

    fn wait_until_left(&self, deadline: Instant) -> bool {
        let mut register = self.register.lock();
        while !register.open.is_empty() {
            if self.left.wait_until(&mut register, deadline).timed_out() {
                return register.open.is_empty();
            }
        }
        true
    }
}

/// Counts a connection out of transmission, also by a panic.
struct Leave<'a>(&'a AtomicUsize);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
