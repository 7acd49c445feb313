//! Production's side of the way home: whether it fits, whether it stands still, and writing down what was sent.
//!
//! Invariants
//! - Nothing is written into an image that another program has open, or that has no room for it.
//! - An image becomes as long as the disk that comes home to it; bytes behind its end are gone.
//! - An image that is made takes no name that somebody else has, however long it took to make; it is removed only while it
//!   is the one that was made.
//!
//! Not here: what is sent ([`super::pass`]), when.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{probe::Format, repo::record::MachineDescription};
use aquifer_vdisk::{BlockCache, Disk};

use super::pass::working_of;
use crate::{
    context::quoted,
    copy::used_bytes,
    fail::{Code, Fail, Result},
    host::{in_use::Against, placed},
    replica::{
        desk::{Desk, Stamp},
        images, layers,
        model::{Home, HomeDisk, HomeKind, MadeFile, ReplicaRecord, Top},
        run::{refuse_strangers, written},
        trust,
    },
    units,
};

/// Refuses a target before anything is turned off; `runs` is whether its machine does. Says what it may have no room for:
/// what an image takes that is made is not known before it is.
///
/// # Errors
/// [`Code::Exists`], [`Code::Refused`]: it is no home; [`Code::NotFound`]: a disk of it is missing; [`Code::Busy`];
/// [`Code::Capacity`].
pub fn check_home(record: &ReplicaRecord, home: &Home, runs: bool, cache: &Arc<BlockCache>) -> Result<Vec<String>> {
    let tops = record.failover.iter().flat_map(|failover| &failover.tops);
    let at = |fail: Fail| Err(fail.at(home.folder.display()));
    is_no_replica(record, home)?;
    if home.kind == HomeKind::New {
        refuse_strangers(&home.folder)?;
        has_bytes(&home.folder, tops.clone().map(least_bytes).sum(), "needs")?;
        let all = tops.map(|top| made_bytes(record, top, cache)).sum();
        return Ok(has_bytes(&home.folder, all, "may need").err().map(|fail| fail.what).into_iter().collect());
    }
    let mut doubts = Vec::new();
    for top in tops {
        let Some(disk) = home.disks.iter().find(|disk| disk.disk == top.disk) else {
            let what = format!("{} has no disk {}", home.machine, top.disk);
            let help = format!("aquifer failback {} --drift apply    # makes it", quoted(&record.name));
            return at(Fail::new(Code::NotFound, what).help(help));
        };
        if home.makes(&disk.disk) {
            // It was free when it was chosen.
            is_free(&disk.path)?;
        } else {
            if !runs {
                images::free(disk, Against::Anybody)?;
            }
            layers::open(&disk.path, disk.format, cache)?;
        }
        let folder = disk.path.parent().unwrap_or(Path::new("/"));
        // What an earlier try has left makes room for what is sent now.
        let left = working_of(&disk.path, 1).metadata().map_or(0, |meta| meta.blocks().saturating_mul(512));
        has_bytes(folder, least_bytes(top).saturating_sub(left), "needs")?;
        if home.makes(&disk.disk) {
            let all = made_bytes(record, top, cache).saturating_sub(left);
            doubts.extend(has_bytes(folder, all, "may need").err().map(|fail| fail.what));
        }
    }
    Ok(doubts)
}

/// What a disk takes on its way home, at least.
fn least_bytes(top: &Top) -> u64 {
    (top.size / 64).min(1 << 20)
}

/// Refuses a replica as a home, also the one that comes home.
///
/// # Errors
/// [`Code::Refused`].
pub fn is_no_replica(record: &ReplicaRecord, home: &Home) -> Result<()> {
    let folder = std::fs::canonicalize(&home.folder).unwrap_or_else(|_| home.folder.clone());
    let what = if folder == record.folder {
        "a replica cannot come home to itself".to_owned()
    } else if home.kind != HomeKind::New && Stamp::read(&home.folder)?.is_some() {
        format!("{} is a replica, not a home", home.folder.display())
    } else {
        return Ok(());
    };
    Err(Fail::new(Code::Refused, what).at(home.folder.display()))
}

/// What an image takes that is made of a replica's disk, at most: zeros that were written there are not sent. Nothing,
/// where that cannot be told while a machine writes there.
fn made_bytes(record: &ReplicaRecord, top: &Top, cache: &Arc<BlockCache>) -> u64 {
    let chain = layers::open(&record.folder.join(&top.file), Format::Qcow2, cache);
    chain.and_then(|chain| used_bytes(&Disk::read_only(&top.disk, chain))).unwrap_or_default()
}

/// Refuses a folder that has no room for so much; one that is not there yet has what the one above it has.
fn has_bytes(folder: &Path, need: u64, needs: &str) -> Result<()> {
    let there = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(there).map_err(|e| Fail::io(there.display(), "look at", &e.into()))?;
    let room = stat.f_bavail.saturating_mul(stat.f_frsize);
    if room >= need {
        return Ok(());
    }
    let (need, room) = (units::bytes(need), units::bytes(room));
    let what = format!("what comes home {needs} {need} in {}, and {room} are left", folder.display());
    Err(Fail::new(Code::Capacity, what).at(folder.display()))
}

fn is_free(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_ok() { Err(layers::taken(path)) } else { Ok(()) }
}

