//! One connection in transmission: takes requests, answers what is ready, hands off what may wait.
//!
//! Invariants
//! - All requests that one receive brought are looked at before answers leave, and all ready answers leave in
//!   one send, of at most [`BATCH_REQUESTS`] requests or [`BATCH_BYTES`].
//! - The batch leaves before this thread does anything slow: waiting for a payload, for room, for requests.
//! - A request that is refused still has its payload taken off the stream.
//! - Once the server stops every further request is answered with `ESHUTDOWN`.
//!
//! Not here: legality (`request`), what slow requests do (`work`), sockets (`link`).

use std::{
    fmt, io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use aquifer_vdisk::{Disk, Readahead};

use super::{
    Hub,
    flight::{Flight, Permit},
    outlet::Outlet,
    pool::{LaneId, Pool, is_of_whole_blocks},
    status, work,
};
use crate::{
    errno::Errno,
    nbd::{
        export::Export,
        link::{Receiver, Wait},
        negotiate::{Context, Mode},
        reply::{self, DataHead},
        request::{DRAIN_MAX, Request, Rules},
        wire::{command as cmd, command_flag as flag},
    },
};

/// Bytes taken from the socket at once.
const INPUT_LEN: usize = 64 << 10;
/// Answers in one send.
const BATCH_REQUESTS: u32 = 64;
/// Bytes in one send, after which it leaves.
const BATCH_BYTES: usize = 256 << 10;
/// Longest READ answered in place; longer ones are split and decoded beside each other.
pub(super) const READ_INLINE_MAX: u64 = 256 << 10;
/// Longest READ that is decoded in place, where it is the only one.
const DECODE_INLINE_MAX: u64 = 64 << 10;
/// Longest WRITE done in place.
const WRITE_INLINE_MAX: u64 = 1 << 20;
/// How long to look for the next request before sleeping.
const SPIN: Duration = Duration::from_micros(30);
/// A client that came back within this is worth looking out for.
const SPIN_GAP: Duration = Duration::from_micros(100);
/// How long answers may wait for the rest of a batch of writes.
const BATCH_AGE: Duration = Duration::from_micros(50);

/// What the thread of a connection and the pools share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) hub: Arc<Hub>,
    /// Where the disk's writes of whole blocks wait that pay for themselves.
    pub(super) large: Arc<Pool>,
    pub(super) export: Arc<Export>,
    pub(super) contexts: Vec<Context>,
    pub(super) rules: Rules,
    pub(super) outlet: Arc<Outlet>,
    pub(super) flight: Arc<Flight>,
    pub(super) lane: LaneId,
}

impl Shared {
    pub(super) fn disk(&self) -> &Disk {
        &self.export.disk
    }

    pub(super) fn mode(&self) -> Mode {
        self.rules.mode
    }

    /// Whether waiting for anything of this connection is in vain.
    fn is_over(&self) -> bool {
        self.outlet.has_failed() || self.hub.is_forced()
    }
}

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// As it should: by request, or between requests.
    Orderly,
    /// The client broke the protocol.
    Protocol(&'static str),
    /// The socket failed.
    Socket(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Orderly => f.write_str("orderly"),
            Self::Protocol(why) => f.write_str(why),
            Self::Socket(error) => error.fmt(f),
        }
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

/// The thread's own part.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    receiver: Receiver,
    input: Input,
    batch: Batch,
    payload: Vec<u8>,
    gap: Duration,
    readahead: Readahead,
}

/// Bytes received and not yet used.
#[derive(Debug)]
struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Answers that have not left yet.
#[derive(Debug)]
struct Batch {
    bytes: Box<[u8]>,
    used: usize,
    requests: u32,
    since: Instant,
    /// Where headers are put together.
    head: Vec<u8>,
}

impl Input {
    fn ready(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    fn skip(&mut self, len: usize) {
        self.start = self.end.min(self.start + len);
    }

    /// Makes room behind what is ready.
    fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }
}

impl Batch {
    /// Room for a READ's answer: its header is put, and the place for its data is returned.
    fn data(&mut self, mode: Mode, head: DataHead) -> Option<&mut [u8]> {
        self.head.clear();
        reply::put_data(&mut self.head, mode, head);
        let start = self.used + self.head.len();
        let end = start.checked_add(usize::try_from(head.len).ok()?)?;
        self.bytes.get_mut(self.used..start)?.copy_from_slice(&self.head);
        self.bytes.get_mut(start..end)
    }

