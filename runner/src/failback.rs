//! The way home: production gets what the replica has, in two passes, and serves again; until that is made final it can
//! be taken back.
//!
//! ```text
//! 1  production off            5  the replica's state becomes a restore point
//! 2  difference                6  second pass: only what was written since the first
//! 3  first pass, replica on    7  the sides are changed
//! 4  replica off               8  production on, if wanted
//! ```
//!
//! Invariants
//! - What is sent lands in a working layer; production's own image changes only when a pass is whole.
//! - Before the first pass the replica's machine gets a new layer, so that what is compared stands still and what is
//!   written meanwhile is known without a second look at the disk.
//! - From step 4 until the way home is made final or taken back the replica stays off.
//!
//! Not here: how a disk is compared and sent ([`pass`]).

pub mod changed;
pub mod drift;
pub mod estimate;
mod home;
pub mod pass;

pub use changed::{Changed, Mark};
pub use drift::{Drift, drift};
pub use estimate::{Estimate, estimate};

use std::{sync::Arc, time::Duration};

use aquifer_formats::{probe::Format, repo::record::MachineDescription};
use aquifer_vdisk::{Chain, Delta};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use self::home::{check_home, is_no_replica, made_are_free, stands_still};
use self::{
    home::{describe_home, has_room, name_made, pairs, remove_made, still_free, write_home},
    pass::{Pass, working_of},
};
use crate::{
    context::quoted,
    fail::{Code, Fail, Result},
    failover::{describe_latest, forget_logs, power_off, put_layers, start},
    host::{Running, in_use::Against},
    replica::{
        build::discard,
        desk::{Desk, Went, Work},
        digests::Digests,
        images, keep, layers,
        model::{
            Carried, FailbackRecord, FailoverRecord, Home, HomeKind, Origin, PointRecord, ReplicaRecord, Switch, Top,
            VERSION,
        },
        run::{describe, written},
        state::{Op, State},
        trust::{self, Holds},
    },
    step::{AfterCrash, Plan},
};

/// The first pass under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackWork {
    kind: String,
    name: String,
    home: Home,
    switch: Switch,
    changed: Changed,
    description: MachineDescription,
    number: u64,
    /// What the machine wrote to until now; it stands still from the second step on.
    sent: Vec<Top>,
    tops: Vec<Top>,
    /// How many disks have their new layer.
    layered: usize,
    since: Timestamp,
    carried: Carried,
    /// Milliseconds that comparing and sending took.
    #[serde(default)]
    took_ms: Option<u64>,
    /// As in the record.
    #[serde(default)]
    written: Vec<i64>,
}

/// Sends home what differs; the replica goes on serving.
///
/// # Errors
/// [`Code::State`]; a target that does not fit; what failed: production is as it was.
pub fn failback(desk: &Desk<'_>, name: &str, home: Home, switch: Switch, changed: Changed) -> Result<Carried> {
    let record = desk.ready_for(name, Op::Failback)?.record;
    let failover = record.failover.clone().ok_or_else(|| Fail::new(Code::Bug, "a takeover without a record"))?;
    check_home(&record, &home, desk.running(&home.folder).is_some(), desk.cache)?;
    let points = desk.points(name)?;
    let point = points.iter().find(|point| point.id == failover.point);
    let number = record.next_layer;
    let tops =
        failover.tops.iter().map(|top| Top { file: ReplicaRecord::layer_name(&top.disk, number), ..top.clone() });
    let work = BackWork {
        kind: BackWork::KIND.into(),
        name: name.into(),
        description: point.map(|point| point.description.clone()).unwrap_or_default(),
        number,
        tops: tops.collect(),
        sent: failover.tops,
        home,
        switch,
        changed,
        layered: 0,
        written: Vec::new(),
        since: Timestamp::now(),
        carried: Carried::default(),
        took_ms: None,
    };
    Ok(desk.carry_out(name, work, None)?.carried)
}

impl BackWork {
    /// Lets the machine write to new layers. Done again it goes on.
    fn freeze(&mut self, desk: &Desk<'_>) -> Result<()> {
        let record = desk.load(&self.name)?.record;
        put_layers(desk, &record, &self.sent, &self.tops)?;
        let running = desk.running(&record.folder);
        for (index, top) in self.tops.iter().enumerate() {
            if let Some(running) = &running {
                desk.host.layer(running, index, &record.folder.join(&top.file))?;
            }
            self.layered = self.layered.max(index + 1);
        }
        // Nobody writes to them any more.
        self.sent.iter().try_for_each(|sent| trust::freeze(&record, &sent.file))?;
        describe(&record, &self.description, &self.tops)
    }

