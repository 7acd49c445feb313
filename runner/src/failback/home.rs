//! Production's side of the way home: whether it fits, whether it stands still, and writing down what was sent.
//!
//! Invariants
//! - Nothing is written into an image that another program has open, or that has no room for it.
//! - An image becomes as long as the disk that comes home to it; bytes behind its end are gone.
//!
//! Not here: what is sent ([`super::pass`]), when.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use aquifer_formats::repo::record::MachineDescription;

use super::pass::working_of;
use crate::{
    fail::{Code, Fail, Result},
    host::{in_use::Against, placed},
    replica::{
        desk::{Desk, Stamp},
        images, layers,
        model::{FailbackRecord, FailoverRecord, Home, HomeDisk, HomeKind, ReplicaRecord, Top},
        run::{refuse_strangers, written},
        trust,
    },
    units,
};

/// Refuses a target before anything is turned off.
pub(super) fn check_home(
    desk: &Desk<'_>,
    record: &ReplicaRecord,
    failover: &FailoverRecord,
    home: &Home,
) -> Result<()> {
    let at = |fail: Fail| Err(fail.at(home.folder.display()));
    let folder = std::fs::canonicalize(&home.folder).unwrap_or_else(|_| home.folder.clone());
    if folder == record.folder {
        return at(Fail::new(Code::Refused, "a replica cannot come home to itself"));
    }
    if home.kind == HomeKind::New {
        return refuse_strangers(&home.folder);
    }
    if Stamp::read(&home.folder)?.is_some() {
        return at(Fail::new(Code::Refused, format!("{} is a replica, not a home", home.folder.display())));
    }
    for top in &failover.tops {
        let Some(disk) = home.disks.iter().find(|disk| disk.disk == top.disk) else {
            let what = format!("{} has no disk {}", home.machine, top.disk);
            return at(Fail::new(Code::NotFound, what));
        };
        if desk.running(&home.folder).is_none() {
            images::free(disk, Against::Anybody)?;
        }
        layers::open(&disk.path, disk.format, desk.cache)?;
        let need = top.size / 64;
        let folder = disk.path.parent().unwrap_or(Path::new("/"));
        let stat = rustix::fs::statvfs(folder).map_err(|e| Fail::io(folder.display(), "look at", &e.into()))?;
        if stat.f_bavail.saturating_mul(stat.f_frsize) < need.min(1 << 20) {
            return at(Fail::new(Code::Capacity, format!("no space is left in {}", folder.display())));
        }
    }
    Ok(())
}

/// Disks of a takeover with those of the target.
pub(super) fn pairs<'w>(home: &'w Home, tops: &'w [Top]) -> impl Iterator<Item = (&'w Top, &'w HomeDisk)> {
    tops.iter().filter_map(|top| Some((top, home.disks.iter().find(|disk| disk.disk == top.disk)?)))
}

/// Refuses to write home what does not fit there: production's images are as they were.
pub(super) fn has_room(desk: &Desk<'_>, home: &Home, tops: &[Top], pass: u32) -> Result<()> {
    let mut needed: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for (_, disk) in pairs(home, tops).filter(|_| home.kind != HomeKind::New || pass > 1) {
        let meta = std::fs::metadata(&disk.path).map_err(|e| Fail::io(disk.path.display(), "look at", &e))?;
        let (_, bytes) = needed.entry(meta.dev()).or_insert_with(|| (disk.path.clone(), 0));
        *bytes += images::growth(&working_of(&disk.path, pass), disk, desk.cache)?;
    }
    for (path, bytes) in needed.into_values() {
        let stat = rustix::fs::statvfs(&path).map_err(|e| Fail::io(path.display(), "look at", &e.into()))?;
        let room = stat.f_bavail.saturating_mul(stat.f_frsize);
        if room < bytes {
            let (bytes, room) = (units::bytes(bytes), units::bytes(room));
            let what = format!("what comes home needs {bytes}, and {room} are left");
            return Err(Fail::new(Code::Capacity, what).at(path.display()));
        }
    }
    Ok(())
}

/// Writes the working layers of a pass down into production's images, which become as long as the replica's disks. Done
/// again it goes on.
pub(super) fn write_home(desk: &Desk<'_>, home: &Home, tops: &[Top], pass: u32) -> Result<()> {
    pairs(home, tops).try_for_each(|(top, disk)| {
        let working = working_of(&disk.path, pass);
        if working.exists()
            && let Err(fail) = images::merge_down(&working, &disk.path)
        {
            // Made anew by the next try, which needs the room.
            if fail.code == Code::Capacity {
                layers::remove(&working)?;
            }
            return Err(fail);
        }
        images::cut(&disk.path, disk.format, top.size, desk.cache)?;
        layers::remove(&working)
    })
}

pub(super) fn describe_home(home: &Home, description: &MachineDescription, tops: &[Top]) -> Result<()> {
    let disks = pairs(home, tops).map(|(top, disk)| {
        let file = disk.path.strip_prefix(&home.folder).unwrap_or(&disk.path);
        (top.disk.clone(), file.display().to_string())
    });
    let description = MachineDescription { name: home.machine.clone(), ..description.clone() };
    placed::write(&home.folder, &description, &disks.collect::<Vec<_>>())
}

/// Refuses a home that somebody has changed since the first pass, and layers that it was made of: the second one sends
/// only what the replica wrote.
pub(super) fn stands_still(desk: &Desk<'_>, record: &ReplicaRecord, failback: &FailbackRecord) -> Result<()> {
    let (home, name) = (&failback.home, &record.name);
    let known = home.disks.iter().zip(&failback.written);
    let mut changed = known.filter(|(disk, as_of)| written(&disk.path).ok() != Some(**as_of));
    let mut thawed = None;
    for sent in &failback.sent {
        if !trust::is_frozen(record, &sent.file)? {
            thawed = Some(sent);
        }
    }
    let what = match (desk.running(&home.folder), changed.next(), thawed) {
        (Some(_), ..) => format!("{} runs: what it writes would be lost", home.machine),
        (None, Some((disk, _)), _) => {
            format!("{} of {} was written to since the first pass", disk.disk, home.machine)
        }
        (None, None, Some(sent)) => format!("the layer {} of {name} was changed since the first pass", sent.file),
        (None, None, None) => return Ok(()),
    };
    Err(Fail::new(Code::State, what)
        .at(home.folder.display())
        .help(format!("aquifer undo {name}    # then failback again")))
}
