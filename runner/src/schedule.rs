//! When a job is due: pure arithmetic on instants, civil times and time zones.
//!
//! Invariants
//! - The same schedule, zone and instant give the same answer anywhere: no clock is read here.
//! - A day, week or month rule gives exactly one run for each day it names, also where clocks change: a time that a
//!   spring day does not have is run when the clock has jumped over it; one that an autumn day has twice, the first time.
//! - A grid counts elapsed time from the start of the day, so its steps stay even through a change of clocks; it starts
//!   anew every midnight.
//! - However many due times a stopped service has missed, they are answered by one run at most.
//!
//! Not here: which job waits for a slot, what ran last (the catalogue), the reading of the site file.

mod calendar;
mod window;

use std::time::Duration;

use jiff::{
    SignedDuration, Timestamp, ToSpan, Zoned,
    civil::{Date, Time, Weekday},
    tz::TimeZone,
};

pub use calendar::Calendar;
pub use window::{Weekdays, Window, parse_clock, parse_weekday};

/// Days that are looked through for the next run before a rule counts as one that never comes.
const HORIZON_DAYS: usize = 366 * 9;

/// When a job runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// The rule.
    pub when: When,
    /// Zone of all clock times in it.
    pub zone: TimeZone,
    /// Each run starts up to this much later, by the job's name: not everything at once.
    pub jitter: Duration,
    /// Whether a run that was due while nothing was there to start it is made up for.
    pub catch_up: bool,
}

/// The rule of a schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// Only when somebody asks.
    Manual,
    /// At a clock time on some days of the week.
    Daily {
        /// The clock time.
        at: Time,
        /// The days.
        days: Weekdays,
    },
    /// At a clock time on one day of a month.
    Monthly {
        /// The clock time.
        at: Time,
        /// Which day.
        day: MonthDay,
    },
    /// On an even grid counted from midnight, inside a window.
    Periodic {
        /// Distance of the grid's points, at most a day.
        every: Duration,
        /// The first point of a day.
        offset: Duration,
        /// When runs may start; at each opening there is one at once.
        window: Window,
    },
    /// Again as soon as the last run has ended, inside a window.
    Continuous {
        /// When runs may start.
        window: Window,
    },
    /// When another job has ended, however it ended.
    After {
        /// The other job.
        job: String,
    },
    /// When a source repository has received a point.
    OnNewPoint {
        /// When runs may start.
        window: Window,
    },
    /// By a calendar expression.
    Calendar(Calendar),
}

/// A day of a month.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MonthDay {
    /// By number, 1 to 31; in a month without it the last day.
    Number(i8),
    /// The last day.
    Last,
    /// The first to fourth such weekday, or with 5 the last.
    Weekday(i8, Weekday),
}

impl MonthDay {
    fn in_month(self, first: Date) -> Option<Date> {
        match self {
            Self::Number(day) => first.with().day(day.min(first.days_in_month())).build().ok(),
            Self::Last => Some(first.last_of_month()),
            Self::Weekday(5, weekday) => first.nth_weekday_of_month(-1, weekday).ok(),
            Self::Weekday(nth, weekday) => first.nth_weekday_of_month(nth, weekday).ok(),
        }
    }
}

/// What an event-driven job waits for, or when the next run is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// At that time (jitter included).
    At(Timestamp),
    /// Something has to happen first; no run starts before that time (the window is shut until then).
    OnEvent(Timestamp),
    /// Not by itself.
    Never,
}

/// What has become of the due times since the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatchUp {
    /// The next run; in the past where one is to be made up for.
    pub next: Option<Timestamp>,
    /// Due times that passed without a run, made up for or not.
    pub missed: u32,
}

impl Schedule {
    /// A schedule of this rule with nothing special about it.
    pub fn of(when: When, zone: TimeZone) -> Self {
        Self { when, zone, jitter: Duration::ZERO, catch_up: true }
    }

    /// When the next run after `after` is due, for a job of this name whose last run ended at `after`.
    pub fn due(&self, job: &str, after: Timestamp) -> Due {
        match &self.when {
            When::Manual => Due::Never,
            When::Continuous { window } => window.open_from(after, &self.zone).map_or(Due::Never, Due::At),
            When::After { .. } => Due::OnEvent(after),
            When::OnNewPoint { window } => window.open_from(after, &self.zone).map_or(Due::Never, Due::OnEvent),
            _ => self.next_after(after).map_or(Due::Never, |at| Due::At(self.jittered(job, at))),
        }
    }

