//! Machines of a replica that run where it does not serve: left on a host that is lost, beside the one that serves, or in a
//! folder that is somebody else's by now. They are shown, and turned off by a word.
//!
//! ```text
//! <runtime>/<replica>/replica.json    the stamp as it was when the machine was started: of which chain, of which epoch
//! ```
//!
//! Invariants
//! - Nobody turns one off by the way: whoever lists the replica is told, and [`park`] does it.
//! - The machine that serves is never one of them, and neither is one that whoever has the folder now may have started.
//!   A folder that cannot be read proves nothing against the machine that the record names.
//! - Only what a stamp or a note says is of this chain is turned off; one that merely has its name is shown, and left alone.
//! - Nothing is turned off that was not confirmed by number and start, or that an operation cut short may still count on.
//! - What it wrote stays where it is; where that may be the replica's own layers, they are compared before they are used.
//!
//! Not here: moving a replica to another member ([`super::member`]).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;
use uuid::Uuid;

use super::{
    desk::{Desk, STAMP, Stamp, object},
    digests::put_file,
    layers,
    model::ReplicaRecord,
    state::State,
    trust,
};
use crate::{
    catalogue::{Catalogue, Event},
    fail::{Code, Fail, Result},
    host::{Host, Process, Rooms, Running},
    site::Site,
};

/// Why a machine is one too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// It is the one that serves, and its host does not show the replica's folder any more.
    Lost,
    /// It is the one that served, and the folder was taken over by somebody else.
    Fenced,
    /// Another one serves.
    Beside,
    /// None is to run now.
    Unasked,
    /// It runs in a folder of the replica's name, and nothing there says that it is the replica's.
    Stranger,
}

impl Why {
    fn text(self) -> &'static str {
        match self {
            Self::Lost => "its host has lost the folder that it runs on",
            Self::Fenced => "its folder is somebody else's by now",
            Self::Beside => "it runs beside the one that serves",
            Self::Unasked => "none is to run now",
            Self::Stranger => "nothing there says that it is the replica's, and it is left alone",
        }
    }
}

/// What a folder says of whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// Ours, as it is known; where the stamp is gone, by the ledger.
    Ours,
    /// Somebody else's, or ours of another count of changes of sides.
    Theirs(Stamp),
    /// Nothing: it is empty, or not there.
    Gone,
    /// It holds something, and nothing that says whose.
    Silent,
    /// What it says cannot be read.
    Unreadable,
}

impl Shown {
    pub(super) fn of(folder: &Path, record: &ReplicaRecord) -> Self {
        match Stamp::read(folder) {
            Ok(Some(stamp)) if (stamp.lineage, stamp.epoch) == (record.lineage, record.epoch) => return Self::Ours,
            Ok(Some(stamp)) => return Self::Theirs(stamp),
            Ok(None) => {}
            Err(_) => return Self::Unreadable,
        }
        match fs::read_dir(folder).map(|mut entries| entries.next().is_none()) {
            Ok(true) => return Self::Gone,
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::Gone,
            Err(_) => return Self::Unreadable,
        }
        match trust::recall(folder) {
            Ok(Some(copy)) if copy.record.is_same_chain(record) => Self::Ours,
            Ok(_) => Self::Silent,
            Err(_) => Self::Unreadable,
        }
    }
}

/// A machine that runs where its replica does not serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stray {
    /// The host it runs on.
    pub member: String,
    /// Its folder there.
    pub folder: PathBuf,
    /// Number of its process.
    pub pid: u32,
    /// The chain it was started on; none where whoever started it left no note of that.
    pub lineage: Option<Uuid>,
    /// How often the sides had been changed when it was started.
    pub epoch: Option<u64>,
    /// Why it is one too many.
    pub why: Why,
    /// Whatever an operation that is open comes to, it is one too many.
    #[serde(skip)]
    is_settled: bool,
    #[serde(skip)]
    running: Running,
}

impl Stray {
    /// Whether it is the replica's, and may be turned off by a word.
    pub fn is_ours(&self) -> bool {
        self.why != Why::Stranger
    }

    /// Its process.
    pub fn process(&self) -> Process {
        self.running.process
    }