    fn compare(&mut self, desk: &Desk<'_>) -> Result<()> {
        let record = desk.load(&self.name)?.record;
        let points = desk.points(&self.name)?;
        let failover = record.failover.clone().ok_or_else(|| Fail::new(Code::Bug, "a takeover without a record"))?;
        let point = points.iter().find(|point| point.id == failover.point);
        self.carried = Carried::default();
        if self.home.kind == HomeKind::Original {
            let there = self.home.disks.iter().filter(|disk| !self.home.makes(&disk.disk));
            self.changed.read(&there.cloned().collect::<Vec<_>>())?;
        }
        // Neither digests nor notes of changes say what layers hold that were changed from outside.
        let touched = point.map_or_else(|| Ok(Vec::new()), |point| trust::look(&record, point))?;
        if let Some(layer) = touched.first() {
            let what = format!("the layer {} of {} was changed from outside", layer.file, self.name);
            (desk.warn)(Code::WarnResync, what);
            self.changed = Changed::default();
        }
        // Whoever waited for the guest looks again, and once more behind all that takes long.
        still_free(&self.home, &self.sent)?;
        let began = std::time::Instant::now();
        for (top, disk) in pairs(&self.home, &self.sent) {
            let from = layers::open(&record.folder.join(&top.file), Format::Qcow2, desk.cache)?;
            if self.home.makes(&disk.disk) {
                let working = working_of(&disk.path, 1);
                let pass =
                    Pass { from, have: None, backing: None, digests: None, ranges: None, working, pace: desk.pace };
                self.carried.add(pass.run()?);
                continue;
            }
            let ranges = match self.changed.disks.get(&disk.disk) {
                Some(changed) => {
                    changed_since(desk, &record, &points, &self.changed, top, &from)?.map(|on| on.union(changed))
                }
                None => None,
            };
            let digests = match (&ranges, point) {
                (None, Some(_)) if !touched.is_empty() => {
                    let disk = aquifer_vdisk::Disk::read_only(&top.disk, from.clone());
                    Some(Digests::of(&disk, record.digest_block, desk.pace)?)
                }
                (None, Some(point)) => Some(digests_of(desk, &record, point, top, &from)?),
                _ => None,
            };
            let noted = ranges.is_some();
            let pass = Pass {
                from: from.clone(),
                have: Some(layers::open(&disk.path, disk.format, desk.cache)?),
                backing: Some(layers::backing(&disk.path, disk.format)?),
                digests: digests.as_ref(),
                ranges,
                working: working_of(&disk.path, 1),
                pace: desk.pace,
            };
            self.carried.add(pass.run()?);
            if noted && self.changed.verify {
                nothing_else(desk, disk, from, record.digest_block)?;
            }
        }
        self.took_ms = u64::try_from(began.elapsed().as_millis()).ok();
        has_room(desk, &self.home, &self.sent, 1)?;
        still_free(&self.home, &self.sent)
    }

    fn forget_compared(&self) -> Result<()> {
        pairs(&self.home, &self.sent).try_for_each(|(_, disk)| discard(&working_of(&disk.path, 1)))
    }
}

/// Proves that production's notes were all there was: with the first pass on it, its disk is the replica's.
fn nothing_else(desk: &Desk<'_>, disk: &crate::replica::model::HomeDisk, from: Arc<Chain>, block: u64) -> Result<()> {
    let working = working_of(&disk.path, 1);
    let home = if working.exists() {
        layers::open(&working, Format::Qcow2, desk.cache)?
    } else {
        layers::open(&disk.path, disk.format, desk.cache)?
    };
    let sums = |chain| Digests::of(&aquifer_vdisk::Disk::read_only(&disk.disk, chain), block, desk.pace);
    let (there, here) = (sums(home)?, sums(from.clone())?);
    let blocks = from.size().div_ceil(block);
    let extra = (0..blocks).filter(|index| there.sum(*index) != here.sum(*index)).count();
    if extra == 0 {
        return Ok(());
    }
    let what = format!("{extra} blocks of {} differ beside those that production noted as changed", disk.disk);
    Err(Fail::new(Code::Failed, what).at(disk.path.display()).help_again("--full"))
}