    /// The first due time strictly after `after`, without jitter; `None` for what no clock starts.
    pub fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        match &self.when {
            When::Daily { at, days } => self.next_day(after, |date| {
                if days.has(date.weekday()) { self.clock(date, *at).into_iter().collect() } else { Vec::new() }
            }),
            When::Monthly { at, day } => self.next_day(after, |date| {
                let due = day.in_month(date.first_of_month()) == Some(date);
                if due { self.clock(date, *at).into_iter().collect() } else { Vec::new() }
            }),
            When::Periodic { every, offset, window } => {
                self.next_day(after, |date| self.grid(date, *every, *offset, window))
            }
            When::Calendar(calendar) => calendar.next_after(after, &self.zone),
            When::Manual | When::Continuous { .. } | When::After { .. } | When::OnNewPoint { .. } => None,
        }
    }

    /// What is to be done about due times between `last` (the last one that was served, or when the job was first
    /// seen) and `now`. `missed` counts at most a thousand.
    pub fn catch_up(&self, job: &str, last: Timestamp, now: Timestamp) -> CatchUp {
        let mut missed = 0;
        let mut newest = None;
        let mut from = last;
        while missed < 1000 {
            match self.next_after(from) {
                Some(at) if self.jittered(job, at) <= now => {
                    missed += 1;
                    newest = Some(at);
                    from = at;
                }
                _ => break,
            }
        }
        match newest {
            Some(at) if self.catch_up => CatchUp { next: Some(self.jittered(job, at)), missed },
            _ => {
                let next = self.next_after(now.max(from)).map(|at| self.jittered(job, at));
                CatchUp { next, missed }
            }
        }
    }

    /// Whether a run may start at this time (always, where there is no window).
    pub fn may_start(&self, at: Timestamp) -> bool {
        match &self.when {
            When::Periodic { window, .. } | When::Continuous { window } | When::OnNewPoint { window } => {
                window.is_open(at, &self.zone)
            }
            _ => true,
        }
    }

    /// When a run that starts at `at` has to stop because its window shuts; `None` where it never has to.
    pub fn must_stop(&self, at: Timestamp) -> Option<Timestamp> {
        match &self.when {
            When::Periodic { window, .. } | When::Continuous { window } | When::OnNewPoint { window } => {
                window.shuts_after(at, &self.zone)
            }
            _ => None,
        }
    }

    fn jittered(&self, job: &str, at: Timestamp) -> Timestamp {
        let range = u64::try_from(self.jitter.as_millis()).unwrap_or(u64::MAX);
        if range == 0 {
            return at;
        }
        let mut key = job.as_bytes().to_vec();
        key.extend(at.as_second().to_le_bytes());
        let hash = blake3::hash(&key);
        let part = hash.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes)) % range;
        at.checked_add(SignedDuration::from_millis(i64::try_from(part).unwrap_or(0))).unwrap_or(at)
    }

    /// The first of `times` after `after`, day by day.
    fn next_day(&self, after: Timestamp, times: impl Fn(Date) -> Vec<Timestamp>) -> Option<Timestamp> {
        let mut date = after.to_zoned(self.zone.clone()).date();
        // What belongs to yesterday can lie in today, where a clock was set back over midnight.
        date = date.yesterday().unwrap_or(date);
        for _ in 0..HORIZON_DAYS {
            if let Some(next) = times(date).into_iter().filter(|at| *at > after).min() {
                return Some(next);
            }
            date = date.tomorrow().ok()?;
        }
        None
    }

    fn clock(&self, date: Date, at: Time) -> Option<Timestamp> {
        instant(date, at, &self.zone)
    }

    /// The grid points and openings of a day.
    fn grid(&self, date: Date, every: Duration, offset: Duration, window: &Window) -> Vec<Timestamp> {
        let Some((start, end)) = day_of(date, &self.zone) else { return Vec::new() };
        let mut due: Vec<Timestamp> = window.openings(date, &self.zone);
        let Ok(every) = SignedDuration::try_from(every) else { return due };
        let first = SignedDuration::try_from(offset).ok().and_then(|offset| start.checked_add(offset).ok());
        let mut at = first.unwrap_or(end);
        while at < end && every > SignedDuration::ZERO {
            if window.is_open(at, &self.zone) {
                due.push(at);
            }
            match at.checked_add(every) {
                Ok(next) => at = next,
                Err(_) => break,
            }
        }
        due
    }
}

/// The instant of a clock time on a day: after the gap where the day lacks it, the first where it has it twice.
fn instant(date: Date, at: Time, zone: &TimeZone) -> Option<Timestamp> {
    zone.to_ambiguous_zoned(date.to_datetime(at)).compatible().ok().map(|zoned| zoned.timestamp())
}

/// Where a day begins and where the next one does.
fn day_of(date: Date, zone: &TimeZone) -> Option<(Timestamp, Timestamp)> {
    let start = |date: Date| -> Option<Zoned> { date.to_zoned(zone.clone()).ok()?.start_of_day().ok() };
    let next = date.checked_add(1.day()).ok()?;
    Some((start(date)?.timestamp(), start(next)?.timestamp()))
}

#[cfg(test)]
mod tests;
