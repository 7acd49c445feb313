//! Replication jobs: one more restore point of a machine's replica, from backups or from production.
//!
//! Invariants
//! - From backups nothing of production is opened, not even to look.
//! - A run that adds no point says why, and is no failure.
//! - What moves is counted as it moves, and held to the rates of the job and of the repositories that are read.
//!
//! Not here: how a replica is made (`replica`), how a running machine's disks are held still (`super::backup`).

mod look;

use std::{path::PathBuf, sync::Arc, time::Duration};

use jiff::Timestamp;
use parking_lot::Mutex;
use serde::Serialize;
use uuid::Uuid;

use self::look::Watched;
use super::{Step, stored};
use crate::{
    catalogue::{Catalogue, Fence, NewWork, WorkId},
    context::Context,
    fail::{Code, Fail, Result},
    host::Network,
    replica::{
        adopt,
        build::Moved,
        components,
        desk::{Desk, object},
        foresee::{self, Foreseen},
        keep, member,
        model::{Carried, Origin, PointRecord, ReplicaRecord, Top},
        production,
        run::{Ran, ReplicaSpec, newest_backup, replicate, replicate_as},
        seat,
        state::{Op, State},
    },
    repository,
    schedule::When,
    site::{Job, JobKind, ReplicaSource, ReplicationJob, Site},
    tasks::{Busy, Direction, Done, Rate, Stage, Task, expand::JobSpec, planner::SCHEDULE},
};

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The replica.
    pub replica: String,
    /// The machine.
    pub machine: String,
    /// Its state.
    pub state: State,
    /// The points that were made.
    pub points: Vec<Made>,
    /// What was moved for them.
    #[serde(flatten)]
    pub carried: Carried,
    /// Bytes of the digests of its newest point.
    pub digest_bytes: u64,
    /// Where the time went.
    pub busy: Busy,
    /// The stage that took the largest share of it.
    pub bottleneck: Option<Stage>,
    /// Its share, in hundredths.
    pub bottleneck_percent: Option<u64>,
    /// Seconds between the newest point's moment and now.
    pub replica_lag_seconds: Option<i64>,
    /// Warnings on the way, by their codes.
    pub warnings: Vec<String>,
}

/// A point that was made.
#[derive(Clone, Debug, Serialize)]
pub struct Made {
    /// Its id.
    pub id: Uuid,
    /// Its moment.
    pub taken: Timestamp,
    /// What it came of.
    pub origin: Origin,
    /// What was moved for it.
    #[serde(flatten)]
    pub carried: Carried,
}

/// What became of a machine.
enum Came {
    /// These points were made.
    Made(Vec<PointRecord>),
    /// There was nothing newer.
    Nothing,
    /// Its replica is in use, or given up.
    OnHold(State),
    /// Another replica of it is in use.
    Held(String, State),
    /// This operation on its replica was cut short, and nobody goes on with it.
    CutShort(String),
    /// The job does not say how it is to begin.
    LeftOut(String),
}

/// A machine of a job in hand.
struct Run<'a> {
    context: &'a Context,
    site: &'a Site,
    job: &'a ReplicationJob,
    machine: &'a str,
    spec: ReplicaSpec,
}

impl<'a> Run<'a> {
    fn of(context: &'a Context, site: &'a Site, name: &str, job: &'a Job, machine: &'a str) -> Result<Self> {
        let JobKind::Replication(job) = &job.kind else {
            return Err(Fail::new(Code::Config, format!("job {name} is no replication")).help("aquifer config check"));
        };
        let spec = seat::spec(context, name, job, machine)?;
        Ok(Self { context, site, job, machine, spec })
    }

    /// The newest point is to be no older than this.
    fn rpo(&self) -> Option<Duration> {
        self.job.rpo_warn.or_else(|| self.site.machines.get(self.machine).and_then(|machine| machine.rpo))
    }

    /// Does it on whichever member of a cluster can be used: one that is lost on the way is replaced by another.
    fn on_a_member(&self, desk: &Desk<'_>) -> Result<(Self, Came)> {
        let mut members = self.site.members(&self.job.host).len();
        loop {
            let spec = member::place(desk, self.site, &self.job.host, &self.spec)?;
            let run = Self { context: self.context, site: self.site, job: self.job, machine: self.machine, spec };
            members = members.saturating_sub(1);
            components::check(desk, &run.spec)?;
            match run.carry_out(desk) {
                Err(_) if members > 0 && run.has_lost_its_host(desk) => {}
                came => return Ok((run, came?)),
            }
        }
    }

