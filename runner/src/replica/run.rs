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

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{
    probe::Format,
    repo::{Access, Point, PointState, Repository, record::MachineDescription},
};
use aquifer_vdisk::{Chain, Delta, delta_between};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    build::{DiskBuild, MARK_BYTES, Moved},
    desk::{Desk, Row, Warn, Went, Work},
    digests::Digests,
    keep,
    layers::{self, said_above},
    model::{Carried, HomeDisk, Origin, PointRecord, ReplicaRecord, SourcePoint, Top, VERSION},
    production::Moment,
    rules::Rules,
    state::{Op, State},
    trust::{self, Holds, Touched},
};
use crate::{
    catalogue::Stored,
    fail::{Code, Fail, Result},
    host::placed,
    repository::{self, Hold},
    step::{AfterCrash, Plan},
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

/// What content a run reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunSource {
    /// A restore point of a repository.
    Backup {
        /// Its folder.
        repository: PathBuf,
        /// Which.
        point: SourcePoint,
    },
    /// Images of a machine that is off.
    Images {
        /// Its disks.
        disks: Vec<HomeDisk>,
        /// When they were last written to, nanoseconds since 1970: what is written to meanwhile is no restore point.
        #[serde(default)]
        as_of: Vec<i64>,
    },
    /// The disks of a running machine as they were at one moment, served by its hypervisor.
    Doors {
        /// Which moment: once it is over, what is served there is another.
        moment: Uuid,
        /// Its disks.
        disks: Vec<SourceDoor>,
    },
}

/// A disk that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceDoor {
    /// Its name.
    pub disk: String,
    /// NBD URI.
    pub uri: String,
}

impl RunSource {
    /// Whether production is read.
    pub fn is_production(&self) -> bool {
        !matches!(self, Self::Backup { .. })
    }
}

/// A run under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunWork {
    kind: String,
    /// The replica.
    pub name: String,
    /// The restore point it makes.
    pub point: PointRecord,
    /// What it reads.
    pub source: RunSource,
    /// How.
    pub options: RunOptions,
    /// Points that were given up.
    #[serde(default)]
    pub given_up: u64,
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
    let source = SourcePoint { repository: repo.id(), machine: point.machine, point: point.id };
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
    };
    Ok(RunWork::new(spec, record, RunSource::Backup { repository: dir.to_path_buf(), point: source }))
}

/// The source, open and held.
pub(super) struct Opened {
    repo: Option<(Repository, Point, Option<Hold>)>,
    disks: Vec<(String, Arc<Chain>)>,
}

impl Opened {
    pub(super) fn of(desk: &Desk<'_>, source: &RunSource) -> Result<Self> {
        match source {
            RunSource::Images { disks, as_of } => {
                untouched(disks, as_of)?;
                let open =
                    |disk: &HomeDisk| Ok((disk.disk.clone(), layers::open(&disk.path, disk.format, desk.cache)?));
                Ok(Self { repo: None, disks: disks.iter().map(open).collect::<Result<_>>()? })
            }
            RunSource::Doors { moment, disks } => {
                if !Moment::is_held(*moment) {
                    return Err(Fail::new(Code::NotFound, "the moment of the running machine that was read is over"));
                }
                let open = |door: &SourceDoor| Ok((door.disk.clone(), layers::served(&door.uri, desk.cache)?));
                Ok(Self { repo: None, disks: disks.iter().map(open).collect::<Result<_>>()? })
            }
            RunSource::Backup { repository, point: wanted } => {
                let repo = Repository::open(repository, desk.me.clone())?;
                let repo = repo.with_linked(crate::source::linked::opener(desk.cache.clone()));
                let machine = repo.machines()?.into_iter().find(|machine| machine.id == wanted.machine);
                let gone = || Fail::new(Code::NotFound, format!("the point {} is gone", wanted.point)).at(repo.label());
                let machine = machine.filter(|_| repo.id() == wanted.repository).ok_or_else(gone)?;
                let point = repo.points(&machine)?.into_iter().find(|point| point.id == wanted.point);
                let point = point.filter(|point| point.state == PointState::Complete).ok_or_else(gone)?;
                let hold = Hold::read(&repo, &machine, &point, repository::holder("replicate"))?;
                Ok(Self { repo: Some((repo, point, Some(hold))), disks: Vec::new() })
            }
        }
    }

