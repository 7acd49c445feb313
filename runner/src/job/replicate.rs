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
        build::Moved,
        desk::Desk,
        foresee::{self, Foreseen},
        model::{Carried, Origin, PointRecord},
        production,
        run::{Ran, ReplicaSpec, newest_backup, replicate, replicate_as},
        seat,
        state::State,
    },
    repository,
    site::{Job, JobKind, ReplicaSource, ReplicationJob, Site},
    tasks::{Direction, Done, Rate, Task, expand::JobSpec},
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

    fn carry_out(&self, desk: &Desk<'_>) -> Result<Ran> {
        match &self.job.source {
            ReplicaSource::Backup { .. } => replicate(desk, &self.spec),
            ReplicaSource::Production { prefer_backup, seed, .. } => {
                let mut made = Vec::new();
                if let Some(seed) = seed.as_ref().filter(|_| !self.has_points(desk)) {
                    match self.seeded(desk, seed)? {
                        Ran::Made(points) => made = points,
                        other => return Ok(other),
                    }
                }
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
                if let Some(watched) = watched {
                    watched.end(ran.is_ok(), desk.warn);
                }
                Ok(match ran? {
                    Ran::Made(points) => {
                        made.extend(points);
                        Ran::Made(made)
                    }
                    other => other,
                })
            }
        }
    }

    fn has_points(&self, desk: &Desk<'_>) -> bool {
        desk.points(&self.spec.name).is_ok_and(|points| !points.is_empty())
    }

    /// The first points, of a backup that is there already.
    fn seeded(&self, desk: &Desk<'_>, seed: &str) -> Result<Ran> {
        let entry = self.site.repositories.get(seed);
        let dir = entry.map(|entry| entry.url.clone());
        let dir = dir.ok_or_else(|| Fail::new(Code::NotFound, format!("there is no repository `{seed}`")))?;
        let spec = ReplicaSpec { repositories: vec![dir], ..self.spec.clone() };
        replicate_as(desk, &spec, Origin::Seed).map_err(|fail| match fail.code {
            Code::NotFound => {
                let what = format!("{} is left out: the seed {seed} has no backup of it", self.machine);
                Fail::new(Code::NotFound, what).help(format!("aquifer -r {seed} points"))
            }
            _ => fail,
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
            replica_lag_seconds: newest.map(|taken| i64::try_from(age(taken).as_secs()).unwrap_or(i64::MAX)),
            warnings: Vec::new(),
        })
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
            Moved::Read(bytes) => reads.iter().try_for_each(|rate| rate.take(bytes, task.stop))?,
            Moved::Written(bytes) => writes.iter().try_for_each(|rate| rate.take(bytes, task.stop))?,
            Moved::Ahead(_) | Moved::Zeros(_) | Moved::Equal(_) => {}
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
        let ran = run.carry_out(&desk)?;
        let made = match &ran {
            Ran::Made(points) => points.as_slice(),
            Ran::NoNewPoint => {
                warn(Code::WarnNoNewPoint, format!("{} has the newest point of {machine} already", run.spec.name));
                &[]
            }
            Ran::OnHold(state) => return Ok((ran.clone(), Err(on_hold(&run.spec.name, *state)))),
        };
        run.look_at_age(&desk)?;
        let report = run.report(&desk, made)?;
        Ok((ran, Ok(report)))
    });
    stored::script((&spec.job, &machine), job.post.as_deref(), "post", &warn);
    let (_, report) = done?;
    let told = told.into_inner();
    match report {
        Err(why) => {
            task.context.out.warn(Code::WarnOnHold, why.clone(), None);
            Ok(Done::Skipped(format!("{}: {why}", Code::WarnOnHold.name())))
        }
        Ok(report) => {
            let report = Report { warnings: told.clone(), ..report };
            task.context.out.record("replicated", &report);
            let report = serde_json::to_value(report).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
            Ok(if told.is_empty() { Done::Success(report) } else { Done::Warning { why: told.join("; "), report } })
        }
    }
}

fn on_hold(name: &str, state: State) -> String {
    format!("{name} is on hold: it is {state}")
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
        let production = matches!(run.job.source, ReplicaSource::Production { .. });
        if production && !run.prefers_backup(desk, prefer(run.job))? {
            let record = foresee::record(desk, &run.spec)?;
            if record.state.holds_replication() {
                return step(format!("leave {name} alone: {}", on_hold(name, record.state)), Some(0));
            }
            let what = format!("make a point of {name} from production's disks of {machine}");
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
                step(format!("make a point of {name} from {machine}@{point} of {from}, taken {taken}"), Some(bytes))
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
