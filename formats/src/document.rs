//! JSON documents of other products: read as a stream, so that memory follows what is kept of them and not their
//! length.
//!
//! Invariants
//! - No document is longer than its caller allows; nesting is bounded by the parser (128).
//!
//! Not here: what a document says.

use std::io::{self, BufReader, Read};

use serde::de::DeserializeOwned;

use crate::{Error, Result, Storage};

/// Largest window of zstd that is allocated, as a power of two (8 MiB): what its levels use by default.
const WINDOW_LOG_MAX: u32 = 23;
/// What is read at once, in bytes.
const PIECE_BYTES: usize = 256 << 10;

/// Reads the document that `storage` is: one value, and nothing behind it.
///
/// # Errors
/// [`Error::Unsupported`] for one of more than `bytes_max` bytes; [`Error::Corrupt`] for one that breaks JSON or does
/// not hold what it must; [`Error::Io`].
pub(crate) fn read<T: DeserializeOwned>(storage: &dyn Storage, bytes_max: u64) -> Result<T> {
    parse(storage, BufReader::with_capacity(PIECE_BYTES, Walk::of(storage, bytes_max)?))
}

/// The same of a document in a frame of zstd; no more than `bytes_max` bytes of it are read, nor come out.
///
/// # Errors
/// As [`read`]; what comes out and is longer is cut, which breaks JSON.
pub(crate) fn read_zstd<T: DeserializeOwned>(storage: &dyn Storage, bytes_max: u64) -> Result<T> {
    let failed = |e| Error::io(storage.label(), "read", 0, e);
    let stored = BufReader::with_capacity(PIECE_BYTES, Walk::of(storage, bytes_max)?);
    let mut plain = zstd::stream::read::Decoder::with_buffer(stored).map_err(failed)?;
    plain.window_log_max(WINDOW_LOG_MAX).map_err(failed)?;
    parse(storage, BufReader::with_capacity(PIECE_BYTES, plain.take(bytes_max)))
}

fn parse<T: DeserializeOwned>(storage: &dyn Storage, from: impl Read) -> Result<T> {
    serde_json::from_reader(from).map_err(|e| match e.io_error_kind() {
        // What does not decode; all else of the reading has a system's number.
        Some(io::ErrorKind::Other | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) | None => {
            Error::corrupt(storage.label(), 0, format!("line {}, column {}: {e}", e.line(), e.column()))
        }
        Some(kind) => Error::io(storage.label(), "read", 0, io::Error::new(kind, e)),
    })
}

/// A storage from its beginning to its end.
struct Walk<'a> {
    storage: &'a dyn Storage,
    at: u64,
    len: u64,
}

impl<'a> Walk<'a> {
    fn of(storage: &'a dyn Storage, bytes_max: u64) -> Result<Self> {
        let len = storage.len().map_err(|e| Error::io(storage.label(), "stat", 0, e))?;
        if len > bytes_max {
            return Err(Error::unsupported(storage.label(), format!("a document of {len} bytes")));
        }
        Ok(Self { storage, at: 0, len })
    }
}

impl Read for Walk<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from(self.len - self.at).unwrap_or(usize::MAX).min(buf.len());
        let part = buf.get_mut(..n).unwrap_or_default();
        self.storage.read_at(self.at, part)?;
        self.at += n as u64;
        Ok(n)
    }
}
