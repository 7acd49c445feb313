//! A client of any NBD server: pipelined, over several connections, with reconnection.
//!
//! - [`Client`]: shared by threads; each call is one or several requests, answered when all is there.
//! - [`Queue`]: one connection for one thread with many requests in flight: copiers and benches.
//! - [`NbdLayer`]: an export as a layer of a chain.
//!
//! Invariants
//! - A read succeeds only if every byte was delivered by the server in this read.
//! - After a lost connection requests without a reply are sent again, until [`ClientOptions::reconnect`] has
//!   passed; the server must then still offer the same size and abilities. Between attempts there is a pause that
//!   grows, and a server that breaks the protocol is asked [`VIOLATIONS_MAX`] times at most.
//! - Acknowledged writes that were not flushed when a connection was lost make every later flush fail: nobody
//!   knows whether the server that is there now has them.
//! - Where TLS is asked for nothing else happens before it.
//!
//! Not here: decisions about what to read.

mod channel;
mod covered;
pub mod hello;
pub mod inbox;
mod layer;
mod queue;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use self::{
    channel::{Channel, Ended, IN_FLIGHT_MAX, Loss, Opened, Target},
    hello::{Offer, Purpose, Wish},
    inbox::{Asked, Done},
};
pub use self::{
    layer::NbdLayer,
    queue::{Completion, Queue},
};
use super::{
    Address, Error, Result,
    negotiate::Mode,
    request::Request,
    tls::ClientTls,
    wire::{self, command as cmd, command_flag as flag, transmission},
};

/// Longest single READ or WRITE that is sent, in bytes: long enough to be cheap, short enough to be spread.
const PIECE_MAX: u64 = 2 << 20;
/// Longest question about extents in compact headers, in bytes: a multiple of every block size.
const STATUS_MAX: u64 = 1 << 31;
/// First and longest rest between attempts to connect.
const REST: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// How often a request is sent to a server that breaks the protocol each time.
const VIOLATIONS_MAX: u32 = 4;

/// How to use a server.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Connections at most; more than one only where the server says that a flush covers all.
    pub connections: usize,
    /// Contexts to ask for beside `base:allocation`.
    pub contexts: Vec<String>,
    /// Certificates, for addresses that ask for TLS.
    pub tls: Option<ClientTls>,
    /// From the first packet to the end of the handshake.
    pub connect_timeout: Duration,
    /// How long a server with requests in hand may say nothing before it is taken for gone.
    pub patience: Duration,
    /// How long to try to come back after a connection was lost.
    pub reconnect: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            contexts: Vec::new(),
            tls: None,
            connect_timeout: Duration::from_secs(10),
            patience: Duration::from_secs(60),
            reconnect: Duration::from_secs(30),
        }
    }
}

/// A run of one state in a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Start in bytes.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Bits whose meaning the context defines; see [`wire::state`].
    pub state: u64,
}

/// One export of a server.
#[derive(Debug)]
pub struct Client {
    target: Target,
    offer: Offer,
    reconnect: Duration,
    slots: Vec<Mutex<Option<Arc<Channel>>>>,
    turn: AtomicUsize,
    unflushed: AtomicU64,
    flush_lost: AtomicBool,
}

fn target(address: &Address, options: &ClientOptions, purpose: Purpose) -> Target {
    let mut contexts = vec![wire::CONTEXT_ALLOCATION.to_owned()];
    contexts.extend(options.contexts.iter().cloned());
    Target {
        place: address.place.clone(),
        shown: address.to_string(),
        wish: Wish { export: address.export.clone(), contexts, tls: address.tls, purpose },
        tls: options.tls.clone(),
        connect_timeout: options.connect_timeout,
        patience: options.patience,
    }
}

/// Names and descriptions of a server's exports.
///
/// # Errors
/// Whatever the server or the way to it does.
pub fn list_exports(address: &Address, options: &ClientOptions) -> Result<Vec<(String, String)>> {
    listed(target(address, options, Purpose::ListExports).open())
}

