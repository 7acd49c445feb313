//! A session while its door serves it: the disks, their copying, what is said and what can be ordered.
//!
//! Invariants
//! - Orders that outlive the door (rate, deadline, pause) are in the record before they take effect.
//! - Nothing here waits for the source; only `drain` and `hand_over` wait for our own disk.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_vdisk::{
    BlockCache, ChainSpec, DemandStats, Disk, HydrateProgress, HydrateState, Hydrator, Pace,
    unused::{Unused, Volume},
};
use jiff::Timestamp;
use parking_lot::{Condvar, Mutex};

use super::{
    Blocks, DiskSpec, Error, Folder, Hydrate, Options, Preallocate, Result, Spec, State, Status,
    control::{Answer, Clients, Request, Setting},
    serve::{ConnectNbd, Happening, Hooks},
    source::Opening,
    space,
    status::{
        CacheStatus, DemandStatus, DiskStatus, Door, HydrationStatus, OverlayStatus, Parked, Phase, STATUS_SCHEMA,
        UnusedStatus, VolumeStatus,
    },
    traces::Traced,
};
use crate::{confine::Confinement, fuse::FuseDoor, nbd};

/// Parked ranges a status lists at most, per disk.
const PARKED_MAX: usize = 256;

/// Ranges of a remote source that are on their way at once.
const REMOTE_WORKERS: usize = 8;

/// Recovered machines are meant to be finished within two days.
const OLD_AFTER: Duration = Duration::from_secs(48 * 3600);

/// A disk of a session that is served.
#[derive(Debug)]
pub(super) struct LiveDisk {
    pub(super) disk: Arc<Disk>,
    pub(super) hydrator: Mutex<Option<Hydrator>>,
    /// Its source, while that is being opened.
    pub(super) opening: Mutex<Option<Opening>>,
    pub(super) traced: Mutex<Traced>,
}

/// A session that is served by this process.
#[derive(Debug)]
pub struct Live {
    pub(super) folder: Folder,
    pub(super) spec: Spec,
    pub(super) disks: Vec<LiveDisk>,
    pub(super) connect: ConnectNbd,
    pub(super) cache: Arc<BlockCache>,
    pub(super) server: nbd::Server,
    pub(super) fuse: Mutex<Option<FuseDoor>>,
    pub(super) options: Mutex<Options>,
    pub(super) started: Timestamp,
    pub(super) confinement: Confinement,
    pub(super) supervisor: Option<u32>,
    pub(super) warnings: Mutex<Vec<String>>,
    /// Why the deadline will probably be missed.
    pub(super) risk: Mutex<Option<String>>,
    pub(super) ending: (Mutex<bool>, Condvar),
}

impl Live {
    /// The session's folder, for its record, states and events.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// The record as it was when the door started; identity, disks and sockets never change.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// A disk by its name.
    ///
    /// # Errors
    /// [`Error::NoDisk`].
    pub fn disk(&self, name: &str) -> Result<&Arc<Disk>> {
        let found = self.disks.iter().find(|d| d.disk.name() == name);
        found.map(|d| &d.disk).ok_or_else(|| Error::NoDisk { name: name.to_owned() })
    }

    /// Asks the door to end in order; returns at once.
    pub fn end(&self) {
        *self.ending.0.lock() = true;
        self.ending.1.notify_all();
    }

    /// Waits for `limit` or until the door is to end; whether it is.
    pub fn wait_for_end(&self, limit: Duration) -> bool {
        let mut ending = self.ending.0.lock();
        if !*ending {
            self.ending.1.wait_for(&mut ending, limit);
        }
        *ending
    }

    /// Whether every disk is local: the source is no longer needed.
    pub fn is_local(&self) -> bool {
        self.disks.iter().all(|d| d.disk.local().is_ok_and(|l| l.absent == 0))
    }

