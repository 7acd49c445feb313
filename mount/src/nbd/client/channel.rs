//! One connection of a client: many requests in flight, replies in any order.
//!
//! Invariants
//! - There is no reading thread: whoever waits for a reply reads for all, until its own has come; so a lone
//!   caller gets its answer on its own thread.
//! - A request that cannot be sent because the server does not read is waited for while replies are taken,
//!   so that two full socket buffers do not block each other.
//! - The first failure ends the channel: every request without a reply is handed back for another channel.
//!
//! Lock order: `state` and `sender` are never held together; `receiver` is held by the one reader of the moment,
//! before `state`.

use std::{
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{
    hello::{Hello, Offer, Step, Wish},
    inbox::{Asked, Done, Inbox, Violation},
};
use crate::nbd::{
    Error, Result,
    address::Place,
    link::{self, Receiver, Sender, Socket, Wait},
    request::Request,
    tls::ClientTls,
    wire::command as cmd,
};

/// Bytes taken from the socket at once.
const INPUT_LEN: usize = 256 << 10;
/// Most requests in flight on one connection.
pub(super) const IN_FLIGHT_MAX: usize = 128;

/// How to connect.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) place: Place,
    pub(super) shown: String,
    pub(super) wish: Wish,
    pub(super) tls: Option<ClientTls>,
    /// Until the handshake has ended.
    pub(super) connect_timeout: Duration,
    /// How long a server with requests in hand may say nothing.
    pub(super) patience: Duration,
}

/// What the handshake led to.
#[derive(Debug)]
pub(super) enum Opened {
    /// Transmission.
    Channel(Box<Channel>),
    /// A list.
    List(Vec<(String, String)>),
}

/// One connection in transmission.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) offer: Offer,
    socket: Arc<Socket>,
    patience: Duration,
    sender: Mutex<Outgoing>,
    receiver: Mutex<(Receiver, Box<[u8]>)>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct Outgoing {
    sender: Sender,
    /// Requests put together and not yet handed to the sender.
    queued: Vec<u8>,
}

#[derive(Debug)]
struct State {
    inbox: Inbox,
    next_cookie: u64,
    reading: bool,
    waiting: usize,
    /// Why the channel is over.
    lost: Option<Loss>,
    orphans: Vec<(u64, Asked)>,
}

/// Why a channel is over.
#[derive(Clone, Debug)]
pub(super) struct Loss {
    pub(super) why: String,
    /// The server broke the protocol: it will do so again.
    pub(super) violated: bool,
}

/// How a request ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// With a reply.
    Done(Done),
    /// Without: the connection is gone, for this reason. Ask again elsewhere.
    Lost(Asked, Loss),
}

impl Target {
    /// Connects and shakes hands, all within the timeout.
    pub(super) fn open(&self) -> Result<Opened> {
        let deadline = Instant::now() + self.connect_timeout;
        let fd = self.connect().map_err(|e| Error::io(&self.shown, "connect", e))?;
        let socket = Arc::new(Socket::new(fd));
        let (mut receiver, mut sender) = link::halves(Arc::clone(&socket));
        let failed = |e: io::Error| Error::io(&self.shown, "shake hands", e);
        let (mut hello, mut input, mut out) = (Hello::new(self.wish.clone()), Vec::new(), Vec::new());
        let offer = loop {
            let (used, step) = hello.advance(&input, &mut out);
            input.drain(..used);
            if !out.is_empty() {
                sender.send_until(&out, deadline).map_err(failed)?;
                out.clear();
            }
            match step {
                Step::More if used > 0 => {}
                Step::More => {
                    let mut bytes = [0; 4096];
                    let n = receiver.recv(&mut bytes, Wait::Until(deadline)).map_err(failed)?;
                    if n == 0 {
                        return Err(self.broken("the server closed the connection in the handshake"));
                    }
                    input.extend(bytes.iter().take(n));
                }
                Step::StartTls if !input.is_empty() => {
                    return Err(self.broken("bytes in the clear behind the answer to TLS"));
                }
                Step::StartTls => {
                    link::begin_tls(&mut receiver, &mut sender, self.session()?, deadline)
                        .map_err(|e| Error::Tls { place: self.shown.clone(), why: e.to_string() })?;
                    hello.tls_began(&mut out);
                }
                Step::Ready(offer) => break offer,
                Step::Listed(list) => return Ok(Opened::List(list)),
                Step::Refused(what) => return Err(Error::Refused { place: self.shown.clone(), what }),
                Step::Broken(what) => return Err(self.broken(what)),
            }
        };
        if !input.is_empty() {
            return Err(self.broken("bytes behind the end of the handshake"));
        }
        Ok(Opened::Channel(Box::new(Channel::new(offer, socket, receiver, sender, self.patience))))
    }

