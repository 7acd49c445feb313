//! The steps of a run: the layers of the new point, then the point itself, then what is tidied up behind it.
//!
//! Invariants
//! - The point is listed by the note that ends its step, and those it replaces leave the list with the same note: only
//!   after that their files go.
//! - Who has lost the work, or the replica, leaves the files alone.
//!
//! Not here: what is read ([`super::opened`]), how a layer is written ([`crate::replica::build`]).

use aquifer_formats::{probe::Format, repo::record::MachineDescription};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{
    ReplicaSpec, RunOptions,
    opened::{Opened, RunSource, untouched},
};
use crate::{
    catalogue::Change,
    fail::{Code, Fail, Result},
    host::placed,
    replica::{
        build::{self, DiskBuild, Moved},
        desk::{Desk, Warn, Went, Work, point_id},
        digests::Digests,
        keep, layers,
        model::{Carried, PointRecord, ReplicaRecord, Top},
        state::{Op, State},
        trust::{self, Holds, Touched},
    },
    step::{AfterCrash, Plan},
};

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

/// The disks of a run, with what they are built on.
pub(in crate::replica) struct Builds {
    /// In the order of the point's disks.
    pub(in crate::replica) disks: Vec<DiskBuild>,
    /// Layers of the newest point that were changed from outside.
    touched: Vec<Touched>,
    /// What each disk is built on, and what that looked like.
    prints: Vec<(Top, String)>,
}

impl RunWork {
    /// A run that has not begun.
    pub(in crate::replica) fn new(spec: &ReplicaSpec, point: PointRecord, source: RunSource) -> Self {
        let kind = Self::KIND.into();
        Self { kind, name: spec.name.clone(), point, source, options: spec.options, given_up: 0 }
    }

    pub(in crate::replica) fn builds(
        &self,
        desk: &Desk<'_>,
        record: &ReplicaRecord,
        opened: &Opened,
    ) -> Result<Builds> {
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

    /// The replica is being worked on.
    fn processing(&self, desk: &Desk<'_>) -> Result<Vec<Change>> {
        let mut row = desk.load(&self.name)?;
        if row.record.state == State::Processing {
            return Ok(Vec::new());
        }
        row.record.state = State::Processing;
        Ok(vec![desk.stored(row)?])
    }

    /// Disks that the point before has, that this one has not, and that no rule leaves out.
    pub(in crate::replica) fn gone(&self, desk: &Desk<'_>, record: &ReplicaRecord) -> Result<Vec<String>> {
        let mut points = desk.points(&self.name)?;
        points.retain(|point| point.number < self.point.number);
        let before = points.last().map(|point| point.disks.as_slice()).unwrap_or_default();
        let is_here = |top: &&Top| self.point.disks.iter().any(|here| here.disk == top.disk);
        let gone = before.iter().filter(|top| !is_here(top) && !record.rules.leave_out(&top.disk));
        Ok(gone.map(|top| top.disk.clone()).collect())
    }

    /// The points that are one too many with the new one.
    fn surplus(&self, desk: &Desk<'_>) -> Result<Vec<u64>> {
        let mut points = desk.points(&self.name)?;
        points.retain(|point| point.number != self.point.number);
        points.push(self.point.clone());
        Ok(keep::surplus(&points, self.options.keep).iter().map(|point| point.number).collect())
    }

    /// The new point is known, and those that it replaces are not: their files go after that.
    fn listed(&self, desk: &Desk<'_>) -> Result<Vec<Change>> {
        let gone = |number: u64| Change::NoPoint(self.name.clone(), point_id(number));
        let gone = self.surplus(desk)?.into_iter().map(gone);
        Ok(std::iter::once(desk.known(&self.name, &self.point)?).chain(gone).collect())
    }

    /// Takes back whatever was written.
    pub(in crate::replica) fn discard(&self, record: &ReplicaRecord) -> Result<()> {
        self.point.disks.iter().try_for_each(|top| {
            let path = record.folder.join(&top.file);
            build::forget(&path)?;
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
                build::discard(&build.path)?;
                return Err(fail);
            }
            carried.add(built.carried);
        }
        trust::accept(&record, &touched, self.point.number)?;
        if self.source.is_production() {
            carried.bytes_read_production = carried.bytes_read;
        }
        self.point.carried = carried;
        self.point.gone = self.gone(desk, &record)?;
        self.point.made = Timestamp::now();
        Ok(())
    }
}

fn resync(warn: Warn<'_>, name: &str, disk: &str) {
    warn(Code::WarnResync, format!("the digests of {name}'s disk {disk} are made anew from the replica's own layers"));
}

fn verify(desk: &Desk<'_>, build: &DiskBuild, digests: &Digests) -> Result<()> {
    let disk = layers::disk(&build.path, desk.cache)?;
    if Digests::of(&disk, digests.block(), desk.pace)? == *digests {
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
                    let record = desk.load(&work.name)?.record;
                    if record.state == State::Absent {
                        desk.stamp(&record.folder, record.lineage, record.epoch)?;
                    }
                    Ok(())
                },
                |_| Ok(()),
            )
            .with(|work| work.processing(desk))
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
            .final_step("point", |work: &mut Self| {
                work.given_up += work.surplus(desk)?.len() as u64;
                Ok(())
            })
            .with(|work| work.listed(desk))
            // Both do no harm when done twice, so they share a note.
            .final_step("tidy", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                describe(&record, &work.point.description, &work.point.disks)?;
                keep::tidy(desk, &record, work.options.squash_at)
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
