//! Holds a file to its [`Shape`]s: keys, types, units and words, everywhere in one pass; and reads values that passed.
//!
//! Not here: what names refer to, what combinations mean.

use std::{collections::BTreeMap, ops::Range, path::PathBuf, time::Duration};

use toml::de::{DeTable, DeValue};

use super::keys::{Key, Kind, SECRET, Shape};
use crate::{
    fail::Fail,
    strict::{Reader, nearest},
    units,
};

type Spanned<T> = toml::Spanned<T>;

/// Notes whatever is wrong with a table of this shape; `place` names it in messages.
pub(super) fn check(reader: &mut Reader<'_>, table: &DeTable<'_>, shape: &Shape, place: &str, at: Range<usize>) {
    reader.only(table, place, &shape.names());
    for key in shape.keys {
        match table.get(key.name) {
            Some(value) => check_value(reader, key, value, place),
            None if key.must => reader.problem(at.clone(), format!("{place} has no `{}`", key.name)),
            None => {}
        }
    }
}

fn check_value(reader: &mut Reader<'_>, key: &Key, value: &Spanned<DeValue<'_>>, place: &str) {
    let below = if place == super::keys::SITE.name { key.name.to_owned() } else { format!("{place}.{}", key.name) };
    match key.kind {
        Kind::Text | Kind::Path => {
            if value.get_ref().as_str().is_none_or(str::is_empty) {
                wrong(reader, key, value, "a string");
            }
        }
        Kind::Size => parsed(reader, key, value, |text| units::parse_bytes(text).map(drop)),
        Kind::Rate => parsed(reader, key, value, |text| units::parse_rate(text).map(drop)),
        Kind::Duration => parsed(reader, key, value, |text| units::parse_duration(text).map(drop)),
        Kind::Number(from, to) => {
            if !number_of(value.get_ref()).is_some_and(|n| (from..=to).contains(&n)) {
                wrong(reader, key, value, &format!("a whole number from {from} to {to}"));
            }
        }
        Kind::Truth => {
            if value.get_ref().as_bool().is_none() {
                wrong(reader, key, value, "true or false");
            }
        }
        Kind::OneOf(words) => {
            let known = value.get_ref().as_str().filter(|word| words.contains(word));
            if known.is_none() {
                wrong(reader, key, value, &format!("one of {}", words.join(", ")));
            }
        }
        Kind::Texts => check_texts(reader, key, value),
        Kind::TextMap => each(reader, key, value, |reader, name, value| {
            if value.get_ref().as_str().is_none_or(str::is_empty) {
                reader.problem(value.span(), format!("`{name}` must be a string"));
            }
        }),
        Kind::Table(shape) => match value.get_ref().as_table() {
            Some(table) => check(reader, table, shape, &below, value.span()),
            None => wrong(reader, key, value, "a table"),
        },
        Kind::Named(shape) => each(reader, key, value, |reader, name, value| match value.get_ref().as_table() {
            Some(table) => check(reader, table, shape, &format!("{below}.{name}"), value.span()),
            None => reader.problem(value.span(), format!("{below}.{name} must be a table")),
        }),
        Kind::Tables(shape) => match value.get_ref().as_array() {
            Some(array) => array.iter().for_each(|item| match item.get_ref().as_table() {
                Some(table) => check(reader, table, shape, &below, item.span()),
                None => wrong(reader, key, item, "a table"),
            }),
            None => wrong(reader, key, value, "a list of tables"),
        },
        Kind::NamedKinds(shapes) => each(reader, key, value, |reader, name, value| {
            check_kind(reader, shapes, &format!("{below}.{name}"), value);
        }),
        Kind::Secret => check_secret(reader, value, &below),
    }
}

fn check_kind(reader: &mut Reader<'_>, shapes: &[&'static Shape], place: &str, value: &Spanned<DeValue<'_>>) {
    let Some(table) = value.get_ref().as_table() else {
        return reader.problem(value.span(), format!("{place} must be a table"));
    };
    let kinds: Vec<&str> = shapes.iter().map(|shape| shape.name).collect();
    let Some(kind) = table.get("kind") else {
        return reader.problem(value.span(), format!("{place} has no `kind`: one of {}", kinds.join(", ")));
    };
    let word = kind.get_ref().as_str().unwrap_or_default();
    match shapes.iter().find(|shape| shape.name == word) {
        Some(shape) => check(reader, table, shape, place, value.span()),
        None => {
            let near = nearest(word, &kinds).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            reader.problem(kind.span(), format!("`kind` must be one of {}{near}", kinds.join(", ")));
        }
    }
}

fn check_secret(reader: &mut Reader<'_>, value: &Spanned<DeValue<'_>>, place: &str) {
    let what = "a secret does not stand in this file; write { credential | file | command | env = \"...\" }";
    match value.get_ref().as_table() {
        // The value is not quoted: it may be the secret.
        None => reader.problem(value.span(), format!("{place}: {what}")),
        Some(table) => {
            check(reader, table, &SECRET, place, value.span());
            if table.len() != 1 {
                reader.problem(value.span(), format!("{place}: one of credential, file, command, env"));
            }
        }
    }
}

fn check_texts(reader: &mut Reader<'_>, key: &Key, value: &Spanned<DeValue<'_>>) {
    let Some(array) = value.get_ref().as_array() else { return wrong(reader, key, value, "a list of strings") };
    for item in array.iter() {
        if item.get_ref().as_str().is_none_or(str::is_empty) {
            wrong(reader, key, item, "a list of strings");
        }
    }
}