    fn has_lost_its_host(&self, desk: &Desk<'_>) -> bool {
        let record = desk.load(&self.spec.name).map(|row| row.record);
        record.and_then(|record| member::is_lost(self.site, &record)).unwrap_or(false)
    }

    /// Another replica of the same machine that serves or is on its way home: until that has ended nothing is replicated.
    fn held_by_another(&self, desk: &Desk<'_>) -> Result<Option<(String, State)>> {
        let all = desk.catalogue.replicas::<ReplicaRecord>()?;
        let serving = |state: State| state.holds_replication() && !state.is_final();
        let other = all
            .into_iter()
            .find(|row| row.source == self.machine && row.name != self.spec.name && serving(row.record.state));
        Ok(other.map(|row| (row.name, row.record.state)))
    }

    /// An operation on the replica that has not ended and that no run of a job began: its work may have been cancelled,
    /// and nobody is to go on with it unasked.
    fn left_by_a_person(&self, desk: &Desk<'_>) -> Result<Option<String>> {
        let open = desk.catalogue.open_operations()?.into_iter().find(|open| open.object == object(&self.spec.name));
        Ok(open.map(|open| open.op).filter(|op| op != Op::Replicate.name()))
    }

    fn carry_out(&self, desk: &Desk<'_>) -> Result<Came> {
        if let Some((name, state)) = self.held_by_another(desk)? {
            return Ok(Came::Held(name, state));
        }
        // What a person has begun there and left is that person's to go on with, and not touched.
        let own = desk.catalogue.replica::<ReplicaRecord>(&self.spec.name)?;
        if let Some(state) = own.map(|row| row.record.state).filter(|state| state.is_unsettled()) {
            return Ok(Came::OnHold(state));
        }
        if let Some(what) = self.left_by_a_person(desk)? {
            return Ok(Came::CutShort(what));
        }
        let mut made = Vec::new();
        if self.job.mapping.contains_key(self.machine) {
            made.extend(adopt::adopt(desk, &self.spec)?);
        } else if !self.job.mapping.is_empty() && self.seed().is_none() && !self.has_points(desk) {
            return Ok(Came::LeftOut(format!("{} is left out: it is not mapped, and there is no seed", self.machine)));
        }
        if let Some(seed) = self.seed().filter(|_| !self.has_points(desk)) {
            match self.seeded(desk, seed)? {
                Came::Made(points) => made.extend(points),
                other => return Ok(other),
            }
        }
        Ok(match self.newest(desk)? {
            Ran::Made(points) => {
                made.extend(points);
                Came::Made(made)
            }
            Ran::NoNewPoint if !made.is_empty() => Came::Made(made),
            Ran::NoNewPoint => Came::Nothing,
            Ran::OnHold(state) => Came::OnHold(state),
        })
    }

    fn seed(&self) -> Option<&str> {
        match &self.job.source {
            ReplicaSource::Production { seed, .. } => seed.as_deref(),
            ReplicaSource::Backup { .. } => None,
        }
    }

    /// The point that the run is for.
    fn newest(&self, desk: &Desk<'_>) -> Result<Ran> {
        match &self.job.source {
            ReplicaSource::Backup { .. } => replicate(desk, &self.spec),
            ReplicaSource::Production { prefer_backup, .. } => {
                if self.prefers_backup(desk, *prefer_backup)? {
                    return replicate(desk, &self.spec);
                }
                let mut watched = None;
                let look = || {
                    let found = Watched::begin(self.context, desk, self.site, self.machine)?;
                    Ok(watched.insert(found).look.clone())
                };
                let ran = production::replicate_production(desk, &self.spec, Origin::Job, look);
                // Whoever reads goes before what is read.
                drop(watched);
                ran
            }
        }
    }

    fn has_points(&self, desk: &Desk<'_>) -> bool {
        desk.points(&self.spec.name).is_ok_and(|points| !points.is_empty())
    }

    /// The first point, of a backup that is there already.
    fn seeded(&self, desk: &Desk<'_>, seed: &str) -> Result<Came> {
        let entry = self.site.repositories.get(seed);
        let dir = entry.map(|entry| entry.url.clone());
        let dir = dir.ok_or_else(|| Fail::new(Code::NotFound, format!("there is no repository `{seed}`")))?;
        let spec = ReplicaSpec { repositories: vec![dir], ..self.spec.clone() };
        if newest_backup(desk, &spec)?.is_none() {
            let what = format!("{} is left out: the seed {seed} has no backup of it", self.machine);
            return Ok(Came::LeftOut(what));
        }
        Ok(match replicate_as(desk, &spec, Origin::Seed)? {
            Ran::Made(points) => Came::Made(points),
            Ran::NoNewPoint => Came::Nothing,
            Ran::OnHold(state) => Came::OnHold(state),
        })
    }