    /// How the session stands.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadFile`] where the record cannot be read.
    pub fn status(&self) -> Result<Status> {
        let record = self.folder.load()?;
        let options = self.options.lock().clone();
        let cache = self.cache.stats();
        let traffic = self.server.stats();
        let mut warnings = self.warnings.lock().clone();
        warnings.extend(self.risk.lock().clone());
        let age = Timestamp::now().duration_since(record.created);
        if age > OLD_AFTER.try_into().unwrap_or_default() {
            warnings.push("runs from its backup for more than 48 hours: finalize it".to_owned());
        }
        let fuse = self.fuse.lock();
        let file = |name: &str| fuse.as_ref().map(|f| f.path(name).display().to_string());
        Ok(Status {
            schema: STATUS_SCHEMA.to_owned(),
            id: record.id,
            name: record.name.clone(),
            dir: record.dir.display().to_string(),
            state: record.state,
            reason: record.reason.clone(),
            created: record.created,
            door: Door::Running {
                pid: std::process::id(),
                supervisor: self.supervisor,
                since: self.started,
                cache: CacheStatus {
                    bytes_max: self.cache.bytes_max(),
                    bytes: cache.resident_bytes,
                    hits: cache.hits,
                    decodes: cache.decodes,
                    decoded_bytes: cache.decoded_bytes,
                },
                confinement: self.confinement.clone(),
                connections: traffic.open,
                bytes_read: traffic.bytes_read,
                bytes_written: traffic.bytes_written,
            },
            disks: self.disks.iter().map(|d| self.disk_status(d, file(d.disk.name()))).collect(),
            rate: options.rate,
            ready_by: options.ready_by,
            warnings,
        })
    }

    fn disk_status(&self, live: &LiveDisk, file: Option<String>) -> DiskStatus {
        let disk = &live.disk;
        let progress = live.hydrator.lock().as_ref().map(Hydrator::progress);
        let unused = live.hydrator.lock().as_ref().and_then(Hydrator::unused);
        let unused = unused.zip(progress.as_ref().map(|p| p.left_out));
        let parked = disk.parked().into_iter().take(PARKED_MAX);
        DiskStatus {
            name: disk.name().to_owned(),
            size: disk.size(),
            uri: self.spec.uri(disk.name()),
            file,
            used: progress.as_ref().and_then(|p| p.used),
            overlay: disk.local().ok().map(OverlayStatus::from),
            hydration: progress.map(hydration_status),
            fetched: disk.fetched(),
            source_away: live.opening.lock().as_ref().map(Opening::why),
            parked: parked.map(|p| Parked { offset: p.offset, len: p.len, waited_s: p.waited.as_secs() }).collect(),
            unused: unused.map(|(unused, left_out)| unused_status(&unused, left_out)),
            demand: disk.is_writable().then(|| demand_status(disk.demand_stats())),
            doubtful: disk.doubtful().iter().map(|r| (r.start, r.end - r.start)).collect(),
        }
    }

    /// Gives disks the sources that have been opened meanwhile, and begins to open those of `away` anew.
    pub(super) fn renew_sources(&self, away: &dyn Fn(&LiveDisk) -> bool) -> Result<()> {
        for (live, spec) in self.disks.iter().zip(&self.spec.disks) {
            let mut opening = live.opening.lock();
            match opening.as_ref().map(Opening::take) {
                None if away(live) => {
                    *opening = Some(Opening::begin(spec.clone(), Arc::clone(&self.cache), self.connect)?);
                }
                Some(Some(chain)) => {
                    live.disk.renew_chain(&chain)?;
                    *opening = None;
                }
                None | Some(None) => {}
            }
        }
        Ok(())
    }

