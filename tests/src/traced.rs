//! The calls of a real process: what it told folders and files, in order, and what of it was made to fail.
//!
//! Invariants
//! - Nothing but the process's own system calls is believed; a line that is not understood ends the test.
//! - Calls are counted for each thread and name as `strace` does, so that the n-th can be made to fail in another run.
//!
//! Not here: what survives (`folders`); calls of several threads at once.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use crate::folders::{Event, FileNumber, Tree, split};

/// Calls that change folders or files, and those that say which file a number stands for.
const CALLS: &str = "openat,openat2,mkdirat,linkat,renameat,renameat2,unlinkat,fsync,fdatasync,write,pwrite64,\
                     ftruncate,fallocate,close";

/// Words that a process says to whoever traces it: on stderr, after this.
pub const WORD: &str = "@ ";

/// One call that changed something below the root.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// Which of those of its name in its thread, from 1.
    pub nth: u64,
}

/// What a process did.
#[derive(Clone, Debug, Default)]
pub struct Traced {
    /// In order.
    pub events: Vec<Event>,
    /// The calls that changed something, in order.
    pub calls: Vec<Call>,
}

/// Who a process is, for [`trace`].
#[derive(Clone, Copy, Debug)]
pub struct Process<'a> {
    /// Arguments of this very program.
    pub args: &'a [&'a str],
    /// Its environment, beside ours.
    pub env: &'a [(&'a str, &'a OsStr)],
    /// The folder that is looked at. Nothing outside counts.
    pub root: &'a Path,
}

/// A call that fails instead of being made.
#[derive(Clone, Copy, Debug)]
pub struct Failure<'a> {
    /// Which.
    pub call: &'a Call,
    /// With what, as `EIO`.
    pub error: &'static str,
}

/// Runs a process to its end; `before` is what its root holds, `files` how many files have had a number.
///
/// # Errors
/// It failed; `strace` did; a call that nobody here knows.
pub fn trace(
    process: Process<'_>,
    before: Tree,
    files: FileNumber,
    fail: Option<Failure<'_>>,
) -> Result<Traced, String> {
    let log = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-xx", "-qq", "-s", "1000000", "--signal=none", "-e", &format!("trace={CALLS}"), "-o"]);
    strace.arg(log.path());
    if let Some(Failure { call, error }) = fail {
        strace.args(["-e", &format!("inject={}:error={error}:when={}", call.name, call.nth)]);
    }
    strace.arg("--").arg(std::env::current_exe().map_err(|e| e.to_string())?).args(process.args);
    strace.envs(process.env.iter().copied()).stdin(Stdio::null());
    let output = strace.output().map_err(|e| format!("strace: {e}"))?;
    // The call of that number fails in every thread, also in the one that prints how the test went.
    if fail.is_none() && !output.status.success() {
        return Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    let text = fs::read_to_string(log.path()).map_err(|e| e.to_string())?;
    let root = process.root.to_str().ok_or("a root that is not text")?;
    let mut reader = Reader { root, tree: before, next: files, ..Reader::default() };
    text.lines().try_for_each(|line| reader.line(line).map_err(|what| format!("{what}: {line:.300}")))?;
    Ok(reader.out)
}

/// What an open file is.
#[derive(Clone, Debug)]
enum Open {
    Folder(String),
    File { number: FileNumber, at: u64 },
}

#[derive(Default)]
struct Reader<'a> {
    root: &'a str,
    tree: Tree,
    next: FileNumber,
    open: BTreeMap<u64, Open>,
    counts: BTreeMap<(String, String), u64>,
    out: Traced,
}

/// The bytes of `\x61\x62`, and whatever else stands between.
fn unescape(text: &str) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.find("\\x") {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        out.extend(rest.get(at + 2..at + 4).and_then(|hex| u8::from_str_radix(hex, 16).ok()));
        rest = rest.get(at + 4..).unwrap_or_default();
    }
    out.extend_from_slice(rest.as_bytes());
    out
}

fn string(argument: Option<&&str>) -> Result<Vec<u8>, &'static str> {
    let quoted = argument.and_then(|a| a.strip_prefix('"')?.strip_suffix('"'));
    quoted.map(unescape).ok_or("no whole string")
}

fn text(argument: Option<&&str>) -> Result<String, &'static str> {
    String::from_utf8(string(argument)?).map_err(|_| "a name that is not text")
}

