//! Text that other people chose, made safe to print: names of files, of guests, words of servers.
//!
//! Invariants
//! - What is printed moves no cursor, changes no colour and begins no line of its own, so that a name can
//!   neither hide something nor pass for a message of ours.
//! - Text without such characters is printed as it is.

use std::{borrow::Cow, fmt::Write as _};

/// One line: every control character is written as `\n`, `\e`, `\u{9b}`.
pub fn plain(text: &str) -> Cow<'_, str> {
    escaped(text, "")
}

/// Several lines: as [`plain`], but lines and columns stay.
pub(super) fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, "\n\t")
}

/// A line of JSON: the same characters, which can only stand in strings, as JSON spells them.
pub(super) fn json(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            // All of them lie in the plane that four digits name.
            _ if is_obeyed(c) => drop(write!(out, "\\u{:04x}", u32::from(c))),
            _ => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// Characters that a terminal obeys instead of showing them: controls, and those that turn the direction
/// of writing around.
pub(crate) fn is_obeyed(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped<'t>(text: &'t str, kept: &str) -> Cow<'t, str> {
    let bad = |c: char| is_obeyed(c) && !kept.contains(c);
    if !text.contains(bad) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            _ if !bad(c) => out.push(c),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x1b' => out.push_str("\\e"),
            _ => {
                // Writing to a string does not fail.
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_written_out() {
        assert!(matches!(plain("Größe 1 – db01.qcow2"), Cow::Borrowed(_)));
        assert_eq!(plain("a\nb\x1b[31m\r\tc\u{9b}2J\u{202e}x\0"), "a\\nb\\e[31m\\r\\tc\\u{9b}2J\\u{202e}x\\u{0}");
        assert_eq!(json("{\"a\":\"\u{9b}2J\u{202e}\"}"), r#"{"a":"\u009b2J\u202e"}"#);
        assert_eq!(lines("a\n\tb\x1b[2J"), "a\n\tb\\e[2J");
    }
}
