//! The end of a recovery: the machine stays on its own disk, or everything it wrote is thrown away.
//!
//! Invariants
//! - `keep` deletes nothing that holds a byte of the disk, and may be run again after a crash at any point.
//! - A running machine is moved before its door closes, and is seen to have moved.
//! - `discard` turns the machine off before it deletes.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use aquifer_mount::session::{
    Client, Folder, Registry, Spec, State, Status,
    control::Clients,
    status::{DiskStatus, Phase},
    traces,
};
use aquifer_vdisk::{Overlay, disk::TOUCHED_NAME, unflushed};

use super::{
    door, gone,
    record::{Machine, Wanted},
    start,
};
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    host::{Attachment, ImageFormat, Pivot, Places, Power},
    stop::Stop,
};

/// How often a session that is becoming local is looked at.
const TICK: Duration = Duration::from_millis(200);

/// How long a door of a session that is thrown away may take to end by itself.
const DOOR_END_WAIT: Duration = Duration::from_secs(20);

/// What `keep` left.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Each disk: its name, its file, and how it was moved; `None` where the machine was off.
    pub disks: Vec<(String, PathBuf, Option<Pivot>)>,
    /// Whether the machine runs.
    pub power: Power,
}

/// Where a disk of a session lies.
pub fn disk_file(spec: &Spec, disk: &str) -> PathBuf {
    Overlay::raw_path(&spec.disk_dir(disk))
}

/// Waits until everything is local. `tell` sees the session each time it was looked at.
///
/// # Errors
/// [`Code::Timeout`]; [`Code::BlockCorrupt`] or [`Code::Failed`] where a copy has failed for good; an interruption.
pub fn wait_local(client: &Client, limit: Option<Duration>, stop: Stop, tell: &mut dyn FnMut(&Status)) -> Result<()> {
    let start = Instant::now();
    loop {
        let status = client.status()?;
        tell(&status);
        if status.is_local() {
            return Ok(());
        }
        if let Some(fail) = copy_failed(&status) {
            return Err(fail);
        }
        if let Some(limit) = limit.filter(|limit| start.elapsed() >= *limit) {
            let what = format!("{} was not local within {} s", status.name, limit.as_secs());
            return Err(Fail::new(Code::Timeout, what).help(format!("aquifer status {}", status.name)));
        }
        stop.check()?;
        stop.wait(TICK);
    }
}

/// Why a session will not become local by waiting: a copy of it has ended with something missing.
pub fn copy_failed(status: &Status) -> Option<Fail> {
    let ended = |disk: &&DiskStatus| disk.hydration.as_ref().is_some_and(|copy| copy.phase == Phase::Failed);
    let disk = status.disks.iter().find(ended)?;
    let copy = disk.hydration.as_ref()?;
    let code = if copy.damaged.is_empty() { Code::Failed } else { Code::BlockCorrupt };
    let what = format!("{} cannot become local: the copy of {} has failed", status.name, disk.name);
    let fail = Fail::new(code, what).at(&disk.name).help(format!("aquifer status {}", status.name));
    let fail = copy.damaged.first().map_or(fail.clone(), |(offset, _)| fail.offset(*offset));
    Some(copy.error.as_ref().map_or(fail.clone(), |error| fail.cause(error)))
}