/// Refuses to go on where somebody has put something meanwhile into the place of what is made.
pub(super) fn still_free(home: &Home, tops: &[Top]) -> Result<()> {
    pairs(home, tops).filter(|(_, disk)| home.makes(&disk.disk)).try_for_each(|(_, disk)| is_free(&disk.path))?;
    if home.kind == HomeKind::New { is_free(&home.folder.join(placed::DESCRIPTION)) } else { Ok(()) }
}

/// Gives the images that were made their names, where none of those is taken, and notes which files they are. Done
/// again it goes on.
pub(super) fn name_made(home: &mut Home, tops: &[Top]) -> Result<()> {
    let made = || pairs(home, tops).map(|(_, disk)| disk).filter(|disk| home.makes(&disk.disk));
    let unnamed = || made().map(|disk| (working_of(&disk.path, 1), disk)).filter(|(working, _)| working.exists());
    unnamed().try_for_each(|(working, disk)| layers::can_be_named(&working, &disk.path))?;
    unnamed().try_for_each(|(working, disk)| layers::name_new(&working, &disk.path))?;
    let mut files = BTreeMap::new();
    for disk in made() {
        let meta = disk.path.symlink_metadata().map_err(|e| Fail::io(disk.path.display(), "look at", &e))?;
        files.extend(MadeFile::of(&meta).map(|file| (disk.disk.clone(), file)));
    }
    home.made_files = files;
    Ok(())
}

/// Refuses to begin to take back images that were made while somebody has them open. The home's own machine is turned off
/// first, where it `runs`.
///
/// # Errors
/// [`Code::Busy`].
pub fn made_are_free(home: &Home, runs: bool) -> Result<()> {
    if runs {
        return Ok(());
    }
    let ours = |disk: &&HomeDisk| {
        let found = disk.path.symlink_metadata().ok().and_then(|meta| MadeFile::of(&meta));
        home.made.contains(&disk.disk) && found.is_some() && home.made_files.get(&disk.disk) == found.as_ref()
    };
    home.disks.iter().filter(ours).try_for_each(|disk| images::free(disk, Against::Anybody))
}

/// Removes the image that was made for a disk, which nothing names any more. One that is another by now, or may be, or that
/// somebody has open, is told and stays: what has begun cannot be stuck for a file that stands in nobody's way.
pub(super) fn remove_made(desk: &Desk<'_>, home: &Home, disk: &HomeDisk) -> Result<()> {
    let found = match std::fs::symlink_metadata(&disk.path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(|e| Fail::io(disk.path.display(), "look at", &e))?,
    };
    let stays = |why: &str| {
        (desk.warn)(Code::WarnHost, format!("{} {why}, and stays", disk.path.display()));
        Ok(())
    };
    let Some(file) = MadeFile::of(&found) else {
        return stays("may be another image than the one that was made there (its file system keeps no birth times)");
    };
    if home.made_files.get(&disk.disk) != Some(&file) {
        return stays("is not the image that was made there");
    }
    match images::free(disk, Against::Anybody) {
        Err(fail) if fail.code == Code::Busy => stays(&format!("was made there ({})", fail.what)),
        // What lies beside it under its name is not ours.
        free => free.and_then(|()| layers::remove(&disk.path)),
    }
}

/// Disks of a takeover with those of the target.
pub(super) fn pairs<'w>(home: &'w Home, tops: &'w [Top]) -> impl Iterator<Item = (&'w Top, &'w HomeDisk)> {
    tops.iter().filter_map(|top| Some((top, home.disks.iter().find(|disk| disk.disk == top.disk)?)))
}

/// Refuses to write home what does not fit there: production's images are as they were.
pub(super) fn has_room(desk: &Desk<'_>, home: &Home, tops: &[Top], pass: u32) -> Result<()> {
    let mut needed: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for (_, disk) in pairs(home, tops).filter(|(_, disk)| !home.makes(&disk.disk) || pass > 1) {
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
/// again it goes on: a layer that is gone was written down wholly.
pub(super) fn write_home(desk: &Desk<'_>, home: &Home, tops: &[Top], pass: u32) -> Result<()> {
    pairs(home, tops).try_for_each(|(top, disk)| {
        let working = working_of(&disk.path, pass);
        if working.exists() {
            images::merge_down(&working, &disk.path)?;
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
/// only what the replica wrote. `runs` is whether its machine does.
///
/// # Errors
/// [`Code::State`].
pub fn stands_still(record: &ReplicaRecord, runs: bool) -> Result<()> {
    let Some(failback) = &record.failback else { return Ok(()) };
    let (home, name) = (&failback.home, &record.name);
    let known = home.disks.iter().zip(&failback.written);
    let mut changed = known.filter(|(disk, as_of)| written(&disk.path).ok() != Some(**as_of));
    let mut thawed = None;
    for sent in &failback.sent {
        if !trust::is_frozen(record, &sent.file)? {
            thawed = Some(sent);
        }
    }
    let what = match (changed.next(), thawed) {
        _ if runs => format!("{} runs: what it writes would be lost", home.machine),
        (Some((disk, _)), _) => format!("{} of {} was written to since the first pass", disk.disk, home.machine),
        (None, Some(sent)) => format!("the layer {} of {name} was changed since the first pass", sent.file),
        (None, None) => return Ok(()),
    };
    Err(Fail::new(Code::State, what)
        .at(home.folder.display())
        .help(format!("aquifer undo {}    # then failback again", quoted(name))))
}