/// Where the replica's disk differs from what it was at the point that production's map begins with: the layers of both
/// above what they have in common.
fn changed_since(
    desk: &Desk<'_>,
    record: &ReplicaRecord,
    points: &[PointRecord],
    changed: &Changed,
    top: &Top,
    from: &Chain,
) -> Result<Option<Delta>> {
    let since = points.iter().find(|point| Some(point.id) == changed.since);
    let Some(since) = since.and_then(|point| point.disks.iter().find(|disk| disk.disk == top.disk)) else {
        return Ok(None);
    };
    let (theirs, ours) = (record.folder.join(&since.file), record.folder.join(&top.file));
    let ours = layers::files(&ours)?;
    let Some(common) = layers::files(&theirs)?.into_iter().find(|file| ours.contains(file)) else { return Ok(None) };
    let then = layers::open(&theirs, Format::Qcow2, desk.cache)?;
    let (a, b) = (layers::said_above(&then, &common)?, layers::said_above(from, &common)?);
    Ok(a.zip(b).map(|(a, b)| a.union(&b)))
}

/// Digests of a replica's disk with what its machine wrote.
fn digests_of(
    desk: &Desk<'_>,
    record: &ReplicaRecord,
    point: &PointRecord,
    top: &Top,
    chain: &Arc<Chain>,
) -> Result<Digests> {
    let disk = aquifer_vdisk::Disk::read_only(&top.disk, chain.clone());
    let below = point.disks.iter().find(|below| below.disk == top.disk);
    if let Some(below) = below
        && let Some(mut digests) = Digests::load(&keep::digest_file(record, point, &top.disk), below.size)?
        && let Some(written) = layers::said_above(chain, &record.folder.join(&below.file))?
    {
        digests.resize(chain.size());
        let edge = below.size.min(chain.size()).saturating_sub(1);
        let mut written = written;
        if below.size != chain.size() {
            written.insert(edge..chain.size());
        }
        digests.refresh(&disk, &written)?;
        return Ok(digests);
    }
    Digests::of(&disk, record.digest_block, desk.pace)
}

impl Work for BackWork {
    const OP: Op = Op::Failback;
    const KIND: &'static str = "failback";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::Back)
            .step(
                "home_off",
                |work: &mut Self| {
                    power_off(desk, &work.name, &work.home.folder, desk.grace)?;
                    let there = pairs(&work.home, &work.sent).filter(|(_, disk)| !work.home.makes(&disk.disk));
                    there.map(|(_, disk)| disk).try_for_each(|disk| images::free(disk, Against::Anybody))
                },
                |_| Ok(()),
            )
            // The machine may be on its new layers already, so the way back leads over them.
            .step("freeze", |work: &mut Self| work.freeze(desk), |work: &mut Self| work.freeze(desk))
            .step("first_pass", |work: &mut Self| work.compare(desk), |work: &mut Self| work.forget_compared())
            .final_step("write_home", |work: &mut Self| {
                name_made(&mut work.home, &work.sent)?;
                if work.home.kind == HomeKind::New {
                    return describe_home(&work.home, &work.description, &work.sent);
                }
                write_home(desk, &work.home, &work.sent, 1)
            })
            .final_step("look", |work: &mut Self| {
                work.written = work.home.disks.iter().map(|disk| written(&disk.path)).collect::<Result<_>>()?;
                Ok(())
            })
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        if self.layered > 0 {
            record.next_layer = record.next_layer.max(self.number + 1);
            if let Some(failover) = &mut record.failover {
                for (now, top) in failover.tops.iter_mut().zip(&self.tops).take(self.layered) {
                    now.clone_from(top);
                }
            }
        }
        if *went == Went::Done {
            record.state = State::ReadyToSwitch;
            record.failback = Some(FailbackRecord {
                home: self.home.clone(),
                since: self.since,
                switch: self.switch,
                sent: self.sent.clone(),
                written: self.written.clone(),
                first: self.carried,
                first_ms: self.took_ms,
                second: None,
                protective: None,
                running: None,
                off_since: None,
                on_since: None,
            });
        }
    }
}

/// The second pass under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwitchWork {
    kind: String,
    name: String,
    home: Home,
    sent: Vec<Top>,
    tops: Vec<Top>,
    base: Uuid,
    epoch: u64,
    protective: PointRecord,
    was_on: bool,
    pub(crate) power_on: bool,
    grace_s: u64,
    carried: Carried,
    replica_running: Option<Running>,
    running: Option<Running>,
    off_since: Option<Timestamp>,
    on_since: Option<Timestamp>,
}

