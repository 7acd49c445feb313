//! Decoding of single stored blocks: zstd, raw deflate, LZ4, verbatim.
//!
//! Invariants
//! - The output never holds a byte that this call did not write: it is cleared first, and on any
//!   error left empty. (Decoders have leaked old buffer contents on hostile input.)
//! - Output and working memory are bounded by [`BLOCK_BYTES_MAX`] and [`WINDOW_LOG_MAX`] before a
//!   byte of the block is trusted; a block that would decode to more than declared is an error.
//! - A block that decodes to less than was asked for is an error.
//!
//! Working contexts (a few hundred KiB) are kept per thread and used again.
//!
//! Not here: checksums, which are the business of whoever stores the block; encoding.

use std::{
    cell::{Cell, RefCell},
    io,
};

use flate2::{Decompress, FlushDecompress, Status};
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use crate::{BlockRef, Codec, Error, Result, Storage};

/// Largest decoded block any format here has, in bytes.
pub const BLOCK_BYTES_MAX: usize = 4 << 20;

/// Largest stored block, in bytes: qcow2 can declare twice its cluster of 2 MiB.
pub const STORED_BYTES_MAX: usize = 8 << 20;

/// Largest zstd window that is allocated for streaming, as a power of two (8 MiB).
pub const WINDOW_LOG_MAX: u32 = 23;

/// Whether stored bytes may go on after the block's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// The stored length is exact: what follows the block's end is damage.
    Exact,
    /// The stored length is rounded up (qcow2 counts sectors): what follows is ignored.
    Ignored,
}

/// Why a block did not decode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The stored bytes end before the block does, or the block is smaller than declared.
    #[error("decodes to {got} of {want} bytes")]
    Short {
        /// Bytes that came out.
        got: usize,
        /// Bytes that were wanted.
        want: usize,
    },
    /// More comes out than declared.
    #[error("decodes to more than {max} bytes")]
    Long {
        /// Declared size in bytes.
        max: usize,
    },
    /// Bytes follow the end of the block where none may.
    #[error("{extra} bytes follow the end of the block")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// The stored bytes break the rules of their encoding.
    #[error("not valid {codec:?}: {what}")]
    Invalid {
        /// The encoding.
        codec: Codec,
        /// The decoder's words.
        what: String,
    },
    /// A size beyond what any format here may declare.
    #[error("a block of {len} bytes is over the limit of {max}")]
    Limit {
        /// Declared size in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
}

impl DecodeError {
    /// The error of the file `path`, naming the block.
    pub fn at(self, path: &str, block: &BlockRef) -> Error {
        Error::BadBlock {
            path: path.into(),
            offset: block.offset,
            len: block.stored_len.into(),
            what: self.to_string(),
        }
    }
}

/// Decodes `stored` into `out` (cleared first): `raw_len` bytes if `need` is `raw_len`, else at least
/// `need` bytes and at most `raw_len`. LZ4 cannot stop early; zstd and deflate can.
/// `need` over `raw_len` counts as `raw_len`.
///
/// # Errors
/// [`DecodeError`]; `out` is then empty. A block that is read only in part is checked only in part.
pub fn decode(
    codec: Codec,
    stored: &[u8],
    raw_len: usize,
    need: usize,
    tail: Tail,
    out: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    out.clear();
    if raw_len > BLOCK_BYTES_MAX {
        return Err(DecodeError::Limit { len: raw_len, max: BLOCK_BYTES_MAX });
    }
    let need = need.min(raw_len);
    let done = match codec {
        Codec::Raw => verbatim(stored, raw_len, tail, out),
        Codec::Lz4 => lz4(stored, raw_len, out),
        Codec::Zstd => match zstd_header_len(stored) {
            // One pass straight into the output beats a partial one through the context's window, so a
            // frame that is a single block is decoded whole.
            Some(start) if need < raw_len && zstd_block_end(stored, start).is_some() => {
                zstd_prefix(stored, raw_len, need, start, out)
            }
            _ => zstd_whole(stored, raw_len, tail, out),
        },
        Codec::Deflate => deflate(stored, raw_len, need, tail, out),
    };
    let done = done.and(match out.len() {
        got if got > raw_len => Err(DecodeError::Long { max: raw_len }),
        got if got < need => Err(DecodeError::Short { got, want: need }),
        _ => Ok(()),
    });
    if done.is_err() {
        out.clear();
    }
    done
}

