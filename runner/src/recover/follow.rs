//! Watches a recovered machine beside its door: records what happens to it, and lets it go on when a disk that had
//! failed answers again.
//!
//! Invariants
//! - Only reads and records; the machine is never stopped from here.
//! - A machine that stops again right after it was let go is tried again at growing intervals, for ever.

use std::time::{Duration, Instant};

use aquifer_mount::session::{Client, Folder};

use super::record::{Machine, Wanted};
use crate::{
    fail::Result,
    host::{Happening, Host, Power, Running},
};

/// How often the session is looked at when nothing happens.
const TICK: Duration = Duration::from_millis(500);

/// Longest time between two tries to let a stopped machine go on.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// Follows the machine of a session until `done` says that the session has ended. Meant for a thread of its own.
pub fn follow(folder: &Folder, done: &dyn Fn() -> bool) {
    while !done() {
        // A record that cannot be read now is read again: the folder is somebody else's to repair.
        let machine = folder.load().ok().and_then(|spec| Machine::of(&spec).ok().flatten());
        if let Some((machine, running)) = machine.and_then(|m| m.running.clone().map(|r| (m, r)))
            && running.process.is_alive()
            && let Ok(host) = super::host(&machine.host)
        {
            let mut watch = Watch { folder, host, running: &running, stopped: None };
            if let Err(error) = host.follow(&running, TICK, &mut |happening| watch.take(happening) && !done()) {
                tracing::warn!(%error, "the machine cannot be followed");
            }
        }
        std::thread::sleep(TICK);
    }
}

struct Watch<'a> {
    folder: &'a Folder,
    host: &'static dyn Host,
    running: &'a Running,
    /// Stopped by a failing disk: when to try next, and how long to wait after that.
    stopped: Option<(Instant, Duration)>,
}

impl Watch<'_> {
    fn take(&mut self, happening: Option<Happening>) -> bool {
        let outcome = match happening {
            None => self.retry(),
            Some(Happening::IoError) => self.interrupted(),
            Some(Happening::PoweredOff) => self
                .note("machine_powered_off")
                .and_then(|()| Machine::edit(self.folder, |machine| machine.wanted = Wanted::Off)),
            Some(Happening::Gone) => self.note("machine_gone"),
            Some(Happening::Crashed) => self.note("machine_crashed"),
            Some(Happening::Reset) => self.note("machine_reset"),
            Some(Happening::Resumed) => self.going_on(),
            Some(Happening::Stopped) => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, "what happened to the machine cannot be recorded");
        }
        happening != Some(Happening::Gone)
    }

    fn note(&self, op: &str) -> Result<()> {
        let spec = self.folder.load()?;
        Ok(self.folder.event(spec.id, op, None)?)
    }

    fn interrupted(&mut self) -> Result<()> {
        if self.stopped.is_none() {
            self.stopped = Some((Instant::now() + TICK, TICK));
            let reason = "a disk could not be read or written; the machine waits";
            let spec = self.folder.load()?;
            self.folder.event(spec.id, "machine_io_error", Some(reason))?;
        }
        Ok(())
    }

    /// Tries to let the machine go on once its door answers.
    fn retry(&mut self) -> Result<()> {
        let Some((due, pause)) = self.stopped else { return Ok(()) };
        if Instant::now() < due {
            return Ok(());
        }
        if self.host.power(self.running)? != Power::IoError {
            return self.going_on();
        }
        let answers =
            Client::of(self.folder.clone()).status().is_ok_and(|s| s.disks.iter().all(|d| d.parked.is_empty()));
        if answers && self.host.resume(self.running).is_ok() {
            return self.going_on();
        }
        let pause = (pause * 2).min(RETRY_MAX);
        self.stopped = Some((Instant::now() + pause, pause));
        Ok(())
    }

    fn going_on(&mut self) -> Result<()> {
        if self.stopped.take().is_some() {
            self.note("machine_goes_on")?;
        }
        Ok(())
    }
}
