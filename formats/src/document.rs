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

/// What is read at once, in bytes.
const PIECE_BYTES: usize = 256 << 10;

/// Reads the document that `storage` is: one value, and nothing behind it.
///
/// # Errors
/// [`Error::Unsupported`] for one of more than `bytes_max` bytes; [`Error::Corrupt`] for one that breaks JSON or does
/// not hold what it must; [`Error::Io`].
pub(crate) fn read<T: DeserializeOwned>(storage: &dyn Storage, bytes_max: u64) -> Result<T> {
    let len = storage.len().map_err(|e| Error::io(storage.label(), "stat", 0, e))?;
    if len > bytes_max {
        return Err(Error::unsupported(storage.label(), format!("a document of {len} bytes")));
    }
    let mut from = BufReader::with_capacity(PIECE_BYTES, Walk { storage, at: 0, len });
    serde_json::from_reader(&mut from).map_err(|e| match e.io_error_kind() {
        Some(kind) => Error::io(storage.label(), "read", 0, io::Error::new(kind, e)),
        None => Error::corrupt(storage.label(), 0, format!("line {}, column {}: {e}", e.line(), e.column())),
    })
}

/// A storage from its beginning to its end.
struct Walk<'a> {
    storage: &'a dyn Storage,
    at: u64,
    len: u64,
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