fn each(
    reader: &mut Reader<'_>,
    key: &Key,
    value: &Spanned<DeValue<'_>>,
    mut check: impl FnMut(&mut Reader<'_>, &str, &Spanned<DeValue<'_>>),
) {
    let Some(table) = value.get_ref().as_table() else { return wrong(reader, key, value, "a table") };
    for (name, value) in table.iter() {
        if !is_name(name.get_ref()) {
            let what =
                "a name has letters (a to z, A to Z), digits, `-`, `_` and `.`, and begins with a letter or digit";
            reader.problem(name.span(), format!("`{}`: {what}", name.get_ref().escape_debug()));
        }
        check(reader, name.get_ref(), value);
    }
}

/// What a thing of a site may be called: also a file name, on any file system.
pub(super) fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty()
        && name.len() <= 128
        && name.chars().all(good)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

fn parsed(
    reader: &mut Reader<'_>,
    key: &Key,
    value: &Spanned<DeValue<'_>>,
    parse: impl FnOnce(&str) -> Result<(), Fail>,
) {
    match value.get_ref().as_str() {
        Some(text) => {
            if let Err(fail) = parse(text) {
                reader.problem(value.span(), format!("`{}`: {}", key.name, fail.what));
            }
        }
        None => wrong(reader, key, value, "a string with a unit"),
    }
}

fn wrong(reader: &mut Reader<'_>, key: &Key, value: &Spanned<DeValue<'_>>, want: &str) {
    reader.wrong_type(key.name, value, want);
}

fn number_of(value: &DeValue<'_>) -> Option<u64> {
    let number = value.as_integer()?;
    u64::from_str_radix(number.as_str(), number.radix()).ok()
}

/// Values of a table that was checked; what did not pass is as if it were not there.
#[derive(Clone, Copy)]
pub(super) struct Values<'t, 'a>(pub(super) &'t DeTable<'a>);

impl<'t, 'a> Values<'t, 'a> {
    pub(super) fn text(self, key: &str) -> Option<String> {
        self.0.get(key)?.get_ref().as_str().filter(|text| !text.is_empty()).map(str::to_owned)
    }

    pub(super) fn path(self, key: &str) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }

    pub(super) fn truth(self, key: &str) -> Option<bool> {
        self.0.get(key)?.get_ref().as_bool()
    }

    pub(super) fn number(self, key: &str) -> Option<u32> {
        number_of(self.0.get(key)?.get_ref()).and_then(|n| u32::try_from(n).ok())
    }

    pub(super) fn size(self, key: &str) -> Option<u64> {
        units::parse_bytes(&self.text(key)?).ok()
    }

    pub(super) fn rate(self, key: &str) -> Option<u64> {
        units::parse_rate(&self.text(key)?).ok().flatten()
    }

    pub(super) fn duration(self, key: &str) -> Option<Duration> {
        units::parse_duration(&self.text(key)?).ok()
    }

    /// Texts of a list, with their places.
    pub(super) fn texts(self, key: &str) -> Vec<(String, Range<usize>)> {
        let array = self.0.get(key).and_then(|value| value.get_ref().as_array());
        let items = array.into_iter().flat_map(|array| array.iter());
        items.filter_map(|item| Some((item.get_ref().as_str()?.to_owned(), item.span()))).collect()
    }

    pub(super) fn plain_texts(self, key: &str) -> Vec<String> {
        self.texts(key).into_iter().map(|(text, _)| text).collect()
    }

    /// Texts under names, with the places of the names.
    pub(super) fn text_map(self, key: &str) -> BTreeMap<String, (String, Range<usize>)> {
        let table = self.table(key).map(|values| values.0);
        let entries = table.into_iter().flat_map(|table| table.iter());
        let entry = |(name, value): (&Spanned<_>, &Spanned<DeValue<'_>>)| {
            let name: &Spanned<std::borrow::Cow<'_, str>> = name;
            Some((name.get_ref().to_string(), (value.get_ref().as_str()?.to_owned(), name.span())))
        };
        entries.filter_map(entry).collect()
    }

    pub(super) fn table(self, key: &str) -> Option<Values<'t, 'a>> {
        self.0.get(key)?.get_ref().as_table().map(Values)
    }

    pub(super) fn tables(self, key: &str) -> Vec<(Values<'t, 'a>, Range<usize>)> {
        let array = self.0.get(key).and_then(|value| value.get_ref().as_array());
        let items = array.into_iter().flat_map(|array| array.iter());
        items.filter_map(|item| Some((Values(item.get_ref().as_table()?), item.span()))).collect()
    }

    /// Tables under names, with the places of the names.
    pub(super) fn named(self, key: &str) -> Vec<(String, Values<'t, 'a>, Range<usize>)> {
        let table = self.table(key).map(|values| values.0);
        let entries = table.into_iter().flat_map(|table| table.iter());
        entries
            .filter_map(|(name, value)| {
                Some((name.get_ref().to_string(), Values(value.get_ref().as_table()?), name.span()))
            })
            .collect()
    }

    /// Where a value stands.
    pub(super) fn place(self, key: &str) -> Range<usize> {
        self.0.get(key).map_or(0..0, Spanned::span)
    }

    pub(super) fn has(self, key: &str) -> bool {
        self.0.contains_key(key)
    }
}
