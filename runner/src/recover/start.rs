//! The steps of a recovery, and their undoing.
//!
//! Invariants
//! - The overlay stands, on disk, before the machine starts.
//! - A failure before the machine runs takes down what was made, in reverse; what was there before is left as it was.
//! - Once the machine has been let go nothing is deleted, whatever fails: it may have written.

use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use aquifer_mount::session::{Folder, Registry, Spec, State};
use jiff::Timestamp;

use super::{
    door,
    plan::Plan,
    record::{Machine, Wanted, doors, places},
    traces,
};
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    host::{self, Host, Power, Process, Running},
};

/// How long a door may take to answer. Opening a deep chain is in it.
const DOOR_TIMEOUT: Duration = Duration::from_secs(60);

/// A recovery whose machine runs.
#[derive(Clone, Debug)]
pub struct Started {
    /// The session.
    pub spec: Spec,
    /// The machine.
    pub running: Running,
}

/// Carries out a plan.
///
/// # Errors
/// What failed, or an interruption before the machine was let go; what was made is gone again, except a folder whose
/// machine may have written to it: that one is named.
pub fn start(context: &Context, plan: &Plan) -> Result<Started> {
    let stop = context.stop()?;
    let mut undo = Undo::new(plan.host);
    let folder = prepare(context, plan, &mut undo)?;
    folder.transition(State::Preparing, "recover", None)?;
    folder.transition(State::Mounting, "recover", None)?;
    undo.folder = Some(folder.clone());
    stop.check()?;
    let supervisor = door::launch(context, &folder)?;
    undo.supervisor = Some(supervisor);
    door::await_door(&folder, Some(&supervisor), DOOR_TIMEOUT, stop)?;
    stop.check()?;
    let spec = folder.load()?;
    let running = match plan.host.start(&plan.machine.shape, &doors(&spec), &places(&spec)) {
        Ok(running) => running,
        Err(error) => {
            if matches!(error, host::Error::Power { .. }) {
                undo.keep();
                Machine::edit(&folder, |m| m.wanted = Wanted::Off)?;
                let fail = Fail::from(error).at(folder.dir().display());
                return Err(fail.help(format!("aquifer session resume {}", folder.dir().display())));
            }
            return Err(error.into());
        }
    };
    undo.keep();
    let recorded = running.clone();
    Machine::edit(&folder, move |machine| {
        machine.running = Some(recorded);
        machine.since = Some(Timestamp::now());
    })?;
    let spec = folder.transition(State::Mounted, "machine_started", None)?;
    Ok(Started { spec, running })
}

/// Makes the folder and the record.
fn prepare(context: &Context, plan: &Plan, undo: &mut Undo) -> Result<Folder> {
    let runtime = context.runtime_dir()?;
    let mut spec =
        Spec::new(&plan.name, &plan.dir, &runtime, plan.disks.clone(), plan.options.clone(), Timestamp::now())?;
    spec.host = plan.machine.to_json();
    let folder = undo.make(&spec)?;
    if let Some(content) = &plan.variables {
        let path = plan.host.variables(folder.dir());
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()));
        written.map_err(|e| Fail::io(path.display(), "write", &e))?;
    }
    let registry = Registry::new(&context.home()?);
    registry.add(&spec)?;
    undo.registry = Some((registry, spec.id));
    traces::provide(context, &spec);
    Ok(folder)
}