/// Decodes one zlib stream (RFC 1950) of at most `raw_max` bytes into `out` (cleared first) and checks
/// its Adler-32. What follows the stream is ignored.
///
/// # Errors
/// [`DecodeError`]; `out` is then empty.
pub fn zlib(stored: &[u8], raw_max: usize, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    out.clear();
    if raw_max > BLOCK_BYTES_MAX {
        return Err(DecodeError::Limit { len: raw_max, max: BLOCK_BYTES_MAX });
    }
    let done = zlib_stream(stored, raw_max, out);
    if done.is_err() {
        out.clear();
    }
    done
}

/// Decodes zstd frames (RFC 8878) of at most `raw_max` bytes in all into `out` (cleared first).
///
/// # Errors
/// [`DecodeError`]; `out` is then empty.
pub fn zstd_up_to(stored: &[u8], raw_max: usize, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    out.clear();
    if raw_max > BLOCK_BYTES_MAX {
        return Err(DecodeError::Limit { len: raw_max, max: BLOCK_BYTES_MAX });
    }
    let done = zstd_whole(stored, raw_max, Tail::Exact, out);
    if done.is_err() {
        out.clear();
    }
    done
}

thread_local!(static IN_MEMORY_ONLY: Cell<bool> = const { Cell::new(false) });

/// Runs `work` with [`with_stored`] on this thread kept to bytes that need no wait, by the word of
/// [`Storage::read_now`]: a block that lies elsewhere is an error of kind [`io::ErrorKind::WouldBlock`]. Through a
/// layer that reads its blocks in another way, `work` may wait.
pub fn in_memory_only<R>(work: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            IN_MEMORY_ONLY.set(self.0);
        }
    }
    let _before = Restore(IN_MEMORY_ONLY.replace(true));
    work()
}

fn read_stored(storage: &dyn Storage, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    match IN_MEMORY_ONLY.get() {
        true if storage.read_now(offset, bytes)? => Ok(()),
        true => Err(io::ErrorKind::WouldBlock.into()),
        false => storage.read_at(offset, bytes),
    }
}