/// What a change of sides did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Switched {
    /// What the second pass moved.
    pub carried: Carried,
    /// Milliseconds between the replica's end and production's start, where it was started.
    pub downtime_ms: Option<i64>,
}

/// Changes the sides: the replica is turned off, what it wrote since the first pass goes home, production is started if
/// that is wanted.
///
/// # Errors
/// [`Code::State`]; what failed: the replica serves again.
pub fn switchover(desk: &Desk<'_>, name: &str, power_on: bool, grace: Duration) -> Result<Switched> {
    let record = desk.ready_for(name, Op::Switchover)?.record;
    let missing = || Fail::new(Code::Bug, "a way home without a record");
    let failover = record.failover.clone().ok_or_else(missing)?;
    let failback = record.failback.clone().ok_or_else(missing)?;
    stands_still(&record, desk.running(&failback.home.folder).is_some())?;
    let points = desk.points(name)?;
    let base = points.iter().find(|point| point.id == failover.point);
    let number = record.next_layer.max(points.last().map_or(0, |last| last.number + 1));
    let protective = PointRecord {
        version: VERSION,
        id: Uuid::now_v7(),
        number,
        taken: Timestamp::now(),
        made: Timestamp::now(),
        origin: Origin::PreFailback,
        source: None,
        disks: failover.tops.clone(),
        description: base.map(|point| point.description.clone()).unwrap_or_default(),
        carried: Carried::default(),
        gone: Vec::new(),
    };
    let work = SwitchWork {
        kind: SwitchWork::KIND.into(),
        name: name.into(),
        home: failback.home,
        sent: failback.sent,
        tops: failover.tops,
        base: failover.point,
        epoch: record.epoch,
        protective,
        was_on: desk.running(&record.folder).is_some(),
        power_on,
        grace_s: grace.as_secs(),
        carried: Carried::default(),
        replica_running: None,
        running: None,
        off_since: None,
        on_since: None,
    };
    let work = desk.carry_out(name, work, None)?;
    let downtime = work.off_since.zip(work.on_since).map(|(off, on)| on.as_millisecond() - off.as_millisecond());
    Ok(Switched { carried: work.carried, downtime_ms: downtime.filter(|_| work.was_on) })
}

impl SwitchWork {
    /// Makes the replica's present state a restore point, with its digests.
    fn protect(&mut self, desk: &Desk<'_>) -> Result<()> {
        let record = desk.load(&self.name)?.record;
        let points = desk.points(&self.name)?;
        let base = points.iter().find(|point| point.id == self.base);
        for top in &self.tops {
            let chain = layers::open(&record.folder.join(&top.file), Format::Qcow2, desk.cache)?;
            let digests = match base {
                Some(base) => digests_of(desk, &record, base, top, &chain)?,
                None => Digests::of(&aquifer_vdisk::Disk::read_only(&top.disk, chain), record.digest_block, desk.pace)?,
            };
            digests.store(&keep::digest_file(&record, &self.protective, &top.disk))?;
        }
        self.protective.taken = Timestamp::now();
        Ok(())
    }

    fn second_pass(&mut self, desk: &Desk<'_>) -> Result<()> {
        let record = desk.load(&self.name)?.record;
        self.carried = Carried::default();
        for (_, disk) in pairs(&self.home, &self.tops) {
            images::free(disk, Against::Anybody)?;
        }
        // An earlier try may have written to some of production's disks: they are compared as they are.
        let is_known = record.failback.as_ref().is_some_and(|failback| failback.is_as_sent());
        for ((top, disk), sent) in pairs(&self.home, &self.tops).zip(&self.sent) {
            let before = record.folder.join(&sent.file);
            let from = layers::open(&record.folder.join(&top.file), Format::Qcow2, desk.cache)?;
            let (ranges, have) = if is_known {
                (layers::said_above(&from, &before)?, layers::open(&before, Format::Qcow2, desk.cache)?)
            } else {
                (None, layers::open(&disk.path, disk.format, desk.cache)?)
            };
            let pass = Pass {
                ranges,
                from,
                have: Some(have),
                backing: Some(layers::backing(&disk.path, disk.format)?),
                digests: None,
                working: working_of(&disk.path, 2),
                pace: desk.pace,
            };
            self.carried.add(pass.run()?);
        }
        has_room(desk, &self.home, &self.tops, 2)
    }
}

