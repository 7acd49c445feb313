//! Proves that every name refers to something, and that what is there does not contradict itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::{Component, Path, PathBuf},
};

use super::{JobKind, MachineSource, Reading, Site, shape::Values};
use crate::{machine::plain_name, schedule::When, strict::nearest};

/// What a name refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Repository,
    /// A host or a cluster.
    Host,
    /// A host itself.
    OneHost,
    Machine,
    Job,
    /// A machine of which some job makes a replica.
    Replicated,
    /// A target of notifications.
    Target,
}

#[derive(Debug)]
struct Reference {
    what: What,
    name: String,
    by: String,
    place: Range<usize>,
}

/// Names that were defined (also by what could not be read further) and referred to.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Hosts and clusters.
    pub(super) hosts: BTreeSet<String>,
    pub(super) clusters: BTreeSet<String>,
    pub(super) machines: BTreeSet<String>,
    pub(super) jobs: BTreeSet<String>,
    references: Vec<Reference>,
}

impl Names {
    pub(super) fn refer(&mut self, what: What, name: &str, by: &str, place: Range<usize>) {
        self.references.push(Reference { what, name: name.to_owned(), by: by.to_owned(), place });
    }
}

pub(super) fn prove(reading: &mut Reading<'_>, top: Values<'_, '_>, site: &Site) {
    let routes = top.table("notify").map(|notify| notify.tables("route")).unwrap_or_default();
    for (route, _) in routes {
        reading.refer_all(What::Target, "to", "notify.route", route);
        reading.refer_all(What::Job, "job", "notify.route", route);
        reading.refer_all(What::Machine, "machine", "notify.route", route);
    }
    references(reading, top, site);
    repositories_apart(reading, top, site);
    no_circle(reading, top, site);
    one_writer(reading, top, site);
    not_on_itself(reading, top, site);
    one_cluster(reading, top, site);
}

fn references(reading: &mut Reading<'_>, top: Values<'_, '_>, site: &Site) {
    let keys = |key: &str| -> BTreeSet<String> { top.named(key).into_iter().map(|(name, ..)| name).collect() };
    let repositories = keys("repository");
    let targets = top.table("notify").map(|notify| notify.named("target")).unwrap_or_default();
    let targets: BTreeSet<String> = targets.into_iter().map(|(name, ..)| name).collect();
    let replicated = site.jobs.values().filter_map(|job| match &job.kind {
        JobKind::Replication(job) => Some(job.machines.iter().cloned()),
        _ => None,
    });
    let replicated: BTreeSet<String> = replicated.flatten().collect();
    let single: BTreeSet<String> = reading.names.hosts.difference(&reading.names.clusters).cloned().collect();
    for reference in std::mem::take(&mut reading.names.references) {
        let Reference { what, name, by, place } = reference;
        let (known, kind) = match what {
            What::Repository => (&repositories, "repository"),
            What::Host => (&reading.names.hosts, "host"),
            What::OneHost => (&single, "host"),
            What::Machine => (&reading.names.machines, "machine"),
            What::Job => (&reading.names.jobs, "job"),
            What::Target => (&targets, "target"),
            What::Replicated => {
                if !replicated.contains(&name) && site.machines.contains_key(&name) {
                    let problem = format!("{by} fails `{name}` over, but no replication job makes a replica of it");
                    reading.reader.problem(place, problem);
                }
                continue;
            }
        };
        if known.contains(&name) {
            continue;
        }
        if what == What::OneHost && reading.names.clusters.contains(&name) {
            let problem = format!("{by} names `{name}`, which is a cluster; name one of its members");
            reading.reader.problem(place, problem);
            continue;
        }
        let words: Vec<&str> = known.iter().map(String::as_str).collect();
        let near = nearest(&name, &words).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
        let problem = format!("{by} names the {kind} `{}`, which is not in this file{near}", name.escape_debug());
        reading.reader.problem(place, problem);
    }
}

/// Two repositories in one folder, or one in the other, would take each other's files for their own.
fn repositories_apart(reading: &mut Reading<'_>, top: Values<'_, '_>, site: &Site) {
    let mut seen: Vec<(&String, PathBuf)> = Vec::new();
    for (name, table, _) in top.named("repository") {
        let Some((name, entry)) = site.repositories.get_key_value(&name) else { continue };
        let path = plain(&entry.url);
        if let Some((other, _)) = seen.iter().find(|(_, other)| path.starts_with(other) || other.starts_with(&path)) {
            let problem = format!("repository.{name} and repository.{other} share a folder");
            reading.reader.problem(table.place("url"), problem);
        }
        seen.push((name, path));
    }
}