    /// Carries out an order.
    pub(super) fn obey(self: &Arc<Self>, request: Request, hooks: &dyn Hooks) -> Answer {
        let done = match request {
            Request::Status => return self.status().map_or_else(|e| refusal(&e), |s| Answer::Status(Box::new(s))),
            Request::Call { name, args } => {
                return hooks.call(self, &name, args).map_or_else(|e| refusal(&e), Answer::Value);
            }
            Request::Set { rate, ready_by } => self.set(rate, ready_by),
            Request::Pause => self.pause(),
            Request::Resume => self.resume(),
            Request::Drain { disk } => self.drain(disk.as_deref()),
            Request::HandOver { disk } => self.disk(&disk).and_then(|d| Ok(d.hand_over()?)),
            Request::DetachSource => self.detach_source(),
            Request::Stop { clients } => self.stop(clients),
        };
        done.map_or_else(|e| refusal(&e), |()| Answer::Done)
    }

    /// Changes the limits of hydration.
    ///
    /// # Errors
    /// [`Error::Io`] where they cannot be recorded.
    pub fn set(&self, rate: Setting<u64>, ready_by: Setting<Timestamp>) -> Result<()> {
        self.change(|options| {
            options.rate = rate.apply(options.rate);
            options.ready_by = ready_by.apply(options.ready_by);
        })?;
        self.keep_pace();
        Ok(())
    }

    /// Holds hydration back.
    ///
    /// # Errors
    /// As [`Live::set`].
    pub fn pause(&self) -> Result<()> {
        if self.options.lock().hydrate == Hydrate::On {
            self.change(|options| options.hydrate = Hydrate::Paused)?;
        }
        self.disks.iter().for_each(|d| _ = d.hydrator.lock().as_ref().map(Hydrator::pause));
        Ok(())
    }

    /// Lets hydration go on; begins it where there was to be none.
    ///
    /// # Errors
    /// As [`Live::set`]; [`Error::Disk`] for a read-only disk.
    pub fn resume(&self) -> Result<()> {
        self.change(|options| options.hydrate = Hydrate::On)?;
        self.hydrate()
    }

    /// Starts or continues hydration of every disk that is not local.
    pub(super) fn hydrate(&self) -> Result<()> {
        for (live, spec) in self.disks.iter().zip(&self.spec.disks) {
            let mut hydrator = live.hydrator.lock();
            match hydrator.as_ref() {
                Some(running) => running.resume(),
                None if live.disk.local()?.absent > 0 => {
                    let started = Hydrator::start(live.disk.clone(), pace_of(spec, &self.spec.options))?;
                    if let Some(trace) = live.traced.lock().replay.take() {
                        started.replay(&trace);
                        let what = format!("{}: {} bytes in {} steps", spec.name, trace.bytes(), trace.steps.len());
                        self.folder.event(self.spec.id, "trace_replayed", Some(&what))?;
                    }
                    *hydrator = Some(started);
                }
                None => {}
            }
        }
        self.keep_pace();
        Ok(())
    }

    /// Writes down what guests have read first so far.
    pub(super) fn save_traces(&self) {
        for live in &self.disks {
            live.traced.lock().save(&self.spec, &live.disk);
        }
    }