impl Work for SwitchWork {
    const OP: Op = Op::Switchover;
    const KIND: &'static str = "switchover";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::Back)
            .step(
                "replica_off",
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    work.off_since = Some(Timestamp::now());
                    power_off(desk, &work.name, &record.folder, Duration::from_secs(work.grace_s)).map(drop)
                },
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    if work.was_on {
                        work.replica_running = Some(start(desk, &record.folder, &record.name)?);
                    }
                    Ok(())
                },
            )
            .step(
                "protect",
                |work: &mut Self| work.protect(desk),
                // It is no restore point before the replica stays off for good: until then its machine may go on.
                |_| Ok(()),
            )
            .step(
                "second_pass",
                |work: &mut Self| work.second_pass(desk),
                |work: &mut Self| {
                    pairs(&work.home, &work.tops).try_for_each(|(_, disk)| discard(&working_of(&disk.path, 2)))
                },
            )
            .final_step("write_home", |work: &mut Self| write_home(desk, &work.home, &work.tops, 2))
            .final_step("configure", |work: &mut Self| drift::put(&work.home, |configured| &configured.after))
            // The point is published behind all that may fail: where the sides do not change, the machine goes on in
            // its layers.
            .final_step("stamp", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                let holds = Holds::Point(work.protective.id);
                for top in &work.protective.disks {
                    trust::enter(&record, &top.file, &record.folder.join(&top.file), holds)?;
                }
                desk.stamp(&record.folder, record.lineage, work.epoch + 1)?;
                desk.put_point(&work.name, &work.protective)
            })
            .final_step("home_on", |work: &mut Self| {
                if work.power_on {
                    match start(desk, &work.home.folder, &work.home.machine) {
                        Ok(running) => (work.running, work.on_since) = (Some(running), Some(Timestamp::now())),
                        Err(fail) => (desk.warn)(Code::WarnHost, format!("production did not start: {}", fail.what)),
                    }
                }
                Ok(())
            })
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        if *went != Went::Done {
            if let (Some(failover), Some(running)) = (&mut record.failover, &self.replica_running) {
                failover.running = Some(running.clone());
            }
            if let (Some(failback), Went::Stuck(_)) = (&mut record.failback, went) {
                // Some of it may be home.
                failback.written.clear();
            }
            // The point that was made, if it stands, keeps its number.
            record.next_layer = record.next_layer.max(self.protective.number + 1);
            return;
        }
        record.state = State::Failback;
        record.epoch = self.epoch + 1;
        record.next_layer = record.next_layer.max(self.protective.number + 1);
        if let Some(failover) = &mut record.failover {
            failover.running = None;
        }
        if let Some(failback) = &mut record.failback {
            failback.second = Some(self.carried);
            failback.protective = Some(self.protective.id);
            failback.running.clone_from(&self.running);
            (failback.off_since, failback.on_since) = (self.off_since, self.on_since);
        }
    }
}

/// A way home being made final.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommitWork {
    kind: String,
    name: String,
    epoch: u64,
}

/// Makes the way home final: the replica is a replica again, its last state a restore point that the next run begins with.
///
/// # Errors
/// [`Code::State`], also while production is off and `force` is not given.
pub fn commit(desk: &Desk<'_>, name: &str, force: bool) -> Result<()> {
    let record = desk.ready_for(name, Op::Commit)?.record;
    if !force && let Some(failback) = &record.failback {
        is_tried(&failback.home, desk.running(&failback.home.folder).is_some())?;
    }
    let work = CommitWork { kind: CommitWork::KIND.into(), name: name.into(), epoch: record.epoch };
    desk.carry_out(name, work, None)?;
    let record = desk.load(name)?.record;
    keep::sweep(desk, &record, &[])
}

/// Refuses to make final what came home while nobody has tried it.
///
/// # Errors
/// [`Code::State`] unless its machine `runs`.
pub fn is_tried(home: &Home, runs: bool) -> Result<()> {
    if runs {
        return Ok(());
    }
    let what = format!("{} is off: what came home was not tried yet", home.machine);
    Err(Fail::new(Code::State, what).at(home.folder.display()).help_again("--force"))
}

impl Work for CommitWork {
    const OP: Op = Op::Commit;
    const KIND: &'static str = "commit";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::On)
            .final_step("stamp", |work: &mut Self| desk.stamp_as(&work.name, work.epoch + 1))
            .final_step("describe", |work: &mut Self| {
                // What its firmware remembers is the restore point's from now on, not the takeover's.
                let record = desk.load(&work.name)?.record;
                layers::remove(&desk.host.variables(&record.folder))?;
                forget_logs(desk, &record.folder)?;
                describe_latest(desk, &work.name)
            })
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        if *went == Went::Done {
            record.state = State::Ready;
            record.epoch = self.epoch + 1;
            (record.failover, record.failback) = (None, None);
        }
    }
}

