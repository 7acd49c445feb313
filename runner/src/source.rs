//! What a SOURCE word means.
//!
//! Grammar, first rule that fits:
//! 1. `raw:PATH` is a raw image, named as such (a guest could write any format's magic into its disk).
//!    `pbs:PATH`, `veeam:PATH`, `xo:PATH`, `longhorn:PATH` and `benji:PATH` are paths too: a store of that product, or a
//!    point in it.
//! 2. `nbd://`, `nbds://`, `nbd+unix://`, `nbds+unix://` is an NBD URI. Other `scheme://` are refused.
//! 3. A word with `/`, or the name of an existing file, is a path.
//! 4. `MACHINE[@POINT][:DISK]`. The first `@` whose rest reads as a POINT ends the machine's name, so
//!    names may hold `@`. POINT is `latest`, `latest~N`, an RFC 3339 time with its zone (the longest
//!    prefix that is one), or at least four characters of a point id.
//!
//! Invariants
//! - A time without a zone, and a misspelt `latest`, are refused, never taken as part of a name.
//! - Parsing looks at the file system only to see whether a file of that name exists.

pub(crate) mod connect;
pub(crate) mod files;
pub(crate) mod linked;
mod repository;
mod select;
pub(crate) mod store;
mod unwrap;

use std::path::{Path, PathBuf};

use jiff::Timestamp;

pub(crate) use connect::layer as layer_of_nbd;
pub(crate) use linked::spec_of;
pub use repository::SelectedPoint;
pub use select::{KeyOptions, SelectedDisk, Selection, SourceOptions, select};

use crate::fail::{Code, Fail, Result};

/// A SOURCE word, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An image, backup file or folder, whose format is probed.
    Path(PathBuf),
    /// A raw image, named as such.
    Raw(PathBuf),
    /// An NBD URI.
    Nbd(String),
    /// A point of a machine in the repository.
    Point {
        /// Name, alias or UUID of the machine.
        machine: String,
        /// Which point; the latest where none was named.
        point: PointRef,
        /// Which disk; all where none was named.
        disk: Option<String>,
    },
}

/// Which restore point of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PointRef {
    /// The newest, or the one `0` is followed by: `latest~2` is two before it.
    Latest(u32),
    /// The newest complete one not after this time.
    At(Timestamp),
    /// The one whose id begins like this.
    Id(String),
}

const POINT_ID_CHARS_MIN: usize = 4;
/// What a path may begin with, to say which store it leads to.
const STORES: [&str; 5] = ["pbs:", "veeam:", "xo:", "longhorn:", "benji:"];
const SCHEMES: [&str; 4] = ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"];

impl Source {
    /// Reads a SOURCE word.
    ///
    /// # Errors
    /// [`Code::Source`] with the reason.
    pub fn parse(word: &str) -> Result<Self> {
        // A recovery's folder often has the name of its machine: a folder is meant only where a `/` says so.
        Self::parse_with(word, |path| path.exists() && !path.is_dir())
    }

    /// As [`Source::parse`], asking `exists` for files.
    pub fn parse_with(word: &str, exists: impl Fn(&Path) -> bool) -> Result<Self> {
        if word.is_empty() {
            return Err(refuse(word, "it is empty"));
        }
        if let Some(path) = word.strip_prefix("raw:") {
            return if path.is_empty() { Err(refuse(word, "no path after raw:")) } else { Ok(Self::Raw(path.into())) };
        }
        if let Some(path) = STORES.iter().find_map(|store| word.strip_prefix(store)) {
            return if path.is_empty() {
                Err(refuse(word, "no path after the `:`"))
            } else {
                Ok(Self::Path(path.into()))
            };
        }
        if SCHEMES.iter().any(|scheme| starts_with_ignoring_case(word, scheme)) {
            return Ok(Self::Nbd(word.to_owned()));
        }
        if let Some((scheme, _)) = word.split_once("://").filter(|(s, _)| is_scheme(s)) {
            return Err(refuse(word, &format!("`{scheme}://` is not a scheme that is read here")));
        }
        if word.contains('/') || exists(Path::new(word)) {
            return Ok(Self::Path(word.into()));
        }
        parse_point(word)
    }
}

fn refuse(word: &str, why: &str) -> Fail {
    Fail::new(Code::Source, format!("`{word}` is not a SOURCE: {why}")).help("aquifer explain E_SOURCE")
}

