//! The only place that deletes anything from a repository, in two functions:
//! `delete_layer` and `delete_record`, both private, both below.
//!
//! Invariants
//! - A layer file goes only when its point is given up in the newest generation, no retained point needs
//!   it (by its record *and* by its own root), and no live lease stands on a point that needs it. What
//!   cannot be read counts as needing everything.
//! - Files go only once it is durable that their points were given up, whoever did that.
//! - Points are given up before leases are looked for, never the other way round. What the others need is
//!   looked up after that: a backup receives its point before it lets go of the lease on the point below.
//! - Giving up never waits: a mounted point keeps its files, and they go when its lease ends.
//! - Cut anywhere, the next sweep goes on.
//! - What is given up gives its room back also where there is none left: the files of an interrupted backup are emptied
//!   before a lease is taken, while nobody can go on with it. A file with a second name is never emptied: that name is
//!   somebody's copy.
//!
//! Not here: which points to give up (retention rules), and who may ask.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::{
    DiskName, Error, Interrupted, LeaseObserver, Liveness, Machine, PointState, Repository, Result, Store, manifest,
    name,
    record::{Holder, LeaseKind, LeaseRecord, ManifestPoint, ManifestRecord, PointRecord, read},
};
use crate::planted::{Bug, planted};

/// How often a lease that is watched is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(500);

/// Allows deleting; made only here.
#[derive(Debug)]
pub struct Permit(());

/// What forgetting may do to the last complete point of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastPoint {
    /// It stays: forgetting it is refused.
    Stays,
    /// It may go: somebody said so.
    MayGo,
}

/// What a sweep did and could not do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Layer files deleted, with their lengths.
    pub deleted: Vec<(String, u64)>,
    /// Bytes of those.
    pub bytes: u64,
    /// Points whose files stay because of a lease.
    pub leased: Vec<Uuid>,
    /// Points whose files stay because retained points need them.
    pub needed: Vec<Uuid>,
}

/// One layer file.
type FileKey = (Uuid, DiskName);

/// Deletes a layer file that nothing needs any more.
fn delete_layer(store: &Store, machine: Uuid, file: &FileKey) -> Result<bool> {
    store.delete(&name::layer(machine, file.0, &file.1), &Permit(()))
}

/// Deletes what holds no data: a lease, a self-test, the records and the folder of a point without files.
fn delete_record(store: &Store, object: &str) -> Result<bool> {
    debug_assert!(!object.ends_with(".aql"), "layer files have their own way");
    store.delete(object, &Permit(()))
}

pub(super) fn self_test(store: &Store) -> Result<()> {
    store.self_test(&Permit(()))
}

/// Withdraws a lease: the holder's own, or one whose holder is gone.
pub(super) fn withdraw(store: &Store, lease: Uuid) -> Result<()> {
    delete_record(store, &name::lease(lease)).map(|_| ())
}

/// Takes away what says that a point was begun: it is complete, and its record durable.
pub(super) fn drop_begun(store: &Store, machine: Uuid, point: Uuid) -> Result<()> {
    delete_record(store, &name::begin(machine, point)).map(|_| ())
}

/// Gives points up. Nothing is deleted: [`sweep`] does that when nothing needs them.
///
/// # Errors
/// [`Error::NotFound`] for a point that is not listed; refused for a pinned one, and for the last
/// complete one where it stays; [`Error::ForeignOwner`]; I/O.
pub fn forget(repo: &Repository, machine: &Machine, points: &[Uuid], last: LastPoint) -> Result<ManifestRecord> {
    repo.writable()?;
    let changed = manifest::change(repo, machine, |record| {
        // In the very generation that is built on: of two at once the second finds what the first has left.
        if last == LastPoint::Stays {
            leaves_one(repo, machine, record, points)?;
        }
        for id in points {
            let point = record.points.iter_mut().find(|p| p.id == *id && p.retained);
            let point =
                point.ok_or_else(|| Error::not_found(repo.label(), format!("point {id} of {}", machine.name)))?;
            if point.pinned {
                return Err(
                    crate::Error::Refused { path: repo.label().into(), what: format!("point {id} is pinned") }.into()
                );
            }
            point.retained = false;
        }
        Ok(())
    })?;
    Ok(changed.record)
}

