//! A replica whose folder and whose catalogue do not belong together any more: taken back into a catalogue that has lost
//! it, or dropped from one that somebody else's folder proves wrong.
//!
//! Invariants
//! - What is taken back is what the last operation left beside the layers, under a stamp of ours: whoever else still knows
//!   it is refused from then on.
//! - Dropping it touches nothing but the catalogue and our digests.
//!
//! Not here: giving up a replica that is ours ([`super::remove`]).

use std::{
    fs, io,
    path::{Component, Path},
};

use aquifer_formats::repo::DiskName;

use super::{
    desk::{Desk, Stamp, object},
    model::{ReplicaRecord, Top},
    run::{ReplicaSpec, store_fresh},
    state::{Op, State},
    stray::Shown,
    trust,
};
use crate::{
    catalogue::{End, Event},
    fail::{Code, Fail, Result},
};

/// Makes a replica known again to a catalogue that has lost it, with its restore points and in its state.
///
/// # Errors
/// [`Code::Exists`] where it is known; [`Code::NotFound`] where its folder has no copy of what was known;
/// [`Code::ForeignOwner`] where somebody has changed it since that copy was made.
pub fn take_back(desk: &Desk<'_>, spec: &ReplicaSpec) -> Result<()> {
    let name = &spec.name;
    let known = desk.catalogue.replica::<ReplicaRecord>(name)?;
    if let Some(known) = &known
        && known.record.state != State::Removed
    {
        let what = format!("{name} is known, and {}", known.record.state);
        return Err(Fail::new(Code::Exists, what).help(format!("aquifer replicas {name}")));
    }
    let at = |fail: Fail| fail.at(spec.folder.display());
    let folder = fs::canonicalize(&spec.folder).map_err(|e| Fail::io(spec.folder.display(), "find", &e))?;
    let nothing = || Fail::new(Code::NotFound, format!("{} says nothing of a replica", folder.display()));
    let copy = trust::recall(&folder)?.ok_or_else(|| at(nothing()))?;
    let mut record = copy.record.check()?;
    // Whoever can write to that folder does not say where else we write.
    record.metadata = spec.metadata.clone();
    let served = record.failover.iter().flat_map(|failover| &failover.tops);
    if let Some(top) = served.chain(copy.points.iter().flat_map(|point| &point.disks)).find(|top| !is_inside(top)) {
        let what = format!("{} is no layer of a disk {}", top.file, top.disk);
        return Err(at(Fail::new(Code::Corrupt, what)));
    }
    if (&record.name, &record.machine) != (name, &spec.machine) {
        let what = format!("{} holds {}, the replica of {}", folder.display(), record.name, record.machine);
        return Err(at(Fail::new(Code::Exists, what)));
    }
    let next = record.epoch + 1;
    match Stamp::read(&folder)? {
        Some(stamp) if stamp.lineage != record.lineage => {
            let what = format!("{} holds another chain, of {}", folder.display(), stamp.owner_name);
            return Err(at(Fail::new(Code::ForeignOwner, what)));
        }
        // Ours already, by a call that was cut short.
        Some(stamp) if stamp.epoch == next && stamp.owner == desk.me.id => {}
        Some(stamp) if stamp.epoch != record.epoch => {
            let what = format!("{} has changed the sides of {name} since that was written down", stamp.owner_name);
            return Err(at(Fail::new(Code::ForeignOwner, what)));
        }
        _ => desk.stamp(&folder, record.lineage, next)?,
    }
    (record.epoch, record.folder) = (next, folder);
    (record.host, record.job) = (spec.host.clone(), spec.job.clone());
    if let Some(known) = known {
        desk.drop_points(name)?;
        desk.catalogue.drop_replica(desk.fence, name, known.revision)?;
    }
    // The points first: one that is listed without its record is looked at by nobody.
    copy.points.iter().try_for_each(|point| desk.put_point(name, point))?;
    let row = store_fresh(desk, record)?;
    trust::remember(desk, &row.record)?;
    tell(desk, name, State::Absent, row.record.state, "take_back")
}