/// Brings a session back whose processes died: its door, and its machine where that ought to run.
///
/// # Errors
/// [`Code::State`] for a session that has ended; whatever fails on the way.
pub fn resume(context: &Context, folder: &Folder) -> Result<Resumed> {
    let stop = context.stop()?;
    let spec = folder.load()?;
    if matches!(spec.state, State::Dismounting | State::Stopped) {
        return Err(Fail::new(Code::State, format!("{} has ended: it is {}", spec.name, spec.state)));
    }
    let door_started = folder.owner()?.is_none();
    if door_started {
        for next in [State::Preparing, State::Mounting] {
            if !folder.load()?.state.serves() {
                folder.transition(next, "resume", None)?;
            }
        }
        let supervisor = door::launch(context, folder)?;
        door::await_door(folder, Some(&supervisor), DOOR_TIMEOUT, stop)?;
    } else {
        door::await_door(folder, None, DOOR_TIMEOUT, stop)?;
    }
    let Some(machine) = Machine::of(&spec)? else { return Ok(Resumed { door_started, machine_started: false }) };
    let host = super::host(&machine.host)?;
    let machine_started = match machine.power()? {
        Power::Off if machine.wanted == Wanted::On => {
            let running = host.start(&machine.shape, &doors(&spec), &places(&spec))?;
            Machine::edit(folder, |machine| {
                machine.running = Some(running);
                machine.since = Some(Timestamp::now());
            })?;
            folder.event(spec.id, "machine_started", Some("after its host or hypervisor ended"))?;
            true
        }
        Power::IoError => {
            if let Some(running) = &machine.running {
                host.resume(running)?;
            }
            false
        }
        Power::Running | Power::Paused | Power::Crashed | Power::Off => false,
    };
    if folder.load()?.state == State::Mounting {
        folder.transition(State::Mounted, "resume", None)?;
    }
    Ok(Resumed { door_started, machine_started })
}

/// What a resume had to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// The door had to be started.
    pub door_started: bool,
    /// The machine had to be started.
    pub machine_started: bool,
}

/// What has been made so far; dropped, it is taken down.
struct Undo {
    host: &'static dyn Host,
    armed: bool,
    /// Folder of the session, once its record says that it is ours.
    dir: Option<PathBuf>,
    /// What was not there on the way to it, the folder itself first.
    missing: Vec<PathBuf>,
    runtime_dir: Option<PathBuf>,
    registry: Option<(Registry, uuid::Uuid)>,
    folder: Option<Folder>,
    supervisor: Option<Process>,
}

impl Undo {
    fn new(host: &'static dyn Host) -> Self {
        Self {
            host,
            armed: true,
            dir: None,
            missing: Vec::new(),
            runtime_dir: None,
            registry: None,
            folder: None,
            supervisor: None,
        }
    }

    /// Makes the session's folder. It is ours from the moment its record is: of two recoveries into one folder one
    /// makes the record, and the other touches nothing in it.
    fn make(&mut self, spec: &Spec) -> Result<Folder> {
        let record = spec.dir.join("session.json");
        self.missing = spec.dir.ancestors().take_while(|p| !p.exists()).map(Path::to_path_buf).collect();
        match Folder::create(spec) {
            Ok(folder) => {
                self.dir = Some(spec.dir.clone());
                self.runtime_dir = Some(spec.runtime_dir.clone());
                Ok(folder)
            }
            Err(_) if record.exists() => {
                self.missing.clear();
                Err(super::plan::holds_one_already(&spec.dir))
            }
            Err(error) => {
                self.dir = Some(spec.dir.clone());
                Err(error.into())
            }
        }
    }

    /// From here on nothing is deleted.
    fn keep(&mut self) {
        self.armed = false;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Some(folder) = &self.folder {
            // A door that is about to be started again finds that it is not wanted.
            let _ = folder.transition(State::Failed, "recover", Some("undone"));
        }
        if let Some(supervisor) = &self.supervisor {
            let _ = door::end(supervisor);
        }
        if let Some((registry, id)) = &self.registry {
            let _ = registry.remove(*id);
        }
        if let Some(dir) = &self.dir {
            empty(dir);
        }
        // A folder that was there and empty stays; one on the way that somebody else uses by now is not empty, and
        // stays too.
        for made in &self.missing {
            let _ = fs::remove_dir(made);
        }
        if let Some(dir) = &self.runtime_dir {
            let _ = fs::remove_dir_all(dir);
        }
        tracing::debug!(host = self.host.name(), "recovery undone");
    }
}

fn empty(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
    }
}
