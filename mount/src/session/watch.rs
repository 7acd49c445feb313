//! Looks at a served session several times a second and lets its state follow what is so.
//!
//! Invariants
//! - Each change is told once.
//! - A state that the runner has moved meanwhile is left alone: a refused transition is not an error here.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_vdisk::{HydrateState, Hydrator};

use super::{
    Error, State,
    live::{Live, LiveDisk},
    serve::{Happening, Hooks},
};

/// How often a deadline is turned into a rate anew.
const PACE_EVERY: Duration = Duration::from_secs(5);

/// How often the record is read where nothing seems to have changed.
const READ_EVERY: Duration = Duration::from_millis(500);

/// How long reads must have waited before that is news.
const AWAY_AFTER: Duration = Duration::from_secs(1);

/// How long a source must have been away before it is opened anew.
const RENEW_AFTER: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Watcher {
    away_since: Option<Instant>,
    was_local: bool,
    was_away: bool,
    had_failed: bool,
    was_full: bool,
    /// For each disk, whether it was told what no file system uses.
    told_unused: Vec<bool>,
    paced: Instant,
    read: Instant,
    seen: (bool, bool),
}

impl Watcher {
    pub(super) fn new(is_local: bool) -> Self {
        let now = Instant::now();
        Self {
            away_since: None,
            was_local: is_local,
            was_away: false,
            had_failed: false,
            was_full: false,
            told_unused: Vec::new(),
            paced: now,
            read: now,
            seen: (false, false),
        }
    }

    pub(super) fn look(&mut self, live: &Arc<Live>, hooks: &dyn Hooks) {
        let states: Vec<HydrateState> =
            live.disks.iter().filter_map(|d| Some(d.hydrator.lock().as_ref().map(Hydrator::progress)?.state)).collect();
        let failed = states.contains(&HydrateState::Failed);
        if failed && !self.had_failed {
            live.tell(hooks, Happening::HydrationFailed, None);
        }
        self.had_failed = failed;
        let full = states.contains(&HydrateState::NoSpace);
        if full != self.was_full {
            self.was_full = full;
            note(live, if full { "space_short" } else { "space_back" }, None);
        }
        self.tell_unused(live);
        let parked = live.disks.iter().flat_map(|d| d.disk.parked()).any(|p| p.waited >= AWAY_AFTER);
        let missing = live.disks.iter().any(|d| d.opening.lock().is_some());
        let away = missing || parked || states.contains(&HydrateState::SourceAway);
        self.renew(live, away);
        if away != self.was_away {
            self.was_away = away;
            live.tell(hooks, if away { Happening::SourceAway } else { Happening::SourceBack }, None);
        }
        let local = live.is_local();
        if local && !self.was_local {
            live.tell(hooks, Happening::AllLocal, None);
        }
        self.was_local = local;
        let copying = states.iter().any(|s| matches!(s, HydrateState::Running));
        self.follow(live, away, copying);
        if self.paced.elapsed() >= PACE_EVERY {
            self.paced = Instant::now();
            live.keep_pace();
            live.save_traces();
        }
    }

    /// A source that has been away for a while may be back as another file or another server's export.
    fn renew(&mut self, live: &Arc<Live>, away: bool) {
        self.away_since = if away { self.away_since.or(Some(Instant::now())) } else { None };
        let long = self.away_since.is_some_and(|since| since.elapsed() >= RENEW_AFTER);
        let is_away = |disk: &LiveDisk| {
            let waits = disk.hydrator.lock().as_ref().is_some_and(|h| h.progress().state == HydrateState::SourceAway);
            long && (waits || disk.disk.parked().iter().any(|p| p.waited >= RENEW_AFTER))
        };
        if let Err(error) = live.renew_sources(&is_away) {
            tracing::warn!(%error, "a source was not opened anew");
        }
    }

    /// What is left out of the copy is told once for each disk, as soon as it is known.
    fn tell_unused(&mut self, live: &Live) {
        self.told_unused.resize(live.disks.len(), false);
        for (disk, told) in live.disks.iter().zip(&mut self.told_unused).filter(|(_, told)| !**told) {
            let Some(unused) = disk.hydrator.lock().as_ref().and_then(Hydrator::unused) else { continue };
            *told = true;
            let doubts = unused.doubt.iter().chain(unused.volumes.iter().filter_map(|v| v.doubt.as_ref()));
            let doubts: String = doubts.map(|why| format!("; copied all the same: {why}")).collect();
            let what = format!("{}: {} bytes are left out{doubts}", disk.disk.name(), unused.ranges.bytes());
            note(live, "unused_found", Some(&what));
        }
    }

    /// Mounted, Migrating and Interrupted are what is so.
    fn follow(&mut self, live: &Arc<Live>, away: bool, copying: bool) {
        // Others move the state too, but nobody waits for this to notice at once.
        if self.seen == (away, copying) && self.read.elapsed() < READ_EVERY {
            return;
        }
        (self.seen, self.read) = ((away, copying), Instant::now());
        let Ok(record) = live.folder.load() else { return };
        let (next, why) = match record.state {
            State::Mounted | State::Migrating if away => (State::Interrupted, "source_away"),
            State::Interrupted if !away => (State::Mounted, "source_back"),
            State::Mounted if copying => (State::Migrating, "hydrate"),
            _ => return,
        };
        match live.folder.transition(next, why, None) {
            Ok(_) | Err(Error::State { .. }) => {}
            Err(error) => tracing::warn!(%error, "a state was not recorded"),
        }
    }
}

fn note(live: &Live, event: &str, what: Option<&str>) {
    if let Err(error) = live.folder.event(live.spec.id, event, what) {
        tracing::warn!(%error, "an event was not recorded");
    }
}