    fn chain(&self, desk: &Desk<'_>, disk: &str) -> Result<Arc<Chain>> {
        if let Some((repo, point, _)) = &self.repo {
            let name = aquifer_formats::repo::DiskName::new(disk)?;
            return Ok(Arc::new(Chain::of_point(repo.open_disk(point, &name)?, desk.cache.clone())));
        }
        let found = self.disks.iter().find(|(name, _)| name == disk);
        Ok(found.ok_or_else(|| Fail::new(Code::NotFound, format!("there is no disk {disk}")))?.1.clone())
    }

    /// Where the new content can differ from the replica's newest state, if the tables prove where it cannot: the
    /// tables of the replica's own layers, down to one that was made of the same chain, and those of that chain.
    fn candidates(
        &self,
        desk: &Desk<'_>,
        record: &ReplicaRecord,
        points: &[PointRecord],
        disk: &str,
        (base, source): (&Chain, &Chain),
    ) -> Result<Option<Delta>> {
        let Some((repo, new, _)) = &self.repo else { return Ok(None) };
        let Some(machine) = repo.machines()?.into_iter().find(|machine| machine.id == new.machine) else {
            return Ok(None);
        };
        let known = repo.points(&machine)?;
        for point in points.iter().rev() {
            let Some(top) = point.disks.iter().find(|top| top.disk == disk) else { continue };
            let of = point.source.filter(|of| of.repository == repo.id() && of.machine == machine.id);
            let Some(old) = of.and_then(|of| known.iter().find(|known| known.id == of.point)) else { continue };
            let Some(above) = said_above(base, &record.folder.join(&top.file))? else { continue };
            let name = aquifer_formats::repo::DiskName::new(disk)?;
            // An older point that cannot be read any more costs reading, nothing else.
            let Ok(reader) = repo.open_disk(old, &name) else { continue };
            let old = Chain::of_point(reader, desk.cache.clone());
            return Ok(Some(delta_between(&old, source)?.union(&above)));
        }
        Ok(None)
    }
}

/// The disks of a run, with what they are built on.
pub(super) struct Builds {
    /// In the order of the point's disks.
    pub(super) disks: Vec<DiskBuild>,
    /// Layers of the newest point that were changed from outside.
    touched: Vec<Touched>,
    /// What each disk is built on, and what that looked like.
    prints: Vec<(Top, String)>,
}

/// Refuses images that were written to since a run began with them.
fn untouched(disks: &[HomeDisk], as_of: &[i64]) -> Result<()> {
    for (disk, as_of) in disks.iter().zip(as_of) {
        if written(&disk.path)? != *as_of {
            let what = "the image was written to while it was copied: its machine has to be off";
            return Err(Fail::new(Code::State, what).at(disk.path.display()));
        }
    }
    Ok(())
}

/// When a file was last written to, nanoseconds since 1970.
///
/// # Errors
/// I/O.
pub(crate) fn written(path: &Path) -> Result<i64> {
    let meta = std::fs::metadata(path).map_err(|e| Fail::io(path.display(), "look at", &e))?;
    Ok(meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()))
}

impl RunWork {
    /// A run that has not begun.
    pub(super) fn new(spec: &ReplicaSpec, point: PointRecord, source: RunSource) -> Self {
        let kind = Self::KIND.into();
        Self { kind, name: spec.name.clone(), point, source, options: spec.options, given_up: 0 }
    }

