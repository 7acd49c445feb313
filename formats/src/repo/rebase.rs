//! Setting free what given-up points still hold: points that draw from their files are written anew, drawing from
//! files that stay, and take the old ones' places in one generation.
//!
//! Invariants
//! - Copy on write: nothing that exists is changed. Whoever reads the point that is replaced holds a lease on it, and
//!   with it all its files; they go when that ends. Readers that come later get the new one.
//! - The new point is whole and durable before the generation that lists it; cut before that, the old one is listed
//!   and what was written is garbage that [`super::keeper::clear`] finds.
//! - The new point keeps the old one's place in the order, time, content and identity.
//!
//! Not here: whether it is worth it (the caller's policy), which points to give up, the deletion of files (the keeper).

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::{
    DiskName, DiskPlan, DiskWork, Error, Machine, Point, PointState, Repository, Result, name,
    record::{Holder, PointRecord, read},
};
use crate::{Layer, aql::WriterOptions};

/// The file of a given-up point that retained points still draw from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Burden {
    /// The given-up point.
    pub point: Uuid,
    /// The disk.
    pub disk: DiskName,
    /// Length of the file: what is set free.
    pub file_bytes: u64,
    /// What of it are no blocks: about so much a point that is written anew has in its own file as well.
    pub table_bytes: u64,
    /// Stored bytes each retained point draws from it: what has to be copied.
    pub drawn: BTreeMap<Uuid, u64>,
}

impl Burden {
    /// Bytes that have to be written: blocks that are copied, and the tables of each file that holds them.
    pub fn cost(&self) -> u64 {
        self.drawn.values().fold(0u64, |sum, drawn| sum.saturating_add(*drawn).saturating_add(self.table_bytes))
    }
}

/// Files of given-up points that retained ones still draw from.
///
/// # Errors
/// A retained point's file cannot be opened; I/O.
pub fn burdens(repo: &Repository, machine: &Machine) -> Result<Vec<Burden>> {
    let listed = repo.points(machine)?;
    let kept: BTreeSet<Uuid> = listed.iter().map(|point| point.id).collect();
    let mut found: BTreeMap<(Uuid, DiskName), Burden> = BTreeMap::new();
    for point in listed.iter().filter(|point| point.state == PointState::Complete) {
        for disk in point.record.iter().flat_map(|record| &record.disks) {
            let foreign: Vec<_> = disk.needs.iter().filter(|needed| !kept.contains(&needed.point)).collect();
            let linked = disk.linked.as_ref().filter(|linked| !kept.contains(&linked.point));
            if foreign.is_empty() && linked.is_none() {
                continue;
            }
            let reader = repo.open_disk(point, &disk.name)?;
            let layers = reader.needed_layers();
            if let (Some(linked), Some(on)) = (linked, reader.linked()) {
                // Nothing of ours is set free by copying what lies in files of another product.
                let burden = found.entry((linked.point, disk.name.clone())).or_insert_with(|| Burden {
                    point: linked.point,
                    disk: disk.name.clone(),
                    file_bytes: 0,
                    table_bytes: 0,
                    drawn: BTreeMap::new(),
                });
                let drawn = on.live_blocks.saturating_mul(reader.block_bytes().into());
                *burden.drawn.entry(point.id).or_default() += drawn;
            }
            for needed in foreign {
                let drawn = layers.iter().find(|layer| layer.layer == needed.layer).map_or(0, |layer| layer.live_bytes);
                let key = (needed.point, needed.disk.clone());
                let burden = found.entry(key).or_insert_with(|| Burden {
                    point: needed.point,
                    disk: needed.disk.clone(),
                    file_bytes: needed.file_bytes,
                    table_bytes: 0,
                    drawn: BTreeMap::new(),
                });
                burden.file_bytes = needed.file_bytes;
                *burden.drawn.entry(point.id).or_default() += drawn;
            }
        }
    }
    for burden in found.values_mut().filter(|burden| burden.file_bytes > 0) {
        // Of a file that nobody describes any more all may be tables.
        let record = read::<PointRecord>(repo.store(), &name::point(machine.id, burden.point)).ok().flatten();
        let own = record.and_then(|record| record.disks.into_iter().find(|disk| disk.name == burden.disk));
        burden.table_bytes = burden.file_bytes.saturating_sub(own.map_or(0, |own| own.stored_bytes));
    }
    Ok(found.into_values().collect())
}

/// Writes `point` anew without the files of the points in `without`, and puts it in its place.
///
/// # Errors
/// [`Error::Locked`] if a backup of this machine runs; [`Error::NotFound`] if the point was given up meanwhile;
/// [`Error::ForeignOwner`]; damage; I/O. The old point is listed then, whole.
pub fn rebase(
    repo: &Repository,
    machine: &Machine,
    point: &Point,
    without: &BTreeSet<Uuid>,
    options: WriterOptions,
    holder: Holder,
) -> Result<PointRecord> {
    let record = point.record.as_ref().filter(|_| point.state == PointState::Complete);
    let record = record.ok_or_else(|| Error::PointState {
        path: repo.label().into(),
        state: point.state.name(),
        why: "only a complete point can be written anew".into(),
    })?;
    let mut transaction = repo.begin(machine, Some(point), holder)?;
    for disk in &record.disks {
        let reader = repo.open_disk(point, &disk.name)?;
        let plan = DiskPlan { size: reader.size(), sector_bytes: reader.sector_bytes(), full: false, options };
        let DiskWork::Write(mut writer) = transaction.disk(&disk.name, plan)? else {
            return Err(Error::Exists { path: reader.label().into() });
        };
        let layers: BTreeSet<Uuid> =
            disk.needs.iter().filter(|needed| without.contains(&needed.point)).map(|needed| needed.layer).collect();
        writer.absorb_layers(&layers)?;
        if disk.linked.as_ref().is_some_and(|linked| without.contains(&linked.point)) {
            writer.take_over_linked()?;
        }
        writer.finish()?;
        transaction.sealed(&disk.name, disk.found.clone(), &disk.source_format)?;
        if let Some(mark) = &disk.mark {
            transaction.mark(&disk.name, mark);
        }
        transaction.counting(&disk.name, disk.counting.clone());
    }
    transaction.commit_instead(point)
}