    /// In a sentence, of the replica `name` whose sides were changed `epoch` times.
    pub fn told(&self, name: &str, epoch: u64) -> String {
        let since = match self.epoch {
            Some(before) if before != epoch => format!(", of {before} changes of sides, where there were {epoch}"),
            Some(_) => String::new(),
            None => ", started by hand".to_owned(),
        };
        let (member, pid) = (&self.member, self.pid);
        if !self.is_ours() {
            return format!(
                "a machine runs in {} on {member} as process {pid}: {}",
                self.folder.display(),
                self.why.text()
            );
        }
        format!("a machine of {name} runs on {member} as process {pid}{since}: {}", self.why.text())
    }
}

/// Leaves beside a machine's sockets of which chain it is, and of which epoch.
///
/// # Errors
/// I/O; a stamp that cannot be read.
pub(crate) fn note(folder: &Path, runtime_dir: &Path) -> Result<()> {
    let path = runtime_dir.join(STAMP);
    match Stamp::read(folder)? {
        Some(stamp) => {
            let text = serde_json::to_vec(&stamp).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
            put_file(&path, &text)
        }
        None => layers::remove(&path),
    }
}

/// The machines of a replica that run where it does not serve. Looks only.
pub fn find(host: &dyn Host, rooms: &Rooms, site: &Site, record: &ReplicaRecord) -> Vec<Stray> {
    if record.state.is_final() {
        return Vec::new();
    }
    let recorded = (record.host.as_str(), record.folder.clone());
    let cluster = site.cluster_of(&record.host).map(|cluster| site.members(cluster)).unwrap_or_default();
    let others = cluster.into_iter().map(|(member, host)| (member, host.images.join(&record.name)));
    let mut found: Vec<Stray> = Vec::new();
    for (member, folder) in std::iter::once(recorded).chain(others) {
        let places = rooms.places(&folder);
        let Some(running) = host.find(&places) else { continue };
        let is_known = found.iter().any(|known| known.running.process == running.process);
        let note = Stamp::read(&places.runtime_dir).ok().flatten();
        let shown = Shown::of(&folder, record);
        let Some(why) = why(record, member, &running, &shown, note.as_ref()).filter(|_| !is_known) else { continue };
        found.push(Stray {
            member: member.to_owned(),
            folder,
            pid: running.process.pid,
            lineage: note.as_ref().map(|note| note.lineage),
            epoch: note.as_ref().map(|note| note.epoch),
            why,
            is_settled: is_settled(record, why, &shown),
            running,
        });
    }
    found
}

fn why(record: &ReplicaRecord, member: &str, running: &Running, shown: &Shown, note: Option<&Stamp>) -> Option<Why> {
    let served = record.failover.as_ref().and_then(|failover| failover.running.as_ref());
    let serves = matches!(record.state, State::Failover | State::FailedFailover | State::ReadyToSwitch);
    if served.is_some_and(|served| served.process == running.process) {
        return match shown {
            Shown::Gone => Some(Why::Lost),
            Shown::Theirs(_) => Some(Why::Fenced),
            Shown::Ours => (!serves).then_some(Why::Unasked),
            Shown::Silent | Shown::Unreadable => None,
        };
    }
    // Whoever has changed the sides since may have started it: it is not ours to end.
    let theirs = |stamp: &Stamp| stamp.lineage != record.lineage || stamp.epoch > record.epoch;
    if note.is_some_and(theirs) {
        return None;
    }
    let is_ours = match shown {
        Shown::Theirs(_) => return None,
        Shown::Ours => true,
        // An empty folder has no number of a process: it was found by the socket that the note lies beside.
        Shown::Gone | Shown::Unreadable => note.is_some(),
        // The note is of a machine that ran here once, before there was something else in the folder.
        Shown::Silent => false,
    };
    if !is_ours {
        return Some(Why::Stranger);
    }
    if serves && served.is_some_and(|served| served.process.is_alive()) {
        return Some(Why::Beside);
    }
    // One that was started by hand where it is to serve.
    (!serves || member != record.host).then_some(Why::Unasked)
}