/// Reads `len` stored bytes at `offset` into a buffer kept per thread and hands them to `work`.
///
/// # Errors
/// [`Error::Io`] if the read fails, [`Error::Corrupt`] if `len` is over [`STORED_BYTES_MAX`], or
/// what `work` reports.
pub fn with_stored<R>(
    storage: &dyn Storage,
    offset: u64,
    len: usize,
    work: impl FnOnce(&[u8]) -> Result<R>,
) -> Result<R> {
    thread_local!(static STORED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    if len > STORED_BYTES_MAX {
        let what = format!("a stored block of {len} bytes is over the limit of {STORED_BYTES_MAX}");
        return Err(Error::corrupt(storage.label(), offset, what));
    }
    // Taken out of its cell, so that `work` may come here again.
    let mut buffer = STORED.take();
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let bytes = buffer.get_mut(..len).unwrap_or_default();
    let read = read_stored(storage, offset, bytes).map_err(|e| Error::io(storage.label(), "read", offset, e));
    let done = read.and_then(|()| work(bytes));
    STORED.set(buffer);
    done
}

fn verbatim(stored: &[u8], raw_len: usize, tail: Tail, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    let bytes = stored.get(..raw_len).ok_or(DecodeError::Short { got: stored.len(), want: raw_len })?;
    if tail == Tail::Exact && stored.len() > raw_len {
        return Err(DecodeError::Trailing { extra: stored.len() - raw_len });
    }
    out.extend_from_slice(bytes);
    Ok(())
}

fn lz4(stored: &[u8], raw_len: usize, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    out.resize(raw_len, 0);
    let got = lz4_flex::block::decompress_into(stored, out)
        .map_err(|e| DecodeError::Invalid { codec: Codec::Lz4, what: e.to_string() })?;
    out.truncate(got);
    Ok(())
}

/// Running totals are kept as `usize`: both are bounded by buffers in memory.
fn moved(inflate: &Decompress) -> (usize, usize) {
    let size = |n| usize::try_from(n).unwrap_or(usize::MAX);
    (size(inflate.total_in()), size(inflate.total_out()))
}

fn deflate(stored: &[u8], raw_len: usize, need: usize, tail: Tail, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    thread_local!(static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false)));
    let invalid = |e: flate2::DecompressError| DecodeError::Invalid { codec: Codec::Deflate, what: e.to_string() };
    INFLATE.with_borrow_mut(|inflate| {
        inflate.reset(false);
        out.resize(need, 0);
        let mut ended = false;
        loop {
            let (taken, given) = moved(inflate);
            let (Some(input), Some(room)) = (stored.get(taken..), out.get_mut(given..)) else { break };
            if room.is_empty() || ended {
                break;
            }
            ended = inflate.decompress(input, room, FlushDecompress::None).map_err(invalid)? == Status::StreamEnd;
            if moved(inflate) == (taken, given) {
                break;
            }
        }
        let (taken, given) = moved(inflate);
        out.truncate(given);
        if given < raw_len {
            // A prefix is out, or the block is short: the caller compares with `need`.
            return Ok(());
        }
        if !ended {
            // The end mark may still be in the input; one more byte of output would be too much.
            let input = stored.get(taken..).unwrap_or_default();
            let status = inflate.decompress(input, &mut [0; 1], FlushDecompress::None).map_err(invalid)?;
            if moved(inflate).1 > raw_len {
                return Err(DecodeError::Long { max: raw_len });
            }
            ended = status == Status::StreamEnd;
        }
        match (tail, stored.len().saturating_sub(moved(inflate).0)) {
            (Tail::Ignored, _) => Ok(()),
            (Tail::Exact, _) if !ended => Err(DecodeError::Short { got: given, want: raw_len }),
            (Tail::Exact, 0) => Ok(()),
            (Tail::Exact, extra) => Err(DecodeError::Trailing { extra }),
        }
    })
}

fn zlib_stream(stored: &[u8], raw_max: usize, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    thread_local!(static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(true)));
    let invalid = |e: flate2::DecompressError| DecodeError::Invalid { codec: Codec::Deflate, what: e.to_string() };
    INFLATE.with_borrow_mut(|inflate| {
        inflate.reset(true);
        out.resize(raw_max, 0);
        let mut spare = [0; 1];
        loop {
            let (taken, given) = moved(inflate);
            if given > raw_max {
                return Err(DecodeError::Long { max: raw_max });
            }
            let input = stored.get(taken..).unwrap_or_default();
            // The end and its checksum may still be in the input when the output is full.
            let room = out.get_mut(given..).filter(|room| !room.is_empty()).unwrap_or(&mut spare);
            let status = inflate.decompress(input, room, FlushDecompress::None).map_err(invalid)?;
            match status {
                Status::StreamEnd => break,
                _ if moved(inflate) == (taken, given) => return Err(DecodeError::Short { got: given, want: raw_max }),
                _ => {}
            }
        }
        let given = moved(inflate).1;
        if given > raw_max {
            return Err(DecodeError::Long { max: raw_max });
        }
        out.truncate(given);
        Ok(())
    })
}

fn zstd_error(code: usize) -> DecodeError {
    DecodeError::Invalid { codec: Codec::Zstd, what: zstd_safe::get_error_name(code).into() }
}

