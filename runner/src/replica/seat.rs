//! A desk for a piece of work of the site: the lease it is done under, the host, the folders, and what it counts.
//!
//! Invariants
//! - What is read is counted with the task, and ends with it where somebody asks it to stop.
//! - Warnings are collected: whoever does the work tells them with its end.
//!
//! Not here: what is done at the desk.

use std::{path::PathBuf, time::Duration};

use parking_lot::Mutex;

use super::{
    build::Moved,
    desk::Desk,
    rules::Rules,
    run::{ReplicaSpec, RunOptions},
};
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    host::{Network, Rooms, qemu::Qemu},
    repository,
    site::{ReplicaSource, ReplicationJob},
    tasks::{Counts, Task},
};

/// A warning, with its code.
pub type Told = (Code, String);

/// Does something at the desk of a task; answers with the warnings on the way, also where it failed.
pub fn at_desk<T>(
    task: &Task<'_>,
    network: Network,
    grace: Duration,
    act: impl FnOnce(&Desk<'_>) -> Result<T>,
) -> (Result<T>, Vec<Told>) {
    let told = Mutex::new(Vec::new());
    let done = seated(task, (network, grace), &told, act);
    (done, told.into_inner())
}

fn seated<T>(
    task: &Task<'_>,
    (network, grace): (Network, Duration),
    told: &Mutex<Vec<Told>>,
    act: impl FnOnce(&Desk<'_>) -> Result<T>,
) -> Result<T> {
    let me = repository::me_for_good(task.context)?;
    let cache = task.context.cache()?;
    let rooms = rooms(task.context)?;
    let pace = |moved: Moved| {
        count(task.counts, moved);
        task.check()
    };
    let warn = |code: Code, what: String| {
        tracing::warn!(target: "aquifer", code = code.name(), "{what}");
        told.lock().push((code, what));
    };
    act(&Desk {
        catalogue: task.catalogue,
        fence: task.fence,
        host: &Qemu,
        rooms: &rooms,
        me: &me,
        cache: &cache,
        pace: &pace,
        warn: &warn,
        network,
        grace,
        // The journal itself refuses whoever has lost the lease.
        alive: &|| Ok(()),
    })
}

/// Counts what moves with a task.
pub fn count(counts: &Counts, moved: Moved) {
    Counts::add(&counts.done, moved.looked_at());
    match moved {
        Moved::Ahead(bytes) => Counts::add(&counts.total, bytes),
        Moved::Read(bytes) => Counts::add(&counts.read, bytes),
        Moved::Zeros(_) | Moved::Checked(_) => {}
        Moved::Written(bytes) => Counts::add(&counts.written, bytes),
        Moved::Merged(bytes) => Counts::add(&counts.merged, bytes),
        Moved::Took(stage, took) => counts.stages.add(stage, took),
        Moved::Equal(blocks) => Counts::add(&counts.blocks_equal, blocks),
    }
}

/// Where the machines of the site's hosts have their sockets.
///
/// # Errors
/// [`Code::NotFound`] where there is no folder for state.
pub fn rooms(context: &Context) -> Result<Rooms> {
    let runtime = context.runtime_dir()?;
    let site = context.site()?;
    let of_host = |(name, host): (&String, &crate::site::Host)| {
        let own = host.runtime.clone().unwrap_or_else(|| runtime.join("hosts").join(name));
        // By both names: replicas are recorded under the one that a path of links leads to.
        let real = std::fs::canonicalize(&host.images).unwrap_or_else(|_| host.images.clone());
        [(host.images.clone(), own.clone()), (real, own)]
    };
    Ok(Rooms { hosts: site.hosts.iter().flat_map(of_host).collect(), others: runtime.join("machines") })
}

/// What a job says of the replica of `machine`.
///
/// # Errors
/// [`Code::NotFound`]: a name of the site file that is not there any more.
pub fn spec(context: &Context, job_name: &str, job: &ReplicationJob, machine: &str) -> Result<ReplicaSpec> {
    let site = context.site()?;
    let missing = |what: String| Fail::new(Code::NotFound, what).help("aquifer config check");
    // Which member of a cluster it is, is settled at the desk.
    let host = site.members(&job.host).into_iter().next();
    let (host_name, host) = host.ok_or_else(|| missing(format!("there is no host `{}`", job.host)))?;
    let folder = |name: &str| -> Result<PathBuf> {
        let entry = site.repositories.get(name);
        Ok(entry.ok_or_else(|| missing(format!("there is no repository `{name}`")))?.url.clone())
    };
    let (repositories, catch_up_all) = match &job.source {
        ReplicaSource::Backup { repositories, catch_up } => {
            (repositories, *catch_up == crate::site::CatchUpPoints::All)
        }
        ReplicaSource::Production { repositories, .. } => (repositories, false),
    };
    let name = job.replica_of(machine);
    let metadata = match &job.metadata {
        Some(name) => folder(name)?.join("replicas"),
        // Near what is read, so that nobody has to ask the other site what it has.
        None => match repositories.first() {
            Some(name) => folder(name)?.join("replicas"),
            None => context.home()?.join("replicas"),
        },
    };
    let options = RunOptions {
        catch_up_all,
        keep: job.points_to_keep,
        parallel: usize::try_from(job.parallel_disks).unwrap_or(1),
        block: job.block_bytes,
        verify: job.verify,
        imported: job.imported,
        ..RunOptions::default()
    };
    Ok(ReplicaSpec {
        folder: job.path.as_ref().unwrap_or(&host.images).join(&name),
        name,
        machine: machine.to_owned(),
        job: Some(job_name.to_owned()),
        host: host_name.to_owned(),
        metadata,
        repositories: repositories.iter().map(|name| folder(name)).collect::<Result<_>>()?,
        options,
        rules: Rules::of(site, job, machine),
    })
}