fn leading_number(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

impl Reader<'_> {
    /// A path below the root, of a name in an open folder; `None` for one outside.
    fn path(&self, folder: &str, name: &str) -> Option<String> {
        let whole = if name.starts_with('/') {
            name.to_owned()
        } else {
            let shown = String::from_utf8(unescape(folder.split_once('<')?.1.strip_suffix('>')?)).ok()?;
            format!("{shown}/{name}")
        };
        let below = whole.strip_prefix(self.root)?;
        let parts: Vec<&str> = below.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        (below.is_empty() || below.starts_with('/')).then(|| parts.join("/"))
    }

    fn line(&mut self, line: &str) -> Result<(), String> {
        let (thread, rest) = line.split_once(' ').ok_or("no call")?;
        let rest = rest.trim_start();
        if rest.starts_with("+++") || rest.starts_with("---") {
            return Ok(());
        }
        let (name, rest) = rest.split_once('(').ok_or("no call")?;
        let (arguments, result) = rest.rsplit_once(" = ").ok_or("a call without an end")?;
        let arguments = arguments.trim_end().strip_suffix(')').ok_or("a call without an end")?;
        let arguments: Vec<&str> = arguments.split(", ").collect();
        let count = self.counts.entry((thread.to_owned(), name.to_owned())).or_default();
        *count += 1;
        let call = Call { name: name.to_owned(), nth: *count };
        let before = self.out.events.len();
        let counts = self.call(name, &arguments, leading_number(result))?;
        if counts && leading_number(result).is_some() {
            self.out.calls.push(call);
        }
        for event in &self.out.events[before..] {
            self.tree.apply(event);
        }
        Ok(())
    }

    /// Takes one call; whether it was to change something below the root.
    fn call(&mut self, name: &str, arguments: &[&str], result: Option<u64>) -> Result<bool, String> {
        let first = arguments.first().copied().unwrap_or_default();
        let number = leading_number(first);
        let event = match name {
            "openat" | "openat2" => return self.opened(arguments, result),
            "close" => {
                number.and_then(|n| self.open.remove(&n));
                return Ok(false);
            }
            "fsync" | "fdatasync" => match number.and_then(|n| self.open.get(&n)) {
                Some(Open::Folder(path)) => Event::SyncedFolder(path.clone(), result.is_some()),
                Some(Open::File { number, .. }) => Event::SyncedFile(*number, result.is_some()),
                None => return Ok(false),
            },
            "write" | "pwrite64" | "ftruncate" | "fallocate" => return self.changed(name, arguments, result),
            _ => match self.renamed(name, arguments)? {
                Some(event) if result.is_some() => event,
                Some(_) => return Ok(true),
                None => return Ok(false),
            },
        };
        self.out.events.push(event);
        Ok(true)
    }

    fn opened(&mut self, arguments: &[&str], result: Option<u64>) -> Result<bool, String> {
        let folder = arguments.first().copied().unwrap_or_default();
        let Some(path) = self.path(folder, &text(arguments.get(1))?) else { return Ok(false) };
        let how = arguments[2..].join(", ");
        let creates = how.contains("O_CREAT") || how.contains("O_TMPFILE");
        let Some(result) = result else { return Ok(creates) };
        let open = if how.contains("O_TMPFILE") {
            self.next += 1;
            Open::File { number: self.next, at: 0 }
        } else if self.tree.is_folder(&path) {
            Open::Folder(path)
        } else if let Some(number) = self.tree.file(&path) {
            Open::File { number, at: 0 }
        } else if creates {
            self.next += 1;
            self.out.events.push(Event::Named(path, self.next));
            Open::File { number: self.next, at: 0 }
        } else {
            return Err(format!("opens {path}, which nobody made"));
        };
        self.open.insert(result, open);
        Ok(creates)
    }

    fn changed(&mut self, name: &str, arguments: &[&str], result: Option<u64>) -> Result<bool, String> {
        let Some(descriptor) = arguments.first().and_then(|a| leading_number(a)) else { return Ok(false) };
        if name == "write" && descriptor == 2 {
            let said = String::from_utf8_lossy(&string(arguments.get(1))?).into_owned();
            let words = said.lines().filter_map(|line| line.strip_prefix(WORD));
            self.out.events.extend(words.map(|word| Event::Said(word.to_owned())));
            return Ok(false);
        }
        let Some(Open::File { number, at }) = self.open.get_mut(&descriptor) else { return Ok(false) };
        let Some(done) = result else { return Ok(true) };
        let value = |at: usize| arguments.get(at).and_then(|a| a.parse::<u64>().ok()).ok_or("no number");
        let event = match name {
            "ftruncate" => Event::Resized(*number, value(1)?),
            "fallocate" => return Err("space is reserved, which is not modelled".into()),
            _ => {
                let mut bytes = string(arguments.get(1))?;
                bytes.truncate(done as usize);
                let place = if name == "write" { *at } else { value(3)? };
                if name == "write" {
                    *at += done;
                }
                Event::Wrote(*number, place, bytes)
            }
        };
        self.out.events.push(event);
        Ok(true)
    }

    fn renamed(&self, name: &str, arguments: &[&str]) -> Result<Option<Event>, String> {
        let at = |n: usize| -> Result<Option<String>, String> {
            Ok(self.path(arguments.get(n).copied().unwrap_or_default(), &text(arguments.get(n + 1))?))
        };
        match name {
            "mkdirat" => Ok(at(0)?.map(Event::MadeFolder)),
            "unlinkat" => Ok(at(0)?.map(Event::Unnamed)),
            "linkat" => {
                let Some(to) = at(2)? else { return Ok(None) };
                let from = text(arguments.get(1))?;
                let unnamed = from.strip_prefix("/proc/self/fd/").and_then(leading_number);
                let number = match (unnamed.and_then(|n| self.open.get(&n)), at(0)?) {
                    (Some(Open::File { number, .. }), _) => Some(*number),
                    (_, Some(path)) => self.tree.file(&path),
                    _ => None,
                };
                Ok(Some(Event::Named(to, number.ok_or("links what nobody made")?)))
            }
            "renameat" | "renameat2" => match (at(0)?, at(2)?) {
                (Some(from), Some(to)) if split(&from).0 == split(&to).0 => Ok(Some(Event::Renamed(from, to))),
                (None, None) => Ok(None),
                _ => Err("a rename from one folder to another".into()),
            },
            _ => Err(format!("{name} is not known")),
        }
    }
}