fn starts_with_ignoring_case(word: &str, prefix: &str) -> bool {
    word.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

fn is_scheme(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

/// `MACHINE[@POINT][:DISK]`.
fn parse_point(word: &str) -> Result<Source> {
    for (at, _) in word.match_indices('@') {
        let (machine, rest) = (&word[..at], &word[at + 1..]);
        if let Some((point, after)) = point_prefix(rest) {
            let disk = match after.strip_prefix(':') {
                None if after.is_empty() => None,
                Some(disk) => Some(disk),
                None => continue,
            };
            return finish(word, machine, point, disk);
        }
        if looks_like_a_time(rest) {
            return Err(refuse(word, "a point in time needs RFC 3339 with its zone, like 2026-11-20T22:00:00Z"));
        }
        if rest.is_empty() || rest.starts_with(':') || rest.starts_with("latest~") || rest == "latest" {
            return Err(refuse(word, "after `@` comes latest, latest~N, a time or a point id"));
        }
    }
    match word.split_once(':') {
        Some((machine, disk)) => finish(word, machine, PointRef::Latest(0), Some(disk)),
        None => finish(word, word, PointRef::Latest(0), None),
    }
}

fn finish(word: &str, machine: &str, point: PointRef, disk: Option<&str>) -> Result<Source> {
    if machine.is_empty() {
        return Err(refuse(word, "the machine's name is missing"));
    }
    if disk.is_some_and(str::is_empty) {
        return Err(refuse(word, "the disk's name is missing after `:`"));
    }
    Ok(Source::Point { machine: machine.to_owned(), point, disk: disk.map(str::to_owned) })
}

impl PointRef {
    /// Reads a POINT alone, as options take it.
    ///
    /// # Errors
    /// [`Code::Source`] with the reason.
    pub fn parse(word: &str) -> Result<Self> {
        match point_prefix(word) {
            Some((point, "")) => Ok(point),
            _ => Err(refuse(word, "a POINT is latest, latest~N, an RFC 3339 time with its zone, or a point id")),
        }
    }
}

/// A POINT at the beginning of `rest` that ends there or at a `:`, and what follows it.
fn point_prefix(rest: &str) -> Option<(PointRef, &str)> {
    if let Some((time, after)) = time_prefix(rest) {
        return Some((PointRef::At(time), after));
    }
    let end = rest.find(':').unwrap_or(rest.len());
    let (head, after) = rest.split_at(end);
    if head == "latest" {
        return Some((PointRef::Latest(0), after));
    }
    if let Some(back) = head.strip_prefix("latest~") {
        let plain = !back.is_empty() && back.chars().all(|c| c.is_ascii_digit());
        return back.parse().ok().filter(|_| plain).map(|back| (PointRef::Latest(back), after));
    }
    let hex = head.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    let id = hex && head.len() >= POINT_ID_CHARS_MIN && head.len() <= 36 && !looks_like_a_time(head);
    id.then(|| (PointRef::Id(head.to_ascii_lowercase()), after))
}

/// `dddd-dd-dd` at the beginning: never the beginning of an id, whose first dash is the ninth character.
fn looks_like_a_time(text: &str) -> bool {
    let shape = "dddd-dd-dd".chars();
    let mut chars = text.chars();
    shape.into_iter().all(|want| match (want, chars.next()) {
        ('d', Some(c)) => c.is_ascii_digit(),
        (want, got) => got == Some(want),
    })
}

/// The longest prefix that is an RFC 3339 time with a zone (seconds may be left out), and what follows it.
fn time_prefix(text: &str) -> Option<(Timestamp, &str)> {
    if !looks_like_a_time(text) {
        return None;
    }
    let (date, rest) = text.split_at(10);
    let rest = rest.strip_prefix(['T', 't'])?;
    let (hours_minutes, rest) = take_shape(rest, "dd:dd")?;
    let (seconds, rest) = match take_shape(rest, ":dd") {
        Some((seconds, rest)) => {
            let digits =
                rest.strip_prefix('.').map(|r| r.len() - r.trim_start_matches(|c: char| c.is_ascii_digit()).len());
            match digits.filter(|n| *n > 0) {
                Some(n) => (format!("{seconds}{}", &rest[..=n]), &rest[n + 1..]),
                None => (seconds.to_owned(), rest),
            }
        }
        None => (":00".to_owned(), rest),
    };
    let (zone, after) = match take_shape(rest, "+dd:dd").or_else(|| take_shape(rest, "-dd:dd")) {
        Some(found) => found,
        None => ("Z", rest.strip_prefix(['Z', 'z'])?),
    };
    let ends = after.is_empty() || after.starts_with(':');
    let time = format!("{date}T{hours_minutes}{seconds}{zone}").parse().ok().filter(|_| ends)?;
    Some((time, after))
}

/// Splits off a prefix of the given shape, where `d` is a digit.
fn take_shape<'a>(text: &'a str, shape: &str) -> Option<(&'a str, &'a str)> {
    let head = text.get(..shape.len())?;
    let fits = head.chars().zip(shape.chars()).all(|(c, s)| if s == 'd' { c.is_ascii_digit() } else { c == s });
    fits.then(|| text.split_at(shape.len()))
}

#[cfg(test)]
mod tests;
