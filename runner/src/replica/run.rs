//! A run of replication: one more restore point of a replica.
//!
//! From backups, production is not asked for anything: the newest complete point of any of the named repositories is
//! read. From images (a machine that is off), those are read.
//!
//! Invariants
//! - What is not newer than what the replica has makes no point; a damaged newest point is told and never replaced by
//!   one that is older than what the replica has.
//! - An interrupted run is finished first, into the point it was making, if its source is still there.
//! - A restore point is known only when all its disks are whole and durable, with their digests.
//!
//! Not here: how a disk is built ([`super::build`]); what stays ([`super::keep`]).

mod opened;
mod work;

use std::{
    io,
    path::{Path, PathBuf},
};

use aquifer_formats::repo::{Access, Point, PointState, Repository};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(super) use opened::Opened;
pub(crate) use opened::written;
pub use opened::{RunSource, SourceDoor};
pub use work::{RunWork, describe};

use super::{
    build::MARK_BYTES,
    desk::{Desk, Row},
    keep,
    model::{Carried, Origin, PointRecord, ReplicaRecord, SourcePoint, Top, VERSION},
    rules::Rules,
    state::{Op, State},
    trust,
};
use crate::{
    catalogue::Stored,
    fail::{Code, Fail, Result},
    host::placed,
};

/// What a job says of one replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaSpec {
    /// Its name.
    pub name: String,
    /// The machine.
    pub machine: String,
    /// The job.
    pub job: Option<String>,
    /// The host.
    pub host: String,
    /// Its folder there.
    pub folder: PathBuf,
    /// Folder for its digests.
    pub metadata: PathBuf,
    /// Repositories that are read.
    pub repositories: Vec<PathBuf>,
    /// How it is done.
    pub options: RunOptions,
    /// What else is said of it.
    #[serde(default)]
    pub rules: Rules,
}

/// How a run is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunOptions {
    /// Each missed point, in order, instead of the newest.
    pub catch_up_all: bool,
    /// Restore points that stay.
    pub keep: u32,
    /// Layers below the oldest point before they are merged.
    pub squash_at: usize,
    /// Disks at once.
    pub parallel: usize,
    /// Bytes of a block of the digests.
    pub block: u64,
    /// Bytes between two marks.
    pub mark_bytes: u64,
    /// Whether what was written is read back.
    pub verify: bool,
    /// Whether repositories that belong to another installation are read as well.
    #[serde(default)]
    pub imported: bool,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            catch_up_all: false,
            keep: 7,
            squash_at: keep::SQUASH_AT,
            parallel: 4,
            block: super::digests::BLOCK_MIN,
            mark_bytes: MARK_BYTES,
            verify: false,
            imported: false,
        }
    }
}

/// What a run did for one replica.
#[derive(Clone, Debug, PartialEq)]
pub enum Ran {
    /// These points were made.
    Made(Vec<PointRecord>),
    /// There was nothing newer.
    NoNewPoint,
    /// The replica is in use, or given up.
    OnHold(State),
}

/// Makes a replica as new as its source.
///
/// # Errors
/// [`Code::NotFound`] where no repository has a usable point; whatever fails on the way: what was copied stays and is
/// gone on from.
pub fn replicate(desk: &Desk<'_>, spec: &ReplicaSpec) -> Result<Ran> {
    replicate_as(desk, spec, Origin::Job)
}

/// As [`replicate`], for points of another origin.
///
/// # Errors
/// As [`replicate`].
pub fn replicate_as(desk: &Desk<'_>, spec: &ReplicaSpec, origin: Origin) -> Result<Ran> {
    let known = desk.points(&spec.name)?;
    let row = prepare(desk, spec)?;
    if row.record.state.holds_replication() || row.record.excluded {
        return Ok(Ran::OnHold(row.record.state));
    }
    let mut made = ended_now(desk, &spec.name, &known)?;
    made.extend(finish_old(desk, row)?);
    loop {
        let points = desk.points(&spec.name)?;
        let Some((repository, point)) = choose(desk, spec, points.last())? else { break };
        let number = desk.load(&spec.name)?.record.next_layer;
        let work = work_of(desk, spec, (number, origin), &points, &repository, &point)?;
        desk.ready_for(&spec.name, Op::Replicate)?;
        made.push(desk.carry_out(&spec.name, work, None)?.point);
        if !spec.options.catch_up_all {
            break;
        }
    }
    if !made.is_empty() {
        return Ok(Ran::Made(made));
    }
    // What is said to be up to date has to be there.
    let record = desk.load(&spec.name)?.record;
    if let Some(newest) = desk.points(&spec.name)?.last() {
        desk.check_stamp(&record)?;
        if let Some(layer) = trust::look(&record, newest)?.first() {
            let what = format!("the layer {} of {} was changed from outside", layer.file, spec.name);
            (desk.warn)(Code::WarnResync, what);
        }
    }
    Ok(Ran::NoNewPoint)
}

