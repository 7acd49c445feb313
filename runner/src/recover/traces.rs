//! Where boot traces are kept between recoveries: beside the machine's points in a repository of our own, else in the
//! state folder.
//!
//! ```text
//! REPOSITORY/machines/ID/traces/DISK.trace     the repository is ours and can be written
//! HOME/traces/ID or NAME/DISK.trace            it is not, or the source is none (images, other servers)
//! ```
//!
//! Invariants
//! - A source is never written to: only a repository that this installation owns is, and by its own rules.
//! - No recovery fails or waits for a trace.
//! - A trace cut short never takes the place of a longer one.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use aquifer_formats::repo::{self, Access, DiskName, Repository};
use aquifer_mount::session::{Folder, Spec, traces};
use aquifer_vdisk::Trace;

use super::record::{HeldPoint, Machine};
use crate::{context::Context, fail::Result, repository};

/// How often the supervisor looks whether a trace is complete.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Puts what is known of the machine's earlier boots where the session's door looks for it.
pub fn provide(context: &Context, spec: &Spec) {
    let Ok(shelf) = Shelf::of(context, spec) else { return };
    for disk in &spec.disks {
        let Some(trace) = shelf.get(&disk.name) else { continue };
        if let Err(error) = traces::store(&traces::replay_path(spec, &disk.name), &trace) {
            tracing::warn!(%error, "a boot trace is not used");
        }
    }
}

/// Keeps what a session records, once it is complete or the session ends. Meant for a thread of its own.
pub fn keep(context: &Context, folder: &Folder, done: &AtomicBool) {
    let Ok(spec) = folder.load() else { return };
    let mut open: Vec<&str> = spec.disks.iter().map(|disk| disk.name.as_str()).collect();
    while !open.is_empty() {
        // Looked at once more after the end: the door writes what it has before it goes.
        let last = done.load(Ordering::Acquire);
        open.retain(|disk| {
            let recorded = traces::load(&traces::recorded_path(&spec, disk));
            let Some(trace) = recorded.filter(|t| (t.complete || last) && !t.steps.is_empty()) else { return !last };
            put(context, &spec, disk, &trace);
            false
        });
        if last {
            return;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn put(context: &Context, spec: &Spec, disk: &str, trace: &Trace) {
    let kept = Shelf::of(context, spec).and_then(|shelf| shelf.put(disk, trace));
    match kept {
        Ok(Some(place)) => {
            let what = format!("{disk}: {} bytes in {} steps, in {place}", trace.bytes(), trace.steps.len());
            let told = Folder::open(&spec.dir).and_then(|folder| folder.event(spec.id, "trace_kept", Some(&what)));
            // The session may have been taken down meanwhile.
            let _ = told;
        }
        Ok(None) => {}
        Err(fail) => tracing::warn!(%fail, "a boot trace is not kept"),
    }
}

/// Where one machine's traces are.
struct Shelf {
    /// The machine's place in a repository.
    beside: Option<(Repository, repo::Machine)>,
    /// The machine's folder among our own traces.
    own: PathBuf,
}

impl Shelf {
    fn of(context: &Context, spec: &Spec) -> Result<Self> {
        let point = Machine::of(spec)?.and_then(|machine| machine.point);
        let key = point.as_ref().map_or_else(|| spec.name.clone(), |point| point.machine.to_string());
        let own = context.home()?.join("traces").join(key);
        let open = |point: &HeldPoint| -> Result<_> {
            let repo = Repository::open(&point.repository, repository::me(context)?)?;
            let machine = repo.machine(&point.machine.to_string())?;
            Ok((repo, machine))
        };
        // A repository that is away has no traces.
        Ok(Self { beside: point.as_ref().and_then(|point| open(point).ok()), own })
    }

    fn path(&self, disk: &str) -> PathBuf {
        self.own.join(format!("{disk}.trace"))
    }

    /// Our own first: it is there only where the repository could not be written.
    fn get(&self, disk: &str) -> Option<Trace> {
        if let Some(trace) = traces::load(&self.path(disk)) {
            return Some(trace);
        }
        let (repo, machine) = self.beside.as_ref()?;
        let bytes = repo.trace(machine, &DiskName::new(disk).ok()?).ok()??;
        match Trace::decode(&format!("{}: boot trace of {disk}", repo.label()), &bytes) {
            Ok(trace) => Some(trace),
            Err(error) => {
                tracing::warn!(%error, "a boot trace is not used");
                None
            }
        }
    }

    /// Keeps a trace; tells where, `None` if the one there is better.
    fn put(&self, disk: &str, trace: &Trace) -> Result<Option<String>> {
        if self.get(disk).is_some_and(|old| !trace.complete && old.size == trace.size && old.bytes() > trace.bytes()) {
            return Ok(None);
        }
        if let Some((repo, machine)) = &self.beside
            && repo.access().is_ok_and(|access| access == Access::ReadWrite)
            && let Ok(name) = DiskName::new(disk)
            && repo.keep_trace(machine, &name, &trace.encode()).is_ok()
        {
            remove(&self.path(disk));
            return Ok(Some(repo.label().to_owned()));
        }
        let path = self.path(disk);
        traces::store(&path, trace)?;
        Ok(Some(path.display().to_string()))
    }
}

/// One that is older than what the repository has now.
fn remove(path: &Path) {
    // It is usually not there; one that stays is used once more.
    let _ = fs::remove_file(path);
}