    /// Gives each running hydration its share of what is allowed now.
    pub(super) fn keep_pace(&self) {
        let options = self.options.lock().clone();
        let running: Vec<(&LiveDisk, HydrateProgress)> = self
            .disks
            .iter()
            .filter_map(|d| Some((d, d.hydrator.lock().as_ref()?.progress())))
            .filter(|(_, p)| !matches!(p.state, HydrateState::Done | HydrateState::Failed | HydrateState::Stopped))
            .collect();
        let left = |p: &HydrateProgress| match (p.used, p.used_local) {
            (Some(used), Some(local)) => used.saturating_sub(local),
            _ => p.total.saturating_sub(p.local),
        };
        let left_in_all = running.iter().map(|(_, p)| left(p)).fold(0u64, u64::saturating_add);
        let now = Timestamp::now();
        let needed = needed_rate(&options, now, left_in_all);
        let rate = allowed_rate(&options, now, left_in_all);
        let reserved = options.preallocate == Preallocate::Full;
        let room = if reserved { None } else { space::room(self.folder.dir()) };
        for (live, progress) in &running {
            // By what is left, so that all end together.
            let share = |rate| portion(rate, left(progress), left_in_all);
            if let Some(hydrator) = live.hydrator.lock().as_ref() {
                hydrator.set_rate(rate.map(|rate| share(rate).max(1)));
                // A deadline is kept although the guest may have to wait for it.
                hydrator.set_promise(needed.map_or(0, share));
                hydrator.set_room(room.map(share));
            }
        }
        let known = |p: &HydrateProgress| p.eta.map_or(0, |_| p.rate_bytes);
        let measured = running.iter().map(|(_, p)| known(p)).fold(0u64, u64::saturating_add);
        let risk = deadline_risk(&options, now, left_in_all, measured);
        let news = risk.is_some() && self.risk.lock().is_none();
        if let (true, Some(risk)) = (news, &risk)
            && let Err(error) = self.folder.event(self.spec.id, "deadline_at_risk", Some(risk))
        {
            tracing::warn!(%error, "an event was not recorded");
        }
        *self.risk.lock() = risk;
    }

    /// Brings `disk.raw` of one disk or all up to date, for good.
    ///
    /// # Errors
    /// [`Error::Disk`] while anything is absent; [`Error::NoDisk`].
    pub fn drain(&self, disk: Option<&str>) -> Result<()> {
        match disk {
            Some(name) => Ok(self.disk(name)?.drain()?),
            None => self.disks.iter().try_for_each(|d| Ok(d.disk.drain()?)),
        }
    }

    /// Lets the source of every disk go. A session that was copying has migrated then.
    ///
    /// # Errors
    /// [`Error::Disk`] while anything is absent; nothing is let go then.
    pub fn detach_source(&self) -> Result<()> {
        for live in &self.disks {
            let absent = live.disk.local()?.absent;
            if absent > 0 {
                let disk = live.disk.name().to_owned();
                return Err(aquifer_vdisk::Error::NotLocal { disk, absent }.into());
            }
        }
        for live in &self.disks {
            live.disk.detach_chain()?;
            *live.opening.lock() = None;
        }
        self.folder.event(self.spec.id, "source_detached", None)?;
        if self.folder.load()?.state == State::Migrating {
            self.folder.transition(State::Migrated, "detach_source", None)?;
        }
        Ok(())
    }

    fn stop(&self, clients: Clients) -> Result<()> {
        let connections = self.server.stats().open;
        let files = self.fuse.lock().as_ref().is_some_and(FuseDoor::is_busy);
        if clients == Clients::Respect && (connections > 0 || files) {
            let files = if files { "files open" } else { "no files open" };
            return Err(Error::Clients { connections, files });
        }
        self.end();
        Ok(())
    }

    fn change(&self, change: impl Fn(&mut Options)) -> Result<()> {
        self.folder.edit(|spec| change(&mut spec.options))?;
        change(&mut self.options.lock());
        Ok(())
    }

    /// Tells the runner, and keeps it as an event.
    pub(super) fn tell(self: &Arc<Self>, hooks: &dyn Hooks, what: Happening, reason: Option<&str>) {
        if let Err(error) = self.folder.event(self.spec.id, what.name(), reason) {
            tracing::warn!(%error, "an event was not recorded");
        }
        hooks.happened(self, what);
    }

    /// Ends everything in order. Returns what went wrong on the way.
    pub(super) fn shut(&self) -> Result<()> {
        for live in &self.disks {
            // Reads that wait for the source are let go, or the doors would wait for them.
            live.disk.set_patience(Duration::ZERO);
            *live.opening.lock() = None;
            if let Some(hydrator) = live.hydrator.lock().as_ref() {
                hydrator.wind_down();
            }
        }
        self.save_traces();
        let began = Instant::now();
        if !self.server.stop() {
            tracing::warn!("NBD clients were cut off");
        }
        let fuse = self.fuse.lock().take().map_or(Ok(()), FuseDoor::stop);
        tracing::debug!(seconds = began.elapsed().as_secs_f64(), "doors closed");
        for live in &self.disks {
            if let Some(hydrator) = live.hydrator.lock().as_ref() {
                hydrator.stop();
            }
        }
        let flushed = self.disks.iter().filter(|d| d.disk.is_writable()).try_for_each(|d| d.disk.flush());
        flushed?;
        Ok(fuse?)
    }
}

