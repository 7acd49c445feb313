//! What the libraries report while they go on working: warnings and errors, as lines on stderr.
//!
//! Invariants
//! - One line for each report, with nothing in it that a terminal obeys.
//! - At most [`LINES_PER_SECOND`]; what is left out is counted, and the count is said.
//!
//! Not here: what ends a command (`fail`), what a verb warns of ([`super::Output::warn`]).

use std::{
    fmt::{Debug, Write as _},
    io::{self, Write as _},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use super::plain;

/// A guest that reads a damaged block again and again must not fill a disk with its log.
const LINES_PER_SECOND: u32 = 20;

/// Takes over what is reported in this process; once is enough.
pub(crate) fn begin() {
    // Whoever was first stays.
    let _ = tracing::subscriber::set_global_default(Log { pace: Mutex::new(Pace::new(Instant::now())) });
}

struct Log {
    pace: Mutex<Pace>,
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN && metadata.target().starts_with("aquifer") && metadata.is_event()
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let Some(missed) = self.pace.lock().admits(Instant::now()) else { return };
        let mut text = String::new();
        if missed > 0 {
            let _ = writeln!(text, "warning: {missed} more of these were not printed");
        }
        let level = if *event.metadata().level() == Level::ERROR { "error" } else { "warning" };
        let _ = writeln!(text, "{level}: {}", plain(&line.text()));
        // A log that has gone away must not end the work, and there is nowhere left to say so.
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// The parts of a report.
#[derive(Default)]
struct Line {
    message: String,
    error: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let value = format!("{value:?}");
        match field.name() {
            "message" => self.message = value,
            "error" | "end" | "why" => self.error = value,
            name => {
                let comma = if self.fields.is_empty() { "" } else { ", " };
                let _ = write!(self.fields, "{comma}{name} {value}");
            }
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

impl Line {
    fn text(&self) -> String {
        let mut text = self.message.clone();
        if !self.error.is_empty() {
            let _ = write!(text, ": {}", self.error);
        }
        if !self.fields.is_empty() {
            let _ = write!(text, " ({})", self.fields);
        }
        text
    }
}

/// So many lines in a second, and no more.
struct Pace {
    since: Instant,
    printed: u32,
    missed: u64,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { since: now, printed: 0, missed: 0 }
    }

    /// How many lines were left out before this one; `None` where this one is left out too.
    fn admits(&mut self, now: Instant) -> Option<u64> {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            (self.since, self.printed) = (now, 0);
        }
        if self.printed >= LINES_PER_SECOND {
            self.missed += 1;
            return None;
        }
        self.printed += 1;
        Some(std::mem::take(&mut self.missed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_instead_of_printed() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let printed = (0..1000).filter(|_| pace.admits(start).is_some()).count();
        assert_eq!(printed, LINES_PER_SECOND as usize);
        assert_eq!(pace.admits(start + Duration::from_secs(1)), Some(1000 - u64::from(LINES_PER_SECOND)));
        assert_eq!(pace.admits(start + Duration::from_secs(1)), Some(0));
    }
}