/// Whether a layer's name is one that is given to layers: a disk's folder, and a file in it.
fn is_inside(top: &Top) -> bool {
    let mut parts = Path::new(&top.file).components();
    let disk = DiskName::new(&top.disk).is_ok();
    let folder = matches!(parts.next(), Some(Component::Normal(part)) if part == top.disk.as_str());
    disk && folder && matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

/// Drops a replica that is somebody else's by now: its folder is left alone.
///
/// # Errors
/// [`Code::State`] where it is ours, or its machine still runs; the catalogue's.
pub fn drop_foreign(desk: &Desk<'_>, name: &str) -> Result<()> {
    let mut row = desk.load(name)?;
    let before = row.record.state;
    if before == State::Removed {
        return Ok(());
    }
    let open = desk.catalogue.open_operations()?.into_iter().find(|operation| operation.object == object(name));
    if desk.check_stamp(&row.record).is_ok() {
        let what = format!("the folder of {name} is ours: nothing has to be forced");
        // While it serves it is taken back first.
        let way = if before.step(Op::Remove).is_ok() { " --remove" } else { "" };
        return Err(Fail::new(Code::State, what).help(format!("aquifer replicas {name}{way}")));
    }
    refuse_while_ours_runs(desk, &row.record)?;
    if let Some(open) = open {
        let open = desk.catalogue.adopt_operation(desk.fence, open.id)?;
        desk.catalogue.end_operation(desk.fence, open.id, &End::Failed("the replica was dropped".into()), &[])?;
    }
    desk.drop_points(name)?;
    let digests = row.record.metadata.join(row.record.lineage.to_string());
    match fs::remove_dir_all(&digests) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Fail::io(digests.display(), "remove", &error));
        }
        _ => {}
    }
    row.record.state = State::Removed;
    (row.record.excluded, row.record.unfinished) = (true, None);
    (row.record.failover, row.record.failback) = (None, None);
    desk.store(row)?;
    tell(desk, name, before, State::Removed, "drop")
}

/// Refuses to forget a machine of ours: it would be left with nobody who knows it. One that whoever has the folder now has
/// started is theirs.
fn refuse_while_ours_runs(desk: &Desk<'_>, record: &ReplicaRecord) -> Result<()> {
    let name = &record.name;
    let recorded = record.failover.as_ref().and_then(|failover| failover.running.as_ref());
    if let Some(running) = recorded.filter(|running| running.process.is_alive()) {
        let shown = Shown::of(&record.folder, record);
        let way = match shown {
            Shown::Gone | Shown::Theirs(_) => format!("aquifer replicas {name} --park"),
            Shown::Ours | Shown::Silent | Shown::Unreadable => by_hand(name),
        };
        return Err(runs(name, running.process.pid, way));
    }
    // Started by a worker that died before it could record that.
    let Some(running) = desk.running(&record.folder) else { return Ok(()) };
    let note = Stamp::read(&desk.places(&record.folder).runtime_dir)?;
    if note.is_some_and(|note| note.lineage == record.lineage && note.owner == desk.me.id) {
        return Err(runs(name, running.process.pid, by_hand(name)));
    }
    Ok(())
}

fn by_hand(name: &str) -> String {
    format!("aquifer replicas {name}    # and turn that process off by hand, if it is not needed")
}

fn runs(name: &str, pid: u32, way: String) -> Fail {
    let what = format!("the machine of {name} runs, as process {pid}: it is not dropped");
    Fail::new(Code::State, what).help(way)
}

fn tell(desk: &Desk<'_>, name: &str, from: State, to: State, op: &str) -> Result<()> {
    let event = Event {
        object: object(name),
        from: Some(from.name().into()),
        to: Some(to.name().into()),
        op: op.into(),
        session: desk.fence.session,
        user: desk.fence.owner.clone(),
        ..Event::default()
    };
    Ok(desk.catalogue.event_of(desk.fence, &event)?)
}