    /// Whether the newest backup is young enough to be read instead of production.
    fn prefers_backup(&self, desk: &Desk<'_>, younger_than: Option<Duration>) -> Result<bool> {
        let Some(limit) = younger_than else { return Ok(false) };
        let newest = newest_backup(desk, &self.spec)?;
        Ok(newest.is_some_and(|taken| age(taken) <= limit))
    }

    fn report(&self, desk: &Desk<'_>, made: &[PointRecord]) -> Result<Report> {
        let mut carried = Carried::default();
        made.iter().for_each(|point| carried.add(point.carried));
        let newest = desk.points(&self.spec.name)?.last().map(|point| point.taken);
        let one = |point: &PointRecord| Made {
            id: point.id,
            taken: point.taken,
            origin: point.origin,
            carried: point.carried,
        };
        Ok(Report {
            replica: self.spec.name.clone(),
            machine: self.machine.to_owned(),
            state: desk.load(&self.spec.name)?.record.state,
            points: made.iter().map(one).collect(),
            carried,
            digest_bytes: self.digest_bytes(desk)?,
            busy: Busy::default(),
            bottleneck: None,
            bottleneck_percent: None,
            replica_lag_seconds: newest.map(|taken| i64::try_from(age(taken).as_secs()).unwrap_or(i64::MAX)),
            warnings: Vec::new(),
        })
    }

    fn digest_bytes(&self, desk: &Desk<'_>) -> Result<u64> {
        let (record, points) = (desk.load(&self.spec.name)?.record, desk.points(&self.spec.name)?);
        let Some(newest) = points.last() else { return Ok(0) };
        let size = |top: &Top| std::fs::metadata(keep::digest_file(&record, newest, &top.disk)).map_or(0, |m| m.len());
        Ok(newest.disks.iter().map(size).sum())
    }

    /// Tells of disks that the new restore points have not, and of those that the next run gives up and that are the last
    /// to have a disk.
    fn tell_of_gone_disks(&self, desk: &Desk<'_>, made: &[PointRecord]) -> Result<()> {
        let (name, keep) = (&self.spec.name, self.spec.options.keep);
        for (point, disk) in made.iter().flat_map(|point| point.gone.iter().map(move |disk| (point, disk))) {
            let what = format!("disk {disk} of the point before is not there any more: {} has none", point.id);
            (desk.warn)(Code::WarnDiskGone, format!("{name}: {what}"));
        }
        if made.is_empty() {
            return Ok(());
        }
        for (disk, point) in keep::last_disks(&desk.points(name)?, keep) {
            if !self.spec.rules.leave_out(disk) {
                let what = format!("the next run gives up {}, the last point that has the disk {disk}", point.id);
                (desk.warn)(
                    Code::WarnDiskGone,
                    format!("{name}: {what}; `restore_points_to_keep` of its job says how many stay"),
                );
            }
        }
        Ok(())
    }

    /// Tells that what feeds the replica has run dry.
    fn look_at_age(&self, desk: &Desk<'_>) -> Result<()> {
        let newest = desk.points(&self.spec.name)?.last().map(|point| point.taken);
        if let (Some(limit), Some(taken)) = (self.rpo(), newest)
            && age(taken) > limit
        {
            let (have, limit) = (age(taken).as_secs(), limit.as_secs());
            let what = format!("the newest point of {} is {have} s old, wanted are {limit} s", self.spec.name);
            (desk.warn)(Code::WarnStale, what);
        }
        Ok(())
    }
}

fn age(taken: Timestamp) -> Duration {
    Duration::try_from(Timestamp::now().duration_since(taken)).unwrap_or_default()
}

