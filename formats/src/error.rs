//! Errors of the formats, each naming the file and, where there is one, the byte offset.
//!
//! Invariants
//! - A caller can tell *damage* ([`Error::is_damage`]) from *away* (I/O) from *refused* by matching.
//! - Text is lowercase, without a full stop; the remedy is added by whoever talks to a person.

use std::io;

/// Result of anything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why bytes could not be turned into a disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system or the network refused or failed a call.
    #[error("{path}: {action} at offset {offset}: {source}")]
    Io {
        /// File, object or URI.
        path: String,
        /// What was tried: `read`, `write`, `sync`, `open`.
        action: &'static str,
        /// Byte offset in that file; 0 where it has no meaning.
        offset: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A structure contradicts its format.
    #[error("{path}: offset {offset}: {what}")]
    Corrupt {
        /// File, object or URI.
        path: String,
        /// Byte offset of the structure.
        offset: u64,
        /// Which rule is broken, with the values seen.
        what: String,
    },
    /// Stored bytes do not match their checksum, or a block does not decode to its declared size.
    #[error("{path}: offset {offset}: block of {len} bytes is damaged: {what}")]
    BadBlock {
        /// File, object or URI.
        path: String,
        /// Byte offset of the stored block.
        offset: u64,
        /// Stored length in bytes.
        len: u64,
        /// `checksum`, `decode`, `identity` ... with the values seen.
        what: String,
    },
    /// The file ends before something it declares.
    #[error("{path}: file ends at {len}, but {what} needs {need} bytes")]
    Truncated {
        /// File, object or URI.
        path: String,
        /// Actual length in bytes.
        len: u64,
        /// Length that would be needed, in bytes.
        need: u64,
        /// What lies there.
        what: String,
    },
    /// A layer the chain needs is not there, or is not the one it was built on.
    #[error("{path}: {what}")]
    ChainBroken {
        /// The file that is missing or wrong.
        path: String,
        /// What was expected.
        what: String,
    },
    /// Valid, but not something this build reads.
    #[error("{path}: not supported: {what}")]
    Unsupported {
        /// File, object or URI.
        path: String,
        /// The feature, by name.
        what: String,
    },
    /// Policy forbids it: a path outside the allowed folders, a format that would have to be guessed.
    #[error("{path}: refused: {what}")]
    Refused {
        /// File, object or URI.
        path: String,
        /// Why.
        what: String,
    },
    /// Needs a key that is missing or wrong.
    #[error("{path}: key needed: {what}")]
    Key {
        /// File, object or URI.
        path: String,
        /// Which key.
        what: String,
    },
    /// The range lies outside the disk or the file.
    #[error("{path}: range {offset}+{len} lies outside {size} bytes")]
    OutOfRange {
        /// Disk or file.
        path: String,
        /// Start of the range in bytes.
        offset: u64,
        /// Length of the range in bytes.
        len: u64,
        /// Size of the disk or file in bytes.
        size: u64,
    },
}

impl Error {
    /// Wraps an I/O error with the place where it happened. One that holds an error of this kind already (the bytes
    /// come out of another format) is taken for that: damage further in stays damage.
    pub fn io(path: impl Into<String>, action: &'static str, offset: u64, source: io::Error) -> Self {
        match source.downcast::<Self>() {
            Ok(inner) => inner,
            Err(source) => Self::Io { path: path.into(), action, offset, source },
        }
    }

    /// A broken rule of a format.
    pub fn corrupt(path: impl Into<String>, offset: u64, what: impl Into<String>) -> Self {
        Self::Corrupt { path: path.into(), offset, what: what.into() }
    }

    /// A readable file with a feature this build does not read.
    pub fn unsupported(path: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Unsupported { path: path.into(), what: what.into() }
    }

    /// True where stored bytes are wrong for good: reading again will not help.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::BadBlock { .. } | Self::Truncated { .. } | Self::ChainBroken { .. })
    }
}
