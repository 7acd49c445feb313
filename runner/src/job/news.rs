//! What the repositories of a job have that is new: for jobs that wait for points.
//!
//! Invariants
//! - New is what a run would take: a point of a later moment. A copy of one, or one written anew, is nothing new.

use std::{collections::BTreeMap, fs};

use aquifer_formats::repo::{Error, Machine, PointQuery, Repository};
use jiff::Timestamp;

use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    repository,
    site::{Job, JobKind, ReplicaSource, Site},
};

/// The moment of the newest complete point of each machine of a job, in the repositories that the job reads. Machines
/// without a point are left out.
///
/// # Errors
/// The repositories'.
pub fn newest_points(context: &Context, site: &Site, job: &Job) -> Result<BTreeMap<String, Timestamp>> {
    let mut newest: BTreeMap<String, Timestamp> = BTreeMap::new();
    for name in read_by(job) {
        let repo = open(context, site, name)?;
        for wanted in job.kind.machines() {
            let machine = match repo.machine(wanted) {
                Ok(machine) => machine,
                Err(Error::NotFound { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            let point = match repo.resolve(&machine, &PointQuery::Latest(0)) {
                Ok(point) => point,
                Err(Error::NotFound { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            let known = newest.entry(wanted.clone()).or_default();
            *known = point.created().unwrap_or_default().max(*known);
        }
    }
    Ok(newest)
}

/// Machines with points in a repository that has none of `machine` yet, and that the site file does not name: one of them
/// may be that machine under the name that it had before.
///
/// # Errors
/// The repository's.
pub fn unnamed(repo: &Repository, site: &Site, machine: &str) -> Result<Vec<String>> {
    let answers = |known: &Machine, name: &str| known.name == name || known.aliases.iter().any(|alias| alias == name);
    let (there, mut found) = (repo.machines()?, Vec::new());
    if there.iter().any(|known| answers(known, machine)) {
        return Ok(found);
    }
    for known in there.iter().filter(|known| !site.machines.keys().any(|name| answers(known, name))) {
        if !repo.points(known)?.is_empty() {
            found.push(known.name.clone());
        }
    }
    Ok(found)
}

/// What is told of them.
pub fn told_of_unnamed(machine: &str, repository: &str, unnamed: &[String]) -> String {
    let names = unnamed.join(", ");
    format!(
        "{machine} begins a chain of its own in {repository}; the points of {names} there are of no machine of the site \
         file: one that was renamed goes on with its points only under the name they have"
    )
}

/// The repositories whose points a job reads.
fn read_by(job: &Job) -> &[String] {
    match &job.kind {
        JobKind::Backup(_) => &[],
        JobKind::Replication(job) => match &job.source {
            ReplicaSource::Backup { repositories, .. } | ReplicaSource::Production { repositories, .. } => repositories,
        },
        JobKind::Copy(job) => &job.from,
        JobKind::Health(job) => std::slice::from_ref(&job.repository),
    }
}

fn open(context: &Context, site: &Site, name: &str) -> Result<Repository> {
    let entry = site.repositories.get(name);
    let entry = entry.ok_or_else(|| Fail::new(Code::Config, format!("the site file has no repository `{name}`")))?;
    let dir = fs::canonicalize(&entry.url).unwrap_or_else(|_| entry.url.clone());
    Ok(Repository::open(&dir, repository::me(context)?)?)
}
