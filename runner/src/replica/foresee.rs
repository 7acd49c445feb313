//! What a run would do, without doing it.
//!
//! Invariants
//! - Nothing is written, not even what an earlier run has left is touched.
//! - What a run would be refused for, looking is refused for.

use std::path::PathBuf;

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    build::DiskBuild,
    desk::Desk,
    model::{Origin, ReplicaRecord},
    run::{Opened, ReplicaSpec, RunWork, choose, fresh, work_of},
    state::State,
};
use crate::fail::{Code, Result};

/// What a run would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Foreseen {
    /// Nothing: the replica is in use, or given up.
    OnHold(State),
    /// Nothing: there is no newer point.
    NoNewPoint,
    /// It would make a restore point of this one first.
    Point {
        /// The repository.
        repository: PathBuf,
        /// Its point.
        point: Uuid,
        /// When that was made.
        taken: Timestamp,
        /// Bytes it would read, at most.
        bytes: u64,
    },
}

/// The replica as it is recorded, or as it would be.
///
/// # Errors
/// The catalogue's; a folder that holds something else.
pub fn record(desk: &Desk<'_>, spec: &ReplicaSpec) -> Result<ReplicaRecord> {
    match desk.catalogue.replica::<ReplicaRecord>(&spec.name)? {
        Some(row) if row.record.state != State::Removed || row.record.excluded => row.record.check(),
        _ => {
            super::run::refuse_strangers(&spec.folder)?;
            Ok(fresh(spec, spec.folder.clone()))
        }
    }
}

/// Tells of disks that the newest point has, and the next one would not have.
pub(super) fn tell_of_gone_disks(desk: &Desk<'_>, work: &RunWork, record: &ReplicaRecord) -> Result<()> {
    for disk in work.gone(desk, record)? {
        let what = format!("{}: disk {disk} of the point before is not there any more", work.name);
        (desk.warn)(Code::WarnDiskGone, what);
    }
    Ok(())
}

/// Looks what a run from backups would do.
///
/// # Errors
/// As the run.
pub fn foresee(desk: &Desk<'_>, spec: &ReplicaSpec) -> Result<Foreseen> {
    let record = record(desk, spec)?;
    if record.state.holds_replication() || record.excluded {
        return Ok(Foreseen::OnHold(record.state));
    }
    let points = desk.points(&spec.name)?;
    let Some((repository, point)) = choose(desk, spec, points.last())? else { return Ok(Foreseen::NoNewPoint) };
    let work = work_of(desk, spec, (record.next_layer, Origin::Job), &points, &repository, &point)?;
    tell_of_gone_disks(desk, &work, &record)?;
    let opened = Opened::of(desk, &work.source)?;
    let bytes = work.builds(desk, &record, &opened)?.disks.iter().map(DiskBuild::estimate).sum::<Result<u64>>()?;
    Ok(Foreseen::Point { repository, point: point.id, taken: work.point.taken, bytes })
}
