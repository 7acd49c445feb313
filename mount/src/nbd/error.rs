//! What can go wrong at an NBD door or with an NBD source.

use std::io;

/// Result of anything in this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a listener, a connection or a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused or failed a call.
    #[error("{place}: {action}: {source}")]
    Io {
        /// URI or path.
        place: String,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not an address.
    #[error("{text}: not an NBD address: {why}")]
    Address {
        /// What was given.
        text: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// A listener off loopback without TLS.
    #[error("{place}: not a loopback address, and no TLS is set up")]
    TlsNeeded {
        /// The address.
        place: String,
    },
    /// Certificates or keys cannot be used, or the peer's were refused.
    #[error("{place}: TLS: {why}")]
    Tls {
        /// File or URI.
        place: String,
        /// The cause.
        why: String,
    },
    /// Something lives at the socket's path.
    #[error("{path}: {why}")]
    SocketTaken {
        /// Path of the socket.
        path: String,
        /// What was found there.
        why: &'static str,
    },
    /// An export with this name is already served, or the name is not possible.
    #[error("export {name:?}: {why}")]
    Name {
        /// The name.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// The peer broke the protocol; the connection cannot go on.
    #[error("{place}: protocol: {what}")]
    Protocol {
        /// URI of the peer.
        place: String,
        /// The rule it broke, with the values seen.
        what: String,
    },
    /// The server refused the export or an option that is needed.
    #[error("{place}: refused by the server: {what}")]
    Refused {
        /// URI of the peer.
        place: String,
        /// Its words, made safe to show.
        what: String,
    },
    /// The server answered a request with an error.
    #[error("{place}: {command} of {len} bytes at {offset}: server error {errno}{text}")]
    Remote {
        /// URI of the peer.
        place: String,
        /// `read`, `write`, ...
        command: &'static str,
        /// Start in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Error number as sent.
        errno: u32,
        /// Its words, made safe to show, with `: ` before them; often empty.
        text: String,
    },
    /// The connection is gone and could not be brought back in time.
    #[error("{place}: connection lost: {why}")]
    Lost {
        /// URI of the peer.
        place: String,
        /// The first cause.
        why: String,
    },
    /// Writes that were acknowledged, but never flushed, on a connection that was lost: a flush now would
    /// promise what nobody knows.
    #[error("{place}: connection was lost after unflushed writes; write them again")]
    FlushLost {
        /// URI of the peer.
        place: String,
    },
    /// The request cannot be sent to this export.
    #[error("{place}: {what}")]
    Impossible {
        /// URI of the peer.
        place: String,
        /// Why.
        what: String,
    },
}

impl Error {
    /// Wraps an I/O error with the place where it happened.
    pub fn io(place: impl Into<String>, action: &'static str, source: io::Error) -> Self {
        Self::Io { place: place.into(), action, source }
    }
}