/// What the deadline needs; `None` without one, or past it.
fn needed_rate(options: &Options, now: Timestamp, left: u64) -> Option<u64> {
    let seconds = u64::try_from(options.ready_by?.duration_since(now).as_secs()).unwrap_or(0);
    left.checked_div(seconds)
}

/// Why everything will probably not be local in time. `measured` is the rate of the last minute, 0 while unknown.
fn deadline_risk(options: &Options, now: Timestamp, left: u64, measured: u64) -> Option<String> {
    let by = options.ready_by.filter(|_| left > 0)?;
    let Some(needed) = needed_rate(options, now, left) else {
        return Some(format!("{left} bytes are still to come, and it was to be ready by {by}"));
    };
    if options.hydrate != Hydrate::On {
        return Some(format!("{left} bytes are still to come by {by}, and nothing is being copied"));
    }
    if let Some(rate) = options.rate.filter(|rate| *rate < needed) {
        return Some(format!("to be ready by {by} it needs {needed} bytes a second, and its limit is {rate}"));
    }
    // The copy itself keeps a quarter to spare: falling below what is needed is no accident of measuring.
    let slow = measured > 0 && measured < needed;
    slow.then(|| {
        let late = left / measured;
        let end = now.saturating_add(jiff::SignedDuration::from_secs(i64::try_from(late).unwrap_or(i64::MAX)));
        let end = end.map_or_else(|_| "never".to_owned(), |t| t.to_string());
        format!("to be ready by {by} it needs {needed} bytes a second, and gets {measured}: ready {end}")
    })
}

/// `rate`, or what the deadline needs with a quarter to spare; the smaller of the two where both are given.
fn allowed_rate(options: &Options, now: Timestamp, left: u64) -> Option<u64> {
    // Past the deadline nothing holds the copy back.
    let needed = needed_rate(options, now, left).map(|rate| rate.saturating_add(rate / 4).max(1 << 20));
    match (options.rate, needed) {
        (Some(rate), Some(needed)) => Some(rate.min(needed)),
        (rate, needed) => rate.or(needed),
    }
}

/// `rate` times `part` over `whole`.
fn portion(rate: u64, part: u64, whole: u64) -> u64 {
    let share = u128::from(rate) * u128::from(part) / u128::from(whole.max(1));
    u64::try_from(share).unwrap_or(u64::MAX)
}

fn refusal(error: &Error) -> Answer {
    Answer::Error { code: error.code().to_owned(), what: error.to_string() }
}

fn hydration_status(p: HydrateProgress) -> HydrationStatus {
    let phase = match p.state {
        HydrateState::Running => Phase::Running,
        HydrateState::Paused | HydrateState::Stopped => Phase::Paused,
        HydrateState::SourceAway => Phase::Waiting,
        HydrateState::NoSpace => Phase::NoSpace,
        HydrateState::Failed => Phase::Failed,
        HydrateState::Done => Phase::Done,
    };
    HydrationStatus {
        phase,
        done: p.used_local.unwrap_or(p.local),
        total: p.used.unwrap_or(p.total),
        rate: p.rate_bytes,
        eta_s: p.eta.map(|e| e.as_secs()),
        damaged: p.damaged,
        error: p.error,
        replay: p.replay.map(|r| (r.done, r.total)),
    }
}

