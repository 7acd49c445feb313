//! TOML read strictly: every problem has a line and column, an unknown key names its nearest
//! neighbour, and all problems of a file are found in one pass.
//!
//! Not here: which keys there are (`site`, `machine`).

use std::{fs, ops::Range, path::Path};

use toml::de::{DeTable, DeValue};

use crate::fail::{Code, Fail, Result};

/// Reads a file of text.
///
/// # Errors
/// [`Code::Config`] with the place of the first byte that is no UTF-8; I/O.
pub fn text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|e| Fail::io(path.display(), "read", &e))?;
    String::from_utf8(bytes).map_err(|error| {
        let good = error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default();
        let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
        let begun = good.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
        let column = String::from_utf8_lossy(begun).chars().count() + 1;
        let place = format!("{}:{line}:{column}", path.display());
        Fail::new(Code::Config, format!("{place}: a byte that is no UTF-8; the file has to be UTF-8 text")).at(place)
    })
}

/// One thing that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub what: String,
    /// Whether the file is right, and only this build cannot do it.
    pub unbuilt: bool,
}

/// A file being read, and what was found wrong with it so far.
#[derive(Debug)]
pub struct Reader<'a> {
    path: &'a str,
    text: &'a str,
    problems: Vec<Problem>,
}

type Spanned<T> = toml::Spanned<T>;

impl<'a> Reader<'a> {
    /// Begins with the text of a file; `path` is for messages.
    pub fn new(path: &'a str, text: &'a str) -> Self {
        Self { path, text, problems: Vec::new() }
    }

    /// The top table. Syntax errors are noted; what could be read is returned.
    pub fn parse(&mut self) -> Spanned<DeTable<'a>> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            let span = error.span().unwrap_or(0..0);
            let mut what = error.message().to_owned();
            if what == "duplicate key"
                && let Some(key) = self.text.get(span.clone()).filter(|key| !key.is_empty())
            {
                what = format!("{what} `{}`", key.escape_debug());
            }
            self.problem(span, what);
        }
        table
    }

    /// Notes a problem at a place of the text.
    pub fn problem(&mut self, span: Range<usize>, what: impl Into<String>) {
        self.note(span, what.into(), false);
    }

    /// Notes something that is right, but that this build cannot do.
    pub fn unbuilt(&mut self, span: Range<usize>, what: impl Into<String>) {
        self.note(span, what.into(), true);
    }

    fn note(&mut self, span: Range<usize>, what: String, unbuilt: bool) {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        self.problems.push(Problem { line, column, what, unbuilt });
    }

    /// Refuses every key of `table` that is not in `known`.
    pub fn only(&mut self, table: &DeTable<'_>, place: &str, known: &[&str]) {
        for key in table.keys() {
            let name: &str = key.get_ref();
            if !known.contains(&name) {
                let near = nearest(name, known).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
                self.problem(key.span(), format!("unknown key `{name}` in {place}{near}"));
            }
        }
    }

    /// A string value.
    pub fn string(&mut self, table: &DeTable<'_>, key: &str) -> Option<String> {
        let value = table.get(key)?;
        let text = value.get_ref().as_str().map(str::to_owned);
        if text.is_none() {
            self.wrong_type(key, value, "a string");
        }
        text
    }

    /// A whole number in a range.
    pub fn integer(&mut self, table: &DeTable<'_>, key: &str, range: std::ops::RangeInclusive<u64>) -> Option<u64> {
        let value = table.get(key)?;
        let number = value.get_ref().as_integer();
        let number = number.and_then(|n| u64::from_str_radix(n.as_str(), n.radix()).ok());
        let number = number.filter(|n| range.contains(n));
        if number.is_none() {
            self.wrong_type(key, value, &format!("a whole number from {} to {}", range.start(), range.end()));
        }
        number
    }

    /// A truth value.
    pub fn truth(&mut self, table: &DeTable<'_>, key: &str) -> Option<bool> {
        let value = table.get(key)?;
        let truth = value.get_ref().as_bool();
        if truth.is_none() {
            self.wrong_type(key, value, "true or false");
        }
        truth
    }

    /// A string that `parse` understands.
    pub fn parsed<T>(
        &mut self,
        table: &DeTable<'_>,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.string(table, key)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(what) => {
                let span = table.get(key).map_or(0..0, Spanned::span);
                self.problem(span, format!("`{key}`: {what}"));
                None
            }
        }
    }

    /// A table below this one.
    pub fn table<'t>(&mut self, table: &'t DeTable<'a>, key: &str) -> Option<&'t DeTable<'a>> {
        let value = table.get(key)?;
        let below = value.get_ref().as_table();
        if below.is_none() {
            self.wrong_type(key, value, "a table");
        }
        below
    }

    /// The tables of an array of tables.
    pub fn tables<'t>(&mut self, table: &'t DeTable<'a>, key: &str) -> Vec<&'t DeTable<'a>> {
        let Some(value) = table.get(key) else { return Vec::new() };
        let Some(array) = value.get_ref().as_array() else {
            self.wrong_type(key, value, "an array of tables");
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in array.iter() {
            match item.get_ref().as_table() {
                Some(below) => tables.push(below),
                None => self.wrong_type(key, item, "a table"),
            }
        }
        tables
    }

    /// Where a key stands, for problems found later.
    pub fn place_of(table: &DeTable<'_>, key: &str) -> Range<usize> {
        table.get_key_value(key).map_or(0..0, |(key, _)| key.span())
    }

    /// Notes that a value is of another kind than its key wants.
    pub fn wrong_type(&mut self, key: &str, value: &Spanned<DeValue<'_>>, want: &str) {
        let have = match value.get_ref() {
            DeValue::String(text) if text.is_empty() && want.starts_with("a string") => {
                return self.problem(value.span(), format!("`{key}` must not be empty"));
            }
            DeValue::String(_) => "a string",
            DeValue::Integer(number) => {
                let number = number.as_str().to_owned();
                return self.problem(value.span(), format!("`{key}` must be {want}, not the number {number}"));
            }
            DeValue::Float(_) => "a number with a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        self.problem(value.span(), format!("`{key}` must be {want}, not {have}"));
    }

    /// Everything wrong so far, in order.
    pub fn problems(mut self) -> Vec<Problem> {
        self.problems.sort_by_key(|p| (p.line, p.column));
        self.problems
    }

    /// The value, or a failure that lists every problem.
    pub fn finish<T>(self, value: Option<T>) -> Result<T> {
        let path = self.path.to_owned();
        let problems = self.problems();
        match (value, problems.first()) {
            (Some(value), None) => Ok(value),
            (_, first) => {
                let lines: Vec<String> =
                    problems.iter().map(|p| format!("{}:{}:{}: {}", path, p.line, p.column, p.what)).collect();
                let place = first.map_or(path.clone(), |p| format!("{path}:{}:{}", p.line, p.column));
                if !problems.is_empty() && problems.iter().all(|problem| problem.unbuilt) {
                    return Err(Fail::new(Code::Unsupported, lines.join("; ")).at(place));
                }
                let what = if lines.is_empty() { format!("{path} is incomplete") } else { lines.join("\n") };
                Err(Fail::new(Code::Config, what).at(place))
            }
        }
    }
}

