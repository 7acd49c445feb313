//! A connected socket, in the clear or under TLS, in both roles.
//!
//! Invariants
//! - One thread receives ([`Receiver`]); whoever holds the [`Sender`] sends. The two share the socket and,
//!   under TLS, the session, locked only while bytes pass through it, never while the socket is waited for.
//! - A send either makes progress within the time given or fails the connection for good.
//! - A signal never arrives for a closed peer (`MSG_NOSIGNAL`).

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt},
};

/// Bytes of cipher text taken from the socket at once.
const STAGE_LEN: usize = 64 << 10;
/// Send buffer asked of the kernel: fewer switches between reader and writer on large replies.
const SEND_BUFFER: usize = 4 << 20;

/// A connected socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Takes over a connected stream socket and sets it up for the protocol.
    pub(super) fn new(fd: OwnedFd) -> Self {
        // Each of these is a matter of speed or of noticing a dead peer, so a refusal is no failure.
        let _ = sockopt::set_socket_send_buffer_size_force(&fd, SEND_BUFFER)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER));
        let _ = sockopt::set_tcp_nodelay(&fd, true);
        let _ = sockopt::set_socket_keepalive(&fd, true);
        let _ = sockopt::set_tcp_keepidle(&fd, Duration::from_secs(30));
        Self { fd }
    }

    /// No more requests will be received; what is being answered still goes out.
    pub(super) fn stop_receiving(&self) {
        let _ = shutdown(&self.fd, Shutdown::Read);
    }

    /// Ends both directions and wakes whoever waits on the socket.
    pub(super) fn close(&self) {
        let _ = shutdown(&self.fd, Shutdown::Both);
    }

    /// How long a receive with [`Wait::Patience`] waits.
    pub(super) fn set_patience(&self, patience: Duration) {
        let _ = sockopt::set_socket_timeout(&self.fd, sockopt::Timeout::Recv, Some(patience));
    }

    /// The descriptor, to wait on.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Waits until `flags` hold; `false` after `timeout`.
    fn wait(&self, flags: PollFlags, timeout: Option<Duration>) -> io::Result<bool> {
        wait(self.fd.as_fd(), flags, timeout)
    }

    fn recv(&self, buf: &mut [u8], wait: Wait) -> io::Result<usize> {
        loop {
            if let Wait::Until(deadline) = wait {
                let left = deadline.saturating_duration_since(Instant::now());
                if !self.wait(PollFlags::IN, Some(left))? {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            let blocking = matches!(wait, Wait::Forever | Wait::Patience);
            let flags = if blocking { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
            match recv(&self.fd, &mut *buf, flags) {
                Ok((n, _)) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match wait {
                    Wait::Not => return Err(io::ErrorKind::WouldBlock.into()),
                    Wait::Patience => return Err(io::ErrorKind::TimedOut.into()),
                    Wait::Until(_) => {}
                    // A socket handed over in non-blocking mode.
                    Wait::Forever => {
                        self.wait(PollFlags::IN, None)?;
                    }
                },
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Waits until `flags` hold on `fd`, or it is hung up; `false` after `timeout`.
pub(super) fn wait(fd: BorrowedFd<'_>, flags: PollFlags, timeout: Option<Duration>) -> io::Result<bool> {
    let deadline = timeout.map(|t| Instant::now() + t);
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], left.as_ref()) {
            Ok(n) => return Ok(n > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// How long a receive may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Only what is there; else `WouldBlock`.
    Not,
    /// Until then; else `TimedOut`.
    Until(Instant),
    /// As long as [`Socket::set_patience`] allows; else `TimedOut`.
    Patience,
    /// As long as the connection lives.
    Forever,
}

type Session = Arc<Mutex<rustls::Connection>>;

/// The receiving half.
#[derive(Debug)]
pub(super) struct Receiver {
    socket: Arc<Socket>,
    tls: Option<Incoming>,
}

/// The receiving side of a TLS session: cipher text that was received and not yet taken by it.
#[derive(Debug)]
struct Incoming {
    session: Session,
    stage: Vec<u8>,
    from: usize,
    to: usize,
}

/// The sending half.
#[derive(Debug)]
pub(super) struct Sender {
    socket: Arc<Socket>,
    tls: Option<Session>,
    /// Bytes for the wire that did not fit yet, whole messages after the first; `sent` bytes of the first are gone.
    pending: VecDeque<Vec<u8>>,
    sent: usize,
}

/// Both halves of a connection in the clear.
pub(super) fn halves(socket: Arc<Socket>) -> (Receiver, Sender) {
    let sender = Sender { socket: Arc::clone(&socket), tls: None, pending: VecDeque::new(), sent: 0 };
    (Receiver { socket, tls: None }, sender)
}

/// Shakes hands over TLS on a connection in the clear, until `deadline`.
///
/// # Errors
/// What the socket says, or `InvalidData` with the reason of TLS.
pub(super) fn begin_tls(
    receiver: &mut Receiver,
    sender: &mut Sender,
    mut session: rustls::Connection,
    deadline: Instant,
) -> io::Result<()> {
    let mut stage = vec![0; STAGE_LEN];
    while session.is_handshaking() {
        flush_session(&mut session, sender, deadline)?;
        if !session.is_handshaking() {
            break;
        }
        let n = receiver.socket.recv(&mut stage, Wait::Until(deadline))?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Err(refusal) = take_records(&mut session, stage.get(..n).unwrap_or_default()) {
            // The alert tells the peer why; it is already lost if that fails.
            drop(flush_session(&mut session, sender, deadline));
            return Err(refusal);
        }
    }
    flush_session(&mut session, sender, deadline)?;
    session.set_buffer_limit(None);
    let session = Arc::new(Mutex::new(session));
    receiver.tls = Some(Incoming { session: Arc::clone(&session), stage, from: 0, to: 0 });
    sender.tls = Some(session);
    Ok(())
}

fn flush_session(session: &mut rustls::Connection, sender: &mut Sender, deadline: Instant) -> io::Result<()> {
    let mut out = Vec::new();
    while session.wants_write() {
        session.write_tls(&mut out)?;
    }
    sender.send_plain_until(&out, deadline)
}

/// Feeds received cipher text to the session.
fn take_records(session: &mut rustls::Connection, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        if session.read_tls(&mut bytes)? == 0 {
            break;
        }
        session.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    }
    Ok(())
}

impl Receiver {
    /// Receives at least one byte; 0 is the peer's end.
    ///
    /// # Errors
    /// `WouldBlock` or `TimedOut` as [`Wait`] has it; `UnexpectedEof` where TLS was cut without a farewell.
    pub(super) fn recv(&mut self, buf: &mut [u8], wait: Wait) -> io::Result<usize> {
        let Some(Incoming { session, stage, from, to }) = &mut self.tls else { return self.socket.recv(buf, wait) };
        loop {
            match session.lock().reader().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            let mut ended = false;
            if from == to {
                (*from, *to) = (0, self.socket.recv(stage, wait)?);
                ended = *to == 0;
            }
            let mut session = session.lock();
            // The session keeps only so much plain text: it takes a part, and the next turn empties it.
            let taken = session.read_tls(&mut stage.get(*from..*to).unwrap_or_default())?;
            if taken == 0 && !ended {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "TLS takes no more records"));
            }
            *from += taken;
            session.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        }
    }

    /// Whether bytes may be kept back in user space, where waiting on the socket would miss them.
    pub(super) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }
}

impl Sender {
    /// Sends all, in order after what is pending. `patience` is how long the peer may take nothing at all.
    ///
    /// # Errors
    /// What the socket says; `TimedOut` where the peer took nothing for `patience`.
    pub(super) fn send(&mut self, bytes: &[u8], patience: Duration) -> io::Result<()> {
        self.pump(Some(patience))?;
        if self.tls.is_some() {
            let sealed = self.seal(bytes)?;
            return self.send_plain(&sealed, patience);
        }
        self.send_plain(bytes, patience)
    }

    /// Sends all, before `deadline` however slowly the peer takes it. For the handshake: nothing is pending then.
    ///
    /// # Errors
    /// What the socket says; `TimedOut`.
    pub(super) fn send_until(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        if self.tls.is_some() {
            let sealed = self.seal(bytes)?;
            return self.send_plain_until(&sealed, deadline);
        }
        self.send_plain_until(bytes, deadline)
    }

    /// Sends the first `len` bytes of `buf` as far as the socket takes them at once, and keeps the rest,
    /// taking the buffer where that is needed. `true` where nothing had to be kept.
    ///
    /// # Errors
    /// What the socket says.
    pub(super) fn offer_from(&mut self, buf: &mut Vec<u8>, len: usize) -> io::Result<bool> {
        let sealed = match &self.tls {
            Some(_) => Some(self.seal(buf.get(..len).unwrap_or_default())?),
            None => None,
        };
        let bytes = sealed.as_deref().or(buf.get(..len)).unwrap_or_default();
        let total = bytes.len();
        let sent = if self.pending.is_empty() { self.send_now(bytes)? } else { 0 };
        if sent == total {
            return Ok(true);
        }
        if self.pending.is_empty() {
            self.sent = sent;
        }
        self.pending.push_back(sealed.unwrap_or_else(|| {
            let mut rest = std::mem::take(buf);
            rest.truncate(len);
            rest
        }));
        Ok(false)
    }

    /// Sends what is pending: what fits now, or all of it where `patience` is given. `true` once nothing is left.
    ///
    /// # Errors
    /// What the socket says; `TimedOut` where the peer took nothing for `patience`.
    pub(super) fn pump(&mut self, patience: Option<Duration>) -> io::Result<bool> {
        while let Some(front) = self.pending.front() {
            let rest = front.get(self.sent..).unwrap_or_default();
            match (self.send_now(rest)?, patience) {
                (n, _) if n == rest.len() => {
                    self.pending.pop_front();
                    self.sent = 0;
                }
                (n, None) => {
                    self.sent += n;
                    return Ok(false);
                }
                (n, Some(patience)) => {
                    self.sent += n;
                    self.wait_for_room(patience)?;
                }
            }
        }
        Ok(true)
    }

    /// Whether bytes are pending that the socket did not take.
    pub(super) fn is_stalled(&self) -> bool {
        !self.pending.is_empty()
    }

    fn seal(&self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut sealed = Vec::with_capacity(bytes.len() + bytes.len() / 256 + 64);
        if let Some(session) = &self.tls {
            let mut session = session.lock();
            session.writer().write_all(bytes)?;
            while session.wants_write() {
                session.write_tls(&mut sealed)?;
            }
        }
        Ok(sealed)
    }

    fn send_plain(&mut self, mut bytes: &[u8], patience: Duration) -> io::Result<()> {
        loop {
            let n = self.send_now(bytes)?;
            bytes = bytes.get(n..).unwrap_or_default();
            if bytes.is_empty() {
                return Ok(());
            }
            self.wait_for_room(patience)?;
        }
    }

    fn send_plain_until(&mut self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        loop {
            let n = self.send_now(bytes)?;
            bytes = bytes.get(n..).unwrap_or_default();
            if bytes.is_empty() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.wait_for_room(left)?;
        }
    }

    fn wait_for_room(&self, patience: Duration) -> io::Result<()> {
        if self.socket.wait(PollFlags::OUT, Some(patience))? { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }

    /// As much as fits; 0 where nothing does.
    fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match send(&self.socket.fd, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(done)
    }
}
