//! Shows what the catalogue tells while something runs: each event once, in order.

use jiff::Timestamp;

use crate::{
    catalogue::{Catalogue, EventFilter, EventRecord, SessionId},
    fail::Result,
    output::Output,
};

/// What an event is called that says for what an operation waits, and until when.
pub const WAIT: &str = "wait";

/// What an event is called that only says what people have to know.
pub const NOTE: &str = "note";

/// How far the events were shown.
#[derive(Debug)]
pub struct Follow {
    seen: i64,
    session: Option<SessionId>,
    owner: Option<String>,
    trouble: bool,
}

impl Follow {
    /// Everything from now on.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn from_now(catalogue: &Catalogue) -> Result<Self> {
        Ok(Self { seen: catalogue.last_event()?, session: None, owner: None, trouble: false })
    }

    /// Only what one worker does.
    #[must_use]
    pub fn of_owner(mut self, owner: &str) -> Self {
        self.owner = Some(owner.to_owned());
        self
    }

    /// Only one session, from its beginning.
    #[must_use]
    pub fn of_session(mut self, session: SessionId) -> Self {
        (self.seen, self.session) = (0, Some(session));
        self
    }

    /// People are told only what goes wrong on the way, what is waited for and what they have to know; records are made of everything all the same.
    #[must_use]
    pub fn only_trouble(mut self) -> Self {
        self.trouble = true;
        self
    }

    /// Shows what is new.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn show(&mut self, catalogue: &Catalogue, out: &Output) -> Result<()> {
        let filter = EventFilter { session: self.session, ..EventFilter::default() };
        for record in catalogue.events(self.seen, &filter)? {
            self.seen = record.seq;
            if self.owner.as_ref().is_none_or(|owner| record.event.user == *owner) {
                out.record("event", &record);
                // The end of a session is told by whoever follows it.
                let trouble = record.event.error.is_some() && !record.event.object.starts_with("session/");
                if trouble || !self.trouble || matches!(record.event.op.as_str(), WAIT | NOTE) {
                    out.line(line(&record));
                }
            }
        }
        Ok(())
    }
}

/// An event as a line.
pub fn line(record: &EventRecord) -> String {
    let event = &record.event;
    let mut text = format!("{}  {}  {}", at(record.time), event.object, event.op);
    match (&event.from, &event.to) {
        (Some(from), Some(to)) => text.push_str(&format!(": {from} -> {to}")),
        (None, Some(to)) => text.push_str(&format!(": {to}")),
        _ => {}
    }
    if let Some(why) = event.error.as_ref().or(event.reason.as_ref()) {
        text.push_str(&format!("  ({why})"));
    }
    text.push_str(&format!("  by {}", event.user));
    text
}

/// A time to the second.
pub fn at(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