/// Does a piece of work of a replication.
///
/// # Errors
/// The source, the target; [`Code::NotFound`] where no repository has a point of the machine.
pub fn run(task: &Task<'_>) -> Result<Done> {
    let spec: JobSpec = task.spec()?;
    let site = task.context.site()?;
    let job = stored::find(site, &spec.job)?;
    let machine = spec.machine.ok_or_else(|| Fail::new(Code::Bug, "a replication names its machines"))?;
    let run = Run::of(task.context, site, &spec.job, job, &machine)?;
    let (reads, writes) = rates(task, site, &spec.job, job);
    let pace = |moved: Moved| {
        task.check()?;
        match moved {
            Moved::Read(bytes) => {
                task.counts
                    .stages
                    .time(Stage::Throttle, || reads.iter().try_for_each(|rate| rate.take(bytes, task.stop)))?;
            }
            Moved::Written(bytes) | Moved::Merged(bytes) => {
                task.counts
                    .stages
                    .time(Stage::Throttle, || writes.iter().try_for_each(|rate| rate.take(bytes, task.stop)))?;
            }
            Moved::Ahead(_) | Moved::Zeros(_) | Moved::Checked(_) | Moved::Equal(_) | Moved::Took(..) => {}
        }
        seat::count(task.counts, moved);
        if let (Moved::Read(bytes), ReplicaSource::Production { .. }) = (moved, &run.job.source) {
            crate::tasks::Counts::add(&task.counts.read_production, bytes);
        }
        Ok(())
    };
    task.counts.phase("replicate");
    let told = Mutex::new(Vec::new());
    let warn = |code: Code, what: String| {
        task.context.out.warn(code, what.clone(), None);
        told.lock().push(format!("{}: {what}", code.name()));
    };
    stored::script((&spec.job, &machine), job.pre.as_deref(), "pre", &warn);
    let (done, _) = seat::at_desk(task, Network::None, Duration::ZERO, |desk| {
        let desk = Desk { pace: &pace, warn: &warn, ..*desk };
        let (run, came) = run.on_a_member(&desk)?;
        let made = match came {
            Came::Made(points) => points,
            Came::Nothing => {
                let what = format!("{} has the newest point of {machine} already", run.spec.name);
                // A run that another machine's point began had nothing to expect of this one.
                if is_of_points(task, job)? {
                    task.context.out.say(what);
                } else {
                    warn(Code::WarnNoNewPoint, what);
                }
                Vec::new()
            }
            Came::OnHold(state) => return Ok(Err((Code::WarnOnHold, on_hold(&run.spec.name, state)))),
            Came::Held(other, state) => return Ok(Err((Code::WarnOnHold, on_hold(&other, state)))),
            Came::CutShort(op) => {
                let what =
                    format!("{} is on hold: its {op} was cut short and goes on when it is typed again", run.spec.name);
                return Ok(Err((Code::WarnOnHold, what)));
            }
            Came::LeftOut(why) => return Ok(Err((Code::WarnSkipped, why))),
        };
        run.tell_of_gone_disks(&desk, &made)?;
        run.look_at_age(&desk)?;
        Ok(Ok(run.report(&desk, &made)?))
    });
    stored::script((&spec.job, &machine), job.post.as_deref(), "post", &warn);
    let report = done?;
    let told = told.into_inner();
    match report {
        Err((code, what)) => Ok(left_out(task, code, what)),
        Ok(report) => {
            let busy = task.counts.stages.busy();
            let (bottleneck, bottleneck_percent) = busy.bottleneck().unzip();
            let report = Report { warnings: told.clone(), busy, bottleneck, bottleneck_percent, ..report };
            task.context.out.record("replicated", &report);
            let report = serde_json::to_value(report).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
            Ok(if told.is_empty() { Done::Success(report) } else { Done::Warning { why: told.join("; "), report } })
        }
    }
}

/// Tells that a machine is left out. One that is so by mistake is told of at each run, one that is held once.
fn left_out(task: &Task<'_>, code: Code, what: String) -> Done {
    let why = format!("{}: {what}", code.name());
    let known = code == Code::WarnOnHold && task.was_said(&why);
    if known {
        task.context.out.say(what);
    } else {
        task.context.out.warn(code, what, None);
    }
    Done::Skipped { why, known }
}

/// Whether the run was begun by a restore point, of whichever of its machines.
fn is_of_points(task: &Task<'_>, job: &Job) -> Result<bool> {
    let Some(session) = task.work.session.filter(|_| matches!(job.schedule.when, When::OnNewPoint { .. })) else {
        return Ok(false);
    };
    Ok(task.catalogue.session(session)?.initiator == SCHEDULE)
}

fn on_hold(name: &str, state: State) -> String {
    match state {
        State::Removed => format!("{name} was given up; `aquifer replicas {name} --readmit` lets it be made again"),
        _ => format!("{name} is on hold: it is {state}"),
    }
}