    fn broken(&self, what: impl Into<String>) -> Error {
        Error::Protocol { place: self.shown.clone(), what: what.into() }
    }

    fn session(&self) -> Result<rustls::Connection> {
        let failed = |why: String| Error::Tls { place: self.shown.clone(), why };
        let tls = self.tls.as_ref().ok_or_else(|| failed("no certificates are set up".into()))?;
        let host = match (&tls.server_name, &self.place) {
            (Some(name), _) => name.clone(),
            (None, Place::Tcp { host, .. }) => host.clone(),
            (None, Place::Unix(_)) => "localhost".into(),
        };
        let name = rustls_pki_types::ServerName::try_from(host).map_err(|e| failed(e.to_string()))?;
        let session = rustls::ClientConnection::new(Arc::clone(&tls.config), name);
        Ok(session.map_err(|e| failed(e.to_string()))?.into())
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        match &self.place {
            Place::Unix(path) => Ok(crate::dial::unix(path, self.connect_timeout)?.into()),
            Place::Tcp { host, port } => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for place in std::net::ToSocketAddrs::to_socket_addrs(&(host.as_str(), *port))? {
                    match std::net::TcpStream::connect_timeout(&place, self.connect_timeout) {
                        Ok(stream) => return Ok(stream.into()),
                        Err(e) => last = e,
                    }
                }
                Err(last)
            }
        }
    }
}

impl Channel {
    fn new(offer: Offer, socket: Arc<Socket>, receiver: Receiver, sender: Sender, patience: Duration) -> Self {
        let contexts = offer.contexts.iter().map(|(id, _)| *id).collect();
        let inbox = Inbox::new(offer.mode, contexts);
        socket.set_patience(patience);
        Self {
            offer,
            socket,
            patience,
            sender: Mutex::new(Outgoing { sender, queued: Vec::new() }),
            receiver: Mutex::new((receiver, vec![0; INPUT_LEN].into_boxed_slice())),
            state: Mutex::new(State {
                inbox,
                next_cookie: 1,
                reading: false,
                waiting: 0,
                lost: None,
                orphans: Vec::new(),
            }),
            changed: Condvar::new(),
        }
    }

    /// Queues a request; [`Channel::kick`] sends it. `payload` is that of a WRITE.
    pub(super) fn queue(&self, mut request: Request, asked: Asked, payload: &[u8]) -> u64 {
        let mut state = self.state.lock();
        let cookie = state.next_cookie;
        state.next_cookie += 1;
        if state.lost.is_some() {
            state.orphans.push((cookie, asked));
            return cookie;
        }
        state.inbox.expect(cookie, asked);
        drop(state);
        request.cookie = cookie;
        let mut outgoing = self.sender.lock();
        request.put(self.offer.mode, &mut outgoing.queued);
        outgoing.queued.extend(payload);
        cookie
    }

    /// Sends what is queued. Takes replies while the server does not read.
    pub(super) fn kick(&self) {
        loop {
            let mut outgoing = self.sender.lock();
            let mut queued = std::mem::take(&mut outgoing.queued);
            let len = queued.len();
            let sent = if len == 0 { outgoing.sender.pump(None) } else { outgoing.sender.offer_from(&mut queued, len) };
            if outgoing.queued.is_empty() {
                // Keep the memory for the next requests.
                queued.clear();
                outgoing.queued = queued;
            }
            drop(outgoing);
            match sent {
                Ok(true) => return,
                Err(e) => return self.lose(&e),
                Ok(false) => self.wait_for_room(),
            }
            if self.state.lock().lost.is_some() {
                return;
            }
        }
    }