/// Makes the local disks the machine's only ones. Everything must be local.
///
/// # Errors
/// The machine goes on with whatever it stands on; run it again.
pub fn keep(context: &Context, folder: &Folder) -> Result<Kept> {
    let spec = folder.load()?;
    if spec.state == State::Stopped {
        return Err(Fail::new(Code::State, format!("{} has been finalized", spec.name)));
    }
    // The door first: a hypervisor that waits for it answers nobody.
    if spec.state != State::Dismounting && folder.owner()?.is_none() {
        start::resume(context, folder)?;
    }
    let spec = folder.load()?;
    let machine = Machine::of(&spec)?;
    let power = machine.as_ref().map_or(Ok(Power::Off), Machine::power)?;
    let mut disks = Vec::new();
    if spec.state != State::Dismounting {
        let client = Client::of(folder.clone());
        let supervisor = door::supervisor(folder);
        client.drain(None)?;
        for (index, disk) in spec.disks.iter().enumerate() {
            let file = disk_file(&spec, &disk.name);
            let pivot = match (&machine, power) {
                (_, Power::Off) | (None, _) => None,
                (Some(machine), _) => match &machine.running {
                    Some(running) => {
                        client.hand_over(&disk.name)?;
                        Some(super::host(&machine.host)?.pivot(running, index, &file)?)
                    }
                    None => None,
                },
            };
            disks.push((disk.name.clone(), file, pivot));
        }
        client.detach_source()?;
        client.stop(Clients::Disconnect)?;
        supervisor.as_ref().map_or(Ok(()), door::await_end)?;
        folder.transition(State::Dismounting, "finalize_keep", None)?;
    } else {
        disks.extend(spec.disks.iter().map(|d| (d.name.clone(), disk_file(&spec, &d.name), None)));
    }
    for disk in &spec.disks {
        for part in ["map", "journal", "owner", TOUCHED_NAME].into_iter().chain(unflushed::NAMES) {
            remove(&spec.disk_dir(&disk.name).join(part))?;
        }
    }
    if let Some(machine) = &machine {
        let file = |name: &str| Attachment::File { path: disk_file(&spec, name), format: ImageFormat::Raw };
        let files: Vec<Attachment> = spec.disks.iter().map(|disk| file(&disk.name)).collect();
        // Its sockets beside its disks: our own place for them is gone after a reboot.
        let places = Places { dir: spec.dir.clone(), runtime_dir: spec.dir.clone() };
        let written = super::host(&machine.host).map(|host| host.keep(&machine.shape, &files, &places));
        if let Ok(Err(error)) = written {
            tracing::warn!(%error, "how the machine is started on its own disks was not written down");
        }
    }
    remove_all(&traces::folder(&spec))?;
    remove(&spec.nbd_socket())?;
    remove(&spec.control_socket())?;
    folder.transition(State::Stopped, "finalize_keep", None)?;
    Registry::new(&context.home()?).remove(spec.id)?;
    Ok(Kept { disks, power })
}

/// What a discard destroys, in a sentence.
pub fn loss(status: &Status, spec: &Spec) -> String {
    let written: u64 = status.disks.iter().filter_map(|d| d.overlay).map(|o| o.written + o.trimmed).sum();
    let age = jiff::Timestamp::now().duration_since(spec.created).as_secs().max(0).unsigned_abs();
    format!(
        "{} is turned off and deleted, with {} it wrote in the {} since it was recovered; the source is not touched",
        spec.name,
        crate::units::bytes(written),
        crate::units::seconds(age)
    )
}

/// Turns the machine off and deletes the session.
///
/// # Errors
/// Run it again: it goes on where it stopped.
pub fn discard(context: &Context, folder: &Folder) -> Result<()> {
    let spec = folder.load()?;
    if spec.state == State::Stopped {
        let what = format!("{} has been finalized; its disk belongs to nobody here any more", spec.name);
        return Err(Fail::new(Code::State, what));
    }
    if let Some(machine) = Machine::of(&spec)? {
        Machine::edit(folder, |machine| machine.wanted = Wanted::Off)?;
        if let Some(running) = &machine.running {
            super::host(&machine.host)?.power_off(running)?;
        }
    }
    end_door(folder)?;
    // A command that was killed just when it had started the machine has not written down which process that is.
    gone::kill(&gone::processes(folder.dir(), gone::Kind::Hypervisor))?;
    if spec.state.to(State::Dismounting).is_ok() {
        folder.transition(State::Dismounting, "finalize_discard", None)?;
    }
    Registry::new(&context.home()?).remove(spec.id)?;
    if !spec.runtime_dir.starts_with(&spec.dir) {
        remove_all(&spec.runtime_dir)?;
    }
    remove_all(&spec.dir)
}

/// Ends supervisor and door of a session that is thrown away: in order where they listen, by force where they do not.
/// They may be on their way up still, by the hand of a command that was killed.
fn end_door(folder: &Folder) -> Result<()> {
    let deadline = Instant::now() + DOOR_END_WAIT;
    while Instant::now() < deadline {
        if gone::processes(folder.dir(), gone::Kind::Door).is_empty() {
            return Ok(());
        }
        // One that cannot be told yet, or not any more, is asked again or is gone.
        let _ = Client::of(folder.clone()).stop(Clients::Disconnect);
        std::thread::sleep(TICK / 4);
    }
    gone::kill(&gone::processes(folder.dir(), gone::Kind::Door))
}

fn remove(path: &std::path::Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Fail::io(path.display(), "remove", &e)),
    }
}

fn remove_all(path: &std::path::Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Fail::io(path.display(), "remove", &e)),
    }
}
