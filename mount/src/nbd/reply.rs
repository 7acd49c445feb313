//! Replies of the transmission phase, without I/O, for both roles.
//!
//! Invariants
//! - What a server puts, a client takes: both sides share the constants and the lengths here.
//! - Error texts are fixed phrases of this server; a client cuts and escapes what it is sent.

use super::{
    negotiate::Mode,
    wire::{self, Cursor, chunk},
};
use crate::errno::Errno;

/// Length of the header of a chunk (or of a simple reply) in bytes.
pub fn header_len(mode: Mode) -> usize {
    match mode {
        Mode::Simple => 16,
        Mode::Structured => 20,
        Mode::Extended => 32,
    }
}

/// Length in bytes of all that precedes the data of a READ's reply.
pub fn data_header_len(mode: Mode) -> usize {
    header_len(mode) + if mode == Mode::Simple { 0 } else { 8 }
}

/// A simple reply's header.
pub fn put_simple(out: &mut Vec<u8>, cookie: u64, errno: u32) {
    out.extend(wire::MAGIC_REPLY_SIMPLE.to_be_bytes());
    out.extend(errno.to_be_bytes());
    out.extend(cookie.to_be_bytes());
}

/// A chunk's header. `offset` is that of the request, which only extended headers repeat.
pub fn put_chunk(out: &mut Vec<u8>, mode: Mode, head: &Chunk) {
    let magic = match mode {
        Mode::Extended => wire::MAGIC_REPLY_EXTENDED,
        _ => wire::MAGIC_REPLY_STRUCTURED,
    };
    out.extend(magic.to_be_bytes());
    out.extend(if head.done { chunk::FLAG_DONE } else { 0 }.to_be_bytes());
    out.extend(head.kind.to_be_bytes());
    out.extend(head.cookie.to_be_bytes());
    if mode == Mode::Extended {
        out.extend(head.offset.to_be_bytes());
        out.extend(head.len.to_be_bytes());
    } else {
        out.extend(u32::try_from(head.len).unwrap_or(u32::MAX).to_be_bytes());
    }
}

/// All that precedes `len` bytes of data from `offset`; in simple mode that is a success without more.
pub fn put_data(out: &mut Vec<u8>, mode: Mode, head: DataHead) {
    if mode == Mode::Simple {
        return put_simple(out, head.cookie, 0);
    }
    let kind = chunk::OFFSET_DATA;
    put_chunk(
        out,
        mode,
        &Chunk { done: head.done, kind, cookie: head.cookie, offset: head.request, len: head.len + 8 },
    );
    out.extend(head.offset.to_be_bytes());
}

/// Where a data chunk belongs.
#[derive(Clone, Copy, Debug)]
pub struct DataHead {
    /// Of the request.
    pub cookie: u64,
    /// Start of the request in bytes.
    pub request: u64,
    /// Start of this data in bytes.
    pub offset: u64,
    /// Length of this data in bytes.
    pub len: u64,
    /// Whether it ends the reply.
    pub done: bool,
}

/// Success without data.
pub fn put_done(out: &mut Vec<u8>, mode: Mode, cookie: u64, offset: u64) {
    match mode {
        Mode::Simple => put_simple(out, cookie, 0),
        _ => put_chunk(out, mode, &Chunk { done: true, kind: chunk::NONE, cookie, offset, len: 0 }),
    }
}

/// Failure of a whole request, ending its reply.
pub fn put_error(out: &mut Vec<u8>, mode: Mode, at: (u64, u64), errno: Errno) {
    let (cookie, offset) = at;
    if mode == Mode::Simple {
        return put_simple(out, cookie, errno.number());
    }
    let text = phrase(errno).as_bytes();
    let len = 6 + text.len() as u64;
    put_chunk(out, mode, &Chunk { done: true, kind: chunk::ERROR, cookie, offset, len });
    out.extend(errno.number().to_be_bytes());
    out.extend(u16::try_from(text.len()).unwrap_or(0).to_be_bytes());
    out.extend(text);
}

