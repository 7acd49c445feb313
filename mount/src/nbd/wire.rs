//! Numbers of the protocol, and a cursor that takes big-endian fields off untrusted bytes.
//!
//! Invariants
//! - One constant per number; nobody else spells one out.
//! - [`Cursor`] never reads past its slice and never panics.

/// First greeting of a server.
pub const MAGIC_NBD: u64 = 0x4e42_444d_4147_4943;
/// Second greeting, and start of each option (`IHAVEOPT`).
pub const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
/// Start of each reply to an option.
pub const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Start of a request with a 32-bit length.
pub const MAGIC_REQUEST: u32 = 0x2560_9513;
/// Start of a request with a 64-bit length.
pub const MAGIC_REQUEST_EXTENDED: u32 = 0x21e4_1c71;
/// Start of a simple reply.
pub const MAGIC_REPLY_SIMPLE: u32 = 0x6744_6698;
/// Start of a chunk of a structured reply.
pub const MAGIC_REPLY_STRUCTURED: u32 = 0x668e_33ef;
/// Start of a chunk with a 64-bit length.
pub const MAGIC_REPLY_EXTENDED: u32 = 0x6e8a_278c;

/// Length of a request header in bytes.
pub const REQUEST_LEN: usize = 28;
/// Length of an extended request header in bytes.
pub const REQUEST_EXTENDED_LEN: usize = 32;
/// Length of an option header in bytes.
pub const OPTION_LEN: usize = 16;
/// Length of the header of a reply to an option in bytes.
pub const OPTION_REPLY_LEN: usize = 20;
/// Longest string (export name, context name, error text) in bytes.
pub const STRING_MAX: usize = 4096;
/// Longest payload of a READ or WRITE in bytes, as advertised.
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Flags both sides send before the options.
pub mod handshake {
    /// Options may be refused without ending the connection.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The 124 zeros after `EXPORT_NAME` are left out.
    pub const NO_ZEROES: u16 = 2;
}

/// Options a client haggles with.
pub mod option {
    /// Ends the handshake; answered without a reply header.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the connection.
    pub const ABORT: u32 = 2;
    /// Lists the exports.
    pub const LIST: u32 = 3;
    /// Turns to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describes one export.
    pub const INFO: u32 = 6;
    /// Describes one export and begins transmission.
    pub const GO: u32 = 7;
    /// Replies come in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Lists metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Headers carry 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of reply to an option.
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// Option not known.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// Forbidden by the server's policy.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// Malformed, or not possible now.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// Needs TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is stopping.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client must respect block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    /// Extended headers are in use or needed.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Pieces of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is known.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is known.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is known.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// A READ may ask not to be fragmented.
    pub const SEND_DF: u16 = 1 << 7;
    /// FLUSH on one connection covers all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is known.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// WRITE_ZEROES may be refused when it is slow.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS may carry a payload that picks contexts.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Kinds of request.
pub mod command {
    /// Reads bytes.
    pub const READ: u16 = 0;
    /// Writes bytes.
    pub const WRITE: u16 = 1;
    /// Ends the connection.
    pub const DISC: u16 = 2;
    /// Makes acknowledged writes durable.
    pub const FLUSH: u16 = 3;
    /// Gives a range back.
    pub const TRIM: u16 = 4;
    /// Reads ahead.
    pub const CACHE: u16 = 5;
    /// Zeroes a range.
    pub const WRITE_ZEROES: u16 = 6;
    /// Asks what a range holds.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request.
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1;
    /// Zeroed space stays reserved.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One data chunk only.
    pub const DF: u16 = 1 << 2;
    /// One extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Refuse what would be slow.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length field is that of a payload (extended headers only).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Kinds and flags of chunks.
pub mod chunk {
    /// Last chunk of a reply.
    pub const FLAG_DONE: u16 = 1;
    /// No payload.
    pub const NONE: u16 = 0;
    /// Bytes at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeros at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of one context, 32-bit.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents of one context, 64-bit.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// The request failed.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// The context that tells data from holes.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// What every dirty context's name begins with.
pub const CONTEXT_DIRTY: &str = "qemu:dirty-bitmap:";

/// States of an extent.
pub mod state {
    /// `base:allocation`: no space is taken.
    pub const HOLE: u32 = 1;
    /// `base:allocation`: reads as zeros.
    pub const ZERO: u32 = 2;
    /// `qemu:dirty-bitmap:*`: differs.
    pub const DIRTY: u32 = 1;
}

/// Takes fields off a slice, front to back.
#[derive(Clone, Copy, Debug)]
pub struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Begins at the front of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `len` bytes; `None` (and no progress) where fewer are left.
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.rest.split_at_checked(len)?;
        self.rest = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.rest.split_first_chunk::<N>()?;
        self.rest = tail;
        Some(*head)
    }

    /// The next two bytes as a number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next four bytes as a number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next eight bytes as a number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with a 32-bit length before it: at most [`STRING_MAX`] bytes of UTF-8 without NUL.
    pub fn string(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok().filter(|len| *len <= STRING_MAX)?;
        text(self.take(len)?)
    }

    /// What is left.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Whether all has been taken.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

/// `bytes` as a protocol string: at most [`STRING_MAX`] bytes of UTF-8 without NUL.
pub fn text(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_MAX || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// A peer's string as it may be shown: at most 256 bytes, control characters escaped.
pub fn shown(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
        if out.len() >= 252 {
            out.push_str("...");
            break;
        }
    }
    out
}
