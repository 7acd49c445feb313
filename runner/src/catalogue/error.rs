//! What a catalogue can fail with.

use std::io;

/// A failed call of a catalogue. Nothing was changed, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder or the threads of the catalogue.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// File or folder.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The server does not answer, or the connection broke.
    #[error("{url} cannot be reached: {what}")]
    Unreachable {
        /// The catalogue, without its password.
        url: String,
        /// What was seen.
        what: String,
    },
    /// The server refuses this user.
    #[error("{url} refuses access: {what}")]
    Access {
        /// The catalogue, without its password.
        url: String,
        /// What was seen.
        what: String,
    },
    /// The database is there and is not a catalogue of ours.
    #[error("{url} is not a catalogue: {what}")]
    Foreign {
        /// The catalogue, without its password.
        url: String,
        /// What it is instead.
        what: String,
    },
    /// The catalogue was made by a newer build.
    #[error("{url} has form {found}; this build knows forms up to {known}")]
    TooNew {
        /// The catalogue, without its password.
        url: String,
        /// Its form.
        found: i64,
        /// The newest form that is known here.
        known: i64,
    },
    /// What is stored contradicts itself.
    #[error("{url} is damaged: {what}")]
    Damaged {
        /// The catalogue, without its password.
        url: String,
        /// What was seen.
        what: String,
    },
    /// No space is left for the catalogue.
    #[error("no space is left for {url}: {what}")]
    Full {
        /// The catalogue, without its password.
        url: String,
        /// What was seen.
        what: String,
    },
    /// The database refused a statement.
    #[error("{url} could not {action}: {what}")]
    Database {
        /// The catalogue, without its password.
        url: String,
        /// What was tried.
        action: &'static str,
        /// What was seen.
        what: String,
    },
    /// The lease on a piece of work is not held any more: somebody else has it, or it has ended.
    #[error("work {work} is not ours any more (epoch {epoch}): {now}")]
    Fenced {
        /// The work.
        work: i64,
        /// The epoch that was presented.
        epoch: i64,
        /// How it stands now.
        now: String,
    },
    /// Another operation holds the object.
    #[error("{what} is held by {holder}")]
    Busy {
        /// What was wanted.
        what: String,
        /// Who has it.
        holder: String,
    },
    /// A record was changed since it was read.
    #[error("{what} was changed by somebody else (revision {have}, now {now})")]
    Stale {
        /// The record.
        what: String,
        /// The revision that was presented.
        have: i64,
        /// The revision that is stored.
        now: i64,
    },
    /// There is no such record.
    #[error("there is no {what}")]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// The operation is not possible in the present state.
    #[error("{what} is {have}; this needs {need}")]
    State {
        /// The record.
        what: String,
        /// Its state.
        have: String,
        /// The states that allow it.
        need: &'static str,
    },
}

/// Result of a call of a catalogue.
pub type Result<T, E = Error> = std::result::Result<T, E>;