/// Refuses where the last complete point is among `points`.
fn leaves_one(repo: &Repository, machine: &Machine, record: &ManifestRecord, points: &[Uuid]) -> Result<()> {
    let complete =
        |p: &&ManifestPoint| repo.point_state(machine, p).is_ok_and(|point| point.state == PointState::Complete);
    let (going, staying): (Vec<_>, Vec<_>) =
        record.points.iter().rev().filter(|p| p.retained).partition(|p| points.contains(&p.id));
    if staying.iter().any(complete) || !going.iter().any(complete) {
        return Ok(());
    }
    let what = format!("no complete point of {} would be left", machine.name);
    Err(crate::Error::Refused { path: repo.label().into(), what }.into())
}

/// Pins or unpins a point: a pinned one cannot be forgotten.
///
/// # Errors
/// As [`forget`].
pub fn pin(repo: &Repository, machine: &Machine, point: Uuid, pinned: bool) -> Result<()> {
    edit_point(repo, machine, point, |listed| listed.pinned = pinned)
}

/// Notes that a check found a point damaged (or, with `None`, whole again).
///
/// # Errors
/// As [`forget`].
pub fn mark_damaged(repo: &Repository, machine: &Machine, point: Uuid, why: Option<String>) -> Result<()> {
    edit_point(repo, machine, point, |listed| listed.damaged.clone_from(&why))
}

fn edit_point(repo: &Repository, machine: &Machine, point: Uuid, edit: impl Fn(&mut ManifestPoint)) -> Result<()> {
    repo.writable()?;
    manifest::change(repo, machine, |record| {
        let listed = record.points.iter_mut().find(|p| p.id == point && p.retained);
        edit(listed.ok_or_else(|| Error::not_found(repo.label(), format!("point {point} of {}", machine.name)))?);
        Ok(())
    })?;
    Ok(())
}

/// Deletes the files of given-up points that nothing needs any more, and leases whose holders are gone.
///
/// # Errors
/// A retained point of which it cannot be told what it needs; [`Error::ForeignOwner`]; I/O.
pub fn sweep(
    repo: &Repository,
    machine: &Machine,
    observer: &mut LeaseObserver,
    now: Instant,
    tell: &dyn Fn(&Holder) -> Liveness,
) -> Result<Swept> {
    repo.writable()?;
    let store = repo.store();
    let newest = manifest::latest(store, machine.id)?;
    let (live, dead) = observer.observe(repo, now, tell)?;
    for lease in dead.iter().filter(|lease| lease.machine == machine.id) {
        withdraw(store, lease.id)?;
    }
    // Of a machine whose first backup was cut there may be leases and no generation yet.
    let Some(newest) = newest else { return Ok(Swept::default()) };
    let live: Vec<LeaseRecord> = live.into_iter().filter(|lease| lease.machine == machine.id).collect();
    // Whoever gave points up may have been killed before that was durable: the files must not go first.
    if !planted(Bug::GenerationTrusted) {
        store.settle(&name::chain(machine.id))?;
    }
    let given_up: BTreeSet<Uuid> = newest.record.points.iter().filter(|p| !p.retained).map(|p| p.id).collect();
    let listed = repo.listed(machine)?;
    let needed = files_of_all(repo, machine.id, listed.iter().map(|p| p.id), &live)?;
    let leased = files_of_all(repo, machine.id, live.iter().filter_map(|lease| lease.point), &live)?;
    let mut swept = Swept::default();
    let mut gone = Vec::new();
    for point in given_up {
        if sweep_point(store, machine.id, point, &needed, &leased, &mut swept)? {
            gone.push(point);
        }
    }
    if !gone.is_empty() {
        manifest::change(repo, machine, |record| {
            record.points.retain(|p| p.retained || !gone.contains(&p.id));
            Ok(())
        })?;
    }
    Ok(swept)
}

