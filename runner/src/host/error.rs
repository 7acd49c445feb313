//! Why a hypervisor did not do what was asked.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{Power, qmp};

/// Result of anything a host does.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong on a host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program or firmware file that is needed is not there.
    #[error("{what} is not installed (looked for {looked})")]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        looked: String,
    },
    /// The machine asks for something this host cannot give.
    #[error("{what}")]
    Shape {
        /// What, and the limit.
        what: String,
    },
    /// No firmware here has variables of that length.
    #[error("no UEFI firmware here keeps its variables in {bytes} bytes")]
    Variables {
        /// Their length.
        bytes: u64,
    },
    /// A file or process call failed.
    #[error("{path}: {action}: {source}")]
    Io {
        /// File, socket or program.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The hypervisor ended before the machine ran.
    #[error("{program} ended at its start ({status}): {said}")]
    Start {
        /// The program.
        program: String,
        /// Its exit status.
        status: String,
        /// The end of what it said.
        said: String,
    },
    /// The monitor refused or failed.
    #[error(transparent)]
    Monitor(#[from] qmp::Error),
    /// What was observed after a command is not what it should have brought about.
    #[error("{what}: expected {expected}, found {found}")]
    Observed {
        /// What was looked at.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The machine is not in the state this needs.
    #[error("the machine is {have:?}")]
    Power {
        /// How it fares.
        have: Power,
    },
}

impl Error {
    /// A failed call on `path`.
    pub(crate) fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), action, source }
    }
}
