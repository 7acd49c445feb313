//! Work that ends in a repository: backup, copy, health. One machine at a time, at the rates that apply.
//!
//! Invariants
//! - What goes into a repository carries its lease and ownership; the body asks between blocks whether it may go on.
//! - Trouble with old points never fails a new one; it is noted.
//! - No point of a machine is given up while a replica has taken over from it and that is not settled.
//!
//! Not here: the kinds themselves (the modules beside this one), when work is due, who does it.

use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    sync::{Arc, atomic::Ordering},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Step, backup, copy, health};
use crate::{
    backup::{self as stores, Ahead, Pace},
    catalogue::Stored,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    replica::{model::ReplicaRecord, state::State},
    repository::{self, Hand},
    retain::{self, Retained},
    site::{Job, JobKind, Keep, Limits, Site},
    stop::Stop,
    tasks::{Counts, Direction, Done, Rate, Stage, Stages, Task, follow::NOTE},
};

/// One machine of a job in hand.
pub struct Run<'a> {
    /// The process's site, repository cache, output.
    pub context: &'a Context,
    /// Name of the job.
    pub job: &'a str,
    /// The machine.
    pub machine: &'a str,
    /// The piece of work it is, where it is one.
    pub hand: Option<Hand>,
    /// The same, for what is told of it; a look ahead has none.
    pub task: Option<&'a Task<'a>>,
    /// The wish to stop.
    pub stop: Stop,
    /// Keeps rates, and the work from going on without its lease.
    pub pace: Pace<'a>,
    /// Is told how many bytes there are to do.
    pub ahead: Ahead<'a>,
    /// Where the time goes.
    pub stages: &'a Stages,
    /// What is to be looked at afterwards.
    pub notes: Mutex<Vec<String>>,
    /// What stands until somebody changes it, said in this run or before.
    pub standing: Mutex<Vec<String>>,
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Points that were added.
    pub points: Vec<Uuid>,
    /// Bytes read from sources.
    pub bytes_read: u64,
    /// Bytes of the new points' files.
    pub bytes_stored: u64,
    /// Milliseconds the guest's file systems were frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frozen_ms: Option<u64>,
    /// Why a running guest's file systems were not frozen: the point is as after a loss of power.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_frozen: Option<String>,
    /// What became of older points.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retained: Option<Retained>,
    /// Points that were found damaged.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<Uuid>,
    /// Damaged points that were put right from another copy.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub repaired: Vec<Uuid>,
    /// Whether others needed the chain and the check will go on later.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub gave_way: bool,
    /// What stands until somebody changes it: it was said by the run that found it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub standing: Vec<String>,
}

/// What such a piece of work is to do.
#[derive(Debug, Deserialize)]
struct Spec {
    job: String,
    /// None: every machine the job finds.
    machine: Option<String>,
}

/// Does a piece of work that ends in a repository.
///
/// # Errors
/// What the kind of job fails with.
pub fn run(task: &Task<'_>) -> Result<Done> {
    let spec: Spec = task.spec()?;
    let site = task.context.site()?;
    let job = find(site, &spec.job)?;
    let rates = rates(task, site, &spec.job, job);
    let production = matches!(job.kind, JobKind::Backup(_));
    let pace = |bytes: u64| {
        task.check()?;
        task.counts.stages.time(Stage::Throttle, || rates.iter().try_for_each(|rate| rate.take(bytes, task.stop)))?;
        Counts::add(&task.counts.done, bytes);
        Counts::add(&task.counts.read, bytes);
        if production {
            Counts::add(&task.counts.read_production, bytes);
        }
        Ok(())
    };
    task.counts.phase(&task.work.kind);
    let machines = spec.machine.map_or_else(|| machines(task.context, job), |machine| Ok(vec![machine]))?;
    let (mut reports, mut notes) = (BTreeMap::new(), Vec::new());
    for machine in &machines {
        let run = Run {
            context: task.context,
            job: &spec.job,
            machine,
            hand: Some(Hand::of(task.work)),
            task: Some(task),
            stop: task.stop,
            pace: &pace,
            ahead: &|bytes| Counts::add(&task.counts.total, bytes),
            stages: &task.counts.stages,
            notes: Mutex::default(),
            standing: Mutex::default(),
        };
        let mut report = run.work(job)?;
        task.counts.written.fetch_add(report.bytes_stored, Ordering::Relaxed);
        notes.extend(run.notes.into_inner());
        report.standing = run.standing.into_inner();
        reports.insert(machine.clone(), report);
    }
    let value = serde_json::to_value(&reports).unwrap_or(Value::Null);
    if notes.is_empty() { Ok(Done::Success(value)) } else { Ok(Done::Warning { why: notes.join("; "), report: value }) }
}

