//! What the repositories of a job have that is new: for jobs that wait for points.

use std::{collections::BTreeMap, fs};

use aquifer_formats::repo::{Error, PointQuery, Repository};
use jiff::Timestamp;

use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    repository,
    site::{Job, JobKind, ReplicaSource, Site},
};

/// The newest complete point of each machine of a job, in the repositories that the job reads, by its id. Machines
/// without a point are left out.
///
/// # Errors
/// The repositories'.
pub fn newest_points(context: &Context, site: &Site, job: &Job) -> Result<BTreeMap<String, String>> {
    let mut newest: BTreeMap<String, (Timestamp, String)> = BTreeMap::new();
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
            let found = (point.created().unwrap_or_default(), point.id.to_string());
            let known = newest.entry(wanted.clone()).or_insert_with(|| found.clone());
            if found > *known {
                *known = found;
            }
        }
    }
    Ok(newest.into_iter().map(|(machine, (_, id))| (machine, id)).collect())
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