    pub(super) fn builds(&self, desk: &Desk<'_>, record: &ReplicaRecord, opened: &Opened) -> Result<Builds> {
        let mut points = desk.points(&self.name)?;
        points.retain(|point| point.number < self.point.number);
        let newest = points.last();
        // What was changed from outside is read, not believed.
        let touched = newest.map_or_else(|| Ok(Vec::new()), |newest| trust::look(record, newest))?;
        let told = |touched: &Touched| {
            let what = format!("the layer {} of {} was changed from outside", touched.file, self.name);
            (desk.warn)(Code::WarnResync, what);
        };
        touched.iter().for_each(told);
        let mut prints = Vec::new();
        let mut builds = Vec::new();
        for top in &self.point.disks {
            let source = opened.chain(desk, &top.disk)?;
            let below =
                newest.and_then(|point| point.disks.iter().find(|below| below.disk == top.disk).map(|b| (point, b)));
            let mut build = DiskBuild {
                owner: desk.fence.owner.clone(),
                source,
                base: None,
                digests: None,
                candidates: None,
                path: record.folder.join(&top.file),
                key: format!("{:?} {} on {:?}", self.source, top.disk, below.map(|(_, below)| &below.file)),
                block: record.digest_block,
                mark_bytes: self.options.mark_bytes,
            };
            if let Some((point, below)) = below {
                let file = record.folder.join(&below.file);
                let print = trust::print(record, below)?;
                build.key.push_str(&format!(" that looks {print}"));
                prints.push((below.clone(), print));
                let base = layers::open(&file, Format::Qcow2, desk.cache)?;
                if !record.needs_resync && touched.is_empty() {
                    build.digests = Digests::load(&keep::digest_file(record, point, &top.disk), base.size())?;
                    let pair = (&*base, &*build.source);
                    build.candidates = opened.candidates(desk, record, &points, &top.disk, pair)?;
                }
                if build.digests.is_none() {
                    resync(desk.warn, &self.name, &top.disk);
                }
                build.base = Some((base, layers::backing(&file, Format::Qcow2)?));
            }
            builds.push(build);
        }
        Ok(Builds { disks: builds, touched, prints })
    }

    /// Takes back whatever was written.
    pub(super) fn discard(&self, record: &ReplicaRecord) -> Result<()> {
        self.point.disks.iter().try_for_each(|top| {
            let path = record.folder.join(&top.file);
            super::build::forget(&path)?;
            if trust::is_settled(record, &top.file, self.point.id)? { layers::remove(&path) } else { Ok(()) }
        })
    }

    fn copy(&mut self, desk: &Desk<'_>) -> Result<()> {
        let opened = Opened::of(desk, &self.source)?;
        let record = desk.load(&self.name)?.record;
        let Builds { disks: builds, touched, prints } = self.builds(desk, &record, &opened)?;
        let mut settled = Vec::new();
        for top in &self.point.disks {
            settled.push(trust::is_settled(&record, &top.file, self.point.id)?);
        }
        let (next, built) = (Mutex::new(builds.iter().enumerate()), Mutex::new(Vec::new()));
        let workers = self.options.parallel.clamp(1, builds.len().max(1));
        std::thread::scope(|scope| {
            let work = || {
                loop {
                    let Some((index, build)) = next.lock().next() else { return Ok(()) };
                    if settled.get(index) == Some(&true) {
                        continue;
                    }
                    let done = build.run(desk.pace)?;
                    built.lock().push((index, done));
                }
            };
            let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            let ends = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|payload| Err(Fail::from_panic(payload.as_ref()))));
            // All are waited for before the first failure is told.
            let ends: Vec<Result<()>> = ends.collect();
            ends.into_iter().collect::<Result<()>>()
        })?;
        if let RunSource::Images { disks, as_of } = &self.source {
            untouched(disks, as_of)?;
        }
        // It took its time: who has lost the work leaves the files alone, and so does who has lost the replica.
        (desk.pace)(Moved::Ahead(0))?;
        desk.check_stamp(&record)?;
        for (below, print) in &prints {
            if trust::print(&record, below)? != *print {
                let what = format!("the layer {} of {} was changed while it was built on", below.file, self.name);
                return Err(Fail::new(Code::State, what).at(record.folder.join(&below.file).display()));
            }
        }
        let mut carried = Carried::default();
        for (index, built) in built.into_inner() {
            let (Some(build), Some(top)) = (builds.get(index), self.point.disks.get(index)) else { continue };
            build.settle(&built, |part| {
                trust::set_aside(desk, &record, &top.file)?;
                built.digests.store(&keep::digest_file(&record, &self.point, &top.disk))?;
                trust::enter(&record, &top.file, part, Holds::Point(self.point.id))
            })?;
            if self.options.verify
                && let Err(fail) = verify(desk, build, &built.digests)
            {
                super::build::discard(&build.path)?;
                return Err(fail);
            }
            carried.add(built.carried);
        }
        trust::accept(&record, &touched, self.point.number)?;
        if self.source.is_production() {
            carried.bytes_read_production = carried.bytes_read;
        }
        self.point.carried = carried;
        self.point.made = Timestamp::now();
        Ok(())
    }
}

