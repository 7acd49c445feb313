//! The agent inside a guest: asked to settle its file systems for the moment in which a point is taken, and whatever else
//! its host may ask.
//!
//! Invariants
//! - The guest is not trusted: lines and waits are bounded, nothing it says becomes a path or a command.
//! - Whoever freezes holds a [`Frozen`], and dropping it thaws; a guard process thaws for one that is killed.
//!
//! Not here: what is done while it is frozen.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aquifer_mount::dial;
use serde_json::{Value, json};

/// Longest answer that is read, bytes.
const LINE_BYTES_MAX: usize = 64 << 10;

/// How long an agent may take to say that it is there.
const HELLO: Duration = Duration::from_secs(3);

/// How long a freeze may take: applications are told, and write what they have.
const FREEZE: Duration = Duration::from_secs(60);

/// How long a thaw may take.
const THAW: Duration = Duration::from_secs(20);

/// A connection to an agent.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    pending: Vec<u8>,
    path: PathBuf,
}

/// A guest whose file systems are frozen.
#[derive(Debug)]
pub struct Frozen {
    agent: Option<Agent>,
    /// File systems that were.
    pub count: u64,
}

impl Agent {
    /// Connects, and sees that an agent answers.
    ///
    /// # Errors
    /// Nobody listens, or nobody answers in time.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::connect_within(path, HELLO)
    }

    fn connect_within(path: &Path, patience: Duration) -> io::Result<Self> {
        let stream = dial::unix(path, patience)?;
        let mut agent = Self { stream, pending: Vec::new(), path: path.to_path_buf() };
        // What an earlier client left unread comes first; the number tells ours from that.
        let number = u64::from(uuid::Uuid::new_v4().as_fields().0);
        agent.send(&json!({ "execute": "guest-sync", "arguments": { "id": number } }))?;
        let deadline = Instant::now() + patience;
        loop {
            match agent.line(deadline)?.get("return").and_then(Value::as_u64) {
                Some(answer) if answer == number => return Ok(agent),
                _ => {}
            }
        }
    }

    /// Freezes the guest's file systems.
    ///
    /// # Errors
    /// The guest refuses, or does not answer in time; it is told to thaw then, and nothing is frozen that answered.
    pub fn freeze(mut self) -> io::Result<Frozen> {
        match self.call("guest-fsfreeze-freeze", FREEZE) {
            Ok(count) => Ok(Frozen { agent: Some(self), count: count.as_u64().unwrap_or(0) }),
            Err(error) => {
                // It may have frozen some, or be late.
                let _ = self.call("guest-fsfreeze-thaw", THAW);
                Err(error)
            }
        }
    }

    fn call(&mut self, command: &str, patience: Duration) -> io::Result<Value> {
        self.ask(command, &json!({}), patience)
    }

    /// Gives an order with arguments, and waits for its answer.
    ///
    /// # Errors
    /// The guest refuses, or does not answer in time.
    pub fn ask(&mut self, command: &str, arguments: &Value, patience: Duration) -> io::Result<Value> {
        let mut order = json!({ "execute": command });
        if arguments.as_object().is_some_and(|named| !named.is_empty()) {
            order["arguments"] = arguments.clone();
        }
        self.send(&order)?;
        let answer = self.line(Instant::now() + patience)?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => {
                let said = answer.pointer("/error/desc").and_then(Value::as_str).unwrap_or("no reason");
                let said: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
                Err(io::Error::other(format!("the guest's agent refused {command}: {said}")))
            }
        }
    }

    fn send(&mut self, command: &Value) -> io::Result<()> {
        self.stream.set_write_timeout(Some(HELLO))?;
        self.stream.write_all(format!("{command}\n").as_bytes())
    }

    /// The next line that is JSON.
    fn line(&mut self, deadline: Instant) -> io::Result<Value> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let rest = self.pending.split_off(end + 1);
                let line = std::mem::replace(&mut self.pending, rest);
                // An agent answers a delimited sync with a byte that no text has.
                let text: Vec<u8> = line.into_iter().filter(|byte| *byte != 0xff).collect();
                match serde_json::from_slice(&text) {
                    Ok(value) => return Ok(value),
                    Err(_) => continue,
                }
            }
            if self.pending.len() >= LINE_BYTES_MAX {
                return Err(io::Error::other("the guest's agent says too much"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let what = format!("the guest's agent does not answer at {}", self.path.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.pending.extend_from_slice(piece.get(..n).unwrap_or_default()),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl Frozen {
    /// Lets the guest go on.
    ///
    /// # Errors
    /// It did not say that it does; a guest thaws by itself after some time in most systems.
    pub fn thaw(mut self) -> io::Result<()> {
        match self.agent.take() {
            Some(mut agent) => agent.call("guest-fsfreeze-thaw", THAW).map(drop),
            None => Ok(()),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.call("guest-fsfreeze-thaw", THAW);
        }
    }
}

/// Thaws a guest that somebody else may have left frozen, or in the middle of being frozen: an agent that freezes
/// answers nobody before it has.
///
/// # Errors
/// As [`Agent::connect`]; the guest refuses.
pub fn thaw(path: &Path) -> io::Result<()> {
    Agent::connect_within(path, FREEZE)?.call("guest-fsfreeze-thaw", THAW).map(drop)
}