/// What such a piece of work would do, and the bytes it would read. Changes nothing.
///
/// # Errors
/// What the work itself would be refused for.
pub fn foresee(context: &Context, name: &str, job: &Job, machine: Option<&str>) -> Result<Vec<Step>> {
    let machines = machine.map_or_else(|| machines(context, job), |machine| Ok(vec![machine.to_owned()]))?;
    let step = |machine: &String| {
        let run = Run {
            context,
            job: name,
            machine,
            hand: None,
            task: None,
            stop: context.stop()?,
            pace: &stores::at_will,
            ahead: &|_| (),
            stages: &Stages::default(),
            notes: Mutex::default(),
            standing: Mutex::default(),
        };
        let what = match &job.kind {
            JobKind::Backup(job) => format!("back {machine} up into {}{}", job.to, without(context.site()?, machine)),
            JobKind::Copy(job) => format!("copy points of {machine} from {} to {}", job.from.join(", "), job.to),
            JobKind::Health(job) => format!("check the stored points of {machine} in {}", job.repository),
            JobKind::Replication(_) => return Err(elsewhere()),
        };
        Ok(Step { what, bytes: Some(run.estimate(job)?) })
    };
    machines.iter().map(step).collect()
}

/// What the site file leaves out of a machine, as words that end a sentence.
pub(super) fn without(site: &Site, machine: &str) -> String {
    let out = site.machines.get(machine).map(|machine| machine.exclude_disks.join(", ")).unwrap_or_default();
    if out.is_empty() { out } else { format!(", without the disks that exclude_disks names: {out}") }
}

fn elsewhere() -> Fail {
    Fail::new(Code::Unsupported, "a replication does not end in a repository")
}

/// The rates that a job's bytes pass: its own, and those of what it reads and writes.
fn rates(task: &Task<'_>, site: &Site, name: &str, job: &Job) -> Vec<Arc<Rate>> {
    let empty = Limits::default();
    let of = |repository: &str| site.repositories.get(repository).map_or(&empty, |entry| &entry.limits);
    let rate = |resource: String, direction, limits: &Limits| {
        let at = jiff::Timestamp::now();
        task.rates.of(&resource, direction, limit(limits, direction, at, site))
    };
    let (reads, writes) = resources(&job.kind);
    let mut rates = vec![rate(format!("job/{name}"), Direction::Read, &job.limits)];
    rates.extend(reads.iter().map(|from| rate(format!("repository/{from}"), Direction::Read, of(from))));
    rates.extend(writes.iter().map(|to| rate(format!("repository/{to}"), Direction::Write, of(to))));
    rates
}

/// The lowest limit that applies at a time.
pub(super) fn limit(limits: &Limits, direction: Direction, at: jiff::Timestamp, site: &Site) -> Option<u64> {
    let pick = |read: Option<u64>, write: Option<u64>| match direction {
        Direction::Read => read,
        Direction::Write => write,
    };
    let hours = limits.hours.iter().filter(|hours| hours.window.is_open(at, &site.zone()));
    hours.filter_map(|hours| pick(hours.read, hours.write)).chain(pick(limits.read, limits.write)).min()
}