/// Withdraws append leases of a machine whose holders are gone, so that a backup can begin. A holder that
/// cannot be seen from here is watched, as long as `patience` lasts: one that beats lives, one whose beat
/// stands still for [`super::LEASE_TTL`] is gone. Returns what was withdrawn.
///
/// # Errors
/// [`Error::ForeignOwner`]; I/O.
pub fn reclaim(
    repo: &Repository,
    machine: &Machine,
    observer: &mut LeaseObserver,
    tell: &dyn Fn(&Holder) -> Liveness,
    patience: Duration,
) -> Result<Vec<LeaseRecord>> {
    // Nothing is created, for which a full file system has no room.
    repo.owned()?;
    let wanted = |lease: &&LeaseRecord| lease.machine == machine.id && lease.kind == LeaseKind::Append;
    let start = Instant::now();
    let mut first_beats: Option<Vec<(Uuid, u64)>> = None;
    let mut withdrawn = Vec::new();
    loop {
        let (live, dead) = observer.observe(repo, Instant::now(), tell)?;
        for lease in dead.into_iter().filter(|lease| wanted(&lease)) {
            withdraw(repo.store(), lease.id)?;
            withdrawn.push(lease);
        }
        let standing: Vec<&LeaseRecord> = live.iter().filter(wanted).collect();
        let beats: Vec<(Uuid, u64)> = standing.iter().map(|lease| (lease.id, lease.beat)).collect();
        let first = first_beats.get_or_insert_with(|| beats.clone());
        let beaten = beats.iter().any(|(id, beat)| first.iter().any(|(i, b)| i == id && b != beat));
        let seen_alive = standing.iter().any(|lease| tell(&lease.holder) == Liveness::Alive);
        if standing.is_empty() || beaten || seen_alive || start.elapsed() >= patience {
            return Ok(withdrawn);
        }
        std::thread::sleep(WATCH_EVERY.min(patience));
    }
}

/// Deletes what can go of one given-up point; `true` if nothing of it is left.
fn sweep_point(
    store: &Store,
    machine: Uuid,
    point: Uuid,
    needed: &BTreeSet<FileKey>,
    leased: &BTreeSet<FileKey>,
    swept: &mut Swept,
) -> Result<bool> {
    let mut left = false;
    for disk in disks_in(store, machine, point)? {
        let key = (point, disk);
        let is_needed = needed.contains(&key) && !planted(Bug::NeededDeleted);
        if is_needed || leased.contains(&key) {
            let list = if is_needed { &mut swept.needed } else { &mut swept.leased };
            if !list.contains(&point) {
                list.push(point);
            }
            left = true;
            continue;
        }
        let file = name::layer(machine, key.0, &key.1);
        let len = store.len(&file)?.unwrap_or(0);
        if delete_layer(store, machine, &key)? {
            swept.deleted.push((store.path_of(&file), len));
            swept.bytes += len;
        }
    }
    if !left {
        delete_folder(store, machine, point)?;
    }
    Ok(!left)
}

fn delete_folder(store: &Store, machine: Uuid, point: Uuid) -> Result<()> {
    for object in [name::point(machine, point), name::begin(machine, point), name::point_folder(machine, point)] {
        delete_record(store, &object)?;
    }
    Ok(())
}

/// Layer files that are there for a point, whatever its record says.
fn disks_in(store: &Store, machine: Uuid, point: Uuid) -> Result<Vec<DiskName>> {
    let files = store.list(&name::point_folder(machine, point))?;
    Ok(files.iter().filter_map(|file| DiskName::new(file.strip_suffix(".aql")?).ok()).collect())
}