/// Whether it stays one too many whatever an operation that was cut short comes to: that may have started a machine that
/// is not recorded yet, and puts a stamp of its own before it is.
fn is_settled(record: &ReplicaRecord, why: Why, shown: &Shown) -> bool {
    let may_be_ours = |stamp: &Stamp| stamp.lineage == record.lineage && stamp.epoch == record.epoch + 1;
    match why {
        Why::Lost => true,
        Why::Fenced => matches!(shown, Shown::Theirs(stamp) if !may_be_ours(stamp)),
        Why::Beside | Why::Unasked | Why::Stranger => false,
    }
}

/// Those of the machines found that may be turned off now: at least one.
///
/// # Errors
/// [`Code::State`] where there is none; [`Code::Busy`] where there may be one when the operation that is open has ended.
pub fn to_park(catalogue: &Catalogue, record: &ReplicaRecord, found: Vec<Stray>) -> Result<Vec<Stray>> {
    let mut strays: Vec<Stray> = found.into_iter().filter(Stray::is_ours).collect();
    let about = object(&record.name);
    let Some(open) = catalogue.open_operations()?.into_iter().find(|open| open.object == about) else {
        none_is_refused(record, &strays)?;
        return Ok(strays);
    };
    strays.retain(|stray| stray.is_settled);
    if strays.is_empty() {
        let session = catalogue.work(open.work)?.session.map(|session| format!(" {session}")).unwrap_or_default();
        let what =
            format!("{} of {} has not come to its end: which machine serves is not settled", open.op, record.name);
        return Err(Fail::new(Code::Busy, what).at(about).help(format!("aquifer sessions{session}")));
    }
    Ok(strays)
}

/// Turns off the machines of a replica that run where it does not serve, of those that were `confirmed`.
///
/// # Errors
/// As [`to_park`]; one that does not end.
pub fn park(desk: &Desk<'_>, site: &Site, name: &str, confirmed: &[Process]) -> Result<()> {
    let row = desk.load(name)?;
    let record = row.record.clone();
    // Whoever did this before, and died before it could say so, has ended them.
    if !confirmed.is_empty() && confirmed.iter().all(|process| !process.is_alive()) {
        return confirmed
            .iter()
            .try_for_each(|process| tell(desk, &record, format!("process {} is off", process.pid), None));
    }
    let strays = to_park(desk.catalogue, &record, find(desk.host, desk.rooms, site, &record))?;
    let is_confirmed = |stray: &Stray| confirmed.contains(&stray.running.process);
    let (strays, others): (Vec<_>, Vec<_>) = strays.into_iter().partition(is_confirmed);
    for other in &others {
        let what = format!("{}; nobody has confirmed that one", other.told(name, record.epoch));
        (desk.warn)(Code::WarnHost, what);
    }
    none_is_refused(&record, &strays)?;
    if strays.iter().any(|stray| matches!(stray.why, Why::Beside | Why::Unasked)) {
        let mut row = row;
        row.record.needs_resync = true;
        desk.store(row)?;
    }
    for stray in &strays {
        let told = stray.told(name, record.epoch);
        // Whoever has lost the lease is refused here, and ends nothing.
        tell(desk, &record, format!("{told}; it is to be turned off"), None)?;
        let done = desk.host.power_off(&stray.running).map_err(Fail::from);
        match done {
            Ok(_) => tell(desk, &record, format!("{told}; process {} is off", stray.pid), None)?,
            Err(fail) => {
                tell(desk, &record, told, Some(fail.what.clone()))?;
                return Err(fail);
            }
        }
    }
    Ok(())
}

/// Refuses to park nothing.
fn none_is_refused(record: &ReplicaRecord, strays: &[Stray]) -> Result<()> {
    if !strays.is_empty() {
        return Ok(());
    }
    let name = &record.name;
    let what = format!("no machine of {name} runs where it does not serve: it is {}", record.state);
    Err(Fail::new(Code::State, what).at(object(name)).help(format!("aquifer replicas {name}")))
}

fn tell(desk: &Desk<'_>, record: &ReplicaRecord, reason: String, error: Option<String>) -> Result<()> {
    let state = record.state.name().to_owned();
    let event = Event {
        object: object(&record.name),
        from: Some(state.clone()),
        to: Some(state),
        op: "park".into(),
        session: desk.fence.session,
        user: desk.fence.owner.clone(),
        reason: Some(reason),
        error,
    };
    Ok(desk.catalogue.event_of(desk.fence, &event)?)
}