/// The known name closest to `name`, where one is close enough to be meant.
pub fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let best = known.iter().map(|k| (distance(name, k), *k)).min()?;
    (best.0 <= 2.max(name.chars().count() / 3)).then_some(best.1)
}

/// Edits from one word to the other (insert, delete, replace).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(64).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (slot, cb) in row.iter_mut().skip(1).zip(&b) {
            let up = *slot;
            let cost = diagonal + usize::from(ca != *cb);
            diagonal = up;
            left = cost.min(up + 1).min(left + 1);
            *slot = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", ""), 3);
        assert_eq!(nearest("repositry", &["repository", "home"]), Some("repository"));
        assert_eq!(nearest("zzz", &["repository", "home"]), None);
    }

    #[test]
    fn a_byte_that_is_no_text_has_a_place() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("site.toml");
        fs::write(&path, b"version = 1\nna\xc3\xa9me\xff = 2\n").expect("write");
        let fail = text(&path).expect_err("no text");
        assert_eq!((fail.code, fail.exit()), (Code::Config, 4));
        assert!(fail.what.contains("site.toml:2:6: "), "{fail}");
    }

    #[test]
    fn all_problems_come_in_one_pass_with_their_place() {
        let text = "versoin = 1\nhome = 3\n[repository.nas]\nurl = \"x\"\nulr = \"y\"\n";
        let mut reader = Reader::new("site.toml", text);
        let top = reader.parse();
        let top = top.get_ref();
        reader.only(top, "the site file", &["version", "home", "repository"]);
        assert_eq!(reader.string(top, "home"), None);
        let repositories = reader.table(top, "repository").expect("a table");
        let nas = reader.table(repositories, "nas").expect("nas");
        reader.only(nas, "repository.nas", &["url"]);
        let fail = reader.finish::<()>(None).expect_err("problems");
        let lines: Vec<&str> = fail.what.lines().collect();
        assert_eq!(
            lines,
            [
                "site.toml:1:1: unknown key `versoin` in the site file; did you mean `version`?",
                "site.toml:2:8: `home` must be a string, not the number 3",
                "site.toml:5:1: unknown key `ulr` in repository.nas; did you mean `url`?",
            ]
        );
        assert_eq!(fail.exit(), 4);
    }
}
