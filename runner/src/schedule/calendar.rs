//! Calendar expressions: cron patterns, and the forms of systemd's `OnCalendar` that people write.
//!
//! Invariants
//! - An expression that can never come, or that this cannot read, is refused when it is read.

use croner::{Cron, parser::CronParser};
use jiff::{Timestamp, tz::TimeZone};

/// Words that stand for a whole expression.
const WORDS: [(&str, &str); 9] = [
    ("minutely", "0 * * * * *"),
    ("hourly", "0 0 * * * *"),
    ("daily", "0 0 0 * * *"),
    ("weekly", "0 0 0 * * MON"),
    ("monthly", "0 0 0 1 * *"),
    ("quarterly", "0 0 0 1 1,4,7,10 *"),
    ("semiannually", "0 0 0 1 1,7 *"),
    ("yearly", "0 0 0 1 1 *"),
    ("annually", "0 0 0 1 1 *"),
];

/// A calendar expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calendar {
    /// As it was written.
    text: String,
    cron: Box<Cron>,
}

impl Calendar {
    /// Reads a cron pattern of five or six fields (seconds first).
    pub fn cron(text: &str) -> Result<Self, String> {
        let parser = CronParser::builder().dom_and_dow(false).build();
        let cron = parser.parse(text).map_err(|e| format!("`{text}` is not a cron pattern: {e}"))?;
        let calendar = Self { text: text.to_owned(), cron: Box::new(cron) };
        let start = Timestamp::from_second(1_767_225_600).unwrap_or_default();
        if calendar.next_after(start, &TimeZone::UTC).is_none() {
            return Err(format!("`{text}` never comes"));
        }
        Ok(calendar)
    }

    /// Reads `hourly`, `Sun 04:00`, `Mon..Fri *-*-* 22:00`, `*-*-01 04:00:00`, `*:0/15`.
    pub fn on_calendar(text: &str) -> Result<Self, String> {
        let word = text.trim().to_ascii_lowercase();
        if let Some((_, cron)) = WORDS.iter().find(|(name, _)| *name == word) {
            return Ok(Self { text: text.to_owned(), ..Self::cron(cron)? });
        }
        let cron = translate(&word)
            .ok_or_else(|| format!("`{text}` is not a calendar expression; write for example `Mon..Fri 22:00`"))?;
        let read = Self::cron(&cron).map_err(|_| format!("`{text}` is not a calendar expression that ever comes"))?;
        Ok(Self { text: text.to_owned(), ..read })
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The first time strictly after `after`.
    pub fn next_after(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let next = self.cron.find_next_occurrence(&after.to_zoned(zone.clone()), false).ok()?;
        Some(next.timestamp())
    }
}

/// A cron pattern with seconds for `[DAYS] [DATE] [TIME]`.
fn translate(text: &str) -> Option<String> {
    if text.is_empty() {
        return None;
    }
    let mut days = "*".to_owned();
    let mut date = ("*".to_owned(), "*".to_owned());
    let mut time = None;
    let mut dated = false;
    for (at, part) in text.split_whitespace().enumerate() {
        if part.contains(':') && time.is_none() {
            time = Some(clock(part)?);
        } else if part.starts_with(|c: char| c.is_ascii_alphabetic()) && at == 0 {
            days = names(part)?;
        } else if part.contains('-') && time.is_none() && !dated {
            date = day(part)?;
            dated = true;
        } else {
            return None;
        }
    }
    let (hours, minutes, seconds) = time.unwrap_or_else(|| ("0".into(), "0".into(), "0".into()));
    let (month, day) = date;
    Some(format!("{seconds} {minutes} {hours} {day} {month} {days}"))
}

fn clock(part: &str) -> Option<(String, String, String)> {
    let mut fields = part.split(':');
    let (hours, minutes) = (field(fields.next()?, 23)?, field(fields.next()?, 59)?);
    let seconds = fields.next().map_or(Some("0".into()), |text| field(text, 59))?;
    fields.next().is_none().then_some((hours, minutes, seconds))
}

/// Month and day of `*-*-01` or `05-01`; a year can only be `*`.
fn day(part: &str) -> Option<(String, String)> {
    let fields: Vec<&str> = part.split('-').collect();
    match fields.as_slice() {
        ["*", month, day] | [month, day] => Some((field(month, 12)?, field(day, 31)?)),
        _ => None,
    }
}

fn names(part: &str) -> Option<String> {
    let mut out = Vec::new();
    for range in part.split(',') {
        let short = |word: &str| {
            let name = format!("{:?}", super::parse_weekday(word).ok()?);
            Some(name.chars().take(3).collect::<String>().to_uppercase())
        };
        match range.split_once("..") {
            Some((from, to)) => out.push(format!("{}-{}", short(from)?, short(to)?)),
            None => out.push(short(range)?),
        }
    }
    Some(out.join(","))
}

/// `5`, `1,15`, `9..17`, `0/15`, `*`; a step without an end goes on to `most`.
fn field(text: &str, most: u8) -> Option<String> {
    let known = |c: char| c.is_ascii_digit() || ",/*.".contains(c);
    let mut out = Vec::new();
    for part in text.split(',') {
        let part = part.replace("..", "-");
        match part.split_once('/') {
            Some((from, step)) if from != "*" && !from.contains('-') => out.push(format!("{from}-{most}/{step}")),
            _ => out.push(part),
        }
    }
    let cron = out.join(",");
    (!text.is_empty() && text.chars().all(known) && !cron.contains('.')).then_some(cron)
}