fn resync(warn: Warn<'_>, name: &str, disk: &str) {
    warn(Code::WarnResync, format!("the digests of {name}'s disk {disk} are made anew from the replica's own layers"));
}

fn verify(desk: &Desk<'_>, build: &DiskBuild, digests: &Digests) -> Result<()> {
    let disk = layers::disk(&build.path, desk.cache)?;
    if Digests::of(&disk, digests.block())? == *digests {
        return Ok(());
    }
    Err(Fail::new(Code::BlockCorrupt, "what was written reads back differently").at(build.path.display()))
}

impl Work for RunWork {
    const OP: Op = Op::Replicate;
    const KIND: &'static str = "run";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::On)
            .step(
                "stamp",
                |work: &mut Self| {
                    let mut row = desk.load(&work.name)?;
                    if row.record.state == State::Absent {
                        desk.stamp(&row.record.folder, row.record.lineage, row.record.epoch)?;
                    }
                    if row.record.state != State::Processing {
                        row.record.state = State::Processing;
                        desk.store(row)?;
                    }
                    Ok(())
                },
                |_| Ok(()),
            )
            // What was copied is kept, unless there is no room for the rest of it: the next run goes on from it.
            .step(
                "copy",
                |work: &mut Self| match work.copy(desk) {
                    Err(fail) if fail.code == Code::Capacity => {
                        work.discard(&desk.load(&work.name)?.record)?;
                        Err(fail)
                    }
                    copied => copied,
                },
                |_| Ok(()),
            )
            .final_step("point", |work: &mut Self| desk.put_point(&work.name, &work.point))
            .final_step("describe", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                describe(&record, &work.point.description, &work.point.disks)
            })
            .final_step("retain", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                work.given_up += keep::retain(desk, &record, work.options.keep, work.options.squash_at)?;
                Ok(())
            })
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        match went {
            Went::Done => {
                record.next_layer = record.next_layer.max(self.point.number + 1);
                (record.unfinished, record.needs_resync) = (None, false);
                record.state = State::Ready;
            }
            // The point stands, only its tidying up was not finished: the next run does that.
            Went::Stuck(_) => {
                record.next_layer = record.next_layer.max(self.point.number + 1);
                record.unfinished = None;
                record.state = State::Ready;
            }
            Went::Undone(fail) => {
                record.unfinished = (fail.code != Code::Capacity).then(|| Box::new(self.clone()));
                if record.unfinished.is_some() && self.point.number > 1 {
                    // Its files keep their number: what a takeover makes meanwhile has another one.
                    record.next_layer = record.next_layer.max(self.point.number + 1);
                }
                record.state = if self.point.number == 1 { State::Absent } else { State::Ready };
            }
        }
    }
}

/// Writes what the host starts.
///
/// # Errors
/// I/O.
pub fn describe(record: &ReplicaRecord, description: &MachineDescription, tops: &[Top]) -> Result<()> {
    let disks: Vec<_> = tops.iter().map(|top| (top.disk.clone(), top.file.clone())).collect();
    placed::write(&record.folder, &record.rules.moved(description), &disks)
}
