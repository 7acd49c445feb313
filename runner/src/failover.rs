//! Taking over: a replica's machine is started at a restore point, and that is taken back or made final.
//!
//! Invariants
//! - The machine writes to a new layer on the chosen point: O(1), whatever its size, and every point stays as it was.
//! - The stamp's epoch grows before a machine starts: whoever still has the older one is refused from then on.
//! - Production is not touched, except by a planned takeover, which turns it off first.
//!
//! Not here: the way home (`failback`), plans of several machines (`plan`).

use std::{fs, path::Path, sync::Arc, time::Duration};

use aquifer_formats::{probe::Format, repo::record::MachineDescription};
use aquifer_vdisk::BlockCache;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    context::quoted,
    fail::{Code, Fail, Result},
    host::{
        Running,
        in_use::Against,
        placed::{self, Placed},
    },
    recover::shape::Wishes,
    replica::{
        build::{Moved, forget},
        desk::{Desk, Went, Work, object},
        images, keep, layers,
        model::{FailoverRecord, HomeDisk, PointRecord, ReplicaRecord, Top},
        production::replicate_images,
        run::{ReplicaSpec, describe, replicate},
        state::{Op, State},
        stray,
        trust::{self, Holds, Proof},
    },
    source::PointRef,
    step::{AfterCrash, Plan},
    tasks::follow::{WAIT, at},
    units,
};

/// How long a guest has to turn itself off.
pub const GRACE: Duration = Duration::from_secs(900);

/// The reason of a takeover that turned production off in order.
pub(crate) const PLANNED: &str = "planned";

/// A takeover under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailoverWork {
    kind: String,
    /// The replica.
    pub name: String,
    point: Uuid,
    below: Vec<Top>,
    tops: Vec<Top>,
    number: u64,
    epoch: u64,
    reason: Option<String>,
    description: MachineDescription,
    /// Whether the machine is started.
    start: bool,
    /// It failed before; its layer is kept.
    again: bool,
    /// A point that was changed from outside is good enough.
    #[serde(default)]
    force: bool,
    /// It was, or may have been.
    #[serde(default)]
    touched: bool,
    /// The machine, once it runs.
    pub running: Option<Running>,
}

/// The restore point that is meant.
///
/// # Errors
/// [`Code::NotFound`], [`Code::Ambiguous`].
pub fn pick<'p>(name: &str, points: &'p [PointRecord], wanted: &PointRef) -> Result<&'p PointRecord> {
    let none = || no_point(name, points, wanted);
    match wanted {
        PointRef::Latest(back) => {
            let at = points.len().checked_sub(1 + usize::try_from(*back).unwrap_or(usize::MAX));
            at.and_then(|at| points.get(at)).ok_or_else(none)
        }
        PointRef::At(time) => {
            points.iter().filter(|point| point.taken <= *time).max_by_key(|p| p.taken).ok_or_else(none)
        }
        PointRef::Id(prefix) => {
            let fits = |point: &&PointRecord| point.id.to_string().starts_with(&prefix.to_lowercase());
            match points.iter().filter(fits).collect::<Vec<_>>().as_slice() {
                [one] => Ok(one),
                [] => Err(none()),
                several => {
                    let ids: Vec<_> = several.iter().map(|point| point.id.to_string()).collect();
                    Err(Fail::new(Code::Ambiguous, format!("`{prefix}` could be {}", ids.join(", "))))
                }
            }
        }
    }
}

/// What was asked for, and what there is.
fn no_point(name: &str, points: &[PointRecord], wanted: &PointRef) -> Fail {
    let what = match wanted {
        PointRef::Latest(back) => format!("{name} has no restore point latest~{back}"),
        PointRef::At(time) => format!("{name} has no restore point of {time} or before"),
        PointRef::Id(prefix) => format!("{name} has no restore point whose id begins with {prefix}"),
    };
    let range = points.iter().map(|point| point.taken).min().zip(points.iter().map(|point| point.taken).max());
    let have = range.map_or_else(
        || "it has none".to_owned(),
        |(from, to)| format!("it has {}, of {} to {}", units::count(points.len(), "point"), at(from), at(to)),
    );
    Fail::new(Code::NotFound, what).at(object(name)).cause(have).help(format!("aquifer replicas {}", quoted(name)))
}