/// Names of an export's contexts.
///
/// # Errors
/// Whatever the server or the way to it does.
pub fn list_contexts(address: &Address, options: &ClientOptions) -> Result<Vec<String>> {
    let list = listed(target(address, options, Purpose::ListContexts).open())?;
    Ok(list.into_iter().map(|(name, _)| name).collect())
}

fn listed(opened: Result<Opened>) -> Result<Vec<(String, String)>> {
    match opened? {
        Opened::List(list) => Ok(list),
        Opened::Channel(_) => Ok(Vec::new()),
    }
}

impl Client {
    /// Connects to the export an address names.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Tls`], [`Error::Refused`] (no such export), [`Error::Protocol`].
    pub fn connect(address: &Address, options: &ClientOptions) -> Result<Self> {
        let target = target(address, options, Purpose::Transmit);
        let first = open(&target)?;
        let offer = first.offer.clone();
        let multi = offer.flags & transmission::CAN_MULTI_CONN != 0;
        let count = if multi { options.connections.max(1) } else { 1 };
        let mut slots: Vec<_> = (0..count).map(|_| Mutex::new(None)).collect();
        if let Some(slot) = slots.first_mut() {
            *slot.get_mut() = Some(Arc::new(first));
        }
        Ok(Self {
            target,
            offer,
            reconnect: options.reconnect,
            slots,
            turn: AtomicUsize::new(0),
            unflushed: AtomicU64::new(0),
            flush_lost: AtomicBool::new(false),
        })
    }

    /// The server's address, as a URI.
    pub fn shown(&self) -> &str {
        &self.target.shown
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.offer.size
    }

    /// What the server offers.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Whether the server takes writes.
    pub fn is_writable(&self) -> bool {
        self.offer.flags & transmission::READ_ONLY == 0
    }

    /// Whether extents of this context can be asked for.
    pub fn has_context(&self, name: &str) -> bool {
        self.offer.contexts.iter().any(|(_, have)| have == name)
    }