fn demand_status(stats: DemandStats) -> DemandStatus {
    let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    DemandStatus {
        misses: stats.misses,
        miss_bytes: stats.miss_bytes,
        p50_us: stats.p50.map(micros),
        p99_us: stats.p99.map(micros),
    }
}

/// A source across the network answers late and several requests at once; one beside us keeps processors busy.
fn pace_of(disk: &DiskSpec, options: &Options) -> Pace {
    let workers = if matches!(disk.chain, ChainSpec::Nbd { .. }) { REMOTE_WORKERS } else { Pace::default().workers };
    let blocks = match options.blocks {
        Blocks::Used => aquifer_vdisk::Blocks::Used,
        Blocks::All => aquifer_vdisk::Blocks::All,
    };
    Pace { workers, blocks, ..Pace::default() }
}

/// What a disk's file systems do not use, for status.
fn unused_status(unused: &Unused, left_out: u64) -> UnusedStatus {
    let volume = |v: &Volume| VolumeStatus {
        offset: v.range.start,
        len: v.range.end - v.range.start,
        file_system: v.file_system,
        unused: v.unused,
        doubt: v.doubt.map(str::to_owned),
    };
    let volumes = unused.volumes.iter().map(volume).collect();
    UnusedStatus { left_out, volumes, doubt: unused.doubt.map(str::to_owned) }
}

impl From<aquifer_vdisk::LocalProgress> for OverlayStatus {
    fn from(p: aquifer_vdisk::LocalProgress) -> Self {
        Self { absent: p.absent, hydrated: p.hydrated, written: p.written, trimmed: p.trimmed }
    }
}

#[cfg(test)]
mod tests {
    //! How fast the copy may go.

    use jiff::SignedDuration;

    use super::*;

    #[test]
    fn the_rate_is_what_is_needed_or_allowed() {
        let now = Timestamp::from_second(1_000_000).expect("time");
        let in_seconds = |s| Some(now + SignedDuration::from_secs(s));
        let rate = |rate, ready_by, left| allowed_rate(&Options { rate, ready_by, ..Options::default() }, now, left);
        assert_eq!(rate(None, None, 1 << 40), None);
        assert_eq!(rate(Some(5), None, 1 << 40), Some(5));
        assert_eq!(rate(None, in_seconds(1024), 1 << 34), Some(5 << 22), "16 MiB/s and a quarter");
        assert_eq!(rate(Some(1 << 20), in_seconds(1024), 1 << 34), Some(1 << 20));
        assert_eq!(rate(None, in_seconds(3600), 0), Some(1 << 20), "never so slow that it does not end");
        assert_eq!(rate(None, in_seconds(0), 1 << 34), None, "late: as fast as it goes");
        assert_eq!(rate(Some(7), in_seconds(-5), 1 << 34), Some(7));
        let risk = |rate, ready_by, left, measured| {
            deadline_risk(&Options { rate, ready_by, ..Options::default() }, now, left, measured)
        };
        assert_eq!(risk(None, None, 1 << 40, 1), None);
        assert_eq!(risk(None, in_seconds(1024), 1 << 34, 0), None, "nothing is known yet");
        assert_eq!(risk(None, in_seconds(1024), 1 << 34, 17 << 20), None);
        assert_eq!(risk(None, in_seconds(0), 0, 0), None, "it is ready");
        assert!(risk(None, in_seconds(-1), 1, 0).is_some(), "late");
        assert!(risk(Some(1 << 20), in_seconds(1024), 1 << 34, 0).is_some(), "its own limit forbids it");
        let text = risk(None, in_seconds(1024), 1 << 34, 8 << 20).expect("half of what is needed");
        assert!(
            text.contains("16777216") && text.contains("8388608") && text.contains("1970-01-12T14:20:48Z"),
            "{text}"
        );
        assert_eq!(portion(100, 1, 4), 25);
        assert_eq!(portion(u64::MAX, u64::MAX, 1), u64::MAX);
        assert_eq!(portion(100, 0, 0), 0);
    }
}
