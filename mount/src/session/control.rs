//! Orders to a door: one JSON object per line over `control.sock`, one answer per order.
//!
//! Invariants
//! - Lines are bounded before they are parsed, in both directions.
//! - Every message carries the protocol's version; an unknown one is answered with an error, not guessed.
//! - Only the door's own user and root are heard.
//!
//! Not here: what the orders do (`serve`), who may give them beyond the socket's owner.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Error, Result, Status};

/// Version of the messages.
pub const CONTROL_VERSION: u32 = 1;

/// Longest order, in bytes.
pub const REQUEST_BYTES_MAX: u64 = 64 << 10;

/// Longest answer, in bytes.
pub const ANSWER_BYTES_MAX: u64 = 8 << 20;

/// An order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How does it stand?
    Status,
    /// Change limits of hydration.
    Set {
        /// Bytes per second.
        #[serde(default)]
        rate: Setting<u64>,
        /// When everything is to be local.
        #[serde(default)]
        ready_by: Setting<Timestamp>,
    },
    /// Hold hydration back.
    Pause,
    /// Let hydration go on (or begin, where it was to be asked for).
    Resume,
    /// Empty the journal: `disk.raw` becomes the whole truth for a disk that is all local, and stays it.
    Drain {
        /// Which disk; all of them where absent.
        #[serde(default)]
        disk: Option<String>,
    },
    /// Somebody else (the hypervisor) writes `disk.raw` from now on.
    HandOver {
        /// Which disk.
        disk: String,
    },
    /// Close the source for good; refused while anything is absent.
    DetachSource,
    /// End the door in order.
    Stop {
        /// What to do about connected clients.
        clients: Clients,
    },
    /// An order to the runner's part of the process.
    Call {
        /// Its name.
        name: String,
        /// Its arguments.
        #[serde(default)]
        args: serde_json::Value,
    },
}

/// What a value is to become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Setting<T> {
    /// What it is.
    #[default]
    Keep,
    /// No value.
    Clear,
    /// This.
    To(T),
}

impl<T: Copy> Setting<T> {
    /// The value after the change.
    pub fn apply(self, old: Option<T>) -> Option<T> {
        match self {
            Self::Keep => old,
            Self::Clear => None,
            Self::To(value) => Some(value),
        }
    }
}

/// What ending the door does about connected clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clients {
    /// Refuse to stop while there are any.
    Respect,
    /// Finish what they have asked, then disconnect them.
    Disconnect,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done.
    Done,
    /// How it stands.
    Status(Box<Status>),
    /// What the runner's part says.
    Value(serde_json::Value),
    /// Refused or failed.
    Error {
        /// Stable code.
        code: String,
        /// In words.
        what: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    body: T,
}

/// One end of a control connection.
#[derive(Debug)]
pub struct Wire {
    stream: BufReader<UnixStream>,
    label: String,
    bytes_max: u64,
}

impl Wire {
    /// The end that asks.
    pub fn asking(stream: UnixStream, socket: &Path) -> Self {
        Self { stream: BufReader::new(stream), label: socket.display().to_string(), bytes_max: ANSWER_BYTES_MAX }
    }

    /// The end that answers.
    pub fn answering(stream: UnixStream, socket: &Path) -> Self {
        Self { stream: BufReader::new(stream), label: socket.display().to_string(), bytes_max: REQUEST_BYTES_MAX }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Protocol`].
    pub fn send<T: Serialize>(&mut self, body: &T) -> Result<()> {
        let envelope = Envelope { version: CONTROL_VERSION, body };
        let mut line = serde_json::to_vec(&envelope).map_err(|e| self.broken(e.to_string()))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(|e| self.failed("send", e))
    }

    /// Receives a message; `None` at an orderly end.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Protocol`] for anything that is not one whole message of this version.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.stream).take(self.bytes_max);
        let read = bounded.read_until(b'\n', &mut line);
        let len = read.map_err(|e| self.failed("receive", e))?;
        if len == 0 {
            return Ok(None);
        }
        if line.last() != Some(&b'\n') {
            return Err(self.broken(format!("message cut or longer than {} bytes", self.bytes_max)));
        }
        // The version first: the body of another version need not parse.
        let envelope: Envelope<serde_json::Value> =
            serde_json::from_slice(&line).map_err(|e| self.broken(format!("not a message: {e}")))?;
        if envelope.version != CONTROL_VERSION {
            return Err(self.broken(format!("version {}; this build speaks {CONTROL_VERSION}", envelope.version)));
        }
        serde_json::from_value(envelope.body).map(Some).map_err(|e| self.broken(format!("not understood: {e}")))
    }

    fn broken(&self, what: String) -> Error {
        Error::Protocol { path: self.label.clone(), what }
    }

    fn failed(&self, action: &'static str, source: io::Error) -> Error {
        Error::Io { path: self.label.clone(), action, source }
    }
}

#[cfg(test)]
mod tests;
