//! Replies on their way in, without I/O: which request they belong to, and whether they keep the rules.
//!
//! Invariants
//! - A READ succeeds only if every byte of it was delivered, once; a hole counts as delivered zeros. Missing,
//!   doubled or stray bytes are a violation, never zeros.
//! - Every request taken in with [`Inbox::expect`] comes out with [`Inbox::next_done`] or dies with the connection.
//! - Memory is taken as bytes arrive, and a reply's own length is believed only up to what its request allows.
//!
//! Not here: sockets, retries.

use std::collections::{HashMap, VecDeque};

use super::covered::Covered;
use crate::nbd::{
    negotiate::Mode,
    reply::{self, Chunk, Head},
    wire::{self, Cursor, chunk, command as cmd},
};

/// Longest payload of a chunk of extents or of an error in bytes.
const SMALL_MAX: u64 = 32 << 20;
/// Most chunks of errors in one reply: each may name another offset, but a reply has to end.
const ERRORS_MAX: usize = 64;
/// A payload at least this long may be received past the inbox.
const DIRECT_MIN: usize = 32 << 10;

/// What a request asked for.
#[derive(Debug)]
pub struct Asked {
    /// See [`wire::command`].
    pub command: u16,
    /// Start in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where a READ's bytes go: exactly `len` of them.
    pub buf: Vec<u8>,
}

/// Extents of one context: number of the context, then lengths and states in order.
pub type Status = (u32, Vec<(u64, u64)>);

/// How a request ended.
#[derive(Debug)]
pub struct Done {
    /// Its number.
    pub cookie: u64,
    /// What was asked, with the bytes of a READ that succeeded.
    pub asked: Asked,
    /// What BLOCK_STATUS told.
    pub status: Vec<Status>,
    /// The server's error number and words, if it failed.
    pub error: Option<(u32, String)>,
}

/// The server broke the protocol; the connection is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

#[derive(Debug)]
struct Pending {
    asked: Asked,
    covered: Covered,
    status: Vec<Status>,
    error: Option<(u32, String)>,
    errors: usize,
}

/// A payload of which some is still to come.
#[derive(Debug)]
enum Payload {
    /// Bytes for `buf[at..end]` of a READ.
    Data { cookie: u64, at: usize, end: usize, done: bool },
    /// Anything else, gathered.
    Small { head: Chunk, bytes: Vec<u8> },
}

/// Replies on their way in.
#[derive(Debug)]
pub struct Inbox {
    mode: Mode,
    contexts: Vec<u32>,
    pending: HashMap<u64, Pending>,
    payload: Option<Payload>,
    /// The beginning of a header.
    partial: Vec<u8>,
    done: VecDeque<Done>,
}

/// A stretch of a READ's buffer to receive into; goes back with [`Inbox::put_direct`].
#[derive(Debug)]
pub struct Direct {
    /// The READ's whole buffer.
    pub buf: Vec<u8>,
    /// What is to be filled, from its front.
    pub range: std::ops::Range<usize>,
    cookie: u64,
}

impl Inbox {
    /// For a connection that agreed on `mode` and on contexts with these numbers.
    pub fn new(mode: Mode, contexts: Vec<u32>) -> Self {
        Self { mode, contexts, pending: HashMap::new(), payload: None, partial: Vec::new(), done: VecDeque::new() }
    }

    /// A request is on its way; `cookie` is not in use.
    pub fn expect(&mut self, cookie: u64, asked: Asked) {
        let pending = Pending { asked, covered: Covered::default(), status: Vec::new(), error: None, errors: 0 };
        self.pending.insert(cookie, pending);
    }

    /// Requests without their reply.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The next request that came to its end.
    pub fn next_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    /// The end of the request with this number, if it has come.
    pub fn take_done(&mut self, cookie: u64) -> Option<Done> {
        let index = self.done.iter().position(|done| done.cookie == cookie)?;
        self.done.remove(index)
    }

    /// All requests without a reply: the connection is gone.
    pub fn abandon(&mut self) -> Vec<(u64, Asked)> {
        self.payload = None;
        self.pending.drain().map(|(cookie, pending)| (cookie, pending.asked)).collect()
    }

    /// Where a long payload may be received without passing through [`Inbox::feed`].
    pub fn take_direct(&mut self) -> Option<Direct> {
        let Some(Payload::Data { cookie, at, end, .. }) = &self.payload else { return None };
        if end - at < DIRECT_MIN {
            return None;
        }
        let buf = std::mem::take(&mut self.pending.get_mut(cookie)?.asked.buf);
        Some(Direct { buf, range: *at..*end, cookie: *cookie })
    }

    /// `got` bytes were received into what [`Inbox::take_direct`] gave.
    ///
    /// # Errors
    /// A [`Violation`] that only shows at the end of the reply.
    pub fn put_direct(&mut self, direct: Direct, got: usize) -> Result<(), Violation> {
        if let Some(pending) = self.pending.get_mut(&direct.cookie) {
            pending.asked.buf = direct.buf;
        }
        self.data_came(got)
    }