/// Lets a replica take over at a restore point.
///
/// # Errors
/// [`Code::State`]; what failed: before the machine was started nothing is left, after it the layer stays and the
/// replica is in `failed_failover`.
pub fn failover(
    desk: &Desk<'_>,
    name: &str,
    wanted: &PointRef,
    reason: Option<String>,
    start: bool,
) -> Result<FailoverWork> {
    failover_as(desk, name, wanted, reason, Manner { start, force: false })
}

/// How a takeover is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Whether the machine is started.
    pub start: bool,
    /// Also at a point that was changed from outside.
    pub force: bool,
}

/// As [`failover`].
///
/// # Errors
/// As [`failover`].
pub fn failover_as(
    desk: &Desk<'_>,
    name: &str,
    wanted: &PointRef,
    reason: Option<String>,
    Manner { start, force }: Manner,
) -> Result<FailoverWork> {
    let row = desk.ready_for(name, Op::Failover)?;
    let record = row.record;
    let points = desk.points(name)?;
    let work = match &record.failover {
        Some(failed) => {
            let point = points.iter().find(|point| point.id == failed.point);
            let point =
                point.ok_or_else(|| Fail::new(Code::NotFound, format!("the point {} is gone", failed.point)))?;
            FailoverWork {
                again: true,
                tops: failed.tops.clone(),
                ..FailoverWork::new(&record, point, reason.clone(), start)
            }
        }
        None => FailoverWork::new(&record, pick(name, &points, wanted)?, reason.clone(), start),
    };
    desk.carry_out(name, FailoverWork { force, ..work }, reason)
}

impl FailoverWork {
    fn new(record: &ReplicaRecord, point: &PointRecord, reason: Option<String>, start: bool) -> Self {
        let number = record.next_layer;
        let tops = point
            .disks
            .iter()
            .map(|below| Top { file: ReplicaRecord::layer_name(&below.disk, number), ..below.clone() });
        Self {
            kind: Self::KIND.into(),
            name: record.name.clone(),
            point: point.id,
            below: point.disks.clone(),
            tops: tops.collect(),
            number,
            epoch: record.epoch,
            reason,
            description: point.description.clone(),
            start,
            again: false,
            force: false,
            touched: false,
            running: None,
        }
    }

    /// Refuses a point that somebody has changed from outside, unless that is good enough.
    fn prove(&mut self, desk: &Desk<'_>, record: &ReplicaRecord) -> Result<()> {
        let points = desk.points(&self.name)?;
        let Some(point) = points.iter().find(|point| point.id == self.point) else { return Ok(()) };
        if self.force {
            // Whoever takes it as it is does not wait until it is read.
            let touched = trust::look(record, point)?;
            if let Some(layer) = touched.first() {
                self.touched = true;
                let what = format!("{} of {} was changed from outside; it is taken as it is", layer.file, self.name);
                (desk.warn)(Code::WarnResync, what);
            }
            return Ok(());
        }
        let what = match trust::prove(desk, record, point)? {
            Proof::Untouched => return Ok(()),
            Proof::Same => format!("layers of {} were touched from outside, and hold what they held", self.name),
            Proof::Unknown(touched) => {
                self.touched = true;
                let files: Vec<_> = touched.into_iter().map(|layer| layer.file).collect();
                format!("{} of {} may have been changed from outside: no digests are left", files.join(", "), self.name)
            }
            Proof::Differs(disk) => {
                self.touched = true;
                let what = format!("{disk} of the point {} was changed from outside since it was made", point.id);
                let fail = Fail::new(Code::BlockCorrupt, what).at(record.folder.display());
                return Err(fail.help(format!("aquifer failover {} --to latest~1    # or --force", self.name)));
            }
        };
        (desk.warn)(Code::WarnResync, what);
        Ok(())
    }
}