/// A job of the site.
///
/// # Errors
/// [`Code::NotFound`] names those there are.
pub fn find<'s>(site: &'s Site, name: &str) -> Result<&'s Job> {
    site.jobs.get(name).ok_or_else(|| {
        let names: Vec<&str> = site.jobs.keys().map(String::as_str).collect();
        let what = format!("the site file has no job `{name}` (there are: {})", names.join(", "));
        Fail::new(Code::NotFound, what).help("aquifer config check")
    })
}

/// The machines a job does, one piece of work each.
///
/// # Errors
/// A repository that cannot be read.
pub fn machines(context: &Context, job: &Job) -> Result<Vec<String>> {
    match &job.kind {
        JobKind::Health(health) if health.machines.is_empty() => {
            let repo = repository::open_named(context, &health.repository)?;
            Ok(repo.machines()?.into_iter().map(|machine| machine.name).collect())
        }
        kind => Ok(kind.machines().to_vec()),
    }
}

/// Repositories that a job reads, and those it writes.
pub fn resources(kind: &JobKind) -> (Vec<&str>, Vec<&str>) {
    match kind {
        JobKind::Backup(job) => (Vec::new(), vec![&job.to]),
        JobKind::Copy(job) => (job.from.iter().map(String::as_str).collect(), vec![&job.to]),
        JobKind::Health(job) => (vec![&job.repository], Vec::new()),
        JobKind::Replication(_) => (Vec::new(), Vec::new()),
    }
}