/// All files that these points need, their own included.
fn files_of_all(
    repo: &Repository,
    machine: Uuid,
    points: impl Iterator<Item = Uuid>,
    live: &[LeaseRecord],
) -> Result<BTreeSet<FileKey>> {
    let mut files = BTreeSet::new();
    for point in points {
        files_of(repo, machine, point, live, &mut files)?;
    }
    Ok(files)
}

fn files_of(
    repo: &Repository,
    machine: Uuid,
    point: Uuid,
    live: &[LeaseRecord],
    files: &mut BTreeSet<FileKey>,
) -> Result<()> {
    let store = repo.store();
    let record = read::<PointRecord>(store, &name::point(machine, point))?;
    let known = record.is_some();
    for disk in record.iter().flat_map(|r| &r.disks) {
        files.insert((point, disk.name.clone()));
        files.extend(disk.needs.iter().map(|n| (n.point, n.disk.clone())));
    }
    // And by the files themselves, so that neither a wrong record nor a missing one loses data.
    for disk in disks_in(store, machine, point)? {
        files.insert((point, disk.clone()));
        match repo.open_layer(machine, point, &disk).and_then(|reader| repo.needs_of(machine, &reader)) {
            Ok(needs) => files.extend(needs.into_iter().map(|n| (n.point, n.disk))),
            Err(_) if known => {}
            Err(e) => {
                let append = live.iter().find(|l| l.kind == LeaseKind::Append);
                let by = append.map_or_else(|| "nobody".to_owned(), |l| l.holder.to_string());
                let what = format!("point {point} has no record and its files cannot be read ({e}); appended by {by}");
                return Err(
                    crate::Error::Refused { path: store.path_of(&name::point_folder(machine, point)), what }.into()
                );
            }
        }
    }
    Ok(())
}

/// Deletes what an interrupted backup has written. Only where nothing is listed and nobody appends.
///
/// # Errors
/// [`Error::Locked`] if a backup of this machine runs; refused if the point is complete, or was and others stand on it;
/// I/O.
pub fn discard(repo: &Repository, machine: &Machine, what: &Interrupted, holder: Holder) -> Result<Swept> {
    let point = what.record.id;
    let take = || {
        repo.writable()?;
        repo.lease_append(machine, None, holder.clone())
    };
    let (lease, emptied) = match take() {
        Err(error) if is_full(&error) => match empty(repo, machine, point)? {
            0 => return Err(error),
            emptied => (take()?, emptied),
        },
        lease => (lease?, 0),
    };
    let done = discard_leased(repo, machine, point);
    lease.release()?;
    done.map(|swept| Swept { bytes: swept.bytes + emptied, ..swept })
}

/// Whether there is no room for what was to be created.
fn is_full(error: &Error) -> bool {
    use rustix::io::Errno;
    let Error::Format(crate::Error::Io { source, .. }) = error else { return false };
    source.raw_os_error().is_some_and(|code| [Errno::NOSPC, Errno::DQUOT].iter().any(|e| e.raw_os_error() == code))
}

