//! Giving replicas up, and letting their job make them again: work of the queue, so that it takes turns with runs.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    catalogue::NewWork,
    fail::{Code, Fail, Result},
    host::{Network, Process},
    replica::{
        desk::object,
        model::ReplicaRecord,
        recall,
        remove::{self, Files},
        run::ReplicaSpec,
        seat,
        state::{Op, State},
        stray,
    },
    site::{JobKind, Site},
    tasks::{Done, Task},
};

/// The kind of this work in the queue.
pub const KIND: &str = "give_up";

/// Before backups and copies: somebody waits for it.
const PRIORITY: i32 = 800;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// It leaves the list, its files stay.
    Remove,
    /// It leaves the list and its files go.
    Delete,
    /// Its job makes it again.
    Readmit,
    /// It leaves the list; its folder is somebody else's, and is left alone.
    Drop,
    /// A catalogue that has lost it learns of it from its folder.
    TakeBack,
    /// Its machines that run where it does not serve are turned off.
    Park,
}

/// What such a piece of work is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Spec {
    replica: String,
    act: Act,
    /// The processes that whoever asked has seen and given up: no other is ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    confirmed: Vec<Process>,
}

impl Act {
    /// Refuses what the replica's state forbids.
    ///
    /// # Errors
    /// [`Code::State`].
    pub fn check(self, record: &ReplicaRecord) -> Result<()> {
        let about = |fail: Fail| fail.at(object(&record.name)).help(format!("aquifer replicas {}", record.name));
        match self {
            // What runs where is looked at when it is done.
            Self::Park => Ok(()),
            Self::Remove | Self::Delete => record.state.step(Op::Remove).map(drop).map_err(|no| about(no.into())),
            Self::Drop if record.state != State::Removed => Ok(()),
            Self::Drop => Err(about(Fail::new(Code::State, format!("{} was given up already", record.name)))),
            Self::TakeBack | Self::Readmit if record.state == State::Removed => Ok(()),
            Self::TakeBack => {
                let what = format!("{} is known, and {}", record.name, record.state);
                Err(about(Fail::new(Code::Exists, what)))
            }
            Self::Readmit => {
                let what = format!("{} was not given up: it is {}", record.name, record.state);
                Err(about(Fail::new(Code::State, what)))
            }
        }
    }

    /// As sessions name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Remove => "remove",
            Self::Delete => "delete",
            Self::Readmit => "readmit",
            Self::Drop => "drop",
            Self::TakeBack => "take_back",
            Self::Park => "park",
        }
    }
}

/// The work; `confirmed` are the processes that [`Act::Park`] may end.
pub fn work(replica: &str, act: Act, confirmed: &[Process]) -> NewWork {
    let spec = json!({ "replica": replica, "act": act, "confirmed": confirmed });
    NewWork::new(KIND, object(replica), PRIORITY, spec)
}

/// Does it.
///
/// # Errors
/// [`Code::State`]; [`Code::ForeignOwner`]; I/O.
pub fn run(task: &Task<'_>) -> Result<Done> {
    let spec: Spec = task.spec()?;
    let (done, told) = seat::at_desk(task, Network::None, std::time::Duration::ZERO, |desk| match spec.act {
        // An earlier holder of this work may have brought it to its end.
        Act::Remove | Act::Delete if is_gone(desk, &spec.replica)? => Ok(()),
        Act::Remove => remove::remove(desk, &spec.replica, Files::Stay),
        Act::Delete => remove::remove(desk, &spec.replica, Files::Go),
        Act::Readmit => remove::readmit(desk, &spec.replica),
        Act::Drop => recall::drop_foreign(desk, &spec.replica),
        Act::TakeBack => recall::take_back(desk, &there(task, &spec.replica)?),
        Act::Park => stray::park(desk, task.context.site()?, &spec.replica, &spec.confirmed),
    });
    done?;
    let report = json!({ "replica": spec.replica, "act": spec.act });
    let why: Vec<String> = told.iter().map(|(code, what)| format!("{}: {what}", code.name())).collect();
    Ok(if why.is_empty() { Done::Success(report) } else { Done::Warning { why: why.join("; "), report } })
}

/// What the site file says of a replica.
///
/// # Errors
/// [`Code::NotFound`]: no job makes one of that name.
pub fn named(site: &Site, replica: &str) -> Result<(String, String)> {
    for (name, job) in &site.jobs {
        let JobKind::Replication(job) = &job.kind else { continue };
        if let Some(machine) = job.machines.iter().find(|machine| job.replica_of(machine) == replica) {
            return Ok((name.clone(), machine.clone()));
        }
    }
    let what = format!("no job of the site file makes a replica `{replica}`");
    Err(Fail::new(Code::NotFound, what).help("aquifer config show"))
}

fn wanted(task: &Task<'_>, replica: &str) -> Result<ReplicaSpec> {
    let site = task.context.site()?;
    let (name, machine) = named(site, replica)?;
    match site.jobs.get(&name).map(|job| &job.kind) {
        Some(JobKind::Replication(job)) => seat::spec(task.context, &name, job, &machine),
        _ => Err(Fail::new(Code::Bug, "a job that was found is gone")),
    }
}

/// The same on the member of a cluster through which its folder can be seen.
fn there(task: &Task<'_>, replica: &str) -> Result<ReplicaSpec> {
    let site = task.context.site()?;
    let mut spec = wanted(task, replica)?;
    if !spec.folder.exists() {
        let members = site.cluster_of(&spec.host).map(|cluster| site.members(cluster)).unwrap_or_default();
        let folders = members.into_iter().map(|(member, host)| (member, host.images.join(replica)));
        if let Some((member, folder)) = folders.into_iter().find(|(_, folder)| folder.exists()) {
            (spec.host, spec.folder) = (member.to_owned(), folder);
        }
    }
    Ok(spec)
}

fn is_gone(desk: &crate::replica::desk::Desk<'_>, name: &str) -> Result<bool> {
    crate::replica::recover::recover_for(desk, name, Op::Remove)?;
    Ok(desk.load(name)?.record.state == State::Removed)
}
