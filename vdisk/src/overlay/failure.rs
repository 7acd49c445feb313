//! How things go wrong in an overlay, and what is remembered of it.
//!
//! Invariant: the first failed sync is kept for the life of the overlay; from then on nothing is
//! acknowledged as durable. A later sync that succeeds proves nothing about the pages of the earlier.

use std::io;

use aquifer_formats::{Error as FormatError, Storage};

use crate::{Delta, Error};

/// The first failed sync.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) path: String,
    pub(super) cause: String,
    /// Ranges whose newest bytes may be lost.
    pub(super) doubt: Delta,
}

impl Failure {
    pub(super) fn error(&self) -> Error {
        Error::SyncFailed { path: self.path.clone(), cause: self.cause.clone() }
    }
}

/// An I/O error with its place; a full disk or quota becomes [`Error::NoSpace`].
pub(super) fn io_failed(storage: &dyn Storage, action: &'static str, offset: u64, e: io::Error) -> Error {
    let full = matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    if full && action != "sync" {
        return Error::NoSpace { path: storage.label().to_owned(), what: format!("{action} at {offset}") };
    }
    FormatError::io(storage.label(), action, offset, e).into()
}

/// The file belongs to something else.
pub(super) fn wrong(storage: &dyn Storage, what: String) -> Error {
    Error::WrongOverlay { path: storage.label().to_owned(), what }
}
