//! Failover plans: several replicas take over in an order, each when those before it are ready.
//!
//! Invariants
//! - What a run has done is recorded before and after each machine: whoever goes on with it begins nothing twice.
//! - A machine that serves already, or is on its way home, is left out; production's machines are touched only as the
//!   plan's `fence` says.
//! - A halt lets what is under way finish; a run that halted or failed is gone on from with what is left.
//!
//! Not here: what a takeover is (`failover`), the queue (`tasks`).

mod begin;
mod gate;
mod program;
mod walk;

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use begin::{candidate, last_run, ready_entries};
pub use walk::run;

use crate::{
    catalogue::{PlanRun, SessionId, WorkId},
    fail::{Code, Fail, Result},
    host::Network,
    operate::Fence,
    site::{Plan, Site},
};

/// The kind of this work in the queue.
pub const KIND: &str = "plan";

/// What a run of a plan is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanSpec {
    /// The plan.
    pub plan: String,
    /// Which restore point of each machine: `latest`, or the newest not after a time.
    pub to: String,
    /// How long a guest of production has to turn itself off.
    pub grace: Duration,
    /// Where network cards are plugged in.
    pub network: Network,
    /// Why.
    pub reason: Option<String>,
    /// What happens to production's machines first, where it is not what the site file says.
    #[serde(default)]
    pub fence: Option<Fence>,
    /// Whether the machines stay off: then there is no gate to wait at.
    #[serde(default)]
    pub no_start: bool,
    /// Whether runs of jobs that have a replica in their hands when its turn comes are stopped.
    #[serde(default)]
    pub cancel_job: bool,
    /// The run that is gone on with.
    pub resumes: Option<i64>,
}

/// How an entry of a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Its turn has not come.
    #[default]
    Waiting,
    /// Its takeover is under way.
    Starting,
    /// It runs; its gate is not open yet.
    Gating,
    /// It is ready.
    Ready,
    /// It did not come up.
    Failed,
    /// It served already, or was on its way home.
    Skipped,
}

/// A machine in a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EntryRecord {
    /// The machine.
    pub machine: String,
    /// Its replica.
    pub replica: Option<String>,
    /// How it stands.
    pub step: Step,
    /// The session of its takeover.
    pub session: Option<i64>,
    /// Why it failed or was left out.
    pub why: Option<String>,
    /// The restore point it serves from.
    pub point: Option<Uuid>,
    /// When its disks looked like that.
    pub taken: Option<Timestamp>,
    /// Milliseconds from the beginning of the run until it was ready.
    pub rto_ms: Option<i64>,
    /// What is to be looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<crate::operate::Warned>,
}

/// A run of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Version of the record.
    pub version: u32,
    /// The work that carries it out.
    pub work: i64,
    /// Its session.
    pub session: Option<i64>,
    /// Whether the programs before the first machine have run.
    pub prepared: bool,
    /// The machines.
    pub entries: Vec<EntryRecord>,
    /// When it ended.
    pub ended: Option<Timestamp>,
}

/// States of a run.
pub mod state {
    /// It is under way.
    pub const IN_PROGRESS: &str = "in_progress";
    /// Every machine is ready, or was left out.
    pub const COMPLETED: &str = "completed";
    /// A machine did not come up.
    pub const FAILED: &str = "failed";
    /// It waits for somebody's word.
    pub const HALTED: &str = "halted";
}

/// A run as the catalogue has it.
pub type Run = PlanRun<RunRecord>;

impl RunRecord {
    fn new(plan: &Plan, work: WorkId, session: Option<SessionId>) -> Self {
        let entry =
            |entry: &crate::site::PlanEntry| EntryRecord { machine: entry.machine.clone(), ..Default::default() };
        Self {
            version: 1,
            work: work.0,
            session: session.map(|session| session.0),
            prepared: false,
            entries: plan.entries.iter().map(entry).collect(),
            ended: None,
        }
    }
}

/// How the catalogue names a plan.
pub fn object(name: &str) -> String {
    format!("plan/{name}")
}

/// The plan of that name, or the names there are.
///
/// # Errors
/// [`Code::NotFound`].
pub fn find<'s>(site: &'s Site, name: &str) -> Result<&'s Plan> {
    site.plans.get(name).ok_or_else(|| {
        let names: Vec<&str> = site.plans.keys().map(String::as_str).collect();
        let there =
            if names.is_empty() { "it has no plans".to_owned() } else { format!("it has {}", names.join(", ")) };
        let fail = Fail::new(Code::NotFound, format!("the site file has no plan `{name}`"));
        fail.at("site file").cause(there).help("aquifer plan list")
    })
}