fn with_zstd<R>(work: impl FnOnce(&mut DCtx<'static>) -> Result<R, DecodeError>) -> Result<R, DecodeError> {
    thread_local!(static ZSTD: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) });
    ZSTD.with_borrow_mut(|slot| {
        let context = slot.get_or_insert_with(DCtx::create);
        context.reset(ResetDirective::SessionOnly).map_err(zstd_error)?;
        context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(zstd_error)?;
        work(context)
    })
}

/// Decodes all: in one pass where the frame says its size, else through the context's window.
fn zstd_whole(stored: &[u8], raw_len: usize, tail: Tail, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    out.reserve_exact(raw_len);
    with_zstd(|context| {
        let mut input = InBuffer::around(stored);
        let mut output = OutBuffer::around(out);
        loop {
            let before = (input.pos(), output.pos());
            let hint = context.decompress_stream(&mut output, &mut input).map_err(zstd_error)?;
            let (got, moved) = (output.pos(), before != (input.pos(), output.pos()));
            match hint {
                // A frame ended. Writers may cut a block into frames, so only the size ends the block.
                0 if got >= raw_len || input.pos() >= stored.len() => break,
                _ if got > raw_len => return Err(DecodeError::Long { max: raw_len }),
                _ if moved => {}
                _ if got == raw_len => return Err(DecodeError::Long { max: raw_len }),
                _ => return Err(DecodeError::Short { got, want: raw_len }),
            }
        }
        match stored.len() - input.pos() {
            extra if extra > 0 && tail == Tail::Exact => Err(DecodeError::Trailing { extra }),
            _ => Ok(()),
        }
    })
}

/// Decodes zstd block by zstd block and stops once `need` bytes are out. A writer that flushes
/// inside its frame makes those blocks small (the native format: 16 KiB).
fn zstd_prefix(
    stored: &[u8],
    raw_len: usize,
    need: usize,
    header_len: usize,
    out: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    out.reserve_exact(raw_len);
    with_zstd(|context| {
        let mut output = OutBuffer::around(out);
        let mut end = header_len;
        let mut pos = 0;
        while output.pos() < need {
            end = zstd_block_end(stored, end).unwrap_or(stored.len());
            let mut input = InBuffer { src: stored.get(..end).unwrap_or(stored), pos };
            let before = output.pos();
            let hint = context.decompress_stream(&mut output, &mut input).map_err(zstd_error)?;
            let moved = output.pos() > before || input.pos > pos;
            pos = input.pos;
            if output.pos() > raw_len {
                return Err(DecodeError::Long { max: raw_len });
            }
            if !moved || (hint == 0 && pos >= stored.len()) {
                break;
            }
        }
        Ok(())
    })
}

/// Length of a zstd frame's header in bytes; `None` for anything else.
fn zstd_header_len(stored: &[u8]) -> Option<usize> {
    let descriptor = *stored.strip_prefix(b"\x28\xb5\x2f\xfd")?.first()?;
    let single = usize::from(descriptor >> 5 & 1);
    let dictionary = [0, 1, 2, 4].get(usize::from(descriptor & 3))?;
    let content = match descriptor >> 6 {
        0 => single,
        log2 => 1 << log2,
    };
    Some(5 + (1 - single) + dictionary + content)
}

/// Where the zstd block that starts at `at` ends; `None` past the last.
fn zstd_block_end(stored: &[u8], at: usize) -> Option<usize> {
    let head = stored.get(at..at.checked_add(3)?)?;
    let word = head.iter().rev().fold(0usize, |word, byte| word << 8 | usize::from(*byte));
    let payload = if word >> 1 & 3 == 1 { 1 } else { word >> 3 };
    let end = at.checked_add(3)?.checked_add(payload)?;
    // The last block takes the optional checksum along.
    (word & 1 == 0 && end <= stored.len()).then_some(end)
}

#[cfg(test)]
mod tests;