/// Empties the files of an interrupted backup, without a lease, for which a full file system has no room; says of how many
/// bytes. Whoever goes on with it has a lease before its files, and begins an empty one anew: with the files in our hands
/// and no such lease there is nobody.
///
/// # Errors
/// [`Error::Locked`] if a backup of this machine runs; I/O.
pub(super) fn empty(repo: &Repository, machine: &Machine, point: Uuid) -> Result<u64> {
    repo.owned()?;
    let store = repo.store();
    let mut files = Vec::new();
    for disk in disks_in(store, machine.id, point)? {
        let layer = name::layer(machine.id, point, &disk);
        let file = store.reopen_layer(&layer)?;
        // Another name of it is in a copy of the repository, which keeps what it has.
        if store.is_alone(&layer)? {
            files.push(file);
        }
    }
    let append = |lease: &&LeaseRecord| lease.kind == LeaseKind::Append && lease.machine == machine.id;
    if let Some(other) = repo.leases()?.iter().find(append) {
        return Err(Error::Locked {
            path: store.path_of(&name::machine_folder(machine.id)),
            holder: other.holder.to_string(),
            kind: "append",
            since: other.since.to_string(),
        });
    }
    let listed = manifest::latest(store, machine.id)?.is_some_and(|m| m.record.points.iter().any(|p| p.id == point));
    if listed || store.len(&name::point(machine.id, point))?.is_some() {
        return Ok(0);
    }
    let mut bytes = 0;
    for file in &files {
        let failed = |action, e| Error::from(crate::Error::io(file.label(), action, 0, e));
        bytes += file.len().map_err(|e| failed("look at", e))?;
        file.set_len(0).map_err(|e| failed("truncate", e))?;
        file.sync().map_err(|e| failed("sync", e))?;
    }
    Ok(bytes)
}

/// Deletes what points that were written anew have left behind where that was cut short: folders that no generation
/// has ever listed, and that are no interrupted backup.
///
/// # Errors
/// [`Error::Locked`] if a backup of this machine runs; [`Error::ForeignOwner`]; I/O.
pub fn clear(repo: &Repository, machine: &Machine, holder: Holder) -> Result<Swept> {
    repo.writable()?;
    let lease = repo.lease_append(machine, None, holder)?;
    let done = clear_leased(repo, machine);
    lease.release()?;
    done
}

fn clear_leased(repo: &Repository, machine: &Machine) -> Result<Swept> {
    let store = repo.store();
    let listed = manifest::latest(store, machine.id)?.map(|m| m.record.points).unwrap_or_default();
    let mut swept = Swept::default();
    for folder in store.list(&name::points(machine.id))? {
        let Ok(point) = folder.parse::<Uuid>() else { continue };
        let whole = store.len(&name::point(machine.id, point))?.is_some();
        if whole && listed.iter().all(|known| known.id != point) {
            sweep_point(store, machine.id, point, &BTreeSet::new(), &BTreeSet::new(), &mut swept)?;
        }
    }
    Ok(swept)
}

/// Files under points of this machine that somebody holds a lease on, whether the point is listed or not.
fn files_of_leased(repo: &Repository, machine: &Machine) -> Result<BTreeSet<FileKey>> {
    let leases = repo.leases()?;
    let held = leases.iter().filter(|lease| lease.machine == machine.id).filter_map(|lease| lease.point);
    files_of_all(repo, machine.id, held, &[])
}

fn discard_leased(repo: &Repository, machine: &Machine, point: Uuid) -> Result<Swept> {
    let store = repo.store();
    let listed = manifest::latest(store, machine.id)?.map(|m| m.record.points).unwrap_or_default();
    let whole = store.len(&name::point(machine.id, point))?.is_some();
    if whole && listed.iter().any(|p| p.id == point) {
        let path = store.path_of(&name::point_folder(machine.id, point));
        return Err(crate::Error::Refused { path, what: "the point is complete".into() }.into());
    }
    if listed.iter().any(|p| p.id == point) {
        let others = listed.iter().filter(|p| p.retained && p.id != point).map(|p| p.id);
        if files_of_all(repo, machine.id, others, &[])?.iter().any(|(of, _)| *of == point) {
            let path = store.path_of(&name::point_folder(machine.id, point));
            return Err(crate::Error::Refused { path, what: "other points stand on its files".into() }.into());
        }
        // Received and never completed: it leaves the list before its files go.
        manifest::change(repo, machine, |record| {
            record.points.retain(|p| p.id != point);
            Ok(())
        })?;
    }
    let mut swept = Swept::default();
    let leased = files_of_leased(repo, machine)?;
    sweep_point(store, machine.id, point, &BTreeSet::new(), &leased, &mut swept)?;
    Ok(swept)
}
