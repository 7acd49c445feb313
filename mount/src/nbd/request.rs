//! Requests of the transmission phase, without I/O: the header's bytes, and the one place where a
//! request is judged.
//!
//! Invariants
//! - [`Request::validate`] is the whole of NBD's legality for a server; nothing downstream re-checks.
//! - Offsets and lengths are added with a check, never wrapped.
//! - The cookie is opaque; duplicates are the client's business.

use super::{
    negotiate::Mode,
    wire::{self, Cursor, command as cmd, command_flag as flag},
};
use crate::errno::Errno;

/// Payload bytes beyond the advertised limit that are read and dropped; more closes the connection.
pub const DRAIN_MAX: u64 = 2 * wire::PAYLOAD_MAX as u64;

/// Header of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Flags as sent.
    pub flags: u16,
    /// Kind as sent; see [`wire::command`].
    pub command: u16,
    /// The client's own number.
    pub cookie: u64,
    /// Start in bytes.
    pub offset: u64,
    /// Length in bytes: of the range, or of the payload where that is what the header tells.
    pub len: u64,
}

/// What an export allows, as far as legality goes.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Whether writes are taken.
    pub writable: bool,
    /// How headers and replies look.
    pub mode: Mode,
    /// How many contexts the client chose.
    pub contexts: usize,
}

/// A header that cannot be a request: the stream is out of step and the connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfStep;

impl Request {
    /// Length of a header in bytes.
    pub fn header_len(mode: Mode) -> usize {
        if mode == Mode::Extended { wire::REQUEST_EXTENDED_LEN } else { wire::REQUEST_LEN }
    }

    /// Reads a header off the front of `bytes`; `None` where it is not whole yet.
    ///
    /// # Errors
    /// [`OutOfStep`] where the magic is not the agreed one.
    pub fn parse(bytes: &[u8], mode: Mode) -> Result<Option<Self>, OutOfStep> {
        let mut cursor = Cursor::new(bytes);
        let Some(magic) = cursor.u32() else { return Ok(None) };
        let extended = mode == Mode::Extended;
        let want = if extended { wire::MAGIC_REQUEST_EXTENDED } else { wire::MAGIC_REQUEST };
        if magic != want {
            return Err(OutOfStep);
        }
        let request = (|| {
            Some(Self {
                flags: cursor.u16()?,
                command: cursor.u16()?,
                cookie: cursor.u64()?,
                offset: cursor.u64()?,
                len: if extended { cursor.u64()? } else { u64::from(cursor.u32()?) },
            })
        })();
        Ok(request)
    }

    /// Appends the header. In compact headers a length past 32 bits is the caller's mistake and is cut.
    pub fn put(&self, mode: Mode, out: &mut Vec<u8>) {
        let extended = mode == Mode::Extended;
        let magic = if extended { wire::MAGIC_REQUEST_EXTENDED } else { wire::MAGIC_REQUEST };
        out.extend(magic.to_be_bytes());
        out.extend(self.flags.to_be_bytes());
        out.extend(self.command.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(self.offset.to_be_bytes());
        if extended {
            out.extend(self.len.to_be_bytes());
        } else {
            out.extend(u32::try_from(self.len).unwrap_or(u32::MAX).to_be_bytes());
        }
    }

    /// How many payload bytes follow the header. A WRITE always has them, whatever its flags.
    pub fn payload_len(&self, mode: Mode) -> u64 {
        let flagged = mode == Mode::Extended && self.flags & flag::PAYLOAD_LEN != 0;
        if self.command == cmd::WRITE || flagged { self.len } else { 0 }
    }

    /// Whether `bit` (of [`wire::command_flag`]) is set.
    pub fn has(&self, bit: u16) -> bool {
        self.flags & bit != 0
    }

    /// Judges a request by what was advertised.
    ///
    /// # Errors
    /// The number to answer with; a payload still has to be drained.
    pub fn validate(&self, rules: &Rules) -> Result<(), Errno> {
        self.validate_flags(rules)?;
        let with_payload = self.command == cmd::BLOCK_STATUS && self.has(flag::PAYLOAD_LEN);
        match self.command {
            cmd::FLUSH => return if self.offset == 0 && self.len == 0 { Ok(()) } else { Err(Errno::Invalid) },
            cmd::WRITE | cmd::WRITE_ZEROES | cmd::TRIM if !rules.writable => return Err(Errno::Perm),
            cmd::READ | cmd::WRITE if self.len > u64::from(wire::PAYLOAD_MAX) => return Err(Errno::Invalid),
            cmd::BLOCK_STATUS if rules.contexts == 0 => return Err(Errno::Invalid),
            cmd::BLOCK_STATUS if with_payload => return Ok(()),
            cmd::BLOCK_STATUS if self.len == 0 => return Err(Errno::Invalid),
            _ => {}
        }
        let inside = self.offset.checked_add(self.len).is_some_and(|end| end <= rules.size);
        match self.command {
            _ if inside => Ok(()),
            cmd::WRITE | cmd::WRITE_ZEROES => Err(Errno::NoSpace),
            _ => Err(Errno::Invalid),
        }
    }

    /// FUA only where it is offered; then on any command. The rest only on their own commands.
    fn validate_flags(&self, rules: &Rules) -> Result<(), Errno> {
        let own = match self.command {
            cmd::READ if rules.mode >= Mode::Structured => flag::DF,
            cmd::READ | cmd::FLUSH | cmd::TRIM | cmd::CACHE => 0,
            cmd::WRITE if rules.mode == Mode::Extended => flag::PAYLOAD_LEN,
            cmd::WRITE => 0,
            cmd::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            cmd::BLOCK_STATUS if rules.mode == Mode::Extended => flag::REQ_ONE | flag::PAYLOAD_LEN,
            cmd::BLOCK_STATUS => flag::REQ_ONE,
            _ => return Err(Errno::Invalid),
        };
        // A writer to a read-only export is told so, whatever else is wrong with its request.
        let refused_anyway = !rules.writable && matches!(self.command, cmd::WRITE | cmd::WRITE_ZEROES | cmd::TRIM);
        let common = if rules.writable || refused_anyway { flag::FUA } else { 0 };
        if self.flags & !(own | common) == 0 { Ok(()) } else { Err(Errno::Invalid) }
    }
}
