//! Which point is meant: `latest`, `latest~2`, a time, the beginning of an id.
//!
//! Invariants
//! - `latest` and times see complete points only; an id sees every listed point.
//! - What was complete once and is damaged now is passed over never in silence: who looks is told of each.
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

/// What a query led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The point that is meant.
    pub point: Option<Point>,
    /// Points received after it that would have been meant, were they not missing or corrupted; the newest first. One
    /// whose own record is damaged has no time that could be asked for, and is told of with every time.
    pub passed_over: Vec<Point>,
}

impl Repository {
    /// The point of `machine` that is meant.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`]; damage of the manifest; I/O.
    pub fn resolve(&self, machine: &Machine, query: &PointQuery) -> Result<Point> {
        self.answer(machine, query)?.point.ok_or_else(|| self.no_point(machine, query))
    }

    /// That there is no such point.
    pub fn no_point(&self, machine: &Machine, query: &PointQuery) -> Error {
        let what = match query {
            PointQuery::Latest(back) => format!("latest~{back}"),
            PointQuery::At(time) => time.to_string(),
            PointQuery::Id(text) => text.clone(),
        };
        Error::not_found(self.label(), format!("point {what} of {}", machine.name))
    }

    /// The point of `machine` that is meant, and those that are too damaged to be it.
    ///
    /// # Errors
    /// [`Error::Ambiguous`]; damage of the manifest; I/O.
    pub fn answer(&self, machine: &Machine, query: &PointQuery) -> Result<Answer> {
        match query {
            PointQuery::Latest(back) => {
                let skip = usize::try_from(*back).unwrap_or(usize::MAX);
                self.newest_complete(machine, skip, |_| true)
            }
            PointQuery::At(time) => {
                self.newest_complete(machine, 0, |point| point.created().is_none_or(|at| at <= *time))
            }
            PointQuery::Id(text) => Ok(Answer { point: self.by_id(machine, text)?, passed_over: Vec::new() }),
        }
    }

    fn newest_complete(&self, machine: &Machine, skip: usize, wanted: impl Fn(&Point) -> bool) -> Result<Answer> {
        let (mut skip, mut passed_over) = (skip, Vec::new());
        for listed in self.listed(machine)?.iter().rev() {
            let point = self.point_state(machine, listed)?;
            match point.state {
                _ if !wanted(&point) => {}
                PointState::Complete if skip == 0 => return Ok(Answer { point: Some(point), passed_over }),
                PointState::Complete => skip -= 1,
                PointState::Incomplete => {}
                PointState::Missing { .. } | PointState::Corrupted { .. } => passed_over.push(point),
            }
        }
        Ok(Answer { point: None, passed_over })
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

    fn by_id(&self, machine: &Machine, text: &str) -> Result<Option<Point>> {
        let plain = |s: &str| s.replace('-', "");
        let wanted = plain(text);
        let listed = self.listed(machine)?;
        let found: Vec<_> = listed.iter().filter(|p| p.id.simple().to_string().starts_with(&wanted)).collect();
        match found.as_slice() {
            [one] => self.point_state(machine, one).map(Some),
            [] => self.written_anew(machine, &listed, &wanted),
            many => Err(Error::Ambiguous {
                path: self.label().into(),
                what: format!("point {text} of {}", machine.name),
                candidates: many.iter().map(|p| p.id.to_string()).collect(),
            }),
        }
    }
}