impl Work for FailoverWork {
    const OP: Op = Op::Failover;
    const KIND: &'static str = "failover";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::Back)
            .step(
                "layer",
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    whole(desk, &record, &work.below)?;
                    work.prove(desk, &record)?;
                    put_layers(desk, &record, &work.below, &work.tops)
                },
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    if work.again { Ok(()) } else { remove_layers(&record, &work.tops) }
                },
            )
            .step(
                "stamp",
                |work: &mut Self| desk.stamp_as(&work.name, work.epoch + 1),
                |work: &mut Self| desk.stamp_as(&work.name, work.epoch),
            )
            .step(
                "describe",
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    describe(&record, &work.description, &work.tops)?;
                    put_variables(desk, &record.folder, &work.description)
                },
                |work: &mut Self| describe_latest(desk, &work.name),
            )
            .final_step("start", |work: &mut Self| {
                if work.start {
                    let record = desk.load(&work.name)?.record;
                    work.running = Some(start(desk, &record.folder, &record.name)?);
                }
                Ok(())
            })
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        record.state = match went {
            Went::Undone(_) => return,
            Went::Done => State::Failover,
            Went::Stuck(_) => State::FailedFailover,
        };
        record.epoch = self.epoch + 1;
        record.next_layer = record.next_layer.max(self.number + 1);
        record.failover = Some(FailoverRecord {
            point: self.point,
            since: record.failover.as_ref().map_or_else(Timestamp::now, |before| before.since),
            reason: self.reason.clone(),
            tops: self.tops.clone(),
            description: self.description.clone(),
            running: self.running.clone(),
        });
        record.needs_resync |= self.touched;
    }
}

/// Refuses a restore point whose layers do not hold what their tables name: a hypervisor would read zeros there.
fn whole(desk: &Desk<'_>, record: &ReplicaRecord, disks: &[Top]) -> Result<()> {
    disks.iter().try_for_each(|top| {
        let whole = layers::open(&record.folder.join(&top.file), Format::Qcow2, desk.cache)
            .and_then(|chain| crate::copy::used_bytes(&aquifer_vdisk::Disk::read_only(&top.disk, chain)));
        let name = quoted(&record.name);
        let help = format!(
            "aquifer failover {name} --to latest~1    # or aquifer replicas {name} --delete: its job makes it anew"
        );
        whole.map(drop).map_err(|fail| match fail.code {
            Code::Interrupted | Code::Terminated | Code::Fenced => fail,
            _ => fail.help(help),
        })
    })
}

/// Puts an empty layer on each disk. One of ours that is there already is left alone.
///
/// # Errors
/// I/O.
pub(crate) fn put_layers(desk: &Desk<'_>, record: &ReplicaRecord, below: &[Top], tops: &[Top]) -> Result<()> {
    below.iter().zip(tops).try_for_each(|(below, top)| {
        if trust::is_live(record, &top.file)? {
            return Ok(());
        }
        let on = record.folder.join(&below.file);
        if trust::take_as_live(record, &top.file, &on)? {
            return Ok(());
        }
        trust::set_aside(desk, record, &top.file)?;
        layers::make_empty(&record.folder.join(&top.file), (&on, Format::Qcow2), top.size, |part| {
            trust::enter(record, &top.file, part, Holds::Writes)
        })
    })
}

/// Takes such layers back.
fn remove_layers(record: &ReplicaRecord, tops: &[Top]) -> Result<()> {
    tops.iter().try_for_each(|top| {
        let path = record.folder.join(&top.file);
        forget(&path)?;
        if trust::is_live(record, &top.file)? { layers::remove(&path) } else { Ok(()) }
    })
}

/// What its firmware remembers, as the restore point has it.
fn put_variables(desk: &Desk<'_>, folder: &Path, description: &MachineDescription) -> Result<()> {
    let Some(stored) = &description.variables else { return Ok(()) };
    let content = stored.content(&folder.display().to_string())?;
    let path = desk.host.variables(folder);
    if path.exists() { Ok(()) } else { crate::replica::digests::put_file(&path, &content) }
}

/// Starts the machine in a folder.
///
/// # Errors
/// The host's.
pub(crate) fn start(desk: &Desk<'_>, folder: &Path, name: &str) -> Result<Running> {
    let placed = Placed::read(folder)?;
    let disks = placed.disks.iter().map(|disk| {
        let chain = layers::open(&disk.path, images::format(disk.format), desk.cache)?;
        Ok(aquifer_vdisk::Disk::read_only(&disk.name, chain))
    });
    let disks = if placed.described.firmware.is_some() { Vec::new() } else { disks.collect::<Result<Vec<_>>>()? };
    let wishes = Wishes { network: desk.network, ..Wishes::default() };
    let mut shape = placed.shape(name, &wishes, &disks)?;
    shape.variables = fs::metadata(desk.host.variables(folder)).ok().map(|meta| meta.len());
    let places = desk.places(folder);
    make_private(&places.runtime_dir)?;
    if desk.running(folder).is_none() {
        stray::note(folder, &places.runtime_dir)?;
    }
    Ok(desk.host.start(&shape, &placed.attachments(), &places)?)
}

fn make_private(dir: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|e| Fail::io(dir.display(), "create", &e))
}

