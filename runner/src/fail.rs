//! How a command fails: a code, what happened, where, and a command that helps.
//!
//! Invariants
//! - [`table`] is the only place where errors of the libraries and of the operating system become
//!   codes; [`codes`] the only place where codes become exit codes.
//! - `what` and `at` are facts; `do_` is a command a person can type.
//! - As text, each of them is one line, whatever names it quotes.

mod catalogue;
mod codes;
mod errno;
mod machine;
mod table;

use std::{any::Any, fmt, io};

use serde::Serialize;

pub use codes::Code;
pub use errno::errno_name;

use crate::output::plain;

/// Result of anything a verb does.
pub type Result<T, E = Fail> = std::result::Result<T, E>;

/// Where it happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct At {
    /// File, object, URI or the place in a site file.
    pub path: String,
    /// Byte offset in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The system's own reason, with its name (`ENOSPC: no space left on device`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        if let Some(offset) = self.offset {
            write!(f, ", offset {offset}")?;
        }
        match &self.cause {
            Some(cause) => write!(f, ", {cause}"),
            None => Ok(()),
        }
    }
}

/// A command that helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// A command line; one of ours is printed with the repository and state folder of the failed one.
    Command(Box<str>),
    /// The failed command line once more, with these options added.
    Again(Box<str>),
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command(command) => f.write_str(command),
            Self::Again(options) => write!(f, "the same command with {options}"),
        }
    }
}

/// A failed command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fail {
    /// Which kind; decides the exit code.
    pub code: Code,
    /// What happened, in a sentence without a full stop.
    pub what: String,
    /// Where.
    pub at: Option<At>,
    /// A command that helps.
    pub do_: Option<Remedy>,
    /// An exit code that replaces the code's own: only for `mount --run`, which passes on its command's.
    pub exit: Option<u8>,
}

impl Fail {
    /// A failure of a kind.
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Self { code, what: what.into(), at: None, do_: None, exit: None }
    }

    /// Adds the file or URI.
    #[must_use]
    pub fn at(mut self, path: impl fmt::Display) -> Self {
        self.at.get_or_insert_default().path = path.to_string();
        self
    }

    /// Adds the byte offset.
    #[must_use]
    pub fn offset(mut self, offset: u64) -> Self {
        self.at.get_or_insert_default().offset = Some(offset);
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn cause(mut self, cause: impl fmt::Display) -> Self {
        self.at.get_or_insert_default().cause = Some(cause.to_string());
        self
    }

    /// Adds the command that helps. The first one stays: it was said closest to the cause.
    #[must_use]
    pub fn help(mut self, command: impl Into<String>) -> Self {
        self.do_.get_or_insert_with(|| Remedy::Command(command.into().into()));
        self
    }

    /// The command that helps is this one, with `options` added; with none, once more as it was.
    #[must_use]
    pub fn help_again(mut self, options: impl Into<String>) -> Self {
        self.do_.get_or_insert_with(|| Remedy::Again(options.into().into()));
        self
    }

    /// A failed call of the operating system on `path`.
    pub fn io(path: impl fmt::Display, action: &str, error: &io::Error) -> Self {
        table::from_io(&path.to_string(), action, None, error)
    }

    /// A fault of our own.
    pub(crate) fn from_panic(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        Self::new(Code::Bug, text.unwrap_or_else(|| "a thread ended without a message".into()))
            .help(format!("aquifer explain {}", Code::Bug.name()))
    }

    /// The exit code.
    pub fn exit(&self) -> u8 {
        self.exit.unwrap_or(self.code.exit())
    }
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A file with several problems has a line for each; everything else is one line, whatever it quotes.
        let what: Vec<_> = match self.code {
            Code::Config => self.what.lines().map(plain).collect(),
            _ => vec![plain(&self.what)],
        };
        write!(f, "{}: {}", self.code.name(), what.join("\n"))?;
        if let Some(at) = &self.at {
            write!(f, "\n  at: {}", plain(&at.to_string()))?;
        }
        if let Some(remedy) = &self.do_ {
            write!(f, "\n  do: {}", plain(&remedy.to_string()))?;
        }
        Ok(())
    }
}

/// The same as the last line of `--json`.
#[derive(Serialize)]
pub(crate) struct FailRecord<'a> {
    pub(crate) code: &'static str,
    pub(crate) exit: u8,
    pub(crate) what: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at: Option<&'a At>,
    #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
    pub(crate) do_: Option<String>,
    pub(crate) retryable: bool,
}

impl<'a> From<&'a Fail> for FailRecord<'a> {
    fn from(fail: &'a Fail) -> Self {
        Self {
            code: fail.code.name(),
            exit: fail.exit(),
            what: &fail.what,
            at: fail.at.as_ref(),
            do_: fail.do_.as_ref().map(ToString::to_string),
            retryable: fail.code.retryable(),
        }
    }
}

#[cfg(test)]
mod tests;
