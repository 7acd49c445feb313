//! The only module that prints. Data goes to stdout, talk to stderr.
//!
//! Invariants
//! - With `--json`, each line of stdout is one object `{"schema":"aquifer.<verb>/1","type":...}`; the
//!   last one is `done` or `error`.
//! - Warnings are kept and listed once more at the end of human output.
//! - A reader that has gone away (`| head`) ends the printing, not the work.
//! - No text from elsewhere is obeyed by a terminal: see [`plain`].
//! - Every error ends with a command that helps; commands of ours are printed ready to be typed.
//! - Colour and carriage returns only on a terminal, never under `NO_COLOR`.
//!
//! Not here: what is worth saying (the verbs), units (`units`).

mod log;
mod plain;
mod progress;

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, IsTerminal, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use serde::Serialize;
use serde_json::{Map, Value};

pub(crate) use log::begin as begin_log;
pub(crate) use plain::is_obeyed;
pub use plain::plain;
pub use progress::Progress;

use crate::fail::{At, Code, Fail, FailRecord, Remedy};

/// Rows of a table are written in pieces of about this many bytes.
const TABLE_BYTES: usize = 64 << 10;

/// The form of stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Tables and sentences.
    Human,
    /// JSON lines.
    Json,
}

/// Something that went another way than asked, though the command goes on.
#[derive(Clone, Debug)]
struct Warning {
    code: Code,
    what: String,
}

/// One line of `--json`.
#[derive(Serialize)]
struct Line<'a, T> {
    schema: String,
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(flatten)]
    fields: &'a T,
}

/// The command line that is answered, as commands that it advises begin.
#[derive(Clone, Debug)]
pub struct Typed {
    /// `aquifer`, with the repository, site file and state folder that were named, quoted for a shell.
    pub program: String,
    /// The whole command line, quoted for a shell.
    pub line: String,
}

impl Default for Typed {
    fn default() -> Self {
        Self { program: "aquifer".into(), line: "aquifer".into() }
    }
}

/// Where a verb prints.
#[derive(Debug)]
pub struct Output {
    form: Form,
    verb: &'static str,
    typed: Typed,
    quiet: bool,
    terminal: bool,
    colour: bool,
    warnings: Mutex<Vec<Warning>>,
    /// Fields a verb adds to the closing `done` line.
    closing: Mutex<Map<String, Value>>,
    next: Mutex<Option<String>>,
    reader_gone: AtomicBool,
}

impl Output {
    /// Output of `verb`; looks at stderr and `NO_COLOR` once.
    pub fn new(form: Form, verb: &'static str) -> Self {
        let terminal = io::stderr().is_terminal();
        Self {
            form,
            verb,
            typed: Typed::default(),
            quiet: false,
            terminal,
            colour: terminal && crate::context::no_color_is_unset(),
            warnings: Mutex::default(),
            closing: Mutex::default(),
            next: Mutex::default(),
            reader_gone: AtomicBool::new(false),
        }
    }

    /// The same, with talk kept to warnings and errors.
    #[must_use]
    pub fn quiet(mut self, quiet: bool) -> Self {
        self.quiet = quiet;
        self
    }

    /// The same, answering this command line.
    #[must_use]
    pub fn answering(mut self, typed: Typed) -> Self {
        self.typed = typed;
        self
    }

