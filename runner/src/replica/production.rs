//! A run that reads production: images of a machine that is off, or a running one's disks as they were at one moment.
//!
//! Invariants
//! - Whoever reads looks at production only when it is clear that a point will be made, and what an earlier run had
//!   begun is out of the way.
//! - Images that are written to meanwhile make no restore point.
//! - Content of two moments never becomes one point: a moment that is over is never gone on from.
//!
//! Not here: holding a running machine's disks still; how a disk is built ([`super::build`]).

use std::collections::BTreeSet;

use aquifer_formats::repo::record::MachineDescription;
use jiff::Timestamp;
use parking_lot::Mutex;
use uuid::Uuid;

use super::{
    desk::Desk,
    foresee, layers,
    model::{Carried, HomeDisk, Origin, PointRecord, ReplicaRecord, Top, VERSION},
    run::{Opened, Ran, ReplicaSpec, RunSource, RunWork, ended_now, finish_old, prepare, written},
    state::Op,
};
use crate::fail::Result;

/// Moments of running machines that this process holds.
static HELD: Mutex<BTreeSet<Uuid>> = Mutex::new(BTreeSet::new());

/// A running machine's disks are as they were, until this is dropped. What is served at the same place afterwards is
/// another moment, even if it looks alike.
#[derive(Debug)]
pub struct Moment(Uuid);

impl Moment {
    /// Begins now.
    pub fn begin() -> Self {
        let id = Uuid::now_v7();
        HELD.lock().insert(id);
        Self(id)
    }

    /// Its identity.
    pub fn id(&self) -> Uuid {
        self.0
    }

    /// Whether this process holds it still.
    pub fn is_held(id: Uuid) -> bool {
        HELD.lock().contains(&id)
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        HELD.lock().remove(&self.0);
    }
}

/// Production, ready to be read.
#[derive(Clone, Debug)]
pub struct Look {
    /// What is read.
    pub source: RunSource,
    /// The disks, with their sizes in bytes.
    pub disks: Vec<(String, u64)>,
    /// The machine.
    pub description: MachineDescription,
    /// The moment that is read.
    pub taken: Timestamp,
}

impl Look {
    /// Images of a machine that is off.
    ///
    /// # Errors
    /// One that cannot be read.
    pub fn at_images(desk: &Desk<'_>, disks: Vec<HomeDisk>, description: MachineDescription) -> Result<Self> {
        // Looked at before anything is read: whatever is written from now on is seen.
        let as_of = disks.iter().map(|disk| written(&disk.path)).collect::<Result<Vec<_>>>()?;
        let size = |disk: &HomeDisk| Ok((disk.disk.clone(), layers::open(&disk.path, disk.format, desk.cache)?.size()));
        let sizes = disks.iter().map(size).collect::<Result<Vec<_>>>()?;
        Ok(Self { source: RunSource::Images { disks, as_of }, disks: sizes, description, taken: Timestamp::now() })
    }

    /// The run that makes a point of it.
    pub(super) fn work(&self, spec: &ReplicaSpec, origin: Origin, number: u64) -> RunWork {
        let wanted = self.disks.iter().filter(|(disk, _)| !spec.rules.leave_out(disk));
        let top = |(disk, size): &(String, u64)| Top {
            disk: disk.clone(),
            file: ReplicaRecord::layer_name(disk, number),
            size: *size,
        };
        let point = PointRecord {
            version: VERSION,
            id: Uuid::now_v7(),
            number,
            taken: self.taken,
            made: Timestamp::now(),
            origin,
            source: None,
            disks: wanted.map(top).collect(),
            description: self.description.clone(),
            carried: Carried::default(),
            gone: Vec::new(),
        };
        RunWork::new(spec, point, self.source.clone())
    }
}

/// Makes a restore point of production as `look` finds it.
///
/// # Errors
/// What failed: what was copied stays and is gone on from, if production has not changed since.
pub fn replicate_production(
    desk: &Desk<'_>,
    spec: &ReplicaSpec,
    origin: Origin,
    look: impl FnOnce() -> Result<Look>,
) -> Result<Ran> {
    let known = desk.points(&spec.name)?;
    let row = prepare(desk, spec)?;
    if row.record.state.holds_replication() || row.record.excluded {
        return Ok(Ran::OnHold(row.record.state));
    }
    let mut made = ended_now(desk, &spec.name, &known)?;
    made.extend(finish_old(desk, row)?);
    let row = desk.ready_for(&spec.name, Op::Replicate)?;
    let work = look()?.work(spec, origin, row.record.next_layer);
    made.push(desk.carry_out(&spec.name, work, None)?.point);
    Ok(Ran::Made(made))
}

/// Makes a restore point of a machine's images, which nobody writes to meanwhile.
///
/// # Errors
/// As [`replicate_production`].
pub fn replicate_images(
    desk: &Desk<'_>,
    spec: &ReplicaSpec,
    disks: Vec<HomeDisk>,
    description: MachineDescription,
) -> Result<PointRecord> {
    prepare(desk, spec)?;
    let row = desk.ready_for(&spec.name, Op::Replicate)?;
    let look = Look::at_images(desk, disks, description)?;
    let work = look.work(spec, Origin::Planned, row.record.next_layer);
    Ok(desk.carry_out(&spec.name, work, None)?.point)
}

/// Bytes that a run would read of production, at most. Changes nothing.
///
/// # Errors
/// As [`replicate_production`].
pub fn estimate(desk: &Desk<'_>, spec: &ReplicaSpec, record: &ReplicaRecord, look: &Look) -> Result<u64> {
    let work = look.work(spec, Origin::Job, record.next_layer);
    foresee::tell_of_gone_disks(desk, &work, record)?;
    let opened = Opened::of(desk, &work.source)?;
    work.builds(desk, record, &opened)?.disks.iter().map(super::build::DiskBuild::estimate).sum()
}
