//! Progress of one phase: a bar on a terminal, a plain line every 30 s in a log, records with `--json`.
//!
//! Invariants
//! - Never 100 % before the phase has ended.
//! - The rate is that of the last minute; with less than 10 s of it the time left is unknown.
//! - SIGUSR1 prints one line, wherever stderr goes.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use serde::Serialize;

use super::{Form, Output};
use crate::{stop, units};

const WINDOW: Duration = Duration::from_secs(60);
const WINDOW_MIN: Duration = Duration::from_secs(10);
const LOG_EVERY: Duration = Duration::from_secs(30);
const RECORD_EVERY: Duration = Duration::from_secs(1);

/// A phase of work under way. Dropping it ends it.
#[derive(Debug)]
pub struct Progress<'a> {
    out: &'a Output,
    phase: &'static str,
    bar: Option<ProgressBar>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    total: Option<u64>,
    done: u64,
    samples: VecDeque<(Instant, u64)>,
    spoke: Instant,
    recorded: Instant,
}

#[derive(Serialize)]
struct Fields {
    phase: &'static str,
    bytes_done: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_total: Option<u64>,
    bytes_per_second: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds_left: Option<u64>,
}

impl<'a> Progress<'a> {
    pub(super) fn begin(out: &'a Output, phase: &'static str, total: Option<u64>) -> Self {
        let bar = (out.terminal && !out.quiet && out.form == Form::Human).then(|| bar(phase, total));
        if bar.is_none() && out.form == Form::Human {
            out.say(format_args!("{phase} ..."));
        }
        let now = Instant::now();
        let state = State { total, done: 0, samples: VecDeque::from([(now, 0)]), spoke: now, recorded: now };
        Self { out, phase, bar, state: Mutex::new(state) }
    }

    /// `bytes` more are done.
    pub fn add(&self, bytes: u64) {
        let done = self.state.lock().done.saturating_add(bytes);
        self.set(done);
    }

    /// `done` bytes of the phase are done.
    pub fn set(&self, done: u64) {
        let mut state = self.state.lock();
        let now = Instant::now();
        state.done = done;
        if state.samples.back().is_none_or(|(at, _)| now - *at >= Duration::from_millis(250)) {
            state.samples.push_back((now, done));
        }
        while state.samples.len() > 2 && state.samples.front().is_some_and(|(at, _)| now - *at > WINDOW) {
            state.samples.pop_front();
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done.min(state.total.map_or(done, |t| t.saturating_sub(1))));
        }
        let asked = stop::take_status_request();
        let due = now - state.spoke >= LOG_EVERY && self.bar.is_none() && self.out.form == Form::Human;
        if asked || due {
            state.spoke = now;
            self.out.say(self.sentence(&state, now));
        }
        if self.out.form == Form::Json && now - state.recorded >= RECORD_EVERY {
            state.recorded = now;
            self.out.record("progress", &self.fields(&state, now));
        }
    }

    /// `done` bytes of `total` are done, where it turns out only on the way how many there are.
    pub fn reach(&self, done: u64, total: Option<u64>) {
        let was = std::mem::replace(&mut self.state.lock().total, total);
        if let Some(bar) = self.bar.as_ref().filter(|_| was != total) {
            dress(bar, total);
        }
        self.set(done);
    }

    /// Bytes done so far.
    pub fn done(&self) -> u64 {
        self.state.lock().done
    }

    fn fields(&self, state: &State, now: Instant) -> Fields {
        let (span, rate) = rate_of(state, now);
        let left = state.total.map(|t| t.saturating_sub(state.done));
        let known = rate > 0 && span >= WINDOW_MIN;
        let seconds_left = left.filter(|_| known).map(|left| left / rate.max(1) + 1);
        Fields {
            phase: self.phase,
            bytes_done: state.done,
            bytes_total: state.total,
            bytes_per_second: rate,
            seconds_left,
        }
    }

    fn sentence(&self, state: &State, now: Instant) -> String {
        let fields = self.fields(state, now);
        let of = fields.bytes_total.map(|t| format!(" of {}", units::bytes(t))).unwrap_or_default();
        let left = fields.seconds_left.map_or("unknown".into(), units::seconds);
        format!(
            "{}: {}{of}, {}/s, time left {left}",
            self.phase,
            units::bytes(fields.bytes_done),
            units::bytes(fields.bytes_per_second)
        )
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn rate_of(state: &State, now: Instant) -> (Duration, u64) {
    let Some((since, from)) = state.samples.front() else { return (Duration::ZERO, 0) };
    let span = now - *since;
    let bytes = u128::from(state.done.saturating_sub(*from));
    let rate = bytes * 1000 / span.as_millis().max(1);
    (span, u64::try_from(rate).unwrap_or(u64::MAX))
}

fn bar(phase: &'static str, total: Option<u64>) -> ProgressBar {
    // Nothing is drawn before it has its style.
    let bar = ProgressBar::hidden().with_message(phase);
    dress(&bar, total);
    bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(5));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// A share of the total where there is one, else a count.
fn dress(bar: &ProgressBar, total: Option<u64>) {
    match total {
        Some(total) => bar.set_length(total),
        None => bar.unset_length(),
    }
    let template = if total.is_some() {
        "{msg} {bar:32} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {percent} %"
    } else {
        "{msg} {spinner} {binary_bytes} {binary_bytes_per_sec}"
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}