/// A path without `.`, `..` and doubled slashes, by its text alone.
fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            _ => out.push(part),
        }
    }
    out
}

/// A job that waits for itself never runs.
fn no_circle(reading: &mut Reading<'_>, top: Values<'_, '_>, site: &Site) {
    let before = |name: &str| match &site.jobs.get(name)?.schedule.when {
        When::After { job } => Some(job.clone()),
        _ => None,
    };
    for (name, table, _) in top.named("job") {
        let mut at = name.clone();
        for _ in 0..=site.jobs.len() {
            match before(&at) {
                Some(next) if next == name => {
                    reading.reader.problem(table.place("schedule"), format!("job.{name} waits for itself"));
                    break;
                }
                Some(next) => at = next,
                None => break,
            }
        }
    }
}

/// Two jobs that write one chain, or one replica, would undo each other's work.
fn one_writer(reading: &mut Reading<'_>, top: Values<'_, '_>, site: &Site) {
    let mut writers: BTreeMap<(String, String), String> = BTreeMap::new();
    for (name, table, _) in top.named("job") {
        let Some(job) = site.jobs.get(&name) else { continue };
        let writes: Vec<(String, String)> = match &job.kind {
            JobKind::Backup(job) => {
                job.machines.iter().map(|m| (format!("repository.{}", job.to), m.clone())).collect()
            }
            JobKind::Copy(job) => job.machines.iter().map(|m| (format!("repository.{}", job.to), m.clone())).collect(),
            // A replica is known by its name alone.
            JobKind::Replication(job) => {
                job.machines.iter().map(|m| ("the site".to_owned(), job.replica_of(m))).collect()
            }
            JobKind::Health(_) => Vec::new(),
        };
        // Several backup jobs into one repository take turns: their points follow each other in one chain.
        let copies = !matches!(job.kind, JobKind::Backup(_));
        for (place, machine) in writes {
            match writers.get(&(place.clone(), machine.clone())) {
                Some(other) if copies => {
                    let problem = format!("job.{name} and job.{other} both write {machine} in {place}");
                    reading.reader.problem(table.place("machines"), problem);
                }
                _ => {
                    writers.insert((place, machine), name.clone());
                }
            }
        }
    }
}

/// A replica must not take the place of a machine.
fn not_on_itself(reading: &mut Reading<'_>, top: Values<'_, '_>, site: &Site) {
    for (name, table, _) in top.named("job") {
        let Some(JobKind::Replication(job)) = site.jobs.get(&name).map(|job| &job.kind) else { continue };
        for machine in &job.machines {
            let replica = job.replica_of(machine);
            if let Err(what) = plain_name(&replica) {
                reading.reader.problem(table.place("machines"), format!("the name of a replica of {machine}: {what}"));
            }
            let taken = site.machines.iter().find(|(_, known)| {
                let there = site.members(&job.host);
                matches!(&known.source, MachineSource::Host { host, name } if there.iter().any(|(on, _)| on == host) && *name == replica)
            });
            if let Some((other, _)) = taken {
                let problem =
                    format!("job.{name} would make the replica `{replica}` on {}, where machine.{other} is", job.host);
                reading.reader.problem(table.place("target"), problem);
            }
        }
    }
}

/// A host belongs to one cluster, and a cluster's replicas stand in the folder that its members have between them.
fn one_cluster(reading: &mut Reading<'_>, top: Values<'_, '_>, site: &Site) {
    let mut seen: BTreeMap<&String, &String> = BTreeMap::new();
    for (name, table, _) in top.named("host") {
        let Some((name, cluster)) = site.clusters.get_key_value(&name) else { continue };
        for member in &cluster.members {
            if let Some(other) = seen.insert(member, name).filter(|other| *other != name) {
                let problem = format!("host.{member} is a member of host.{other} and of host.{name}");
                reading.reader.problem(table.place("members"), problem);
            }
        }
    }
    for (name, table, _) in top.named("job") {
        let Some(JobKind::Replication(job)) = site.jobs.get(&name).map(|job| &job.kind) else { continue };
        if job.path.is_some() && site.clusters.contains_key(&job.host) {
            let problem = format!("job.{name}: `path` and a cluster exclude each other: its members have `images`");
            reading.reader.problem(table.place("target"), problem);
        }
    }
}
