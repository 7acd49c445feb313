//! Which point is meant: `latest`, `latest~2`, a time, the beginning of an id.
//!
//! Invariants
//! - `latest` and times see complete points only; an id sees every listed point.
//! - Among points the receipt decides, never a clock: a time picks the last received point among those
//!   taken not after it.

use std::str::FromStr;

use jiff::Timestamp;

use super::{Error, Machine, Point, PointState, Repository, Result, record::ManifestPoint};

/// Shortest beginning of an id, in characters.
const ID_CHARS_MIN: usize = 4;

/// Which point of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PointQuery {
    /// The newest complete one, or as many before it.
    Latest(u32),
    /// The newest complete one taken not after this time.
    At(Timestamp),
    /// The one whose id begins like this.
    Id(String),
}

impl FromStr for PointQuery {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |what: &str| -> Error { crate::Error::Refused { path: text.into(), what: what.into() }.into() };
        if text == "latest" {
            return Ok(Self::Latest(0));
        }
        if let Some(back) = text.strip_prefix("latest~") {
            return back.parse().map(Self::Latest).map_err(|_| wrong("`latest~` is followed by a number"));
        }
        if let Ok(time) = text.parse::<Timestamp>() {
            return Ok(Self::At(time));
        }
        if text.len() >= ID_CHARS_MIN && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-') {
            return Ok(Self::Id(text.to_ascii_lowercase()));
        }
        Err(wrong("a point is `latest`, `latest~2`, an RFC 3339 time with zone, or at least 4 characters of an id"))
    }
}

impl Repository {
    /// The point of `machine` that is meant.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`]; damage of the manifest; I/O.
    pub fn resolve(&self, machine: &Machine, query: &PointQuery) -> Result<Point> {
        let none = |what: String| Error::not_found(self.label(), format!("point {what} of {}", machine.name));
        match query {
            PointQuery::Latest(back) => {
                let skip = usize::try_from(*back).unwrap_or(usize::MAX);
                self.newest_complete(machine, skip, |_| true)?.ok_or_else(|| none(format!("latest~{back}")))
            }
            PointQuery::At(time) => {
                let found = self.newest_complete(machine, 0, |point| point.created().is_some_and(|at| at <= *time))?;
                found.ok_or_else(|| none(time.to_string()))
            }
            PointQuery::Id(text) => self.by_id(machine, text, none),
        }
    }

    fn newest_complete(
        &self,
        machine: &Machine,
        skip: usize,
        wanted: impl Fn(&Point) -> bool,
    ) -> Result<Option<Point>> {
        let mut skip = skip;
        for listed in self.listed(machine)?.iter().rev() {
            let point = self.point_state(machine, listed)?;
            if point.state != PointState::Complete || !wanted(&point) {
                continue;
            }
            if skip == 0 {
                return Ok(Some(point));
            }
            skip -= 1;
        }
        Ok(None)
    }

    /// The point that has taken the place of one whose id begins like this.
    fn written_anew(&self, machine: &Machine, listed: &[ManifestPoint], wanted: &str) -> Result<Option<Point>> {
        for listed in listed {
            let point = self.point_state(machine, listed)?;
            let origin = point.record.as_ref().and_then(|record| record.origin.as_ref());
            if origin.is_some_and(|origin| {
                origin.repository == self.id() && origin.point.simple().to_string().starts_with(wanted)
            }) {
                return Ok(Some(point));
            }
        }
        Ok(None)
    }

    fn by_id(&self, machine: &Machine, text: &str, none: impl Fn(String) -> Error) -> Result<Point> {
        let plain = |s: &str| s.replace('-', "");
        let wanted = plain(text);
        let listed = self.listed(machine)?;
        let found: Vec<_> = listed.iter().filter(|p| p.id.simple().to_string().starts_with(&wanted)).collect();
        match found.as_slice() {
            [one] => self.point_state(machine, one),
            [] => match self.written_anew(machine, &listed, &wanted)? {
                Some(point) => Ok(point),
                None => Err(none(text.to_owned())),
            },
            many => Err(Error::Ambiguous {
                path: self.label().into(),
                what: format!("point {text} of {}", machine.name),
                candidates: many.iter().map(|p| p.id.to_string()).collect(),
            }),
        }
    }
}
