//! Which member of a cluster a replica is on, and which one goes on with it when that is lost.
//!
//! ```text
//! IMAGES/aquifer-cluster.json    put into the folder that the members have between them, by whoever comes first
//! ```
//!
//! Invariants
//! - A member is used only while it shows the cluster's own folder: an empty mount point is no member.
//! - A replica stays where it is for as long as that member can be used; it is moved in the catalogue, never copied.
//! - It is not moved while its machine runs on any member: two of them would write to one disk.
//! - What a job says of its target is for replicas that it makes from then on.
//!
//! Not here: what is done with the replica there.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    desk::{Desk, Stamp, object},
    digests::put_file,
    model::ReplicaRecord,
    run::ReplicaSpec,
    state::State,
    stray,
};
use crate::{
    catalogue::Event,
    fail::{Code, Fail, Result},
    site::{Host, Site},
};

/// Name of the mark in the members' folder.
const MARK: &str = "aquifer-cluster.json";

/// The mark of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    version: u32,
    cluster: String,
    id: Uuid,
}

/// What a member shows.
enum Shown {
    Mark(Mark),
    /// A folder without a mark.
    Nothing,
    /// No folder, and why.
    Lost(String),
}

fn look(host: &Host) -> Shown {
    if let Err(error) = fs::read_dir(&host.images) {
        return Shown::Lost(format!("{}: {error}", host.images.display()));
    }
    match fs::read(host.images.join(MARK)).map(|bytes| serde_json::from_slice(&bytes)) {
        Ok(Ok(mark)) => Shown::Mark(mark),
        Ok(Err(error)) => Shown::Lost(format!("{}: {error}", host.images.join(MARK).display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Shown::Nothing,
        Err(error) => Shown::Lost(format!("{}: {error}", host.images.display())),
    }
}

/// The members of a cluster that can be used, in its order.
///
/// # Errors
/// [`Code::RepoOffline`]: none of them can be; [`Code::Refused`]: they do not have one folder between them.
fn usable<'s>(site: &'s Site, cluster: &str) -> Result<Vec<(&'s str, &'s Host)>> {
    let (mut members, mut lost, mut id) = (Vec::new(), Vec::new(), None);
    for (member, host) in site.members(cluster) {
        match look(host) {
            Shown::Mark(mark) if id.is_some_and(|id| id != mark.id) => {
                let what =
                    format!("{member} does not have the folder that other members of the cluster {cluster} have");
                return Err(Fail::new(Code::Refused, what).at(host.images.display()));
            }
            Shown::Mark(mark) => {
                id = Some(mark.id);
                members.push((member, host));
            }
            Shown::Nothing => lost.push(format!("{member}: {} is not the cluster's folder", host.images.display())),
            Shown::Lost(why) => lost.push(format!("{member}: {why}")),
        }
    }
    if members.is_empty() {
        let what = format!("no host of the cluster {cluster} can be used");
        return Err(Fail::new(Code::RepoOffline, what).cause(lost.join("; ")));
    }
    Ok(members)
}

/// Marks the members' folder, if nobody has yet.
fn mark(cluster: &str, host: &Host) -> Result<()> {
    if !matches!(look(host), Shown::Nothing) {
        return Ok(());
    }
    let mark = Mark { version: 1, cluster: cluster.to_owned(), id: Uuid::new_v4() };
    let text = serde_json::to_vec_pretty(&mark).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
    put_file(&host.images.join(MARK), &text)
}

/// The member for a replica that is not there yet. The first replica of a cluster says which folder is its members'.
fn fresh<'s>(desk: &Desk<'_>, site: &'s Site, cluster: &str) -> Result<(&'s str, &'s Host)> {
    let known = desk.catalogue.replicas::<ReplicaRecord>()?;
    let is_first = !known.iter().any(|row| site.cluster_of(&row.record.host) == Some(cluster));
    let members = site.members(cluster);
    let is_marked = members.iter().any(|(_, host)| matches!(look(host), Shown::Mark(_)));
    let there = members.iter().find(|(_, host)| matches!(look(host), Shown::Nothing));
    if let Some((_, host)) = there.filter(|_| is_first && !is_marked) {
        mark(cluster, host)?;
    }
    first(usable(site, cluster)?, cluster)
}

/// The replica's place, before anything is done there: where it is, on another member where that is lost, or, for one
/// that is not there yet, on the first that can be used.
///
/// # Errors
/// [`Code::RepoOffline`]: no member can be used; [`Code::Refused`]: they do not have one folder between them;
/// [`Code::State`]: its machine runs on a member that cannot be used.
pub fn place(desk: &Desk<'_>, site: &Site, target: &str, spec: &ReplicaSpec) -> Result<ReplicaSpec> {
    let target = group(site, target);
    let known = desk.catalogue.replica::<ReplicaRecord>(&spec.name)?.map(|row| row.record);
    let Some(known) = known.filter(|known| known.state != State::Removed || known.excluded) else {
        if !site.clusters.contains_key(target) {
            return Ok(spec.clone());
        }
        let (member, host) = fresh(desk, site, target)?;
        return Ok(at(spec, member, host.images.join(&spec.name)));
    };
    if known.machine != spec.machine {
        return Ok(spec.clone());
    }
    if !known.excluded {
        settle(desk, site, &spec.name)?;
    }
    let record = desk.load(&spec.name)?.record;
    if group(site, &record.host) != target && !known.excluded {
        let what = format!("{} stays on {}: another target of its job is for new replicas", spec.name, record.host);
        (desk.warn)(Code::WarnHost, what);
    } else if let Some(named) = named_elsewhere(site, spec, &record) {
        let (here, named) = (record.folder.display(), named.display());
        let what = format!("{} stays in {here}: {named}, which the site file names, is for new replicas", spec.name);
        (desk.warn)(Code::WarnHost, what);
    }
    Ok(at(spec, &record.host, record.folder))
}