    /// Counts in an answer of `len` bytes that was put in place.
    fn keep(&mut self, len: usize) {
        if self.requests == 0 {
            self.since = Instant::now();
        }
        self.used += len;
        self.requests += 1;
    }

    /// An answer without data.
    fn small(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        self.head.clear();
        put(&mut self.head);
        let len = self.head.len();
        if let Some(place) = self.bytes.get_mut(self.used..self.used + len) {
            place.copy_from_slice(&self.head);
            self.keep(len);
        }
    }

    fn is_full(&self) -> bool {
        self.requests >= BATCH_REQUESTS || self.used >= BATCH_BYTES
    }
}

impl Connection {
    /// `rest` is what was received behind the handshake.
    pub(super) fn new(shared: Arc<Shared>, receiver: Receiver, rest: &[u8]) -> Self {
        let mut bytes = vec![0; INPUT_LEN.max(rest.len())].into_boxed_slice();
        if let Some(front) = bytes.get_mut(..rest.len()) {
            front.copy_from_slice(rest);
        }
        // Room for a batch that is almost full, and the longest answer put in place.
        let arena = vec![0; BATCH_BYTES + usize::try_from(READ_INLINE_MAX).unwrap_or(0) + 4096];
        Self {
            shared,
            receiver,
            input: Input { bytes, start: 0, end: rest.len() },
            batch: Batch {
                bytes: arena.into_boxed_slice(),
                used: 0,
                requests: 0,
                since: Instant::now(),
                head: Vec::with_capacity(64),
            },
            payload: Vec::new(),
            gap: Duration::MAX,
            readahead: Readahead::default(),
        }
    }

    /// Serves until the connection ends, and waits for what is in the air.
    pub(super) fn run(mut self) -> End {
        let end = loop {
            if let Err(end) = self.turn() {
                break end;
            }
        };
        if !matches!(end, End::Orderly) {
            drop(self.send_batch());
        }
        if matches!(end, End::Socket(_)) {
            self.shared.hub.cancel(self.shared.lane);
        }
        let shared = Arc::clone(&self.shared);
        self.shared.flight.wait_until_empty(None, || shared.is_over());
        self.shared.hub.cancel(self.shared.lane);
        self.shared.outlet.close();
        end
    }

    /// All requests that are there, then the answers, then the wait for more.
    fn turn(&mut self) -> Result<(), End> {
        let mode = self.shared.mode();
        loop {
            match Request::parse(self.input.ready(), mode) {
                Err(_) => return Err(End::Protocol("request without its magic")),
                Ok(None) => break,
                Ok(Some(request)) => {
                    self.input.skip(Request::header_len(mode));
                    self.take(request)?;
                    if self.batch.is_full() {
                        self.send_batch()?;
                    }
                }
            }
        }
        self.send_batch()?;
        self.fill()
    }

    fn send_batch(&mut self) -> io::Result<()> {
        if self.batch.used > 0 {
            let bytes = self.batch.bytes.get(..self.batch.used).unwrap_or_default();
            self.shared.hub.stats.requests.fetch_add(u64::from(self.batch.requests), Ordering::Relaxed);
            self.batch.used = 0;
            self.batch.requests = 0;
            self.shared.outlet.send(bytes)?;
        }
        Ok(())
    }

    /// Waits for more bytes: awake for a moment if the client is quick and a processor is free, then asleep.
    fn fill(&mut self) -> Result<(), End> {
        let began = Instant::now();
        let at_start = self.input.start == self.input.end;
        let room = self.input.room();
        let mut got = None;
        let spin = self.gap < SPIN_GAP && !self.receiver.is_tls() && self.shared.hub.may_spin();
        if spin && self.shared.flight.is_empty() {
            while got.is_none() && began.elapsed() < SPIN {
                match self.receiver.recv(room, Wait::Not) {
                    Ok(n) => got = Some(n),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => rustix::thread::sched_yield(),
                    Err(e) => return Err(e.into()),
                }
            }
        }
        let n = match got {
            Some(n) => n,
            None => self.receiver.recv(room, Wait::Forever)?,
        };
        self.gap = began.elapsed();
        self.input.end += n;
        match n {
            0 if at_start => Err(End::Orderly),
            0 => Err(End::Protocol("connection ended inside a request")),
            _ => Ok(()),
        }
    }

