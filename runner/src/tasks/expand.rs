//! From a job of the site file to the work of one run.
//!
//! Invariants
//! - Pure: the same site gives the same work.
//! - One piece of work for each machine: one that fails, is tried again or waits holds up no other.
//! - The object of a piece of work is what it changes; so work of several jobs on one chain or replica takes turns.

use serde::{Deserialize, Serialize};

use crate::{
    catalogue::{Need, NewWork, Retries},
    site::{BackupJob, CopyJob, HealthJob, Job, JobKind, MachineSource, ReplicaSource, ReplicationJob, Site},
};

/// Tasks at once on a repository or host that names no number.
const TASKS: u32 = 4;

/// Priorities, as `docs/site.md` has them.
const HIGH: i32 = 400;
const BACKUP: i32 = 300;
const COPY: i32 = 200;
const UPKEEP: i32 = 100;
/// A job that the schedule began goes before one that somebody began by hand.
const SCHEDULED: i32 = 30;
const MANUAL: i32 = 10;

/// What a piece of a job's work is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// The job.
    pub job: String,
    /// The machine; none where the job takes what it finds.
    pub machine: Option<String>,
}

/// The work of a run of a job.
pub fn works(site: &Site, name: &str, job: &Job, scheduled: bool) -> Vec<NewWork> {
    let mut machines: Vec<Option<&str>> = job.kind.machines().iter().map(|machine| Some(machine.as_str())).collect();
    if machines.is_empty() {
        machines.push(None);
    }
    let base = match &job.kind {
        _ if job.high_priority => HIGH,
        JobKind::Backup(_) | JobKind::Replication(_) => BACKUP,
        JobKind::Copy(_) => COPY,
        JobKind::Health(_) => UPKEEP,
    };
    let one = |machine: Option<&str>| {
        let (object, needs) = match &job.kind {
            JobKind::Backup(job) => backup(site, job, machine),
            JobKind::Replication(job) => replication(site, job, machine),
            JobKind::Copy(job) => copy(site, job, machine),
            JobKind::Health(job) => health(site, job, machine),
        };
        let priority = base + if scheduled { SCHEDULED } else { MANUAL };
        let spec = serde_json::json!({ "job": name, "machine": machine });
        let retries = Retries {
            count: job.retry.count,
            interval_ms: i64::try_from(job.retry.interval.as_millis()).unwrap_or(i64::MAX / 4),
        };
        NewWork { job: Some(name.to_owned()), needs, retries, ..NewWork::new(job.kind.name(), object, priority, spec) }
    };
    machines.into_iter().map(one).collect()
}

fn backup(site: &Site, job: &BackupJob, machine: Option<&str>) -> (String, Vec<Need>) {
    let mut needs = vec![of_repository(site, &job.to)];
    let source = machine.and_then(|machine| site.machines.get(machine)).map(|machine| &machine.source);
    if let Some(MachineSource::Host { host, .. }) = source {
        needs.push(of_host(site, host));
    }
    (chain(&job.to, machine), needs)
}

fn replication(site: &Site, job: &ReplicationJob, machine: Option<&str>) -> (String, Vec<Need>) {
    let mut needs = vec![of_host(site, &job.host)];
    match &job.source {
        // Which one is read is not known yet where there are several.
        ReplicaSource::Backup { repositories, .. } => {
            needs.extend(
                repositories.iter().take(1).filter(|_| repositories.len() == 1).map(|r| of_repository(site, r)),
            );
        }
        ReplicaSource::Production { .. } => {
            let source = machine.and_then(|machine| site.machines.get(machine)).map(|machine| &machine.source);
            if let Some(MachineSource::Host { host, .. }) = source {
                needs.push(of_host(site, host));
                needs.dedup();
            }
        }
    }
    let machine = machine.unwrap_or_default();
    let replica = job.replica_of(machine);
    (format!("replica/{replica}"), needs)
}

fn copy(site: &Site, job: &CopyJob, machine: Option<&str>) -> (String, Vec<Need>) {
    let mut needs = vec![of_repository(site, &job.to)];
    needs.extend(
        job.from.iter().take(1).filter(|from| job.from.len() == 1 && **from != job.to).map(|r| of_repository(site, r)),
    );
    (chain(&job.to, machine), needs)
}

fn health(site: &Site, job: &HealthJob, machine: Option<&str>) -> (String, Vec<Need>) {
    let object = match machine {
        Some(machine) => format!("health/{}/{machine}", job.repository),
        None => format!("health/{}", job.repository),
    };
    (object, vec![of_repository(site, &job.repository)])
}

fn chain(repository: &str, machine: Option<&str>) -> String {
    match machine {
        Some(machine) => format!("chain/{repository}/{machine}"),
        None => format!("chain/{repository}"),
    }
}

fn of_repository(site: &Site, name: &str) -> Need {
    let limit = site.repositories.get(name).and_then(|entry| entry.max_tasks).unwrap_or(TASKS);
    Need { resource: format!("repository/{name}"), limit }
}

/// Members of a cluster have their slots together: on which of them work is done is not known before it begins.
fn of_host(site: &Site, name: &str) -> Need {
    let name = site.cluster_of(name).unwrap_or(name);
    let sum = site.members(name).iter().map(|(_, host)| host.max_tasks.unwrap_or(TASKS)).reduce(u32::saturating_add);
    let limit = site.clusters.get(name).and_then(|cluster| cluster.max_tasks).or(sum).unwrap_or(TASKS);
    Need { resource: format!("host/{name}"), limit }
}