/// Turns the machine in a folder off, if one runs there. Its guest is asked first where there is `grace`; whoever waits
/// for `name` is told until when, and may end that at any moment.
///
/// # Errors
/// It is still there; somebody asks to stop: the machine is left as it is, and its guest may heed what it was asked.
pub(crate) fn power_off(desk: &Desk<'_>, name: &str, folder: &Path, grace: Duration) -> Result<bool> {
    let Some(running) = desk.running(folder) else { return Ok(false) };
    if !grace.is_zero() {
        // A grace that ends behind all times is one without an end.
        let until = Timestamp::now().saturating_add(grace).unwrap_or(Timestamp::MAX);
        let what = format!("waiting for the guest to turn itself off, at most until {}", at(until));
        desk.tell(name, WAIT, what)?;
        let goes_on = || (desk.pace)(Moved::Read(0)).is_ok();
        // One that cannot be asked is turned off all the same.
        if desk.host.ask_off(&running, grace, &goes_on).unwrap_or(false) {
            return Ok(true);
        }
        if let Err(fail) = (desk.pace)(Moved::Read(0)) {
            // Said where it can be: who has lost the lease has nothing to say.
            let _ =
                desk.tell(name, WAIT, "not waited for any more: the guest was asked, and may turn itself off".into());
            return Err(fail);
        }
    }
    desk.host.power_off(&running)?;
    Ok(true)
}

/// What the machine of a takeover that is over has said goes with it: the folder is a replica's, and the next machine in
/// it begins anew.
pub(crate) fn forget_logs(desk: &Desk<'_>, folder: &Path) -> Result<()> {
    desk.host.logs(folder).iter().try_for_each(|path| layers::remove(path))
}

/// Describes the machine as the newest restore point has it.
pub(crate) fn describe_latest(desk: &Desk<'_>, name: &str) -> Result<()> {
    let record = desk.load(name)?.record;
    let points = desk.points(name)?;
    points.last().map_or(Ok(()), |point| describe(&record, &point.description, &point.disks))
}

/// A replica's machine being started again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartWork {
    kind: String,
    name: String,
    running: Option<Running>,
}

/// Starts the machine of a replica that serves, after it has ended: its guest turned it off, or its host was. One that
/// runs is left as it is.
///
/// # Errors
/// [`Code::State`] unless it serves; the host's.
pub fn start_again(desk: &Desk<'_>, name: &str) -> Result<()> {
    desk.ready_for(name, Op::Start)?;
    let work = StartWork { kind: StartWork::KIND.into(), name: name.into(), running: None };
    desk.carry_out(name, work, None).map(drop)
}

impl Work for StartWork {
    const OP: Op = Op::Start;
    const KIND: &'static str = "start";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::On).final_step("start", |work: &mut Self| {
            let record = desk.load(&work.name)?.record;
            work.running = Some(start(desk, &record.folder, &record.name)?);
            Ok(())
        })
    }

    fn settle(&self, record: &mut ReplicaRecord, _: &Went) {
        if let (Some(failover), Some(running)) = (&mut record.failover, &self.running) {
            failover.running = Some(running.clone());
        }
    }
}

/// A takeover being taken back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UndoWork {
    kind: String,
    name: String,
    epoch: u64,
    /// The host cannot be reached; its machine may still run.
    pub(crate) force: bool,
}

/// What taking a takeover back would lose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// Bytes that the machine has written since.
    pub bytes: u64,
    /// When it took over.
    pub since: Timestamp,
}

/// How much a takeover has written.
///
/// # Errors
/// A layer that cannot be read.
pub fn loss(cache: &Arc<BlockCache>, points: &[PointRecord], record: &ReplicaRecord) -> Result<Option<Loss>> {
    let Some(failover) = &record.failover else { return Ok(None) };
    let point = points.iter().find(|point| point.id == failover.point);
    let mut bytes = 0;
    for top in &failover.tops {
        let below = point.and_then(|point| point.disks.iter().find(|below| below.disk == top.disk));
        let chain = layers::open(&record.folder.join(&top.file), Format::Qcow2, cache)?;
        let said = below.map(|below| layers::said_above(&chain, &record.folder.join(&below.file))).transpose()?;
        bytes += said.flatten().map_or(0, |said| said.bytes());
    }
    Ok(Some(Loss { bytes, since: failover.since }))
}