/// A program beside a run: if it fails, that is told.
pub(super) fn script((job, machine): (&str, &str), script: Option<&Path>, when: &str, warn: &dyn Fn(Code, String)) {
    let Some(script) = script else { return };
    let status = Command::new(script).env("AQUIFER_JOB", job).env("AQUIFER_MACHINE", machine).status();
    let why = match status {
        Ok(status) if status.success() => return,
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    warn(Code::WarnHost, format!("the {when} script {} failed: {why}", script.display()));
}

impl Run<'_> {
    /// Does it.
    ///
    /// # Errors
    /// What the kind of job fails with; [`Code::Unsupported`] for one that does not end in a repository.
    pub fn work(&self, job: &Job) -> Result<Report> {
        script((self.job, self.machine), job.pre.as_deref(), "pre", &|code, what| self.note(code, what));
        let done = match &job.kind {
            JobKind::Backup(backup) => backup::run(self, backup),
            JobKind::Copy(copy) => copy::run(self, copy),
            JobKind::Health(health) => health::run(self, health),
            JobKind::Replication(_) => Err(elsewhere()),
        };
        script((self.job, self.machine), job.post.as_deref(), "post", &|code, what| self.note(code, what));
        done
    }

    /// Bytes a run would read now. Changes nothing.
    ///
    /// # Errors
    /// As [`Run::work`].
    pub fn estimate(&self, job: &Job) -> Result<u64> {
        match &job.kind {
            JobKind::Backup(backup) => backup::estimate(self, backup),
            JobKind::Copy(copy) => copy::estimate(self, copy),
            JobKind::Health(health) => health::estimate(self, health),
            JobKind::Replication(_) => Err(elsewhere()),
        }
    }

    /// Notes something to be looked at, and says it.
    pub(crate) fn note(&self, code: Code, what: String) {
        self.context.out.warn(code, what.clone(), None);
        self.notes.lock().push(what);
    }

    /// The same for what stands until somebody changes it: it is noted by the run that finds it, and by no other one.
    pub(crate) fn note_once(&self, code: Code, what: String) {
        if self.task.is_some_and(|task| task.was_said(&what)) {
            self.context.out.say(&what);
        } else {
            self.note(code, what.clone());
        }
        self.standing.lock().push(what);
    }

    /// Tells what the site file asks for, once, as an event: it is nothing to look at.
    ///
    /// # Errors
    /// [`Code::Fenced`]; the catalogue's.
    pub(super) fn inform_once(&self, what: String) -> Result<()> {
        if let Some(task) = self.task.filter(|task| !task.was_said(&what)) {
            task.event(&format!("machine/{}", self.machine), NOTE, Some(what.clone()))?;
        }
        self.standing.lock().push(what);
        Ok(())
    }

    /// Tells what was done to the machine, as an event and with what came of the run.
    ///
    /// # Errors
    /// [`Code::Fenced`]; the catalogue's.
    pub(super) fn tell(&self, op: &str, what: String) -> Result<()> {
        self.context.out.say(&what);
        if let Some(task) = self.task {
            task.event(&format!("machine/{}", self.machine), op, Some(what.clone()))?;
        }
        self.notes.lock().push(what);
        Ok(())
    }

    /// The replica that has taken over from the machine, while that is not settled.
    fn taken_over(&self) -> Result<Option<(String, State)>> {
        let found = match self.task {
            Some(task) => task.catalogue.replicas::<ReplicaRecord>()?,
            None => match self.context.catalogue_if_there()? {
                Some(catalogue) => catalogue.replicas::<ReplicaRecord>()?,
                None => return Ok(None),
            },
        };
        let unsettled = |row: &Stored<ReplicaRecord>| row.source == self.machine && row.record.state.is_unsettled();
        Ok(found.into_iter().find(unsettled).map(|row| (row.name, row.record.state)))
    }

    /// Warns where what is backed up is not the machine that serves.
    pub(super) fn warn_of_takeover(&self) {
        let how = match self.taken_over() {
            // On trial, production serves again.
            Ok(None | Some((_, State::Failback))) => return,
            Ok(Some((name, State::FailedFailover))) => format!("{name} was to take over, and failed"),
            Ok(Some((name, _))) => format!("{name} serves in its place"),
            Err(fail) => {
                let what =
                    format!("{}: whether a replica serves in its place is not known: {}", self.machine, fail.what);
                return self.note(Code::WarnSkipped, what);
            }
        };
        let what = format!("{}: {how}: this is not the machine that serves", self.machine);
        self.note(Code::WarnReplicaServes, what);
    }

    /// Applies a job's rule to the machine's points. Trouble with old points never fails the new one. While a takeover
    /// is not settled every point stays: those from before the disaster may be the only good ones.
    pub(super) fn retain(&self, repository: &str, keep: Option<&Keep>) -> Option<Retained> {
        let keep = keep?;
        match self.taken_over() {
            Ok(None) => {}
            Ok(Some((name, state))) => {
                let what = format!("every point stays until the takeover by {name} is settled: it is {state}");
                self.note_once(Code::WarnReplicaServes, format!("{}: {what}", self.machine));
                return None;
            }
            Err(fail) => {
                self.note(Code::WarnSkipped, format!("{}: old points stay for now: {}", self.machine, fail.what));
                return None;
            }
        }
        let apply = || {
            let repo = repository::open_named_to_change(self.context, repository)?;
            let machine = repo.machine(self.machine)?;
            let site = self.context.site()?;
            let left_out = site.machines.get(self.machine).map(|machine| machine.exclude_disks.clone());
            let left_out = left_out.unwrap_or_default();
            let done = retain::apply(self.context, &repo, &machine, Some(keep), (&site.zone(), &left_out))?;
            Ok::<_, Fail>((repo, done))
        };
        match apply() {
            Ok((repo, retained)) => {
                for (disk, point) in &retained.last_of {
                    let name = format!("{}@{point}", self.machine);
                    let help = format!("aquifer -r {} forget {}", quoted(repo.label()), quoted(&name));
                    let what = format!(
                        "{name} stays in {repository}: no later point has the disk {disk}; `{help}` gives it up"
                    );
                    self.note_once(Code::WarnDiskGone, what);
                }
                let shown = json!({ "machine": self.machine, "kept": retained.kept,
                    "given_up": retained.given_up, "rebased": retained.rebased, "bytes_freed": retained.bytes_freed });
                self.context.out.record("retained", &shown);
                Some(retained)
            }
            Err(fail) => {
                self.note(Code::WarnSkipped, format!("{}: old points stay for now: {}", self.machine, fail.what));
                None
            }
        }
    }
}