    /// The socket takes nothing: take replies, for they may be why, and wait for room.
    fn wait_for_room(&self) {
        use rustix::event::PollFlags;
        let Some(mut receiver) = self.receiver.try_lock() else {
            // Another thread takes the replies.
            return match link::wait(self.socket.as_fd(), PollFlags::OUT, Some(self.patience)) {
                Ok(true) => {}
                Ok(false) => self.lose(&took_nothing()),
                Err(e) => self.lose(&e),
            };
        };
        loop {
            match self.read_some(&mut receiver, Wait::Not) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return self.lose(&e),
            }
        }
        drop(receiver);
        self.changed.notify_all();
        match link::wait(self.socket.as_fd(), PollFlags::IN | PollFlags::OUT, Some(self.patience)) {
            Ok(true) => {}
            Ok(false) => self.lose(&took_nothing()),
            Err(e) => self.lose(&e),
        }
    }

    /// Requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.state.lock().inbox.pending()
    }

    /// Whether the connection is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.state.lock().lost.is_some()
    }

    /// Waits for the end of one request.
    pub(super) fn wait(&self, cookie: u64) -> Ended {
        self.wait_for(|state| {
            if let Some(done) = state.inbox.take_done(cookie) {
                return Some(Ended::Done(done));
            }
            let loss = state.lost.clone()?;
            let index = state.orphans.iter().position(|(orphan, _)| *orphan == cookie)?;
            Some(Ended::Lost(state.orphans.swap_remove(index).1, loss))
        })
    }

    /// Waits for the end of any request; for a channel with one user. `None` where none is left.
    pub(super) fn wait_any(&self) -> Option<(u64, Ended)> {
        self.wait_for(|state| {
            if let Some(done) = state.inbox.next_done() {
                return Some(Some((done.cookie, Ended::Done(done))));
            }
            if let Some((cookie, asked)) = state.orphans.pop() {
                let loss = state.lost.clone().unwrap_or_else(|| Loss { why: String::new(), violated: false });
                return Some(Some((cookie, Ended::Lost(asked, loss))));
            }
            (state.inbox.pending() == 0).then_some(None)
        })
    }

    fn wait_for<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut state = self.state.lock();
        loop {
            if let Some(found) = look(&mut state) {
                return found;
            }
            if state.reading {
                state.waiting += 1;
                self.changed.wait(&mut state);
                state.waiting -= 1;
                continue;
            }
            state.reading = true;
            drop(state);
            let read = {
                let mut receiver = self.receiver.lock();
                self.read_some(&mut receiver, Wait::Patience)
            };
            if let Err(e) = read {
                self.lose(&e);
            }
            state = self.state.lock();
            state.reading = false;
            if state.waiting > 0 {
                self.changed.notify_all();
            }
        }
    }

    /// One receive, and what it brings.
    fn read_some(&self, receiver: &mut (Receiver, Box<[u8]>), wait: Wait) -> io::Result<()> {
        let violated = |Violation(what)| io::Error::new(io::ErrorKind::InvalidData, what);
        let (receiver, input) = receiver;
        let direct = self.state.lock().inbox.take_direct();
        if let Some(mut direct) = direct {
            let got = receiver.recv(direct.buf.get_mut(direct.range.clone()).unwrap_or_default(), wait);
            let n = *got.as_ref().unwrap_or(&0);
            self.state.lock().inbox.put_direct(direct, n).map_err(violated)?;
            return if got? == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) };
        }
        let n = receiver.recv(input, wait)?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
        }
        self.state.lock().inbox.feed(input.get(..n).unwrap_or_default()).map_err(violated)
    }

    /// Ends the channel: requests without a reply become orphans.
    fn lose(&self, why: &io::Error) {
        let mut state = self.state.lock();
        if state.lost.is_none() {
            let violated = why.kind() == io::ErrorKind::InvalidData;
            state.lost = Some(Loss { why: why.to_string(), violated });
        }
        let orphans = state.inbox.abandon();
        state.orphans.extend(orphans);
        drop(state);
        self.socket.close();
        self.changed.notify_all();
    }
}

fn took_nothing() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the server took nothing in time")
}

impl Drop for Channel {
    /// Says goodbye; the server may be gone already.
    fn drop(&mut self) {
        let mut bytes = Vec::new();
        let request = Request { flags: 0, command: cmd::DISC, cookie: 0, offset: 0, len: 0 };
        request.put(self.offer.mode, &mut bytes);
        let len = bytes.len();
        let outgoing = self.sender.get_mut();
        if self.state.get_mut().lost.is_none() {
            let _ = outgoing.sender.offer_from(&mut bytes, len);
        }
        self.socket.close();
    }
}
