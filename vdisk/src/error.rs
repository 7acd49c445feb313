//! Errors of a virtual disk. Doors turn them into errno (`aquifer_mount::errno`), the command line
//! into `E_` codes; nobody else interprets them.

use aquifer_formats as formats;

/// Result of anything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a disk could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A layer could not map, read or decode.
    #[error(transparent)]
    Format(#[from] formats::Error),
    /// A write to a disk that has no overlay.
    #[error("{disk}: read-only")]
    ReadOnly {
        /// Name of the disk.
        disk: String,
    },
    /// The range lies outside the disk.
    #[error("{disk}: range {offset}+{len} lies outside {size} bytes")]
    OutOfRange {
        /// Name of the disk.
        disk: String,
        /// Start in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// The overlay's file system is full; the session lives on and nothing acknowledged is lost.
    #[error("{path}: no space left for {what}")]
    NoSpace {
        /// File of the overlay.
        path: String,
        /// What needed it.
        what: String,
    },
    /// A sync failed earlier: no flush is acknowledged until the disk is re-opened and re-verified.
    #[error("{path}: an earlier sync failed ({cause}); flushes are refused until the session is restarted")]
    SyncFailed {
        /// File of the overlay.
        path: String,
        /// The first failure.
        cause: String,
    },
    /// The overlay belongs to another chain, disk size or format version.
    #[error("{path}: {what}")]
    WrongOverlay {
        /// File of the overlay.
        path: String,
        /// What differs.
        what: String,
    },
    /// Another process owns the overlay.
    #[error("{path}: in use by process {holder}")]
    Busy {
        /// File of the overlay.
        path: String,
        /// Who, as far as known.
        holder: String,
    },
    /// The source did not answer within the limit; local ranges still work.
    #[error("source away for {seconds} s while reading {offset}+{len}: {cause}")]
    SourceAway {
        /// Start in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// How long it was waited for.
        seconds: u64,
        /// The last error.
        cause: String,
    },
    /// Parts of the disk are not local yet, and what was asked needs all of it to be.
    #[error("{disk}: {absent} bytes are not local yet")]
    NotLocal {
        /// Name of the disk.
        disk: String,
        /// Bytes that are still absent.
        absent: u64,
    },
}