fn phrase(errno: Errno) -> &'static str {
    match errno {
        Errno::Perm => "not allowed",
        Errno::Io => "input or output failed, or stored bytes are damaged",
        Errno::NoMem => "not enough memory",
        Errno::Invalid => "the request is not valid for this export",
        Errno::NoSpace => "no space, or past the end",
        Errno::Overflow => "too large",
        Errno::NotSup => "would be slow",
        Errno::Shutdown => "the server is stopping",
    }
}

/// Extents of one context, ending the reply where `done`. Lengths past 32 bits only in extended mode.
pub fn put_extents(out: &mut Vec<u8>, mode: Mode, head: StatusHead, extents: &[(u64, u32)]) {
    let count = extents.len() as u64;
    let extended = mode == Mode::Extended;
    let (kind, len) =
        if extended { (chunk::BLOCK_STATUS_EXT, 8 + 16 * count) } else { (chunk::BLOCK_STATUS, 4 + 8 * count) };
    put_chunk(out, mode, &Chunk { done: head.done, kind, cookie: head.cookie, offset: head.request, len });
    out.extend(head.context.to_be_bytes());
    if extended {
        out.extend(u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
    }
    for (len, state) in extents {
        if extended {
            out.extend(len.to_be_bytes());
            out.extend(u64::from(*state).to_be_bytes());
        } else {
            out.extend(u32::try_from(*len).unwrap_or(u32::MAX).to_be_bytes());
            out.extend(state.to_be_bytes());
        }
    }
}

/// Where a chunk of extents belongs.
#[derive(Clone, Copy, Debug)]
pub struct StatusHead {
    /// Of the request.
    pub cookie: u64,
    /// Start of the request in bytes.
    pub request: u64,
    /// Number of the context.
    pub context: u32,
    /// Whether it ends the reply.
    pub done: bool,
}

/// Header of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whether it ends the reply.
    pub done: bool,
    /// See [`wire::chunk`].
    pub kind: u16,
    /// Of the request.
    pub cookie: u64,
    /// Start of the request in bytes; 0 unless headers are extended.
    pub offset: u64,
    /// Payload in bytes.
    pub len: u64,
}

/// Header of a reply, as a client takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A simple reply: cookie and error number.
    Simple {
        /// Of the request.
        cookie: u64,
        /// 0, or why not.
        errno: u32,
    },
    /// A chunk.
    Chunk(Chunk),
}

/// A header that cannot be a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfStep;

impl Head {
    /// Reads a header off the front of `bytes` and tells its length; `None` where it is not whole yet. Simple
    /// replies may come in structured mode, never in extended mode.
    ///
    /// # Errors
    /// [`OutOfStep`] where the magic is none that may come.
    pub fn parse(bytes: &[u8], mode: Mode) -> Result<Option<(Self, usize)>, OutOfStep> {
        let mut cursor = Cursor::new(bytes);
        let Some(magic) = cursor.u32() else { return Ok(None) };
        let chunked = match magic {
            wire::MAGIC_REPLY_SIMPLE if mode != Mode::Extended => None,
            wire::MAGIC_REPLY_STRUCTURED if mode == Mode::Structured => Some(Mode::Structured),
            wire::MAGIC_REPLY_EXTENDED if mode == Mode::Extended => Some(Mode::Extended),
            _ => return Err(OutOfStep),
        };
        let head = (|| match chunked {
            None => {
                let errno = cursor.u32()?;
                Some((Self::Simple { errno, cookie: cursor.u64()? }, header_len(Mode::Simple)))
            }
            Some(layout) => {
                let (flags, kind, cookie) = (cursor.u16()?, cursor.u16()?, cursor.u64()?);
                let extended = layout == Mode::Extended;
                let offset = if extended { cursor.u64()? } else { 0 };
                let len = if extended { cursor.u64()? } else { u64::from(cursor.u32()?) };
                let done = flags & chunk::FLAG_DONE != 0;
                Some((Self::Chunk(Chunk { done, kind, cookie, offset, len }), header_len(layout)))
            }
        })();
        Ok(head)
    }
}