/// Takes a takeover back: the machine is off, what it wrote is gone, replication goes on.
///
/// # Errors
/// [`Code::State`]; the machine cannot be turned off, and `force` was not given.
pub fn undo(desk: &Desk<'_>, name: &str, force: bool) -> Result<()> {
    let row = desk.ready_for(name, Op::Undo)?;
    if desk.points(name)?.is_empty() {
        let what = format!("making the takeover of {name} final has begun, and cannot be taken back");
        return Err(Fail::new(Code::State, what).help(format!("aquifer permanent {name}")));
    }
    let work = UndoWork { kind: UndoWork::KIND.into(), name: name.into(), epoch: row.record.epoch, force };
    desk.carry_out(name, work, None)?;
    let record = desk.load(name)?.record;
    keep::sweep(desk, &record, &[])
}

impl Work for UndoWork {
    const OP: Op = Op::Undo;
    const KIND: &'static str = "undo";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::On)
            .step(
                "off",
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    match power_off(desk, &work.name, &record.folder, Duration::ZERO) {
                        Err(fail) if work.force => {
                            (desk.warn)(
                                Code::WarnHost,
                                format!("the machine of {} may still run: {}", work.name, fail.what),
                            );
                            Ok(())
                        }
                        ended => ended.map(drop),
                    }
                },
                |_| Ok(()),
            )
            .final_step("describe", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                layers::remove(&desk.host.variables(&record.folder))?;
                if !work.force {
                    forget_logs(desk, &record.folder)?;
                }
                describe_latest(desk, &work.name)
            })
            .final_step("stamp", |work: &mut Self| desk.stamp_as(&work.name, work.epoch + 1))
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        if *went == Went::Done {
            record.state = State::Ready;
            record.epoch = self.epoch + 1;
            record.failover = None;
            record.needs_resync |= self.force;
        }
    }
}

/// A takeover being made final.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PermanentWork {
    kind: String,
    name: String,
    tops: Vec<Top>,
    bases: Vec<Top>,
    description: MachineDescription,
}

/// Makes a takeover final: its layers become one image, its points are gone, the machine goes on running.
///
/// # Errors
/// [`Code::State`]; what failed: called again, it goes on.
pub fn permanent(desk: &Desk<'_>, name: &str) -> Result<()> {
    let record = desk.ready_for(name, Op::Permanent)?.record;
    let Some(failover) = record.failover.clone() else {
        return Err(Fail::new(Code::Bug, "a takeover without a record"));
    };
    let mut bases = Vec::new();
    for top in &failover.tops {
        let files = layers::files(&record.folder.join(&top.file))?;
        let base = files.last().and_then(|path| path.file_name()).and_then(|name| name.to_str()).unwrap_or_default();
        bases.push(Top { file: format!("{}/{base}", top.disk), ..top.clone() });
    }
    let mut description = failover.description;
    if description == MachineDescription::default() {
        // Recorded before a takeover kept its machine.
        let points = desk.points(name)?;
        description = points.into_iter().find(|p| p.id == failover.point).map(|p| p.description).unwrap_or_default();
    }
    let kind = PermanentWork::KIND.into();
    let work = PermanentWork { kind, name: name.into(), tops: failover.tops, bases, description };
    desk.carry_out(name, work, None).map(drop)
}

impl Work for PermanentWork {
    const OP: Op = Op::Permanent;
    const KIND: &'static str = "permanent";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::On)
            .final_step("points", |work: &mut Self| desk.drop_points(&work.name))
            .final_step("merge", |work: &mut Self| work.merge(desk))
            .final_step("describe", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                describe(&record, &work.description, &work.bases)
            })
            .final_step("forget", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                for (top, base) in work.tops.iter().zip(&work.bases).filter(|(top, base)| top.file != base.file) {
                    let base = record.folder.join(&base.file);
                    let folder = record.folder.join(&top.disk);
                    let all = fs::read_dir(&folder).map_err(|e| Fail::io(folder.display(), "list", &e))?;
                    let all = all.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| *path != base);
                    let ours = trust::known(&record)?;
                    let mut rest = all.filter(|path| ours.contains(path) || keep::note_of(path).is_some());
                    rest.try_for_each(|path| layers::remove(&path))?;
                }
                let digests = record.metadata.join(record.lineage.to_string());
                if digests.exists() {
                    fs::remove_dir_all(&digests).map_err(|e| Fail::io(digests.display(), "remove", &e))?;
                }
                trust::forget(&record.folder)
            })
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        if *went == Went::Done {
            record.state = State::PermanentFailover;
            record.excluded = true;
            record.failover = None;
        }
    }
}