    fn take(&mut self, request: Request) -> Result<(), End> {
        if request.command == cmd::DISC {
            self.send_batch()?;
            return Err(End::Orderly);
        }
        let verdict =
            if self.shared.hub.is_stopping() { Err(Errno::Shutdown) } else { request.validate(&self.shared.rules) };
        if let Err(errno) = verdict {
            self.drain(request.payload_len(self.shared.mode()), errno, &request)?;
            self.refuse(&request, errno);
            return Ok(());
        }
        match request.command {
            cmd::READ => self.read(&request),
            cmd::WRITE => self.write(&request),
            cmd::BLOCK_STATUS => self.status(&request),
            cmd::FLUSH if !self.shared.rules.writable => {
                self.done(&request);
                Ok(())
            }
            _ => {
                let permit = self.begin(0)?;
                self.hand_off(permit, request);
                Ok(())
            }
        }
    }

    fn refuse(&mut self, request: &Request, errno: Errno) {
        let mode = self.shared.mode();
        self.shared.hub.stats.refused.fetch_add(1, Ordering::Relaxed);
        self.batch.small(|out| reply::put_error(out, mode, (request.cookie, request.offset), errno));
    }

    fn done(&mut self, request: &Request) {
        let mode = self.shared.mode();
        self.batch.small(|out| reply::put_done(out, mode, request.cookie, request.offset));
    }

    /// Counts a request of `bytes` in, with the batch sent first if that has to wait.
    fn begin(&mut self, bytes: u64) -> Result<Permit, End> {
        if !self.shared.flight.has_room(bytes) {
            self.send_batch()?;
        }
        let shared = Arc::clone(&self.shared);
        let over = || shared.is_over() || shared.hub.is_stopping();
        self.shared.flight.begin(bytes, over).ok_or(End::Orderly)
    }

    fn read(&mut self, request: &Request) -> Result<(), End> {
        let Request { offset, len, .. } = *request;
        if len == 0 {
            self.done(request);
            return Ok(());
        }
        // Only for a client that waits for each answer: others keep the decoders busy themselves.
        // A flush does not count: behind it a read would go to threads that others' reads keep busy.
        let alone = self.batch.requests == 0 && self.shared.flight.has_no_data();
        let ahead = self.readahead.after(offset, len).filter(|_| alone);
        // Nobody waits behind it, so a decode here is quicker than a way to another thread and back.
        let decode = alone && len <= DECODE_INLINE_MAX && self.input.ready().is_empty();
        self.read_here_or_there(request, decode)?;
        if let Some(range) = ahead {
            self.send_batch()?;
            work::submit_ahead(&self.shared, range);
        }
        Ok(())
    }

