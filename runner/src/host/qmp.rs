//! A client of QEMU's machine protocol: one JSON object a line over a Unix socket.
//!
//! Invariants
//! - The hypervisor's process may have been taken over by its guest: lines, nesting (serde_json's own limit), the
//!   queue of events and every wait are bounded; no path and no command is ever taken from a reply.
//! - One command is in flight at a time. A reply is matched by its id, so one that came too late for an earlier
//!   command is never taken for that of a later one.
//! - Events that arrive while a reply is awaited are kept in order; past [`EVENTS_MAX`] the oldest go.
//!
//! Not here: which commands mean what ([`super::qemu`]).

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aquifer_mount::dial;
use serde_json::{Value, json};

/// Longest line that is read, in bytes. `query-named-block-nodes` of 64 disks stays far below.
const LINE_BYTES_MAX: usize = 4 << 20;

/// Most events that are kept for [`Qmp::event`].
const EVENTS_MAX: usize = 1024;

/// Result of a call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a command was not carried out, or may not have been.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket could not be used.
    #[error("{path}: {action}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// `connect`, `read`, `write`.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// QEMU closed the connection: it has ended, or another client took the monitor.
    #[error("{path}: closed by QEMU")]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// No answer in time; whether the command was carried out is unknown.
    #[error("{path}: no answer to {command} within {seconds} s")]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: String,
        /// How long was waited.
        seconds: u64,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {what}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of the error (`GenericError`, `DeviceNotFound` ...).
        class: String,
        /// QEMU's own words, cut.
        what: String,
    },
    /// What came back is not the protocol.
    #[error("{path}: not QMP: {what}")]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// Something QEMU reports by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `SHUTDOWN`, `STOP`, `RESUME`, `BLOCK_IO_ERROR` ...
    pub name: String,
    /// Its details.
    pub data: Value,
}

/// A connection to one monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    path: PathBuf,
    /// Bytes received and not yet taken as lines.
    pending: Vec<u8>,
    /// How much of `pending` has been searched for a line's end.
    searched: usize,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Qmp {
    /// Connects and negotiates. QEMU serves one client a socket: another one waits here until `timeout`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Timeout`], [`Error::Protocol`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        let failed = |source| Error::Io { path: path.to_path_buf(), action: "connect", source };
        let begun = Instant::now();
        let stream = match dial::unix(path, timeout) {
            Ok(stream) => stream,
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                let (command, seconds) = ("a connection".to_owned(), timeout.as_secs());
                return Err(Error::Timeout { path: path.to_path_buf(), command, seconds });
            }
            Err(e) => return Err(failed(e)),
        };
        Self::over(stream, path, timeout.saturating_sub(begun.elapsed()))
    }

    /// Negotiates over an open connection; `path` names it in messages.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub fn over(stream: UnixStream, path: &Path, timeout: Duration) -> Result<Self> {
        let mut qmp = Self {
            stream,
            path: path.to_path_buf(),
            pending: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
            next_id: 0,
        };
        let deadline = Instant::now() + timeout;
        let greeting = qmp.line_until(deadline)?.ok_or_else(|| qmp.late("the greeting", timeout))?;
        if !greeting.get("QMP").is_some_and(Value::is_object) {
            return Err(qmp.protocol("no greeting"));
        }
        qmp.execute("qmp_capabilities", json!({}), deadline.saturating_duration_since(Instant::now()))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returns.
    ///
    /// # Errors
    /// Any of [`Error`]; after [`Error::Timeout`] the command may still be carried out.
    pub fn execute(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value> {
        self.next_id += 1;
        let id = self.next_id;
        let mut text = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        text.push('\n');
        self.stream.set_write_timeout(Some(at_least_a_moment(timeout))).map_err(|e| self.io("write", e))?;
        self.stream.write_all(text.as_bytes()).map_err(|e| self.io("write", e))?;
        let deadline = Instant::now() + timeout;
        loop {
            let Some(reply) = self.line_until(deadline)? else { return Err(self.late(command, timeout)) };
            if reply.get("id").and_then(Value::as_u64) != Some(id) {
                self.keep_event(&reply);
                continue;
            }
            if let Some(value) = reply.get("return") {
                return Ok(value.clone());
            }
            let field = |name| reply.pointer(name).and_then(Value::as_str).unwrap_or("?");
            return Err(Error::Refused {
                command: command.to_owned(),
                class: cut(field("/error/class"), 64),
                what: cut(field("/error/desc"), 512),
            });
        }
    }

    /// The next event, waiting at most `timeout`; `None` when there was none.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Closed`], [`Error::Protocol`].
    pub fn event(&mut self, timeout: Duration) -> Result<Option<Event>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.line_until(deadline)? {
                Some(line) => self.keep_event(&line),
                None => return Ok(None),
            }
        }
    }

    fn keep_event(&mut self, line: &Value) {
        if let Some(name) = line.get("event").and_then(Value::as_str) {
            if self.events.len() >= EVENTS_MAX {
                self.events.pop_front();
            }
            let data = line.get("data").cloned().unwrap_or(Value::Null);
            self.events.push_back(Event { name: cut(name, 64), data });
        }
    }

    /// The next line, or `None` at the deadline.
    fn line_until(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            let fresh = self.pending.get(self.searched..).unwrap_or_default();
            if let Some(end) = fresh.iter().position(|b| *b == b'\n').map(|at| self.searched + at) {
                let rest = self.pending.split_off(end + 1);
                let line = std::mem::replace(&mut self.pending, rest);
                self.searched = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map(Some).map_err(|e| self.protocol(&format!("not JSON: {e}")));
            }
            self.searched = self.pending.len();
            if self.pending.len() >= LINE_BYTES_MAX {
                return Err(self.protocol("a line of more than 4 MiB"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && deadline <= Instant::now() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(at_least_a_moment(left))).map_err(|e| self.io("read", e))?;
            let mut piece = [0; 16 << 10];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(Error::Closed { path: self.path.clone() }),
                Ok(n) => self.pending.extend_from_slice(piece.get(..n).unwrap_or_default()),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(Error::Closed { path: self.path.clone() });
                }
                Err(e) => return Err(self.io("read", e)),
            }
        }
    }

    fn io(&self, action: &'static str, source: io::Error) -> Error {
        if source.kind() == io::ErrorKind::BrokenPipe {
            return Error::Closed { path: self.path.clone() };
        }
        Error::Io { path: self.path.clone(), action, source }
    }

    fn late(&self, command: &str, timeout: Duration) -> Error {
        Error::Timeout { path: self.path.clone(), command: command.to_owned(), seconds: timeout.as_secs() }
    }

    fn protocol(&self, what: &str) -> Error {
        Error::Protocol { path: self.path.clone(), what: what.to_owned() }
    }
}

/// A socket timeout of zero would mean "for ever".
fn at_least_a_moment(timeout: Duration) -> Duration {
    timeout.max(Duration::from_millis(1))
}

/// At most `max` bytes of text from a process that is not trusted, without control characters.
fn cut(text: &str, max: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(max).collect()
}

#[cfg(test)]
mod tests;