    /// The verb that prints.
    pub fn verb(&self) -> &'static str {
        self.verb
    }

    /// Which form stdout has.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Whether a person watches stderr.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// One object on stdout with `--json`; nothing in human form. `fields` is a struct or a map.
    pub fn record(&self, kind: &str, fields: &impl Serialize) {
        if self.form == Form::Json {
            self.json(kind, fields);
        }
    }

    /// A line of human data on stdout, one line whatever names are in it; nothing with `--json`.
    pub fn line(&self, text: impl fmt::Display) {
        if self.form == Form::Human {
            self.stdout(&format!("{}\n", plain(&text.to_string())));
        }
    }

    /// Several lines of human data, as they are; names in them have to be [`plain`].
    pub fn lines(&self, text: impl fmt::Display) {
        if self.form == Form::Human {
            self.stdout(&format!("{}\n", plain::lines(&text.to_string())));
        }
    }

    /// Rows of a table that may be long: records or lines, written together.
    pub fn table<T: Serialize + fmt::Display>(&self, kind: &str, rows: impl Iterator<Item = T>) {
        let mut text = String::new();
        for row in rows {
            match self.form {
                Form::Human => text.push_str(&format!("{}\n", plain(&row.to_string()))),
                Form::Json => text.push_str(&self.json_line(kind, &row).unwrap_or_default()),
            }
            if text.len() >= TABLE_BYTES {
                self.stdout(&text);
                text.clear();
            }
        }
        if !text.is_empty() {
            self.stdout(&text);
        }
    }

    /// Text that is data in both forms: help, man pages, completions.
    pub fn text(&self, kind: &str, text: &str) {
        match self.form {
            Form::Human => self.stdout(text),
            Form::Json => self.json(kind, &BTreeMap::from([("text", text)])),
        }
    }

    /// A line of talk on stderr, in both forms; one line whatever names are in it.
    pub fn say(&self, text: impl fmt::Display) {
        if !self.quiet {
            self.stderr(&format!("{}\n", plain(&text.to_string())));
        }
    }

    /// Several lines of talk, as they are; names in them have to be [`plain`].
    pub fn say_lines(&self, text: impl fmt::Display) {
        if !self.quiet {
            self.stderr(&format!("{}\n", plain::lines(&text.to_string())));
        }
    }

    /// A screen of text in place of the one before, for a person who watches.
    pub fn screen(&self, text: &str) {
        // Home, the text, and nothing of the last one around it.
        self.stderr(&format!("\x1b[H\x1b[2J{}\n", plain::lines(text)));
    }

    /// A warning: said at once, counted, listed at the end, exit code 1.
    pub fn warn(&self, code: Code, what: impl Into<String>, do_: Option<&str>) {
        let what = what.into();
        // What is wrong with these is the same wherever it is told.
        let is_explained = matches!(code, Code::WarnResync | Code::WarnDiskGone);
        let explained = is_explained.then(|| format!("aquifer explain {}", code.name()));
        let do_ = do_.or(explained.as_deref()).map(|command| self.ready(command));
        self.stderr(&format!("{}: {}\n", self.paint("33", code.name()), plain(&what)));
        if let Some(command) = &do_ {
            self.stderr(&format!("  do: {}\n", plain(command)));
        }
        #[derive(Serialize)]
        struct Fields<'a> {
            code: &'static str,
            what: &'a str,
            #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
            do_: Option<&'a str>,
        }
        self.record("warning", &Fields { code: code.name(), what: &what, do_: do_.as_deref() });
        self.warnings.lock().push(Warning { code, what });
    }

    /// The command to type next, printed after a success in human form.
    pub fn next(&self, command: impl Into<String>) {
        *self.next.lock() = Some(command.into());
    }

    /// The command to type next, at once: for verbs that go on serving.
    pub fn next_now(&self, command: &str) {
        if self.form == Form::Human {
            self.say(format_args!("next: {}", self.ready(command)));
        }
    }

    /// A command of ours with the repository, site file and state folder that this one was given; any
    /// other as it is.
    pub fn ready(&self, command: &str) -> String {
        match command.strip_prefix("aquifer ").filter(|rest| !rest.starts_with('-')) {
            Some(rest) => format!("{} {rest}", self.typed.program),
            None => command.to_owned(),
        }
    }

    /// The failure with its remedy ready to be typed; where nobody knew one, the explanation of its code.
    fn with_remedy(&self, mut fail: Fail) -> Fail {
        let command = match fail.do_.take() {
            Some(Remedy::Command(command)) => self.ready(&command),
            Some(Remedy::Again(options)) => format!("{} {options}", self.typed.line).trim_end().to_owned(),
            None => format!("aquifer explain {}", fail.code.name()),
        };
        Fail { do_: Some(Remedy::Command(command.into())), ..fail }
    }

    /// Adds a field to the closing `done` line.
    pub fn closing(&self, key: &str, value: impl Into<Value>) {
        self.closing.lock().insert(key.to_owned(), value.into());
    }

    /// Begins a phase of work: a bar on a terminal, plain lines in a log, records with `--json`.
    pub fn progress(&self, phase: &'static str, total_bytes: Option<u64>) -> Progress<'_> {
        Progress::begin(self, phase, total_bytes)
    }

    /// Prints the end of the command and gives its exit code.
    pub fn finish(&self, outcome: Result<(), Fail>, strict: bool) -> u8 {
        match outcome {
            Ok(()) => self.finish_done(strict),
            Err(fail) => {
                let fail = self.with_remedy(fail);
                if fail.exit.is_none() {
                    let text = fail.to_string();
                    let rest = text.strip_prefix(fail.code.name()).unwrap_or(&text);
                    self.stderr(&format!("{}{rest}\n", self.paint("31", fail.code.name())));
                }
                self.record("error", &FailRecord::from(&fail));
                fail.exit()
            }
        }
    }

    fn finish_done(&self, strict: bool) -> u8 {
        let warnings = std::mem::take(&mut *self.warnings.lock());
        let mut closing = std::mem::take(&mut *self.closing.lock());
        let wanted = closing.get("exit").and_then(Value::as_u64).and_then(|e| u8::try_from(e).ok());
        let exit = match (wanted, warnings.is_empty()) {
            (Some(exit), _) if exit > 1 => exit,
            // A service that was asked to end has told its warnings when they came; its end is not one of them.
            (Some(0), _) if !strict => 0,
            (_, true) => 0,
            (_, false) if strict => 2,
            (_, false) => 1,
        };
        if warnings.len() > 1 {
            self.stderr(&format!("{} warnings:\n", warnings.len()));
            for warning in &warnings {
                self.stderr(&format!("  {}: {}\n", warning.code.name(), plain(&warning.what)));
            }
        }
        if let Some(next) = self.next.lock().take() {
            self.next_now(&next);
        }
        closing.insert("exit".into(), exit.into());
        closing.insert("warnings".into(), warnings.len().into());
        if self.form == Form::Json {
            self.json("done", &closing);
        }
        exit
    }

    fn json(&self, kind: &str, fields: &impl Serialize) {
        if let Some(line) = self.json_line(kind, fields) {
            self.stdout(&line);
        }
    }

    fn json_line(&self, kind: &str, fields: &impl Serialize) -> Option<String> {
        let line = Line { schema: format!("aquifer.{}/1", self.verb), kind, fields };
        match serde_json::to_string(&line) {
            Ok(text) => Some(format!("{}\n", plain::json(&text))),
            // Only a record that is no map can fail, and no verb has one; say so rather than lose it.
            Err(error) => {
                self.stderr(&format!("a {kind} record cannot be printed: {error}\n"));
                None
            }
        }
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colour { format!("\x1b[1;{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn stdout(&self, text: &str) {
        if self.reader_gone.load(Ordering::Relaxed) {
            return;
        }
        let mut out = io::stdout().lock();
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            self.reader_gone.store(true, Ordering::Relaxed);
        }
    }

    fn stderr(&self, text: &str) {
        // A log that has gone away must not end the work, and there is nowhere left to say so.
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }
}

impl From<&At> for Value {
    fn from(at: &At) -> Self {
        serde_json::to_value(at).unwrap_or(Value::Null)
    }
}
