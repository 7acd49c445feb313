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
//! - What it wrote stays where it is; where that may be the replica's own layers, they are compared before they are used.
//!
//! Not here: moving a replica to another member ([`super::member`]).

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use super::{
    desk::{Desk, STAMP, Stamp, object},
    digests::put_file,
    layers,
    model::ReplicaRecord,
    state::State,
};
use crate::{
    catalogue::Event,
    fail::{Code, Fail, Result},
    host::{Host, Rooms, Running},
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
}

impl Why {
    fn text(self) -> &'static str {
        match self {
            Self::Lost => "its host has lost the folder that it runs on",
            Self::Fenced => "its folder is somebody else's by now",
            Self::Beside => "it runs beside the one that serves",
            Self::Unasked => "none is to run now",
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
    #[serde(skip)]
    running: Running,
}

impl Stray {
    /// In a sentence, of the replica `name` whose sides were changed `epoch` times.
    pub fn told(&self, name: &str, epoch: u64) -> String {
        let since = match self.epoch {
            Some(before) if before != epoch => format!(", of {before} changes of sides, where there were {epoch}"),
            Some(_) => String::new(),
            None => ", started by hand".to_owned(),
        };
        let (member, pid) = (&self.member, self.pid);
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
        let Some(why) = why(record, member, &folder, &running, note.as_ref()).filter(|_| !is_known) else { continue };
        found.push(Stray {
            member: member.to_owned(),
            folder,
            pid: running.process.pid,
            lineage: note.as_ref().map(|note| note.lineage),
            epoch: note.as_ref().map(|note| note.epoch),
            why,
            running,
        });
    }
    found
}

fn why(record: &ReplicaRecord, member: &str, folder: &Path, running: &Running, note: Option<&Stamp>) -> Option<Why> {
    let served = record.failover.as_ref().and_then(|failover| failover.running.as_ref());
    let serves = matches!(record.state, State::Failover | State::FailedFailover | State::ReadyToSwitch);
    let shown = Stamp::read(folder).ok().flatten();
    let is_ours = |stamp: &Stamp| stamp.lineage == record.lineage && stamp.epoch == record.epoch;
    if served.is_some_and(|served| served.process == running.process) {
        return match shown {
            None => Some(Why::Lost),
            Some(stamp) if !is_ours(&stamp) => Some(Why::Fenced),
            Some(_) => (!serves).then_some(Why::Unasked),
        };
    }
    // Whoever has changed the sides since may have started it: it is not ours to end.
    let theirs = |stamp: &Stamp| stamp.lineage != record.lineage || stamp.epoch > record.epoch;
    if note.is_some_and(theirs) || shown.as_ref().is_some_and(|stamp| !is_ours(stamp)) {
        return None;
    }
    if serves && served.is_some_and(|served| served.process.is_alive()) {
        return Some(Why::Beside);
    }
    // One that was started by hand where it is to serve.
    (!serves || member != record.host).then_some(Why::Unasked)
}

/// Turns off every machine of a replica that runs where it does not serve. Answers which they were.
///
/// # Errors
/// [`Code::State`] where there is none; [`Code::ForeignOwner`] where one runs beside and the folder is not ours; one that
/// does not end.
pub fn park(desk: &Desk<'_>, site: &Site, name: &str) -> Result<Vec<Stray>> {
    let record = desk.load(name)?.record;
    let strays = find(desk.host, desk.rooms, site, &record);
    none_is_refused(&record, &strays)?;
    for stray in &strays {
        // Whoever has lost the lease is refused here, and ends nothing.
        tell(desk, &record, stray, None)?;
        if let Err(error) = desk.host.power_off(&stray.running, std::time::Duration::ZERO) {
            let fail = Fail::from(error);
            tell(desk, &record, stray, Some(fail.what.clone()))?;
            return Err(fail);
        }
    }
    if strays.iter().any(|stray| matches!(stray.why, Why::Beside | Why::Unasked)) {
        let mut row = desk.load(name)?;
        row.record.needs_resync = true;
        desk.store(row)?;
    }
    Ok(strays)
}

/// Refuses to park nothing.
///
/// # Errors
/// [`Code::State`].
pub fn none_is_refused(record: &ReplicaRecord, strays: &[Stray]) -> Result<()> {
    if !strays.is_empty() {
        return Ok(());
    }
    let name = &record.name;
    let what = format!("no machine of {name} runs where it does not serve: it is {}", record.state);
    Err(Fail::new(Code::State, what).at(object(name)).help(format!("aquifer replicas {name}")))
}

fn tell(desk: &Desk<'_>, record: &ReplicaRecord, stray: &Stray, error: Option<String>) -> Result<()> {
    let state = record.state.name().to_owned();
    let event = Event {
        object: object(&record.name),
        from: Some(state.clone()),
        to: Some(state),
        op: "park".into(),
        session: desk.fence.session,
        user: desk.fence.owner.clone(),
        reason: Some(stray.told(&record.name, record.epoch)),
        error,
    };
    Ok(desk.catalogue.event_of(desk.fence, &event)?)
}
