//! Hours in which runs may start.
//!
//! Invariants
//! - A span belongs to the day it opens on, also where it shuts the day after.
//! - An empty list of spans is no restriction.

use jiff::{
    Timestamp,
    civil::{Date, Time, Weekday},
    tz::TimeZone,
};

use super::{day_of, instant};

/// Minutes of a day.
const DAY: u16 = 24 * 60;

/// Days of the week.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weekdays(u8);

impl Weekdays {
    /// All seven.
    pub const ALL: Self = Self(0x7f);

    /// These days.
    pub fn of(days: impl IntoIterator<Item = Weekday>) -> Self {
        Self(days.into_iter().fold(0, |set, day| set | Self::bit(day)))
    }

    /// Whether a day is among them.
    pub fn has(self, day: Weekday) -> bool {
        self.0 & Self::bit(day) != 0
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn bit(day: Weekday) -> u8 {
        1 << day.to_monday_zero_offset()
    }

    /// Reads `mon`, `mon-fri`, `sat, sun`; `all` is every day.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("all") {
            return Ok(Self::ALL);
        }
        let mut set = 0;
        for part in text.split(',') {
            let (from, to) = part.split_once('-').or_else(|| part.split_once("..")).unwrap_or((part, part));
            let (mut day, to) = (parse_weekday(from)?, parse_weekday(to)?);
            set |= Self::bit(day);
            while day != to {
                day = day.next();
                set |= Self::bit(day);
            }
        }
        Ok(Self(set))
    }
}

/// Reads a day of the week, English, at least three letters.
pub fn parse_weekday(text: &str) -> Result<Weekday, String> {
    const NAMES: [(&str, Weekday); 7] = [
        ("monday", Weekday::Monday),
        ("tuesday", Weekday::Tuesday),
        ("wednesday", Weekday::Wednesday),
        ("thursday", Weekday::Thursday),
        ("friday", Weekday::Friday),
        ("saturday", Weekday::Saturday),
        ("sunday", Weekday::Sunday),
    ];
    let word = text.trim().to_ascii_lowercase();
    let found = NAMES.iter().find(|(name, _)| word.len() >= 3 && name.starts_with(&word));
    found.map(|(_, day)| *day).ok_or_else(|| format!("`{}` is not a day of the week", text.trim()))
}

/// Reads `22:00` as minutes of a day; `24:00` is its end.
fn parse_minutes(text: &str) -> Result<u16, String> {
    let bad = || format!("`{}` is not a time of day; write for example 22:00", text.trim());
    let (hours, minutes) = text.trim().split_once(':').ok_or_else(bad)?;
    let digits = |word: &str| word.len() <= 2 && word.bytes().all(|b| b.is_ascii_digit());
    if !digits(hours) || minutes.len() != 2 || !digits(minutes) {
        return Err(bad());
    }
    let (hours, minutes): (u16, u16) = (hours.parse().map_err(|_| bad())?, minutes.parse().map_err(|_| bad())?);
    let all = hours * 60 + minutes;
    if minutes < 60 && all <= DAY { Ok(all) } else { Err(bad()) }
}

/// Reads a time of day.
pub fn parse_clock(text: &str) -> Result<Time, String> {
    let minutes = parse_minutes(text)?;
    time_of(minutes).ok_or_else(|| format!("`{text}` is the next day's 00:00"))
}

fn time_of(minutes: u16) -> Option<Time> {
    Time::new(i8::try_from(minutes / 60).ok()?, i8::try_from(minutes % 60).ok()?, 0, 0).ok()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    days: Weekdays,
    /// Minutes of the day it opens.
    from: u16,
    /// Minutes of that day, or beyond its end.
    to: u16,
}

/// When runs may start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    spans: Vec<Span>,
}

impl Window {
    /// Reads `20:00-06:00`, `mon-fri 20:00-06:00; sat,sun 00:00-24:00`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut spans = Vec::new();
        for part in text.split(';').map(str::trim) {
            let (days, hours) = match part.rsplit_once(' ') {
                Some((days, hours)) => (Weekdays::parse(&days.replace(' ', ""))?, hours),
                None => (Weekdays::ALL, part),
            };
            let shape = || format!("`{part}` is not a window; write for example 20:00-06:00");
            let (from, to) = hours.split_once('-').ok_or_else(shape)?;
            let (from, mut to) = (parse_minutes(from)?, parse_minutes(to)?);
            if from == to || from == DAY {
                return Err(format!("the window `{part}` is never open"));
            }
            if to < from {
                to += DAY;
            }
            spans.push(Span { days, from, to });
        }
        Ok(Self { spans })
    }

    /// Whether runs may always start.
    pub fn is_always(&self) -> bool {
        self.spans.is_empty() || self.spans.iter().any(|s| s.days == Weekdays::ALL && s.from == 0 && s.to >= DAY)
    }

    /// Whether it is open.
    pub fn is_open(&self, at: Timestamp, zone: &TimeZone) -> bool {
        self.is_always() || self.around(at, zone).iter().any(|(from, to)| *from <= at && at < *to)
    }

    /// The first instant not before `at` when it is open.
    pub fn open_from(&self, at: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        if self.is_open(at, zone) {
            return Some(at);
        }
        let mut date = at.to_zoned(zone.clone()).date();
        for _ in 0..=8 {
            if let Some(opens) = self.openings(date, zone).into_iter().filter(|open| *open >= at).min() {
                return Some(opens);
            }
            date = date.tomorrow().ok()?;
        }
        None
    }

    /// When it shuts, if it is open at `at` and does at all: spans that meet are one.
    pub fn shuts_after(&self, at: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        if self.is_always() {
            return None;
        }
        let mut end = at;
        // Fourteen spans that meet are a week that never shuts.
        for _ in 0..14 {
            let later = self.around(end, zone).into_iter().filter(|(from, to)| *from <= end && end < *to).map(|s| s.1);
            match later.max() {
                Some(to) => end = to,
                None => return Some(end),
            }
        }
        None
    }

    /// When it opens on a day; an opening into a window that is open already is none.
    pub fn openings(&self, date: Date, zone: &TimeZone) -> Vec<Timestamp> {
        if self.is_always() {
            return Vec::new();
        }
        let mut openings: Vec<Timestamp> = self.on(date, zone).into_iter().map(|(from, _)| from).collect();
        openings.sort_unstable();
        openings.dedup();
        openings.retain(|open| !self.around(*open, zone).iter().any(|(from, to)| from < open && open <= to));
        openings
    }

    /// The spans of the day of an instant and of the day before.
    fn around(&self, at: Timestamp, zone: &TimeZone) -> Vec<(Timestamp, Timestamp)> {
        let date = at.to_zoned(zone.clone()).date();
        let mut spans = date.yesterday().map(|before| self.on(before, zone)).unwrap_or_default();
        spans.extend(self.on(date, zone));
        spans
    }

    fn on(&self, date: Date, zone: &TimeZone) -> Vec<(Timestamp, Timestamp)> {
        let spans = self.spans.iter().filter(|span| span.days.has(date.weekday()));
        spans.filter_map(|span| Some((edge(date, span.from, zone)?, edge(date, span.to, zone)?))).collect()
    }
}

/// The instant of so many minutes of a day by its clock, which may lie in the next.
fn edge(date: Date, minutes: u16, zone: &TimeZone) -> Option<Timestamp> {
    if minutes == DAY {
        return day_of(date, zone).map(|(_, end)| end);
    }
    let (date, minutes) = if minutes > DAY { (date.tomorrow().ok()?, minutes - DAY) } else { (date, minutes) };
    instant(date, time_of(minutes)?, zone)
}