/// Points of a run whose worker died, which was brought to its end by looking at the replica: they are this run's.
pub(super) fn ended_now(desk: &Desk<'_>, name: &str, known: &[PointRecord]) -> Result<Vec<PointRecord>> {
    let is_new = |point: &PointRecord| !known.iter().any(|before| before.id == point.id);
    Ok(desk.points(name)?.into_iter().filter(is_new).collect())
}

/// The replica's record, made where there is none, with whatever died before it brought to an end.
///
/// # Errors
/// [`Code::Exists`] where its folder holds something else.
pub(super) fn prepare(desk: &Desk<'_>, spec: &ReplicaSpec) -> Result<Row> {
    let known = desk.catalogue.replica::<ReplicaRecord>(&spec.name)?;
    // One that was given up with its files is made anew.
    let known = match known {
        Some(gone) if gone.record.state == State::Removed && !gone.record.excluded => {
            desk.catalogue.drop_replica(desk.fence, &spec.name, gone.revision)?;
            None
        }
        known => known,
    };
    if known.is_none() {
        std::fs::create_dir_all(&spec.folder).map_err(|e| Fail::io(spec.folder.display(), "create", &e))?;
        let folder = std::fs::canonicalize(&spec.folder).map_err(|e| Fail::io(spec.folder.display(), "find", &e))?;
        refuse_strangers(&folder)?;
        store_fresh(desk, fresh(spec, folder))?;
    }
    super::recover::recover(desk, &spec.name)?;
    let mut row = desk.load(&spec.name)?;
    if matches!(row.record.state, State::Absent | State::Ready) && desk.running(&row.record.folder).is_some() {
        // Somebody else's takeover is not a machine that was started by hand.
        desk.check_stamp(&row.record)?;
        // What it wrote is in no record: the next run that finds it off compares with the disks themselves.
        row.record.needs_resync = true;
        desk.store(row)?;
        let what = format!("the machine of {} was started by hand; turn it off, and the next run goes on", spec.name);
        return Err(Fail::new(Code::State, what).at(spec.folder.display()));
    }
    if row.record.machine != spec.machine || row.record.host != spec.host {
        let (machine, host) = (&row.record.machine, &row.record.host);
        let what =
            format!("{} is the replica of {machine} on {host}, not of {} on {}", spec.name, spec.machine, spec.host);
        return Err(Fail::new(Code::Exists, what).help("aquifer config check"));
    }
    if row.record.rules != spec.rules || row.record.job != spec.job {
        (row.record.rules, row.record.job) = (spec.rules.clone(), spec.job.clone());
        row = desk.store(row)?;
    }
    Ok(row)
}

/// Refuses a folder that holds anything: a machine of somebody else, what is left of a replica.
///
/// # Errors
/// [`Code::Exists`].
pub(crate) fn refuse_strangers(folder: &Path) -> Result<()> {
    let is_free = match std::fs::read_dir(folder) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(Fail::io(folder.display(), "list", &error)),
    };
    if is_free {
        return Ok(());
    }
    if let Some(copy) = trust::recall(folder)? {
        let name = copy.record.name;
        let what = format!("{} holds {name}, a replica that this catalogue does not know", folder.display());
        let help = format!("aquifer replicas {name} --take-back");
        return Err(Fail::new(Code::Exists, what).at(folder.display()).help(help));
    }
    let what = if folder.join(placed::DESCRIPTION).exists() {
        format!("{} holds a machine that is no replica of ours", folder.display())
    } else {
        format!("{} is not empty", folder.display())
    };
    Err(Fail::new(Code::Exists, what).at(folder.display()).help("aquifer explain E_EXISTS"))
}

/// Makes a replica known.
pub(super) fn store_fresh(desk: &Desk<'_>, record: ReplicaRecord) -> Result<Row> {
    let (name, source, job) = (record.name.clone(), record.machine.clone(), record.job.clone());
    let state = record.state.name().into();
    desk.store(Stored { name, revision: 0, state, source, job, record })
}

/// A replica that has no point yet.
pub(super) fn fresh(spec: &ReplicaSpec, folder: PathBuf) -> ReplicaRecord {
    ReplicaRecord {
        version: VERSION,
        name: spec.name.clone(),
        lineage: Uuid::new_v4(),
        epoch: 1,
        machine: spec.machine.clone(),
        job: spec.job.clone(),
        host: spec.host.clone(),
        folder,
        metadata: spec.metadata.clone(),
        digest_block: spec.options.block,
        state: State::Absent,
        next_layer: 1,
        needs_resync: false,
        excluded: false,
        rules: spec.rules.clone(),
        unfinished: None,
        failover: None,
        failback: None,
    }
}