    /// Takes all of `bytes`.
    ///
    /// # Errors
    /// The first [`Violation`]; nothing after it may be used.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), Violation> {
        while !bytes.is_empty() {
            let used = match &mut self.payload {
                None => self.header(bytes)?,
                Some(Payload::Data { cookie, at, end, .. }) => {
                    let part = bytes.get(..bytes.len().min(*end - *at)).unwrap_or_default();
                    let buf = self.pending.get_mut(cookie).map(|pending| &mut pending.asked.buf);
                    let place = buf.and_then(|buf| buf.get_mut(*at..*at + part.len()));
                    place.ok_or(Violation("data for a request that is over"))?.copy_from_slice(part);
                    self.data_came(part.len())?;
                    part.len()
                }
                Some(Payload::Small { head, bytes: gathered }) => {
                    let left = usize::try_from(head.len).unwrap_or(usize::MAX) - gathered.len();
                    let part = bytes.get(..bytes.len().min(left)).unwrap_or_default();
                    gathered.extend(part);
                    if part.len() == left
                        && let Some(Payload::Small { head, bytes }) = self.payload.take()
                    {
                        self.small(&head, &bytes)?;
                    }
                    part.len()
                }
            };
            bytes = bytes.get(used..).unwrap_or_default();
        }
        Ok(())
    }

    fn data_came(&mut self, got: usize) -> Result<(), Violation> {
        if let Some(Payload::Data { cookie, at, end, done }) = &mut self.payload {
            *at += got;
            if at == end {
                let (cookie, done) = (*cookie, *done);
                self.payload = None;
                if done {
                    self.finish(cookie)?;
                }
            }
        }
        Ok(())
    }

    /// Takes a header, in as many parts as it comes, and tells how many bytes were used.
    fn header(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        if self.partial.is_empty()
            && let Some(len) = self.begin(bytes)?
        {
            return Ok(len);
        }
        // What is needed of the front of a chunk of data: its header and the offset behind it.
        let most = reply::data_header_len(Mode::Extended);
        let before = self.partial.len();
        let taken = bytes.len().min(most.saturating_sub(before));
        let mut head = std::mem::take(&mut self.partial);
        head.extend(bytes.iter().take(taken));
        let used = self.begin(&head)?;
        if used.is_some() {
            head.clear();
        }
        self.partial = head;
        // The header may be whole before the last bytes that were looked at.
        Ok(used.map_or(taken, |len| len.saturating_sub(before)))
    }

    /// Begins a reply; the length of what was used, `None` where more is needed.
    fn begin(&mut self, bytes: &[u8]) -> Result<Option<usize>, Violation> {
        let parsed = Head::parse(bytes, self.mode).map_err(|_| Violation("a reply without its magic"))?;
        let Some((head, len)) = parsed else { return Ok(None) };
        match head {
            Head::Simple { cookie, errno } => {
                self.simple(cookie, errno)?;
                Ok(Some(len))
            }
            Head::Chunk(head) => {
                let data = head.kind == chunk::OFFSET_DATA;
                let rest = bytes.get(len..).unwrap_or_default();
                if data && rest.len() < 8 {
                    return Ok(None);
                }
                self.chunk(&head, rest)?;
                Ok(Some(if data { len + 8 } else { len }))
            }
        }
    }

    fn known(&mut self, cookie: u64) -> Result<&mut Pending, Violation> {
        self.pending.get_mut(&cookie).ok_or(Violation("a reply to nothing that was asked"))
    }

    fn simple(&mut self, cookie: u64, errno: u32) -> Result<(), Violation> {
        let mode = self.mode;
        let pending = self.known(cookie)?;
        let is_read = pending.asked.command == cmd::READ;
        if errno != 0 {
            pending.error = Some((errno, String::new()));
        } else if is_read && mode != Mode::Simple {
            return Err(Violation("a simple reply to a read"));
        } else if is_read && pending.asked.len > 0 {
            let end = pending.asked.buf.len();
            pending.covered.add(0, pending.asked.len).map_err(Violation)?;
            self.payload = Some(Payload::Data { cookie, at: 0, end, done: true });
            return Ok(());
        } else if pending.asked.command == cmd::BLOCK_STATUS {
            return Err(Violation("a simple reply to a question about extents"));
        }
        self.finish(cookie)
    }

    fn chunk(&mut self, head: &Chunk, rest: &[u8]) -> Result<(), Violation> {
        let mode = self.mode;
        let pending = self.known(head.cookie)?;
        if mode == Mode::Extended && head.offset != pending.asked.offset {
            return Err(Violation("a chunk with another request's offset"));
        }
        match head.kind {
            chunk::NONE if head.len == 0 && head.done => return self.finish(head.cookie),
            chunk::NONE => return Err(Violation("an empty chunk that is not the end")),
            chunk::OFFSET_DATA => return self.data(head, rest),
            chunk::OFFSET_HOLE if head.len == 12 => {}
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT if head.len <= SMALL_MAX => {}
            kind if kind & chunk::ERROR_BIT != 0 && (6..=SMALL_MAX.min(8192)).contains(&head.len) => {}
            _ => return Err(Violation("a chunk of unknown kind or impossible length")),
        }
        self.payload = Some(Payload::Small { head: *head, bytes: Vec::new() });
        Ok(())
    }

    /// A place inside a READ, from an offset on the disk.
    fn place(asked: &Asked, offset: u64, len: u64) -> Result<u64, Violation> {
        let at = offset.checked_sub(asked.offset);
        let fits = |at: &u64| at.checked_add(len).is_some_and(|end| end <= asked.len);
        if asked.command != cmd::READ || len == 0 {
            return Err(Violation("data for a request that asked for none, or no data"));
        }
        at.filter(fits).ok_or(Violation("a chunk outside its request"))
    }

    fn data(&mut self, head: &Chunk, rest: &[u8]) -> Result<(), Violation> {
        let offset = Cursor::new(rest).u64().ok_or(Violation("a chunk without its offset"))?;
        let len = head.len.checked_sub(8).ok_or(Violation("a chunk too short for its offset"))?;
        let pending = self.known(head.cookie)?;
        let at = Self::place(&pending.asked, offset, len)?;
        pending.covered.add(at, len).map_err(Violation)?;
        let narrow = |n: u64| usize::try_from(n).map_err(|_| Violation("a chunk beyond memory"));
        let (at, end) = (narrow(at)?, narrow(at + len)?);
        self.payload = Some(Payload::Data { cookie: head.cookie, at, end, done: head.done });
        Ok(())
    }

    /// A gathered payload.
    fn small(&mut self, head: &Chunk, bytes: &[u8]) -> Result<(), Violation> {
        let contexts = self.contexts.clone();
        let pending = self.known(head.cookie)?;
        let mut cursor = Cursor::new(bytes);
        match head.kind {
            chunk::OFFSET_HOLE => {
                let (offset, len) = cursor.u64().zip(cursor.u32()).ok_or(Violation("a hole without its length"))?;
                let at = Self::place(&pending.asked, offset, len.into())?;
                pending.covered.add(at, len.into()).map_err(Violation)?;
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                let place = pending.asked.buf.get_mut(at..).and_then(|b| b.get_mut(..len));
                place.ok_or(Violation("a hole beyond its request"))?.fill(0);
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                let (errno, len) = cursor.u32().zip(cursor.u16()).ok_or(Violation("an error without its number"))?;
                let text = cursor.take(len.into()).filter(|_| errno != 0).ok_or(Violation("a malformed error"))?;
                let text = wire::shown(&String::from_utf8_lossy(text));
                pending.error.get_or_insert((errno, text));
                pending.errors += 1;
                if pending.errors > ERRORS_MAX {
                    return Err(Violation("errors without end"));
                }
            }
            kind => {
                let wide = kind == chunk::BLOCK_STATUS_EXT;
                let status = extents(&mut cursor, wide, pending.asked.len).ok_or(Violation("malformed extents"))?;
                let twice = pending.status.iter().any(|(id, _)| *id == status.0);
                if pending.asked.command != cmd::BLOCK_STATUS || twice || !contexts.contains(&status.0) {
                    return Err(Violation("extents nobody asked for"));
                }
                pending.status.push(status);
            }
        }
        if head.done { self.finish(head.cookie) } else { Ok(()) }
    }

    /// The last chunk has come: was it all? If not the request stays here, for [`Inbox::abandon`] to hand back.
    fn finish(&mut self, cookie: u64) -> Result<(), Violation> {
        let Some(Pending { asked, covered, status, error, .. }) = self.pending.get(&cookie) else { return Ok(()) };
        if error.is_none() {
            if asked.command == cmd::READ && !covered.is_all_of(asked.len) {
                return Err(Violation("a read that ended before all bytes had come"));
            }
            if asked.command == cmd::BLOCK_STATUS && status.is_empty() {
                return Err(Violation("an answer without extents"));
            }
        }
        if let Some(Pending { asked, status, error, .. }) = self.pending.remove(&cookie) {
            self.done.push_back(Done { cookie, asked, status, error });
        }
        Ok(())
    }
}

/// Context and extents, cut to what was asked: at least one, none empty.
fn extents(cursor: &mut Cursor<'_>, wide: bool, asked: u64) -> Option<Status> {
    let id = cursor.u32()?;
    let count = if wide { Some(usize::try_from(cursor.u32()?).ok()?) } else { None };
    let each = if wide { 16 } else { 8 };
    let rest = cursor.rest().len();
    if rest == 0 || !rest.is_multiple_of(each) || count.is_some_and(|count| count != rest / each) {
        return None;
    }
    let mut left = asked;
    let mut out = Vec::with_capacity(rest / each);
    while !cursor.is_empty() {
        let (len, state) =
            if wide { (cursor.u64()?, cursor.u64()?) } else { (u64::from(cursor.u32()?), u64::from(cursor.u32()?)) };
        if len == 0 {
            return None;
        }
        let len = len.min(left);
        if len > 0 {
            out.push((len, state));
        }
        left -= len;
    }
    Some((id, out))
}