/// A way home being taken back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReturnWork {
    kind: String,
    name: String,
    home: Home,
    /// The sides were changed: production is off again, and the replica on.
    changed: bool,
    pub(crate) force: bool,
    epoch: u64,
    number: u64,
    point: Option<PointRecord>,
    tops: Vec<Top>,
    running: Option<Running>,
}

/// Takes the way home back: the replica serves as before.
///
/// # Errors
/// [`Code::State`]; what failed: called again, it goes on.
pub fn give_back(desk: &Desk<'_>, name: &str, force: bool) -> Result<()> {
    let record = desk.ready_for(name, Op::Undo)?.record;
    let failback = record.failback.clone().ok_or_else(|| Fail::new(Code::Bug, "a way home without a record"))?;
    if !force {
        made_are_free(&failback.home, desk.running(&failback.home.folder).is_some())?;
    }
    let points = desk.points(name)?;
    let point = points.into_iter().find(|point| Some(point.id) == failback.protective);
    let number = record.next_layer;
    let tops = point.iter().flat_map(|point| &point.disks);
    let tops = tops.map(|top| Top { file: ReplicaRecord::layer_name(&top.disk, number), ..top.clone() }).collect();
    let work = ReturnWork {
        kind: ReturnWork::KIND.into(),
        name: name.into(),
        home: failback.home,
        changed: record.state == State::Failback,
        force,
        epoch: record.epoch,
        number,
        point,
        tops,
        running: None,
    };
    desk.carry_out(name, work, None).map(drop)
}

impl Work for ReturnWork {
    const OP: Op = Op::Undo;
    const KIND: &'static str = "give_back";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::On)
            .final_step("home_off", |work: &mut Self| {
                if !work.changed {
                    return Ok(());
                }
                match power_off(desk, &work.name, &work.home.folder, Duration::ZERO) {
                    Err(fail) if work.force => {
                        (desk.warn)(Code::WarnHost, format!("production may still run: {}", fail.what));
                        Ok(())
                    }
                    ended => ended.map(drop),
                }
            })
            .final_step("configure", |work: &mut Self| {
                if work.changed { drift::put(&work.home, |configured| &configured.before) } else { Ok(()) }
            })
            .final_step("layer", |work: &mut Self| {
                // Left by a change of sides that got stuck.
                for disk in &work.home.disks {
                    [1, 2].into_iter().try_for_each(|pass| discard(&working_of(&disk.path, pass)))?;
                    // Nothing names it any more: production is described as before.
                    if work.home.made.contains(&disk.disk) {
                        remove_made(desk, &work.home, disk)?;
                    }
                }
                let record = desk.load(&work.name)?.record;
                let Some(point) = work.point.as_ref().filter(|_| work.changed) else { return Ok(()) };
                put_layers(desk, &record, &point.disks, &work.tops)?;
                describe(&record, &point.description, &work.tops)?;
                desk.stamp(&record.folder, record.lineage, work.epoch + 1)
            })
            .final_step("start", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                let was_on = record.failover.as_ref().is_some_and(|failover| failover.running.is_some());
                if work.changed {
                    work.running = Some(start(desk, &record.folder, &record.name)?);
                } else if was_on && desk.running(&record.folder).is_none() {
                    // By a change of sides that got stuck, or by its guest.
                    let again = format!("aquifer replicas {} --start", quoted(&work.name));
                    (desk.warn)(Code::WarnHost, format!("{} is off; {again} starts it again", work.name));
                }
                Ok(())
            })
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        if *went != Went::Done {
            // The stamp may be the new one already, and it is ours.
            return;
        }
        record.state = State::Failover;
        record.failback = None;
        if let (true, Some(point)) = (self.changed, &self.point) {
            record.epoch = self.epoch + 1;
            record.next_layer = record.next_layer.max(self.number + 1);
            record.failover = Some(FailoverRecord {
                point: point.id,
                since: Timestamp::now(),
                reason: Some("the way home was taken back".into()),
                tops: self.tops.clone(),
                description: point.description.clone(),
                running: self.running.clone(),
            });
        }
    }
}
