//! Why a session could not do what was asked.

use std::{io, path::Path};

use super::State;

/// Result of anything in this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of a recovery session. The command line turns them into `E_` codes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the session or a call on it.
    #[error("{path}: {action}: {source}")]
    Io {
        /// File, folder or socket.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not legal in the session's present state; nothing was changed.
    #[error("session is {have}, which allows {allowed:?}; this needs {need:?}")]
    State {
        /// Present state.
        have: State,
        /// States the request would be legal in.
        need: Vec<State>,
        /// States that may follow the present one.
        allowed: Vec<State>,
    },
    /// Another process owns the session.
    #[error("{path}: in use by process {holder}")]
    Busy {
        /// The lock file.
        path: String,
        /// Process id, or `unknown`.
        holder: String,
    },
    /// A file of the session that does not say what it must.
    #[error("{path}: {what}")]
    BadFile {
        /// The file.
        path: String,
        /// Which rule is broken.
        what: String,
    },
    /// A path that the address of a Unix socket cannot hold.
    #[error("{path}: {len} bytes are too long for a socket address, which holds {max}")]
    SocketPath {
        /// The path.
        path: String,
        /// Its length in bytes.
        len: usize,
        /// What fits, in bytes.
        max: usize,
    },
    /// The chain found now is not the one the session was started on.
    #[error("disk {disk}: the session was started on chain {expected}, the source is now {found}")]
    OtherChain {
        /// Name of the disk.
        disk: String,
        /// Fingerprint in the session's record, hexadecimal.
        expected: String,
        /// Fingerprint found, hexadecimal.
        found: String,
    },
    /// No session of that name or id.
    #[error("no session `{name}`")]
    NoSession {
        /// What was asked for.
        name: String,
    },
    /// Several sessions fit.
    #[error("`{name}` fits several sessions: {}", fits.join(", "))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// Ids that fit.
        fits: Vec<String>,
    },
    /// The request needs the door, and no process serves it.
    #[error("{path}: door not running")]
    NotRunning {
        /// Session folder.
        path: String,
    },
    /// The door refused or failed a request.
    #[error("{what}")]
    Door {
        /// Machine-readable reason, such as `E_STATE`.
        code: String,
        /// The door's words.
        what: String,
    },
    /// The door answered something this build does not understand, or did not answer in time.
    #[error("{path}: {what}")]
    Protocol {
        /// The socket.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// The session has no disk of that name.
    #[error("no disk `{name}` in this session")]
    NoDisk {
        /// What was asked for.
        name: String,
    },
    /// Clients are connected, and they were to be respected.
    #[error("{connections} NBD clients connected, {files}")]
    Clients {
        /// NBD connections.
        connections: u64,
        /// Whether files are open.
        files: &'static str,
    },
    /// The disk, its chain or its overlay.
    #[error(transparent)]
    Disk(#[from] aquifer_vdisk::Error),
    /// The NBD door.
    #[error(transparent)]
    Nbd(#[from] crate::nbd::Error),
    /// The FUSE door.
    #[error(transparent)]
    Fuse(#[from] crate::fuse::Error),
    /// The door keeps dying.
    #[error("door ended {times} times within {seconds} s, last {how}: see {log}")]
    KeepsDying {
        /// Number of ends.
        times: usize,
        /// Over how long.
        seconds: u64,
        /// How it ended last.
        how: String,
        /// Where its words are.
        log: String,
    },
}

impl Error {
    /// Wraps an I/O error with the path and the action.
    pub fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.display().to_string(), action, source }
    }

    /// A file that breaks a rule.
    pub fn bad_file(path: &Path, what: impl Into<String>) -> Self {
        Self::BadFile { path: path.display().to_string(), what: what.into() }
    }

    /// The stable code of this error, as the control socket and the command line give it.
    pub fn code(&self) -> &str {
        use aquifer_vdisk::Error as Disk;
        match self {
            Self::State { .. } | Self::NotRunning { .. } | Self::Disk(Disk::NotLocal { .. }) => "E_STATE",
            Self::Busy { .. } | Self::Clients { .. } | Self::Disk(Disk::Busy { .. }) => "E_BUSY",
            Self::BadFile { .. } => "E_CORRUPT",
            Self::SocketPath { .. } | Self::OtherChain { .. } | Self::Disk(Disk::WrongOverlay { .. }) => "E_REFUSED",
            Self::NoSession { .. } | Self::NoDisk { .. } => "E_NOT_FOUND",
            Self::Ambiguous { .. } => "E_AMBIGUOUS",
            Self::Door { code, .. } => code,
            Self::Protocol { .. } => "E_NET",
            Self::Disk(Disk::NoSpace { .. }) => "E_CAPACITY",
            Self::Disk(Disk::SourceAway { .. }) => "E_REPO_OFFLINE",
            Self::Io { .. } | Self::Disk(_) | Self::Nbd(_) | Self::Fuse(_) => "E_IO",
            Self::KeepsDying { .. } => "E_FAILED",
        }
    }
}
