//! Errors of a repository.
//!
//! Invariants
//! - A caller tells *no such thing*, *in use*, *not allowed* and *damaged* apart by matching.

use crate::error as formats;

/// Result of anything in this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a repository could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or a layer could not be read or written, or is damaged.
    #[error(transparent)]
    Format(#[from] formats::Error),
    /// There is no repository here.
    #[error("{path}: no repository: {what}")]
    NoRepository {
        /// The folder.
        path: String,
        /// What is missing.
        what: String,
    },
    /// No machine, point or disk answers to that name.
    #[error("{path}: no {what}")]
    NotFound {
        /// Where it was looked for.
        path: String,
        /// Kind and name: `machine db01`, `point latest~9 of db01`.
        what: String,
    },
    /// More than one answers to that name.
    #[error("{path}: {what} is ambiguous: {}", candidates.join(", "))]
    Ambiguous {
        /// Where it was looked for.
        path: String,
        /// Kind and name.
        what: String,
        /// What it could be.
        candidates: Vec<String>,
    },
    /// The name exists already: somebody else was first.
    #[error("{path}: exists already")]
    Exists {
        /// The object.
        path: String,
    },
    /// Somebody holds it.
    #[error("{path}: held by {holder} ({kind}) since {since}")]
    Locked {
        /// The machine or point.
        path: String,
        /// Who: name, host, process, session.
        holder: String,
        /// `append` or `read`.
        kind: &'static str,
        /// RFC 3339.
        since: String,
    },
    /// Another controller owns the repository; it is open for reading only.
    #[error("{path}: belongs to {owner}; read-only until it is taken over")]
    ForeignOwner {
        /// The repository.
        path: String,
        /// Who owns it.
        owner: String,
    },
    /// The point cannot be used in its state.
    #[error("{path}: the point is {state}: {why}")]
    PointState {
        /// The point.
        path: String,
        /// `incomplete`, `missing`, `corrupted`.
        state: &'static str,
        /// What is wrong.
        why: String,
    },
    /// What is stored contradicts what was seen before: an old or mixed manifest was put back.
    #[error("{path}: older than what was seen before: {what}")]
    RolledBack {
        /// The manifest.
        path: String,
        /// What was seen and what is there.
        what: String,
    },
    /// The folder's file system does not keep the promises a repository stands on.
    #[error("{path}: this file system cannot hold a repository: {what}")]
    Unsafe {
        /// The folder.
        path: String,
        /// Which promise.
        what: String,
    },
}

impl Error {
    pub(super) fn not_found(path: &str, what: impl Into<String>) -> Self {
        Self::NotFound { path: path.into(), what: what.into() }
    }
}