/// The folder that the site file names for replicas like this one, where that is another than it is in.
fn named_elsewhere(site: &Site, spec: &ReplicaSpec, record: &ReplicaRecord) -> Option<PathBuf> {
    let host = site.hosts.get(&record.host)?;
    let named = if record.host == spec.host { spec.folder.parent()? } else { host.images.as_path() };
    let real = fs::canonicalize(named).unwrap_or_else(|_| named.to_path_buf());
    (!record.excluded && record.folder.parent()? != real).then(|| named.to_path_buf())
}

/// The cluster of a host, or the host itself.
fn group<'a>(site: &'a Site, host: &'a str) -> &'a str {
    site.cluster_of(host).unwrap_or(host)
}

fn at(spec: &ReplicaSpec, host: &str, folder: PathBuf) -> ReplicaSpec {
    ReplicaSpec { host: host.to_owned(), folder, ..spec.clone() }
}

fn first<T>(members: Vec<T>, cluster: &str) -> Result<T> {
    let none = || Fail::new(Code::RepoOffline, format!("no host of the cluster {cluster} can be used"));
    members.into_iter().next().ok_or_else(none)
}

/// Whether the member that a replica is on is lost, and another one is not.
///
/// # Errors
/// As [`place`].
pub fn is_lost(site: &Site, record: &ReplicaRecord) -> Result<bool> {
    let Some((cluster, host)) = site.cluster_of(&record.host).zip(site.hosts.get(&record.host)) else {
        return Ok(false);
    };
    if Stamp::read(&record.folder).is_ok_and(|stamp| stamp.is_some_and(|stamp| stamp.lineage == record.lineage)) {
        mark(cluster, host)?;
        return Ok(false);
    }
    Ok(usable(site, cluster)?.iter().all(|(member, _)| *member != record.host))
}

/// Moves a replica to another member, where its own is lost. Nothing is copied: it is the same folder.
///
/// # Errors
/// As [`place`].
pub fn settle(desk: &Desk<'_>, site: &Site, name: &str) -> Result<()> {
    let mut row = desk.load(name)?;
    if !is_lost(site, &row.record)? {
        return Ok(());
    }
    let Some(cluster) = site.cluster_of(&row.record.host) else { return Ok(()) };
    // Under its recorded folder first: the folder of a host that is lost cannot be followed to where it led.
    let recorded = (row.record.host.as_str(), row.record.folder.clone());
    let others = site.members(cluster).into_iter().map(|(member, host)| (member, host.images.join(name)));
    for (member, folder) in std::iter::once(recorded).chain(others) {
        if let Some(running) = desk.running(&folder) {
            let pid = running.process.pid;
            let what = format!(
                "the machine of {name} still runs on {member}, as process {pid}: it is not started anywhere else"
            );
            let strays = stray::find(desk.host, desk.rooms, site, &row.record);
            let is_parked = strays.iter().any(|stray| stray.is_ours() && stray.process() == running.process);
            let (word, way) = if is_parked { (" --park", "turns it off, or") } else { ("", "shows it;") };
            let folder = folder.display();
            let help = format!("aquifer replicas {name}{word}    # {way} mount {folder} again and it goes on");
            return Err(Fail::new(Code::State, what).at(object(name)).help(help));
        }
    }
    let (member, host) = first(usable(site, cluster)?, cluster)?;
    let folder = same(&row.record, &host.images.join(name))?;
    let from = std::mem::replace(&mut row.record.host, member.to_owned());
    row.record.folder = folder;
    let state = row.record.state.name().to_owned();
    desk.store(row)?;
    let what = format!("{from} of the cluster {cluster} is lost; {member} goes on with {name}");
    let event = Event {
        object: object(name),
        from: Some(state.clone()),
        to: Some(state),
        op: "move".into(),
        session: desk.fence.session,
        user: desk.fence.owner.clone(),
        reason: Some(what.clone()),
        ..Event::default()
    };
    desk.catalogue.event_of(desk.fence, &event)?;
    (desk.warn)(Code::WarnHost, what);
    Ok(())
}

/// The replica's folder as another member has it.
fn same(record: &ReplicaRecord, folder: &Path) -> Result<PathBuf> {
    let found = fs::canonicalize(folder);
    if record.state == State::Absent && found.is_err() {
        // Its first run had not come so far.
        fs::create_dir_all(folder).map_err(|e| Fail::io(folder.display(), "create", &e))?;
    }
    let folder = fs::canonicalize(folder).map_err(|e| Fail::io(folder.display(), "find", &e))?;
    match Stamp::read(&folder)? {
        Some(stamp) if stamp.lineage == record.lineage => Ok(folder),
        None if record.state == State::Absent => Ok(folder),
        Some(_) | None => {
            let what = format!("{} does not hold the replica {}", folder.display(), record.name);
            Err(Fail::new(Code::ForeignOwner, what).at(folder.display()))
        }
    }
}
