//! Which restore points of a replica stay, and which files.
//!
//! Invariants
//! - Only while the replica is ready or its own run ends: nothing else stands on its layers then.
//! - A file goes only when no restore point, takeover or way home reaches it.
//! - Layers below the oldest point are merged by writing a new one in the place of the upper, never by writing into one.
//!   They are let pile up to [`SQUASH_AT`] first: a merge reads a whole disk.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use aquifer_formats::probe::Format;
use uuid::Uuid;

use super::{
    build::{DiskBuild, MARK_BYTES, Moved},
    desk::{Desk, in_folder},
    layers::{self, beside, name_it, part_of, remove},
    model::{PointRecord, ReplicaRecord, Top},
    trust,
};
use crate::fail::{Fail, Result};

/// So many layers below the oldest point are merged into one.
pub const SQUASH_AT: usize = 8;

/// The earliest of these points, beyond the latest `keep`.
pub fn surplus(points: &[PointRecord], keep: u32) -> &[PointRecord] {
    let surplus = points.len().saturating_sub(usize::try_from(keep.max(1)).unwrap_or(usize::MAX));
    points.split_at(surplus).0
}

/// Disks that no point has but those which the next point takes the place of, each with the newest of these.
pub fn last_disks(points: &[PointRecord], keep: u32) -> Vec<(&str, &PointRecord)> {
    // Where one point stays, the next one takes its place whatever it has: nothing is lost before that is told.
    let going = surplus(points, keep.saturating_sub(1).max(1));
    let staying = points.get(going.len()..).unwrap_or_default();
    let mut found: Vec<(&str, &PointRecord)> = Vec::new();
    for (point, top) in going.iter().rev().flat_map(|point| point.disks.iter().map(move |top| (point, top))) {
        let is_there = staying.iter().flat_map(|point| &point.disks).any(|other| other.disk == top.disk);
        if !is_there && found.iter().all(|(disk, _)| *disk != top.disk) {
            found.push((&top.disk, point));
        }
    }
    found
}

/// Merges what piled up below the oldest point, and removes what no point needs.
///
/// # Errors
/// The catalogue's; I/O.
pub fn tidy(desk: &Desk<'_>, record: &ReplicaRecord, squash_at: usize) -> Result<()> {
    // What merges left that were killed goes before another one needs the room.
    sweep(desk, record, &[])?;
    if let Some(oldest) = desk.points(&record.name)?.first() {
        for top in &oldest.disks {
            squash(desk, record, top, squash_at)?;
        }
    }
    sweep(desk, record, &[])
}

/// Merges everything below `top` into it, where that are many layers.
fn squash(desk: &Desk<'_>, record: &ReplicaRecord, top: &Top, squash_at: usize) -> Result<()> {
    let path = in_folder(&record.folder, &top.file);
    if layers::files(&path)?.len() <= squash_at.max(1) {
        return Ok(());
    }
    // What was changed from outside is not made to look as if it were ours.
    let Some(settled) = trust::clear_from(record, top)? else { return Ok(()) };
    // Nobody else has this name: who was paused and wakes up gives the layer what was meant for it, or nothing.
    let id = Uuid::new_v4().simple().to_string();
    let merged = beside(&path, &format!("merged.{}", id.get(..8).unwrap_or_default()));
    let build = DiskBuild {
        owner: desk.fence.owner.clone(),
        source: layers::open(&path, Format::Qcow2, desk.cache)?,
        base: None,
        digests: None,
        candidates: None,
        path: merged.clone(),
        key: "merge".into(),
        block: record.digest_block,
        mark_bytes: MARK_BYTES,
    };
    // What is merged was moved here long ago.
    let pace = |moved: Moved| {
        (desk.pace)(match moved {
            Moved::Read(bytes) => Moved::Checked(bytes),
            Moved::Written(bytes) => Moved::Merged(bytes),
            Moved::Equal(_) => return Ok(()),
            other => other,
        })
    };
    build.run(&pace).or_else(|fail| super::build::forget(&merged).and(Err(fail)))?;
    let part = part_of(&merged);
    desk.catalogue.still_ours(desk.fence)?;
    // It took its time: what was changed meanwhile is in what was read, or is about to be written over.
    if trust::clear_from(record, top)? != Some(settled) {
        return super::build::forget(&merged);
    }
    trust::replace(record, &top.file, &part, settled)?;
    // Whoever has the old file open goes on reading it; whoever opens the name finds the same bytes.
    name_it(&part, &path)?;
    super::build::forget(&merged)
}

/// Removes every file of the replica that nothing needs. `also` are layers that an operation under way needs.
///
/// # Errors
/// The catalogue's; a layer that cannot be read: then nothing is removed.
pub fn sweep(desk: &Desk<'_>, record: &ReplicaRecord, also: &[Top]) -> Result<()> {
    // Read first: what another worker enters from now on is not among them.
    let ours: HashSet<PathBuf> = trust::known(record)?.into_iter().collect();
    let points = desk.points(&record.name)?;
    let mut needed: HashSet<PathBuf> = HashSet::new();
    let failover = record.failover.iter().flat_map(|failover| &failover.tops);
    let failback = record.failback.iter().flat_map(|failback| &failback.sent);
    let tops = points.iter().flat_map(|point| &point.disks).chain(failover).chain(failback).chain(also);
    for top in tops {
        let path = in_folder(&record.folder, &top.file);
        if needed.contains(&path) {
            continue;
        }
        needed.extend(layers::files(&path)?);
    }
    let digests: HashSet<OsString> = points
        .iter()
        .flat_map(|point| point.disks.iter().map(|top| digest_file(record, point, &top.disk)))
        .filter_map(|path| path.file_name().map(OsString::from))
        .collect();
    desk.catalogue.still_ours(desk.fence)?;
    let run = record.unfinished.iter().flat_map(|run| &run.point.disks);
    let begun: HashSet<PathBuf> = run.map(|top| in_folder(&record.folder, &top.file)).collect();
    for disk in folders(&record.folder)? {
        for file in files(&disk)? {
            let rest = note_of(&file).is_some_and(|layer| !begun.contains(&layer));
            if rest || (ours.contains(&file) && !needed.contains(&file)) {
                remove(&file)?;
            }
        }
    }
    let kept = record.metadata.join(record.lineage.to_string());
    if kept.is_dir() {
        for file in files(&kept)? {
            if !digests.contains(file.file_name().unwrap_or_default()) {
                remove(&file)?;
            }
        }
    }
    Ok(())
}

/// The layer that a file beside it was a note of, or its beginning.
pub fn note_of(file: &Path) -> Option<PathBuf> {
    let name = file.file_name()?.to_str()?;
    let (number, ending) = name.split_once(".qcow2.")?;
    let noted = ["part", "mark", "map", "sums", "merged"].contains(&ending.split('.').next()?);
    let numbered = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (noted && numbered).then(|| file.with_file_name(format!("{number}.qcow2")))
}

/// Where the digests of a point's disk are.
pub fn digest_file(record: &ReplicaRecord, point: &PointRecord, disk: &str) -> PathBuf {
    record.metadata.join(record.lineage.to_string()).join(format!("{disk}.{}.digests", point.number))
}

fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(entries(folder)?.into_iter().filter(|path| path.is_dir()).collect())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(entries(folder)?.into_iter().filter(|path| path.is_file()).collect())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Fail::io(folder.display(), "list", &e);
    fs::read_dir(folder).map_err(failed)?.map(|entry| entry.map(|e| e.path()).map_err(failed)).collect()
}
