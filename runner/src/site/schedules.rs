//! The reading of schedules, windows and retries.

use std::time::Duration;

use jiff::civil::Time;

use super::{Reading, Retry, prove::What, shape::Values};
use crate::schedule::{Calendar, MonthDay, Schedule, Weekdays, When, Window, parse_clock, parse_weekday};

/// Keys that choose a rule.
const RULES: [&str; 9] =
    ["daily", "monthly", "every", "continuous", "after", "on_new_point", "calendar", "cron", "manual"];

/// Keys that belong to some rules only.
const BELONGS: [(&str, &[&str]); 4] = [
    ("days", &["daily"]),
    ("day", &["monthly"]),
    ("offset", &["every"]),
    ("window", &["every", "continuous", "on_new_point"]),
];

const DAY: Duration = Duration::from_secs(86_400);

impl Reading<'_> {
    pub(super) fn schedule(&mut self, job: &str, above: Values<'_, '_>) -> Schedule {
        let manual = Schedule::of(When::Manual, self.zone.clone());
        let Some(table) = above.table("schedule") else { return manual };
        let place = above.place("schedule");
        let rules: Vec<&str> = RULES.into_iter().filter(|rule| table.has(rule)).collect();
        let [rule] = rules.as_slice() else {
            self.reader.problem(place, format!("a schedule has exactly one of {}", RULES.join(", ")));
            return manual;
        };
        for (key, rules) in BELONGS {
            if table.has(key) && !rules.contains(rule) {
                self.reader.problem(table.place(key), format!("`{key}` belongs to {}", rules.join(", ")));
            }
        }
        for rule in ["continuous", "on_new_point", "manual"] {
            if table.truth(rule) == Some(false) {
                self.reader.problem(table.place(rule), format!("`{rule}` is true or not there"));
            }
        }
        Schedule {
            when: self.when(job, table, rule).unwrap_or(When::Manual),
            jitter: table.duration("jitter").unwrap_or_default(),
            catch_up: table.truth("catch_up").unwrap_or(true),
            ..manual
        }
    }

    fn when(&mut self, job: &str, table: Values<'_, '_>, rule: &str) -> Option<When> {
        Some(match rule {
            "daily" => {
                let days = table.text("days");
                let days = days.map_or(Some(Weekdays::ALL), |text| self.read(table, "days", Weekdays::parse(&text)))?;
                When::Daily { at: self.clock(table, "daily")?, days }
            }
            "monthly" => {
                let day = table.text("day").unwrap_or_else(|| "1".to_owned());
                let day = self.read(table, "day", month_day(&day))?;
                When::Monthly { at: self.clock(table, "monthly")?, day }
            }
            "every" => {
                let every = table.duration("every")?;
                let offset = table.duration("offset").unwrap_or_default();
                if !(Duration::from_secs(60)..=DAY).contains(&every) {
                    self.reader.problem(table.place("every"), "`every` is from 1m to 24h; for more use `calendar`");
                } else if offset >= every {
                    self.reader.problem(table.place("offset"), "`offset` is less than `every`");
                }
                When::Periodic { every, offset, window: self.window(table)? }
            }
            "continuous" => When::Continuous { window: self.window(table)? },
            "on_new_point" => When::OnNewPoint { window: self.window(table)? },
            "after" => {
                let other = table.text("after")?;
                self.names.refer(What::Job, &other, &format!("job.{job}"), table.place("after"));
                When::After { job: other }
            }
            "calendar" => {
                When::Calendar(self.read(table, "calendar", Calendar::on_calendar(&table.text("calendar")?))?)
            }
            "cron" => When::Calendar(self.read(table, "cron", Calendar::cron(&table.text("cron")?))?),
            _ => When::Manual,
        })
    }

    fn clock(&mut self, table: Values<'_, '_>, key: &str) -> Option<Time> {
        self.read(table, key, parse_clock(&table.text(key)?))
    }

    fn window(&mut self, table: Values<'_, '_>) -> Option<Window> {
        let text = table.text("window");
        text.map_or(Some(Window::default()), |text| self.read(table, "window", Window::parse(&text)))
    }

    pub(super) fn read<T>(&mut self, table: Values<'_, '_>, key: &str, read: Result<T, String>) -> Option<T> {
        read.map_err(|what| self.reader.problem(table.place(key), format!("`{key}`: {what}"))).ok()
    }
}

pub(super) fn retry(above: Values<'_, '_>) -> Retry {
    let default = Retry::default();
    let Some(table) = above.table("retry") else { return default };
    Retry {
        count: table.number("count").unwrap_or(default.count),
        interval: table.duration("interval").unwrap_or(default.interval),
    }
}

fn month_day(text: &str) -> Result<MonthDay, String> {
    let bad = || format!("`{text}` is not a day of a month; write `15`, `last`, `first sun` or `last sat`");
    let words: Vec<&str> = text.split_whitespace().collect();
    match words.as_slice() {
        ["last"] => Ok(MonthDay::Last),
        [number] => number.parse().ok().filter(|n| (1..=31).contains(n)).map(MonthDay::Number).ok_or_else(bad),
        [nth, day] => {
            let nth = ["first", "second", "third", "fourth", "last"].iter().position(|word| word == nth);
            let nth = nth.and_then(|nth| i8::try_from(nth + 1).ok()).ok_or_else(bad)?;
            Ok(MonthDay::Weekday(nth, parse_weekday(day)?))
        }
        _ => Err(bad()),
    }
}