/// Finishes what an earlier run began, if its source is still there.
///
/// # Errors
/// As [`replicate`].
pub(super) fn finish_old(desk: &Desk<'_>, row: Row) -> Result<Vec<PointRecord>> {
    let Some(work) = row.record.unfinished.clone() else { return Ok(Vec::new()) };
    let work = *work;
    let name = work.name.clone();
    let points = desk.points(&name)?;
    let overtaken = points.iter().any(|point| point.number >= work.point.number && point.id != work.point.id);
    let gone = Opened::of(desk, &work.source).err().map(|fail| fail.what);
    if let Some(why) = gone.or_else(|| overtaken.then(|| "the replica has newer points".to_owned())) {
        (desk.warn)(Code::WarnInterrupted, format!("what an earlier run of {name} began is dropped: {why}"));
        work.discard(&row.record)?;
        let mut row = row;
        row.record.unfinished = None;
        desk.store(row)?;
        return Ok(Vec::new());
    }
    desk.ready_for(&name, Op::Replicate)?;
    Ok(vec![desk.carry_out(&name, work, Some("an earlier run was interrupted".into()))?.point])
}

/// The point to take: newer than `latest`; the newest, or the first that was missed.
///
/// # Errors
/// [`Code::NotFound`] where no repository has any.
pub fn choose(desk: &Desk<'_>, spec: &ReplicaSpec, latest: Option<&PointRecord>) -> Result<Option<(PathBuf, Point)>> {
    let mut found: Vec<(PathBuf, Point)> = Vec::new();
    let mut any = false;
    // A machine that was mapped says nothing of how new it is.
    let latest = latest.filter(|point| point.origin != Origin::Mapped);
    for dir in &spec.repositories {
        let repo = Repository::open(dir, desk.me.clone())?;
        refuse_foreign(&repo, spec)?;
        let machine = match repo.machine(&spec.machine) {
            Ok(machine) => machine,
            Err(aquifer_formats::repo::Error::NotFound { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let points = repo.points(&machine)?;
        any |= points.iter().any(|point| point.state == PointState::Complete);
        // From the newest down: what is damaged there is told, what is incomplete is still being made.
        for point in points.into_iter().rev() {
            let newer = |point: &Point| match (point.created(), latest) {
                (Some(created), Some(latest)) => created > latest.taken,
                (created, _) => created.is_some(),
            };
            match &point.state {
                PointState::Complete if newer(&point) => found.push((dir.clone(), point)),
                PointState::Complete => break,
                PointState::Incomplete => {}
                damaged => {
                    let what = format!("the point {} of {} is {} and left out", point.id, spec.machine, damaged.name());
                    (desk.warn)(Code::WarnSkipped, what);
                }
            }
        }
    }
    if !any {
        let what = format!("no backup of {} was found", spec.machine);
        return Err(Fail::new(Code::NotFound, what).help(format!("aquifer points {}", spec.machine)));
    }
    let by_time = |(_, point): &(PathBuf, Point)| point.created();
    Ok(if spec.options.catch_up_all && latest.is_some() {
        found.into_iter().min_by_key(by_time)
    } else {
        found.into_iter().max_by_key(by_time)
    })
}

/// Refuses a repository that another installation goes on writing to, unless the job says that it means that.
pub(super) fn refuse_foreign(repo: &Repository, spec: &ReplicaSpec) -> Result<()> {
    match repo.access()? {
        Access::ReadOnly { owner } if !spec.options.imported => {
            let what = format!("the points of {} are made by another installation, {}", spec.machine, owner.name);
            let help =
                format!("aquifer -r {} init --take-over    # or `imported = true` in the job's source", repo.label());
            Err(Fail::new(Code::ForeignOwner, what).at(repo.label()).help(help))
        }
        Access::ReadOnly { .. } | Access::ReadWrite => Ok(()),
    }
}

/// When the newest complete backup was made, if there is any.
///
/// # Errors
/// The repositories'.
pub fn newest_backup(desk: &Desk<'_>, spec: &ReplicaSpec) -> Result<Option<Timestamp>> {
    match choose(desk, spec, None) {
        Ok(found) => Ok(found.and_then(|(_, point)| point.created())),
        Err(fail) if fail.code == Code::NotFound => Ok(None),
        Err(fail) => Err(fail),
    }
}

pub(super) fn work_of(
    desk: &Desk<'_>,
    spec: &ReplicaSpec,
    (next_layer, origin): (u64, Origin),
    points: &[PointRecord],
    dir: &Path,
    point: &Point,
) -> Result<RunWork> {
    let number = next_layer.max(points.last().map_or(0, |last| last.number + 1));
    let repo = Repository::open(dir, desk.me.clone())?;
    let stored = point.record.clone().ok_or_else(|| Fail::new(Code::Bug, "a complete point without a record"))?;
    let wanted = stored.disks.iter().filter(|disk| !spec.rules.leave_out(disk.name.as_str()));
    let disks = wanted.map(|disk| {
        let name = disk.name.as_str().to_owned();
        Top { file: ReplicaRecord::layer_name(&name, number), disk: name, size: disk.size }
    });
    let source = SourcePoint::of(&repo, point);
    let record = PointRecord {
        version: VERSION,
        id: Uuid::now_v7(),
        number,
        taken: stored.created,
        made: Timestamp::now(),
        origin,
        source: Some(source),
        disks: disks.collect(),
        description: stored.machine,
        carried: Carried::default(),
        gone: Vec::new(),
    };
    Ok(RunWork::new(spec, record, RunSource::Backup { repository: dir.to_path_buf(), point: source }))
}