impl PermanentWork {
    fn merge(&self, desk: &Desk<'_>) -> Result<()> {
        let record = desk.load(&self.name)?.record;
        let running = desk.running(&record.folder);
        for (index, (top, base)) in self.tops.iter().zip(&self.bases).enumerate() {
            let (top, base, size) = (record.folder.join(&top.file), record.folder.join(&base.file), top.size);
            if top == base {
                continue;
            }
            let is_there = top.exists();
            if is_there {
                // Whatever else stood on the base is given up before the base is written to.
                let ours = layers::files(&top)?;
                for stranger in images::beside(&base)?.into_iter().filter(|path| !ours.contains(path)) {
                    layers::remove(&stranger)?;
                }
            }
            match &running {
                Some(running) => desk.host.merge(running, index, &base, size)?,
                None => {
                    if is_there {
                        images::merge_down(&top, &base)?;
                    }
                    let format = placed::format_of(&base).map_or(Format::Qcow2, images::format);
                    images::cut(&base, format, size, desk.cache)?;
                }
            }
        }
        Ok(())
    }
}

/// What a planned takeover did.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The takeover.
    pub failover: FailoverWork,
    /// The point that was made of production after it was off.
    pub last: PointRecord,
}

/// Takes over without a loss: the replica is brought up to date while production runs, production is turned off, the
/// rest is copied from its disks, and the replica starts.
///
/// # Errors
/// [`Code::State`]; what failed. Once production is off, it is started again where `restart` asks for that.
pub fn planned(desk: &Desk<'_>, spec: &ReplicaSpec, home: &Path, restart: bool, start_it: bool) -> Result<Planned> {
    desk.ready_for(&spec.name, Op::PlannedFailover)?;
    can_be_copied(home, desk.running(home).is_some())?;
    // What the backups have need not be copied while everybody waits.
    let known = desk.points(&spec.name)?;
    if !spec.repositories.is_empty() {
        replicate(desk, spec)?;
    }
    let placed = Placed::read(home)?;
    let was_on = power_off(desk, &spec.name, home, desk.grace)?;
    if desk.running(home).is_some() {
        return Err(Fail::new(Code::Guest, format!("the machine in {} is not off", home.display())));
    }
    let disks: Vec<HomeDisk> = placed.disks.iter().map(images::home_disk).collect();
    let points = desk.points(&spec.name)?;
    let description = points.last().map(|point| point.description.clone()).unwrap_or_default();
    let moved =
        can_be_copied(home, false).and_then(|()| replicate_images(desk, spec, disks, description)).and_then(|last| {
            tell_of_gone(desk, &spec.name, &known)?;
            let reason = Some(PLANNED.to_owned());
            Ok(Planned { failover: failover(desk, &spec.name, &PointRef::Latest(0), reason, start_it)?, last })
        });
    if moved.is_err() && was_on && restart {
        let name = placed.described.name.clone().unwrap_or_else(|| spec.machine.clone());
        if let Err(fail) = start(desk, home, &name) {
            (desk.warn)(Code::WarnHost, format!("production could not be started again: {}", fail.what));
        }
    }
    moved
}

/// Tells of disks that went with one of the points that were made since these were `known`.
fn tell_of_gone(desk: &Desk<'_>, name: &str, known: &[PointRecord]) -> Result<()> {
    let mut points = desk.points(name)?;
    points.retain(|point| known.iter().all(|before| before.id != point.id));
    for (point, disk) in points.iter().flat_map(|point| point.gone.iter().map(move |disk| (point, disk))) {
        let what = format!("disk {disk} of the point before is not there any more: {} has none", point.id);
        (desk.warn)(Code::WarnDiskGone, what);
    }
    Ok(())
}

/// Refuses production whose disks somebody else writes to: they stand still only while it is off. Its own machine is
/// turned off first, where it `runs`.
///
/// # Errors
/// [`Code::Busy`]; a machine that is not there.
pub fn can_be_copied(home: &Path, runs: bool) -> Result<()> {
    let placed = Placed::read(home)?;
    let disks = placed.disks.iter().filter(|_| !runs).map(images::home_disk);
    disks.into_iter().try_for_each(|disk| images::free(&disk, Against::Writers))
}

/// Whether a folder holds a machine.
pub fn is_placed(folder: &Path) -> bool {
    folder.join(placed::DESCRIPTION).is_file()
}