    /// A connection of its own with many requests in flight, for one thread.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn queue(self: &Arc<Self>) -> Result<Queue> {
        Ok(Queue::new(Arc::clone(self), self.open_again()?))
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`Error::Impossible`] past the end; [`Error::Remote`]; [`Error::Lost`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.check_range(offset, len)?;
        // Rounded outwards to what the server takes; the size itself need not be a multiple.
        let grain = u64::from(self.offer.block_min);
        let start = offset - offset % grain;
        let end = (offset + len).next_multiple_of(grain).min(self.offer.size);
        let step = PIECE_MAX.min(u64::from(self.offer.block_max)).max(grain);
        let mut flights = Vec::new();
        let mut at = start;
        while at < end {
            let n = step.min(end - at);
            flights.push(self.send(self.plain(cmd::READ, at, n), &[])?);
            at += n;
        }
        for flight in flights {
            let done = self.settle(flight, &[])?;
            let (from, to) = (done.asked.offset.max(offset), (done.asked.offset + done.asked.len).min(offset + len));
            let part = |base: u64| narrow(from - base)..narrow(to - base);
            if let (Some(place), Some(bytes)) = (buf.get_mut(part(offset)), done.asked.buf.get(part(done.asked.offset)))
            {
                place.copy_from_slice(bytes);
            }
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`; durable after the next [`Client::flush`].
    ///
    /// # Errors
    /// [`Error::Impossible`] past the end, unaligned or read-only; [`Error::Remote`]; [`Error::Lost`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_change(offset, bytes.len() as u64, transmission::HAS_FLAGS)?;
        let step = narrow(PIECE_MAX.min(u64::from(self.offer.block_max)));
        let mut at = offset;
        for piece in bytes.chunks(step) {
            let mut request = self.plain(cmd::WRITE, at, piece.len() as u64);
            if self.offer.mode == Mode::Extended {
                request.flags |= flag::PAYLOAD_LEN;
            }
            let flight = self.send(request, piece)?;
            self.settle(flight, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeros; `keep_space` as [`aquifer_vdisk::Zeroing::KeepSpace`].
    ///
    /// # Errors
    /// As [`Client::write`]; [`Error::Impossible`] where the server cannot.
    pub fn write_zeroes(&self, offset: u64, len: u64, zeroing: aquifer_vdisk::Zeroing) -> Result<()> {
        let flags = if zeroing == aquifer_vdisk::Zeroing::KeepSpace { flag::NO_HOLE } else { 0 };
        self.check_change(offset, len, transmission::SEND_WRITE_ZEROES)?;
        self.each_piece(cmd::WRITE_ZEROES, flags, offset, len)
    }

    /// Gives a range back.
    ///
    /// # Errors
    /// As [`Client::write`]; [`Error::Impossible`] where the server cannot.
    pub fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.check_change(offset, len, transmission::SEND_TRIM)?;
        self.each_piece(cmd::TRIM, 0, offset, len)
    }

    /// Makes everything acknowledged before this call durable.
    ///
    /// # Errors
    /// [`Error::FlushLost`]; [`Error::Remote`]; [`Error::Lost`].
    pub fn flush(&self) -> Result<()> {
        let before = self.unflushed.load(Ordering::Acquire);
        if self.offer.flags & transmission::SEND_FLUSH != 0 {
            let flight = self.send(self.plain(cmd::FLUSH, 0, 0), &[])?;
            self.settle(flight, &[])?;
        }
        if self.flush_lost.load(Ordering::Acquire) {
            return Err(Error::FlushLost { place: self.target.shown.clone() });
        }
        self.unflushed.fetch_sub(before, Ordering::AcqRel);
        Ok(())
    }

    /// What the server tells of a range in one context: at least one extent from `offset`, perhaps not all of `len`.
    ///
    /// # Errors
    /// [`Error::Impossible`] where the context was not agreed on, or the range lies outside.
    pub fn status(&self, context: &str, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.check_range(offset, len)?;
        let id = self.offer.contexts.iter().find(|(_, name)| name == context).map(|(id, _)| *id);
        let id = id.ok_or_else(|| self.impossible(format!("the server does not offer {context}")))?;
        let grain = u64::from(self.offer.block_min);
        let start = offset - offset % grain;
        let end = (offset + len).next_multiple_of(grain).min(self.offer.size);
        let most = if self.offer.mode == Mode::Extended { u64::MAX } else { STATUS_MAX };
        let flight = self.send(self.plain(cmd::BLOCK_STATUS, start, (end - start).min(most)), &[])?;
        let done = self.settle(flight, &[])?;
        let mut out = Vec::new();
        let mut at = start;
        for (n, state) in done.status.iter().filter(|(have, _)| *have == id).flat_map(|(_, extents)| extents) {
            let (from, to) = (at.max(offset), (at + n).min(offset + len));
            at += n;
            if from < to {
                out.push(StatusExtent { offset: from, len: to - from, state: *state });
            }
        }
        if out.is_empty() {
            return Err(self.broken("an answer without the context that was asked for"));
        }
        Ok(out)
    }

    /// The ranges of the whole export whose state in `context` has one of the bits of `mask`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn ranges(&self, context: &str, mask: u64) -> Result<aquifer_vdisk::Delta> {
        let mut out = aquifer_vdisk::Delta::new();
        let mut at = 0;
        while at < self.offer.size {
            for extent in self.status(context, at, self.offer.size - at)? {
                at = extent.offset + extent.len;
                if extent.state & mask != 0 {
                    out.insert(extent.offset..at);
                }
            }
        }
        Ok(out)
    }

    /// What a dirty context says has changed.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn dirty(&self, context: &str) -> Result<aquifer_vdisk::Delta> {
        self.ranges(context, u64::from(wire::state::DIRTY))
    }

    fn plain(&self, command: u16, offset: u64, len: u64) -> Request {
        Request { flags: 0, command, cookie: 0, offset, len }
    }

    fn each_piece(&self, command: u16, flags: u16, offset: u64, len: u64) -> Result<()> {
        let most = if self.offer.mode == Mode::Extended { u64::MAX } else { STATUS_MAX };
        let mut at = offset;
        while at < offset + len {
            let n = most.min(offset + len - at);
            let flight = self.send(Request { flags, ..self.plain(command, at, n) }, &[])?;
            self.settle(flight, &[])?;
            at += n;
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.offer.size) {
            return Ok(());
        }
        Err(self.impossible(format!("range {offset}+{len} lies outside {} bytes", self.offer.size)))
    }

    fn check_change(&self, offset: u64, len: u64, need: u16) -> Result<()> {
        self.check_range(offset, len)?;
        let grain = u64::from(self.offer.block_min);
        if !self.is_writable() {
            return Err(self.impossible("the export is read-only".into()));
        }
        if self.offer.flags & need == 0 {
            return Err(self.impossible("the server does not offer this".into()));
        }
        if !offset.is_multiple_of(grain) || !len.is_multiple_of(grain) {
            return Err(self.impossible(format!("{offset}+{len} is no multiple of {grain} bytes")));
        }
        Ok(())
    }

    fn impossible(&self, what: String) -> Error {
        Error::Impossible { place: self.target.shown.clone(), what }
    }

    fn broken(&self, what: &str) -> Error {
        Error::Protocol { place: self.target.shown.clone(), what: what.into() }
    }

    fn lost(&self, why: impl Into<String>) -> Error {
        Error::Lost { place: self.target.shown.clone(), why: why.into() }
    }

    /// Connects once more, and checks that the export is still the one this client knows.
    fn open_again(&self) -> Result<Channel> {
        let channel = open(&self.target)?;
        let (old, new) = (&self.offer, &channel.offer);
        let names = |offer: &Offer| offer.contexts.iter().map(|(_, name)| name.clone()).collect::<Vec<_>>();
        let same = old.size == new.size
            && old.flags & !new.flags & !transmission::READ_ONLY == 0
            && (old.flags ^ new.flags) & transmission::READ_ONLY == 0
            && old.mode == new.mode
            && old.block_min >= new.block_min
            && old.block_max <= new.block_max
            && names(old) == names(new);
        if same { Ok(channel) } else { Err(self.broken("the export came back with another size or other abilities")) }
    }

    /// A live connection: the next in turn that has room, else the next in turn.
    fn channel(&self) -> Result<Arc<Channel>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let count = self.slots.len();
        let slot = self.slots.get(turn % count).ok_or_else(|| self.lost("no connection"))?;
        let mut slot = slot.lock();
        if let Some(channel) = slot.as_ref().filter(|channel| !channel.is_lost()) {
            return Ok(Arc::clone(channel));
        }
        // A first connection in this place may find the server just as gone as a lost one did.
        let first = slot.take().is_none().then(|| self.open_again());
        let channel = Arc::new(match first {
            Some(Ok(channel)) => channel,
            Some(Err(error @ (Error::Protocol { .. } | Error::Tls { .. }))) => return Err(error),
            Some(Err(_)) | None => self.come_back()?,
        });
        *slot = Some(Arc::clone(&channel));
        Ok(channel)
    }

    /// Tries to connect until the time is over.
    fn come_back(&self) -> Result<Channel> {
        if self.unflushed.load(Ordering::Acquire) > 0 {
            self.flush_lost.store(true, Ordering::Release);
        }
        let deadline = Instant::now() + self.reconnect;
        let mut rest = REST.0;
        loop {
            match self.open_again() {
                Ok(channel) => return Ok(channel),
                // Waiting does not change these.
                Err(error @ (Error::Protocol { .. } | Error::Tls { .. })) => return Err(error),
                Err(error) if Instant::now() + rest > deadline => return Err(self.lost(error.to_string())),
                Err(_) => thread::sleep(rest),
            }
            rest = (rest * 2).min(REST.1);
        }
    }

    fn send(&self, request: Request, payload: &[u8]) -> Result<Flight> {
        let channel = self.channel()?;
        Ok(self.send_on(channel, request, Vec::new(), payload))
    }

    fn send_on(&self, channel: Arc<Channel>, request: Request, buf: Vec<u8>, payload: &[u8]) -> Flight {
        let asked = asked(&request, buf);
        let cookie = channel.queue(request, asked, payload);
        channel.kick();
        Flight { channel, cookie, request }
    }

    /// Waits for a request's end, sending it again over a new connection where the old one is lost.
    fn settle(&self, mut flight: Flight, payload: &[u8]) -> Result<Done> {
        let deadline = Instant::now() + self.reconnect;
        let mut losses = 0;
        loop {
            match flight.channel.wait(flight.cookie) {
                Ended::Done(done) => return self.judge(&flight.request, done),
                Ended::Lost(asked, loss) => {
                    losses += 1;
                    self.may_go_on(loss, losses, Instant::now() > deadline)?;
                    self.note_loss();
                    let channel = self.channel()?;
                    flight = self.send_on(channel, flight.request, asked.buf, payload);
                }
            }
        }
    }

    /// Whether a request whose connection was lost for the `losses`-th time may be sent again, after a pause.
    fn may_go_on(&self, loss: Loss, losses: u32, is_late: bool) -> Result<()> {
        if loss.violated && (is_late || losses >= VIOLATIONS_MAX) {
            return Err(self.broken(&loss.why));
        }
        if is_late {
            return Err(self.lost(loss.why));
        }
        // The first time it may be a server that was started anew; from the second time on something is wrong with it.
        if losses > 1 {
            thread::sleep(REST.0.saturating_mul(1 << (losses - 2).min(10)).min(REST.1));
        }
        Ok(())
    }

    /// A connection was lost: flushes may no longer vouch for what was written.
    fn note_loss(&self) {
        if self.unflushed.load(Ordering::Acquire) > 0 {
            self.flush_lost.store(true, Ordering::Release);
        }
    }

    fn judge(&self, request: &Request, done: Done) -> Result<Done> {
        if let Some((errno, text)) = done.error {
            let command = match request.command {
                cmd::READ => "read",
                cmd::WRITE => "write",
                cmd::FLUSH => "flush",
                cmd::TRIM => "trim",
                cmd::WRITE_ZEROES => "write zeroes",
                _ => "block status",
            };
            let text = if text.is_empty() { text } else { format!(": {text}") };
            let (place, offset, len) = (self.target.shown.clone(), request.offset, request.len);
            return Err(Error::Remote { place, command, offset, len, errno, text });
        }
        if matches!(request.command, cmd::WRITE | cmd::WRITE_ZEROES | cmd::TRIM) {
            self.unflushed.fetch_add(1, Ordering::AcqRel);
        }
        Ok(done)
    }
}

/// A request on its way.
#[derive(Debug)]
struct Flight {
    channel: Arc<Channel>,
    cookie: u64,
    request: Request,
}

/// What a request asks for, with the place for a READ's bytes.
fn asked(request: &Request, mut buf: Vec<u8>) -> Asked {
    if request.command == cmd::READ {
        buf.resize(narrow(request.len), 0);
    }
    Asked { command: request.command, offset: request.offset, len: request.len, buf }
}

fn open(target: &Target) -> Result<Channel> {
    match target.open()? {
        Opened::Channel(channel) => Ok(*channel),
        Opened::List(_) => {
            Err(Error::Protocol { place: target.shown.clone(), what: "a list instead of an export".into() })
        }
    }
}

/// Lengths here are bounded by [`PIECE_MAX`] or by a caller's buffer.
fn narrow(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