    fn read_here_or_there(&mut self, request: &Request, decode: bool) -> Result<(), End> {
        let mode = self.shared.mode();
        let Request { cookie, offset, len, .. } = *request;
        if len <= READ_INLINE_MAX {
            let head = DataHead { cookie, request: offset, offset, len, done: true };
            let data = self.batch.data(mode, head).ok_or(End::Protocol("answer does not fit"))?;
            let total = data.len() + reply::data_header_len(mode);
            let disk = &self.shared.export.disk;
            let read = if decode { disk.read_soon(offset, data) } else { disk.read_now(offset, data) };
            match read {
                Ok(true) => {
                    self.batch.keep(total);
                    self.shared.hub.stats.bytes_read.fetch_add(len, Ordering::Relaxed);
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => {
                    let errno = work::report(&self.shared, "read", request, &error);
                    self.refuse(request, errno);
                    return Ok(());
                }
            }
        }
        let permit = self.begin(len)?;
        work::submit_read(&self.shared, *request, permit);
        Ok(())
    }

    /// Whole blocks are taken in place: that is memory and journal work. What may read the source, or is to
    /// be durable at once, is handed off.
    fn write(&mut self, request: &Request) -> Result<(), End> {
        let Request { offset, len, .. } = *request;
        let waits = request.has(flag::FUA) || self.shared.disk().pays(len);
        if is_of_whole_blocks(offset, len) && len <= WRITE_INLINE_MAX && !waits {
            let mut payload = std::mem::take(&mut self.payload);
            let outcome = self.write_here(request, &mut payload);
            self.payload = payload;
            return outcome;
        }
        let permit = self.begin(len)?;
        let mut payload = vec![0; usize::try_from(len).unwrap_or(0)];
        self.receive(&mut payload)?;
        work::submit_write(&self.shared, *request, payload, permit);
        Ok(())
    }

    fn write_here(&mut self, request: &Request, payload: &mut Vec<u8>) -> Result<(), End> {
        let len = usize::try_from(request.len).unwrap_or(0);
        let done = if let Some(bytes) = self.input.ready().get(..len) {
            let done = self.shared.disk().write(request.offset, bytes);
            self.input.skip(len);
            done
        } else {
            if payload.len() < len {
                payload.resize(len, 0);
            }
            let bytes = payload.get_mut(..len).unwrap_or_default();
            self.receive(bytes)?;
            self.shared.disk().write(request.offset, bytes)
        };
        match done {
            Ok(()) => {
                self.shared.hub.stats.bytes_written.fetch_add(request.len, Ordering::Relaxed);
                self.done(request);
            }
            Err(error) => {
                let errno = work::report(&self.shared, "write", request, &error);
                self.refuse(request, errno);
            }
        }
        if self.batch.since.elapsed() > BATCH_AGE {
            self.send_batch()?;
        }
        Ok(())
    }

    fn status(&mut self, request: &Request) -> Result<(), End> {
        let mut request = *request;
        let mut ids = None;
        if request.has(flag::PAYLOAD_LEN) {
            let most = 8 + 4 * self.shared.contexts.len() as u64;
            if request.len > most {
                self.drain(request.len, Errno::Invalid, &request)?;
                self.refuse(&request, Errno::Invalid);
                return Ok(());
            }
            let mut payload = vec![0; usize::try_from(request.len).unwrap_or(0)];
            self.receive(&mut payload)?;
            match work::status_filter(&self.shared, &payload) {
                Some((len, chosen)) if request.offset.checked_add(len).is_some_and(|e| e <= self.shared.rules.size) => {
                    request.len = len;
                    ids = Some(chosen);
                }
                _ => {
                    self.refuse(&request, Errno::Invalid);
                    return Ok(());
                }
            }
        }
        let contexts = ids.as_deref().unwrap_or(&self.shared.contexts);
        if let Some(answer) = status::answer_now(&self.shared.export, contexts, &request, self.shared.mode()) {
            self.batch.small(|out| out.extend_from_slice(&answer));
            return Ok(());
        }
        let permit = self.begin(0)?;
        work::submit_status(&self.shared, request, ids, permit);
        Ok(())
    }

    fn hand_off(&self, permit: Permit, request: Request) {
        work::submit_other(&self.shared, request, permit);
    }

    /// Fills `buf` from the stream; the batch leaves first if the client has to send more.
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), End> {
        let ready = self.input.ready();
        let n = ready.len().min(buf.len());
        let (front, mut rest) = buf.split_at_mut(n);
        front.copy_from_slice(ready.get(..n).unwrap_or_default());
        self.input.skip(n);
        if !rest.is_empty() {
            self.send_batch()?;
        }
        while !rest.is_empty() {
            let n = self.receiver.recv(rest, Wait::Forever)?;
            if n == 0 {
                return Err(End::Protocol("connection ended inside a payload"));
            }
            rest = rest.get_mut(n..).unwrap_or_default();
        }
        Ok(())
    }

    /// Takes a payload off the stream unseen. One that is far too long ends the connection, with the refusal sent.
    fn drain(&mut self, len: u64, errno: Errno, request: &Request) -> Result<(), End> {
        if len > DRAIN_MAX {
            self.refuse(request, errno);
            self.send_batch()?;
            return Err(End::Protocol("payload far beyond the limit"));
        }
        let mut left = usize::try_from(len).unwrap_or(0);
        let mut sink = vec![0; left.min(INPUT_LEN)];
        while left > 0 {
            let n = left.min(sink.len());
            self.receive(sink.get_mut(..n).unwrap_or_default())?;
            left -= n;
        }
        Ok(())
    }
}