/// The rates of what is read, and of what is written.
fn rates(task: &Task<'_>, site: &Site, name: &str, job: &Job) -> (Vec<Arc<Rate>>, Vec<Arc<Rate>>) {
    let at = Timestamp::now();
    let rate = |resource: String, direction, limits: &crate::site::Limits| {
        task.rates.of(&resource, direction, stored::limit(limits, direction, at, site))
    };
    let mut reads = vec![rate(format!("job/{name}"), Direction::Read, &job.limits)];
    let writes = vec![rate(format!("job/{name}"), Direction::Write, &job.limits)];
    if let JobKind::Replication(ReplicationJob { source: ReplicaSource::Backup { repositories, .. }, .. }) = &job.kind {
        let entries = repositories.iter().filter_map(|name| site.repositories.get_key_value(name));
        reads.extend(entries.map(|(name, entry)| rate(format!("repository/{name}"), Direction::Read, &entry.limits)));
    }
    let least = reads.iter().filter_map(|rate| rate.limit()).min().unwrap_or(0);
    task.counts.limit.store(least, std::sync::atomic::Ordering::Relaxed);
    (reads, writes)
}

/// What a piece of work would do.
///
/// # Errors
/// What the work itself would be refused for.
pub fn foresee(context: &Context, site: &Site, job: &Job, work: &NewWork) -> Result<Vec<Step>> {
    let spec: JobSpec = serde_json::from_value(work.spec.clone())
        .map_err(|e| Fail::new(Code::Bug, "work of a replication cannot be understood").cause(e))?;
    let machine = spec.machine.unwrap_or_default();
    let run = Run::of(context, site, &spec.job, job, &machine)?;
    let name = &run.spec.name;
    let without = stored::without(site, &machine);
    let step = |what: String, bytes| Ok(vec![Step { what, bytes }]);
    let scratch;
    let catalogue = match context.catalogue_if_there()? {
        Some(catalogue) => catalogue,
        None => {
            // Whoever only looks makes no catalogue: an empty one stands in for it.
            scratch = context.scratch_dir()?;
            Catalogue::open(&crate::catalogue::Url::Sqlite(scratch.path.join("catalogue.db")))?
        }
    };
    looking(context, &catalogue, |desk| {
        if run.job.mapping.contains_key(&machine) && desk.catalogue.replica::<ReplicaRecord>(name)?.is_none() {
            let folder = run.spec.folder.display();
            return step(
                format!("make the machine in {folder} the replica of {machine}, and bring it up to date"),
                None,
            );
        }
        let production = matches!(run.job.source, ReplicaSource::Production { .. });
        if production && !run.prefers_backup(desk, prefer(run.job))? {
            let record = foresee::record(desk, &run.spec)?;
            if record.state.holds_replication() {
                return step(format!("leave {name} alone: {}", on_hold(name, record.state)), Some(0));
            }
            let what = format!("make a point of {name} from production's disks of {machine}{without}");
            let look = Watched::images(context, desk, site, &machine)?;
            let bytes = match look {
                Some(look) => Some(production::estimate(desk, &run.spec, &record, &look)?),
                None => None,
            };
            return step(what, bytes);
        }
        match foresee::foresee(desk, &run.spec)? {
            Foreseen::OnHold(state) => step(format!("leave {name} alone: {}", on_hold(name, state)), Some(0)),
            Foreseen::NoNewPoint => {
                step(format!("do nothing: {name} has the newest point of {machine} already"), Some(0))
            }
            Foreseen::Point { repository, point, taken, bytes } => {
                let from = named(site, &repository);
                step(
                    format!("make a point of {name} from {machine}@{point} of {from}, taken {taken}{without}"),
                    Some(bytes),
                )
            }
        }
    })
}

fn prefer(job: &ReplicationJob) -> Option<Duration> {
    match &job.source {
        ReplicaSource::Production { prefer_backup, .. } => *prefer_backup,
        ReplicaSource::Backup { .. } => None,
    }
}

fn named(site: &Site, dir: &PathBuf) -> String {
    let name = site.repositories.iter().find(|(_, entry)| entry.url == *dir).map(|(name, _)| name.clone());
    name.unwrap_or_else(|| dir.display().to_string())
}

/// A desk for whoever only looks: its lease is nobody's, so that nothing can be stored under it.
fn looking<T>(context: &Context, catalogue: &Catalogue, look: impl FnOnce(&Desk<'_>) -> Result<T>) -> Result<T> {
    let fence = Fence { work: WorkId(0), epoch: 0, owner: String::new(), session: None, kind: String::new() };
    let (me, cache, rooms) = (repository::me(context)?, context.cache()?, seat::rooms(context)?);
    look(&Desk {
        catalogue,
        fence: &fence,
        host: &crate::host::qemu::Qemu,
        rooms: &rooms,
        me: &me,
        cache: &cache,
        pace: &|_| Ok(()),
        warn: &|code, what| context.out.warn(code, what, None),
        network: Network::None,
        grace: Duration::ZERO,
        alive: &|| Ok(()),
    })
}
